"""The Makefile: set-up that fails with one clear line, help, and what makes a run stale."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common import ROOT


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Copy what make reads, with an environment that is the one the tests run in."""
    for name in ("Makefile", "requirements.txt", "config.py", "common.py", "patterns.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/stamp.py", tmp_path / "tools")
    (tmp_path / "data/generated").mkdir(parents=True)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / ".venv/installed").touch()
    return tmp_path


def make(project: Path, *args: str) -> subprocess.CompletedProcess:
    # Not what the make that runs the tests was told.
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS")}
    command = ["make", *args]
    return subprocess.run(
        command, cwd=project, env=env, capture_output=True, text=True, timeout=600
    )


def test_unfit_python_gets_one_line(project: Path) -> None:
    shutil.rmtree(project / ".venv")
    done = make(project, "setup", "PYTHON=false")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2
    assert len(errors) == 1 and "Python 3.10 or newer" in errors[0]
    assert not (project / ".venv").exists()


def test_paths_may_have_spaces_and_brackets(project: Path) -> None:
    done = make(project, "-n", "predict", "IMAGES=a.png", "OUT=my results", "CHECKPOINT=my (1).pt")
    assert "--checkpoint 'my (1).pt' --out 'my results' " in done.stdout
    done = make(project, "-n", "data", "DATA=afo", "AFO_ARCHIVE=my (1).zip")
    assert "--archive 'my (1).zip'" in done.stdout


def test_help_lists_every_target(project: Path) -> None:
    text = (project / "Makefile").read_text().replace("\\\n", " ")
    [phony] = [line for line in text.splitlines() if line.startswith(".PHONY:")]
    targets = [word for word in phony.split()[1:] if word.isalpha() and word != "FORCE"]
    done = make(project)
    assert {"report", "augment", "test"} < set(targets)
    assert [t for t in targets if f"\n  {t} " not in done.stdout] == []


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("DATA=cats", "generated"),
        ("DATA=no.yaml", "a file NAME.yaml"),
        ("DATA=my afo.yaml", "without spaces"),
        ("DATA=./afo.yaml", "another name"),
        ("PROFILE=x", "quick"),
        ("RUNS=", "one name"),
        ("RUNS=my runs", "without spaces"),
        ("SEEDS=", "not be empty"),
        ("OUT=", "not be empty"),
        ("OVERWRITE=yes", "must be 1"),
        ("SET=epochs=3 # try", "begins with #"),
    ],
)
def test_unknown_setting_is_refused(project: Path, setting: str, says: str) -> None:
    (project / "afo.yaml").touch()
    done = make(project, "report", setting)
    assert done.returncode == 2 and setting in done.stderr and says in done.stderr


@pytest.mark.parametrize(
    ("profile", "of_tuned"), [("quick", "no-augmentation"), ("full", "horizontal-flip-0.7")]
)
def test_augmentation_that_tuned_has_is_not_trained(
    project: Path, profile: str, of_tuned: str
) -> None:
    done = make(project, "augment", "-n", f"PROFILE={profile}")
    configs = {path.stem for path in (project / "configs/augment").glob("*.yaml")}
    trained = {name for name in configs if f"configs/augment/{name}.yaml" in done.stdout}
    assert trained == configs - {of_tuned}


def test_report_comes_last_and_repeats_the_variables(project: Path) -> None:
    for name in ("data.py", "evaluate.py", "metrics.py", "report.py"):
        (project / name).touch()
    settings = ["PROFILE=full", "RUNS=runs/mine"]
    done = make(project, "-n", "report", "train-tuned-drop-last", *settings)
    assert done.stdout.index("runs/mine/tuned-drop-last/seed0") < done.stdout.index("report.py")
    assert "--variables 'PROFILE=full RUNS=runs/mine'" in done.stdout
    assert "--variables ''" in make(project, "-n", "report").stdout
    done = make(project, "-n", "report", "SET='loss={cross_entropy: 1}' dropout=0.1")
    [command] = [line for line in done.stdout.splitlines() if "report.py" in line]
    assert shlex.split(command)[-1] == "SET=\"'loss={cross_entropy: 1}' dropout=0.1\""


FAKE_TRAINING = """
import pathlib, shutil, sys
def after(name): return pathlib.Path(sys.argv[sys.argv.index(name) + 1])
run = after("--run-dir")
run.mkdir(exist_ok=True)
shutil.copy(after("--config"), run / "config.yaml")
(run / "summary.json").write_text("{}")
print("trained", sys.argv)
"""


def trains(project: Path, *args: str) -> bool:
    """Make a run with a train.py that trains nothing; True if make called it."""
    (project / "train.py").write_text(FAKE_TRAINING)
    done = make(project, "runs/generated/quick/tuned/seed3/summary.json", *args)
    assert done.returncode == 0, done.stderr
    return "trained" in done.stdout


def test_only_a_changed_value_trains_again(project: Path) -> None:
    assert trains(project)
    config = project / "runs/generated/quick/tuned/seed3/config.yaml"
    lines = config.read_text().splitlines()
    for line in ("name: tuned", "seed: 3", "profile: quick", "data: data/generated", "epochs: 3"):
        assert line in lines, line
    assert not trains(project)
    experiment = project / "configs/tuned.yaml"
    experiment.write_text(experiment.read_text() + "# a comment\n")
    assert not trains(project) and not trains(project, "DEVICE=cpu")
    experiment.write_text(experiment.read_text() + "dropout: 0.25\n")
    assert trains(project) and "dropout: 0.25" in config.read_text()
    assert trains(project, "SET=epochs=9") and not trains(project, "SET=epochs=9")
    assert trains(project)  # the config without SET is another one


