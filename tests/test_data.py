"""Tests of data.py: splits, groups, the cache, errors."""

import errno
import fcntl
import json
import os
import re
import shutil
import threading
from hashlib import sha256
from pathlib import Path

import machine

import numpy as np
import pytest
import torch
from conftest import config_for
from PIL import Image

import data as d
from augment import take_batch
from common import SPLITS, UserError, code_digest
from config import load_config
from metrics import IGNORE

POND = {"water": [0, 0, 0], "lily": [255, 255, 255]}
FLIGHTS = "^.{1,6}"  # the group of configs/afo.yaml


@pytest.fixture
def root(dataset: Path, tmp_path: Path) -> Path:
    """Copy the data set, to change it."""
    return shutil.copytree(dataset, tmp_path / "set", ignore=shutil.ignore_patterns(".cache"))


@pytest.fixture
def pond(tmp_path: Path) -> dict:
    """Write a data set of one folder without splits, of images in two sizes; returns its config."""
    rng = np.random.default_rng(0)
    for day in range(9):
        for i in range(2):
            height = 10 + day % 2
            pixels = rng.integers(0, 256, (height, 12, 3), np.uint8)
            mask = rng.integers(0, 2, (height, 12)).astype(np.uint8) * 255
            Image.fromarray(pixels).save(tmp_path / f"day{day}_{i}.png")
            Image.fromarray(mask).save(tmp_path / f"day{day}_{i}_mask.png")
    return config_for(
        tmp_path,
        images="*.png",
        masks="*_mask.png",
        group="^[^_]+",
        classes=POND,
        resize=[16, 12],
    )


def test_split_holds_the_files_as_they_are(dataset: Path) -> None:
    config = config_for(dataset, group=FLIGHTS)
    split = d.load_split(config, "training")
    paths = sorted((dataset / "training/image").iterdir())
    assert split.names == [path.stem for path in paths]
    assert split.groups == [path.stem[:6] for path in paths]
    colours = np.array(list(config["classes"].values()))
    for i, path in enumerate(paths):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        mask = np.asarray(Image.open(dataset / f"training/gt_image/gt_{path.name}"))
        assert np.array_equal(split.images[i].permute(1, 2, 0).numpy(), pixels)
        assert np.array_equal(colours[split.masks[i].numpy()], mask)


def test_digest_is_of_names_and_pixels(dataset: Path) -> None:
    """Published runs name their data by it: another way to compute it would orphan them."""
    config = config_for(dataset)
    paths = sorted((dataset / "testing/image").iterdir())
    expected = sha256(json.dumps([path.stem for path in paths]).encode())
    for path in paths:
        expected.update(np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes())
        colours = np.asarray(Image.open(dataset / f"testing/gt_image/gt_{path.name}"))
        mask = np.zeros((32, 32), np.uint8)
        for index, colour in enumerate(config["classes"].values()):
            mask[(colours == colour).all(axis=2)] = index
        expected.update(mask.tobytes())
    assert d.load_split(config, "testing").digest == expected.hexdigest()


# ---- groups and random splits


def test_own_images_are_their_own_groups(dataset: Path) -> None:
    pairs, problems = d.find_pairs(load_config([], [f"data={dataset}"]), "training")
    assert problems == []
    assert [pair.group for pair in pairs] == [pair.name for pair in pairs]


def test_random_splits_share_no_group(pond: dict) -> None:
    splits = {split: d.load_split(pond, split) for split in SPLITS}
    groups = {name: set(split.groups) for name, split in splits.items()}
    assert len(groups["training"]) == 7
    assert len(groups["validation"]) == len(groups["testing"]) == 1
    assert len(set.union(*groups.values())) == 9
    assert sum(len(split.names) for split in splits.values()) == 18
    assert all(split.images.shape[2:] == (16, 12) for split in splits.values())


def test_second_of_two_folders_is_the_test_split_too(root: Path, capsys) -> None:
    config = config_for(root, split_folders=["training", "validation"])
    validation = d.load_split(config, "validation")
    assert capsys.readouterr().err == ""
    testing = d.load_split(config, "testing")
    assert testing.digest == validation.digest
    assert "the folder validation stands in for the test split too" in capsys.readouterr().err


