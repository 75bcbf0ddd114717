"""Write the report's section on lost positions: why runs of the same code differ so much.

As in report_models.py, functions answer_X and section_X take a study, and return None without runs.
"""

from itertools import product
from statistics import median

import figures
from report_lost import count_never_predicted
from report_models import Answer, picture, score, scores_of
from report_runs import UNTESTED, Run, Study, by_experiment
from table import COLUMNS, LAB, NONE, add_ious, markdown, tabulate

N_POSITIONS = 4  # of each 2×2 pixels: the last up-sampling computes each with its own weights
RANGE_OF_SEEDS = 0.05  # mean IoU: runs that differ more do so by more than usual luck
LAST = 3  # epochs at the end of which the median is taken, since the loss has spikes
MOST_LOST = 3  # positions that a run of the lab lost
EPOCHS = 15  # of the lab's runs; its last run has twice as many
# What all of the lab's runs with its Dice loss have in their config.
PROTOCOL = {
    "loss": {"dice_pooled": 1.0},
    "batch_size": 32,
    "last_batch": "keep",
    "crop": 0,
    "learning_rate": 0.005,
    "schedule": "constant",
    "dropout": 0.0,
    "skip": "pooled",
    "upsampling_init": "random",
}
# Lines of the table of lost positions.
LABS = "the lab's runs, from their loss"
WITH = "our runs by its protocol, with augmentation"
WITHOUT = "our runs by its protocol, without augmentation"

# ---- lost positions: the lab's logs and our runs


def late_loss(losses: list[float]) -> float:
    """Take the validation loss at the end of a run: the median of its last epochs."""
    return median(losses[-LAST:])


def has_lab_protocol(run: Run) -> bool:
    """Tell whether a run followed the lab's protocol to its end, with its pooled Dice."""
    if run.data != "afo" or run.profile != "full" or len(run.history) < EPOCHS:
        return False
    if run.folder_name in UNTESTED:
        return False
    return all(run.config.get(key) == value for key, value in PROTOCOL.items())


def runs_by_protocol(study: Study) -> list[Run]:
    return [run for run in study.all_runs if has_lab_protocol(run)]


def lost_in_masks(run: Run) -> float:
    """Count the positions of all shapes that a tested run lost."""
    return sum(run.test.get("lost_positions", {}).values())


def lost_in_loss(loss: float) -> int:
    """Tell how many lost positions explain the end of the lab's validation loss.

    The pooled Dice loss is about one minus the mean probability of the true class. So each lost
    position adds a quarter of the pixels of its class to the loss of a run that lost none, such as
    the lab's `tuned`.
    """
    shares = LAB["validation_share"].values()
    mean_share = sum(shares) / len(shares)
    loss_of_one_position = mean_share / N_POSITIONS
    loss_of_none = late_loss(LAB["validation_loss"]["tuned"])
    return round((loss - loss_of_none) / loss_of_one_position)


def expected_points() -> list[tuple[float, float]]:
    """Compute loss and mean IoU of a run that loses up to three positions, from class shares alone.

    It starts from the lab's `tuned`, which lost none.
    """
    shares = list(LAB["validation_share"].values())
    background = 1 - sum(shares)
    loss = late_loss(LAB["validation_loss"]["tuned"])
    points = []
    for lost in product(range(MOST_LOST + 1), repeat=len(shares)):
        if sum(lost) > MOST_LOST:
            continue
        quarters = [number / N_POSITIONS for number in lost]
        missing = sum(quarter * share for quarter, share in zip(quarters, shares, strict=True))
        background_iou = background / (background + missing)  # it takes the missing pixels
        drop = (sum(quarters) + 1 - background_iou) / (len(shares) + 1)
        points.append((loss + missing, LAB["test_iou"]["tuned"] - drop))
    return points


def lab_runs() -> dict[str, int]:
    """Count the lost positions of each of the lab's runs with a pooled Dice: name → number."""
    lost = {}
    for name, losses in LAB["validation_loss"].items():
        if name != "initial":  # trained with cross-entropy
            lost[name] = lost_in_loss(late_loss(losses))
    return lost


def draw_lost(study: Study, runs: list[Run]) -> str:
    """Draw IoU against validation loss, of the lab's runs and ours; return the link."""
    lab, ours = [], []
    for name in lab_runs():
        lab.append((late_loss(LAB["validation_loss"][name]), LAB["test_iou"][name]))
    for run in runs:
        entries = [entry["validation"] for entry in run.history[-LAST:]]
        loss = median(entry["loss"] for entry in entries)
        ours.append((loss, median(entry["mean_iou"] for entry in entries)))
    groups = {
        "expected if 0, 1, 2 or 3 positions are lost": expected_points(),
        "the lab's runs": lab,
        "our runs": ours,
    }
    labels = ("validation loss at the end", "mean IoU")
    figures.scatter(study.figures / "lost-positions.png", groups, *labels)
    caption = (
        "Each dot or square is a run. Crosses: where a run should lie that lost no position (top),"
        " one, two or three (bottom), computed from the share of the pixels that each shape covers."
        " There are several for each number, since they may be positions of one shape or of"
        " several. The lab's runs: its logged validation loss and its published test IoU. Our runs"
        f" by its protocol: validation, medians of the last {LAST} epochs."
    )
    return picture(study, "lost-positions.png", caption)


