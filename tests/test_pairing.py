"""Tests of tools/pairing.py through describe: which mask belongs to which image, by their names."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from made_photos import N, draw, read_masks, save, write_config, write_set

from common import UserError
from tools.layout import find_layout, propose_group


@pytest.mark.parametrize(
    ("image", "mask", "arguments", "image_pattern", "mask_pattern"),
    [
        ("a/{}.JPG", "b/{}.png", ("a", "b"), "a/*.jpg", "b/*.png"),
        ("a/img{}.png", "b/mask{}.png", ("a", "b"), "a/img*.png", "b/mask*.png"),
        ("a/x_{}.png", "b/gt_x_{}.png", ("a", "b/*.png"), "a/*.png", "b/gt_*.png"),
        ("a/{}.tif", "a/{}_mask.tif", ("a", "a"), "a/*.tif", "a/*_mask.tif"),
        ("a/{}.png", "a/masks/{}.png", ("a", "a/masks"), "a/*.png", "a/masks/*.png"),
        ("c {}/image.png", "c {}/mask.png", (".", "."), "*/image.png", "*/mask.png"),
        ("p{}/raw/1.png", "p{}/seg/1.png", (".", "."), "*/raw/1.png", "*/seg/1.png"),
        (
            "left/x/city_{:06}_left8bit.png",
            "gt/x/city_{:06}_gt_labelIds.png",
            (".", "."),
            "left/x/*_left8bit.png",
            "gt/x/*_gt_labelIds.png",
        ),
    ],
)
def test_pairs_are_found_by_their_names(
    tmp_path: Path,
    image: str,
    mask: str,
    arguments: tuple[str, str],
    image_pattern: str,
    mask_pattern: str,
) -> None:
    pixels, values = draw(0, 24, 32)
    for i in range(N):
        save(tmp_path / image.format(i), pixels)
        save(tmp_path / mask.format(i), values)
    config, _ = write_config(tmp_path, *arguments)
    root = Path(config["data"]).relative_to(tmp_path)
    assert (root / config["images"], root / config["masks"]) == (
        Path(image_pattern),
        Path(mask_pattern),
    )
    assert len(read_masks(config)) == N


def test_endings_are_mixed_and_folders_of_any_depth(tmp_path: Path) -> None:
    pixels, values = draw(0, 24, 32)
    for i, name in enumerate(("0.jpg", "1.JPG", "x/2.png", "x/y/3.jpeg")):
        save(tmp_path / "photos" / name, pixels + i)
        save((tmp_path / "labels" / name).with_suffix(".png"), values)
    (tmp_path / "photos/Thumbs.db").write_text("no image")
    config, _ = write_config(tmp_path)
    assert config["images"] == "photos/**/*.{jpeg,jpg,png}"
    assert config["masks"] == "labels/**/*.png"
    assert len(read_masks(config)) == 4


@pytest.mark.parametrize("path", ["{}", "~/{}"])
@pytest.mark.parametrize(("train", "val"), [("train", "val"), ("Train", "Val"), ("TRAIN", "VAL")])
def test_other_splits_lie_beside_any_path_of_the_training_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, train: str, val: str
) -> None:
    pixels, values = draw(0, 24, 32)
    for start, split in ((0, train), (10, val)):
        for i in range(6):
            save(tmp_path / f"set/{split}/{start + i}.png", pixels)
            save(tmp_path / f"set/{split}annot/{start + i}.png", values)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    layout = find_layout(path.format(f"set/{train}"), path.format(f"set/{train}annot"))
    assert layout.split_folders == [train, val] and len(layout.pairs) == 12


@pytest.mark.parametrize("name", ["test{}/1.png", "test_{}.png"])
def test_numbered_tests_are_no_splits(tmp_path: Path, name: str) -> None:
    pixels, values = draw(0, 24, 32)
    for i in range(3):
        save(tmp_path / "photos" / name.format(i), pixels)
        save(tmp_path / "labels" / name.format(i), values)
    config, _ = write_config(tmp_path)
    assert "{split}" not in config["images"] and len(read_masks(config)) == 3


@pytest.mark.parametrize("folder", ["", "train"])  # given the root, or the training folder alone
def test_split_folders_are_found(tmp_path: Path, folder: str) -> None:
    pixels, values = draw(0, 24, 32)
    for start, split in ((0, "train"), (10, "val"), (20, "test")):
        for i in range(6):
            save(tmp_path / f"set/{split}/v{i // 2}_{start + i}.png", pixels)
            save(tmp_path / f"set/{split}annot/v{i // 2}_{start + i}.png", values)
    masks = f"set/{folder}annot" if folder else "set"
    config, text = write_config(tmp_path, f"set/{folder}", masks)
    assert (config["images"], config["masks"]) == ("{split}/*.png", "{split}annot/*.png")
    assert config["split_folders"] == ["train", "val", "test"]
    assert config["group"] == "^[^_]+" and "3 groups" in text
    assert "# To decide: group v0 has images in training and validation and testing, v1 " in text


def test_images_alone_may_lie_in_folders_of_splits(tmp_path: Path) -> None:
    pixels, values = draw(0, 24, 32)
    for start, split in ((0, "train"), (10, "val"), (20, "test")):
        for i in range(start, start + 6):
            save(tmp_path / f"set/images/{split}/{i}.jpg", pixels)
            save(tmp_path / f"set/masks/{i}_mask.png", values)
    config, _ = write_config(tmp_path, "set/images", "set/masks")
    assert (config["images"], config["masks"]) == ("images/{split}/*.jpg", "masks/*_mask.png")
    assert config["split_folders"] == ["train", "val", "test"]
    assert len(read_masks(config)) == 18


def test_groups_of_one_split_each_are_no_doubt(tmp_path: Path) -> None:
    pixels, values = draw(0, 24, 32)
    for number, split in enumerate(("train", "val")):
        for i in range(6):
            save(tmp_path / f"set/{split}/{number}{i // 2}_{i}.png", pixels)
            save(tmp_path / f"set/{split}annot/{number}{i // 2}_{i}.png", values)
    config, text = write_config(tmp_path, "set", "set")
    assert config["split_folders"] == ["train", "val"] and "6 groups" in text
    assert "has images in" not in text


def test_the_name_of_a_split_is_no_group(tmp_path: Path) -> None:
    pixels, values = draw(0, 24, 32)
    for split in ("train", "valid", "test"):
        for i in range(4):
            save(tmp_path / f"set/{split}/{split}_{i}.png", pixels)
            save(tmp_path / f"set/{split}annot/{split}_{i}.png", values)
    config, _ = write_config(tmp_path, "set", "set")
    assert config["split_folders"] == ["train", "valid", "test"] and config["group"] == ""


def test_names_that_share_a_part_are_proposed_as_groups() -> None:
    frames = [f"{video}/{i}" for video in "abc" for i in range(4)]
    assert propose_group(frames)[0] == "^[^/]+"
    assert propose_group([name.replace("/", "_") for name in frames])[0] == "^[^_]+"
    assert propose_group(["scan_" + name.replace("/", "_") for name in frames])[0] == "^.*(?=_)"
    assert propose_group([f"scan_{i}" for i in range(9)])[0] == ""


@pytest.mark.parametrize("stray", ["photos/rejected/x.png", "labels/preview/x.png"])
def test_a_stray_image_below_the_others_changes_nothing(tmp_path: Path, stray: str) -> None:
    write_set(tmp_path, np.arange(3, dtype=np.uint8))
    save(tmp_path / stray, draw(0)[0])
    config, text = write_config(tmp_path)
    assert (config["images"], config["masks"]) == ("photos/*.png", "labels/*.png")
    assert "1 files are in no pair" in text or "1 files have no partner" in text
    assert len(read_masks(config)) == N


def test_files_without_partner_are_told(tmp_path: Path) -> None:
    write_set(tmp_path, np.array([0, 1, 2], np.uint8))
    (tmp_path / "labels/003.png").unlink()
    _, text = write_config(tmp_path)
    assert f"1 files have no partner, as {tmp_path}/photos/003.png" in text

    for path in (tmp_path / "photos").iterdir():
        path.rename(path.with_name(f"{path.stem}b-{7 * int(path.stem) + 100}.png"))
    (tmp_path / "own.yaml").unlink()
    with pytest.raises(UserError, match=r"names do not fit, as 000b-100\.png and 000\.png"):
        write_config(tmp_path)


def test_other_splits_with_other_names_are_left_out(tmp_path: Path) -> None:
    """As in DRIVE, where the file names have the split in them."""
    pixels, values = draw(0, 24, 32)
    for start, split in ((0, "test"), (20, "training")):
        for i in range(start, start + N):
            save(tmp_path / f"{split}/images/{i:02}_{split}.tif", pixels)
            save(tmp_path / f"{split}/manual/{i:02}_manual1.png", values)
    save(tmp_path / "val/images/1.png", pixels)
    (tmp_path / "val/manual").mkdir()  # no masks yet
    config, text = write_config(tmp_path, "training/images", "training/manual")
    assert config["data"] == str(tmp_path / "training")
    assert config["images"] == "images/*_training.tif"
    assert f"{2 * N} files are in no pair, as {tmp_path}/test/" in text
    assert len(read_masks(config)) == N


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match="nowhere: there is no such folder; give a folder"):
        write_config(tmp_path, "nowhere", "photos")
    with pytest.raises(UserError, match=r"photos/\{split\}: has no images; give a folder"):
        write_config(tmp_path, "photos/{split}", "photos")


def test_names_that_fit_by_chance_are_refused(tmp_path: Path) -> None:
    """Each patient's images go with the masks of patient 4: the names hold both numbers."""
    pixels, values = draw(0, 24, 32)
    for patient in range(1, 5):
        for slice_number in range(1, 6):
            image = f"p{patient:02}_s{slice_number:02}.png"
            save(tmp_path / "photos" / image, pixels)
            save(tmp_path / f"labels/s{slice_number:02}_p{patient:02}.png", values)
    with pytest.raises(UserError, match="names do not fit"):
        write_config(tmp_path)


def test_names_that_look_alike_are_the_same(tmp_path: Path) -> None:
    """Macs write ä as an a and its dots."""
    pixels, values = draw(0, 24, 32)
    for i in range(N):
        name = f"{('Bär', 'Mäuse', 'Hund')[i % 3]}{i}ü.png"
        save(tmp_path / "photos" / unicodedata.normalize("NFD", name), pixels)
        save(tmp_path / "labels" / unicodedata.normalize("NFC", name), values)
    config, _ = write_config(tmp_path)
    assert len(read_masks(config)) == N
