"""Tests of tools/describe.py, and of tools/pairing.py and tools/meaning.py, on small real files."""

import argparse
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from common import SPLITS, UserError
from config import load_config
from images import read_mask, read_pair
from metrics import IGNORE
from pairs import find_pairs
from tools import describe
from tools.meaning import Examined, collect, run_lengths
from tools.pairing import propose_group

N = 12
LARGE = np.array([1, 0, 2], np.uint8)  # makes the background a class, and the disc the background
BLACK_RED_BLUE = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)


def draw(seed: int, height: int = 96, width: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Draw a disc (class 1) and a bar (class 2) on noise: (H, W, 3) image, (H, W) mask, uint8."""
    random = np.random.default_rng(seed)
    image = random.integers(40, 90, (height, width, 3)).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    y, x = np.mgrid[:height, :width]
    mask[(y - height // 2) ** 2 + (x - width // 2 - seed) ** 2 <= (height // 8) ** 2] = 1
    mask[: height // 6, seed : seed + width // 4] = 2
    image[mask == 1] = (220, 60, 60)
    image[mask == 2] = (60, 60, 220)
    return image, mask


def save(path: Path, pixels: np.ndarray | Image.Image, **options: object) -> None:
    """Save an image, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)


def write_set(root: Path, values: np.ndarray, image_ending: str = "png") -> None:
    """Write `photos` and `labels`, whose classes 0, 1, 2 have the given values or colours."""
    for i in range(N):
        image, mask = draw(i)
        save(root / f"photos/{i:03}.{image_ending}", image)
        save(root / f"labels/{i:03}.png", values[mask])


def write_config(root: Path, images: str = "photos", masks: str = "labels") -> tuple[dict, str]:
    """Call describe for two paths below a folder; the config that it wrote, and its text."""
    parser = argparse.ArgumentParser()
    describe.add_arguments(parser)
    out = root / "own.yaml"
    paths = ["--images", str(root / images), "--masks", str(root / masks), "--out", str(out)]
    describe.main(parser.parse_args(paths))
    return load_config([out]), out.read_text()


def read_masks(config: dict) -> list[np.ndarray]:
    """Read all masks of a config, in the order of their names; fails if one cannot be used."""
    pairs = []
    for split in SPLITS:
        split_pairs, problems = find_pairs(config, split)
        assert not problems
        pairs += split_pairs
    masks = []
    for pair in sorted(pairs, key=lambda pair: pair.name):
        read_pair(pair.image, pair.mask, config)
        masks.append(read_mask(pair.mask, config))
    return masks


# ---- names


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


def test_groups_of_one_split_each_are_no_doubt(tmp_path: Path) -> None:
    pixels, values = draw(0, 24, 32)
    for number, split in enumerate(("train", "val")):
        for i in range(6):
            save(tmp_path / f"set/{split}/{number}{i // 2}_{i}.png", pixels)
            save(tmp_path / f"set/{split}annot/{number}{i // 2}_{i}.png", values)
    config, text = write_config(tmp_path, "set", "set")
    assert config["split_folders"] == ["train", "val"] and "6 groups" in text
    assert "has images in" not in text


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


# ---- values of masks


def test_runs_are_measured_along_rows() -> None:
    numbers = np.array([[5, 5, 7], [7, 7, 7]])
    assert run_lengths(numbers).tolist() == [[2, 2, 1], [3, 3, 3]]


@pytest.mark.parametrize(
    ("values", "mask_format", "colours"),
    [
        (np.array([0, 1, 2], np.uint8), "indices", None),
        (np.array([1, 2, 3], np.uint8), "indices", None),  # ignore: [0], which no mask has
        (np.array([0, 7, 26], np.uint8), "colours", [[0, 0, 0], [26, 26, 26], [7, 7, 7]]),
        (np.array([0, 255, 0], np.uint8), "colours", [[0, 0, 0], [255, 255, 255]]),
        (BLACK_RED_BLUE, "colours", [[0, 0, 0], [0, 0, 255], [255, 0, 0]]),
    ],
)
def test_values_become_classes(
    tmp_path: Path, values: np.ndarray, mask_format: str, colours: list | None
) -> None:
    write_set(tmp_path, values)
    config, _ = write_config(tmp_path)
    assert config["mask_format"] == mask_format
    if colours is not None:  # the bar is larger than the disc
        assert list(config["classes"].values()) == colours
    own_class = [0, 1, 2]
    if mask_format == "colours":
        own_class = [colours.index(np.broadcast_to(value, 3).tolist()) for value in values]
    for i, mask in enumerate(read_masks(config)):
        assert (mask == np.array(own_class)[draw(i)[1]]).all()


