"""data.py: reading files of all kinds, telling what is wrong with them, and the cache."""

import io
import itertools
import os
import shutil
import struct
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import config_for
from PIL import Image

import data as d
from errors import UserError
from images import colourise, read_image, read_mask

CLASSES = {"background": [0, 0, 0], "square": [255, 0, 0], "circle": [0, 0, 255]}
PALETTE = np.array(list(CLASSES.values()), np.uint8)
CONFIG = config_for(Path("."), classes=CLASSES)
WIDTH, HEIGHT = 8, 6  # not square, so that exchanged sides are seen


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Uncompressed, so that a changed picture has a file of the same size.
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, compress_level=0)
    return path


def make_pair(root: Path, split: str, name: str, seed: int, size=(HEIGHT, WIDTH)) -> None:
    rng = np.random.default_rng(seed)
    save(root / split / "image" / name, rng.integers(0, 256, (*size, 3)))
    save(root / split / "gt_image" / f"gt_{name}", PALETTE[rng.integers(0, 3, size)])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data set of three pairs of noise in each split."""
    for split, name in itertools.product(d.SPLITS, ("b.png", "c.png", "a.png")):
        make_pair(tmp_path / "set", split, name, seed=len(split) * 256 + ord(name[0]))
    return tmp_path / "set"


def message_of(call: Callable, *args: object) -> str:
    """The one line with which `call` must refuse its arguments."""
    with pytest.raises(UserError) as caught:
        call(*args)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def load(root: Path, split: str = "training", channels: int = 3, classes=CLASSES) -> d.Split:
    return d.load_split(config_for(root, classes=classes, in_channels=channels), split)


def same(a: d.Split, b: d.Split) -> bool:
    equal = torch.equal(a.images, b.images) and torch.equal(a.masks, b.masks)
    return equal and (a.names, a.digest) == (b.names, b.digest)


def assert_as_on_disk(split: d.Split, folder: Path, channels: int = 3) -> None:
    """All values are those of the files, decoded here in another way."""
    assert [f"{name}.png" for name in split.names] == sorted(os.listdir(folder / "image"))
    assert split.images.dtype == split.masks.dtype == torch.uint8
    for i, name in enumerate(sorted(os.listdir(folder / "image"))):
        with Image.open(folder / "image" / name) as image:
            pixels = np.asarray(image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]))
        expected = torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels).copy())
        assert torch.equal(split.images[i], expected.permute(2, 0, 1))
        with Image.open(folder / "gt_image" / f"gt_{name}") as image:
            rows = np.asarray(image.convert("RGB")).tolist()
        index = {tuple(colour): k for k, colour in enumerate(CLASSES.values())}
        assert split.masks[i].tolist() == [[index[tuple(pixel)] for pixel in row] for row in rows]


# -- one file ------------------------------------------------------------------------------

C, M = (10, 20, 30), (200, 100, 50)


def png(width: int, height: int, depth: int, colour_type: int, pixels: bytes) -> bytes:
    """A PNG built by hand, for what Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(pixels), b"IEND"):
        file += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return file


@pytest.mark.parametrize(
    ("mode", "stored", "pixels"),
    [
        ("1", [0, 255], [(0, 0, 0, 255), (255, 255, 255, 255)]),
        ("L", [7, 90], [(7, 7, 7, 255), (90, 90, 90, 255)]),
        ("LA", [(7, 128), (90, 0)], [(7, 7, 7, 128), (90, 90, 90, 0)]),
        ("P", [1, 0], [(*C, 255), (*M, 255)]),
        ("P", [1, 0], [(*C, 255), (*M, 0)]),
        ("RGB", [C, M], [(*C, 255), (*M, 255)]),
        ("RGBA", [(*C, 128), (*M, 0)], [(*C, 128), (*M, 0)]),
    ],
)
def test_every_kind_of_image_is_converted(tmp_path, mode, stored, pixels):
    """A picture of 2×1 pixels; `pixels` are their RGBA values, shown on white where alpha goes."""
    image = Image.new(mode, (2, 1))
    image.putdata(stored)
    if mode == "P":
        image.putpalette([*M, *C])
    clear = {"transparency": 0} if mode == "P" and pixels[1][3] == 0 else {}
    image.save(tmp_path / "x.png", **clear)
    rgb = [[c * p[3] / 255 + 255 - p[3] for c in p[:3]] for p in pixels]
    grey = [[0.299 * r + 0.587 * g + 0.114 * b] for r, g, b in rgb]
    for channels, expected in ((1, grey), (3, rgb), (4, pixels)):
        read = read_image(tmp_path / "x.png", channels)
        assert read.dtype == np.uint8
        opaque = channels == 4 or all(p[3] == 255 for p in pixels)
        np.testing.assert_allclose(read, [expected], atol=0.5 if opaque else 1)


