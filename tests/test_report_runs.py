"""Tests of report_runs.py: which runs share a table, and that each published run is in one."""

from pathlib import Path

import pytest
from made_runs import make_run, make_study

import report_page
from common import UserError
from report_published import read_published


def test_only_best_may_see_another_number_of_images(tmp_path: Path) -> None:
    runs = [make_run("initial", seed, 0.8) for seed in (0, 1)]
    runs.append(make_run("best", 0, 0.9, seen=500))
    runs.append(make_run("best", 1, 0.9, seen=600))  # unlike the other run of best
    runs.append(make_run("tuned", 0, 0.8, seen=30))
    study = make_study(runs, tmp_path)
    assert {name: len(members) for name, members in study.models.items()} == {
        "initial": 2,
        "best": 1,
    }
    assert set(study.others) == {"tuned", "best"} and not study.left_out


def test_unlike_data_are_named_and_left_out(tmp_path: Path) -> None:
    other = make_run("tuned", 1, 0.8)
    other.test["digest"] = "of other images"
    runs = [make_run("initial", 0, 0.8), make_run("tuned", 0, 0.8), other]
    runs.append(make_run("tune/width-half", 0, 0.7, seen=7))  # a setting has no test of its own
    study = make_study(runs, tmp_path)
    assert study.left_out == [
        "`tuned`, seed 1, differs from the other runs in test images.",
        "`tune/width-half`, seed 0, saw another number of images than its table.",
    ]
    assert [run.seed for run in study.models["tuned"]] == [0] and not study.others


def test_settings_are_those_of_make(tmp_path: Path) -> None:
    study = make_study([make_run("tuned", 0, 0.8)], tmp_path)
    assert study.settings == " DATA=afo"
    study.data, study.profile = "my", "full"
    assert study.settings == " DATA=my.yaml PROFILE=full"
    study.data = "configs-data-scenes"
    assert study.settings == " DATA=configs/data/scenes.yaml PROFILE=full"
    study.data, study.profile = "generated", "quick"
    assert study.settings == ""
    study.variables = "DATA=configs/data/scenes.yaml RUNS=runs/mine"  # make was called with these
    assert study.settings == " DATA=configs/data/scenes.yaml RUNS=runs/mine"


def test_seeds_of_another_config_are_named_and_left_out(tmp_path: Path) -> None:
    runs = [make_run("tuned", seed, 0.8) for seed in (0, 1, 2)]
    runs[1].config.update(dropout=0.5, seed=1, data="elsewhere/afo", precision="float32")
    runs[2].config.update(batch_size=20, blur=0.5)
    study = make_study(runs, tmp_path)
    assert study.left_out == [
        "`tuned`, seed 2, has another config than other runs of `tuned`: batch_size, blur."
    ]
    # Seed 0 lacks `dropout`, as runs of older code lack newer keys.
    assert [run.seed for run in study.models["tuned"]] == [0, 1]
    assert [run.seed for run in study.all_runs] == [0, 1]


def test_of_seeds_with_three_configs_the_first_counts(tmp_path: Path) -> None:
    runs = [make_run("tuned", seed, 0.8, dropout=0.0, crop=0) for seed in (0, 1, 2)]
    for run, key in zip(runs, ("dropout", "crop", "batch_size"), strict=True):
        run.config[key] = 7
    study = make_study(runs, tmp_path)
    assert [run.seed for run in study.all_runs] == [0]
    assert study.left_out[0].endswith("other runs of `tuned`: dropout, crop.")


def test_sentences_compare_runs_of_one_length(tmp_path: Path) -> None:
    runs = [make_run("tuned", 0, 0.8), make_run("initial", 0, 0.8), make_run("best", 0, 0.9)]
    runs.append(make_run("modified", 0, 0.7, seen=7))
    study = make_study(runs, tmp_path)
    assert set(study.others) == {"modified"} and "modified" not in study.runs
    assert len(study.all_runs) == 4


def test_a_model_tested_on_other_data_alone_is_left_out(tmp_path: Path) -> None:
    runs = [make_run("tuned", 0, 0.8), make_run("best", 0, 0.9)]
    runs[1].on_afo, runs[1].test = runs[1].test, None
    study = make_study(runs, tmp_path)
    assert study.left_out == ["`best`, seed 0, was not tested on its own data."]
    assert list(study.models) == ["tuned"]
    with pytest.raises(UserError, match=r"no testing\.json"):
        make_study(runs[1:], tmp_path)


def test_every_published_run_is_in_a_table(tmp_path: Path) -> None:
    for data, profile in report_page.STUDIES:
        runs = [run for run in read_published() if (run.data, run.profile) == (data, profile)]
        if not runs:
            continue
        study = make_study(runs, tmp_path)
        shown = []
        tables = [study.models, study.augment, study.tune, study.heads, study.overfit]
        for table in (*tables, study.others):
            shown += [id(run) for members in table.values() for run in members]
        assert study.left_out == [] and set(shown) == {id(run) for run in runs}
