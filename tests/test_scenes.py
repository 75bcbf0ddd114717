"""Tests of tools/scenes.py: the table of stored tests, by hand, and what cannot share it."""

import json
import statistics
from pathlib import Path

import pytest
from conftest import write_checkpoint

from evaluate import main as evaluate
from tools import scenes


@pytest.fixture
def runs(dataset: Path, tmp_path: Path, call) -> Path:
    for name, seed in [("real-9", 0), ("real-9", 1), ("generated-300", 0), ("generated-300", 1)]:
        path = write_checkpoint(tmp_path / name / f"seed{seed}", dataset, name, seed)
        for file in scenes.TESTS:
            assert call(evaluate, path, "--json", path.with_name(file))[0] == 0
    write_checkpoint(tmp_path / "both-1/seed0", dataset, "both-1", 0)  # not tested yet
    return tmp_path


def test_table_has_mean_and_deviation_of_each_training_set(runs: Path, call) -> None:
    code, text, _ = call(scenes.main, runs)
    heading, *lines = text.splitlines()
    assert code == 0 and heading.split("  ")[0] == "trained on" and (runs / "scenes.png").exists()
    assert [line.split()[0] for line in lines] == ["real-9", "generated-300"]  # the fewest first
    rows = [json.loads((runs / f"real-9/seed{s}/on-afo.json").read_text())[0] for s in (0, 1)]
    ious = [row["mean_iou"] for row in rows]
    assert f"{statistics.fmean(ious):.4f} ± {statistics.stdev(ious):.4f}" in lines[0]


def test_other_tests_are_refused_and_nothing_is_no_table(runs: Path, call, tmp_path: Path) -> None:
    path = runs / "real-9/seed1/on-scenes.json"
    [row] = json.loads(path.read_text())
    path.write_text(json.dumps([row | {"digest": "another"}]))
    code, _, error = call(scenes.main, runs)
    assert code == 2 and "real-9/seed1: tested on another digest" in error
    code, _, error = call(scenes.main, tmp_path / "real-9")
    assert code == 2 and "holds no tested run" in error
