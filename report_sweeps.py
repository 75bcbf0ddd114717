"""Write the report's sections on series of experiments: augment, tune and overfit.

As in report_models.py, functions answer_X and section_X take a study, and return None without runs.
"""

from statistics import fmean
from typing import NamedTuple

import figures
from report_models import (
    LOW_IOU,
    YES_OR_NO,
    Answer,
    Rows,
    compare,
    draw_mean_iou,
    picture,
    rows_of,
    score,
    scores_of,
    table_of,
)
from report_runs import LAB_MODELS, Run, Runs, Study
from table import LAB, markdown, rank

PERFECT = 0.9995  # rounds to 1.000
PLAIN_TUNED = "no augmentation (tuned)"
WITHOUT = ("no-augmentation", PLAIN_TUNED)  # names of the runs without any augmentation


def draw_ranking(study: Study, name: str, ranked: Rows, split: str, what: str) -> str:
    """Draw the runs of ranked experiments as dots, and return the link to the figure."""
    ious = {}
    for experiment, rows in ranked.items():
        ious[experiment] = [row["mean_iou"] for row in rows]
    has_arrows = figures.ranking(study.figures / name, ious, f"mean IoU on the {split} split")
    caption = f"{what}: dots are runs, lines their means."
    if has_arrows:
        caption += (
            " An arrow stands for runs further to the left, as many as the number beside it says;"
            " an experiment with an arrow has no line."
        )
    return picture(study, name, caption)


# ---- augment


def augmentations(study: Study) -> tuple[Runs, str | None]:
    """Name the augmentation runs as the page does, and name the one without any augmentation.

    Where `tuned` has no augmentation, `no-augmentation` is the same run. The config of own data may
    add flips to all runs: then none is without.
    """
    runs = {}
    without = None
    for experiment, members in study.augment.items():
        name = members[0].name
        flip = members[0].config["horizontal_flip"]
        if experiment == "tuned" and flip > 0:
            name = f"tuned (horizontal flip {flip:g})"
        elif experiment == "tuned" and not members[0].is_augmented:
            name = PLAIN_TUNED
        if name in WITHOUT and not members[0].is_augmented:
            without = name
        runs[name] = members
    return runs, without


def answer_augmentation(study: Study) -> Answer | None:
    """Say whether the augmentation that is best on validation helps on the test split."""
    runs, without = augmentations(study)
    tried = []
    seen = []
    repeated = ""  # a blur too weak to change a mask makes the same runs as one that spares masks
    for name in rank(rows_of(runs, "validation")):
        losses = [[entry["training"]["loss"] for entry in run.history] for run in runs[name]]
        if name in WITHOUT:
            continue
        if losses in seen:
            repeated += f" `{name}` made the same runs as another, and counts once."
            continue
        tried.append(name)
        seen.append(losses)
    if without is None or not tried:
        return None
    best = tried[0]
    plain = scores_of(runs[without], "test")
    answer = compare(f"`{best}`", scores_of(runs[best], "test"), "no augmentation", plain)
    lower = [name for name in tried if fmean(scores_of(runs[name], "test")) < fmean(plain)]
    number = "all" if len(lower) == len(tried) else str(len(lower))
    words = dict(YES_OR_NO, noise="We saw no clear gain. ")
    answer = answer.begin_with(words[answer.comparison.verdict])
    if len(tried) > 1:
        choice = (
            f" The validation split chose `{best}` from {len(tried)} tried. On the test split"
            f" {number} of them scored lower than no augmentation.{repeated}"
        )
        return answer._replace(text=answer.text + choice)
    return answer


def ranked_augmentations(study: Study) -> Rows:
    """Collect the test rows of the augmentations, the highest mean IoU first."""
    runs, _ = augmentations(study)
    rows = rows_of(runs, "test")
    if PLAIN_TUNED in rows:  # the lab's tuned had flips: its IoU does not belong here
        rows[PLAIN_TUNED] = [dict(row, name=PLAIN_TUNED) for row in rows[PLAIN_TUNED]]
    return rank(rows)


def section_augmentation(study: Study) -> str | None:
    """Draw the augmentations by their score."""
    if not study.augment:
        return None
    return draw_ranking(study, "augment.png", ranked_augmentations(study), "test", "Augmentations")


def details_augmentation(study: Study) -> str | None:
    """Tabulate the augmentations."""
    if not study.augment:
        return None
    headings = ["mean IoU", "n", "never predicted", "striped", "lab IoU", "images seen"]
    return table_of(ranked_augmentations(study), headings)


class Flips(NamedTuple):
    """Hold three comparisons: each flip with no augmentation, and one flip with the other."""

    horizontal: Answer
    vertical: Answer
    vertical_with_horizontal: Answer


