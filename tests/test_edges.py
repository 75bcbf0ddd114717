"""The smallest and emptiest inputs: what is defined works, what is not is one line.

A batch of one trains as long as its deepest features have more than one pixel; a class without
a pixel has no score and is left out of the means; one channel and one pixel are images, too.
"""

import json
import math
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from box import CLASSES, PALETTE, ROOT, save
from conftest import config_for

import data as data_module
from checkpoint import load_checkpoint
from config import load_config
from data import load_split
from errors import UserError
from evaluate import comparison_table, evaluate_checkpoint
from generate import SPLITS
from train import train

SHALLOW = ["encoder=[[4, 3]]", "decoder=[[6, 3]]"]


def make_set(root: Path, masks: list[np.ndarray]) -> Path:
    """A data set whose three splits hold these masks of class indices, and images of noise."""
    rng = np.random.default_rng(0)
    for split in SPLITS:
        for number, mask in enumerate(masks):
            name = f"{number:06d}.png"
            save(root / split / "image" / name, rng.integers(0, 256, (*mask.shape, 3)))
            save(root / split / "gt_image" / f"gt_{name}", PALETTE[mask])
    return root


def config_of(data: Path, *overrides: str) -> dict:
    values = [f"data={data}", "device=cpu", "precision=float32", "batch_size=2", "epochs=2"]
    return load_config([ROOT / "configs/default.yaml"], [*values, *SHALLOW, *overrides])


def run(config: dict, folder: Path) -> dict:
    """Train, check that all is finite, and return the row of the test split."""
    train(config, folder / "run", resume=False)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    assert len(history) == config["epochs"]
    for entry in history:
        assert all(math.isfinite(entry[split]["loss"]) for split in ("training", "validation"))
    best = load_checkpoint(folder / "run" / "best.pt", torch.device("cpu"))
    assert all(torch.isfinite(value).all() for value in best["model"].values())
    row = evaluate_checkpoint(folder / "run" / "best.pt", None, "testing", "cpu")
    assert "mean IoU" in comparison_table([row])
    return row


def patches(side: int = 8, count: int = 3, classes: int = 4) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, classes, (side, side)) for _ in range(count)]


# ---- batches


def test_batch_of_one(tmp_path: Path) -> None:
    assert run(config_of(make_set(tmp_path / "set", patches()), "batch_size=1"), tmp_path)


@pytest.mark.parametrize("count", [1, 3])
def test_batch_larger_than_the_split(tmp_path: Path, count: int) -> None:
    data = make_set(tmp_path / "set", patches(count=count))
    assert run(config_of(data, "batch_size=32"), tmp_path)["images"] == count


def test_batch_larger_than_the_split_goes_round_it(tmp_path: Path) -> None:
    data = make_set(tmp_path / "set", patches(count=2))
    run(config_of(data, "batch_size=5", "images_per_epoch=11"), tmp_path)
    last = load_checkpoint(tmp_path / "run" / "last.pt", torch.device("cpu"))
    assert last["step"] == 6 and last["history"][-1]["images_seen"] == 22


# An epoch of three images in batches of two ends in a batch of one as well.
@pytest.mark.parametrize(("side", "batch_size"), [(2, 1), (1, 1), (2, 2)])
def test_batch_of_one_value_per_channel_is_refused(
    tmp_path: Path, side: int, batch_size: int
) -> None:
    """Batch norm has no variance there; a whole epoch must not pass before that is said."""
    data = make_set(tmp_path / "set", patches(side))
    with pytest.raises(UserError) as caught:
        train(config_of(data, f"batch_size={batch_size}"), tmp_path / "run", resume=False)
    [message] = str(caught.value).splitlines()
    assert f"batch_size: {batch_size}" in message and "batch norm" in message
    assert not (tmp_path / "run").exists()


def test_batch_of_one_is_judged_by_the_training_images(tmp_path: Path) -> None:
    """Those of the other splits may have another size; one long side is enough."""
    data = make_set(tmp_path / "set", [np.zeros((2, 8), int)] * 2)
    run(config_of(data, "batch_size=1"), tmp_path)
    small = make_set(tmp_path / "small", patches(side=2))
    shutil.rmtree(small / "validation")
    shutil.copytree(data / "validation", small / "validation")
    with pytest.raises(UserError, match="batch_size"):
        train(config_of(small, "batch_size=1"), tmp_path / "other", resume=False)


def test_one_pixel_images(tmp_path: Path) -> None:
    data = make_set(tmp_path / "set", patches(side=1, count=4))
    row = run(config_of(data), tmp_path)
    assert row["images"] == sum(map(sum, row["confusion_matrix"])) == 4


# ---- classes


