"""Other people's data: layouts, mask formats, ignored pixels, sizes and splits, from one YAML."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, config_for
from PIL import Image

from config import load_config
from data import SPLITS, find_pairs, load_split
from errors import UserError
from evaluate import evaluate_checkpoint
from images import IGNORE, read_mask, read_pair
from train import train

ISIC, CAMVID = ROOT / "configs/data/isic.yaml", ROOT / "configs/data/camvid.yaml"
TINY = [
    *("encoder=[[4, 3], [8, 3]]", "decoder=[[8, 3], [4, 3], [4, 3]]", "crop=0", "epochs=1"),
    *("images_per_epoch=16", "batch_size=8", "device=cpu", "precision=float32"),
]


def save(path: Path, pixels: np.ndarray, **how: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)
    return path


@pytest.fixture(scope="module")
def isic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark ellipses on pale skin, JPEG files of many sizes with binary PNG masks."""
    root, rng = tmp_path_factory.mktemp("isic"), np.random.default_rng(0)
    for i in range(12):
        height, width = int(rng.integers(40, 60)), int(rng.integers(50, 90))
        y, x = np.mgrid[:height, :width]
        lesion = ((y - height / 2) / 12) ** 2 + ((x - width / 2) / 18) ** 2 < 1
        photo = np.where(lesion[..., None], (90, 50, 40), (220, 180, 160)).astype(np.uint8)
        save(root / f"ISIC2018_Task1-2_Training_Input/ISIC_{i:07}.jpg", photo, quality=90)
        mask = root / f"ISIC2018_Task1_Training_GroundTruth/ISIC_{i:07}_segmentation.png"
        save(mask, np.where(lesion, 255, 0).astype(np.uint8))
    (root / "ISIC2018_Task1-2_Training_Input/LICENSE.txt").write_text("CC-0")
    return root


