"""Tests of table.py: cells, lines and the printed table, and which result files are read."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch

import table
from common import UserError
from metrics import scores
from table import (
    COLUMNS,
    LAB,
    align,
    background_only,
    comparison_table,
    differences,
    format_stat,
    group_rows,
    markdown,
    rank,
    read_results,
    tabulate,
)

CLASSES = ["background", "square", "triangle", "circle"]
TODAY = "0123456789ab"  # digest of today's code
# Rows: true classes. Triangles are never predicted, circles only by mistake.
MATRIX = [[60, 3, 0, 1], [2, 17, 0, 0], [5, 2, 0, 0], [7, 0, 0, 3]]


@pytest.fixture(autouse=True)
def today(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fix the digest, so that editing the code while tests run changes no result."""
    monkeypatch.setattr(table, "code_digest", lambda: TODAY)


def make_row(name: str = "small", seed: int = 0, right: int = 17, **values: object) -> dict:
    """Make a row as evaluate.py writes it; `right` is the number of right square pixels."""
    matrix = [line[:] for line in MATRIX]
    matrix[1][1] = right
    row = {
        "name": name,
        "seed": seed,
        "profile": "quick",
        "images_seen": 1000,
        "train_seconds": 60.0 + seed,
        "checkpoint": f"runs/{name}/seed{seed}/best.pt",
        "data": "data/generated",
        "split": "testing",
        "digest": "d1",
        "images": 7,
        "parameters": 1234,
        "interval": None,
        "lost_positions": {},
        "boundary_iou": 0.5,
        "lab_batch": None,
        "lab_batch_training_mode": None,
        "code": TODAY,
        "confusion_matrix": matrix,
    }
    row.update(scores(torch.tensor(matrix), CLASSES))
    row.update(values)
    return row


def read_table(text: str) -> dict[str, dict[str, str]]:
    """Read a printed table: model → heading → cell. Columns lie two or more spaces apart."""
    lines = []
    for line in text.splitlines():
        lines.append([cell.strip() for cell in line.split("  ") if cell.strip()])
    start = [line[:1] for line in lines].index(["model"])
    heading = lines[start]
    cells = {}
    for line in lines[start + 1 :]:
        if len(line) == len(heading):
            cells[line[0]] = dict(zip(heading, line, strict=True))
    return cells


# ---- cells


def test_format_stat() -> None:
    assert format_stat([0.5, 0.7, 0.9]) == "0.7000"
    assert format_stat([0.5, 0.7, 0.9], std=True) == "0.7000 ± 0.2000"
    assert format_stat([0.5], std=True) == "0.5000"
    assert format_stat([1500, 2500], "{:,.0f}") == "2,000"
    assert format_stat([0.5, None]) == "–"


def test_cells_of_classes_that_models_lose() -> None:
    rows = [
        make_row(dead_classes=[], lost_positions={"square": 2}),
        make_row(dead_classes=["circle", "square"], lost_positions={"square": 2, "triangle": 1}),
        make_row(dead_classes=["circle"], lost_positions={"square": 3}),
    ]
    assert COLUMNS["never predicted"](rows) == "circle, square"
    assert COLUMNS["striped"](rows) == "square 2/4, triangle 1/4, square 3/4"
    assert COLUMNS["never predicted"](rows[:1]) == "none"
    assert COLUMNS["striped"]([make_row()]) == "–"


def test_lab_iou_is_for_the_test_of_the_labs_classes_only() -> None:
    assert COLUMNS["lab IoU"]([make_row("tuned")]) == f"{LAB['test_iou']['tuned']:.4f}" == "0.9878"
    assert COLUMNS["lab IoU"]([make_row("best")]) == "–"
    assert COLUMNS["lab IoU"]([make_row("tuned", split="validation")]) == "–"
    assert COLUMNS["lab IoU"]([make_row("tuned", per_class_iou={"road": 0.5})]) == "–"


def test_the_labs_batch_has_fifty_names_and_columns_for_pages() -> None:
    assert len(set(LAB["test_batch"])) == 50
    assert LAB["test_batch"][0] == "000037_triangle_yellow_000011"
    row = make_row(lab_batch=0.975, lab_batch_training_mode=0.95)
    lines = tabulate({"tuned": [row]}, COLUMNS)
    assert "lab batch" in lines[0]
    assert lines[1][lines[0].index("lab batch")] == "0.9750"
    assert lines[1][lines[0].index("lab batch (training mode)")] == "0.9500"
    assert "lab batch" not in comparison_table([row])  # too wide for a terminal


