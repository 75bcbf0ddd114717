"""Format rows of results as tables: the columns, the printed table, the reading of result files.

A row is the dict of one checkpoint on one split that evaluate.py makes and --json writes. The rows
of one experiment differ in their seed; a table has a line for each experiment.
"""

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

import metrics
from common import ROOT, UserError, code_digest, reading, require
from metrics import mean_std

Column = Callable[[list[dict]], str]  # from the rows of an experiment to the text of its cell

NONE = "–"  # the cell of a value that does not exist
LAB = yaml.safe_load((ROOT / "docs/lab.yaml").read_text(encoding="utf-8"))

# What every row holds, key → type. A row from evaluate.py holds more, up to its confusion matrix. A
# row from the summary.json of a run does not.
ROW = {
    "name": str,
    "seed": int,
    "profile": str,
    "checkpoint": str,
    "split": str,
    "digest": str,
    "parameters": int,
    "pixel_accuracy": float,
    "mean_iou": float,
    "mean_iou_foreground": (float, type(None)),
    "mean_dice": float,
    "per_class_iou": dict,
    "dead_classes": list,
}


# ---- cells


def format_stat(values: list[float | None], form: str = "{:.4f}", std: bool = False) -> str:
    """Format the mean of values, ± the standard deviation if asked for; – if one is missing."""
    stat = mean_std(values)
    if stat is None:
        return NONE
    text = form.format(stat["mean"])
    if std and stat["std"] is not None:
        text += " ± " + form.format(stat["std"])
    return text


def format_positions(positions: dict[str, float]) -> str:
    """Format lost positions: "square 2/4" if squares are lost at two of four; – if none is."""
    texts = [f"{name} {count:g}/4" for name, count in positions.items()]
    return ", ".join(texts) or NONE


def published(row: dict) -> float | None:
    """Look up the test IoU in the lab's report; None for other experiments and other classes."""
    if row["split"] != "testing" or list(row["per_class_iou"]) != LAB["classes"]:
        return None
    return LAB["test_iou"].get(row["name"])


def mean_of(key: str, form: str = "{:.4f}") -> Column:
    """Make the column of the mean of a key over the runs; – where a row lacks it."""

    def column(rows: list[dict]) -> str:
        return format_stat([row.get(key) for row in rows], form)

    return column


def mean_std_of(key: str) -> Column:
    """Make the column of the mean ± standard deviation of a key; – where a row lacks it."""

    def column(rows: list[dict]) -> str:
        return format_stat([row.get(key) for row in rows], std=True)

    return column


def iou_of(name: str) -> Column:
    """Make the column of the IoU of one class."""

    def column(rows: list[dict]) -> str:
        return format_stat([row["per_class_iou"][name] for row in rows])

    return column


def add_ious(columns: dict[str, Column], classes: list[str]) -> dict[str, Column]:
    """Add a column of the IoU of each class, whose name no other column has."""
    added = dict(columns)
    for name in classes:
        title = f"IoU of {name}" if name in columns else name
        added[title] = iou_of(name)
    return added


def never_predicted(rows: list[dict]) -> str:
    """Name the classes that a run of the experiment never predicts."""
    names = []
    for row in rows:
        for name in row["dead_classes"]:
            if name not in names:
                names.append(name)
    return ", ".join(names) or "none"


def striped(rows: list[dict]) -> str:
    """Name the classes that a run loses at some pixel positions, as `lost_positions` counts."""
    texts = []
    for row in rows:
        for name, count in row.get("lost_positions", {}).items():
            text = format_positions({name: count})
            if text not in texts:
                texts.append(text)
    return ", ".join(texts) or NONE


def lab_iou(rows: list[dict]) -> str:
    return format_stat([published(rows[0])])


def number_of_runs(rows: list[dict]) -> str:
    return str(len(rows))