WHOLE = png(2, 1, 8, 2, b"\0\1\2\3\4\5\6")


JPEG = io.BytesIO()
Image.new("RGB", (4, 5)).save(JPEG, "JPEG")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "no such file"),
        (b"", "damaged, or not an image"),
        (b"a letter, not an image\n", "damaged, or not an image"),
        (WHOLE[:-26], "damaged"),
        (WHOLE[:20], "damaged"),
        (JPEG.getvalue(), "is a JPEG file named .png"),
        (png(100_000, 100_000, 8, 2, b""), "too many pixels"),
        (png(3, 2, 8, 2, b"\0" * 5), "damaged"),
        (png(1, 1, 16, 0, b"\0\1\2"), "16 bits"),
        (png(1, 1, 16, 2, b"\0\1\2\3\4\5\6"), "16 bits"),
    ],
    ids=["missing", "empty", "text", "cut", "stub", "jpeg", "bomb", "short", "grey16", "rgb16"],
)
def test_bad_files(tmp_path, content, part):
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    for call in (read_image, 3), (read_image, 4), (read_mask, CONFIG):
        message = message_of(call[0], path, call[1])
        assert message.startswith(f"{path}: ") and part in message


def test_whole_png_and_jpeg_by_its_own_name_are_read(tmp_path):
    (tmp_path / "x.png").write_bytes(WHOLE)
    assert read_image(tmp_path / "x.png", 3).tolist() == [[[1, 2, 3], [4, 5, 6]]]
    (tmp_path / "x.jpg").write_bytes(JPEG.getvalue())
    assert read_image(tmp_path / "x.jpg", 1).shape == (5, 4, 1)


def test_mask_colours_become_indices_and_back(tmp_path):
    indices = np.array([[0, 1, 2, 1], [2, 2, 0, 1]], np.uint8)
    path = save(tmp_path / "mask.png", PALETTE[indices])
    mask = read_mask(path, CONFIG)
    assert mask.dtype == np.uint8 and mask.tolist() == indices.tolist()
    coloured = colourise(torch.from_numpy(mask), CLASSES)
    assert coloured.dtype == torch.uint8 and coloured.shape == (3, 2, 4)
    assert (coloured.permute(1, 2, 0).numpy() == PALETTE[indices]).all()
    backwards = dict(reversed(CLASSES.items()))
    assert read_mask(path, CONFIG | {"classes": backwards}).tolist() == (2 - indices).tolist()


def test_stray_colours_are_counted_and_the_first_is_named(tmp_path):
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[2, 5], pixels[3, 1] = (254, 0, 1), (0, 255, 9)
    message = message_of(read_mask, save(tmp_path / "mask.png", pixels), CONFIG)
    for part in ("mask.png: 2 pixels", "(254, 0, 1) at x=5, y=2", "square (255, 0, 0)"):
        assert part in message


# -- pairs ---------------------------------------------------------------------------------


def test_files_without_partner_are_all_named(root):
    folder = root / "training"
    (folder / "image" / "a.png").unlink()
    (folder / "gt_image" / "gt_c.png").unlink()
    pairs, problems = d.find_pairs(config_for(root), "training")
    assert pairs == [("b", "b", folder / "image" / "b.png", folder / "gt_image" / "gt_b.png")]
    assert problems == [
        f"{folder}/gt_image/gt_a.png: has no image {folder}/image/a.png; add it or remove the mask",
        f"{folder}/image/c.png: has no mask {folder}/gt_image/gt_c.png; add it or remove the image",
    ]
    assert "(and 1 more: `make check` lists them)" in message_of(load, root)