# ---- tables


def test_columns_that_say_nothing_are_left_out() -> None:
    one = {"a": [make_row()], "b": [make_row(train_seconds=None)]}
    columns = {name: COLUMNS[name] for name in ("training", "striped", "n")}
    assert tabulate(one, columns) == [["model", "training"], ["a", "60 s"], ["b", "–"]]
    several = {"a": [make_row(), make_row(seed=1)], "b": [make_row()]}
    assert tabulate(several, columns)[0] == ["model", "training", "n"]


def test_align_and_markdown() -> None:
    lines = [["model", "mean IoU"], ["a|b", "0.5"], ["longer name", "–"]]
    aligned = "model        mean IoU\na|b               0.5\nlonger name         –"
    assert align(lines) == aligned
    pages = "| model | mean IoU |\n| --- | ---: |\n| a\\|b | 0.5 |\n| longer name | – |"
    assert markdown(lines) == pages


def test_runs_of_one_name_in_two_folders_are_two_experiments() -> None:
    """As after `make … RUNS=runs/rate SET=…`; a mean over both would mix two settings."""
    rows = []
    for folder in ("a", "b"):
        for seed in (0, 1):
            rows.append(make_row(seed=seed, checkpoint=f"{folder}/small/seed{seed}/best.pt"))
    rows.append(rows[0])  # one that is given twice counts once
    experiments = group_rows(rows)
    assert {name: len(group) for name, group in experiments.items()} == {
        "small (a/small)": 2,
        "small (b/small)": 2,
    }
    assert list(group_rows(rows[:2])) == ["small"]
    with pytest.raises(UserError, match=r"a/small/seed0/best\.pt: has two results that differ"):
        group_rows([*rows, dict(rows[0], mean_iou=0.1)])  # of two students, say
    last = dict(rows[0], checkpoint="a/small/seed0/last.pt")  # of the same run: no second seed
    assert list(group_rows([rows[0], last])) == [
        "small (a/small/seed0/best.pt)",
        "small (a/small/seed0/last.pt)",
    ]


def test_rank_is_by_the_mean_over_seeds() -> None:
    experiments = {
        "middle": [make_row(right=17)],
        "worst": [make_row(right=1), make_row(right=20)],
        "best": [make_row(right=30)],
    }
    assert list(rank(experiments)) == ["best", "middle", "worst"]


def test_differences_name_the_keys() -> None:
    row = make_row()
    assert differences(row, make_row("other", seed=3)) == []
    assert differences(row, make_row(split="validation", digest="d2")) == ["split", "digest"]
    assert differences(row, make_row(profile="full")) == ["profile"]
    assert differences(row, make_row(per_class_iou={"road": 0.5})) == ["classes"]


def test_predicting_background_everywhere() -> None:
    row = background_only(make_row())  # of the 100 pixels 64 are background
    assert row["pixel_accuracy"] == row["per_class_iou"]["background"] == pytest.approx(0.64)
    assert row["mean_iou"] == pytest.approx(0.64 / 4)
    assert row["mean_dice"] == pytest.approx(2 * 0.64 / 1.64 / 4)
    assert row["dead_classes"] == ["square", "triangle", "circle"]


def test_printed_table() -> None:
    rows = [make_row(seed=0, right=17), make_row(seed=1, right=19), make_row("tuned")]
    text = comparison_table(rows)
    assert text.startswith("data/generated, testing split, 7 images, quick profile.")
    cells = read_table(text)
    assert list(cells) == ["background only", "small", "tuned"]
    ious = [rows[0]["mean_iou"], rows[1]["mean_iou"]]
    mean = statistics.fmean(ious)
    assert cells["small"]["mean IoU"] == f"{mean:.4f} ± {statistics.stdev(ious):.4f}"
    assert cells["small"]["n"] == "2"
    assert cells["small"]["parameters"] == "1,234"
    assert cells["small"]["training"] == "60 s"  # the mean, 60.5 s, rounded to even
    assert cells["small"]["never predicted"] == "triangle"
    assert cells["tuned"]["boundary IoU (2 px)"] == "0.5000"
    assert cells["tuned"]["square"] == f"{17 / (17 + 2 + 5):.4f}"
    assert cells["tuned"]["lab IoU"] == "0.9878"
    assert cells["background only"]["images seen"] == "–"


