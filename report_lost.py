"""Write the report's sections on classes that a run never predicts, and on the loss.

As in report_models.py, functions answer_X and section_X take a study, and return None without runs.
"""

import math

import figures
from report_models import LOW_IOU, Answer, compare, picture, scores_of
from report_runs import Run, Study, by_experiment
from table import markdown

# ---- how often does the last stage lose a class?


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


def count_never_predicted(study: Study) -> str:
    """Count the runs that never predicted some class, without those of their own length."""
    total, at_some_epoch, at_the_last = 0, 0, 0
    names = []
    for experiment, members in by_experiment(study.all_runs).items():
        if experiment in study.heads or experiment in study.overfit:
            continue
        missing = [run for run in members if any(never_at(entry) for entry in run.history)]
        total += len(members)
        at_some_epoch += len(missing)
        at_the_last += sum(never_at(run.history[-1]) for run in missing)
        if missing:
            names.append(f"`{experiment}`")
    text = (
        f"In {at_some_epoch} of {total} runs some class was never predicted at the end of an epoch."
    )
    if not names:
        return text
    return (
        f"{text} At the end of the last epoch it was so in {at_the_last}. The"
        f" {at_some_epoch} are runs of {', '.join(names)}."
    )


def steps_by_epoch(run: Run) -> list[str]:
    """List the number of steps that a run has made at the end of each epoch."""
    images = run.validation["images_seen"] // len(run.history)  # of an epoch
    steps = math.ceil(images / run.config["batch_size"])
    return [f"{steps * entry['epoch']:,} steps" for entry in run.history]


def answer_heads(study: Study) -> Answer | None:
    """Say how often runs of tuned never predict a class, and what a wider last stage changes."""
    runs = study.heads.get("heads/tuned")
    if not runs:
        return None
    text = (
        f"In {count_never(runs)[-1]} of {len(runs)} runs of `tuned` with the lab's start, some"
        f" class is in no prediction after {steps_by_epoch(runs[0])[-1]}. {count_poor(runs)} end"
        f" with a class whose IoU is below {LOW_IOU}."
    )
    wide = study.heads.get("heads/tuned-wide")
    if wide:
        poor = count_poor(wide)
        verb = "does" if poor == 1 else "do"
        text += f" With a wider last stage, {poor} of {len(wide)} {verb}."
    return Answer(text, "sure" if len(runs) > 5 else "likely")


def section_heads(study: Study) -> str | None:
    """Draw how many runs never predict a class, by step."""
    if not study.heads:
        return None
    first = next(iter(study.heads.values()))[0]
    shares = {}
    poor = []
    for members in study.heads.values():
        name = members[0].name
        shares[name] = [[count / len(members) for count in count_never(members)]]
        poor.append(f"`{name}` {count_poor(members)} of {len(members)}")
    panels = {"share of runs in which a class is in no prediction": shares}
    figures.curves(study.figures / "heads.png", panels, f"epoch of {steps_by_epoch(first)[0]}")
    images = "whole images" if first.config["crop"] == 0 else "crops"
    if not first.is_augmented:
        images += " without augmentation"
    parts = [
        f"A step of these runs takes {first.config['batch_size']} {images}. Each of the lab's"
        " models keeps its own start, loss and learning rate. The others are `tuned` with one"
        " change each: `tuned-wide` a wider last stage, `tuned-loss-per-class` another loss,"
        " `tuned-bilinear` another start of the last up-sampling, `tuned-warm-up` a learning rate"
        " that rises first.",
        picture(study, "heads.png", "In no prediction: predicted in no validation image."),
        f"Runs that end with a class below {LOW_IOU}: {', '.join(poor)}.",
    ]
    return "\n\n".join(parts)


def details_heads(study: Study) -> str | None:
    """Tabulate how many runs never predict a class, by step, and how many end poor."""
    if not study.heads:
        return None
    first = next(iter(study.heads.values()))[0]
    lines = [["model", "runs", *steps_by_epoch(first), f"class below {LOW_IOU} at the end"]]
    for members in study.heads.values():
        cells = [members[0].name, str(len(members))]
        cells += [str(count) for count in count_never(members)]
        cells.append(str(count_poor(members)))
        lines.append(cells)
    return (
        "The number of runs that predict some class in no validation image, by the steps made:"
        f"\n\n{markdown(lines)}"
    )


# ---- which loss?


def answer_loss(study: Study) -> Answer | None:
    """Compare the lab's loss with cross-entropy and a Dice of each class."""
    ours = study.tune.get("tune/loss-class")
    labs = study.tune.get("tuned")
    if not ours or not labs:
        return None
    scores = scores_of(ours, "validation"), scores_of(labs, "validation")
    return compare("`loss-class`", scores[0], "the lab's loss", scores[1])


def section_loss(study: Study) -> str | None:
    """Say in how many runs each loss lost a class, where the lab's own start was kept."""
    if answer_loss(study) is None:
        return None
    ours = study.heads.get("heads/tuned-loss-per-class")
    labs = study.heads.get("heads/tuned")
    if not ours or not labs:
        return "Both are scored on the validation split."
    return (
        "Both are scored on the validation split. With the lab's own start, some class is in no"
        f" prediction after {steps_by_epoch(labs[0])[-1]} in {count_never(labs)[-1]} of"
        f" {len(labs)} runs with the lab's loss, and in {count_never(ours)[-1]} of {len(ours)} runs"
        f" of `tuned-loss-per-class`. {count_poor(labs)} of {len(labs)} and {count_poor(ours)} of"
        f" {len(ours)} end with a class whose IoU is below {LOW_IOU}."
    )