@pytest.mark.parametrize("missing", ["", "testing", "testing/image", "testing/gt_image"])
def test_missing_folder(root, missing):
    shutil.rmtree(root / missing)
    message = message_of(load, root, "testing")
    assert str(root / missing) in message and "no such folder" in message


def test_empty_split(root):
    for path in sorted((root / "testing").rglob("*.png")):
        path.unlink()
    assert f"{root}/testing/image/*.png: no such files" in message_of(load, root, "testing")


# -- a split and its cache -----------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_split_is_what_is_on_disk(root, channels):
    split = load(root, "validation", channels)
    assert split.images.shape == (3, channels, HEIGHT, WIDTH)
    assert split.masks.shape == (3, HEIGHT, WIDTH)
    assert_as_on_disk(split, root / "validation", channels)


def test_cache_is_used_and_tells_splits_channels_and_classes_apart(root, monkeypatch):
    first, other, grey = load(root), load(root, "testing"), load(root, channels=1)
    with monkeypatch.context() as patch:
        patch.setattr(d, "read_pair", None)  # a call would be a TypeError
        assert same(load(root), first)
        assert same(load(root, "testing"), other)
        assert same(load(root, channels=1), grey)
        with pytest.raises(TypeError):
            load(root, classes=dict(reversed(CLASSES.items())))


@pytest.mark.parametrize("name", ["image/b.png", "gt_image/gt_b.png"])
def test_changed_file_is_decoded_again(root, name):
    before, path = load(root), root / "training" / name
    status = path.stat()
    save(path, np.asarray(Image.open(path))[::-1])
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    after = load(root)
    assert_as_on_disk(after, root / "training")
    assert not same(before, after) and before.digest != after.digest


def test_added_and_removed_files_are_noticed(root):
    digests = {load(root).digest}
    make_pair(root, "training", "aa.png", seed=1)
    assert load(root).names == ["a", "aa", "b", "c"]
    digests.add(load(root).digest)
    (root / "training/image/b.png").unlink()
    (root / "training/gt_image/gt_b.png").unlink()
    assert_as_on_disk(load(root), root / "training")
    assert load(root).digest not in digests and len(digests) == 2


def test_digest_is_of_content_and_names_only(root, tmp_path):
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)  # other times
    assert load(tmp_path / "copy").digest == load(root).digest != load(root, "testing").digest


@pytest.mark.parametrize("kept", [0, 100])
def test_damaged_cache_is_rebuilt_or_refused_but_not_used(root, kept):
    before = load(root)
    for path in [path for path in (root / ".cache").rglob("*") if path.is_file()]:
        content = path.read_bytes()
        path.write_bytes(content[:kept])
        try:
            assert same(load(root), before), path
        except UserError as error:
            assert str(root / ".cache") in str(error) and "\n" not in str(error)
        path.write_bytes(content)


def test_build_that_was_killed_is_begun_again(root, monkeypatch):
    read_pair, numbers = d.read_pair, itertools.count()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(d, "read_pair", lambda *args: (1 / (3 - next(numbers)), read_pair(*args))[1])
        load(root)
    assert_as_on_disk(load(root), root / "training")


