"""Write the report's sections on what went wrong in the lab: last layer, metric, test, choices.

As in report_models.py, functions answer_X and section_X take a study, and return None without runs.
"""

from typing import NamedTuple

import numpy as np

import figures
from report_models import LOW_IOU, Answer, compare, picture, scores_of
from report_runs import Run, Study
from table import COLUMNS, iou_of, markdown, tabulate

RANGE_OF_SEEDS = 0.05  # mean IoU: runs that differ more do so by more than usual luck

# ---- striped masks, and classes that are never predicted


def answer_seeds(study: Study) -> Answer | None:
    """Name the experiment whose runs differ most although only their seeds differ."""
    widest = RANGE_OF_SEEDS
    answer = None
    for experiment, runs in study.runs.items():
        ious = [run.test["mean_iou"] for run in runs if run.test]
        if len(ious) < 2 or max(ious) - min(ious) < widest:
            continue
        widest = max(ious) - min(ious)
        text = (
            "Which classes a network learns, and at which pixels, is left to luck."
            f" {len(ious)} runs of `{experiment}` that only differ in their seed score from"
            f" {min(ious):.4f} to {max(ious):.4f}."
        )
        answer = Answer(text, "sure")
    return answer


def section_seeds(study: Study) -> str | None:
    """Tabulate the runs of the experiments in which a run has striped masks."""
    total, striped = 0, 0
    rows = {}
    for members in study.runs.values():
        tested = [run for run in members if run.test]
        stripes = [run for run in tested if run.test.get("lost_positions")]
        total += len(tested)
        striped += len(stripes)
        if stripes:
            for run in tested:
                rows[run.label] = [run.test]
    if total == 0:
        return None
    if striped == 0:
        return f"None of the {total} tested runs has striped masks."
    tests = [row for [row] in rows.values()]
    classes = list(tests[0]["per_class_iou"])
    columns = {"mean IoU": COLUMNS["mean IoU"], "striped": COLUMNS["striped"]}
    for name in classes:
        columns[name] = iou_of(name)
    best = max(row["mean_iou"] for row in tests)
    cost = 1 / (4 * len(classes))  # a position is a quarter of one class's IoU
    parts = [
        f"{striped} of {total} tested runs have striped masks. The table shows them beside the runs"
        " of the same experiments with other seeds:",
        markdown(tabulate(rows, columns)),
        "`square 2/4` means: squares are missing at two of the four positions. Each such position"
        f" takes 1/{4 * len(classes)} from the mean IoU. One, two or three pull the score from"
        f" {best:.2f} to about {best - cost:.2f}, {best - 2 * cost:.2f} or {best - 3 * cost:.2f}.",
    ]
    return "\n\n".join(parts)


def section_never_predicted(study: Study) -> str | None:
    """Count the runs that never predicted some class. The runs of heads have their own section."""
    total, found = 0, 0
    names = []
    for experiment, members in study.runs.items():
        if experiment in study.heads:
            continue
        missing = [run for run in members if any(never_at(entry) for entry in run.history)]
        total += len(members)
        found += len(missing)
        if missing:
            names.append(f"`{experiment}`")
    if total == 0:
        return None
    text = f"{found} of {total} runs predicted some class nowhere at the end of an epoch"
    return f"{text}: runs of {', '.join(names)}." if names else f"{text}."


def never_at(entry: dict) -> bool:
    """Tell whether a run predicts some class nowhere on validation at the end of an epoch."""
    return bool(entry["validation"]["dead_classes"])


def count_poor(runs: list[Run]) -> int:
    """Count the runs that end with a class whose validation IoU is low."""
    number = 0
    for run in runs:
        ious = run.history[-1]["validation"]["per_class_iou"].values()
        if any(iou is not None and iou < LOW_IOU for iou in ious):
            number += 1
    return number


def count_never(runs: list[Run]) -> list[int]:
    """Count, for each epoch, the runs that never predict some class at its end."""
    counts = [0] * len(runs[0].history)
    for run in runs:
        for epoch, entry in enumerate(run.history):
            if never_at(entry):
                counts[epoch] += 1
    return counts


def steps_by_epoch(run: Run) -> list[str]:
    """List the number of steps that a run has made at the end of each epoch."""
    steps = run.config["images_per_epoch"] // run.config["batch_size"]
    return [f"{steps * entry['epoch']:,} steps" for entry in run.history]