def test_outlines_are_ignored(tmp_path: Path) -> None:
    write_set(tmp_path, np.array([0, 1, 2], np.uint8))
    for path in (tmp_path / "labels").iterdir():
        mask = np.array(Image.open(path))
        mask[:, 60:64] = 255
        save(path, mask)
    config, text = write_config(tmp_path)
    assert config["ignore"] == [255] and len(config["classes"]) == 3
    assert "3.1 % of the pixels: outlines, 4 pixels wide" in text
    assert all((mask[:, 60:64] == IGNORE).all() for mask in read_masks(config))


@pytest.mark.parametrize("has_border", [False, True])
def test_a_class_that_may_be_no_label_can_be_ignored(tmp_path: Path, has_border: bool) -> None:
    write_set(tmp_path, np.array([0, 1, 2], np.uint8))
    for path in (tmp_path / "labels").iterdir():
        mask = np.array(Image.open(path))
        mask[80:, :20] = 3
        mask[80:, 20:40] = 4
        mask[:, 60:64] = 255 if has_border else 0
        save(path, mask)
    config, text = write_config(tmp_path)
    assert len(config["classes"]) == 5
    if has_border:
        assert config["ignore"] == [255] and "# ignore:" not in text
        assert "set ignore: [4, 255] and remove its class" in text
        return
    lines = text.splitlines()
    [place] = [i for i, line in enumerate(lines) if line.startswith("# ignore: [4]  ")]
    assert lines[place - 1].startswith("mask_format: ")
    assert lines[place].endswith("# use this line if 4 marks pixels without a label")
    lines[place] = lines[place].removeprefix("# ")
    [class_line] = [line for line in lines if "remove this line if you use ignore: [4]" in line]
    assert class_line.startswith("  class_4: ")
    lines.remove(class_line)
    (tmp_path / "own.yaml").write_text("\n".join(lines))
    config = load_config([tmp_path / "own.yaml"])
    assert config["ignore"] == [4] and len(config["classes"]) == 4
    assert all((mask[80:, 20:40] == IGNORE).all() for mask in read_masks(config))


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_smoothed_and_jpeg_masks_get_a_tolerance(tmp_path: Path, ending: str) -> None:
    write_set(tmp_path, BLACK_RED_BLUE)
    for path in (tmp_path / "labels").iterdir():
        mask = Image.open(path)
        path.unlink()
        if ending == "png":
            mask = mask.filter(ImageFilter.GaussianBlur(2))
        save(path.with_suffix(f".{ending}"), mask)
    config, _ = write_config(tmp_path)
    assert config["mask_tolerance"] > 64 and len(config["classes"]) == 3
    classes = np.array(list(config["classes"].values()))
    order = np.abs(classes - BLACK_RED_BLUE[:, None].astype(int)).max(axis=2).argmin(axis=1)
    for i, mask in enumerate(read_masks(config)):
        assert (mask == order[draw(i)[1]]).mean() > 0.95


def test_numbers_of_objects_become_one_class(tmp_path: Path) -> None:
    for i in range(N):
        write_set_number = np.array([0, 1000 + i, 2000 + i], np.uint16)
        image, mask = draw(i)
        save(tmp_path / f"photos/{i}.png", image)
        save(tmp_path / f"labels/{i}.png", write_set_number[mask])
    config, _ = write_config(tmp_path)
    assert config["other_values"] == "object"
    assert len(read_masks(config)) == N


def test_a_mask_counts_once_for_a_colour_that_two_of_its_numbers_have() -> None:
    """Two numbers of a palette may be one colour; another palette makes colours of both."""
    pairs = []
    for palette in ({0: 0, 1: 0xFF0000, 2: 0xFF0000}, {0: 0xFF0000, 1: 0}):
        pair = Examined(
            image=Path("a.png"),
            size=(9, 9),
            mask_size=(9, 9),
            mode="RGB",
            bits=8,
            highest=255,
            is_turned=False,
            kind="palette",
            palette=palette,
            numbers=np.array(list(palette)),
            pixels=np.full(len(palette), 10),
            thickness=np.ones(len(palette)),
            flatness=1.0,
        )
        pairs.append(pair)
    masks = collect(pairs)
    assert masks.kind == "colours"
    assert {number: value.n_masks for number, value in masks.values.items()} == {0: 2, 0xFF0000: 2}
    assert masks.values[0xFF0000].share == 30 / 50


def test_exchanged_images_and_masks_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path, np.array([0, 1, 2], np.uint8))
    with pytest.raises(UserError, match="exchange --images and --masks"):
        write_config(tmp_path, "labels", "photos")


