"""What the report says: facts by their name in docs/report_template.md, and its figures."""

import re
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch

import figures
from evaluate import COLUMNS, background_only, format_stat, rank, tabulate
from figures import colourise
from metrics import BOUNDARY, IGNORE, compare, fisher, mean_iou, mean_std
from runs import TEXTS

LAB_MODELS = ("initial", "modified", "tuned")
MODELS = (*LAB_MODELS, "best")
HIGH_ACCURACY, LOW_IOU = 0.8, 0.5  # what is called high and poor
PERFECT = 0.9995  # rounds to 1.000
CLASS_COLOURS = ([242, 242, 242], [213, 94, 0], [0, 158, 115], [0, 114, 178], [240, 228, 66])

# A finished run: the content of its files. `validation` and `test` are rows of tables; `test` is
# None where the test split is never read.
Run = namedtuple("Run", "experiment seed folder config environment history validation test")
Groups = dict[str, list[Run]]  # experiment → its runs by seed
Rows = dict[str, list[dict]]  # experiment → the rows of its runs


def rows_of(groups: Groups, split: str) -> Rows:
    """Take the rows of a split, "validation" or "test"."""
    return {name: [getattr(run, split) for run in runs] for name, runs in groups.items()}


def contrast(a: list[dict], b: list[dict]) -> dict:
    """Tell whether the mean IoU of one experiment exceeds that of another.

    Beyond noise is what exceeds the chance of the seeds (Welch's t test) and, of tests, that of the
    scenes: a paired t test of the difference that each scene makes, the mean over the seeds. The
    interval of the difference is the wider one.
    """
    first, second = (mean_std([row["mean_iou"] for row in rows]) for rows in (a, b))
    result, margin = compare(first, second)
    if result != "one seed" and all("contributions" in row for row in a + b):  # not on validation
        means = [np.mean([row["contributions"] for row in rows], axis=0) for rows in (a, b)]
        scenes = (means[0] - means[1]).tolist()
        by_scenes, other = compare(mean_std(scenes), mean_std([0.0] * len(scenes)))
        result = result if result == by_scenes else "noise"
        margin = None if other is None else max(margin, other)  # of the only scene there is none
    difference = first["mean"] - second["mean"]
    interval = f"{difference:+.4f}" + ("" if margin is None else f" ± {margin:.4f}")
    found = {"first": COLUMNS["mean IoU"](a), "second": COLUMNS["mean IoU"](b)}
    found |= {"result": result, "verdict": TEXTS["verdicts"][result]}
    return found | {"difference": difference, "interval": interval}


def panels(groups: Groups, *splits: str, key: str = "mean_iou") -> dict[str, dict]:
    """List a value of every epoch for `figures.curves`: label → experiment → runs → epochs."""
    found = {}
    for split in splits:
        lines = {n: [[e[split][key] for e in r.history] for r in g] for n, g in groups.items()}
        found[f"{split} {key.replace('_iou', ' IoU')}"] = lines
    return found


def markdown(lines: list[list[str]]) -> str:
    """Format cells, the heading first, as a Markdown table."""
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
    return text.replace("* |", "\\* |")


def limits(rows: list[dict]) -> str:
    """Format the limits of 95 % of the draws of other test scenes, their means over the seeds."""
    found = [row.get("interval") for row in rows]
    return "–" if None in found else "–".join(map(format_stat, zip(*found, strict=True)))


def mark_best(rows: Rows) -> Rows:
    """Mark the name of the best experiment, if it is best beyond noise."""
    top, *others = rank(rows)
    if not others or contrast(rows[top], rows[others[0]])["result"] != "more":
        return rows
    return {f"**{name}** (best)" if name == top else name: r for name, r in rows.items()}


def table(rows: Rows, heads: list[str]) -> str:
    """Tabulate experiments with some of `evaluate.COLUMNS`."""
    heads = ["mean IoU", "n", *heads, "images seen", "training"]
    return markdown(tabulate(rows, {h: COLUMNS[h] for h in heads} | {"95 % over scenes": limits}))


