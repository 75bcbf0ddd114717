"""Write the report's sections on series of experiments: augment, tune, overfit and heads.

As in report_models.py, each function takes a study and returns Markdown, or None without its runs.
"""

import numpy as np

import figures
from metrics import welch
from report_models import (
    LOW_IOU,
    YES_OR_NO,
    Answer,
    Rows,
    compare,
    panel,
    picture,
    rows_of,
    score,
    scores_of,
    table,
)
from report_runs import LAB_MODELS, Run, Runs, Study
from table import markdown, rank

PERFECT = 0.9995  # rounds to 1.000

# ---- augment


def augmentation_rows(study: Study, split: str) -> tuple[Rows, str | None]:
    """Take the rows of the augmentation runs, and name the one without any augmentation."""
    rows, without = {}, None
    for experiment, members in study.augment.items():
        name = experiment.split("/")[-1]
        flip = members[0].config["horizontal_flip"]
        if experiment == "tuned":
            name = f"tuned (horizontal flip {flip:g})" if flip else "no augmentation (tuned)"
        if experiment == "augment/no-augmentation" or (experiment == "tuned" and flip == 0):
            without = name
        rows[name] = [getattr(run, split) for run in members]
        if name == "no augmentation (tuned)":  # the lab's tuned had flips, so its IoU is another
            rows[name] = [named(row, "no-augmentation") for row in rows[name]]
    return rows, without


def named(row: dict, name: str) -> dict:
    """Copy a row under another name."""
    copy = dict(row)
    copy["name"] = name
    return copy


def augmentation(study: Study) -> Answer | None:
    """Say whether the augmentation that is best on validation helps on the test split."""
    rows, without = augmentation_rows(study, "validation")
    tried = [name for name in rank(rows) if name != without]
    if without is None or not tried:
        return None
    tests, _ = augmentation_rows(study, "test")
    ious = {name: [row["mean_iou"] for row in members] for name, members in tests.items()}
    best = tried[0]
    answer = compare(f"`{best}`", ious[best], "no augmentation", ious[without])
    lower = [name for name in tried if np.mean(ious[name]) < np.mean(ious[without])]
    text = (
        f"{YES_OR_NO[answer.verdict]}{answer.text} The validation split chose `{best}` from"
        f" {len(tried)} augmentations. On the test split {len(lower)} of them score lower than no"
        " augmentation."
    )
    return Answer(text, answer.sure)


def augmentation_tried(study: Study) -> str | None:
    """Tabulate the augmentations, and compare what the lab compared."""
    if not study.augment:
        return None
    rows, without = augmentation_rows(study, "test")
    answer = augmentation(study)
    parts = [] if answer is None else [answer.text]
    flipped = study.augment.get("augment/horizontal-flip-0.7", study.augment.get("tuned", []))
    if without is not None and flipped and flipped[0].config["horizontal_flip"]:
        with_flips = scores_of(flipped, "test")
        ious = [row["mean_iou"] for row in rows[without]]
        answer = compare("`tuned` with them", with_flips, "`tuned` without", ious)
        parts.append(
            "The lab's `tuned` was trained with horizontal flips, so the lab compared one"
            f" augmentation with another. {answer.text}"
        )
    blurred = [name for name, members in study.augment.items() if members[0].config["blur"] > 0]
    sharp = [name for name in blurred if not study.augment[name][0].config.get("blur_masks")]
    if sharp:
        names = ", ".join(f"`{name.split('/')[-1]}`" for name in sharp)
        parts.append(
            f"The lab blurred the masks with the images. The masks stayed sharp in {names}."
        )
    ranked = rank(rows)
    ious = {name: [row["mean_iou"] for row in members] for name, members in ranked.items()}
    figures.ranking(study.figures / "augment.png", ious, "mean IoU on the test split")
    headings = ["mean IoU", "n", "never predicted", "striped", "lab IoU", "images seen"]
    parts.append(table(ranked, headings))
    parts.append(picture(study, "augment.png", "Augmentations: dots are runs, lines their means."))
    return "\n\n".join(parts)


# ---- tune