FAKE_TEST = """
import pathlib, sys
pathlib.Path(sys.argv[sys.argv.index("--json") + 1]).write_text("[]")
with open("tests.log", "a") as log: log.write("tested\\n")
"""


def test_newer_code_of_tests_tests_again_on_real_images(project: Path) -> None:
    (project / "data/afo").mkdir()
    (project / "train.py").write_text(FAKE_TRAINING)
    (project / "evaluate.py").write_text(FAKE_TEST)
    (project / "metrics.py").touch()
    target = "runs/generated/quick/tuned/seed3/on-afo.json"
    for expected in ("tested\n", "tested\n"):  # the second time nothing is left to do
        assert make(project, target).returncode == 0
        assert (project / "tests.log").read_text() == expected
    later = (project / target).stat().st_mtime + 10
    os.utime(project / "metrics.py", (later, later))
    make(project, target)
    assert (project / "tests.log").read_text() == "tested\ntested\n"


def test_changed_data_train_again(project: Path) -> None:
    photos = project / "data/generated/training/image"
    photos.mkdir(parents=True)
    (photos / "a.png").write_bytes(b"first")
    assert trains(project) and not trains(project)
    (photos / "a.png").write_bytes(b"other")  # in place, of the same size
    assert trains(project) and not trains(project)
    (photos / "b.png").write_bytes(b"new")
    assert trains(project) and not trains(project)
    # Files that are no images of the data, as results of runs in the same folder.
    (project / "data/generated/training/metrics.jsonl").write_bytes(b"{}")
    (photos / "gone.txt").symlink_to("nowhere")
    (photos / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"a name of an old disk")
    assert not trains(project)


def test_data_that_set_names_are_watched(project: Path) -> None:
    setting = "SET=masks=training/m2/*.png"
    masks = project / "data/generated/training/m2"
    masks.mkdir(parents=True)
    (masks / "a.png").write_bytes(b"first")
    assert trains(project, setting) and not trains(project, setting)
    (masks / "a.png").write_bytes(b"other")
    assert trains(project, setting)


def test_another_order_of_the_classes_trains_again(project: Path) -> None:
    with (project / "configs/tuned.yaml").open("a") as file:
        file.write("classes: {a: [0, 0, 0], b: [1, 1, 1], c: [2, 2, 2]}\n")
    assert trains(project) and not trains(project)
    text = (project / "configs/tuned.yaml").read_text()
    swapped = text.replace("b: [1, 1, 1], c: [2, 2, 2]", "c: [2, 2, 2], b: [1, 1, 1]")
    (project / "configs/tuned.yaml").write_text(swapped)
    assert trains(project)


def test_own_data_win_over_profile_and_experiment(project: Path) -> None:
    (project / "train.py").write_text(FAKE_TRAINING)
    (project / "my/folder").mkdir(parents=True)
    (project / "mine.yaml").write_text(
        "data: my/folder\ncrop: 77\ngroup: ''\nimages: 'a/*.png'\nmasks: 'b/*.png'\nname: x\n"
    )
    target = "runs/mine/quick/augment/flip-0.3/seed0/summary.json"
    done = make(project, target, "DATA=mine.yaml")
    assert done.returncode == 0
    assert "mine.yaml overrides crop: 48 of configs/quick.yaml" in done.stderr
    config = (project / target).with_name("config.yaml").read_text().splitlines()
    for line in ("data: my/folder", "crop: 77", "epochs: 3", "name: flip-0.3"):
        assert line in config, line


def test_experiment_that_names_its_data_keeps_them(project: Path) -> None:
    (project / "train.py").write_text(FAKE_TRAINING)
    (project / "data/afo").mkdir()
    (project / "configs/mine.yaml").write_text("base: tuned.yaml\ndata: data/generated\n")
    target = "runs/afo/quick/mine/seed0/summary.json"
    assert make(project, target, "DATA=afo").returncode == 0
    lines = (project / target).with_name("config.yaml").read_text().splitlines()
    assert "data: data/generated" in lines


def test_only_overwrite_discards_a_run(project: Path) -> None:
    (project / "train.py").write_text(FAKE_TRAINING)
    target = "runs/generated/quick/tuned/seed0/summary.json"
    first = make(project, target).stdout
    assert "--resume" in first and "--overwrite" not in first
    assert "trained" not in make(project, target).stdout
    assert "trained" not in make(project, target, "OVERWRITE=0").stdout
    again = make(project, target, "OVERWRITE=1").stdout
    assert "--overwrite" in again and "--resume" not in again


def test_clean_keeps_runs(project: Path) -> None:
    for folder in ("runs/generated", "report", "data/afo"):
        (project / folder).mkdir(parents=True)
    assert make(project, "clean").returncode == 0
    left = {path.relative_to(project).as_posix() for path in project.glob("*/*")}
    assert {"runs/generated", "data/afo"} <= left and not (project / "report").exists()
    assert make(project, "clean-runs").returncode == 0
    assert not (project / "runs").exists()


def test_check_and_bench_of_own_data(project: Path) -> None:
    (project / "my.yaml").write_text("data: photos\n")
    done = make(project, "check", "-n", "DATA=./my.yaml", "SET=crop=32")
    line = "data.py check --config my.yaml --picture report/check-my.png --set crop=32"
    assert line in done.stdout
    done = make(project, "bench", "DATA=my.yaml")
    assert done.returncode == 2 and "DATA=my.yaml: make bench takes generated or afo" in done.stderr


def test_doctor_without_a_run_says_so(project: Path) -> None:
    done = make(project, "doctor")
    assert done.returncode == 2 and "make doctor RUN=" in done.stderr


def test_an_old_name_says_the_new_one(project: Path) -> None:
    done = make(project, "scenes")
    assert done.returncode == 2 and "make scenes: its name is now make weights" in done.stderr