@pytest.fixture(scope="module")
def camvid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Horizontal bands of two to eleven classes with a few unlabelled pixels, splits given."""
    root, rng = tmp_path_factory.mktemp("camvid"), np.random.default_rng(0)
    for recording, split in (("0001TP", "train"), ("0016E5", "val"), ("Seq05VD", "test")):
        for i in range(3):
            mask = np.repeat(np.arange(12, dtype=np.uint8), 3)[:, None].repeat(48, axis=1)
            mask[:4, : 5 * i] = 11
            image = (mask[..., None] * 20 + rng.integers(0, 9, (36, 48, 3))).astype(np.uint8)
            save(root / split / f"{recording}_{i:06}.png", image)
            save(root / f"{split}annot" / f"{recording}_{i:06}.png", mask)
    return root


def message_of(call: Callable, *args: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- a YAML is all it takes


@pytest.mark.parametrize("name", ["isic", "camvid"])
def test_from_check_to_prediction(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, script: Callable
) -> None:
    root, yaml = request.getfixturevalue(name), ROOT / f"configs/data/{name}.yaml"
    picture = tmp_path / "check.png"
    done = script(
        *("data.py", "check", "--config", yaml, "--set", f"data={root}", "--picture", picture)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "problem" not in done.stdout
    assert min(Image.open(picture).size) > 400  # three rows

    run, configs = tmp_path / "run", (ROOT / "configs/best.yaml", yaml)
    size = ["resize=[24, 32]"] if name == "isic" else []
    done = script(
        *("train.py", "--config", *configs, "--run-dir", run),
        *("--set", f"data={root}", *TINY, *size),
    )
    assert done.returncode == 0, done.stderr
    done = script("evaluate.py", run / "best.pt", "--json", tmp_path / "results.json")
    assert done.returncode == 0, done.stderr
    [result] = json.loads((tmp_path / "results.json").read_text())
    classes = list(load_config([yaml], [])["classes"])
    assert list(result["per_class_iou"]) == classes
    assert f"{classes[0]} only" in done.stdout
    counted = np.array(result["confusion_matrix"]).sum()
    if name == "camvid":
        masks = [np.array(Image.open(p)) for p in sorted((root / "testannot").glob("*.png"))]
        assert counted == sum((mask != 11).sum() for mask in masks)
    else:
        assert counted == result["images"] * 24 * 32

    image = next(iter(sorted(root.rglob("*.jpg" if name == "isic" else "test/*.png"))))
    done = script("predict.py", "--checkpoint", run / "best.pt", image, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out" / f"{image.stem}_mask.png") as mask:
        assert mask.size == Image.open(image).size  # also where the model saw a resized image
        assert np.array(mask).max() < len(classes)


def test_ignored_pixels_change_neither_loss_nor_scores(camvid: Path, script: Callable) -> None:
    from losses import LOSSES
    from metrics import confusion_matrix

    split = load_split(load_config([CAMVID], [f"data={camvid}"]), "testing")
    mask = split.masks
    assert (mask == IGNORE).any() and mask[mask != IGNORE].max() == 10
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*(len(mask), 11, *mask.shape[1:]), generator=generator)
    other = torch.where((mask == IGNORE)[:, None], torch.randn_like(logits), logits)
    assert not torch.equal(logits, other)
    for name, loss in LOSSES.items():
        assert loss(logits, mask) == pytest.approx(loss(other, mask).item(), rel=1e-6), name
    first, second = (confusion_matrix(z.argmax(1), mask, 11) for z in (logits, other))
    assert torch.equal(first, second) and first.sum() == (mask != IGNORE).sum()


# ---- what masks hold


def test_the_same_mask_in_five_formats(tmp_path: Path) -> None:
    indices = np.random.default_rng(0).integers(0, 2, (5, 7)).astype(np.uint8)
    colours = {"classes": {"back": [0, 0, 0], "front": [255, 255, 255]}}
    by_colour, by_index = config_for(tmp_path, **colours), config_for(tmp_path, **colours)
    by_index["mask_format"] = "indices"
    palette = Image.fromarray(indices, mode="P")
    palette.putpalette([0, 0, 0, 255, 255, 255])
    palette.save(tmp_path / "palette.png")
    Image.fromarray(indices * 255).convert("1").save(tmp_path / "bits.png")
    for name, config in (
        (save(tmp_path / "grey.png", indices * 255), by_colour),
        (save(tmp_path / "rgb.png", np.stack([indices * 255] * 3, axis=2)), by_colour),
        (tmp_path / "palette.png", by_colour),
        (tmp_path / "palette.png", by_index),
        (tmp_path / "bits.png", by_colour),
        (tmp_path / "bits.png", by_index),
        (save(tmp_path / "indices.png", indices), by_index),
    ):
        assert read_mask(name, config).tolist() == indices.tolist(), (name, config["mask_format"])


def test_ignored_values_of_both_formats(tmp_path: Path) -> None:
    pixels = np.array([[0, 1], [255, 1]], np.uint8)
    path = save(tmp_path / "a.png", pixels)
    config = config_for(
        tmp_path, classes={"a": [0, 0, 0], "b": [1, 1, 1]}, mask_format="indices", ignore=[255]
    )
    assert read_mask(path, config).tolist() == [[0, 1], [IGNORE, 1]]
    config |= {"mask_format": "colours", "ignore": [255, 255, 255]}
    assert read_mask(path, config).tolist() == [[0, 1], [IGNORE, 1]]


@pytest.mark.parametrize(
    ("pixels", "mask_format", "says"),
    [
        ([[0, 1], [1, 0]], "colours", "set mask_format: indices"),
        ([[0, 255], [255, 0]], "indices", "set mask_format: colours"),
        ([[0, 1], [255, 0]], "indices", "ignore: [255]"),
        ([[[0, 0, 0], [0, 0, 255]]], "indices", "set mask_format: colours"),
        ([[[0, 0, 0], [0, 0, 255]]], "colours", "written as BGR"),
    ],
)
def test_a_mask_of_another_kind_says_what_to_set(
    tmp_path: Path, pixels: list, mask_format: str, says: str
) -> None:
    path = save(tmp_path / "mask.png", np.array(pixels, np.uint8))
    classes = {"back": [0, 0, 0], "front": [255, 0, 0]}
    config = config_for(tmp_path, classes=classes, mask_format=mask_format)
    message = message_of(read_mask, path, config)
    assert message.startswith(f"{path}: ") and says in message


def test_a_mask_saved_as_jpeg_says_so(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 2, (32, 32, 1)).astype(np.uint8) * (255, 0, 0)
    path = save(tmp_path / "mask.jpg", pixels.astype(np.uint8))
    assert "JPEG" in message_of(read_mask, path, config_for(tmp_path))


# ---- sizes


def test_resize_keeps_classes_and_fits_both(isic: Path) -> None:
    config = load_config([ISIC], [f"data={isic}", "resize=[20, 30]"])
    split = load_split(config, "training")
    assert split.images.shape[1:] == (3, 20, 30) and split.masks.shape[1:] == (20, 30)
    assert set(split.masks.unique().tolist()) == {0, 1}
    # An ellipse of half axes 12 and 18 in an image of h × w covers 216·π/(h·w) of it, resized too.
    pairs, _ = find_pairs(config, "training")
    for pair, mask in zip(pairs, split.masks, strict=True):
        width, height = Image.open(pair.image).size
        assert mask.float().mean().item() == pytest.approx(216 * np.pi / width / height, rel=0.1)
    assert "set resize" in message_of(load_split, config | {"resize": []}, "training")


def test_a_turned_photograph_is_read_upright(tmp_path: Path) -> None:
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:3] = 255  # a white top
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90° to be shown
    path = save(tmp_path / "a.png", np.rot90(pixels).copy(), exif=exif)
    mask = save(tmp_path / "mask.png", np.zeros((10, 20), np.uint8))
    image, _ = read_pair(path, mask, config_for(tmp_path))
    assert image.tolist() == pixels.tolist()


# ---- splits


def many(root: Path, groups: int, frames: int) -> dict:
    for g in range(groups):
        for f in range(frames):
            for folder in ("image", "mask"):
                path = root / folder / f"patient{g}_{f}.png"
                save(path, np.full((8, 8), 0, np.uint8))
    return config_for(root, images="image/*.png", masks="mask/*.png", group="^[^_]+")


def test_drawn_splits_never_share_a_group_and_are_always_the_same(tmp_path: Path) -> None:
    config = many(tmp_path, groups=20, frames=3)
    drawn = {split: find_pairs(config, split)[0] for split in SPLITS}
    assert sum(map(len, drawn.values())) == 60
    groups = {split: {pair.group for pair in pairs} for split, pairs in drawn.items()}
    assert {split: len(g) for split, g in groups.items()} == {
        "training": 14,
        "validation": 3,
        "testing": 3,
    }
    assert len(set.union(*groups.values())) == 20
    assert drawn == {split: find_pairs(config, split)[0] for split in SPLITS}
    alone = {split: find_pairs(config | {"group": ""}, split)[0] for split in SPLITS}
    assert [len(pairs) for pairs in alone.values()] == [42, 9, 9]


@pytest.mark.parametrize(("groups", "sizes"), [(3, [1, 1, 1]), (4, [2, 1, 1]), (5, [3, 1, 1])])
def test_few_groups_leave_no_split_empty(tmp_path: Path, groups: int, sizes: list[int]) -> None:
    config = many(tmp_path, groups, frames=1)
    assert [len(find_pairs(config, split)[0]) for split in SPLITS] == sizes


def test_too_few_groups_and_names_without_one_are_named(tmp_path: Path) -> None:
    config = many(tmp_path, groups=2, frames=4)
    assert "2 group(s) of images are too few" in message_of(load_split, config, "training")
    config["group"] = "case"
    message = message_of(load_split, config, "training")
    assert "patient0_0.png: group: 'case' is not found" in message


def test_a_folder_for_each_case(tmp_path: Path) -> None:
    for case in ("a1", "a2", "b1"):
        for name in ("photo.jpg", "label.png"):
            save(tmp_path / case / name, np.zeros((8, 8), np.uint8))
    config = config_for(tmp_path, images="*/photo.jpg", masks="*/label.png", group="")
    names = [pair.name for split in SPLITS for pair in find_pairs(config, split)[0]]
    assert sorted(names) == ["a1", "a2", "b1"]


def test_the_same_picture_in_two_splits_is_a_problem(tmp_path: Path, capsys) -> None:
    from data import check

    config = many(tmp_path, groups=6, frames=1)  # all black, all the same
    assert "2 problems" in message_of(check, config, None)  # one in validation, one in testing
    assert capsys.readouterr().out.count("is the same file as") == 2


# ---- keys that are wrong


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("images=photos/a.png", "images: "),
        ("masks=/abs/*.png", "masks: "),
        ("images=photos/*.png", "{split}"),
        ("group='('", "group: "),
        ("split_folders=[train, val]", "split_folders: "),
        ("split_folders=[train, ./train/, val]", "split_folders: "),
        ("split_shares=[1, 0, 0]", "split_shares: "),
        ("ignore=[255]", "ignore: "),
        ("ignore=[0, 0, 0]", "one of the classes"),
        ("resize=[0, 5]", "resize: "),
        ("mask_format=rgb", "mask_format: "),
    ],
)
def test_bad_keys_are_named(override: str, says: str) -> None:
    assert says in message_of(load_config, [], [override])


def test_drawn_splits_need_a_group() -> None:
    """That of the lab's names would put the files IMG_0001 to IMG_0099 into one group."""
    files = ["images=photos/*.png", "masks=labels/*.png"]
    assert message_of(load_config, [], files).startswith("group: splits are drawn")
    for group in ("", "^.{1,6}"):
        assert load_config([], [*files, f"group='{group}'"])["group"] == group


