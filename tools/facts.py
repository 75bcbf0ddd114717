"""What the report says: facts by their name in docs/report_template.md, and its figures."""

import re
from pathlib import Path
from typing import NamedTuple

from common import ROOT

import numpy as np
import torch

import figures
from evaluate import COLUMNS, background_only, format_stat, published, tabulate
from figures import colourise
from metrics import BOUNDARY, IGNORE, compare, mean_iou, mean_std

MODELS = ("initial", "modified", "tuned", "best")
HIGH_ACCURACY, LOW_IOU = 0.8, 0.5  # what is called high and poor
PERFECT = 0.9995  # rounds to 1.000
BATCH = 50  # test images the lab scored
DRAWS = 2000  # of a bootstrap: its 95 % limits then move by a few per cent of their distance
CLASS_COLOURS = ([242, 242, 242], [213, 94, 0], [0, 158, 115], [0, 114, 178], [240, 228, 66])
YES_NO = {
    "more": "**Yes**",
    "less": "**No, it did worse**",
    "noise": "**Not beyond noise**",
    "one seed": '**Cannot be told from one seed** (`SEEDS="0 1 2"` adds seeds)',
}


class Run(NamedTuple):
    """A finished run: the content of its files. `validation` and `test` are rows of tables."""

    experiment: str
    seed: int
    folder: Path
    config: dict
    environment: dict
    history: list[dict]
    validation: dict
    test: dict | None  # where the test split is never read


Groups = dict[str, list[Run]]  # experiment → its runs by seed


def stat(runs: list[Run], key: str = "mean_iou", split: str = "test") -> dict:
    """Compute mean and standard deviation of a score over the seeds of an experiment."""
    return mean_std([getattr(run, split)[key] for run in runs])


def text_of(stat: dict) -> str:
    """Format a result of `metrics.mean_std`."""
    return format_stat(stat["values"], std=True)


def rank(groups: Groups, split: str) -> list[str]:
    """Order the names of experiments by their mean IoU on a split, the highest first."""
    return sorted(groups, key=lambda name: -stat(groups[name], split=split)["mean"])


def curves_of(groups: Groups, split: str, key: str = "mean_iou") -> dict[str, list[list]]:
    """List a value of every epoch: experiment → runs → epochs."""
    return {n: [[e[split][key] for e in r.history] for r in runs] for n, runs in groups.items()}


def markdown(lines: list[list[str]]) -> str:
    """Format cells, the heading first, as a Markdown table."""
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
    marked = any(line[0].endswith("*") for line in lines)
    return text.replace("* |", "\\* |") + "\n\n\\* trained by other code than today's." * marked


def table(groups: Groups, split: str, heads: list[str], first: dict | None = None) -> str:
    """Tabulate experiments with some of `evaluate.COLUMNS`, the best marked if beyond noise."""
    rows = {name: [getattr(run, split) for run in runs] for name, runs in groups.items()}
    top, *others = rank(groups, split)
    leaders = [stat(groups[name], split=split) for name in (top, *others[:1])]
    if others and compare(*leaders) == "more":
        rows = {f"**{name}** (best)" if name == top else name: r for name, r in rows.items()}
    heads = ["mean IoU", "n", *heads, "images seen", "training"]
    rows = ({first["name"]: [first]} if first else {}) | rows
    return markdown(tabulate(rows, {head: COLUMNS[head] for head in heads}))


# ---- the models compared


