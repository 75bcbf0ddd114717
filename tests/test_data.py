"""Tests of data.py, tools/check.py and pictures: pairs, splits, the cache, damaged files."""

import shutil
from pathlib import Path

from common import ROOT, SPLITS, UserError

import numpy as np
import pytest
import torch
from conftest import config_for, corruptions
from PIL import Image

import data as d
from evaluate import evaluate_checkpoint
from figures import colourise, overlay, thumbnail
from metrics import IGNORE
from tools import compare
from train import load_data

TWO = {"water": [0, 0, 0], "lily": [255, 255, 255]}


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
            size = (10 + day % 2, 12)
            pixels = rng.integers(0, 256, (*size, 3), np.uint8)
            mask = rng.integers(0, 2, size).astype(np.uint8) * 255
            Image.fromarray(pixels).save(tmp_path / f"day{day}_{i}.png")
            Image.fromarray(mask).save(tmp_path / f"day{day}_{i}_mask.png")
    keys = {"images": "*.png", "masks": "*_mask.png", "group": "^[^_]+", "classes": TWO}
    return config_for(tmp_path, **keys, resize=[16, 12])


def test_split_holds_the_files_as_they_are(dataset: Path) -> None:
    config = config_for(dataset)
    split = d.load_split(config, "training")
    images = sorted((dataset / "training/image").iterdir())
    assert split.names == [path.stem for path in images]
    assert split.groups == [path.stem[:6] for path in images]
    classes = np.array(list(config["classes"].values()))
    for i, path in enumerate(images):
        mask = dataset / "training/gt_image" / f"gt_{path.name}"
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert np.array_equal(split.images[i].numpy().transpose(1, 2, 0), pixels)
        assert np.array_equal(classes[split.masks[i].numpy()], np.asarray(Image.open(mask)))


def test_random_splits_share_no_group(pond: dict) -> None:
    splits = {split: d.load_split(pond, split) for split in SPLITS}
    groups = [set(split.groups) for split in splits.values()]
    assert sorted(map(len, groups)) == [1, 1, 7] and len(set.union(*groups)) == 9
    assert sum(len(split.names) for split in splits.values()) == 18
    assert all(split.images.shape[2:] == (16, 12) for split in splits.values())


def test_limits_are_evenly_spaced(dataset: Path) -> None:
    split = d.load_split(config_for(dataset), "training")
    few, short = load_data(config_for(dataset, limit_groups=2, limit_images=4, limit_validation=5))
    assert sorted(set(few.groups)) == [min(split.groups), max(split.groups)]
    assert few.names[0] == split.names[0] and few.names[-1] == split.names[-1]
    assert len(few.names) == len(few.images) == len(few.masks) == 4 < len(short.masks) == 5
    assert d.limit(split) is split and d.evenly(10, 4) == [0, 3, 6, 9]


def test_cache_is_made_once_and_again_when_a_file_changes(root: Path) -> None:
    config = config_for(root)
    first = d.load_split(config, "testing")
    [cache] = root.glob(".cache/testing-*")
    assert d.load_split(config, "testing").digest == first.digest
    image = sorted((root / "testing/image").iterdir())[0]
    Image.new("RGB", (32, 32), "red").save(image)
    second = d.load_split(config, "testing")
    assert second.digest != first.digest and (second.images[0, 0] == 255).all()
    assert [*root.glob(".cache/testing-*")] != [cache] and not cache.exists()


def test_configs_of_one_folder_keep_their_caches(pond: dict) -> None:
    others = [{"split_shares": [0.5, 0.25, 0.25]}, {"group": ""}, {"classes": TWO | {"x": [1] * 3}}]
    others.append({"images": "d*.png", "masks": "d*_mask.png"})
    configs = [pond, *(pond | other for other in others)]
    first = [d.load_split(config, "training").digest for config in configs]
    caches = {p: p.stat().st_mtime_ns for p in Path(pond["data"]).glob(".cache/training-*")}
    assert [d.load_split(config, "training").digest for config in configs] == first
    assert len(caches) == 5 and all(p.stat().st_mtime_ns == time for p, time in caches.items())