def compare_flips(study: Study) -> Flips | None:
    """Compare flips of the lab's images, whose shapes are known, with no augmentation."""
    runs, without = augmentations(study)
    flipped = [name for name in runs if runs[name][0].config["horizontal_flip"] > 0]
    if study.group != "flight" or without is None or not flipped or "flip-0.5" not in runs:
        return None
    plain = scores_of(runs[without], "test")
    horizontal = scores_of(runs[flipped[0]], "test")
    vertical = scores_of(runs["flip-0.5"], "test")
    return Flips(
        compare(f"`{flipped[0]}`", horizontal, "no augmentation", plain),
        compare("`flip-0.5`", vertical, "no augmentation", plain),
        compare("`flip-0.5`", vertical, f"`{flipped[0]}`", horizontal),
    )


def answer_flips(study: Study) -> Answer | None:
    """Say why the lab saw a gain by vertical flips."""
    flips = compare_flips(study)
    if flips is None:
        return None
    horizontal_hurts = flips.horizontal.comparison.verdict == "less"
    vertical_helps = flips.vertical.comparison.verdict == "more"
    vertical_is_better = flips.vertical_with_horizontal.comparison.verdict == "more"
    if horizontal_hurts and vertical_is_better and not vertical_helps:
        gap = LAB["test_iou"]["flip-0.5"] - LAB["test_iou"]["tuned"]
        text = (
            "Probably because they replaced horizontal flips, which hurt in these runs. But the"
            f" lab's gap of {gap:.4f}, from one run each, may also be luck."
        )
        return Answer(text, "likely")
    return Answer("These runs cannot tell.", "cannot tell")


def section_flips(study: Study) -> str | None:
    """Compare each flip with no augmentation, and the one with the other."""
    flips = compare_flips(study)
    if flips is None:
        return None
    texts = [flips.horizontal.text, flips.vertical.text]
    if flips.vertical_with_horizontal.comparison.verdict != "one seed":
        texts.append(flips.vertical_with_horizontal.text)
    return " ".join(texts)


def answer_jitter(study: Study) -> Answer | None:
    """Say whether colour jitter helps on the lab's images."""
    runs, without = augmentations(study)
    if study.group != "flight" or without is None or "jitter" not in runs:
        return None
    jitter = scores_of(runs["jitter"], "test")
    answer = compare("`jitter`", jitter, "no augmentation", scores_of(runs[without], "test"))
    return answer.begin_with(YES_OR_NO[answer.comparison.verdict])


def section_jitter(study: Study) -> str | None:
    if answer_jitter(study) is None:
        return None
    return (
        "Colours say little here: a square is a square in any of four colours. So we expected"
        " little."
    )


# ---- tune


class Factor(NamedTuple):
    """Hold the scores of each setting of one factor on validation, the best setting first."""

    name: str
    scores: dict[str, list[float]]  # setting → mean IoU of its runs
    answer: Answer  # compares the best setting with the worst

    @property
    def spread(self) -> float:
        """Give the difference of the best and the worst mean."""
        return self.answer.comparison.difference


def settings_by_factor(study: Study) -> dict[str, Runs]:
    """Sort the experiments that differ in one factor: factor → setting → runs.

    The factor is the name of the file up to its last hyphen: learning-rate-0.001.yaml sets the
    learning rate.
    """
    labs_models = {name: study.models[name] for name in LAB_MODELS if name in study.models}
    settings: dict[str, Runs] = {"lab's model": labs_models, "augmentation": study.augment}
    for experiment, members in study.tune.items():
        name = members[0].name
        # A cell of the grid and skip-wide differ from tuned in two factors.
        if experiment in ("tuned", "tune/skip-wide") or name.startswith("grid-"):
            continue
        factor = (name.rpartition("-")[0] or name).replace("-", " ")
        if factor not in settings:
            settings[factor] = {}
            if "tuned" in study.tune:
                settings[factor]["tuned"] = study.tune["tuned"]
        settings[factor][experiment] = members
    return settings


def find_factors(study: Study) -> list[Factor]:
    """Compare the best with the worst setting of each factor, the widest range first."""
    factors = []
    for factor, runs in settings_by_factor(study).items():
        scores = {}
        for name, rows in rank(rows_of(runs, "validation")).items():
            scores[name] = [row["mean_iou"] for row in rows]
        if len(scores) > 1:
            names = list(scores)
            best, worst = names[0], names[-1]
            answer = compare(f"`{best}`", scores[best], f"`{worst}`", scores[worst])
            factors.append(Factor(factor, scores, answer))
    return sorted(factors, key=lambda factor: factor.spread, reverse=True)


def answer_tuning(study: Study) -> Answer | None:
    """Name the factor with the widest range that is too large to be luck of the seed."""
    factors = find_factors(study)
    if len(factors) < 2 or len(study.tune) < 2:
        return None
    for factor in factors:
        if factor.answer.certainty == "sure":
            # Only likely: the two settings were picked as the extremes of several.
            words = f"The {factor.name}, whose gap on validation is the widest beyond luck. "
            answer = factor.answer.begin_with(words)
            return answer._replace(certainty="likely")
    widest = factors[0]
    answer = widest.answer.begin_with(f"Perhaps the {widest.name}, whose settings differ most. ")
    return answer._replace(certainty="cannot tell")