def count_lost(study: Study) -> dict[str, list[float]]:
    """Count the lost positions of each run: the lab's, and ours with and without augmentation."""
    counts: dict[str, list[float]] = {LABS: list(lab_runs().values()), WITH: [], WITHOUT: []}
    for run in runs_by_protocol(study):
        title = WITH if run.is_augmented else WITHOUT
        counts[title].append(lost_in_masks(run))
    return {title: lost for title, lost in counts.items() if lost}


def lost_table(counts: dict[str, list[float]]) -> str:
    """Tabulate how many runs lost no position, at most one, between one and two, and so on."""
    limits = range(1, MOST_LOST + 1)
    headings = ["up to 1"] + [f"{limit - 1} to {limit}" for limit in limits[1:]]
    lines = [["lost positions", "runs", "none", *headings, "more"]]
    for title, lost in counts.items():
        cells = [title, str(len(lost)), str(lost.count(0))]
        for limit in limits:
            between = [number for number in lost if limit - 1 < number <= limit]
            cells.append(str(len(between)))
        more = [number for number in lost if number > MOST_LOST]
        cells.append(str(len(more)))
        lines.append(cells)
    return markdown(lines)


def lost_in_part(runs: list[Run]) -> str | None:
    """Name the runs that lost a part of a position: some of the 16 positions of each 4×4 pixels."""
    texts = []
    for run in runs:
        for shape, number in run.test.get("lost_positions", {}).items():
            if number % 1 > 0:
                texts.append(f"{run.label} lost the {shape} at {4 * number:g} of 16")
    if not texts:
        return None
    return (
        "A position may be lost in part. The up-sampling before the last has four positions as"
        f" well, which makes 16 in each 4×4 pixels. {'; '.join(texts)}. Where another shape is"
        " shown in its place, the IoU of that shape falls too. So these runs lie off the crosses."
    )


# ---- why do runs of the same code differ so much?


def answer_seeds(study: Study) -> Answer | None:
    """Say that luck decides what is lost; of other data, which runs of one experiment differ."""
    ours = runs_by_protocol(study)
    if ours:
        lost = [run for run in ours if lost_in_masks(run) > 0]
        labs = [number for number in lab_runs().values() if number > 0]
        text = (
            "Probably because some runs, by chance, never learn a shape at some pixel positions."
            f" That would explain the {len(labs)} low scores among the lab's {len(lab_runs())}"
            f" runs with a Dice loss. {len(lost)} of our {len(ours)} such runs lost positions."
        )
        return Answer(text, "likely")
    return widest_range(study)


def widest_range(study: Study) -> Answer | None:
    """Name the experiment whose runs differ most although only their seeds differ."""
    widest = RANGE_OF_SEEDS
    answer = None
    for experiment, members in study.runs.items():
        tests = [run.test for run in members if run.test]
        ious = [test["mean_iou"] for test in tests]
        if len(ious) < 2 or max(ious) - min(ious) < widest:
            continue
        widest = max(ious) - min(ious)
        text = (
            f"{len(ious)} runs of `{experiment}`, of one config but for the seed, score from"
            f" {min(ious):.4f} to {max(ious):.4f}."
        )
        worst = min(tests, key=lambda test: test["mean_iou"])
        best = max(tests, key=lambda test: test["mean_iou"])
        worst_lost = worst["dead_classes"] or worst.get("lost_positions")
        best_lost = best["dead_classes"] or best.get("lost_positions")
        if worst_lost and not best_lost:
            text = f"By luck: some lose a class, or lose it at some pixel positions. {text}"
        answer = Answer(text, "sure")
    return answer