@pytest.mark.parametrize("split", SPLITS)
def test_splits_of_ignored_pixels_alone_are_refused(tmp_path: Path, split: str) -> None:
    for name in SPLITS:
        for i in range(4):
            value = 255 if name == split else i % 2
            save(tmp_path / name / f"image/{i}.png", np.full((16, 16), 7, np.uint8))
            save(tmp_path / name / f"gt/{i}.png", np.full((16, 16), value, np.uint8))
    keys = {"images": "{split}/image/*.png", "masks": "{split}/gt/*.png", "group": "", "epochs": 1}
    keys |= {"classes": {"no": [0, 0, 0], "yes": [9, 9, 9]}, "mask_format": "indices"}
    keys |= {"encoder": [[4, 3]], "decoder": [[4, 3]], "ignore": [255], "device": "cpu"}
    config = config_for(tmp_path, **keys)

    def train_and_test() -> None:
        train(config, tmp_path / "run", resume=False)
        evaluate_checkpoint(tmp_path / "run/best.pt", None, "testing", "cpu")

    assert f"ignore: leaves no pixel of the {split} split" in message_of(train_and_test)


# ---- what users do


def test_an_unpaired_file_is_one_problem(tmp_path: Path, capsys) -> None:
    from data import check

    config = many(tmp_path, groups=6, frames=2)
    for number, path in enumerate(sorted((tmp_path / "image").iterdir())):
        save(path, np.full((8, 8), number, np.uint8))
    (tmp_path / "mask/patient3_1.png").unlink()
    assert "1 problem, listed above" in message_of(check, config, None)
    assert "patient3_1.png: has no mask" in capsys.readouterr().out


