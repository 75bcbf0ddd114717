"""Tests of report_positions.py: lost positions of the lab's runs and of ours."""

from pathlib import Path

import pytest
from made_runs import make_run, make_study

import report_positions
from report_runs import Run
from table import LAB


def make_long(run: Run) -> None:
    """Turn a run into one by the lab's protocol, of 15 epochs."""
    run.profile = "full"
    run.config.update(report_positions.PROTOCOL)
    run.history += [run.history[-1]] * 13


def test_striped_runs_are_shown_with_their_siblings(tmp_path: Path) -> None:
    runs = [make_run("tuned", 0, 0.985), make_run("tuned", 1, 0.865), make_run("initial", 0, 0.9)]
    runs[1].test["lost_positions"] = {"triangle": 2}
    study = make_study(runs, tmp_path)
    text = report_positions.details_seeds(study)
    assert "Of all 3 tested runs, of every model, 1 has striped masks. The table shows" in text
    assert "| `tuned`, seed 1 | 0.8650 | triangle 2/4 |" in text
    assert "| `tuned`, seed 0 | 0.9850 | – |" in text and "| `initial`" not in text
    text = report_positions.answer_seeds(study).text
    assert text.startswith("By luck: some lose a class") and "from 0.8650 to 0.9850" in text
    runs[1].test["lost_positions"] = {}
    runs[0].test["lost_positions"] = {"square": 1}  # the better run lost one: not the cause
    text = report_positions.answer_seeds(make_study(runs, tmp_path)).text
    assert text.startswith("2 runs of `tuned`, of one config but for the seed, score from 0.8650")


def test_the_labs_low_scores_are_lost_positions() -> None:
    # From the table of the lab's published IoU: 1/16 less for each position, from 0.99.
    for name, lost in report_positions.lab_runs().items():
        assert lost == round((0.99 - LAB["test_iou"][name]) * 16), name
    # One lost position of squares: a quarter of their pixels becomes background.
    points = report_positions.expected_points()
    assert len(points) == 20  # 1 + 3 + 6 + 10 ways to lose 0, 1, 2 or 3
    square = 0.0386 / 4
    background = 1 - 0.0386 - 0.0437 - 0.0577
    drop = (1 / 4 + square / (background + square)) / 4
    assert any(
        loss == pytest.approx(0.0024 + square) and iou == pytest.approx(0.9878 - drop)
        for loss, iou in points
    )


def test_lost_positions_are_counted_with_and_without_augmentation(
    tmp_path: Path, no_drawing: None
) -> None:
    runs = [make_run("tuned", seed, 0.985, horizontal_flip=0.7) for seed in (0, 1)]
    runs.append(make_run("augment/no-augmentation", 0, 0.98))
    runs.append(make_run("augment/flip-0.3", 0, 0.99))
    runs.append(make_run("tune/width-half", 0, 0.2))
    runs.append(make_run("tuned-drop-last", 0, 0.2))
    runs.append(make_run("initial", 0, 0.98))
    for run in runs:
        make_long(run)
    runs[3].config["loss"] = runs[6].config["loss"] = {"cross_entropy": 1.0}
    runs[5].config["last_batch"] = "drop"
    runs[1].test["lost_positions"] = {"square": 2, "triangle": 3, "circle": 4}
    text = report_positions.section_seeds(make_study(runs, tmp_path))
    assert "| our runs by its protocol, with augmentation | 2 | 1 | 0 | 0 | 0 | 1 |" in text
    assert "| our runs by its protocol, without augmentation | 1 | 1 | 0 | 0 | 0 | 0 |" in text
    assert (
        "0 of 1 runs without any augmentation lost positions. With augmentation 1 of 2 runs" in text
    )
    assert "lowest run was `flip-0.3`, 0.8008. Our run of it scores 0.9900." in text
    assert "`tuned`, seed 1 lost 9 positions, more than any run of the lab." in text
    assert "2 runs of `tuned` have one config but for the seed. They lost 0, 9 positions" in text
    assert (tmp_path / "lost-positions.png").exists()
    assert "in part" not in text
    assert "But 3 runs are not 3 separate tries." in text  # the others have another protocol
    assert "| 0 | 0 of 1 runs | 0 of 1 runs |\n| 1 | – | 1 of 1 runs |" in text
    assert "separate tries" not in report_positions.section_seeds(
        make_study([run for run in runs if run.seed == 0], tmp_path)
    )
    runs[1].test["lost_positions"] = {"square": 2.5}
    text = report_positions.section_seeds(make_study(runs, tmp_path))
    assert "| our runs by its protocol, with augmentation | 2 | 1 | 0 | 0 | 1 | 0 |" in text
    assert "4×4 pixels. `tuned`, seed 1 lost the square at 10 of 16. Where" in text
    runs.append(make_run("augment/flip-blur-0.3", 0, 0.97))
    text = report_positions.section_seeds(make_study(runs, tmp_path))
    assert "one position each. Ours score `flip-blur-0.3` 0.9700. These are too few" in text