# Every column by its heading, in the order of the printed table. What a column averages, such as
# "pixel_accuracy", is a key of the dict `row` in evaluate.py, which takes the scores of a confusion
# matrix from metrics.scores: trace / sum is the accuracy.
COLUMNS: dict[str, Column] = {
    "parameters": mean_of("parameters", "{:,.0f}"),
    "images seen": mean_of("images_seen", "{:,.0f}"),
    "training": mean_of("train_seconds", "{:.0f} s"),
    "accuracy": mean_of("pixel_accuracy"),
    "mean Dice": mean_of("mean_dice"),
    "boundary IoU (2 px)": mean_std_of("boundary_iou"),
    "mean IoU": mean_std_of("mean_iou"),
    "never predicted": never_predicted,
    "striped": striped,
    "lab IoU": lab_iou,
    "lab batch": mean_std_of("lab_batch"),
    "lab batch (training mode)": mean_std_of("lab_batch_training_mode"),
    "n": number_of_runs,
}
# Columns of pages and JSON that would make the table in a terminal too wide.
NOT_PRINTED = ("lab batch", "lab batch (training mode)")


# ---- tables


def tabulate(experiments: dict[str, list[dict]], columns: dict[str, Column]) -> list[list[str]]:
    """Fill the lines of a table, the heading first: a line for each experiment.

    A column is left out if it is empty for all experiments, and so is "n" if it is 1 for all.
    """
    lines = [["model"]]
    for name in experiments:
        lines.append([name])
    for heading, column in columns.items():
        cells = [column(rows) for rows in experiments.values()]
        empty = "1" if heading == "n" else NONE
        if all(cell == empty for cell in cells):
            continue
        for line, text in zip(lines, [heading, *cells], strict=True):
            line.append(text)
    return lines


def align(lines: list[list[str]]) -> str:
    """Align cells in columns for a terminal: the first column to the left, others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        for cell, width in zip(line[1:], widths[1:], strict=True):
            cells.append(cell.rjust(width))
        texts.append("  ".join(cells).rstrip())
    return "\n".join(texts)


def markdown(lines: list[list[str]]) -> str:
    """Format cells as a Markdown table; the first line is the heading."""
    heading = lines[0]
    rule = ["---"] + ["---:"] * (len(heading) - 1)
    texts = []
    for line in [heading, rule, *lines[1:]]:
        cells = [cell.replace("|", "\\|") for cell in line]
        texts.append(f"| {' | '.join(cells)} |")
    return "\n".join(texts)


def group_rows(rows: list[dict]) -> dict[str, list[dict]]:
    """Group rows by experiment: by name, and by folder where two folders hold runs of one name.

    Two checkpoints of one seed are no two seeds: each is then an experiment of its own. UserError
    if one checkpoint has two results.
    """
    by_checkpoint: dict[str, dict] = {}
    for row in rows:
        path = row["checkpoint"]
        first = by_checkpoint.setdefault(path, row)  # a result given twice counts once
        if row != first:
            raise UserError(f"{path}: has two results that differ; give one of them")
    groups: dict[tuple[str, Path], list[dict]] = {}
    for row in by_checkpoint.values():
        folder = Path(row["checkpoint"]).parent
        if folder.name == f"seed{row['seed']}":
            folder = folder.parent
        groups.setdefault((row["name"], folder), []).append(row)
    folders = Counter(name for name, _ in groups)
    experiments = {}
    for (name, folder), group in groups.items():
        seeds = {row["seed"] for row in group}
        if len(seeds) < len(group):
            for row in group:
                experiments[f"{name} ({row['checkpoint']})"] = [row]
            continue
        title = name if folders[name] == 1 else f"{name} ({folder})"
        experiments[title] = group
    return experiments


def rank(experiments: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Sort experiments by their mean IoU, the highest first."""
    means = {}
    for name, rows in experiments.items():
        means[name] = statistics.fmean(row["mean_iou"] for row in rows)
    names = sorted(means, key=means.get, reverse=True)
    return {name: experiments[name] for name in names}


def differences(row: dict, first: dict) -> list[str]:
    """List why two rows cannot share a table: they differ in split, data, profile or classes."""
    keys = [key for key in ("split", "digest", "profile") if row[key] != first[key]]
    if list(row["per_class_iou"]) != list(first["per_class_iou"]):
        keys.append("classes")
    return keys