def test_too_few_images_or_groups_are_refused(pond: dict) -> None:
    for path in Path(pond["data"]).glob("day[2-8]*"):
        path.unlink()
    with pytest.raises(
        UserError,
        match=r"has 2 groups of its 4 images, too few for three splits.*; add images, or set group",
    ):
        d.load_split(pond, "training")
    for path in Path(pond["data"]).glob("day1*"):
        path.unlink()
    with pytest.raises(UserError, match="has 2 images, too few for three splits, which need at"):
        d.load_split(dict(pond, group=""), "validation")


def test_limits_are_evenly_spaced(dataset: Path) -> None:
    config = config_for(dataset, group=FLIGHTS, limit_groups=2, limit_images=4, limit_validation=5)
    split = d.load_split(config, "training")
    few, validation = d.load_data(config)
    assert sorted(set(few.groups)) == [min(split.groups), max(split.groups)]
    assert few.names[0] == split.names[0] and few.names[-1] == split.names[-1]
    assert len(few.names) == len(few.images) == len(few.masks) == 4
    assert len(validation.masks) == 5
    assert torch.equal(few.images[-1], split.images[-1])
    assert d.limit(split) is split  # not copied
    assert d.evenly(10, 4) == [0, 3, 6, 9]
    assert d.evenly(3, 0) == d.evenly(3, 9) == [0, 1, 2]


# ---- the cache


def test_cache_is_made_once_and_again_when_a_file_changes(root: Path) -> None:
    config = config_for(root)
    first = d.load_split(config, "testing")
    [cache] = root.glob(".cache/testing-*")
    built = cache.stat().st_mtime_ns
    assert d.load_split(config, "testing").digest == first.digest
    assert cache.stat().st_mtime_ns == built
    image = sorted((root / "testing/image").iterdir())[0]
    Image.new("RGB", (32, 32), "red").save(image)
    second = d.load_split(config, "testing")
    assert second.digest != first.digest and (second.images[0, 0] == 255).all()
    assert len(list(root.glob(".cache/testing-*"))) == 1 and not cache.exists()
    [cache] = root.glob(".cache/testing-*")
    os.utime(image, (1, 1))  # as after an edit that keeps the size of the file
    d.load_split(config, "testing")
    assert not cache.exists()


def test_a_full_disk_is_named(root: Path, monkeypatch) -> None:
    def fill_disk(file: object, shape: tuple) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(d, "write_header", fill_disk)
    message = re.escape(f"{root}/.cache: cannot be written (No space left on device); make room")
    with pytest.raises(UserError, match=message):
        d.load_split(config_for(root), "training")


def test_every_key_that_decides_pixels_is_in_the_name_of_a_cache() -> None:
    keys = list(load_config([]))
    of_data = keys[keys.index("images") : keys.index("in_channels") + 1]
    assert tuple(key for key in of_data if not key.startswith("limit_")) == d.DATA_KEYS


def test_cache_is_made_again_when_the_code_that_reads_changes(root: Path, monkeypatch) -> None:
    config = config_for(root)
    d.load_split(config, "testing")
    [cache] = root.glob(".cache/testing-*")
    assert code_digest(("data.py", "images.py", "masks.py")) == d.CODE_OF_PIXELS
    monkeypatch.setattr(d, "CODE_OF_PIXELS", "edited")
    d.load_split(config, "testing")
    assert len(list(root.glob(".cache/testing-*"))) == 1 and not cache.exists()


def test_a_cache_of_somebody_else_is_not_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / ".cache").mkdir()
    monkeypatch.setattr(d, "ROOT", tmp_path / "project")
    monkeypatch.setattr(d.os, "access", lambda path, mode: path.name != ".cache")
    assert d.cache_folder(root) == tmp_path / "project/data/.cache"
    monkeypatch.setattr(d, "ROOT", root / "training/image" / "file")
    d.ROOT.touch()
    with pytest.raises(UserError, match=r"cannot be made .*; let it be written, or copy the data"):
        d.cache_folder(root)


def test_configs_of_one_folder_keep_their_caches(pond: dict) -> None:
    configs = [
        pond,
        dict(pond, split_shares=[0.5, 0.25, 0.25]),
        dict(pond, group=""),
        dict(pond, classes={"water": [0, 0, 0], "lily": [255, 255, 255], "frog": [1, 1, 1]}),
        dict(pond, images="d*.png", masks="d*_mask.png"),
    ]
    first = [d.load_split(config, "training").digest for config in configs]
    caches = {p: p.stat().st_mtime_ns for p in Path(pond["data"]).glob(".cache/training-*")}
    assert len(caches) == 5
    assert [d.load_split(config, "training").digest for config in configs] == first
    assert all(path.stat().st_mtime_ns == time for path, time in caches.items())