def factors(study: Study) -> list[tuple[float, Answer, list[str]]]:
    """Compare the best with the worst setting of each factor on validation, widest range first.

    Returns the range, a sentence and the cells of a table for each factor.
    """
    settings: dict[str, Runs] = {"model (the lab's three)": {}, "augmentation": study.augment}
    for name in LAB_MODELS:
        if name in study.models:
            settings["model (the lab's three)"][name] = study.models[name]
    for experiment, members in study.tune.items():
        factor = experiment.split("/")[-1].rpartition("-")[0]  # learning-rate-0.001: learning-rate
        # A cell of the grid and skip-wide differ from tuned in two factors.
        if experiment in ("tuned", "tune/skip-wide") or factor.startswith("grid"):
            continue
        base = {"tuned": study.tune["tuned"]} if "tuned" in study.tune else {}
        settings.setdefault(factor.replace("-", " "), base)[experiment] = members

    found = []
    for factor, runs in settings.items():
        ranked = rank(rows_of(runs, "validation"))
        if len(ranked) < 2:
            continue
        names = list(ranked)
        best = [row["mean_iou"] for row in ranked[names[0]]]
        worst = [row["mean_iou"] for row in ranked[names[-1]]]
        answer = compare(f"`{names[0]}`", best, f"`{names[-1]}`", worst)
        spread = welch(best, worst).difference
        highest, lowest = f"{names[0]}: {score(best)}", f"{names[-1]}: {score(worst)}"
        beyond = "yes" if answer.sure == "sure" else "cannot tell"
        cells = [factor, str(len(ranked)), lowest, highest, f"{spread:.4f}", beyond]
        found.append((spread, answer, cells))
    return sorted(found, key=lambda item: -item[0])


def greatest_impact(study: Study) -> Answer | None:
    """Name the factor with the widest range that is too large to be luck of the seed."""
    ranges = factors(study)
    if len(ranges) < 2:
        return None
    for _, answer, cells in ranges:
        if answer.sure == "sure":
            # Only likely: the two settings were picked as the extremes of several.
            return Answer(f"The {cells[0]}: {answer.text}", "likely")
    _, answer, cells = ranges[0]
    return Answer(
        f"Perhaps the {cells[0]}, whose settings differ most. {answer.text}", "cannot tell"
    )


def tuning(study: Study) -> str | None:
    """Tabulate the settings that were tried, and the range of each factor."""
    if len(study.tune) < 2:
        return None
    parts = []
    answer = greatest_impact(study)
    if answer is not None:
        heading = ["factor", "settings", "lowest", "highest", "range", "beyond luck of the seed"]
        cells = [line for _, _, line in factors(study)]
        parts.append(answer.text)
        if answer.sure == "likely" and cells[0][5] != "yes":
            parts.append(
                f"The settings of {cells[0][0]} differ by more ({cells[0][4]}), but that may be"
                " luck of the seed."
            )
        parts.append(markdown([heading, *cells]))
        parts.append(
            "A range grows with the number of settings tried, and a setting in which some runs"
            ' never predict a class widens it most. Its ends were picked, so "yes" is a hint.'
        )
    ranked = rank(rows_of(study.tune, "validation"))
    ious = {name: [row["mean_iou"] for row in members] for name, members in ranked.items()}
    figures.ranking(study.figures / "tune.png", ious, "mean IoU on the validation split")
    parts.append("All settings, by their score on the validation split:")
    parts.append(table(ranked, ["mean IoU", "n", "never predicted", "images seen", "training"]))
    parts.append(picture(study, "tune.png", "Settings: dots are runs, lines their means."))
    return "\n\n".join(parts)


# ---- overfit


def first_perfect(run: Run) -> int | None:
    """Find the first epoch with a training mean IoU that rounds to 1.000."""
    for entry in run.history:
        if (entry["training"]["mean_iou"] or 0) >= PERFECT:
            return entry["epoch"]
    return None


def memorised(study: Study) -> Answer | None:
    """Say whether the lab's networks can be forced to overfit."""
    runs = []
    for experiment, members in study.overfit.items():
        if experiment.split("/")[-1].startswith("one-batch"):
            runs += members
    if not runs:
        return None
    perfect = [run for run in runs if first_perfect(run) is not None]
    text = (
        f"{len(perfect)} of {len(runs)} runs learnt two images by heart (training mean IoU 1.000)."
    )
    if perfect:
        return Answer(f"Yes, with another loss than the lab's. {text}", "sure")
    return Answer(f"Not here. {text}", "sure")