def background_only(row: dict) -> dict:
    """Score a model that predicts the first class at every pixel of the split of `row`."""
    classes = list(row["per_class_iou"])
    matrix = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    matrix[:, 0] = torch.tensor(row["confusion_matrix"]).sum(dim=1)
    background = metrics.scores(matrix, classes)
    background["name"] = f"{classes[0]} only"
    background["parameters"] = 0
    background["split"] = row["split"]
    return background


def mark_other_code(experiments: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Add a * to the name of each experiment that other code than today's trained."""
    today = code_digest()
    marked = {}
    for name, rows in experiments.items():
        if any(row.get("code") not in (None, today) for row in rows):
            name += "*"
        marked[name] = rows
    return marked


def comparison_table(rows: list[dict]) -> str:
    """Format the table that evaluate.py prints, with a line for each experiment.

    Tests come in the order of the rows, below a line of predicting nothing but background. Rows of
    validation, from summary.json, are there to choose by, so the best comes first. UserError if the
    rows cannot share a table.
    """
    first = rows[0]
    for row in rows:
        keys = differences(row, first)
        if keys:
            both = f"{row['checkpoint']}: differs from {first['checkpoint']}"
            raise UserError(f"{both} in {', '.join(keys)}; give them apart")

    experiments = mark_other_code(group_rows(rows))
    columns = {name: cell for name, cell in COLUMNS.items() if name not in NOT_PRINTED}
    if "confusion_matrix" in first:
        text = table_of_tests(experiments, columns, first)
    else:
        text = align(tabulate(rank(experiments), columns))
    if any(name.endswith("*") for name in experiments):
        text += "\n* trained by other code than today's; make … OVERWRITE=1 trains it again"
    return text


def table_of_tests(
    experiments: dict[str, list[dict]], columns: dict[str, Column], first: dict
) -> str:
    """Format tests below a line of predicting only background; `first` is one of the rows."""
    nothing = background_only(first)
    lines_of = {nothing["name"]: [nothing]}
    lines_of.update(experiments)
    columns = add_ious(columns, list(first["per_class_iou"]))
    title = (
        f"{first['data']}, {first['split']} split, {first['images']} images, "
        f"{first['profile']} profile. IoU by class at the right."
    )
    return f"{title}\n{align(tabulate(lines_of, columns))}"


# ---- result files


def read_results(path: Path) -> list[dict]:
    """Read the rows that --json wrote, or the validation row of a run from its summary.json.

    UserError if the file holds anything else, or a mean IoU that its confusion matrix contradicts.
    """
    with reading(path, "remove it and run make again"):
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = content
        if isinstance(content, dict):
            rows = [row_of_summary(content, path)]
        if not rows:
            raise ValueError("it holds no results")
        for row in rows:
            require(row, ROW)
    for row in rows:
        if "confusion_matrix" in row:
            check_mean_iou(row, path)
    return rows


def row_of_summary(summary: dict, path: Path) -> dict:
    """Make a row of the validation scores in a summary.json."""
    row = {key: value for key, value in summary.items() if key not in ("training", "validation")}
    row.update(summary["validation"])
    row["split"] = "validation"
    row["checkpoint"] = str(path)
    return row


def check_mean_iou(row: dict, path: Path) -> None:
    """Raise UserError unless the mean IoU of a row is the mean IoU of its confusion matrix.

    The last digits may differ: another processor may add in another order.
    """
    size = len(row["per_class_iou"])
    with reading(path, "remove it and run make again"):
        matrix = torch.tensor(row["confusion_matrix"], dtype=torch.int64)
        if matrix.shape != (size, size):
            raise ValueError("its confusion matrix is of other classes")
    computed = metrics.mean_iou(matrix).item()
    if not math.isclose(row["mean_iou"], computed, rel_tol=1e-9):
        text = "mean_iou is not the mean IoU of its confusion matrix"
        raise UserError(f"{path}: {text}; remove it and run make again")
