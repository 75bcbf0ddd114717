"""Write the report's sections on what went wrong in the lab, and on what that was worth.

As in report_models.py, each function takes a study and returns Markdown, or None without its runs.
"""

from typing import NamedTuple

import numpy as np

import figures
from report_models import Answer, compare, picture, scores_of
from report_runs import Run, Runs, Study
from table import COLUMNS, iou_of, markdown, tabulate

RANGE_OF_SEEDS = 0.05  # mean IoU: runs that differ more do so by more than usual luck


def tuned_runs(study: Study) -> list[Run]:
    """Take the runs of tuned, or else of tuned without augmentation."""
    return study.runs.get("tuned") or study.runs.get("augment/no-augmentation", [])


# ---- the metric and the test


def running_average(study: Study) -> str | None:
    """Show what a metric that is never reset makes of the validation curve of tuned."""
    runs = tuned_runs(study)
    if not runs:
        return None
    values = [entry["validation"]["mean_iou"] for entry in runs[0].history]
    averages = np.cumsum(values) / np.arange(1, len(values) + 1)
    lines = {"each epoch by itself": [values], "never reset": [averages.tolist()]}
    path = study.figures / "running-average.png"
    figures.curves(path, {"validation mean IoU": lines})
    caption = f"{runs[0].label}: validation mean IoU, as it is and as a running average shows it."
    return (
        f"The last epoch of {runs[0].label}, scores {values[-1]:.4f} on the validation split. The"
        f" average over its {len(values)} epochs is {averages[-1]:.4f}.\n\n"
        f"{picture(study, 'running-average.png', caption)}"
    )


def fifty_images(study: Study) -> str | None:
    """Compare the whole test split with the lab's fifty images of it."""
    rows = {}
    for experiment, runs in study.runs.items():
        tests = [run.test for run in runs if run.test and run.test.get("lab_batch") is not None]
        if tests:
            rows[experiment.split("/")[-1]] = tests
    if not rows:
        return None
    columns = {
        "all test images": COLUMNS["mean IoU"],
        "the lab's 50": COLUMNS["lab batch"],
        "the lab's 50, training mode": COLUMNS["lab batch (training mode)"],
        "published by the lab": COLUMNS["lab IoU"],
        "n": COLUMNS["n"],
    }
    first = next(iter(rows.values()))[0]
    return (
        f"Mean IoU of the same models on all {first['images']:,} test images and on the lab's 50."
        " Training mode uses the weights of the last epoch, as the lab did.\n\n"
        f"{markdown(tabulate(rows, columns))}"
    )


# ---- the last layer


