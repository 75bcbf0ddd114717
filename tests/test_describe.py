"""Tests of tools/describe.py, tools/examine.py and tools/meaning.py, on small real files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from made_photos import BLACK_RED_BLUE, LARGE, N, draw, read_masks, save, write_config, write_set
from PIL import Image, ImageFilter

import data as data_script
from common import UserError
from config import load_config
from metrics import IGNORE
from tools import describe
from tools.examine import ExaminedPair, collect, run_lengths

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


def test_objects_on_white_are_pictured_in_black(tmp_path: Path) -> None:
    """Each object, here a strip of 16 columns, has its own colour, and none is black."""
    for i in range(N):
        image, mask = draw(i)
        numbers = np.broadcast_to(np.arange(mask.shape[1]) // 16, mask.shape)
        colours = np.array([[9 * i, 25 * number, 200] for number in range(8)], np.uint8)[numbers]
        colours[mask == 0] = 255
        save(tmp_path / f"photos/{i}.png", image)
        save(tmp_path / f"labels/{i}.png", colours)
    config, _ = write_config(tmp_path)
    assert config["other_values"] == "object"
    assert config["classes"] == {"background": [255, 255, 255], "object": [0, 0, 0]}
    assert len(read_masks(config)) == N


def test_a_mask_counts_once_for_a_colour_that_two_of_its_numbers_have() -> None:
    """Two numbers of a palette may be one colour; another palette makes colours of both."""
    pairs = []
    for palette in ({0: 0, 1: 0xFF0000, 2: 0xFF0000}, {0: 0xFF0000, 1: 0}):
        pair = ExaminedPair(
            image=Path("a.png"),
            size=(9, 9),
            mask_size=(9, 9),
            mode="RGB",
            bits=8,
            lowest=0,
            highest=255,
            mask=Path(),
            turned_alone="",
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


def test_a_palette_with_gaps_and_equal_colours_is_refused(tmp_path: Path) -> None:
    image, mask = draw(0)
    numbers = Image.fromarray(np.array([0, 7, 26], np.uint8)[mask])
    numbers.putpalette([9] * 768)
    save(tmp_path / "photos/0.png", image)
    save(tmp_path / "labels/0.png", numbers)
    with pytest.raises(
        UserError, match=r"0 and 7 have the same colour in the palette, \[9, 9, 9\]"
    ):
        write_config(tmp_path)


def test_a_list_of_too_few_names_of_classes_is_left_out(tmp_path: Path) -> None:
    write_set(tmp_path, np.array([0, 1, 2], np.uint8))
    (tmp_path / "classes.txt").write_text("class_2\nclass_1\n")
    config, text = write_config(tmp_path)
    assert list(config["classes"]) == ["background", "class_1", "class_2"]
    assert "a list beside the data" not in text
    (tmp_path / "classes.txt").write_bytes("\ufeffsky\r\ndisc\r\nbar\r\n".encode())  # of Windows
    (tmp_path / "own.yaml").unlink()
    assert list(write_config(tmp_path)[0]["classes"]) == ["sky", "disc", "bar"]


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


@pytest.mark.parametrize("kind", ["smoothed", "photograph"])
def test_one_odd_mask_does_not_decide_what_all_mean(tmp_path: Path, kind: str) -> None:
    write_set(tmp_path, BLACK_RED_BLUE)
    path = tmp_path / "labels/007.png"
    mask = Image.open(path).filter(ImageFilter.GaussianBlur(2))
    if kind == "photograph":
        mask = Image.open(tmp_path / "photos/007.png")
    save(path, mask)
    config, text = write_config(tmp_path)
    assert sorted(config["classes"].values()) == sorted(BLACK_RED_BLUE.tolist())
    assert f"masks: 1 hold many values beside edges, unlike the others, as {path};" in text


def test_a_mask_of_many_small_objects_is_not_odd(tmp_path: Path) -> None:
    for i in range(N):
        image, mask = draw(i)
        save(tmp_path / f"photos/{i}.png", image)
        cells = np.zeros_like(mask)
        side, n = (3, 100) if i == 5 else (10, 9)
        for cell in range(n):
            top, left = divmod(cell, 10)
            cells[(side + 1) * top :, (side + 1) * left :][:side, :side] = cell + 1
        save(tmp_path / f"labels/{i}.png", cells)
    config, text = write_config(tmp_path)
    assert config["other_values"] == "object" and "unlike the others" not in text
    assert list(config["classes"]) == ["background", "object"]


def test_black_and_white_masks_of_one_and_of_eight_bits_mean_the_same(tmp_path: Path) -> None:
    write_set(tmp_path, np.array([0, 255, 0], np.uint8))
    for path in sorted((tmp_path / "labels").iterdir())[::2]:
        save(path, Image.open(path).convert("1"))
    config, _ = write_config(tmp_path)
    assert list(config["classes"].values()) == [[0, 0, 0], [255, 255, 255]]
    for i, mask in enumerate(read_masks(config)):
        assert ((mask == 1) == (draw(i)[1] == 1)).all()


def test_white_that_is_one_or_255_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path, np.array([0, 255, 0], np.uint8))
    for path in sorted((tmp_path / "labels").iterdir())[::2]:
        save(path, np.array(Image.open(path)) // 255)
    save(tmp_path / "labels/005.png", np.zeros((96, 128), np.uint8))  # an image without an object
    with pytest.raises(UserError, match=r"hold 0 and 1 \(.*000\.png\), or 0 and 255 \(.*001"):
        write_config(tmp_path)


def test_255_beside_indices_with_gaps_is_a_doubt(tmp_path: Path) -> None:
    write_set(tmp_path, np.array([0, 2, 5], np.uint8))
    for path in (tmp_path / "labels").iterdir():
        mask = np.array(Image.open(path))
        mask[60:] = 255
        save(path, mask)
    config, text = write_config(tmp_path)
    assert len(config["classes"]) == 4
    assert "if 255 marks pixels without a label, set ignore: [255, 255, 255]" in text


def test_masks_of_several_kinds_are_told(tmp_path: Path) -> None:
    write_set(tmp_path, np.array([0, 1, 2], np.uint8))
    for path in sorted((tmp_path / "labels").iterdir())[::2]:
        mask = Image.open(path).copy()
        mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        save(path, mask)
    _, text = write_config(tmp_path)
    assert "masks: of several kinds (6 palette, 6 grey)" in text


def test_a_few_coloured_images_among_grey_ones_keep_their_colours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(describe, "LOOKED_AT", 4)  # 0, 3, 7 and 11
    write_set(tmp_path, np.array([0, 1, 2], np.uint8))
    for number, path in enumerate(sorted((tmp_path / "photos").iterdir())):
        if number != 5:
            save(path, Image.open(path).convert("L").convert("RGB"))
    config, _ = write_config(tmp_path)
    assert config["in_channels"] == 3


def test_a_mask_turned_by_its_exif_data_alone_is_told(tmp_path: Path) -> None:
    write_set(tmp_path, np.array([0, 1, 2], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    for path in (tmp_path / "labels").iterdir():
        save(path, Image.open(path), exif=exif)
    _, text = write_config(tmp_path)
    assert "12 masks are turned upright by their EXIF data, but not their images" in text


def test_a_file_that_exists_is_kept(tmp_path: Path) -> None:
    write_set(tmp_path, np.array([0, 1, 2], np.uint8))
    (tmp_path / "own.yaml").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        write_config(tmp_path)
    assert (tmp_path / "own.yaml").read_text() == "mine"


def test_both_folders_must_be_given(call: Callable) -> None:
    """make gives an empty name for IMAGES or MASKS if the user gives none."""
    code, _, error = call(data_script.main, "describe", "--images", "", "--masks", "labels")
    assert code == 2 and error.startswith("error: give both folders: make describe IMAGES=")


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
