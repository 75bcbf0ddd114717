"""A table of bad inputs, each with what the one `error:` line must say, run through the scripts.

Most go through the `main()` of a script, under `errors.run`, in this process: the same code as on
the command line without the seconds a new process takes to import PyTorch. One of each kind goes
through a process of its own as well (`test_as_a_user`).
"""

import importlib
import io
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from box import CLASSES, ROOT, Box, Code, bomb, encoded, link, save
from conftest import config_for

import errors
from data import load_split

# ---- the table: what spoils a box and gives the command line, and what the line must name

Case = tuple[Callable[[Box], list[object]], tuple[str, ...]]


def changed(
    change: Callable[[Box], object], call: Callable[[Box], list] = Box.train
) -> Callable[[Box], list]:
    """Spoil something in the box, then give the command line."""

    def build(box: Box) -> list[object]:
        change(box)
        return call(box)

    return build


def image(content: bytes) -> Callable[[Box], list]:
    return changed(lambda box: box.image.write_bytes(content))


def override(text: str) -> Callable[[Box], list]:
    return lambda box: box.train(text)


def config(text: str) -> Callable[[Box], list]:
    return lambda box: box.config(text)


def checkpoint(content: Callable[[bytes], bytes]) -> Callable[[Box], list]:
    def build(box: Box) -> list[object]:
        path = box.checkpoint("bad.pt")
        path.write_bytes(content(path.read_bytes()))
        return box.evaluate(path)

    return build


def pickled(value: Callable[[Box], object]) -> Callable[[Box], list]:
    def build(box: Box) -> list[object]:
        torch.save(value(box), box.folder / "bad.pt")
        return box.evaluate(box.folder / "bad.pt")

    return build


def stray(box: Box) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[5, 3] = (1, 2, 3)
    save(box.mask, pixels)


def without_pngs(folder: Path) -> None:
    for path in sorted(folder.rglob("*.png")):
        path.unlink()


def flipped(content: bytes) -> bytes:
    """One bit of the weights changed, and the checks of the zip made to fit again."""
    old, new = io.BytesIO(content), io.BytesIO()
    with zipfile.ZipFile(old) as before, zipfile.ZipFile(new, "w") as after:
        for info in before.infolist():
            member = before.read(info)
            if info.filename.endswith("data/0"):
                member = bytes([member[0] ^ 1]) + member[1:]
            after.writestr(info.filename, member)
    return new.getvalue()


NOISE = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
PNG = encoded(NOISE, "PNG")
ZERO = (2**20 + 1) * b"\0"

