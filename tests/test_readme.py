"""What README and docs say can be done, done: commands, YAML, the worked example."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny
from PIL import Image
from test_train import train_tiny

import data
import predict
from common import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def commands() -> list[str]:
    """List every command that the pages show, in blocks and within the text."""
    lines = "\n".join(blocks("sh")).splitlines()
    lines += [line.strip() for line in TEXT.splitlines() if line.startswith("    python ")]
    inline = re.findall(
        r"`((?:make|python|torchrun) [^`]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.S)
    )
    found = [re.sub(r"\s+#.*", "", line).strip() for line in [*lines, *inline]]
    return sorted({command for command in found if command})


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """Copy the project as a user has it, with data and the environment of the tests."""
    root = tmp_path_factory.mktemp("project")
    for path in ROOT.iterdir():
        if path.name in ("configs", "docs", "weights", "tests", "tools"):
            shutil.copytree(path, root / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.suffix in (".py", ".md", ".txt") or path.name == "Makefile":
            shutil.copy(path, root)
    (root / ".venv/bin").mkdir(parents=True)
    python = root / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (root / ".venv/installed").touch()
    for name in ("data/afo", "data/generated"):
        shutil.copytree(dataset, root / name)
    rng = np.random.default_rng(0)
    for i in range(8):
        for folder, suffix in (("photos", "jpg"), ("labels", "png")):
            path = root / f"data/pond/{folder}/day{i}_{i:03}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.kron(rng.integers(0, 2, (3, 4)), np.ones((8 + i, 8))).astype(np.uint8)
            Image.fromarray(pixels * 255).save(path)
    [own] = [block for block in blocks("yaml") if "data: data/pond" in block]
    for name in ("my.yaml", "other.yaml", "camvid.yaml", "membrane.yaml"):
        (root / name).write_text(own)
    Image.new("RGB", (16, 16)).save(root / "my photo (1).jpg")
    return root


def start(root: Path, *command: object) -> subprocess.CompletedProcess:
    """Start a command in a folder, as in a fresh terminal."""
    hidden = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS")
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    options = {"cwd": root, "env": env, "capture_output": True, "text": True, "timeout": 600}
    return subprocess.run(list(map(str, command)), **options)


def run(root: Path, *command: object) -> subprocess.CompletedProcess:
    """Start a command that has to succeed."""
    done = start(root, *command)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.parametrize("command", [c for c in commands() if re.match(r"(OMP_\S+ )?make ", c)])
def test_make_command_is_one(copy: Path, command: str) -> None:
    """Targets and variables exist; what they run is run by the other tests and by CI."""
    words = [word for word in shlex.split(command) if not word.startswith(("OMP_", "-"))]
    settings = [word for word in words if "=" in word]
    targets = [word for word in words if "=" not in word and word != "make"]
    makefile = (copy / "Makefile").read_text()
    known = set(re.findall(r"^([A-Z_]+)\s+\?=", makefile, re.M))
    [without_value] = re.findall(r"^# Variables without a value here: (.*)\.$", makefile, re.M)
    known.update(without_value.split(", "))
    assert {setting.split("=")[0] for setting in settings} <= known
    targets = [target for target in targets if target != "train-mine"]  # it is made below
    run(copy, "make", "-n", *(targets or ["help"]), *settings)


def is_short_and_ours(command: str) -> bool:
    """Leave out torchrun and --export, which have tests of their own, and the script of labelme."""
    if re.match(r"python \S+\.py ", command) is None:
        return False
    return "--export" not in command and "labelme2voc.py" not in command


@pytest.mark.parametrize("command", [c for c in commands() if is_short_and_ours(c)])
def test_python_command_runs(copy: Path, command: str, call, monkeypatch) -> None:
    monkeypatch.chdir(copy)  # in this process: a start of Python takes longer than most commands
    _, script, *words = shlex.split(command)
    if script == "train.py":  # what makes it small; --set comes last
        words += tiny("data/afo", epochs=1, crop=0, skip="pooled")
    code, _, error = call(importlib.import_module(script.removesuffix(".py")).main, *words)
    assert code == 0, error


def test_python_lines_run(copy: Path, monkeypatch) -> None:
    [lines] = [block for block in blocks("python") if "predict_mask" in block]
    monkeypatch.chdir(copy)
    exec(lines, found := {})
    assert found["mask"].shape == (128, 128) and 1 < len(found["mask"].unique()) <= 4


def test_own_data_from_check_to_prediction(copy: Path, call, monkeypatch) -> None:
    monkeypatch.chdir(copy)
    code, out, _ = call(data.main, "check", "--config", "my.yaml", "--picture", "look.png")
    assert code == 0 and "problem" not in out and (copy / "look.png").exists()
    size = "images_per_epoch=8 batch_size=4 epochs=1"
    done = run(copy, "make", "train-best", "DATA=my.yaml", f"SET={size}")
    assert "water only" in done.stdout
    best = "runs/my/quick/best/seed0/best.pt"
    assert call(predict.main, "data/pond/photos", "--checkpoint", best)[0] == 0
    assert len(list((copy / "predictions").glob("day*_mask.png"))) == 8


def test_worked_example(copy: Path) -> None:
    [patch] = blocks("diff")
    mine = copy / "example"
    shutil.copytree(copy, mine, ignore=shutil.ignore_patterns("example", "runs"))
    (mine / "example.patch").write_text(patch)
    run(mine, "git", "apply", "example.patch")
    [config] = [block for block in blocks("yaml") if block.startswith("base: tuned.yaml")]
    (mine / "configs/mine.yaml").write_text(config)
    run(mine, "make", "-n", "train-mine", "DATA=afo")
    files = ("--config", "configs/mine.yaml", "configs/quick.yaml", "--run-dir", "runs/mine")
    size = ("data=data/afo", "images_per_epoch=16", "batch_size=8", "epochs=1")
    done = run(mine, sys.executable, "train.py", *files, "--set", *size)
    assert "mine epoch 1/1" in done.stdout
    resolved = (mine / "runs/mine/config.yaml").read_text()
    assert "focal: 1.0" in resolved and "grey: 0.2" in resolved and "[128, 5]" in resolved
    # The example's loss is the one of its source: (1 − p)² times the cross-entropy.
    patched = importlib.util.spec_from_file_location("patched_losses", mine / "losses.py")
    losses = importlib.util.module_from_spec(patched)
    patched.loader.exec_module(losses)
    logits = torch.randn(2, 3, 4, 4)
    mask = torch.randint(0, 3, (2, 4, 4))
    p = logits.softmax(dim=1).gather(1, mask[:, None])
    expected = -((1 - p) ** 2 * p.log()).mean()
    torch.testing.assert_close(losses.focal(logits, mask), expected)


def test_mistake_in_edited_code_keeps_its_traceback(copy: Path, dataset: Path) -> None:
    mine = copy / "mistake"
    shutil.copytree(copy, mine, ignore=shutil.ignore_patterns("example", "runs"))
    text = (mine / "model.py").read_text()
    line, instead = "        skips = []\n", "        skips = [images @ images[0, 0, :5]]\n"
    assert text.count(line) == 1
    (mine / "model.py").write_text(text.replace(line, instead))
    old_run = mine / "runs/afo/quick/tuned/seed0"
    train_tiny(dataset, old_run, epochs=1)
    done = start(mine, "make", "train-tuned", "DATA=afo", "OVERWRITE=1")
    number = 1 + (mine / "model.py").read_text().splitlines().index(instead.rstrip("\n"))
    assert done.returncode == 2 and "Traceback" in done.stderr
    assert f'model.py", line {number}' in done.stderr
    assert (old_run / "best.pt").exists()  # the old run is lost only after a batch has worked
