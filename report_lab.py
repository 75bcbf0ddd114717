"""Write the report's sections on what went wrong in the lab: its metric, its test, its choices.

As in report_models.py, functions answer_X and section_X take a study, and return None without runs.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np

import figures
from report_models import Answer, Rows, compare, panel, picture, rows_of, score, scores_of
from report_runs import UNTESTED, Run, Runs, Study
from table import COLUMNS, LAB, NONE, markdown, tabulate

LOW_SCORE = 0.95  # five runs of the lab have a lower mean IoU, the others one above 0.97
JUMP = 3  # times the lowest validation loss so far: what is called a jump

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
        f"The last epoch of {runs[0].label} scores {values[-1]:.4f} on the validation split. The"
        f" average over its {len(values)} epochs is {averages[-1]:.4f}.\n\n"
        f"{picture(study, 'running-average.png', caption)}"
    )


def rows_on_fifty(runs: Runs) -> Rows:
    """Collect the test rows that have a score on the lab's fifty images."""
    scored: Runs = {}
    for experiment, members in runs.items():
        for run in members:
            if run.test and run.test.get("lab_batch") is not None:
                scored.setdefault(experiment, []).append(run)
    return rows_of(scored, "test")


def fifty_table(rows: Rows) -> str:
    columns = {
        "all test images": COLUMNS["mean IoU"],
        "the lab's 50": COLUMNS["lab batch"],
        "the lab's 50, training mode": COLUMNS["lab batch (training mode)"],
        "published by the lab": COLUMNS["lab IoU"],
        "n": COLUMNS["n"],
    }
    return markdown(tabulate(rows, columns))


def answer_fifty_images(study: Study) -> Answer | None:
    """Say how far the lab's test batch, and its training mode, changed the scores of runs."""
    rows = rows_on_fifty(study.runs)
    if not rows:
        return None
    by_fifty, by_mode = [], []  # how far each changed the score of each run
    for tests in rows.values():
        for row in tests:
            by_fifty.append(abs(row["lab_batch"] - row["mean_iou"]))
            if row.get("lab_batch_training_mode") is not None:
                by_mode.append(abs(row["lab_batch_training_mode"] - row["lab_batch"]))
    text = (
        "Testing on 50 images instead of all changed the score of a run by up to"
        f" {max(by_fifty):.4f}."
    )
    if not by_mode:
        return Answer(text, "sure")
    text += (
        " Training mode and the weights of the last epoch, as in the lab, then changed it by up"
        f" to {max(by_mode):.4f}."
    )
    low = [iou for iou in LAB["test_iou"].values() if iou < LOW_SCORE]
    if max(by_fifty) + max(by_mode) < min(LAB["test_iou"]["tuned"] - iou for iou in low):
        text += (
            f" So this test does not explain the lab's {len(low)} low scores,"
            f" from {min(low):.2f} to {max(low):.2f}."
        )
    return Answer(text, "sure")


def section_fifty_images(study: Study) -> str | None:
    """Tabulate the models' scores on all test images and on the lab's fifty."""
    models = rows_on_fifty(study.models)
    return fifty_table(models) if models else None


def details_fifty_images(study: Study) -> str | None:
    """Tabulate all runs scored on the lab's fifty images, if there are others than the models."""
    rows = rows_on_fifty(study.runs)
    if len(rows) == len(rows_on_fifty(study.models)):
        return None
    return fifty_table(rows)


def deepest_fall(run: Run) -> float:
    """Find how far the validation mean IoU fell below its best so far, at most."""
    best, deepest = 0.0, 0.0
    for entry in run.history:
        value = entry["validation"]["mean_iou"]
        best = max(best, value)
        deepest = max(deepest, best - value)
    return deepest


def find_jumps(losses: list[float]) -> list[int]:
    """Find the epochs, from 1 on, whose loss is several times the lowest so far."""
    epochs = []
    lowest = losses[0]
    for epoch, loss in enumerate(losses, start=1):
        if loss > JUMP * lowest:
            epochs.append(epoch)
        lowest = min(lowest, loss)
    return epochs


