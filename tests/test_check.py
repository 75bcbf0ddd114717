"""Tests of tools/check.py and of the commands of data.py."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from common import UserError
from images import read_image
from tools.check import note_shared_groups


@pytest.fixture
def root(dataset: Path, tmp_path: Path) -> Path:
    """Copy the data set, to change it."""
    return shutil.copytree(dataset, tmp_path / "set", ignore=shutil.ignore_patterns(".cache"))


def test_table_and_picture_of_good_data(dataset: Path, tmp_path: Path, call) -> None:
    code, out, _ = call(data.main, "check", dataset, "--picture", tmp_path / "good.png")
    assert code == 0 and "problem" not in out
    assert Image.open(tmp_path / "good.png").width > 500
    split, pairs, groups, size, *shares = out.splitlines()[1].split()
    masks = []
    for path in (dataset / "training/gt_image").iterdir():
        masks.append(np.asarray(Image.open(path)))
    pixels = np.stack(masks)
    assert (split, int(pairs), size) == ("training", len(masks), "32×32")
    assert int(groups) == 3  # its flights, since configs/afo.yaml is read without --config
    expected = [(pixels.max(axis=3) == 0).mean()]
    for channel in range(3):
        expected.append((pixels[..., channel] > 0).mean())
    expected.append(0)  # no pixel is ignored
    assert [float(share) for share in shares] == pytest.approx(expected, abs=6e-5)


def test_every_problem_is_listed(root: Path, call) -> None:
    missing_mask, damaged, copied, *_ = sorted((root / "training/image").iterdir())
    missing_images = sorted((root / "validation/gt_image").iterdir())[:2]
    for mask in missing_images:
        (root / "validation/image" / mask.name.removeprefix("gt_")).unlink()
    (root / "training/gt_image" / f"gt_{missing_mask.name}").unlink()
    damaged.write_bytes(b"no image")
    Image.new("RGB", (9, 9)).save(sorted((root / "testing/image").iterdir())[0])
    copy = "999999_square_red_000001.png"  # a name that no split has
    shutil.copy(copied, root / "testing/image" / copy)
    shutil.copy(root / f"training/gt_image/gt_{copied.name}", root / f"testing/gt_image/gt_{copy}")

    code, out, error = call(data.main, "check", root)
    assert code == 2 and error.endswith("6 problem(s), listed above; fix them\n")
    assert out.count("problem: ") == 6
    for text in (
        f"{missing_mask}: has no mask",
        f"{missing_images[0]}: has no image",
        f"{missing_images[1]}: has no image",
        f"{damaged}: cannot be read",
        "but its image is 9×9",
        f"{copy}: is also in training ({copied})",
    ):
        assert out.count(text) == 1, text


def test_many_images_without_a_mask_are_one_problem_or_three(root: Path, call) -> None:
    for mask in sorted((root / "training/gt_image").iterdir())[:5]:
        mask.unlink()
    code, out, error = call(data.main, "check", root)
    assert code == 2 and error.endswith("3 problem(s), listed above; fix them\n")
    assert out.count("add it, or remove this image") == 3
    assert "remove this image (and 2 more files like this)\n" in out


def test_a_config_says_where_the_data_are(dataset: Path, tmp_path: Path, call) -> None:
    text = (
        f"\ufeffdata: {dataset}\r\n"  # a mark and line ends as editors of Windows write them
        "images: training/image/*.png\r\n"
        "masks: training/gt_image/gt_*.png\r\n"
        'group: "^.{1,6}"\r\n'
    )
    (tmp_path / "own.yaml").write_bytes(text.encode())
    code, out, _ = call(data.main, "check", "--config", tmp_path / "own.yaml")
    groups = [line.split()[2] for line in out.splitlines()[1:4]]
    assert groups == ["1", "1", "1"]
    # Each flight has one kind of object.
    assert code == 2 and "classes: no pixel of the training masks is" in out


def test_unknown_command_is_named(call) -> None:
    code, _, error = call(data.main, "fetch")
    assert code == 2 and "'generate', 'download', 'check'" in error


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    """Write a config and a data set of twelve small images and masks of two classes."""
    rng = np.random.default_rng(0)
    for i in range(12):
        for kind in ("images", "masks"):
            (tmp_path / kind).mkdir(exist_ok=True)
        mask = np.zeros((16, 16), np.uint8)
        mask[2:8, 3:9] = 255
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{i}.png")
        Image.fromarray(mask).save(tmp_path / f"masks/{i}.png")
    (tmp_path / "cells.yaml").write_text(
        f"data: {tmp_path}\nimages: images/*\nmasks: masks/*.png\ngroup: ''\n"
        "classes: {ground: [0, 0, 0], a rather long name: [255, 255, 255]}\n"
    )
    return tmp_path / "cells.yaml"


def test_masks_that_are_turned_alone_are_told(cells: Path, call) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    for path in (cells.parent / "masks").iterdir():
        Image.open(path).save(path, exif=exif)
    code, out, _ = call(data.main, "check", "--config", cells)
    assert code == 0
    assert re.search(r"EXIF data turn \d masks upright, as .*masks.*, but not their images", out)


def test_a_turned_mask_is_named_where_sizes_differ(cells: Path, call) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # by a quarter
    Image.new("RGB", (9, 7)).save(cells.parent / "images/3.png")
    Image.new("L", (9, 7)).save(cells.parent / "masks/3.png", exif=exif)
    code, out, _ = call(data.main, "check", "--config", cells)
    text = r"3\.png: is 7×9 pixels but its image is 9×7; .* EXIF data; save the mask without EXIF"
    assert code == 2 and re.search(text, out)


def test_notes_are_no_problems(cells: Path, call) -> None:
    folder = cells.parent
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    for i in range(12):
        path = folder / f"images/{i}.png"
        Image.open(path).save(path, exif=exif)
    for i in range(0, 12, 2):
        Image.new("RGB", (16, 16)).save(folder / f"images/{i}.png")
        Image.new("L", (16, 16)).save(folder / f"masks/{i}.png")
    (folder / "images/x.HEIC").touch()
    code, out, _ = call(data.main, "check", "--config", cells)
    assert code == 0 and "problem: " not in out
    assert out.count("images are of a single colour (empty slices?)") == 3
    assert re.search(r"EXIF data turn \d images upright.* but not their masks", out)
    assert f"note: {folder}/images: 1 .heic left out" in out
    heading, line = out.splitlines()[:2]
    assert len(heading) == len(line) and "  a rather long name  " in heading


def test_tolerance_is_counted_and_empty_splits_are_noted(cells: Path, call) -> None:
    for i in range(12):
        path = cells.parent / f"masks/{i}.png"
        mask = np.array(Image.open(path)) // 255 * 250
        Image.fromarray(mask).save(path)
    code, out, _ = call(data.main, "check", "--config", cells)
    assert code == 2 and out.count("problem: ") == 3 and "(and 9 more files like this)" in out
    code, out, _ = call(data.main, "check", "--config", cells, "--set", "mask_tolerance=9")
    assert code == 0 and "validation: mask_tolerance gives 72 pixels (14.06%) the nearest" in out


def test_sizes_may_differ_where_crops_are_cut(cells: Path, call) -> None:
    def resize(side: int) -> None:
        for i in range(0, 12, 2):
            for kind in ("images", "masks"):
                path = cells.parent / f"{kind}/{i}.png"
                Image.open(path).resize((side, 16), Image.Resampling.NEAREST).save(path)

    resize(20)
    code, out, _ = call(data.main, "check", "--config", cells)
    assert code == 2 and "images of 2 sizes; set resize: [height, width], or crop, to" in out
    code, out, _ = call(data.main, "check", "--config", cells, "--set", "crop=8")
    assert code == 0 and "note: training: images of 2 sizes are padded to 20×16; what" in out
    resize(3000)
    code, out, _ = call(data.main, "check", "--config", cells, "--set", "crop=8", "resize=[8, 8]")
    assert code == 0 and "padded" not in out


def test_class_missing_in_a_split(cells: Path, call) -> None:
    code, out, _ = call(
        data.main, "check", "--config", cells, "--set", "mask_format=indices", "ignore=[255]"
    )
    assert code == 2
    assert "note: validation: no mask has a rather long name" in out
    assert "problem" in out and "no pixel of the training masks is a rather long name" in out


def test_palettes_that_differ_are_noted(cells: Path, call) -> None:
    """Programs that save space number the colours of each file anew."""
    for i in range(12):
        path = cells.parent / f"masks/{i}.png"
        palette_mask = Image.fromarray(np.array(Image.open(path)) // 255)
        palette_mask.putpalette([0, 0, 0, 255, 0, 0] if i else [0, 0, 0, 0, 0, 255])
        palette_mask.save(path)
    options = ("--config", cells, "--set", "mask_format=indices")
    code, out, _ = call(data.main, "check", *options)
    assert code == 0 and out.count("set mask_format: colours") == 1
    assert re.search(r"note: \w+: 1 is \[0, 0, 255\] in .*/0.png and \[255, 0, 0\] in", out)
    (cells.parent / "masks/0.png").unlink()
    (cells.parent / "images/0.png").unlink()
    code, out, _ = call(data.main, "check", *options)
    assert code == 0 and "set mask_format: colours" not in out


def test_advice_on_an_index_without_pixels_keeps_the_others(cells: Path, call) -> None:
    """The masks hold 0 and 2; no pixel is 1."""
    for i in range(12):
        path = cells.parent / f"masks/{i}.png"
        Image.fromarray(np.array(Image.open(path)) // 255 * 2).save(path)
    options = ["--config", cells, "--set", "mask_format=indices"]
    three = "classes={a: [0, 0, 0], b: [1, 1, 1], c: [2, 2, 2]}"
    code, out, _ = call(data.main, "check", *options, three)
    assert code == 2 and "is b; correct its value" in out
    assert "or remove the class and set ignore: [1]" in out
    two = "classes={a: [0, 0, 0], c: [2, 2, 2]}"
    assert call(data.main, "check", *options, two, "ignore=[1]")[0] == 0


def test_numbers_below_0_are_refused(cells: Path, call) -> None:
    path = cells.parent / "masks/3.png"
    Image.fromarray(np.full((16, 16), -9999, np.int32)).save(path.with_suffix(".tif"))
    path.with_suffix(".tif").rename(path)
    code, out, _ = call(data.main, "check", "--config", cells, "--set", "mask_format=indices")
    assert code == 2 and f"{path}: holds numbers below 0, the lowest is -9999; save 0 and" in out


def test_two_split_folders(root: Path, call) -> None:
    shutil.rmtree(root / "testing")
    options = ("--set", "split_folders=[training, validation, validation]")
    code, out, _ = call(data.main, "check", root, *options)
    assert code == 0 and "is also in" not in out
    assert out.count("note: split_folders: the folder validation stands in for the test") == 1


def test_groups_in_several_splits_are_noted(root: Path, call) -> None:
    code, out, _ = call(data.main, "check", root)  # each split counts its flights from 1
    assert code == 0 and "has images in" not in out
    for split, add in (("validation", 100), ("testing", 200)):  # as if one flight went on
        for path in [*(root / split).glob("*/*.png")]:
            start, _, number = path.stem.rpartition("_")
            path.rename(path.with_stem(f"{start}_{int(number) + add:06}"))
    code, out, _ = call(data.main, "check", root)
    text = "group 000001 has images in training and validation and testing, 000002 has images in"
    assert code == 0 and out.count("has images in") == 2 and f"note: {text}" in out
    assert "testing: their scores look better than they are\n" in out
    code, out, _ = call(data.main, "check", root, "--set", "group=''")  # each image is a group
    assert code == 0 and "has images in" not in out


def test_of_many_shared_groups_a_few_are_named() -> None:
    names = {}
    for split, image in (("training", 1), ("testing", 2)):
        names[split] = [(group, f"{group}_{image}") for group in "abcde"]
    [note] = note_shared_groups(names)
    assert "c has images in training and testing (and 2 more groups are in several" in note
    names["testing"].append(("a", "a_b_1"))  # a_1 is in training: another name with the number 1
    assert note_shared_groups(names) == [note]


def test_a_mask_of_several_images_is_a_problem(cells: Path, call) -> None:
    folder = cells.parent
    for split, numbers in {"train": range(4), "val": range(3, 7), "test": range(7, 11)}.items():
        (folder / split).mkdir()
        for number in numbers:
            shutil.copy(folder / f"images/{11 - number}.png", folder / f"{split}/{number}.png")
    options = ("--set", "images='{split}/*.png'", "split_folders=[train, val, test]")
    code, out, _ = call(data.main, "check", "--config", cells, *options)
    text = f"is the mask of {folder}/train/3.png and of {folder}/val/3.png; give each image"
    assert code == 2 and f"problem: {folder}/masks/3.png: {text}" in out
    assert out.count("is the mask of") == 1


def test_values_that_a_range_cuts_off_are_noted(cells: Path, call) -> None:
    folder = cells.parent
    for i in range(12):
        values = np.full((16, 16), 100 + 10 * i, np.uint16)
        values[0, 0] = 0
        if i == 3:
            values[:8] *= 20  # half of this image is too bright
        Image.fromarray(values).save(folder / f"images/{i}.png")
    options = ("--config", cells, "--set", "in_channels=1", "value_range=[0, 1023]")
    code, out, _ = call(data.main, "check", *options)
    assert code == 0
    assert f"value_range cuts off values of 1 images, most in {folder}/images/3.png (49.61%)" in out


def test_splits_of_few_groups_are_named(dataset: Path, call) -> None:
    _, out, _ = call(data.main, "check", dataset)  # three flights, two and two
    assert "note: validation: has 2 groups only" in out
    assert "note: testing: has 2 groups only" in out
    assert "note: training: has" not in out


def test_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match=r"a\.png: stands for a file of Git LFS; fetch it"):
        read_image(tmp_path / "a.png", 3)