def test_class_absent_from_the_whole_data_set(tmp_path: Path) -> None:
    data = make_set(tmp_path / "set", patches(classes=3))  # no circle
    row = run(config_of(data, "loss={cross_entropy: 1, dice_per_class: 1}"), tmp_path)
    predicted = np.array(row["confusion_matrix"]).sum(axis=0)[3]
    assert row["per_class_iou"]["circle"] == (0 if predicted else None)
    assert "circle" not in row["dead_classes"]  # dead is what is there and never predicted
    present = [iou for iou in row["per_class_iou"].values() if iou is not None]
    assert row["mean_iou"] == pytest.approx(sum(present) / len(present))


@pytest.mark.parametrize("loss", ["cross_entropy", "dice_pooled", "dice_per_class"])
def test_masks_of_background_only(tmp_path: Path, loss: str) -> None:
    data = make_set(tmp_path / "set", [np.zeros((8, 8), int)] * 3)
    more = ("crop=4", "crop_on_objects=1", f"loss={{{loss}: 1}}")  # nothing to place a crop on
    row = run(config_of(data, *more), tmp_path)
    background, *others = row["per_class_iou"].values()
    assert row["pixel_accuracy"] == background  # there is nothing else to be right about
    assert all(iou in (0, None) for iou in others)
    assert set(row["dead_classes"]) <= {"background"}


def test_two_classes_are_enough_and_one_is_not(tmp_path: Path) -> None:
    data = make_set(tmp_path / "set", patches(classes=2))
    two = "classes={background: [0, 0, 0], square: [255, 0, 0]}"
    row = run(config_of(data, two), tmp_path)
    assert list(row["per_class_iou"]) == ["background", "square"]
    with pytest.raises(UserError, match="classes: needs 2 to 255"):
        config_of(data, "classes={background: [0, 0, 0]}")


# ---- images


@pytest.mark.parametrize("changes", [("blur_kernel=17",), ("crop=2",)])
def test_blur_wider_than_the_image_is_refused(tmp_path: Path, changes: tuple[str, ...]) -> None:
    """The border is mirrored for it, so a picture must be wider than half the kernel."""
    data = make_set(tmp_path / "set", patches())
    with pytest.raises(UserError, match="blur_kernel"):
        train(config_of(data, "blur=1", *changes), tmp_path / "run", resume=False)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(tmp_path: Path, channels: int) -> None:
    data = make_set(tmp_path / "set", patches())
    more = ("blur=1", "jitter=1", "vertical_flip=0.5", f"in_channels={channels}")
    assert run(config_of(data, *more), tmp_path)["images"] == 3
    assert load_split(
        config_for(data, classes=CLASSES, in_channels=channels), "training"
    ).images.shape == (3, channels, 8, 8)


def test_images_that_are_not_square_and_of_odd_sides(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    data = make_set(tmp_path / "set", [rng.integers(0, 4, (5, 9)) for _ in range(2)])
    row = run(config_of(data, "blur=1", "crop=4", "horizontal_flip=1"), tmp_path)
    assert sum(map(sum, row["confusion_matrix"])) == 2 * 5 * 9


def test_data_larger_than_memory_train_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process may take 300 MB more than it has; its data set has twice the machine's memory.

    Files with holes stand in for the cache, so that they need no space on the disk either.
    """
    side = 8192
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    count = 2 * memory // (3 * side**2)
    data = make_set(tmp_path / "set", patches(count=1))
    for number in range(1, count):
        (data / "training" / "image" / f"{number:06d}.png").touch()
        (data / "training" / "gt_image" / f"gt_{number:06d}.png").touch()
    build = data_module._build_cache

    def build_holes(cache: Path, pairs: list, *args: object) -> None:
        if len(pairs) == 1:
            return build(cache, pairs, *args)
        cache.mkdir()
        for name, shape in (("images", (count, 3, side, side)), ("masks", (count, side, side))):
            with open(cache / f"{name}.npy", "wb") as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(file.tell() + math.prod(shape))
        (cache / "digest").write_text("0" * 64)
        return None

    monkeypatch.setattr(data_module, "_build_cache", build_holes)
    status = Path("/proc/self/status").read_text().split()
    used = 1024 * int(status[status.index("VmData:") + 1])
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + 300 * 2**20, before[1]))
    try:
        with pytest.raises(MemoryError):  # the limit binds
            np.ones(600 * 2**20, np.uint8)
        config = config_of(data, "crop=16", "images_per_epoch=32", "batch_size=8")
        assert run(config, tmp_path)["images"] == 1
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def test_split_of_one_image_that_is_not_in_the_others(tmp_path: Path) -> None:
    """Validation and test splits may be smaller than the pictures and batches made of them."""
    data = make_set(tmp_path / "set", patches(count=4))
    for split in ("validation", "testing"):
        for path in sorted((data / split).rglob("*.png"))[1:]:
            if not path.name.endswith("000000.png"):
                path.unlink()
    row = run(config_of(data), tmp_path)
    assert row["images"] == 1
    shutil.rmtree(tmp_path / "run")
