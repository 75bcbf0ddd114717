"""What the report says, as facts that docs/report_template.md names: numbers, tables, figures."""

import re
from pathlib import Path

import numpy as np
import torch

from evaluate import background_only, format_mean_std, published
from metrics import BOUNDARY, compare, mean_iou, mean_std
from tools import figures
from tools.collect import (
    MODELS,
    Groups,
    dead,
    lab_iou,
    label,
    markdown,
    read_arrays,
    stat,
    table,
)

HIGH_ACCURACY, LOW_IOU = 0.8, 0.5  # what is called high and poor
PERFECT = 0.9995  # rounds to 1.000
BATCH = 50  # test images the lab scored
DRAWS = 2000  # of a bootstrap: its 95 % limits then move by a few per cent of their distance
YES_NO = {
    "more": "**Yes**",
    "less": "**No, it did worse**",
    "noise": "**Not beyond noise**",
    "one seed": '**Cannot be told from one seed** (`SEEDS="0 1 2"` adds seeds)',
}


def describe_models(models: Groups, out: Path) -> dict:
    """Compare the models: the table, curves, classes, boundaries, confusion; the first question."""
    one = next(iter(models.values()))[0]
    classes, nothing = list(one.config["classes"]), background_only(one.test)
    accuracy, iou = nothing["pixel_accuracy"], nothing["mean_iou"]
    score = {name: stat(runs, "mean_iou") for name, runs in models.items()}
    top = max(score, key=lambda name: score[name]["mean"])
    columns = {
        "boundary IoU": lambda runs: format_mean_std(stat(runs, "boundary_iou")),
        "mean Dice": lambda runs: f"{stat(runs, 'mean_dice')['mean']:.4f}",
        "accuracy": lambda runs: f"{stat(runs, 'pixel_accuracy')['mean']:.4f}",
        "dead classes": dead,
        "lab IoU": lab_iou,
        "parameters": lambda runs: f"{runs[0].test['parameters']:,}",
    }
    first = {"": nothing["name"], "test mean IoU": f"{iou:.4f}", "accuracy": f"{accuracy:.4f}"}
    first |= {
        "mean Dice": f"{nothing['mean_dice']:.4f}",
        "dead classes": dead([one._replace(test=nothing)]),
    }
    made = table(models, "testing", columns, first)
    lines = {
        f"{split} {text}": {
            name: [[entry[split][key] for entry in one.history] for one in runs]
            for name, runs in models.items()
        }
        for split, key, text in (
            ("training", "mean_iou", "mean IoU"),
            ("validation", "mean_iou", "mean IoU"),
            ("validation", "loss", "loss"),
        )
    }
    by_class = {
        c: {
            n: mean_std([one.test["per_class_iou"][c] for one in runs])
            for n, runs in models.items()
        }
        for c in classes
    }
    boundary = {"boundary IoU": {n: stat(runs, "boundary_iou") for n, runs in models.items()}}
    matrices = {
        n: sum(np.array(r.test["confusion_matrix"]) for r in runs) for n, runs in models.items()
    }
    figures.curves(out / "curves.png", lines)
    figures.dots(out / "classes.png", by_class, "test IoU")
    figures.dots(out / "boundary.png", {"mean IoU": score} | boundary, "test score")
    figures.confusion(out / "confusion.png", matrices, classes)
    return {
        "models_table": made,
        "mark_note": "" if "**best**" in made else "No lead here lies beyond that.",
        "curves": "figures/curves.png",
        "class_dots": "figures/classes.png",
        "boundary_dots": "figures/boundary.png",
        "confusion": "figures/confusion.png",
        "band": BOUNDARY,
        "boundary_iou": boundary["boundary IoU"],
        "accuracy_verdict": "**No.**"
        if accuracy >= HIGH_ACCURACY and iou <= LOW_IOU
        else "**Not shown by this data.**",
        "background": classes[0],
        "background_accuracy": f"{accuracy:.4f}",
        "background_iou": f"{iou:.4f}",
        "high_accuracy": HIGH_ACCURACY,
        "low_iou": LOW_IOU,
        "top": top,
        "top_iou": format_mean_std(score[top]),
        "top_accuracy": format_mean_std(stat(models[top], "pixel_accuracy")),
    }