def jumps_of(run: Run) -> list[int]:
    return find_jumps([entry["validation"]["loss"] for entry in run.history])


def size_of_last_batch(run: Run) -> int:
    """Compute how many images the last batch of each epoch of a run had."""
    images_per_epoch = run.validation["images_seen"] // len(run.history)
    batch_size = run.config["batch_size"]
    return images_per_epoch % batch_size or batch_size


def ends_with_one_image(run: Run) -> bool:
    return size_of_last_batch(run) == 1


def runs_with_jumps(study: Study) -> list[Run]:
    """List the runs whose validation losses are compared: not those of too few epochs or images."""
    return [run for run in study.all_runs if run.folder_name not in UNTESTED]


def shared_jump(runs: list[Run]) -> str | None:
    """Name the epoch in which most runs of one seed jump; None if no two of them share one."""
    counts = Counter()  # (seed, epoch) → runs that jump there
    for run in runs:
        for epoch in jumps_of(run):
            counts[run.seed, epoch] += 1
    if not counts:
        return None
    (seed, epoch), number = counts.most_common(1)[0]
    if number == 1:
        return None
    members = [run for run in runs if run.seed == seed]
    jumping = [run for run in members if jumps_of(run)]
    text = (
        "Runs with the same seed end each epoch with the same image. Of these runs,"
        f" {len(jumping)} of {len(members)} with seed {seed} jump, {number} of them in epoch"
        f" {epoch}"
    )
    others = [run for run in runs if run.seed != seed]
    if others:
        jumping = [run for run in others if jumps_of(run)]
        text += f", and {len(jumping)} of {len(others)} with other seeds"
    return f"{text}."


def answer_last_batch(study: Study) -> Answer | None:
    """Count the runs whose validation loss jumps, with and without a last batch of one image."""
    runs = runs_with_jumps(study)
    with_one = [run for run in runs if ends_with_one_image(run)]
    without = [run for run in runs if not ends_with_one_image(run)]
    if not with_one or not without or "tuned-drop-last" not in study.runs:
        return None
    n_with = len([run for run in with_one if jumps_of(run)])
    n_without = len([run for run in without if jumps_of(run)])
    n_lab = len([losses for losses in LAB["validation_loss"].values() if find_jumps(losses)])
    others = ", ".join(sorted({f"`{run.experiment}`" for run in without}))
    if "`best`" in others:
        others += "; `best` has another recipe"
    text = (
        f"It jumps in {n_with} of our {len(with_one)} runs that end each epoch with a batch of one"
        f" image, as the lab's did. It jumps in {n_without} of our {len(without)} others"
        f" ({others}), and in {n_lab} of the lab's {len(LAB['validation_loss'])} runs."
    )
    if n_with / len(with_one) > n_without / len(without):
        return Answer(f"Probably because of a last batch of one image. {text}", "likely")
    return Answer(f"These runs cannot tell. {text}", "cannot tell")


def list_falls(runs: list[Run]) -> str:
    return " and ".join(f"{deepest_fall(run):.3f}" for run in runs)