def describe_models(models: Groups, out: Path) -> dict:
    """Compare the models: the table, curves, classes, confusion; the lab's first question."""
    one = next(iter(models.values()))[0]
    classes, nothing = list(one.config["classes"]), background_only(one.test)
    top = models[rank(models, "test")[0]]
    heads = ["boundary IoU", "mean Dice", "accuracy", "dead classes", "lab IoU", "parameters"]
    panels = (("training", "mean_iou"), ("validation", "mean_iou"), ("validation", "loss"))
    lines = {f"{s} {k.replace('_iou', ' IoU')}": curves_of(models, s, k) for s, k in panels}
    dots = {
        title: {name: stat(runs, key) for name, runs in models.items()}
        for title, key in (("mean IoU", "mean_iou"), ("boundary IoU", "boundary_iou"))
    }
    for c in classes:
        each = {n: [run.test["per_class_iou"][c] for run in runs] for n, runs in models.items()}
        dots[c] = {name: mean_std(values) for name, values in each.items()}
    matrices = {
        n: sum(np.array(run.test["confusion_matrix"]) for run in runs) for n, runs in models.items()
    }
    figures.curves(out / "curves.png", lines)
    figures.dots(out / "scores.png", dots, "test score")
    figures.confusion(out / "confusion.png", matrices, classes)
    known = nothing["pixel_accuracy"] >= HIGH_ACCURACY and nothing["mean_iou"] <= LOW_IOU
    return {
        "models_table": table(models, "test", heads, nothing),
        "band": BOUNDARY,
        "accuracy_verdict": "**No.**" if known else "**Not shown by this data.**",
        "background": classes[0],
        "background_accuracy": f"{nothing['pixel_accuracy']:.4f}",
        "background_iou": f"{nothing['mean_iou']:.4f}",
        "high_accuracy": HIGH_ACCURACY,
        "low_iou": LOW_IOU,
        "top": top[0].experiment,
        "top_iou": text_of(stat(top)),
        "top_accuracy": text_of(stat(top, "pixel_accuracy")),
    }


def show_images(models: Groups, arrays: dict[str, dict], out: Path) -> dict:
    """Show images with each model's prediction: evenly spaced ones, and the worst of one model."""
    judged = list(models)[-1]
    mine, classes = arrays[judged], models[judged][0].config["classes"]
    if len(classes) <= len(CLASS_COLOURS):  # ours, which the colour-blind can tell apart
        classes = dict(zip(classes, CLASS_COLOURS, strict=False))
    single = {name: mean_iou(torch.from_numpy(a["matrices"])) for name, a in arrays.items()}
    half = (len(mine["shown"]) + 1) // 2  # the first half is evenly spaced, the second the worst
    for file, chosen in (("frames", range(half)), ("worst", range(half, len(mine["shown"])))):
        rows = []
        for k in chosen:
            i, mask = mine["shown"][k], torch.from_numpy(mine["masks"][k])
            image = torch.from_numpy(mine["images"][k, :3]).expand(3, -1, -1)
            row = [(str(mine["names"][i]), image), ("truth", colourise(mask, classes))]
            for name, found in arrays.items():
                predicted = torch.from_numpy(found["predictions"][i])
                right = ((predicted == mask) | (mask == IGNORE)).to(torch.uint8) * 255
                row.append((f"{name}: {single[name][i]:.4f}", colourise(predicted, classes)))
                row.append(("errors", right.expand(3, -1, -1)))
            rows.append(row)
        figures.save(figures.grid(rows, classes | {"wrong pixel": [0, 0, 0]}), out / f"{file}.png")
    return {"judged": judged}


# ---- the lab's questions


def answer(name: str, a: dict, b: dict) -> dict:
    """Say whether the mean of `a` exceeds that of `b`."""
    difference = f"{a['mean'] - b['mean']:+.4f}"
    return {f"{name}_verdict": YES_NO[compare(a, b)], f"{name}_difference": difference}