def show_images(models: Groups, out: Path) -> dict:
    """Show images with each model's prediction: evenly spaced ones, and the worst of one model."""
    arrays = {name: read_arrays(runs[0]) for name, runs in models.items()}
    if not all(found is not None for found in arrays.values()):
        return {}
    judged = list(models)[-1]
    mine, colours = arrays[judged], models[judged][0].config["classes"]
    half = (len(mine["shown"]) + 1) // 2  # the first half is evenly spaced, the second the worst
    single = {name: mean_iou(torch.from_numpy(a["matrices"])) for name, a in arrays.items()}
    for file, rows in (("frames", slice(None, half)), ("worst", slice(half, None))):
        chosen = mine["shown"][rows]
        captions = [
            {"image": mine["names"][i].replace("_", " ").replace(" ", "\n", 1)[:40]}
            | {name: f"IoU {float(iou[i]):.4f}" for name, iou in single.items()}
            for i in chosen
        ]
        predictions = {name: a["predictions"][chosen] for name, a in arrays.items()}
        pixels = mine["images"][rows], mine["masks"][rows]
        figures.panels(out / f"{file}.png", *pixels, predictions, captions, colours)
    return {
        "judged": judged,
        "even_panels": "figures/frames.png",
        "worst_panels": "figures/worst.png",
    }


def verdict(name: str, a: dict, b: dict) -> dict:
    """Say whether the mean of `a` exceeds that of `b`."""
    difference = f"{a['mean'] - b['mean']:+.4f}"
    return {f"{name}_verdict": YES_NO[compare(a, b)], f"{name}_difference": difference}


def answer_questions(groups: Groups, augment: Groups, tune: Groups) -> dict:
    """Answer the lab's questions but the first, as far as there are runs."""
    facts: dict = {}
    if {"initial", "modified"} <= groups.keys():
        a, b = (stat(groups[name], "mean_iou") for name in ("modified", "initial"))
        facts |= verdict("modified", a, b)
        facts |= {"modified_iou": format_mean_std(a), "initial_iou": format_mean_std(b)}
        facts |= {f"{name}_lab": lab_iou(groups[name]) for name in ("modified", "initial")}
    tried = {name: runs for name, runs in augment.items() if name != "none"}
    if tried and "none" in augment:
        # Chosen on validation, and only then looked up on the test split.
        best = max(tried, key=lambda name: stat(tried[name], "mean_iou", "validation")["mean"])
        a, b = stat(tried[best], "mean_iou"), stat(augment["none"], "mean_iou")
        facts |= verdict("augment", a, b) | {"augment_number": len(tried), "augment_best": best}
        facts |= {"augment_iou": format_mean_std(a), "none_iou": format_mean_std(b)}
    factors = {"model (the lab's three)": {n: groups[n] for n in MODELS[:3] if n in groups}}
    factors["augmentation"] = augment
    for name, runs in tune.items():
        # "learning-rate-0.001" varies the learning rate; a cell of the grid varies two factors
        if match := re.fullmatch(r"([a-z-]+)-[^-]+", name):
            settings = factors.setdefault(match[1].replace("-", " "), {})
            settings |= {"base": tune["base"]} if "base" in tune else {}
            settings[name] = runs
    rows = []
    for factor, settings in factors.items():
        stats = {n: stat(runs, "mean_iou", "validation") for n, runs in settings.items()}
        if len(stats) > 1:
            low, high = (pick(stats, key=lambda n: stats[n]["mean"]) for pick in (min, max))
            beyond = {"more": "yes", "one seed": "one seed"}.get(
                compare(stats[high], stats[low]), "no"
            )
            ends = [f"{name}: {format_mean_std(stats[name])}" for name in (low, high)]
            spread = stats[high]["mean"] - stats[low]["mean"]
            rows.append([factor, str(len(stats)), *ends, f"{spread:.4f}", beyond])
    rows.sort(key=lambda row: -float(row[4]))
    if len(rows) > 1:
        header = ["factor", "settings", "lowest", "highest", "range", "beyond noise"]
        facts |= {"factor": rows[0][0].capitalize(), "factor_range": rows[0][4]}
        facts |= {"factor_beyond": rows[0][5], "factor_table": markdown(header, rows)}
    return facts