def test_runs_that_start_together_build_the_cache_once(root, monkeypatch):
    read_pair, calls = d.read_pair, itertools.count()

    def read_slowly(*args):
        if next(calls) == 0:
            time.sleep(0.2)  # so that the others come in the meantime
        return read_pair(*args)

    monkeypatch.setattr(d, "read_pair", read_slowly)
    with ThreadPoolExecutor(3) as pool:
        splits = list(pool.map(load, [root] * 3))
    for split in splits:
        assert_as_on_disk(split, root / "training")
    assert next(calls) <= 2 * len(splits[0].names)


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda path: save(path, np.zeros((6, 9, 3))), "gt_c.png: is 8×6 but its image is 9×6"),
        (
            lambda path: make_pair(path.parents[2], "training", path.name, 0, size=(8, 6)),
            "image/c.png: is 6×8 but a.png is 8×6",
        ),
        (lambda path: path.write_bytes(b""), "image/c.png: cannot be read"),
        (lambda path: (path.unlink(), path.symlink_to("none")), "image/c.png: no such file"),
        (lambda path: (path.unlink(), path.mkdir()), "image/c.png: cannot be read"),
    ],
    ids=["mask of another size", "pair of another size", "empty", "broken link", "folder"],
)
def test_bad_pair_is_named_each_time(root, spoil, part):
    spoil(root / "training" / "image" / "c.png")
    assert part in message_of(load, root)
    assert part in message_of(load, root)


def test_cache_that_cannot_be_written(root):
    (root / ".cache").write_text("")
    assert f"{root}/.cache" in message_of(load, root)


# -- the command line ----------------------------------------------------------------------


def test_check_prints_counts_and_class_shares(root, capsys):
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[0] = 2  # of six rows
    for name in "abc":
        save(root / "testing" / "gt_image" / f"gt_{name}.png", PALETTE[pixels])
    d.check(CONFIG | {"data": str(root)}, None)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["split", "pairs", "groups", "size", *CLASSES, "ignored"]
    assert [line[:4] for line in lines[1:]] == [[split, "3", "3", "8×6"] for split in d.SPLITS]
    assert lines[3][4:] == ["0.8333", "0.0000", "0.1667", "0.0000"]
    counts = np.bincount(load(root, "training").masks.numpy().ravel())
    assert [float(x) for x in lines[1][4:-1]] == pytest.approx(counts / counts.sum(), abs=5e-5)


def test_check_lists_all_problems_at_once(root, script):
    training, validation = root / "training", root / "validation"
    (training / "image" / "a.png").write_bytes(b"")
    (training / "gt_image" / "gt_b.png").unlink()
    save(training / "gt_image" / "gt_c.png", np.full((HEIGHT, WIDTH, 3), 7))
    save(validation / "image" / "a.png", np.zeros((1, 1, 3)))
    make_pair(root, "validation", "b.png", seed=0, size=(2, 3))
    shutil.rmtree(root / "testing" / "gt_image")
    done = script("data.py", "check", root)
    assert done.returncode == 2
    found = [line for line in done.stdout.splitlines() if line.startswith("problem: ")]
    assert len(found) == 6
    for path, part in (
        (training / "image/a.png", "cannot be read"),
        (training / "image/b.png", "no mask"),
        (training / "gt_image/gt_c.png", f"{WIDTH * HEIGHT} pixels of colours that are no class"),
        (validation / "gt_image/gt_a.png", "its image is 1×1"),
        (root, "the validation split has images of 2 sizes"),
        (root / "testing/gt_image", "no such folder"),
    ):
        assert len([line for line in found if f" {path}: " in line and part in line]) == 1, path
    assert done.stderr.startswith(f"error: {root}: 6 problems") and done.stderr.count("\n") == 1


def test_check_names_a_missing_data_set_once(tmp_path, capsys):
    message_of(d.check, config_for(tmp_path / "none"), None)
    assert capsys.readouterr().out.count(f"problem: {tmp_path}/none: no such folder") == 1


def test_generate_then_check(tmp_path, script, monkeypatch, capsys):
    out = tmp_path / "drawn"
    command = ["data.py", "generate", "--sequences", *"211", "--size", "16", "--out", str(out)]
    done = script(*command)
    frames = len(list(out.glob("*/image/*.png")))
    assert done.returncode == 0 and f"{frames} frames in {out}" in done.stdout
    assert done.stderr == ""  # no progress bar where nobody watches
    monkeypatch.setattr(sys, "argv", ["data.py", "check", str(out)])
    d.main()
    assert "problem" not in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", command)
    assert f"{out} exists and is not empty" in message_of(d.main)