def test_labelmes_names_of_classes_are_taken(tmp_path: Path) -> None:
    write_set(tmp_path, np.array([0, 1, 2], np.uint8))
    (tmp_path / "class_names.txt").write_text("__ignore__\n_background_\nyes\nbar: 2\n")
    config, text = write_config(tmp_path)
    assert list(config["classes"]) == ["background", "yes", "bar: 2"]
    assert "# To decide: classes: their names are those of a list beside the data" in text


# ---- images and sizes


def test_a_mask_with_numbers_below_0_is_told(tmp_path: Path) -> None:
    write_set(tmp_path, np.arange(3, dtype=np.uint8))
    below = Image.fromarray(np.full((96, 128), -1, np.int32))
    save(tmp_path / "labels/000.png", below, format="TIFF")
    _, text = write_config(tmp_path)
    assert "labels/000.png: holds numbers below 0, the lowest is -1; save 0 and more" in text


def test_channels_and_bits(tmp_path: Path) -> None:
    write_set(tmp_path, np.array([0, 1, 2], np.uint8))
    for path in (tmp_path / "photos").iterdir():
        save(path, np.array(Image.open(path).convert("L")).astype(np.uint16) * 16)
    config, text = write_config(tmp_path)
    assert config["in_channels"] == 1 and config["value_range"] == [0, 4095]
    assert "16 bits a channel" in text
    assert len(read_masks(config)) == N


@pytest.mark.parametrize("opacity", [0, 128, 255])
def test_alpha_is_a_channel_if_it_says_anything(tmp_path: Path, opacity: int) -> None:
    write_set(tmp_path, np.array([0, 1, 2], np.uint8))
    for path in (tmp_path / "photos").iterdir():
        pixels = np.array(Image.open(path).convert("RGBA"))
        pixels[..., 3] = opacity
        pixels[0, 0, 3] = 0 if opacity == 128 else opacity
        save(path, pixels)
    config, _ = write_config(tmp_path)
    assert config["in_channels"] == (4 if opacity == 128 else 3)


def test_small_objects_are_cropped_out_and_photographs_anywhere(tmp_path: Path, capsys) -> None:
    for i in range(4):
        image, mask = draw(i, 256, 384)
        small = np.zeros_like(mask)
        small[100:112, 200:212] = 1
        for folder, values in (("small", small), ("large", LARGE[mask])):
            save(tmp_path / f"{folder}/photos/{i}.png", image)
            save(tmp_path / f"{folder}/labels/{i}.png", values)
    config, _ = write_config(tmp_path / "small")
    assert (config["crop"], config["crop_on_objects"]) == (64, 1.0)
    assert next(iter(config["classes"])) == "background"
    assert f"make train-best DATA={tmp_path}/small/own.yaml\n" in capsys.readouterr().out
    config, text = write_config(tmp_path / "large")
    assert (config["crop"], config["crop_on_objects"]) == (224, 0.0)
    assert "everything is an object" in text
    assert list(config["classes"]) == ["class_0", "class_1", "class_2"]
    assert "encoder" not in text and "decoder" not in text
    assert f"make train-photos DATA={tmp_path}/large/own.yaml\n" in capsys.readouterr().out


@pytest.mark.parametrize("step", [4, 80])
def test_images_of_many_sizes_are_cropped_or_resized(tmp_path: Path, step: int) -> None:
    for i in range(5):
        image, mask = draw(i, 96 + step * i, 96 + step * i)
        save(tmp_path / f"photos/{i}.png", image)
        save(tmp_path / f"labels/{i}.png", mask)
    config, text = write_config(tmp_path)
    if step == 4:
        assert config["resize"] == [] and 0 < config["crop"] < 96
        assert "# 5 sizes, 96 to 112 wide, 96 to 112 high: crops need no resize" in text
    else:
        assert config["resize"] == [256, 256]  # the median
        assert "5 sizes, the median is 256×256" in text


def test_a_file_that_exists_is_kept(tmp_path: Path) -> None:
    write_set(tmp_path, np.array([0, 1, 2], np.uint8))
    (tmp_path / "own.yaml").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        write_config(tmp_path)
    assert (tmp_path / "own.yaml").read_text() == "mine"


def test_unreadable_files_are_told(tmp_path: Path) -> None:
    write_set(tmp_path, np.array([0, 1, 2], np.uint8))
    (tmp_path / "photos/004.png").write_bytes(b"no image")
    _, text = write_config(tmp_path)
    assert f"{tmp_path}/photos/004.png: cannot be read" in text
    for path in (tmp_path / "labels").iterdir():
        path.write_bytes(b"no image")
    (tmp_path / "own.yaml").unlink()
    with pytest.raises(UserError, match=r"12 pairs cannot be read"):
        write_config(tmp_path)