def running_average(groups: Groups, out: Path) -> dict:
    """Show what a metric that is never reset makes of the validation curve of tuned."""
    if "tuned" not in groups:
        return {}
    true = [entry["validation"]["mean_iou"] for entry in groups["tuned"][0].history]
    lines = {"each epoch by itself": true, "never reset": running_mean(true)}
    if "modified" in groups:
        before = [entry["validation"]["mean_iou"] for entry in groups["modified"][0].history]
        carried = running_mean(before + true)[len(before) :]
        lines["never reset, carried over from modified"] = carried
    shown = {"validation mean IoU": {name: [values] for name, values in lines.items()}}
    figures.curves(out / "running-average.png", shown)
    last = {"true_last": f"{true[-1]:.4f}", "running_last": f"{lines['never reset'][-1]:.4f}"}
    return last | {"running": "figures/running-average.png", "running_average": lines}


def running_mean(values: list[float]) -> list[float]:
    """Average all values so far, at each."""
    return (np.cumsum(values) / np.arange(1, len(values) + 1)).tolist()


def bootstrap(matrices: np.ndarray, groups: np.ndarray, seed: int = 0) -> dict[str, dict]:
    """Resample the test images of one model, to see how far its mean IoU scatters with them.

    Three samplings, `DRAWS` times each: "whole" draws as many sequences as there are, with
    replacement (Efron 1979), and takes all their images; images of a sequence resemble each other,
    so sequences are the independent samples. "batch" draws `BATCH` images of this very split
    without replacement, as the lab did. "batch of new" draws `BATCH` images, each of a sequence
    that is drawn first: it holds both kinds of chance.

    Args:
        matrices: (M, C, C) confusion matrix of each image; groups: (M,) its sequence.

    Returns:
        Of each sampling the sorted `values` and the limits `low`, `high` that hold 95 % of them.
    """
    rng = np.random.default_rng(seed)
    names, index, counts = np.unique(groups, return_inverse=True, return_counts=True)
    per_sequence = np.zeros((len(names), *matrices.shape[1:]), np.int64)
    np.add.at(per_sequence, index, matrices)
    order, starts = np.argsort(index, kind="stable"), np.cumsum(counts) - counts
    size = min(BATCH, len(groups))
    drawn = rng.integers(len(names), size=(DRAWS, len(names)))
    few = rng.permuted(np.tile(np.arange(len(groups)), (DRAWS, 1)), axis=1)[:, :size]
    new = rng.choice(len(names), (DRAWS, size), p=counts / counts.sum())
    new = order[starts[new] + (rng.random(new.shape) * counts[new]).astype(int)]
    sums = {
        "whole": per_sequence[drawn].sum(axis=1),
        "batch": matrices[few].sum(axis=1),
        "batch of new": matrices[new].sum(axis=1),
    }
    result = {}
    for kind, total in sums.items():
        values = np.sort(mean_iou(torch.from_numpy(total)).nan_to_num(0).numpy())
        low, high = np.quantile(values, (0.025, 0.975)).tolist()
        result[kind] = {"low": low, "high": high, "values": values.tolist()}
    return result