def test_data_in_a_read_only_folder(root: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(d, "ROOT", tmp_path / "project")
    monkeypatch.setattr(d.os, "access", lambda path, mode: False)
    d.load_split(config_for(root), "testing")
    assert not (root / ".cache").exists()
    assert list((tmp_path / "project/data/.cache").glob("testing-*"))


def save(path: Path, pixels: list | np.ndarray, mode: str | None = None) -> Path:
    Image.fromarray(np.array(pixels, np.uint8), mode).save(path)
    return path


def test_masks_of_indices_and_ignored_pixels(tmp_path: Path) -> None:
    config = config_for(tmp_path, mask_format="indices", ignore=[255])
    expected = [[0, 1, 2], [3, 255, 0]]
    grey = save(tmp_path / "a.png", expected)
    rgb = save(tmp_path / "b.png", np.array(expected)[..., None].repeat(3, 2))
    palette = Image.fromarray(np.array(expected, np.uint8), "P")
    palette.putpalette(list(range(255, -1, -1)) * 3)
    palette.save(tmp_path / "c.png")
    for path in (grey, rgb, tmp_path / "c.png"):
        assert d.read_mask(path, config).tolist() == expected
    colours = save(tmp_path / "d.png", [[[9, 9, 9], [255, 0, 0]]])
    assert d.read_mask(colours, config_for(tmp_path, ignore=[9, 9, 9])).tolist() == [[IGNORE, 1]]


@pytest.mark.parametrize(
    ("pixels", "keys", "says"),
    [
        ([[[0, 0, 0], [9, 8, 7]]], {}, r"1 pixels are of no class, .* \[9, 8, 7\] at x=1"),
        ([[0, 1, 2]], {}, "set mask_format: indices"),
        ([[[255, 0, 0]]], {"mask_format": "indices"}, "set mask_format: colours"),
        ([[0, 255]], {"mask_format": "indices"}, r"set ignore: \[255\]"),
    ],
)
def test_unfit_mask_says_what_to_set(tmp_path: Path, pixels: list, keys: dict, says: str) -> None:
    path = save(tmp_path / "m.png", pixels)
    with pytest.raises(UserError, match=f"{path}: .*{says}"):
        d.read_mask(path, config_for(tmp_path, **keys))


def test_images_of_any_kind(tmp_path: Path) -> None:
    half = save(tmp_path / "a.png", [[[255, 0, 0, 255], [0, 0, 0, 0]]], "RGBA")
    assert d.read_image(half, 3).tolist() == [[[255, 0, 0], [255, 255, 255]]]  # shown on white
    assert d.read_image(half, 4)[0, 1, 3] == 0
    assert d.read_image(half, 1).shape == (1, 2, 1)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (4, 2)).save(tmp_path / "b.jpg", exif=exif)
    assert d.read_image(tmp_path / "b.jpg", 3).shape == (4, 2, 3)
    Image.fromarray(np.zeros((2, 2), np.uint16)).save(tmp_path / "c.png")
    with pytest.raises(UserError, match=r"c\.png: has (16 bits|pixels of mode)"):
        d.read_image(tmp_path / "c.png", 3)


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_damaged_image_or_mask_is_one_line(dataset: Path, tmp_path: Path, kind: str) -> None:
    pair = d.find_pairs(config_for(dataset), "testing")[0][0]
    path, config = tmp_path / "bad.png", config_for(dataset)
    for content in corruptions((pair.image if kind == "image" else pair.mask).read_bytes()):
        path.write_bytes(content)
        try:
            found = d.read_image(path, 3) if kind == "image" else d.read_mask(path, config)
            assert found.dtype == np.uint8 and found.ndim == (3 if kind == "image" else 2)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"images": "photos"}, "images, masks: must be paths"),
        ({"classes": {"a": [0, 0, 0]}}, "classes, ignore"),
        ({"ignore": [255, 0, 0]}, "classes, ignore"),
        ({"resize": [4]}, "resize"),
        ({"group": "("}, "group"),
        ({"data": "nowhere"}, r"nowhere/.*: no such folder; run make data"),
    ],
)
def test_bad_keys_are_named(dataset: Path, keys: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        d.load_split(config_for(dataset) | keys, "training")


def test_check_lists_everything(root: Path, tmp_path: Path, call) -> None:
    code, out, _ = call(d.main, "check", root, "--picture", tmp_path / "good.png")
    assert code == 0 and "problem" not in out
    assert Image.open(tmp_path / "good.png").width > 500
    first, second, third, *_ = sorted((root / "training/image").iterdir())
    for path in (first, *sorted((root / "validation/gt_image").iterdir())[:2]):
        path.unlink()
    second.write_bytes(b"no image")
    Image.new("RGB", (9, 9)).save(sorted((root / "testing/image").iterdir())[0])
    copied = "999999_square_red_000001.png"  # a name that no split has
    shutil.copy(third, root / "testing/image" / copied)
    mask = root / "training/gt_image" / f"gt_{third.name}"
    shutil.copy(mask, root / "testing/gt_image" / f"gt_{copied}")
    code, out, error = call(d.main, "check", root)
    assert code == 2 and error.endswith("6 problem(s), listed above; fix them\n")
    assert out.count("problem: ") == 6
    same = f"{copied}: is also in training ({third})"
    for said in (f"gt_{first.name}: has no", f"{second}: cannot be read", "9×9", same):
        assert out.count(said) == 1, said
    with pytest.raises(UserError, match=r"\.png: has no .*gt_.* \(and 1 more"):
        d.load_split(config_for(root), "validation")


def test_two_sizes_and_splits_of_ignored_pixels_are_refused_at_once(pond: dict) -> None:
    with pytest.raises(UserError, match="set `resize`"):
        d.load_split(pond | {"resize": []}, "training")
    assert not list(Path(pond["data"]).glob(".cache/training*"))
    for mask in Path(pond["data"]).glob("*_mask.png"):
        Image.new("RGB", Image.open(mask).size, (9, 9, 9)).save(mask)
    with pytest.raises(UserError, match="ignore: leaves no pixel of the training split"):
        load_data(pond | {"ignore": [9, 9, 9]})


def test_unknown_command_is_named(call) -> None:
    code, _, error = call(d.main, "fetch")
    assert code == 2 and "generate, download, check" in error


def test_pictures() -> None:
    classes = {"a": [0, 0, 0], "b": [255, 0, 0]}
    image = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    mask = torch.tensor([[0, 1], [IGNORE, 0]], dtype=torch.uint8)
    assert colourise(mask, classes)[:, 0, 1].tolist() == [255, 0, 0]
    over = overlay(image, mask, classes)
    assert over[:, 0, 0].tolist() == [100] * 3 and over[:, 0, 1].tolist() == [177, 50, 50]
    assert max(thumbnail(torch.zeros(3, 999, 500, dtype=torch.uint8)).shape) <= 160


def test_compare_measures_masks_and_models(dataset: Path, root: Path, call) -> None:
    masks = torch.zeros(3, 20, 20, dtype=torch.uint8)
    masks[0, 2:6, 10:15] = 1  # 20 pixels around (12, 3.5), beside another shape
    masks[0, 2:6, 16:18] = 2
    masks[1, 4:8, 1:6] = 1  # alone
    assert compare.describe(masks, 1) == {
        **{"in images": "0.667", "of all pixels": "0.0333"},  # 40 of 1200
        "pixels: median (5–95 %)": "20 (20–20)",
        **{"x: median (5–95 %)": "8 (3–12)", "y: median (5–95 %)": "4 (4–5)"},  # of 3 and 12
        "touches another": "0.500",
    }
    assert compare.describe(masks, 3) == {"in images": "0.000", "of all pixels": "0.0000"}
    splits = ("testing", "validation")  # of one set is what the other has the other way round
    for old, new in (("testing", "x"), ("validation", "testing"), ("x", "validation")):
        (root / old).rename(root / new)
    weights = ROOT / "weights/best.pt"
    code, out, error = call(compare.main, dataset, root, "--models", weights, weights)
    rows = (evaluate_checkpoint(weights, str(dataset), s, torch.device("cpu"))[0] for s in splits)
    scores = [f"{row['mean_iou']:.4f}" for row in rows]
    assert code == 0 and scores[0] != scores[1], error
    assert [line.split()[-2:] for line in out.splitlines()[-2:]] == [scores, scores]