def answer_questions(groups: Groups, augment: Groups, tune: Groups) -> dict:
    """Answer the lab's questions but the first, as far as there are runs."""
    facts: dict = {}
    if {"initial", "modified"} <= groups.keys():
        facts |= answer("modified", stat(groups["modified"]), stat(groups["initial"]))
        for name in ("modified", "initial"):
            facts[f"{name}_iou"] = text_of(stat(groups[name]))
            facts[f"{name}_lab"] = published(groups[name][0].test) or "–"
    tried = {name: runs for name, runs in augment.items() if name != "none"}
    if tried and "none" in augment:
        best = rank(tried, "validation")[0]  # and only then looked up on the test split
        a, b = stat(tried[best]), stat(augment["none"])
        facts |= answer("augment", a, b) | {"augment_number": len(tried), "augment_best": best}
        facts |= {"augment_iou": text_of(a), "none_iou": text_of(b)}
    factors = {"model (the lab's three)": {n: groups[n] for n in MODELS[:3] if n in groups}}
    factors["augmentation"] = augment
    for name, runs in tune.items():
        # "learning-rate-0.001" varies the learning rate; a cell of the grid varies two factors
        if match := re.fullmatch(r"([a-z-]+)-[^-]+", name):
            settings = factors.setdefault(match[1].replace("-", " "), {})
            settings |= ({"base": tune["base"]} if "base" in tune else {}) | {name: runs}
    rows = []
    for factor, settings in factors.items():
        if len(settings) > 1:
            ranked = rank(settings, "validation")
            high, low = (stat(settings[ranked[i]], split="validation") for i in (0, -1))
            beyond = {"more": "yes", "one seed": "one seed"}.get(compare(high, low), "no")
            ends = [f"{ranked[-1]}: {text_of(low)}", f"{ranked[0]}: {text_of(high)}"]
            spread = f"{high['mean'] - low['mean']:.4f}"
            rows.append([factor, str(len(settings)), *ends, spread, beyond])
    rows.sort(key=lambda row: -float(row[4]))
    if len(rows) > 1:
        header = ["factor", "settings", "lowest", "highest", "range", "beyond noise"]
        facts |= {"factor": rows[0][0].capitalize(), "factor_range": rows[0][4]}
        facts |= {"factor_beyond": rows[0][5], "factor_table": markdown([header, *rows])}
    return facts


# ---- why the lab's numbers look as they do


def running_average(groups: Groups, out: Path) -> dict:
    """Show what a metric that is never reset makes of the validation curve of tuned."""
    first = {name: runs[:1] for name, runs in groups.items()}
    found = {name: runs[0] for name, runs in curves_of(first, "validation").items()}
    true, before = found["tuned"], found.get("modified", [])
    averages = {"never reset": true, "never reset, carried over from modified": before + true}
    lines = {"each epoch by itself": true}
    for name, values in averages.items():
        mean = np.cumsum(values) / np.arange(1, len(values) + 1)
        lines[name] = mean[-len(true) :].tolist()
    shown = {"validation mean IoU": {name: [values] for name, values in lines.items()}}
    figures.curves(out / "running-average.png", shown)
    return {
        "true_last": f"{true[-1]:.4f}",
        "running_last": f"{lines['never reset'][-1]:.4f}",
        "running_average": lines,
    }