def interval_of_fifty(models: Groups, out: Path) -> dict:
    """Show how wide the interval of a test on 50 images is."""
    name = "tuned" if "tuned" in models else next(iter(models))
    arrays = read_arrays(models[name][0])
    if arrays is None:
        return {}
    samples = bootstrap(arrays["matrices"], arrays["groups"])
    score, sequences = models[name][0].test["mean_iou"], len(set(arrays["groups"]))
    few = f"{min(BATCH, len(arrays['groups']))} images"
    named = {
        f"whole split,\n{sequences} sequences redrawn": samples["whole"],
        f"{few} of this split\n(the lab's test)": samples["batch"],
        f"{few}\nof redrawn sequences": samples["batch of new"],
    }
    figures.intervals(out / "batch-of-50.png", named, score, f"test mean IoU of {name}")
    lab = [published(runs[0].test) for n, runs in models.items() if n in MODELS]
    lab = [value for value in lab if value is not None] or [0.0]
    limits = {kind: {k: s[k] for k in ("low", "high")} for kind, s in samples.items()}
    facts = {
        f"{k}_{end}": f"{limits[k][end]:.4f}" for k in ("whole", "batch") for end in ("low", "high")
    }
    return facts | {
        "bootstrap": {"model": name, "score": score, **limits},
        "interval_model": name,
        "draws": f"{DRAWS:,}",
        "test_images": len(arrays["groups"]),
        "test_groups": sequences,
        "whole_score": f"{score:.4f}",
        "batch_width": f"{limits['batch']['high'] - limits['batch']['low']:.4f}",
        "lab_spread": f"{max(lab) - min(lab):.4f}",
        "intervals": "figures/batch-of-50.png",
    }


def show_dead_classes(groups: Groups, out: Path) -> dict:
    """Show which runs had a dead class, and when."""
    rows, ever = {}, 0
    for name in sorted(groups, key=lambda n: MODELS.index(n) if n in MODELS else len(MODELS)):
        for one in groups[name]:
            epochs = [entry["validation"]["dead_classes"] for entry in one.history]
            ever += any(epochs)
            if any(epochs) or name in MODELS:
                rows[f"{name}, seed {one.seed}"] = epochs
    if not rows:
        return {}
    classes = list(next(iter(groups.values()))[0].config["classes"])
    figures.dead_classes(out / "dead-classes.png", rows, classes)
    return {"dead_runs": ever, "dead_classes": "figures/dead-classes.png", "dead_by_epoch": rows}


def tabulate_experiments(groups: Groups, augment: Groups, tune: Groups, out: Path) -> dict:
    """Tabulate the experiments besides the models compared."""
    facts = {}
    if augment:
        first = {"none": augment["none"]} if "none" in augment else {}
        facts["augment_table"] = table(first | augment, "testing", {"lab IoU": lab_iou})
    if tune:
        best_first = sorted(tune, key=lambda n: -stat(tune[n], "mean_iou", "validation")["mean"])
        facts["tune_table"] = table({n: tune[n] for n in best_first}, "validation", {})
    for half, key in (("one-batch", "one_batch"), ("few-frames", "few_frames")):
        part = {n.split("/")[1]: r for n, r in groups.items() if n.startswith(f"overfit/{half}")}
        if part:
            facts |= tabulate_overfit(part, key, out)
    known = (*MODELS, "augment", "tune", "overfit")
    others = {n: runs for n, runs in groups.items() if n.split("/")[0] not in known}
    if others:
        facts["other_table"] = table(others, "testing", {"lab IoU": lab_iou})
    return facts


def tabulate_overfit(part: Groups, key: str, out: Path) -> dict:
    """Tabulate how far training and validation end apart, with their curves."""
    rows, lines = [], {"training mean IoU": {}, "validation mean IoU": {}}
    for name, runs in part.items():
        last = []
        for split in ("training", "validation"):
            values = [[entry[split]["mean_iou"] for entry in one.history] for one in runs]
            lines[f"{split} mean IoU"][name] = values
            last.append(mean_std([run[-1] for run in values]))
        hit = [
            [e["epoch"] for e in r.history if e["training"]["mean_iou"] >= PERFECT] for r in runs
        ]
        reached = ", ".join(str(epochs[0]) if epochs else "never" for epochs in hit)
        gap = f"{last[0]['mean'] - last[1]['mean']:.4f}"
        images = str(runs[0].config["limit_images"] or "all")
        rows.append(
            [label(name, runs), images, reached, *map(format_mean_std, last), gap, str(len(runs))]
        )
    header = [
        "",
        "images",
        "1.000 in epoch",
        "training mean IoU",
        "validation mean IoU",
        "gap",
        "n",
    ]
    figures.curves(out / f"{key}.png", lines)
    return {f"{key}_table": markdown(header, rows), f"{key}_curves": f"figures/{key}.png"}