def ranges(numbers: list[int]) -> str:
    """Format increasing numbers, neighbours together: "1–3, 7"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in parts)


def missing_epochs(run: Run) -> dict[str, list[int]]:
    """List the epochs at whose end a run never predicts a class on validation: class → epochs."""
    epochs: dict[str, list[int]] = {}
    for entry in run.history:
        for name in entry["validation"]["dead_classes"]:
            epochs.setdefault(name, []).append(entry["epoch"])
    return epochs


def never_predicted(study: Study) -> str | None:
    """List the runs that never predicted some class, and in which epochs. Heads have their own."""
    runs = []
    for experiment, members in study.runs.items():
        if not experiment.startswith("heads/"):
            runs += [run for run in members if run.history]
    lines = [["run", "never predicted, in epochs", "epochs in all"]]
    for run in runs:
        epochs = missing_epochs(run)
        if epochs:
            texts = [f"{name} {ranges(numbers)}" for name, numbers in epochs.items()]
            lines.append([run.label, "; ".join(texts), str(len(run.history))])
    found = len(lines) - 1
    if not runs:
        return None
    text = f"{found} of {len(runs)} runs predicted some class nowhere at the end of an epoch."
    return f"{text}\n\n{markdown(lines)}" if found else text


def unlike_seeds(study: Study) -> Answer | None:
    """Name the experiment whose runs differ most although only their seeds differ."""
    widest, members = 0.0, None
    for runs in study.runs.values():
        if len(runs) > 1 and all(run.test for run in runs):
            ious = scores_of(runs, "test")
            if max(ious) - min(ious) > widest:
                widest, members = max(ious) - min(ious), runs
    if members is None or widest < RANGE_OF_SEEDS:
        return None
    ious = scores_of(members, "test")
    text = (
        f"Which classes a network learns, and at which pixels, is left to luck. {len(members)} runs"
        f" of `{members[0].experiment}` that only differ in their seed score from {min(ious):.4f}"
        f" to {max(ious):.4f}."
    )
    return Answer(text, "sure")


def striped(study: Study) -> str | None:
    """Tabulate the runs of the experiments in which a run has striped masks."""
    tested: Runs = {}
    for experiment, members in study.runs.items():
        runs = [run for run in members if run.test]
        if runs:
            tested[experiment] = runs
    if not tested:
        return None
    rows, number, best = {}, 0, 0.0
    for members in tested.values():
        stripes = [run for run in members if run.test.get("lost_positions")]
        number += len(stripes)
        if stripes:
            best = max(best, max(scores_of(members, "test")))
            for run in members:
                rows[run.label] = [run.test]
    total = sum(len(members) for members in tested.values())
    if number == 0:
        return f"None of the {total} tested runs has striped masks."
    classes = next(iter(rows.values()))[0]["per_class_iou"]
    columns = {"mean IoU": COLUMNS["mean IoU"], "striped": COLUMNS["striped"]}
    for name in classes:
        columns[name] = iou_of(name)
    cost = 1 / 4 / len(classes)  # a position is a quarter of one class's IoU
    levels = [f"{best - lost * cost:.2f}" for lost in (1, 2, 3)]
    answer = unlike_seeds(study)
    parts = [] if answer is None else [answer.text]
    parts.append(f"{number} of {total} tested runs have striped masks:")
    parts.append(markdown(tabulate(rows, columns)))
    parts.append(
        "`square 2/4` means: squares are missing at two of the four positions. Each such position"
        f" costs a sixteenth. One, two or three pull the score from {best:.2f} to about"
        f" {levels[0]}, {levels[1]} or {levels[2]}."
    )
    return "\n\n".join(parts)


# ---- what each mistake was worth


class Choice(NamedTuple):
    """Describe a choice of the lab: two experiments that differ in nothing else."""

    title: str
    ours: str  # the experiment with another choice
    labs: str  # the experiment with the lab's choice
    says: str  # what the other choice is
    split: str  # where the scores come from: settings are compared on validation


CHOICES = [
    Choice(
        "Blurred masks",
        ours="augment/blur-0.8-clean-masks",
        labs="augment/blur-0.8",
        says="leaves the masks sharp.",
        split="test",
    ),
    Choice(
        "A last batch of one image",
        ours="tuned-drop-last",
        labs="tuned",
        says="leaves it out.",
        split="test",
    ),
    Choice(
        "A last layer as narrow as the classes",
        ours="tune/head-wide",
        labs="tuned",
        says="has 16 channels there.",
        split="validation",
    ),
    Choice(
        "Skips after pooling",
        ours="tune/skip-wide",
        labs="tune/head-wide",
        says="takes its skips before pooling. Both have a last layer of 16 channels.",
        split="validation",
    ),
    Choice(
        "A Dice pooled over the classes",
        ours="tune/loss-class",
        labs="tuned",
        says="has cross-entropy and a Dice of each class instead.",
        split="validation",
    ),
]


def worth(study: Study) -> str | None:
    """Compare runs with and without each choice of the lab that may have been a mistake."""
    bullets = []
    for choice in CHOICES:
        ours = study.runs.get(choice.ours)
        labs = study.runs.get(choice.labs)
        if not ours or not labs:
            continue
        if choice.title == "Blurred masks" and not labs[0].config.get("blur_masks"):
            continue  # older runs with this name have sharp masks
        our_name = f"`{choice.ours.split('/')[-1]}`"
        lab_name = f"`{choice.labs.split('/')[-1]}`"
        a = scores_of(ours, choice.split)
        b = scores_of(labs, choice.split)
        answer = compare(our_name, a, lab_name, b)
        title = f"**{choice.title}** ({choice.split} split)"
        bullets.append(f"- {title}. {our_name} {choice.says} {answer.text}")
    return "\n".join(bullets) or None
