"""Write the sections of a page: what the runs of a study say about the questions of the lab.

Every function here takes a study (see report_runs.py) and returns Markdown, or None if the study
lacks the runs. report_page.py puts them in order; the short answers are at the end of this file.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

import figures
from evaluate import SHOWN
from metrics import BOUNDARY, IGNORE, Comparison, mean_iou, welch
from report_runs import MODELS, Run, Runs, Study
from table import COLUMNS, LAB, NONE, background_only, format_stat, markdown, rank, tabulate

HIGH_ACCURACY, LOW_IOU = 0.8, 0.5  # what is called high and poor
PERFECT = 0.9995  # rounds to 1.000
YES_OR_NO = {"more": "Yes. ", "less": "No. ", "noise": "We saw no clear gain. ", "one seed": ""}
Rows = dict[str, list[dict]]  # experiment → the rows of its runs

# For pictures of up to five classes: colours that the colour-blind can tell apart.
PICTURE_COLOURS = [[242, 242, 242], [213, 94, 0], [0, 158, 115], [0, 114, 178], [240, 228, 66]]


class Answer(NamedTuple):
    """Hold a sentence that answers a question, and how sure it is."""

    text: str
    sure: str  # "sure", "likely" or "cannot tell"
    verdict: str = ""  # of metrics.welch, where two experiments are compared


# ---- helpers


def rows_of(runs: Runs, split: str) -> Rows:
    """Take the rows of the "test" or the "validation" split, and drop the folders of the names."""
    rows = {}
    for experiment, members in runs.items():
        name = experiment.split("/")[-1]
        rows[name] = [getattr(run, split) for run in members]
    return rows


def scores_of(runs: list[Run], split: str) -> list[float]:
    """List the mean IoU of each run on the "test" or the "validation" split."""
    return [getattr(run, split)["mean_iou"] for run in runs]


def score(values: list[float]) -> str:
    """Format mean IoUs of runs that differ in their seed: mean ± standard deviation."""
    return format_stat(values, std=True)


def numbers(a: list[float], b: list[float], result: Comparison) -> str:
    """Format the numbers that a comparison rests on."""
    margin = "" if result.margin is None else f" ± {result.margin:.4f}"
    return f"{score(a)} against {score(b)}, difference {result.difference:+.4f}{margin}"


def compare(name_a: str, a: list[float], name_b: str, b: list[float]) -> Answer:
    """Say whether one experiment scores higher than another, by Welch's test over the seeds."""
    result = welch(a, b)
    found = numbers(a, b, result)
    if result.verdict == "more":
        return Answer(f"{name_a} beats {name_b} ({found}).", "sure", result.verdict)
    if result.verdict == "less":
        text = f"{name_a} scores lower than {name_b} ({found})."
        return Answer(text, "sure", result.verdict)
    if result.verdict == "noise":
        text = f"The gap between {name_a} and {name_b} may be luck of the seed ({found})."
        return Answer(text, "cannot tell", result.verdict)
    text = f"One seed cannot tell {name_a} from {name_b} ({found})."
    return Answer(text, "cannot tell", result.verdict)


def picture(study: Study, name: str, caption: str) -> str:
    return f"![{caption}]({study.link}/{name})"


def panel(runs: Runs, split: str, key: str = "mean_iou") -> dict[str, list[list[float]]]:
    """List a value of every epoch for `figures.curves`: experiment → runs → epochs."""
    lines = {}
    for experiment, members in runs.items():
        lines[experiment] = [[entry[split][key] for entry in run.history] for run in members]
    return lines


def over_flights(rows: list[dict]) -> str:
    """Format the interval over flights, the means of its limits over the seeds."""
    intervals = [row.get("interval") for row in rows]
    if None in intervals:
        return NONE
    low = format_stat([interval[0] for interval in intervals])
    high = format_stat([interval[1] for interval in intervals])
    return f"{low}–{high}"


def table(rows: Rows, headings: list[str]) -> str:
    """Write a table of experiments with some of `table.COLUMNS`."""
    columns = {heading: COLUMNS[heading] for heading in headings}
    return markdown(tabulate(rows, columns))


def is_striped(run: Run) -> bool:
    return bool(run.test and run.test.get("lost_positions"))


# ---- the models