def section_seeds(study: Study) -> str | None:
    """Show what lost positions cost, and how many runs lost some."""
    ours = runs_by_protocol(study)
    if not ours:
        return None
    counts = count_lost(study)
    least = min(LAB["validation_share"].values()) / N_POSITIONS
    most = max(LAB["validation_share"].values()) / N_POSITIONS
    parts = [
        draw_lost(study, ours),
        "The lab's scores lie near four values: 0.99, 0.92, 0.86 and 0.80. A shape that is missing"
        " at one of four positions loses a quarter of its IoU. Four classes are averaged, so the"
        " mean IoU falls by a sixteenth. The Dice loss is about the share of the pixels that are"
        f" wrong. So it rises by a quarter of the share that the shape covers: by {least:.3f} to"
        f" {most:.3f}. The lab's own logs lie near the values computed in this way.",
        lost_table(counts),
    ]
    for run in ours:
        lost = lost_in_masks(run)
        if lost > MOST_LOST:
            parts.append(
                f"{run.label} lost {lost:g} positions, more than any run of the lab. It lies beyond"
                " the crosses."
            )
    for experiment, runs in study.runs.items():
        if not all(has_lab_protocol(run) for run in runs):
            continue
        lost = [lost_in_masks(run) for run in runs]
        if len(set(lost)) > 1:
            numbers = ", ".join(f"{number:g}" for number in lost)
            scores = ", ".join(f"{run.test['mean_iou']:.4f}" for run in runs)
            parts.append(
                f"The {len(runs)} runs of `{experiment}` have one config but for the seed. They"
                f" lost {numbers} positions, and score {scores} on the test split."
            )
    in_part = lost_in_part(ours)
    if in_part is not None:
        parts.append(in_part)
    lowest = min(LAB["test_iou"], key=LAB["test_iou"].get)
    again = study.runs.get(f"augment/{lowest}")
    if again:
        parts.append(
            f"The lab's lowest run was `{lowest}`, {LAB['test_iou'][lowest]:.4f}. Our run of it"
            f" scores {score(scores_of(again, 'test'))}."
        )
    text = "Was it augmentation, or chance? "
    if WITHOUT in counts:
        if sum(counts[WITHOUT]) > 0:
            text += "Chance is enough: "
        text += f"{share_that_lost(counts[WITHOUT])} without any augmentation lost positions. "
    if WITH in counts:
        text += f"With augmentation {share_that_lost(counts[WITH])} did. "
    parts.append(text.strip())
    if len({run.seed for run in ours}) > 1:
        parts.append(
            f"But {len(ours)} runs are not {len(ours)} separate tries. Runs with the same seed see"
            " the images in the same order. Those of one network start from the same weights too:"
        )
        parts.append(seeds_table(ours))
    parts.append(
        "The lab concluded that flips and blur together decrease the performance. By their loss,"
        f" its three runs of that kind lost one position each. {our_flips_with_blur(study)}These"
        " are too few runs, of too few seeds, to tell whether augmentation makes lost positions"
        " more frequent."
    )
    return "\n\n".join(parts)


def share_that_lost(lost: list[float]) -> str:
    """Say how many runs lost positions, from the number that each lost."""
    return f"{sum(number > 0 for number in lost)} of {len(lost)} runs"


def seeds_table(runs: list[Run]) -> str:
    """Tabulate how many runs of each seed lost positions, with and without augmentation."""
    lines = [["seed", "lost positions without augmentation", "with augmentation"]]
    for seed in sorted({run.seed for run in runs}):
        cells = [str(seed)]
        for is_augmented in (False, True):
            members = [r for r in runs if r.seed == seed and r.is_augmented == is_augmented]
            lost = [lost_in_masks(run) for run in members]
            cells.append(share_that_lost(lost) if lost else NONE)
        lines.append(cells)
    return markdown(lines)


def our_flips_with_blur(study: Study) -> str:
    """Name the scores of our runs with flips and blur together; "" if there is none."""
    texts = []
    for experiment, members in study.runs.items():
        if experiment.startswith("augment/flip-blur-"):
            texts.append(f"`{members[0].name}` {score(scores_of(members, 'test'))}")
    if not texts:
        return ""
    return f"Ours score {', '.join(texts)}. "


def count_striped(study: Study) -> tuple[int, int]:
    """Count the tested runs of a study that have striped masks, and all tested runs."""
    tested = [run for run in study.all_runs if run.test]
    striped = [run for run in tested if run.test.get("lost_positions")]
    return len(striped), len(tested)


def details_seeds(study: Study) -> str | None:
    """Tabulate the tested runs of the experiments in which a run has striped masks."""
    striped, total = count_striped(study)
    if total == 0:
        return None
    rows = {}
    for members in by_experiment(study.all_runs).values():
        tested = [run for run in members if run.test]
        if any(run.test.get("lost_positions") for run in tested):
            for run in tested:
                rows[run.label] = [run.test]
    parts = []
    if striped == 0:
        parts.append(f"Of all {total} tested runs none has striped masks.")
    else:
        columns = {"mean IoU": COLUMNS["mean IoU"], "striped": COLUMNS["striped"]}
        [first] = next(iter(rows.values()))
        columns = add_ious(columns, list(first["per_class_iou"]))
        verb = "have" if striped > 1 else "has"
        parts.append(
            f"Of all {total} tested runs, of every model, {striped} {verb} striped masks. The table"
            " shows striped runs beside runs of the same experiment with other seeds."
        )
        parts.append(markdown(tabulate(rows, columns)))
    parts.append(count_never_predicted(study))
    return "\n\n".join(parts)