def overfitting(study: Study) -> str | None:
    """Tabulate when each run learnt its images by heart, and the gap to validation."""
    if not study.overfit:
        return None
    heading = ["model", "images", "1.000 in epoch", "training", "validation", "gap", "n"]
    lines = [heading]
    for experiment, members in study.overfit.items():
        epochs = [first_perfect(run) for run in members]
        last = [run.history[-1] for run in members]
        training = [entry["training"]["mean_iou"] for entry in last]
        validation = [entry["validation"]["mean_iou"] for entry in last]
        gap = [a - b for a, b in zip(training, validation, strict=True)]
        cells = [experiment.split("/")[-1], str(members[0].config["limit_images"] or "all")]
        cells.append(", ".join("never" if epoch is None else str(epoch) for epoch in epochs))
        cells += [score(training), score(validation), score(gap), str(len(members))]
        lines.append(cells)
    curves = {
        "training mean IoU": panel(study.overfit, "training"),
        "validation mean IoU": panel(study.overfit, "validation"),
    }
    figures.curves(study.figures / "overfit.png", curves)
    answer = memorised(study)
    parts = [] if answer is None else [answer.text]
    parts.append(markdown(lines))
    parts.append(picture(study, "overfit.png", "Training and validation mean IoU by epoch."))
    return "\n\n".join(parts)


# ---- heads


def never_at(entry: dict) -> bool:
    """Tell whether a run predicts some class nowhere on validation at the end of an epoch."""
    return bool(entry["validation"]["dead_classes"])


def ends_poor(run: Run) -> bool:
    """Tell whether a run ends with a class whose validation IoU is low."""
    ious = run.history[-1]["validation"]["per_class_iou"].values()
    return any(iou is not None and iou < LOW_IOU for iou in ious)


def lost_classes(study: Study) -> Answer | None:
    """Say how often short runs of tuned never predict a class, and which fix helps best."""
    counts = {}
    for experiment, members in study.heads.items():
        counts[experiment.split("/")[-1]] = sum(ends_poor(run) for run in members)
    if "tuned" not in counts:
        return None
    runs = study.heads["heads/tuned"]
    steps = steps_by_epoch(runs[0])
    never = sum(never_at(run.history[-1]) for run in runs)
    text = (
        f"Of {len(runs)} short runs of `tuned`, {never} never predict some class after"
        f" {steps[-1]:,} steps. {counts['tuned']} end with a class whose IoU is below {LOW_IOU}."
    )
    if "tuned-wide" in counts:
        wide = len(study.heads["heads/tuned-wide"])
        text += f" With a wider last layer {counts['tuned-wide']} of {wide} end so."
    return Answer(text, "sure" if len(runs) > 5 else "likely")


def steps_by_epoch(run: Run) -> list[int]:
    """List the number of steps that a run has made at the end of each epoch."""
    steps = run.config["images_per_epoch"] // run.config["batch_size"]
    return [steps * entry["epoch"] for entry in run.history]


def heads(study: Study) -> str | None:
    """Tabulate how many short runs never predict a class, by step, and how many end poor."""
    if not study.heads:
        return None
    first = next(iter(study.heads.values()))[0]
    steps = [f"{number:,} steps" for number in steps_by_epoch(first)]
    lines = [["model", "runs", *steps, f"class below {LOW_IOU} at the end"]]
    shares, healthy = {}, []
    for experiment, members in study.heads.items():
        name = experiment.split("/")[-1]
        never = np.array([[never_at(entry) for entry in run.history] for run in members])
        counts = never.sum(axis=0)
        poor = sum(ends_poor(run) for run in members)
        cells = [name, str(len(members))]
        cells += [str(count) for count in counts]
        cells.append(str(poor))
        lines.append(cells)
        shares[name] = [(counts / len(members)).tolist()]
        if poor == 0:
            healthy.append(f"`{name}`")
    label = "share of runs that never predict a class"
    figures.curves(study.figures / "heads.png", {label: shares}, f"epoch of {steps[0]}")
    answer = lost_classes(study)
    parts = [] if answer is None else [answer.text]
    parts.append(
        "These are the lab's models with their own start, loss and learning rate, and `tuned` with"
        f" one fix each. A step takes {first.config['batch_size']} whole images. The table counts"
        " the runs that predict some class nowhere in the validation images after so many steps."
    )
    parts.append(markdown(lines))
    if healthy:
        parts.append(f"No run of {', '.join(healthy)} ends with a class below {LOW_IOU}.")
    parts.append(picture(study, "heads.png", "Share of the runs that never predict some class."))
    return "\n\n".join(parts)