def test_images_and_masks_in_one_folder(tmp_path: Path) -> None:
    for i in range(6):
        for name in (f"scan{i}.tif", f"scan{i}_mask.tif", f"._scan{i}.tif"):
            save(tmp_path / name, np.zeros((8, 8), np.uint8))
    for keys in (("*.tif", "*_mask.tif"), ("./*.tif", ".//*_mask.tif")):
        config = config_for(tmp_path, images=keys[0], masks=keys[1], group="")
        pairs = [pair for split in SPLITS for pair in find_pairs(config, split)[0]]
        assert sorted(pair.name for pair in pairs) == [f"scan{i}" for i in range(6)]


def test_indices_written_as_colours_are_read(tmp_path: Path) -> None:
    indices = np.array([[0, 1], [1, 0]], np.uint8)
    path = save(tmp_path / "a.png", np.stack([indices] * 3, axis=2))
    config = config_for(tmp_path, mask_format="indices")
    assert read_mask(path, config).tolist() == indices.tolist()


def test_two_ways_to_read_one_folder_keep_a_cache_each(isic: Path, tmp_path: Path) -> None:
    small, large = (
        load_config([ISIC], [f"data={isic}", f"resize={size}"]) for size in ("[8, 8]", "[9, 9]")
    )
    for _ in range(2):
        assert load_split(small, "testing").masks.shape[1:] == (8, 8)
        assert load_split(large, "testing").masks.shape[1:] == (9, 9)
    before = {path: path.stat().st_mtime_ns for path in (isic / ".cache").iterdir()}
    load_split(small, "testing"), load_split(large, "testing")
    assert {path: path.stat().st_mtime_ns for path in (isic / ".cache").iterdir()} == before


def test_base_default_in_own_yaml_resets_nothing(tmp_path: Path) -> None:
    own = tmp_path / "my.yaml"
    own.write_text(f"base: {ROOT}/configs/default.yaml\ndata: here\n")
    config = load_config([ROOT / "configs/best.yaml", own], [])
    assert config["data"] == "here" and config["skip"] == "full"
