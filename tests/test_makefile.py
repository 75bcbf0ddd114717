"""The Makefile: set-up that fails with one clear line, help, and what makes a run stale."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from files import lock_run

ROOT = Path(__file__).parent.parent


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what make reads, with no environment of its own yet."""
    for name in ("Makefile", "requirements.txt", "config.py", "errors.py", "files.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    return tmp_path


def make(project: Path, *args: str) -> subprocess.CompletedProcess:
    # Not what the make that runs the tests was told.
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS")}
    command = ["make", *args]
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=60)


def fake_python(project: Path, fails_on: str) -> str:
    """A Python that fails on commands that mention a word and does nothing else."""
    path = project / "fake-python"
    path.write_text(f'#!/bin/sh\ncase "$*" in *{fails_on}*) exit 1;; esac\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("fails_on", "says"), [("version_info", "older than 3.10"), ("ensurepip", "no venv module")]
)
def test_unfit_python_gets_one_line(project: Path, fails_on: str, says: str) -> None:
    done = make(project, "setup", f"PYTHON={fake_python(project, fails_on)}")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2
    assert len(errors) == 1 and says in errors[0]
    assert not (project / ".venv").exists()


def test_help_lists_every_target(project: Path) -> None:
    text = (project / "Makefile").read_text().replace("\\\n", " ")
    [phony] = [line for line in text.splitlines() if line.startswith(".PHONY:")]
    targets = [word for word in phony.split()[1:] if word.isalpha() and word != "FORCE"]
    done = make(project)
    assert {"report", "augment", "test"} < set(targets)
    assert [t for t in targets if f"\n  {t} " not in done.stdout] == []


@pytest.mark.parametrize(
    ("setting", "says"),
    [("DATA=cats", "generated"), ("DATA=no.yaml", "a file NAME.yaml"), ("PROFILE=x", "quick")],
)
def test_unknown_setting_is_refused(project: Path, setting: str, says: str) -> None:
    done = make(project, "report", setting)
    assert done.returncode == 2 and setting in done.stderr and says in done.stderr


def install(project: Path) -> None:
    """An environment that is the one the tests run in."""
    (project / ".venv" / "bin").mkdir(parents=True)
    python = project / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (project / ".venv" / "installed").touch()


def test_own_data_win_over_profile_and_experiment(project: Path) -> None:
    install(project)
    (project / "mine.yaml").write_text(
        "data: my/folder\ncrop: 77\ngroup: ''\nimages: 'a/*.png'\nmasks: 'b/*.png'\n"
    )
    target = "runs/mine/quick/tuned/seed0/config.yaml"
    assert make(project, target, "DATA=mine.yaml").returncode == 0
    config = (project / target).read_text().splitlines()
    for line in ("data: my/folder", "crop: 77", "epochs: 3", "name: tuned", "published_iou: null"):
        assert line in config, line


@pytest.mark.parametrize("target", ["predict", "doctor"])
def test_what_needs_a_name_says_so(project: Path, target: str) -> None:
    install(project)
    done = make(project, target)
    assert done.returncode == 2 and f"make {target} " in done.stderr


def test_settings_of_a_run_that_trains_stay(project: Path) -> None:
    """Else its results would be filed under the settings of the make that was refused."""
    install(project)
    run = project / "runs/generated/quick/tuned/seed0"
    target = str((run / "config.yaml").relative_to(project))
    assert make(project, target).returncode == 0
    (run / "last.pt").touch()
    before = (run / "config.yaml").read_bytes()
    with lock_run(run):
        done = make(project, target, "SET=epochs=9")
        assert done.returncode == 2 and "another process works here" in done.stderr
        assert make(project, target).returncode == 0  # nothing to write
    assert (run / "config.yaml").read_bytes() == before and (run / "last.pt").exists()


def test_only_a_changed_value_discards_a_run(project: Path) -> None:
    install(project)
    run = project / "runs/generated/quick/tuned/seed3"
    target = str((run / "config.yaml").relative_to(project))

    def remake() -> bool:
        """Make the config again; True if the run it described was kept."""
        assert make(project, target).returncode == 0
        return (run / "last.pt").exists()

    remake()
    assert "seed: 3" in (run / "config.yaml").read_text()
    (run / "last.pt").touch()
    written = (run / "config.yaml").stat().st_mtime_ns
    config = project / "configs" / "tuned.yaml"
    config.write_text(config.read_text() + "# a comment\n")
    assert remake()
    assert (run / "config.yaml").stat().st_mtime_ns == written  # nothing is trained again
    # Another device does not start a run over: an unfinished one goes on there, a finished stays.
    assert make(project, target, "DEVICE=cpu").returncode == 0
    assert (run / "last.pt").exists() and "device: cpu" in (run / "config.yaml").read_text()
    (run / "summary.json").touch()
    assert remake() and "device: cpu" in (run / "config.yaml").read_text()
    config.write_text(config.read_text() + "dropout: 0.25\n")
    assert not remake()
    assert "dropout: 0.25" in (run / "config.yaml").read_text()