def test_names_of_classes_decide_no_cache(pond: dict) -> None:
    d.load_split(pond, "training")
    renamed = {f"my {name}": colour for name, colour in pond["classes"].items()}
    d.load_split(dict(pond, classes=renamed), "training")
    assert len(list(Path(pond["data"]).glob(".cache/training-*"))) == 1


def test_spellings_of_a_folder_share_a_cache(root: Path, tmp_path: Path, monkeypatch) -> None:
    d.load_split(config_for(root), "testing")
    [cache] = root.glob(".cache/testing-*")
    built = cache.stat().st_mtime_ns
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    for spelling in ("set", "../" + tmp_path.name + "/set/", "link"):
        split = d.load_split(config_for(Path(spelling), data=spelling), "testing")
        assert len(split.names) == len(split.images)
        assert cache.stat().st_mtime_ns == built  # neither removed nor built again


def test_cache_is_opened_under_its_lock(dataset: Path, monkeypatch) -> None:
    """Another process may remove a cache that is outdated to it, but not while it is opened."""
    load = np.load

    def load_if_locked(path: Path, **options: object) -> np.ndarray:
        [lock] = path.parents[1].glob(f"{path.parent.name.split('-')[1]}.lock")
        with open(lock) as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return load(path, **options)

    monkeypatch.setattr(np, "load", load_if_locked)
    d.load_split(config_for(dataset), "testing")


@pytest.mark.skipif(len(machine.CORES) < 2, reason="needs two cores and Linux")
def test_files_are_decoded_on_all_cores(root: Path, monkeypatch) -> None:
    read_pair = d.read_pair
    cores = []

    def record(*args: object) -> tuple:
        if threading.current_thread() is not threading.main_thread():
            cores.append(os.sched_getaffinity(0))
        return read_pair(*args)

    monkeypatch.setattr(d, "read_pair", record)
    os.sched_setaffinity(0, {min(machine.CORES)})  # as OMP_PROC_BIND pins the main thread
    try:
        d.load_split(config_for(root), "testing")
    finally:
        machine.unpin_thread()
    assert cores and all(allowed == machine.CORES for allowed in cores)