def answer_heads(study: Study) -> Answer | None:
    """Say how often short runs of tuned never predict a class, and what a wide layer changes."""
    runs = study.heads.get("heads/tuned")
    if not runs:
        return None
    text = (
        f"Of {len(runs)} short runs of `tuned`, {count_never(runs)[-1]} never predict some class"
        f" after {steps_by_epoch(runs[0])[-1]}. {count_poor(runs)} end with a class whose IoU is"
        f" below {LOW_IOU}."
    )
    wide = study.heads.get("heads/tuned-wide")
    if wide:
        text += f" With a wider last layer {count_poor(wide)} of {len(wide)} end so."
    return Answer(text, "sure" if len(runs) > 5 else "likely")


def section_heads(study: Study) -> str | None:
    """Tabulate how many short runs never predict a class, by step, and how many end poor."""
    if not study.heads:
        return None
    first = next(iter(study.heads.values()))[0]
    steps = steps_by_epoch(first)
    lines = [["model", "runs", *steps, f"class below {LOW_IOU} at the end"]]
    shares, healthy = {}, []
    for members in study.heads.values():
        name = members[0].name
        counts = count_never(members)
        poor = count_poor(members)
        cells = [name, str(len(members))]
        cells += [str(count) for count in counts]
        cells.append(str(poor))
        lines.append(cells)
        shares[name] = [[count / len(members) for count in counts]]
        if poor == 0:
            healthy.append(f"`{name}`")
    panels = {"share of runs that never predict a class": shares}
    figures.curves(study.figures / "heads.png", panels, f"epoch of {steps[0]}")
    parts = [
        "These are the lab's models with their own start, loss and learning rate, and `tuned` with"
        f" one fix each. A step takes {first.config['batch_size']} whole images. The table counts"
        " the runs that predict some class nowhere in the validation images after so many steps.",
        markdown(lines),
    ]
    if healthy:
        parts.append(f"No run of {', '.join(healthy)} ends with a class below {LOW_IOU}.")
    parts.append(picture(study, "heads.png", "Share of the runs that never predict some class."))
    return "\n\n".join(parts)


# ---- the metric and the test


def section_running_average(study: Study) -> str | None:
    """Show what a metric that is never reset makes of the validation curve of tuned."""
    runs: list[Run] = study.runs.get("tuned") or study.runs.get("augment/no-augmentation", [])
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


def section_fifty_images(study: Study) -> str | None:
    """Compare the whole test split with the lab's fifty images of it."""
    rows = {}
    for runs in study.runs.values():
        tests = [run.test for run in runs if run.test and run.test.get("lab_batch") is not None]
        if tests:
            rows[runs[0].name] = tests
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


# ---- what each choice was worth


class Choice(NamedTuple):
    """Describe a choice of the lab: two experiments that differ in nothing else."""

    title: str
    ours: str  # the experiment with another choice
    labs: str  # the experiment with the lab's choice
    says: str  # what the other choice is
    setting: str = ""  # a key of the config, on in the lab's runs and off in ours: else no pair


POOLED = "takes its skips before pooling. Both have a last layer of 16 channels."
DICE = "has cross-entropy and a Dice of each class instead."
NARROW = "has 16 channels there."
FLIPS = "augment/horizontal-flip-0.7"  # tuned in the full profile has these flips by itself
SHARP = "leaves the masks sharp."
CHOICES = [
    Choice("Horizontal flips", "augment/no-augmentation", "tuned", "has none.", "horizontal_flip"),
    Choice("Horizontal flips", "tuned", FLIPS, "has none.", "horizontal_flip"),
    Choice(
        "Blurred masks", "augment/blur-0.8-clean-masks", "augment/blur-0.8", SHARP, "blur_masks"
    ),
    Choice("A last batch of one image", "tuned-drop-last", "tuned", "leaves it out."),
    Choice("A last layer as narrow as the classes", "tune/head-wide", "tuned", NARROW),
    Choice("Skips after pooling", "tune/skip-wide", "tune/head-wide", POOLED),
    Choice("A Dice pooled over the classes", "tune/loss-class", "tuned", DICE),
]


def section_choices(study: Study) -> str | None:
    """Compare runs with and without each choice of the lab that may have been a mistake."""
    bullets = []
    for choice in CHOICES:
        ours = study.runs.get(choice.ours)
        labs = study.runs.get(choice.labs)
        if not ours or not labs:
            continue
        is_on = labs[0].config.get(choice.setting)
        if choice.setting and (not is_on or ours[0].config.get(choice.setting)):
            continue
        split = "validation" if ours[0].test is None else "test"  # settings have no test
        our_name, lab_name = f"`{ours[0].name}`", f"`{labs[0].name}`"
        answer = compare(our_name, scores_of(ours, split), lab_name, scores_of(labs, split))
        bullets.append(
            f"- **{choice.title}** ({split} split). {our_name} {choice.says} {answer.text}"
        )
    return "\n".join(bullets) or None
