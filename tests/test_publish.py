"""Tests of tools/publish.py and of results/runs.jsonl: lines that are added, replaced, damaged."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from made_runs import make_run

from common import UserError
from report_published import PUBLISHED, from_line, read_published, to_line
from tools import publish


def test_a_line_holds_a_run() -> None:
    run = make_run("augment/flip-0.3", 2, 0.98765432198)
    found = from_line(to_line(run))
    assert found.test["mean_iou"] == 0.98765432
    run.test = found.test
    assert found.config == run.config and found.machine == run.machine
    assert [found.experiment, found.data, found.profile, found.seed, found.folder] == [
        "augment/flip-0.3",
        "afo",
        "quick",
        2,
        None,
    ]
    assert found.history[1]["validation"]["mean_iou"] == pytest.approx(0.98765432)


def test_what_a_run_lacks_may_be_missing() -> None:
    found = from_line('{"data": "scenes", "profile": "full", "experiment": "weights", "seed": 0}')
    assert found.test is None and found.history == [] and found.machine == {}


def test_runs_are_added_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs.jsonl"
    old = make_run("tuned", 0, 0.5)
    elsewhere = dataclasses.replace(old, profile="full")
    path.write_text(to_line(old) + "\n" + to_line(elsewhere) + "\n")
    new = [make_run("tuned", 0, 0.9), make_run("best", 1, 0.8)]
    monkeypatch.setattr(publish, "find_runs", lambda root: (new, ["unfinished"]))
    assert publish.publish(Path("runs/afo/quick"), path) == (new, ["unfinished"])
    found = [(run.profile, run.experiment, run.test["mean_iou"]) for run in read_published(path)]
    assert found == [("full", "tuned", 0.5), ("quick", "best", 0.8), ("quick", "tuned", 0.9)]


def test_seeds_of_another_config_are_refused(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "runs.jsonl"
    old = "".join(to_line(make_run("tuned", seed, 0.5)) + "\n" for seed in (0, 1))
    path.write_text(old)
    new = [make_run("tuned", 1, 0.9, upsampling_init="random", blur=0.5)]
    monkeypatch.setattr(publish, "find_runs", lambda root: (new, []))
    with pytest.raises(UserError, match=r"`tuned`, seed 1, has another config .*: blur\. Publish"):
        publish.publish(Path("runs/random"), path)
    assert path.read_text() == old
    new.append(make_run("tuned", 0, 0.9, upsampling_init="random", blur=0.5))
    publish.publish(Path("runs/random"), path)
    assert [run.config["blur"] for run in read_published(path)] == [0.5, 0.5]


@pytest.mark.parametrize("experiment", ["quick/tuned", "afo/quick/tuned"])
def test_several_profiles_at_once_are_refused(tmp_path: Path, monkeypatch, experiment: str) -> None:
    run = make_run(experiment, 0, 0.5)
    monkeypatch.setattr(publish, "find_runs", lambda root: ([run], []))
    with pytest.raises(UserError, match="several profiles"):
        publish.publish(Path("runs/afo"), tmp_path / "runs.jsonl")


def test_a_folder_without_runs_is_one_line(tmp_path: Path, call: Callable) -> None:
    code, _, error = call(publish.main, "--runs", tmp_path)
    assert code == 2 and error == f"error: {tmp_path}: holds no finished run\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", ["{", "[]", '{"data": "afo"}', '{"unknown": 1}', ""])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(to_line(make_run("tuned", 0, 0.5)) + "\n" + line + "\n")
    with pytest.raises(UserError, match=rf"{path}, line 2: cannot be read"):
        read_published(path)


def test_the_file_is_sorted_and_small() -> None:
    runs = read_published()
    keys = [publish.key_of(run) for run in runs]
    assert keys == sorted(set(keys))
    assert PUBLISHED.read_text() == "".join(to_line(run) + "\n" for run in runs)
    assert PUBLISHED.stat().st_size < 2_000_000