def describe_models(models: Groups, out: Path) -> dict:
    """Compare the models: the table, curves, classes, confusion; the lab's first question."""
    rows, dots, matrices = rows_of(models, "test"), {}, {}
    for name, runs in rows.items():
        keys = {"mean IoU": "mean_iou", "boundary IoU": "boundary_iou"}
        dots[name] = [{h: r[k] for h, k in keys.items()} | r["per_class_iou"] for r in runs]
        matrices[name] = sum(np.array(row["confusion_matrix"]) for row in runs)
    nothing = background_only(rows[next(iter(rows))][0])
    top, *others = rank(rows)
    curves = panels(models, "training", "validation") | panels(models, "validation", key="loss")
    figures.curves(out / "curves.png", curves)
    figures.dots(out / "scores.png", dots)
    figures.confusion(out / "confusion.png", matrices, list(nothing["per_class_iou"]))
    known = nothing["pixel_accuracy"] >= HIGH_ACCURACY and nothing["mean_iou"] <= LOW_IOU
    heads = ["boundary IoU", "mean Dice", "accuracy", "dead classes", "dead places"]
    heads += ["lab IoU", "parameters"]
    found = {"models_table": table({nothing["name"]: [nothing]} | mark_best(rows), heads)}
    found["accuracy_verdict"] = "**No.**" if known else "**Not shown by this data.**"
    found |= {f"top_{head}": COLUMNS[head](rows[top]) for head in ("mean IoU", "accuracy", "n")}
    if others:
        found["lead"] = contrast(rows[top], rows[others[0]]) | {"runner_up": others[0]}
    found |= {"band": BOUNDARY, "nothing": nothing, "top": top}
    return found | {"config": models[top][0].config} | describe_runs(rows)


def describe_runs(rows: Rows) -> dict:
    """List the IoUs of each run, and where one, two or three dead places of a class lead to."""
    [[one, *_], *_] = rows.values()
    cells = {"mean IoU": COLUMNS["mean IoU"], "dead places": COLUMNS["dead places"]}
    for name in one["per_class_iou"]:
        cells[name] = lambda runs, name=name: format_stat([runs[0]["per_class_iou"][name]])
    runs = {f"{name}, seed {row['seed']}": [row] for name, tested in rows.items() for row in tested}
    found = {"runs_table": markdown(tabulate(runs, cells)), "ends": {}, "levels": {}}
    for name, tested in rows.items():
        ious = [row["mean_iou"] for row in tested]
        if len(ious) > 1:
            found["ends"][name] = " to ".join(format_stat([end(ious)]) for end in (min, max))
        loss = 1 / 4 / len(one["per_class_iou"])  # of one class's IoU at one of four places
        found["levels"][name] = ", ".join(f"{max(ious) - n * loss:.4f}" for n in (1, 2, 3))
    return found


def show_images(models: Groups, arrays: dict[str, dict], out: Path) -> dict:
    """Show images with each model's prediction: evenly spaced ones, and the worst of one model."""
    judged = list(arrays)[-1]
    mine, classes = arrays[judged], models[judged][0].config["classes"]
    if len(classes) <= len(CLASS_COLOURS):  # ours, which the colour-blind can tell apart
        classes = dict(zip(classes, CLASS_COLOURS, strict=False))
    single = {name: mean_iou(torch.from_numpy(a["matrices"])) for name, a in arrays.items()}
    halves = np.array_split(np.arange(len(mine["shown"])), 2)  # evenly spaced ones, the worst
    for file, chosen in zip(("frames", "worst"), halves, strict=True):
        rows = []
        for k in chosen:
            i, mask = mine["shown"][k], torch.from_numpy(mine["masks"][k])
            image = torch.from_numpy(mine["images"][k, :3]).expand(3, -1, -1)
            rows.append([(str(mine["names"][i]), image), ("truth", colourise(mask, classes))])
            for name, found in arrays.items():
                predicted = torch.from_numpy(found["predictions"][i])
                right = ((predicted == mask) | (mask == IGNORE)).to(torch.uint8) * 255
                rows[-1].append((f"{name}: {single[name][i]:.4f}", colourise(predicted, classes)))
                rows[-1].append(("errors", right.expand(3, -1, -1)))
        figures.save(figures.grid(rows, classes | {"wrong pixel": [0, 0, 0]}), out / f"{file}.png")
    return {"judged": judged}