DATA: dict[str, Case] = {
    "truncated PNG": (image(PNG[: len(PNG) // 2]), ("image/b.png", "damaged")),
    "zero bytes": (image(b""), ("image/b.png", "damaged, or not an image")),
    "text as PNG": (image(b"no image\n"), ("image/b.png", "not an image")),
    "JPEG named .png": (image(encoded(NOISE, "JPEG")), ("image/b.png", "JPEG", "convert")),
    "decompression bomb": (image(bomb()), ("image/b.png", "too many pixels")),
    "16-bit image": (image(encoded(NOISE[..., 0].astype(np.uint16), "PNG")), ("b.png", "16 bits")),
    "truncated mask": (
        changed(lambda box: box.mask.write_bytes(PNG[:-30])),
        ("gt_image/gt_b.png", "damaged"),
    ),
    "stray colour": (changed(stray), ("gt_b.png", "1 pixels", "(1, 2, 3) at x=3, y=5")),
    "image without mask": (
        changed(lambda box: box.mask.unlink()),
        ("image/b.png", "has no mask", "gt_image/gt_b.png"),
    ),
    "mask without image": (
        changed(lambda box: box.image.unlink()),
        ("gt_image/gt_b.png", "has no image", "image/b.png"),
    ),
    "mask of another size": (
        changed(lambda box: save(box.mask, np.zeros((8, 9, 3)))),
        ("gt_b.png", "9×8", "8×8"),
    ),
    "pair of another size": (
        changed(lambda b: (save(b.image, np.zeros((7, 8, 3))), save(b.mask, np.zeros((7, 8, 3))))),
        ("image/b.png", "8×7", "one size"),
    ),
    "empty folder": (
        changed(lambda box: without_pngs(box.set / "validation")),
        ("validation/image/*.png", "no such files"),
    ),
    "no masks at all": (
        changed(lambda box: shutil.rmtree(box.set / "training" / "gt_image")),
        ("training/gt_image", "no such folder"),
    ),
    "no data set": (
        changed(lambda box: shutil.rmtree(box.set)),
        ("set: no such folder", "make data"),
    ),
    "file as data set": (
        lambda box: [*box.train(), "--data", box.image],
        ("b.png", "no such folder"),
    ),
    "image that is a folder": (
        changed(lambda box: (box.image.unlink(), box.image.mkdir())),
        ("image/b.png", "cannot be read"),
    ),
    "link to nothing": (
        changed(lambda box: (box.image.unlink(), box.image.symlink_to("none"))),
        ("image/b.png", "no such file"),
    ),
    "cache folder that is a file": (
        changed(lambda box: (box.set / ".cache").write_text("")),
        (".cache", "cannot be written"),
    ),
    "check of a bad set": (
        changed(stray, lambda box: ["data.py", "check", box.set]),
        ("set: 1 problem, listed above",),
    ),
}
CONFIG: dict[str, Case] = {
    "unknown key": (override("epoch=3"), ("'epoch'", "did you mean 'epochs'")),
    "unknown key in a file": (config("lerning_rate: 1"), ("mine.yaml", "'learning_rate'")),
    "duplicate key": (config("seed: 1\nseed: 2"), ("mine.yaml", "'seed' (line 2)", "twice")),
    "text for a number": (override("batch_size=many"), ("batch_size", "whole number")),
    "number for a list": (override("encoder=3"), ("encoder", "a list")),
    "negative epochs": (override("epochs=-1"), ("epochs: is -1",)),
    "NaN": (override("learning_rate=.nan"), ("learning_rate", "number")),
    "infinity": (override("learning_rate=inf"), ("learning_rate", "number")),
    "even kernel": (override("encoder=[[4, 4]]"), ("encoder: stage 1", "odd kernel")),
    "even blur": (override("blur_kernel=4"), ("blur_kernel", "odd")),
    "too few stages": (override("encoder=[[4, 3], [4, 3]]"), ("decoder: has 1", "needs 2")),
    "one class only": (override("classes={all: [0, 0, 0]}"), ("classes", "2 to 255")),
    "two classes of a colour": (
        override("classes={a: [0, 0, 0], b: [0, 0, 0]}"),
        ("classes", "colour of its own"),
    ),
    "five channels": (override("in_channels=5"), ("in_channels: is 5", "1, 3, 4")),
    "unknown loss": (override("loss={dice: 1}"), ("loss: unknown loss 'dice'",)),
    "no loss": (override("loss={}"), ("loss", "positive weight")),
    "bad YAML": (config("encoder: [1, 2"), ("mine.yaml", "not valid YAML")),
    "binary config": (config("\xff\xfe\x00"), ("mine.yaml", "UTF-8")),
    "code in a config": (
        lambda box: box.config(f"name: !!python/object/apply:os.mkdir ['{box.folder}/made']"),
        ("mine.yaml", "not valid YAML"),
    ),
    "base of itself": (config("base: mine.yaml"), ("mine.yaml", "leads back")),
    "missing base": (config("base: none.yaml"), ("none.yaml", "no such config")),
    "missing config": (
        lambda box: box.train(config=box.folder / "no.yaml"),
        ("no.yaml", "no such"),
    ),
    "folder as a config": (lambda box: box.train(config=box.folder), ("cannot be read",)),
    "no equals sign": (override("epochs"), ("--set epochs", "key=value")),
}
CHECKPOINTS: dict[str, Case] = {
    "missing": (lambda box: box.evaluate(box.folder / "no.pt"), ("no.pt", "no such checkpoint")),
    "empty": (checkpoint(lambda content: b""), ("bad.pt", "damaged")),
    "truncated": (checkpoint(lambda content: content[: len(content) // 2]), ("bad.pt", "damaged")),
    "last byte gone": (checkpoint(lambda content: content[:-1]), ("bad.pt", "damaged")),
    "flipped bit": (checkpoint(flipped), ("bad.pt", "digest")),
    "text": (checkpoint(lambda content: b"epoch,loss\n1,0.5\n"), ("bad.pt", "not a checkpoint")),
    "folder": (lambda box: box.evaluate(box.folder), ("cannot be read",)),
    "of another project": (
        pickled(lambda box: {"state_dict": {"conv.weight": torch.zeros(3)}}),
        ("bad.pt", "not a checkpoint of this project"),
    ),
    "a tensor": (pickled(lambda box: torch.zeros(3)), ("bad.pt", "not a checkpoint")),
    "code": (
        pickled(lambda box: {"format": "?", "x": Code(box.folder / "made")}),
        ("bad.pt", "not a checkpoint"),
    ),
    "of an older version": (
        lambda box: box.evaluate(box.checkpoint("old.pt", model={"gone": torch.zeros(2)})),
        ("old.pt", "another version"),
    ),
    "best.pt as last.pt": (
        changed(
            lambda box: (box.run.mkdir(), box.checkpoint("run/last.pt", data_digest="")),
            lambda box: [*box.train(), "--resume"],
        ),
        ("run/last.pt", "best.pt", "resume"),
    ),
    "results that are none": (
        lambda box: box.evaluate(save(box.folder / "r.png", NOISE).rename(box.folder / "r.json")),
        ("r.json", "JSON"),
    ),
    "other JSON": (
        lambda box: (
            (box.folder / "o.json").write_text("[{}]") and box.evaluate(f"{box.folder}/o.json")
        ),
        ("o.json", "not a file of results"),
    ),
}
ARCHIVES: dict[str, Case] = {
    "missing": (Box.download, ("archive.zip", "no readable zip")),
    "not a zip": (
        lambda box: (box.folder / "archive.zip").write_bytes(ZERO) and box.download(),
        ("archive.zip", "no readable zip"),
    ),
    "truncated": (
        changed(
            lambda box: (box.archive(), os.truncate(box.folder / "archive.zip", 900)), Box.download
        ),
        ("archive.zip", "no readable zip"),
    ),
    "parent folder": (lambda box: box.archive(("data/../../x.png", PNG)), ("'data/../../x.png'",)),
    "absolute path": (lambda box: box.archive(("/tmp/x.png", PNG)), ("'/tmp/x.png'", "unsafe")),
    "drive letter": (lambda box: box.archive(("C:/x.png", PNG)), ("'C:/x.png'", "unsafe")),
    "link": (lambda box: box.archive((link("data/x"), b"/etc")), ("'data/x'", "link")),
    "bomb": (
        lambda box: box.archive(("data/testing/image/zero.png", ZERO)),
        ("testing/image/zero.png", "too large"),
    ),
    "two data sets": (
        lambda box: box.archive(("other/testing/image/x.png", PNG)),
        ("archive.zip", "2 data sets"),
    ),
    "wrong digest": (Box.archive, ("archive.zip", f"expected digest {'0' * 64}, found ")),
    "digest that is none": (lambda box: box.archive(digest="abc"), ("--digest 'abc'", "SHA-256")),
}
COMMANDS: dict[str, Case] = {
    "existing folder": (lambda box: box.generate(out="set"), ("set exists",)),
    "below a file": (lambda box: box.generate(out="set/training/image/a.png/x"), ("a.png/x",)),
    "tiny frames": (lambda box: box.generate("--size", 4), ("size 4", "too small")),
    "negative seed": (lambda box: box.generate("--seed", -1), ("seed -1",)),
    "no sequences": (
        lambda box: [*box.generate()[:2], "--sequences", 1, 0, 1, "--out", box.folder / "out"],
        ("0 validation sequences",),
    ),
    "run directory that is a file": (
        lambda box: [*box.train(), "--run-dir", box.image],
        ("image/b.png", "cannot be written"),
    ),
    "results below a file": (
        lambda box: box.evaluate(box.checkpoint(), "--json", box.image / "r.json"),
        ("b.png/r.json", "cannot be written"),
    ),
    "results in a folder's place": (
        lambda box: box.evaluate(box.checkpoint(), "--json", box.set),
        ("set", "cannot be written"),
    ),
}
TABLES = {"data": DATA, "config": CONFIG, "checkpoint": CHECKPOINTS, "archive": ARCHIVES}
TABLES["command"] = COMMANDS
CASES = {f"{kind}: {name}": case for kind, t in TABLES.items() for name, case in t.items()}
# argparse prints how a script is used before its own "SCRIPT: error: ..." line, with exit code 2.
USAGE = {
    "unknown option": (["train.py", "--config", "x.yaml", "--epochs", "3"], "--epochs 3"),
    "no config": (["train.py"], "--config"),
    "no command": (["data.py"], "command"),
    "unknown command": (["data.py", "dowload"], "'dowload'"),
    "unknown split": (["evaluate.py", "x.pt", "--split", "test"], "'test'"),
    "no checkpoint": (["evaluate.py"], "CHECKPOINT"),
    "text for a count": (["data.py", "generate", "--sequences", "a", "1", "1"], "'a'"),
}


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """Call a script as its command line does: (exit code, stderr)."""

    def run(script: str, *args: object) -> tuple[object, str]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        code = 0
        try:
            errors.run(importlib.import_module(script.removesuffix(".py")).main)
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return run


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(code: object, err: str, parts: tuple[str, ...]) -> None:
    """Exit code 2 and one line that says what is wrong."""
    assert code == 2, err
    [line] = err.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


def assert_nothing_written(box: Box, before: dict[Path, bytes]) -> None:
    """What was there is as it was; nothing half-written, no results, nothing executed."""
    after = files(box.folder)
    new = {path for path in after if path not in before and path.name != "lock"}
    assert {path: after.get(path) for path in before} == before
    assert all(path.parents[1].name == ".cache" for path in new), new
    assert not list(box.folder.rglob("*.partial"))
    assert not any((box.folder / name).exists() for name in ("out", "out.json", "made"))


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, box: Box, call: Callable) -> None:
    build, parts = CASES[name]
    command = build(box)
    before = files(box.folder)
    assert_refused(*call(*command), parts)
    assert_nothing_written(box, before)


@pytest.mark.parametrize("name", USAGE)
def test_bad_usage(name: str, call: Callable) -> None:
    command, part = USAGE[name]
    code, err = call(*command)
    *usage, line = err.splitlines()
    assert code == 2 and usage[0].startswith("usage: ")
    assert line.startswith(command[0]) and ": error: " in line and part in line


AS_A_USER = "data: truncated PNG", "config: unknown key", "checkpoint: code", "archive: link"


@pytest.mark.parametrize("name", AS_A_USER)
def test_as_a_user(name: str, box: Box, script: Callable) -> None:
    build, parts = CASES[name]
    command = build(box)
    before = files(box.folder)
    done = script(*command)
    assert_refused(done.returncode, done.stderr, parts)
    assert_nothing_written(box, before)


def test_box_is_good_and_its_trap_works(box: Box, call: Callable) -> None:
    """Undamaged, the box is accepted: what is refused is so for what the case did to it."""
    assert load_split(config_for(box.set, classes=CLASSES), "training").images.shape == (2, 3, 8, 8)
    path = box.checkpoint()
    assert call(*box.evaluate(path)) == (0, "")
    torch.save({"x": Code(box.folder / "made")}, box.folder / "code.pt")
    torch.load(box.folder / "code.pt", weights_only=False)
    assert (box.folder / "made").is_dir()