def factors_table(factors: list[Factor]) -> str:
    lines = [["factor", "settings", "lowest", "highest", "range", "beyond luck of the seed"]]
    for factor in factors:
        ends = [f"{name}: {score(values)}" for name, values in factor.scores.items()]
        beyond = "yes" if factor.answer.certainty == "sure" else "cannot tell"
        cells = [factor.name, str(len(ends)), ends[-1], ends[0], f"{factor.spread:.4f}", beyond]
        lines.append(cells)
    return markdown(lines)


def section_tuning(study: Study) -> str | None:
    """Draw the settings by their score, and name the factor that differs most."""
    if len(study.tune) < 2:
        return None
    parts = []
    factors = find_factors(study)
    if len(factors) > 1:
        wider = []  # factors with a wider range than the widest that is beyond luck
        for factor in factors:
            if factor.answer.certainty == "sure":
                break
            if factor.answer.comparison.verdict == "noise":
                wider.append(f"{factor.name} ({factor.spread:.4f})")
        if wider and answer_tuning(study).certainty == "likely":
            parts.append(
                f"The settings of {' and '.join(wider)} differ by more, but their runs scatter so"
                " much that it may be luck of the seed."
            )
    ranked = rank(rows_of(study.tune, "validation"))
    best = next(iter(ranked))
    if "tuned" in study.tune and best != "tuned":
        ours = [row["mean_iou"] for row in ranked[best]]
        answer = compare(f"`{best}`", ours, "`tuned`", scores_of(study.tune["tuned"], "validation"))
        parts.append(f"Of all settings, `{best}` scores highest. {answer.text}")
    parts.append(draw_ranking(study, "tune.png", ranked, "validation", "Settings"))
    return "\n\n".join(parts)


def details_tuning(study: Study) -> str | None:
    """Tabulate the range of each factor, and all settings that were tried."""
    if len(study.tune) < 2:
        return None
    parts = []
    factors = find_factors(study)
    if len(factors) > 1:
        parts.append(factors_table(factors))
        parts.append(
            "A range grows with the number of settings tried, and a setting in which some runs"
            ' never predict a class widens it most. Its ends were picked, so "yes" is a hint.'
        )
    ranked = rank(rows_of(study.tune, "validation"))
    parts.append("All settings, by their score on the validation split:")
    parts.append(table_of(ranked, ["mean IoU", "n", "never predicted", "images seen"]))
    return "\n\n".join(parts)


# ---- overfit


def first_perfect(run: Run) -> int | None:
    """Find the first epoch with a training mean IoU that rounds to 1.000."""
    for entry in run.history:
        if (entry["training"]["mean_iou"] or 0) >= PERFECT:
            return entry["epoch"]
    return None


def answer_overfitting(study: Study) -> Answer | None:
    """Say whether the lab's networks can be forced to overfit."""
    runs = []
    for members in study.overfit.values():
        if members[0].name.startswith("one-batch"):
            runs += members
    if not runs:
        return None
    perfect = [run for run in runs if first_perfect(run) is not None]
    text = (
        f"{len(perfect)} of {len(runs)} runs learnt two images by heart (training mean IoU 1.000)."
    )
    if perfect:
        on_new_images = fmean(run.history[-1]["validation"]["mean_iou"] for run in perfect)
        text += f" On new images these {len(perfect)} score {on_new_images:.4f} on average."
        how_bad = "Very bad" if on_new_images < LOW_IOU else "Not that bad"
        return Answer(f"{how_bad}, with another loss than the lab's. {text}", "sure")
    return Answer(f"Not here. {text}", "sure")


def section_overfitting(study: Study) -> str | None:
    """Draw training and validation scores by epoch."""
    if not study.overfit:
        return None
    return draw_mean_iou(study, "overfit.png", study.overfit)


def details_overfitting(study: Study) -> str | None:
    """Tabulate when each run learnt its images by heart, and the gap to validation."""
    if not study.overfit:
        return None
    lines = [["model", "images", "1.000 in epoch", "training", "validation", "gap", "n"]]
    for members in study.overfit.values():
        epochs, training, validation, gap = [], [], [], []
        for run in members:
            last = run.history[-1]
            epochs.append(str(first_perfect(run) or "never"))
            training.append(last["training"]["mean_iou"])
            validation.append(last["validation"]["mean_iou"])
            gap.append(training[-1] - validation[-1])
        cells = [members[0].name, str(members[0].config["limit_images"] or "all")]
        cells.append(", ".join(epochs))
        cells += [score(training), score(validation), score(gap), str(len(members))]
        lines.append(cells)
    return markdown(lines)