def answer_questions(models: Groups, augment: Groups, tune: Groups) -> dict:
    """Answer the lab's questions but the first, as far as there are runs."""
    found: dict = {}
    if {"initial", "modified"} <= models.keys():
        rows = rows_of(models, "test")
        found["modified"] = contrast(rows["modified"], rows["initial"])
    rows = rows_of(tune, "validation")
    found["tuned"] = {n: contrast(rows[n], rows["base"]) for n in rows if "base" in rows}
    if {"skip-wide", "head-wide"} <= rows.keys():  # without the wide head classes may die
        found["skip"] = contrast(rows["skip-wide"], rows["head-wide"])
    tried = [name for name in rank(rows_of(augment, "validation")) if name != "none"]
    if tried and "none" in augment:  # chosen by validation, and only then looked up on the test
        rows = rows_of(augment, "test")
        none, *ious = (np.mean([row["mean_iou"] for row in rows[n]]) for n in ("none", *tried))
        below = sum(iou < none for iou in ious)
        found["augment"] = contrast(rows[tried[0]], rows["none"])
        found["augment"] |= {"number": len(tried), "best": tried[0], "below": int(below)}
    return found


def rank_factors(models: Groups, augment: Groups, tune: Groups) -> dict:
    """Tabulate the range of each factor from its worst to its best setting, widest first."""
    factors = {"Model (the lab's three)": {n: models[n] for n in LAB_MODELS if n in models}}
    factors["Augmentation"] = augment
    for name, runs in tune.items():
        # "learning-rate-0.001" varies the learning rate; a cell of the grid and skip-wide vary two
        match = re.fullmatch(r"([a-z-]+)-[^-]+", name)
        if match and name != "skip-wide":
            base = {n: tune[n] for n in ("base",) if n in tune}
            factors.setdefault(match[1].replace("-", " ").capitalize(), base)[name] = runs
    lines = []
    for factor, settings in factors.items():
        rows = rank(rows_of(settings, "validation"))
        if len(rows) > 1:
            best, *_, worst = rows
            ends = contrast(rows[best], rows[worst])
            lowest, highest = f"{worst}: {ends['second']}", f"{best}: {ends['first']}"
            beyond = {"more": "yes", "noise": "no"}.get(ends["result"], "one seed")
            spread = f"{ends['difference']:.4f}"
            lines.append([factor, str(len(settings)), lowest, highest, spread, beyond])
    if len(lines) < 2:
        return {}
    lines.sort(key=lambda line: -float(line[4]))
    header = ["factor", "settings", "lowest", "highest", "range", "beyond noise"]
    known = next((line for line in lines if line[5] == "yes"), lines[0])
    found = {"factor": known, "widest": lines[0]}
    found = {key: dict(zip(header, line, strict=True)) for key, line in found.items()}
    return found | {"factor_table": markdown([header, *lines])}


def running_average(models: Groups, out: Path) -> dict:
    """Show what a metric that is never reset makes of the validation curve of tuned."""
    [[label, found]] = panels(models, "validation").items()
    true = found["tuned"][0]
    lines, longer = {"each epoch by itself": [true]}, {"never reset": true}
    if "modified" in found:
        longer["never reset, carried over from modified"] = found["modified"][0] + true
    for name, values in longer.items():
        mean = np.cumsum(values) / np.arange(1, len(values) + 1)
        lines[name] = [mean[-len(true) :].tolist()]
    figures.curves(out / "running-average.png", {label: lines})
    last = {"true_last": true[-1], "running_last": lines["never reset"][0][-1]}
    return last | {"epochs": len(true)}


def find_dead_classes(groups: Groups) -> dict:
    """Tabulate when the models, and the other runs that had one, had a dead class."""
    rows, ever = [["run", "dead classes, an entry an epoch"]], 0
    found = [run for n, runs in groups.items() if not n.startswith("heads/") for run in runs]
    for run in found:
        dead = [", ".join(entry["validation"]["dead_classes"]) or "–" for entry in run.history]
        ever += set(dead) != {"–"}
        if set(dead) != {"–"} or run.experiment in MODELS:
            rows.append([f"{run.experiment}, seed {run.seed}", " / ".join(dead)])
    return {"dead_runs": ever, "dead_of": len(found), "dead_table": markdown(rows)}