def bootstrap(matrices: np.ndarray, groups: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Resample the test images of one model, to see how far its mean IoU scatters with them.

    Args:
        matrices: (M, C, C) confusion matrix of each image; groups: (M,) its sequence.

    Returns:
        `DRAWS` sorted values of each sampling. "whole" draws as many sequences as there are, with
        replacement (Efron 1979), and takes all their images: those of a sequence are alike, so
        sequences are the independent samples. "batch" draws `BATCH` images of this very split
        without replacement, as the lab did.
    """
    rng = np.random.default_rng(seed)
    names, index = np.unique(groups, return_inverse=True)
    per_sequence = np.zeros((len(names), *matrices.shape[1:]), np.int64)
    np.add.at(per_sequence, index, matrices)
    values = {"whole": [], "batch": []}
    for _ in range(DRAWS):
        drawn = per_sequence[rng.integers(len(names), size=len(names))]
        few = matrices[rng.choice(len(groups), min(BATCH, len(groups)), replace=False)]
        for kind, sample in (("whole", drawn), ("batch", few)):
            values[kind].append(sample.sum(axis=0, dtype=np.int64))
    means = {kind: mean_iou(torch.from_numpy(np.stack(v))) for kind, v in values.items()}
    return {kind: np.sort(mean.nan_to_num(0).numpy()) for kind, mean in means.items()}


def interval_of_fifty(name: str, models: Groups, arrays: dict[str, np.ndarray], out: Path) -> dict:
    """Show how wide the interval of a test on 50 images is, for the model `name`."""
    samples = bootstrap(arrays["matrices"], arrays["groups"])
    score, sequences = models[name][0].test["mean_iou"], len(set(arrays["groups"]))
    few = f"{min(BATCH, len(arrays['groups']))} images"
    limits = {kind: np.quantile(v, (0.025, 0.975)).tolist() for kind, v in samples.items()}
    titles = {
        "whole": f"whole split,\n{sequences} sequences redrawn",
        "batch": f"{few} of this split\n(the lab's test)",
    }
    named = {title: (samples[kind], *limits[kind]) for kind, title in titles.items()}
    figures.intervals(out / "batch-of-50.png", named, score, f"test mean IoU of {name}")
    lab = [published(runs[0].test) for n, runs in models.items() if n in MODELS]
    lab = [value for value in lab if value is not None] or [0.0]
    facts = {"interval_model": name, "whole_score": f"{score:.4f}", "draws": f"{DRAWS:,}"}
    for kind, (low, high) in limits.items():
        facts |= {f"{kind}_low": f"{low:.4f}", f"{kind}_high": f"{high:.4f}"}
        facts[f"{kind}_width"] = f"{high - low:.4f}"
    facts |= {"test_images": len(arrays["groups"]), "test_groups": sequences}
    return facts | {"lab_spread": f"{max(lab) - min(lab):.4f}"}


def show_dead_classes(groups: Groups, out: Path) -> dict:
    """Show which runs had a dead class, and when."""
    rows, ever = {}, 0
    for name, runs in groups.items():
        for run in runs:
            epochs = [entry["validation"]["dead_classes"] for entry in run.history]
            ever += any(epochs)
            if any(epochs) or name in MODELS:
                rows[f"{name}, seed {run.seed}"] = epochs
    if not rows:
        return {}
    number = len(next(iter(groups.values()))[0].config["classes"])
    figures.dead_classes(out / "dead-classes.png", rows, number)
    return {"dead_runs": ever, "dead_by_epoch": rows}


# ---- the other experiments


def tabulate_experiments(groups: Groups, augment: Groups, tune: Groups, out: Path) -> dict:
    """Tabulate the experiments besides the models compared."""
    facts = {}
    if augment:
        first = {"none": augment["none"]} if "none" in augment else {}
        facts["augment_table"] = table(first | augment, "test", ["lab IoU"])
    if tune:
        ranked = {name: tune[name] for name in rank(tune, "validation")}
        facts["tune_table"] = table(ranked, "validation", [])
    for half, key in (("one-batch", "one_batch"), ("few-frames", "few_frames")):
        part = {n.split("/")[1]: r for n, r in groups.items() if n.startswith(f"overfit/{half}")}
        if part:
            facts[f"{key}_table"] = tabulate_overfit(part, out / f"{key}.png")
    known = (*MODELS, "augment", "tune", "overfit")
    others = {name: runs for name, runs in groups.items() if name.split("/")[0] not in known}
    if others:
        facts["other_table"] = table(others, "test", ["lab IoU"])
    return facts


def tabulate_overfit(part: Groups, path: Path) -> str:
    """Tabulate how far training and validation end apart, and draw their curves."""
    header = ["", "images", "1.000 in epoch", "training mean IoU", "validation mean IoU", "gap"]
    lines = {f"{split} mean IoU": curves_of(part, split) for split in ("training", "validation")}
    rows = [[*header, "n"]]
    for name, runs in part.items():
        train, val = (mean_std([c[-1] for c in curves[name]]) for curves in lines.values())
        perfect = [np.flatnonzero(np.array(c) >= PERFECT) for c in lines["training mean IoU"][name]]
        reached = ", ".join(str(epochs[0] + 1) if len(epochs) else "never" for epochs in perfect)
        images, gap = str(runs[0].config["limit_images"] or "all"), train["mean"] - val["mean"]
        texts = [text_of(train), text_of(val), f"{gap:.4f}", str(len(runs))]
        rows.append([name, images, reached, *texts])
    figures.curves(path, lines)
    return markdown(rows)


def missing_experiments(groups: Groups) -> list[str]:
    """List the make targets of experiments of which no finished run was found."""
    missing = {f"train-{name}": [name] for name in (*MODELS, "final") if name not in groups}
    for folder in ("augment", "tune", "overfit"):
        names = sorted(path.stem for path in (ROOT / "configs" / folder).glob("*.yaml"))
        missing[folder] = [name for name in names if f"{folder}/{name}" not in groups]
    lines = {target: ", ".join(names) for target, names in missing.items() if names}
    return [f"`make {target}` makes {names}." for target, names in lines.items()]