def best_model(study: Study) -> Answer | None:
    """Name the model with the highest score, and compare it with the next."""
    if len(study.models) < 2:
        return None
    ranked = list(rank(rows_of(study.models, "test")))
    first, second = ranked[0], ranked[1]
    a = scores_of(study.models[first], "test")
    b = scores_of(study.models[second], "test")
    answer = compare(f"`{first}`", a, f"`{second}`", b)
    if answer.sure == "sure":
        return answer
    return Answer(f"`{first}` scores highest, {score(a)}. {answer.text}", answer.sure)


def models_compared(study: Study) -> str | None:
    """Compare the models: table, curves, scores by class, confusion."""
    if not study.models:
        return None
    rows = rows_of(study.models, "test")
    first = next(iter(rows.values()))[0]
    nothing = background_only(first)
    lines_of = {nothing["name"]: [nothing]}
    lines_of.update(rows)
    columns = {}
    for heading in ("mean IoU", "n", "boundary IoU (2 px)", "accuracy", "never predicted"):
        columns[heading] = COLUMNS[heading]
    for heading in ("striped", "lab IoU", "parameters", "images seen", "training"):
        columns[heading] = COLUMNS[heading]
    columns[f"95 % over {study.group}s"] = over_flights

    curves = {
        "training mean IoU": panel(study.models, "training"),
        "validation mean IoU": panel(study.models, "validation"),
        "validation loss": panel(study.models, "validation", "loss"),
    }
    figures.curves(study.figures / "curves.png", curves)
    dots, matrices = {}, {}
    for name, members in rows.items():
        dots[name] = []
        for row in members:
            by_name = {"mean IoU": row["mean_iou"], "boundary IoU": row["boundary_iou"]}
            by_name.update(row["per_class_iou"])
            dots[name].append(by_name)
        matrices[name] = sum(np.array(row["confusion_matrix"]) for row in members)
    figures.dots(study.figures / "scores.png", dots)
    figures.confusion(study.figures / "confusion.png", matrices, list(first["per_class_iou"]))

    seeds = max(len(members) for members in rows.values())
    band = " Lines are means over the seeds, bands reach from the lowest to the highest."
    bars = " Bars are one standard deviation over the seeds and end at 1."
    answer = best_model(study)
    budgets = Counter(row["images_seen"] for members in rows.values() for row in members)
    seen = " and ".join(f"{number:,}" for number in sorted(budgets))
    parts = [
        "" if answer is None else answer.text,
        f"The models saw {seen} images in training: see the table." if len(budgets) > 1 else "",
        markdown(tabulate(lines_of, columns)),
        picture(
            study,
            "curves.png",
            f"Mean IoU and loss by epoch.{band if seeds > 1 else ''} The models minimise different"
            " losses: compare the shapes of those curves, not their heights.",
        ),
        picture(
            study,
            "scores.png",
            f"Test scores.{bars if seeds > 1 else ''} Boundary IoU only counts the {BOUNDARY}"
            " pixels inside a contour, where most of the wrong pixels are.",
        ),
        picture(
            study,
            "confusion.png",
            "Confusion matrices: of the pixels of each true class, per cent by predicted class.",
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def pictures_seen(study: Study) -> str | None:
    """Show test images with each model's prediction: evenly spaced ones, and the worst of one."""
    arrays = {}
    for name, members in study.models.items():
        folder = members[0].folder
        if folder is not None and (folder / "testing.npz").exists():
            arrays[name] = dict(np.load(folder / "testing.npz"))
    if not arrays:
        return None
    judged = list(arrays)[-1]
    shown = arrays[judged]["shown"]
    even = min(SHOWN, len(arrays[judged]["names"]))  # evenly spaced ones, then the worst
    classes = study.models[judged][0].config["classes"]
    if len(classes) <= len(PICTURE_COLOURS):
        classes = dict(zip(classes, PICTURE_COLOURS, strict=False))
    legend = dict(classes)
    legend["wrong pixel"] = [0, 0, 0]
    for name, chosen in (("frames", range(even)), ("worst", range(even, len(shown)))):
        rows = [pictures_of(arrays, judged, k, classes) for k in chosen]
        figures.save(figures.grid(rows, legend), study.figures / f"{name}.png")
    caption = "Evenly spaced test images, the same for every model."
    evenly_spaced = picture(study, "frames.png", caption)
    worst = picture(
        study,
        "worst.png",
        f"The worst test images of {judged}: lowest mean IoU, one image of each {study.group}.",
    )
    return f"{evenly_spaced}\n\n{worst}"


def pictures_of(arrays: dict, judged: str, k: int, classes: dict) -> list[tuple]:
    """Make a row of pictures: image k of those shown, its truth, each model's prediction."""
    i = arrays[judged]["shown"][k]
    image = torch.from_numpy(arrays[judged]["images"][k, :3]).expand(3, -1, -1)
    mask = torch.from_numpy(arrays[judged]["masks"][k])
    name = str(arrays[judged]["names"][i])
    row = [(name, image), ("truth", figures.colourise(mask, classes))]
    for model, stored in arrays.items():
        predicted = torch.from_numpy(stored["predictions"][i])
        iou = mean_iou(torch.from_numpy(stored["matrices"][i]))
        is_right = (predicted == mask) | (mask == IGNORE)
        errors = (is_right.to(torch.uint8) * 255).expand(3, -1, -1)
        row.append((f"{model}: {iou:.4f}", figures.colourise(predicted, classes)))
        row.append(("errors", errors))
    return row


# ---- the lab's questions


def accuracy(study: Study) -> Answer | None:
    """Say whether a high accuracy means a good model."""
    if not study.models:
        return None
    first = next(iter(study.models.values()))[0]
    nothing = background_only(first.test)
    share, low = nothing["pixel_accuracy"], nothing["mean_iou"]
    found = (
        f"Predicting {nothing['name'].removesuffix(' only')} everywhere scores an accuracy"
        f" of {share:.4f}, but a mean IoU of {low:.4f}."
    )
    if share >= HIGH_ACCURACY and low <= LOW_IOU:
        return Answer(f"No. {found}", "sure")
    return Answer(f"This data does not show it. {found}", "cannot tell")


def accuracy_trap(study: Study) -> str | None:
    answer = accuracy(study)
    if answer is None:
        return None
    ranked = rank(rows_of(study.models, "test"))
    top, rows = next(iter(ranked.items()))
    return (
        f"{answer.text} The best model, `{top}`, scores an accuracy of"
        f" {COLUMNS['accuracy'](rows)} and a mean IoU of {COLUMNS['mean IoU'](rows)}. Where most"
        " pixels are background, accuracy hardly sees the shapes."
    )


def modified(study: Study) -> Answer | None:
    """Say whether the modified model beats the initial one."""
    if "initial" not in study.models or "modified" not in study.models:
        return None
    a = scores_of(study.models["modified"], "test")
    b = scores_of(study.models["initial"], "test")
    answer = compare("`modified`", a, "`initial`", b)
    return answer._replace(text=YES_OR_NO[answer.verdict] + answer.text)


def modified_or_initial(study: Study) -> str | None:
    answer = modified(study)
    if answer is None:
        return None
    return (
        f"{answer.text} The lab published {LAB['test_iou']['modified']:.4f} for `modified` and"
        f" {LAB['test_iou']['initial']:.4f} for `initial`, each from one run."
    )


def other_runs(study: Study) -> str | None:
    """Tabulate the tested runs that share no table with the models."""
    if not study.others:
        return None
    parts = []
    half = study.augment.get("augment/flip-0.5")
    final = study.others.get("final")
    if final and half:
        a, b = scores_of(final, "test"), scores_of(half, "test")
        answer = compare("`final`, with twice the epochs,", a, "`flip-0.5`", b)
        parts.append(answer.text)
    rows = {}
    for experiment, members in study.others.items():
        rows[experiment] = [run.test for run in members]
    headings = ["mean IoU", "n", "never predicted", "striped", "lab IoU", "images seen", "training"]
    parts.append(table(rows, headings))
    for experiment, members in study.others.items():
        planned = members[0].config["epochs"]
        name = experiment.split(" (")[0].removesuffix("-no-flip")
        if name in MODELS and planned < 15 and study.profile == "full":
            parts.append(f"`{experiment}` was stopped after {planned} of the lab's 15 epochs.")
    curves = {
        "training mean IoU": panel(study.others, "training"),
        "validation mean IoU": panel(study.others, "validation"),
    }
    figures.curves(study.figures / "others.png", curves)
    parts.append(picture(study, "others.png", "Training and validation mean IoU by epoch."))
    return "\n\n".join(parts)
