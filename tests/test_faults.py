"""What interrupts a run, fills its disk, damages its files or comes second, and what is left then.

Checkpoints are compared bit for bit in test_train.py and torture.py; here it is whether a process
ends as it must, with one line, and leaves what the next one can go on from.
"""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from box import CLASSES, ROOT, Box
from conftest import config_for
from PIL import Image

import data as data_module
import files as files_module
import train as train_module
from checkpoint import load_checkpoint, load_last, save_checkpoint
from config import load_config
from data import load_split
from errors import UserError
from files import lock_run, write_atomically

CPU = torch.device("cpu")
TINY = [
    *("encoder=[[4, 3]]", "decoder=[[6, 3]]", "images_per_epoch=8", "batch_size=4", "name=tiny"),
    *("device=cpu", "precision=float32"),
]


def tiny(data: Path, *overrides: str) -> dict:
    return load_config([ROOT / "configs/default.yaml"], [*TINY, f"data={data}", *overrides])


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def start(run_dir: Path, config: dict, *more: str, **limits: object) -> subprocess.Popen:
    """Start train.py as a user does."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    (run_dir.parent / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    command = [sys.executable, "train.py", "--config", run_dir.parent / "config.yaml", *more]
    return subprocess.Popen(
        [*command, "--run-dir", run_dir],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **limits,
    )


def message_of(call: Callable, *args: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    [line] = str(caught.value).splitlines()
    return line


def history(run_dir: Path) -> list[int]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["epoch"] for line in lines]


# ---- signals, and who comes second


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_stops_after_the_step_and_the_run_goes_on_from_there(
    dataset: Path, tmp_path: Path, number: int, code: int
) -> None:
    run_dir, config = tmp_path / "run", tiny(dataset, "epochs=100000")
    process = start(run_dir, config)
    while not (run_dir / "metrics.jsonl").exists():  # in the middle of training
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    if number == signal.SIGTERM:  # in the meantime
        assert "another process" in message_of(lock_run, run_dir)
        second = start(run_dir, config)
        output, error = second.communicate()
        assert (second.returncode, output) == (2, "")
        assert error.startswith(f"error: {run_dir}: another process") and error.count("\n") == 1
        assert process.poll() is None
    process.send_signal(number)
    output, error = process.communicate()
    assert (process.returncode, error) == (code, "")
    [line] = [line for line in output.splitlines() if "stopped after step" in line]
    last = load_last(run_dir, CPU)
    assert f"step {last['step']}; --resume" in line
    assert history(run_dir) == list(range(1, len(last["history"]) + 1))

    original, steps = train_module.train_step, []

    def two_steps(*args: object) -> object:
        steps.append(original(*args))
        if len(steps) == 2:
            signal.raise_signal(signal.SIGTERM)
        return steps[-1]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(train_module, "train_step", two_steps)
        train_module.train(config, run_dir, resume=True)
    assert load_last(run_dir, CPU)["step"] == last["step"] + 2


def test_lock_ends_with_its_process(tmp_path: Path) -> None:
    lock = lock_run(tmp_path)
    assert "another process" in message_of(lock_run, tmp_path)
    lock.close()
    lock_run(tmp_path).close()


# ---- damaged and foreign last.pt


@pytest.fixture
def trained(box: Box) -> tuple[Box, dict]:
    """A run of two epochs, as it is right before its end."""
    config = tiny(box.set, "epochs=2")
    train_module.train(config, box.run, resume=False)
    (box.run / "summary.json").unlink()
    return box, config


def test_damaged_last_falls_back_to_the_one_before(trained: tuple, capsys: object) -> None:
    box, config = trained
    whole = load_checkpoint(box.run / "last.pt", CPU)["model"]
    content = (box.run / "last.pt").read_bytes()
    (box.run / "last.pt").write_bytes(content[:-100])
    assert len(load_checkpoint(box.run / "previous.pt", CPU)["history"]) == 1
    capsys.readouterr()
    train_module.train(config, box.run, resume=True)
    output = capsys.readouterr().out
    assert f"{box.run}/last.pt: damaged" in output
    assert f"falling back to {box.run}/previous.pt" in output
    again = load_checkpoint(box.run / "last.pt", CPU)["model"]
    assert all(torch.equal(again[key], value) for key, value in whole.items())
    assert history(box.run) == [1, 2]

    for name in ("last.pt", "previous.pt"):
        (box.run / name).write_bytes(content[:-100])
    before = {path.name: path.read_bytes() for path in box.run.iterdir()}
    assert "previous.pt: damaged" in message_of(train_module.train, config, box.run, True)
    assert {path.name: path.read_bytes() for path in box.run.iterdir()} == before


def test_killed_between_the_renames_of_a_checkpoint(trained: tuple, capsys: object) -> None:
    """last.pt has become previous.pt and the new one is not there yet: nothing is damaged."""
    box, config = trained
    (box.run / "last.pt").replace(box.run / "previous.pt")
    (box.run / "last.pt.partial").write_bytes(b"cut")
    capsys.readouterr()
    train_module.train(config, box.run, resume=True)
    assert "damaged" not in capsys.readouterr().out
    assert history(box.run) == [1, 2]
    assert (box.run / "summary.json").exists()


@pytest.mark.parametrize("changed", ["config", "data"])
def test_changed_config_or_data_is_refused_naming_it(trained: tuple, changed: str) -> None:
    box, config = trained
    before = (box.run / "last.pt").read_bytes()
    if changed == "config":
        config, named = config | {"dropout": 0.5, "seed": 3}, "another dropout, seed;"
    else:
        Image.fromarray(np.asarray(Image.open(box.image)) // 2).save(box.image)
        named = "another data (its files);"
    assert named in message_of(train_module.train, config, box.run, True)
    assert history(box.run) == [1, 2] and (box.run / "last.pt").read_bytes() == before


# ---- a loss that is no number


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_loss_stops_and_keeps_the_last_good_checkpoint(
    box: Box, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    original, steps = train_module.weighted_loss, []

    def spoiled(*args: object) -> torch.Tensor:
        steps.append(original(*args))
        return steps[-1] * (bad if len(steps) == 4 else 1)  # the second step of epoch 2

    monkeypatch.setattr(train_module, "weighted_loss", spoiled)
    config = tiny(box.set, "epochs=3")
    message = message_of(train_module.train, config, box.run, False)
    assert str(bad) in message and "step 4 (epoch 2)" in message and "learning_rate" in message
    for name in ("last.pt", "best.pt"):
        weights = load_checkpoint(box.run / name, CPU)["model"].values()
        assert all(torch.isfinite(value).all() for value in weights)
    assert history(box.run) == [1] and len(load_last(box.run, CPU)["history"]) == 1
    assert not list(box.run.glob("*.partial"))


# ---- full disks: no file may grow beyond a limit, which is an error like "no space left"


def limited(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Set the size that files can have in this process, until the test ends."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_while_a_checkpoint_is_written(trained: tuple, small_files: Callable) -> None:
    box, _ = trained
    last = box.run / "last.pt"
    before, good = last.read_bytes(), load_checkpoint(last, CPU)
    for limit in (0, 100, len(before) // 2, len(before) - 1):
        small_files(limit)
        message = message_of(save_checkpoint, last, good, box.run / "previous.pt")
        small_files(resource.RLIM_INFINITY)
        assert message.startswith(f"{last}: cannot be written (")
        assert last.read_bytes() == before and not list(box.run.glob("*.partial"))
    load_checkpoint(box.run / "previous.pt", CPU)


@pytest.mark.parametrize(("width", "name"), [(4, "events.out.tfevents"), (64, "last.pt")])
def test_full_disk_while_training(box: Box, width: int, name: str) -> None:
    """As a user sees it: one line. The largest file of such a run is the one that has no room."""
    config = tiny(box.set, "epochs=1", f"encoder=[[{width}, 3]]")
    train_module.train(config, box.run, resume=False)
    largest = max(path.stat().st_size for path in box.run.glob(f"{name}*"))
    shutil.rmtree(box.run)
    process = start(box.run, config, preexec_fn=limited(largest - 1))
    output, error = process.communicate()
    assert process.returncode == 2, error
    [line] = error.splitlines()
    assert line.startswith(f"error: {box.run / name}") and "cannot be written (" in line
    assert "Traceback" not in output and not list(box.run.glob("*.partial"))


def test_full_disk_while_a_cache_is_written(box: Box, small_files: Callable) -> None:
    for limit in (0, 150, 500):  # within the header, and within the pictures: 2·3·8·8 bytes
        small_files(limit)
        message = message_of(load_split, config_for(box.set, classes=CLASSES), "training")
        small_files(resource.RLIM_INFINITY)
        assert f"{box.set}/.cache/" in message and "cannot be written (" in message
        assert not [path for path in (box.set / ".cache").iterdir() if path.is_dir()]
    assert len(load_split(config_for(box.set, classes=CLASSES), "training").images) == 2


def test_full_disk_while_a_report_is_written(tmp_path: Path, small_files: Callable) -> None:
    path = tmp_path / "testing.json"
    write_atomically(path, b"[1]")
    small_files(10)
    message = message_of(write_atomically, path, b"[1, 2, 3, 4, 5]")
    small_files(resource.RLIM_INFINITY)
    assert message.startswith(f"{path}: cannot be written (")
    assert path.read_bytes() == b"[1]" and list(tmp_path.iterdir()) == [path]


# ---- folders that cannot be written to or read


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_read_only_folders_and_unreadable_files(box: Box) -> None:
    box.run.mkdir()
    box.run.chmod(0o500)
    assert "cannot be written" in message_of(lock_run, box.run)
    assert "cannot be written" in message_of(write_atomically, box.run / "x.json", b"[]")
    assert "cannot be written" in message_of(save_checkpoint, box.run / "x.pt", {})
    box.set.chmod(0o500)
    assert "cannot be written" in message_of(
        load_split, config_for(box.set, classes=CLASSES), "training"
    )
    box.set.chmod(0o700)
    box.image.chmod(0)
    assert f"{box.image}: cannot be read" in message_of(
        load_split, config_for(box.set, classes=CLASSES), "training"
    )


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "run"
    for call, args in (
        (lock_run, (below,)),
        (write_atomically, (below / "x.json", b"[]")),
        (save_checkpoint, (below / "x.pt", {})),
    ):
        assert f"{below}" in message_of(call, *args)


# ---- data that change or go in the meantime


def test_stale_cache_is_never_used(box: Box) -> None:
    before = load_split(config_for(box.set, classes=CLASSES), "training")
    pixels = 255 - np.asarray(Image.open(box.image))
    Image.fromarray(pixels).save(box.image)
    after = load_split(config_for(box.set, classes=CLASSES), "training")
    assert after.images[1].permute(1, 2, 0).tolist() == pixels.tolist()
    assert after.digest != before.digest
    assert len(list((box.set / ".cache").glob("training-*"))) == 1  # the old one is gone


@pytest.mark.parametrize("when", ["before the cache", "while it is built"])
def test_file_removed_between_check_and_load(
    box: Box, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    name = "find_pairs" if when == "before the cache" else "_build_cache"
    original = getattr(data_module, name)

    def removing(*args: object) -> object:
        result = original(*args) if name == "find_pairs" else None
        box.image.unlink()
        return result or original(*args)

    monkeypatch.setattr(data_module, name, removing)
    message = message_of(load_split, config_for(box.set, classes=CLASSES), "training")
    assert message.startswith(f"{box.image}: no such file")
    assert not list((box.set / ".cache").glob("training-*"))


def test_killed_generation_is_never_taken_for_complete(tmp_path: Path, script: Callable) -> None:
    out = tmp_path / "set"
    command = [sys.executable, "data.py", "generate", "--sequences", "2000", "1", "1"]
    process = subprocess.Popen(
        [*command, "--size", "16", "--out", out],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that its workers can be told
    )
    while len(list((tmp_path / "set.partial").rglob("*.png"))) < 10:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    with pytest.raises(ProcessLookupError):  # its workers follow it
        for _ in range(600):
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    assert not out.exists()
    assert "no such folder" in message_of(load_split, config_for(out, classes=CLASSES), "training")
    done = script("data.py", "generate", "--sequences", *"111", "--size", "16", "--out", out)
    assert done.returncode == 0, done.stderr
    assert len({path.name[:6] for path in (out / "training/image").iterdir()}) == 1
    assert not (tmp_path / "set.partial").exists()


def test_checkpoint_is_in_place_only_when_it_is_whole(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a failure nor an interruption at any call to the system loses the file before."""
    path = box.checkpoint()
    before = path.read_bytes()
    for owner, name in ((files_module.os, "fsync"), (Path, "replace")):
        for kind in (OSError(28, "No space left on device"), KeyboardInterrupt()):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, lambda *_args, kind=kind: (_ for _ in ()).throw(kind))
                with pytest.raises((UserError, KeyboardInterrupt)):
                    save_checkpoint(path, {"config": {}, "model": {}})
            assert path.read_bytes() == before