def section_last_batch(study: Study) -> str | None:
    """Compare the curves of tuned with and without the last batch of one image."""
    if "tuned" not in study.runs or "tuned-drop-last" not in study.runs:
        return None
    seeds_with = {run.seed for run in study.runs["tuned"]}
    seeds_without = {run.seed for run in study.runs["tuned-drop-last"]}
    kept = [run for run in study.runs["tuned"] if run.seed in seeds_without]
    dropped = [run for run in study.runs["tuned-drop-last"] if run.seed in seeds_with]
    if not kept or not ends_with_one_image(kept[0]):
        return None
    runs = {"tuned": kept, "tuned-drop-last": dropped}
    figures.curves(
        study.figures / "last-batch.png", {"validation loss": panel(runs, "validation", "loss")}
    )
    seeds = " and ".join(str(run.seed) for run in kept)
    caption = f"`tuned-drop-last` leaves out the last batch of one image. Both with seed {seeds}."
    text = (
        "`tuned-drop-last` differs from `tuned` in this batch alone. The deepest fall of the"
        f" validation mean IoU below its best so far: {list_falls(kept)} with `tuned`,"
        f" {list_falls(dropped)} with `tuned-drop-last` (seed {seeds})."
    )
    others = [run for run in study.runs["tuned"] if run not in kept]
    if others:
        text += f" With other seeds of `tuned` it is {list_falls(others)}."
    parts = [text, picture(study, "last-batch.png", caption)]
    shared = shared_jump([run for run in runs_with_jumps(study) if ends_with_one_image(run)])
    if shared is not None:
        parts.insert(0, shared)
    return "\n\n".join(parts)


def details_last_batch(study: Study) -> str | None:
    """Tabulate in which epochs the validation loss of each run jumps."""
    if answer_last_batch(study) is None:
        return None
    lines = [["run", "last batch", "jumps in epochs"]]
    for run in runs_with_jumps(study):
        size = size_of_last_batch(run)
        last_batch = "one image" if size == 1 else f"{size} images"
        epochs = ", ".join(str(epoch) for epoch in jumps_of(run))
        lines.append([run.label, last_batch, epochs or NONE])
    return markdown(lines)


# ---- what each choice was worth


class Choice(NamedTuple):
    """Describe a choice of the lab: two experiments that differ in nothing else."""

    title: str
    ours: str  # the experiment with another choice
    labs: str  # the experiment with the lab's choice
    says: str  # what the other choice is
    setting: str | None = None  # the key of the config that must be on in the lab's runs alone


POOLED = "takes its skips before pooling. Both have a last stage of 16 channels."
DICE = "has cross-entropy and a Dice of each class instead."
NARROW = (
    "has 16 channels there. In short runs `tuned` starts its last up-sampling so that fewer classes"
    " are lost."
)
FLIPS = "augment/horizontal-flip-0.7"  # tuned in the full profile has these flips by itself
# With a standard deviation of 0.5 a pixel itself has 0.62 of the weights: it keeps its class.
SHARP = "leaves the masks sharp. But so weak a blur changes no pixel of a mask."
CHOICES = [
    Choice("Horizontal flips", "augment/no-augmentation", "tuned", "has none.", "horizontal_flip"),
    Choice("Horizontal flips", "tuned", FLIPS, "has none.", "horizontal_flip"),
    Choice(
        "Blurred masks", "augment/blur-0.8-clean-masks", "augment/blur-0.8", SHARP, "blur_masks"
    ),
    Choice("A last batch of one image", "tuned-drop-last", "tuned", "leaves it out."),
    Choice("A last stage as narrow as the classes", "tune/head-wide", "tuned", NARROW),
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
        if choice.setting is not None:
            on_in_labs = bool(labs[0].config.get(choice.setting))
            on_in_ours = bool(ours[0].config.get(choice.setting))
            if on_in_ours or not on_in_labs:
                continue
        if choice.ours == "tuned-drop-last" and not ends_with_one_image(labs[0]):
            continue
        split = "test"
        source = "test split"
        if any(run.test is None for run in ours + labs):
            split = "validation"
            source = "validation split, `make tune`"  # which does not test
        our_name, lab_name = f"`{ours[0].name}`", f"`{labs[0].name}`"
        our_scores, lab_scores = scores_of(ours, split), scores_of(labs, split)
        finding = compare(our_name, our_scores, lab_name, lab_scores).text
        if our_scores == lab_scores:
            finding = f"Both score {score(our_scores)}: the same to the last digit."
        bullets.append(f"- **{choice.title}** ({source}). {our_name} {choice.says} {finding}")
    return "\n".join(bullets) or None