def test_a_class_may_be_named_as_a_column() -> None:
    rows = [make_row(seed=0), make_row(seed=1)]
    for row in rows:
        row["per_class_iou"]["n"] = row["per_class_iou"].pop("circle")
    cells = read_table(comparison_table(rows))["small"]
    assert cells["n"] == "2" and cells["IoU of n"].startswith("0.")


def test_star_marks_other_code_in_the_printed_table_only() -> None:
    rows = [make_row(), make_row("tuned", code="of another day"), make_row("best", code=None)]
    text = comparison_table(rows)
    assert list(read_table(text)) == ["background only", "small", "tuned*", "best"]
    assert text.splitlines()[-1].startswith("* trained by other code")
    assert "*" not in align(tabulate(group_rows(rows), COLUMNS))
    assert "*" not in comparison_table(rows[:1])


@pytest.mark.parametrize("key", ["split", "digest", "profile"])
def test_rows_that_cannot_share_a_table_are_refused(key: str) -> None:
    other = make_row(seed=1)
    other[key] = "another"
    with pytest.raises(UserError, match=f"seed1/best.pt: differs from .* in {key}; give them"):
        comparison_table([make_row(), other])


# ---- result files


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [make_row(), make_row(seed=1)]
    assert read_results(write(tmp_path / "rows.json", rows)) == rows


def test_last_digits_may_differ_as_another_processor_sums_in_another_order(tmp_path: Path) -> None:
    row = make_row()
    row["mean_iou"] = math.nextafter(row["mean_iou"], 1)
    assert read_results(write(tmp_path / "rows.json", [row])) == [row]


def test_mean_iou_that_the_matrix_contradicts_is_refused(tmp_path: Path) -> None:
    row = make_row()
    row["mean_iou"] += 1e-6
    with pytest.raises(UserError, match=r"mean_iou .*; remove it and run make again"):
        read_results(write(tmp_path / "rows.json", [row]))


def test_incomplete_results_are_refused(tmp_path: Path) -> None:
    incomplete = make_row()
    del incomplete["digest"]
    for content in ([], {}, 3, [3], [incomplete], [make_row(mean_iou="0.5")]):
        with pytest.raises(UserError, match=r"rows.json: cannot be read"):
            read_results(write(tmp_path / "rows.json", content))


def test_results_of_older_versions_are_read(tmp_path: Path) -> None:
    row = make_row(dead_places={}, contributions=[0.5])
    for key in ("lost_positions", "lab_batch", "lab_batch_training_mode"):
        del row[key]
    [read] = read_results(write(tmp_path / "rows.json", [row]))
    assert comparison_table([read])


def test_summary_is_a_row_of_validation_and_the_best_comes_first(tmp_path: Path) -> None:
    rows = []
    for name, right in (("worse", 1), ("better", 30)):
        validation = scores(torch.tensor([[60, 4], [9, right]]), CLASSES[:2])
        summary = make_row(name, validation=validation)
        for key in ("split", "checkpoint", "data", "images", "confusion_matrix", "mean_iou"):
            del summary[key]
        (tmp_path / name).mkdir()
        rows += read_results(write(tmp_path / name / "summary.json", summary))
    assert rows[0]["split"] == "validation"
    assert rows[0]["checkpoint"] == str(tmp_path / "worse/summary.json")
    assert list(rows[0]["per_class_iou"]) == CLASSES[:2]
    assert list(read_table(comparison_table(rows))) == ["better", "worse"]


def test_a_mistake_in_the_metrics_keeps_its_trace(tmp_path: Path, monkeypatch) -> None:
    path = write(tmp_path / "rows.json", [make_row()])
    monkeypatch.setattr("metrics.iou", lambda matrix: undefined)  # noqa: F821
    with pytest.raises(NameError):
        read_results(path)


def test_damaged_results_are_refused_in_one_line(tmp_path: Path) -> None:
    good = json.dumps([make_row()], indent=2)
    damaged = tmp_path / "damaged.json"
    for text in (good[:300], good.replace('"', "", 1), "", "\0" * 20):
        damaged.write_text(text)
        with pytest.raises(UserError) as caught:
            read_results(damaged)
        assert str(caught.value).startswith(f"{damaged}: ") and "\n" not in str(caught.value)
    for matrix in ([1, 2], [[1, 2, 3], [4, 5, 6]], 5):
        with pytest.raises(UserError, match="cannot be read"):
            read_results(write(damaged, [make_row(confusion_matrix=matrix)]))