def test_data_in_a_read_only_folder(root: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(d, "ROOT", tmp_path / "project")
    monkeypatch.setattr(d.os, "access", lambda path, mode: False)
    d.load_split(config_for(root), "testing")
    assert not (root / ".cache").exists()
    assert list((tmp_path / "project/data/.cache").glob("testing-*"))


# ---- errors


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"images": "photos"}, "images: is 'photos'; give a path below `data` with a"),
        ({"images": "*/*.png"}, "images, masks: have 2 and 1 wildcards; give both the same number"),
        ({"images": "a/*", "masks": "a/*"}, "images, masks: both are 'a/\\*'; give each its own"),
        ({"masks": "/photos/*.png"}, "masks: is '/photos"),
        ({"classes": {"a": [0, 0, 0]}}, "classes: there are 1; give 2 to 254"),
        ({"classes": {"a": [0, 0, 0], 7: [1, 1, 1]}}, "classes: 7: is no text"),
        ({"classes": {"a": [0, 0, 0], "b": [1, 1, 256]}}, "classes: b: is .*each 0 to 255"),
        ({"classes": {"a": [0, 0, 0], "b": "red"}}, "classes: b: is red; give"),
        ({"ignore": [255, 0, 0]}, r"classes, ignore: \[255, 0, 0\] stands twice"),
        ({"ignore": [255]}, r"ignore: is \[255\]; give \[red, green, blue\]"),
        (
            {"classes": {"a": [0, 0, 0], "b": [[1, 1, 1], 2]}},
            "classes: b: is .* or a list of",
        ),
        ({"classes": {"a": [0, 0, 0], "b": [[1, 1, 1], [0, 0, 0]]}}, r"\[0, 0, 0\] stands twice"),
        ({"ignore": [[255, 0, 0], [1, 2, 3]]}, r"classes, ignore: \[255, 0, 0\] stands twice"),
        ({"mask_format": "indices", "ignore": [-1]}, "ignore: is .* give indices"),
        ({"mask_format": "indices", "ignore": [3, 3]}, r"classes, ignore: \[3\] stands twice"),
        ({"mask_format": "indices", "mask_tolerance": 9}, "mask_tolerance: fits colours alone"),
        ({"other_values": "cat"}, "other_values: is 'cat'; give a class of background, square"),
        ({"split_folders": ["a"]}, "split_folders: is .*; give two or three folders"),
        ({"split_folders": ["a", "a"]}, "split_folders: is .* scored on the same images"),
        ({"value_range": [4095, 0]}, "value_range: is .*; give the lower value first"),
        ({"value_range": [0, 1.5]}, r"value_range: is .*; give \[\], or \[lowest, highest\]"),
        ({"resize": [4]}, "resize"),
        ({"group": "("}, "group"),
        ({"data": "nowhere"}, r"nowhere/.*: no such folder; run make data"),
        ({"data": "train.py"}, "train.py: is a file, but `data` is a folder"),
    ],
)
def test_bad_keys_are_named(dataset: Path, keys: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        d.load_split(dict(config_for(dataset), **keys), "training")


def test_the_first_problem_is_told(root: Path) -> None:
    for path in sorted((root / "validation/gt_image").iterdir())[:2]:
        path.unlink()
    with pytest.raises(UserError, match=r"\.png: has no mask .*gt_.* \(and 1 more"):
        d.load_split(config_for(root), "validation")


def test_two_sizes_are_refused_and_leave_nothing(pond: dict) -> None:
    with pytest.raises(UserError, match=r"set resize: \[height, width\], or crop"):
        d.load_split(dict(pond, resize=[]), "training")
    assert not list(Path(pond["data"]).glob(".cache/training*"))


def test_crops_need_no_images_of_one_size(pond: dict) -> None:
    """Smaller images are padded by pixels that count nowhere, and that no crop shows."""
    config = dict(pond, resize=[], crop=8, crop_on_objects=0.5)
    split = d.load_split(config, "training")
    assert split.images.shape[2:] == split.masks.shape[1:] == (11, 12)
    heights = set()
    for name, image, mask in zip(split.names, split.images, split.masks, strict=True):
        pixels = np.array(Image.open(Path(pond["data"], f"{name}.png")))
        height = len(pixels)
        assert torch.equal(image[:, :height], torch.from_numpy(pixels).permute(2, 0, 1))
        assert torch.equal(image[:, height:], image[:, 2 * height - 11 : height].flip(1))
        assert (mask[:height] != IGNORE).all() and (mask[height:] == IGNORE).all()
        heights.add(height)
    assert heights == {10, 11}
    index = torch.arange(len(split.names)).repeat(50)
    _, crops = take_batch(split.images, split.masks, index, config)
    assert crops.shape[1:] == (8, 8) and not (crops == IGNORE).any()
    with pytest.raises(UserError, match="has images of several sizes; set resize or crop"):
        d.load_split(dict(pond, resize=[]), "training")


def test_sizes_that_differ_much_are_refused(pond: dict) -> None:
    first_pair = d.find_pairs(pond, "training")[0][0]
    for path in (first_pair.image, first_pair.mask):
        Image.open(path).resize((60, 60), Image.Resampling.NEAREST).save(path)
    with pytest.raises(
        UserError, match=r"padded to 60×60, its images have .* times their pixels; set resize"
    ):
        d.load_split(dict(pond, resize=[], crop=8), "training")


def test_split_of_ignored_pixels_is_refused(pond: dict) -> None:
    for mask in Path(pond["data"]).glob("*_mask.png"):
        Image.new("RGB", Image.open(mask).size, (9, 9, 9)).save(mask)
    with pytest.raises(UserError, match="ignore: leaves no pixel of the training split"):
        d.load_data(dict(pond, ignore=[9, 9, 9]))


def test_class_that_no_training_mask_has_is_refused(pond: dict, capsys) -> None:
    frogs = dict(pond, classes={**POND, "frog": [1, 1, 1]})
    with pytest.raises(UserError, match=r"training masks is frog; correct .*`resize` loses them"):
        d.load_data(frogs)  # which has a resize
    training, _ = d.load_data(dict(frogs, limit_images=2))
    assert len(training.names) == 2
    assert "the chosen training masks have no frog" in capsys.readouterr().err
    # 255, which is the lily, as an error might advise.
    hidden = dict(pond, mask_format="indices", ignore=[255])
    with pytest.raises(UserError, match="is lily; if 255 is its colour, remove ignore"):
        d.load_data(hidden)