def count_dying(heads: Groups, out: Path) -> dict:
    """Count the runs of `make heads` with a dead class after each epoch, a poor one at the end.

    The last column is the p value of the poor ones against those of tuned.
    """
    [[one, *_], *_] = heads.values()
    steps = one.config["images_per_epoch"] // one.config["batch_size"]
    poor, dead_at_end = {}, {}
    for name, runs in heads.items():
        last = [run.history[-1]["validation"]["per_class_iou"].values() for run in runs]
        poor[name] = sum(any(iou is not None and iou < LOW_IOU for iou in ious) for ious in last)
    done = (f"{steps * entry['epoch']:,} steps" for entry in one.history)
    lines, shares = [["model", "runs", *done, "poor", "p"]], {}
    for name, runs in heads.items():
        dead = [[bool(e["validation"]["dead_classes"]) for e in run.history] for run in runs]
        counts, p = np.sum(dead, axis=0), "–"
        dead_at_end[name] = counts[-1]
        if name != "tuned" and "tuned" in heads:
            p = f"{fisher(poor[name], len(runs), poor['tuned'], len(heads['tuned'])):.3f}"
        lines.append([name, str(len(runs)), *map(str, counts), str(poor[name]), p])
        shares[name] = [(counts / len(runs)).tolist()]
    share = {"share of runs with a dead class": shares}
    figures.curves(out / "heads.png", share, f"epoch of {steps} steps")
    found = {name: dict(zip(lines[0][1:], cells, strict=True)) for name, *cells in lines[1:]}
    alive = {}
    for what, counted in {"dead": dead_at_end, "poor": poor}.items():
        alive[what] = ", ".join(name for name in heads if counted[name] == 0) or "none"
    found = {"heads": found, "heads_table": markdown(lines), "alive": alive}
    return found | {"heads_config": one.config}


def tabulate_overfit(overfit: Groups, out: Path) -> dict:
    """Tabulate in which epoch each run of `make overfit` is perfect, and its gap at the end."""
    curves = panels(overfit, "training", "validation")
    figures.curves(out / "overfit.png", curves)
    lines, all_reached = [["model", "images", "1.000 in epoch", *curves, "gap", "n"]], []
    for name, runs in overfit.items():
        images, reached = str(runs[0].config["limit_images"] or "all"), []
        for ious in curves["training mean IoU"][name]:
            perfect = (str(i) for i, iou in enumerate(ious, start=1) if (iou or 0) >= PERFECT)
            reached.append(next(perfect, "never"))
        all_reached += reached * name.startswith("one-batch")
        ends = [[values[-1] for values in found[name]] for found in curves.values()]
        gap = np.subtract(*np.array(ends, float)).tolist()
        texts = [format_stat(values, std=True) for values in (*ends, gap)]
        lines.append([name, images, ", ".join(reached), *texts, str(len(runs))])
    counts = {"perfect": len(all_reached) - all_reached.count("never")}
    return counts | {"perfect_of": len(all_reached), "overfit_table": markdown(lines)}


def tabulate_experiments(
    augment: Groups, tune: Groups, heads: Groups, overfit: Groups, others: Groups, out: Path
) -> dict:
    """Tabulate the experiments besides the models compared; `others` are of unlike budgets."""
    facts = {}
    if augment:
        facts["augment_table"] = table(mark_best(rows_of(augment, "test")), ["lab IoU"])
    if tune:
        facts["tune_table"] = table(mark_best(rank(rows_of(tune, "validation"))), ["dead classes"])
    if heads:
        facts |= count_dying(heads, out)
    if overfit:
        facts |= tabulate_overfit(overfit, out)
    if others:
        columns = ["dead classes", "dead places", "lab IoU"]
        facts["other_table"] = table(rows_of(others, "test"), columns)  # unlike budgets: none best
        figures.curves(out / "others.png", panels(others, "training", "validation"))
    return facts
