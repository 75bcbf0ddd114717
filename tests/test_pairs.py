"""Tests of pairs.py and patterns.py: which image belongs to which mask; near misses are named."""

import re
import unicodedata
from pathlib import Path

import pytest
from conftest import config_for

from common import SPLITS, UserError
from pairs import choose_groups, find_pairs, group_of
from patterns import list_folder


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize(
    ("files", "images", "masks"),
    [
        (["i/1.jpg", "i/2.JPG", "i/3.png", "m/1.PNG", "m/2.png", "m/3.png"], "i/*", "m/*.png"),
        (["i/1.jpg", "i/2.JPEG", "i/3.gif", "m/1.png", "m/2.png"], "i/*.{jpg,jpeg}", "m/*.*"),
        (["1.tif", "1_mask.tif", "2.tif", "2_mask.tif"], "*.tif", "*_mask.tif"),
        (["1_image.tif", "1.tif", "2_image.tif", "2.tif"], "*_image.tif", "*.tif"),
        (["a/1.tif", "a/1_m.tif", "b/1.tif", "b/1_m.tif"], "*/*.tif", "*/*_m.tif"),
        (["a/b/1.tif", "a/b/1_m.tif", "2.tif", "2_m.tif"], "**/*.tif", "**/*_m.tif"),
        (["a/image.png", "a/mask.png", "b/image.png", "b/mask.png"], "*/image.png", "*/mask.png"),
        (["my [v1]/é (x).jpg", "m/é (x).png"], "my [v1]/*.jpg", "m/*.png"),
        (["p/1.png", "p/1_m.png", "p/2.png", "p/2_m.tif"], "p/*.png", "p/*_m.*"),
        (["v.2/1.png", "v.2/1_m.png"], "v.2/*.png", "v.2/*_m{.png,.tif}"),
        (["p/1.jpg", "p/1.png", "p/2.jpg", "p/2.png"], "p/*.jpg", "p/*"),
        (["i/1.JPG", "i/2_x.png", "m/1.png", "m/2.png"], "i/*{.jpg,_x.png}", "m/*.png"),
    ],
)
def test_patterns_find_pairs(tmp_path: Path, files: list, images: str, masks: str) -> None:
    touch(
        tmp_path, *files, "i/Thumbs.db", "i/.1.jpg", "i/folder.jpg/x", ".cache/1.tif", "i/.DS_Store"
    )
    config = config_for(tmp_path, images="{split}/" + images, masks="{split}/" + masks)
    config["split_folders"] = [".", "none"]
    pairs, problems = find_pairs(config, "training")
    assert problems == []
    paired = {path.relative_to(tmp_path).as_posix() for p in pairs for path in (p.image, p.mask)}
    assert paired == {name for name in files if not name.endswith("gif")}
    assert len({pair.name for pair in pairs}) == len(pairs)
    for pair in pairs:
        for path in (pair.image, pair.mask):
            inside = path.relative_to(tmp_path).as_posix()
            assert all(part in inside for part in pair.name.split("/"))


def test_a_group_is_one_however_a_computer_writes_its_name(tmp_path: Path) -> None:
    composed, on_a_mac = unicodedata.normalize("NFC", "Bär"), unicodedata.normalize("NFD", "Bär")
    names = [f"{composed}_1", f"{on_a_mac}_2", "Fuchs_1", "Hund_1"]
    touch(tmp_path, *[f"i/{name}.png" for name in names], *[f"m/{name}.png" for name in names])
    config = config_for(tmp_path, images="i/*.png", masks="m/*.png", group=f"^({on_a_mac}|[^_]+)")
    found = [find_pairs(config, split)[0] for split in SPLITS]
    groups = [{pair.group for pair in pairs} for pairs in found]
    assert sorted(len(names) for names in groups) == [1, 1, 1]
    assert set.union(*groups) == {composed, "Fuchs", "Hund"}
    assert sum(len(pairs) for pairs in found) == len(names)


def test_groups_are_chosen_by_a_hash_the_same_each_time() -> None:
    expected = {"training": "abceghi", "validation": "d", "testing": "f"}
    for split, names in expected.items():
        assert choose_groups(set("abcdefghi"), [0.7, 0.15, 0.15], split) == set(names)


def test_masks_of_all_splits_may_lie_in_one_folder(tmp_path: Path) -> None:
    for number, split in enumerate(SPLITS):
        touch(tmp_path, f"{split}/{number}.png", f"masks/{number}.png")
    config = config_for(tmp_path, images="{split}/*.png", masks="masks/*.png", group="")
    for number, split in enumerate(SPLITS):
        pairs, problems = find_pairs(config, split)
        assert [pair.name for pair in pairs] == [str(number)] and problems == []
    config = config_for(tmp_path, images="masks/*.png", masks="{split}/*.png", group="")
    with pytest.raises(UserError, match=r"masks: has \{split\}, but images: .* has not; write it"):
        find_pairs(config, "training")


def test_images_that_are_all_masks_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "2.png")
    config = config_for(tmp_path, images="*", masks="*.png")
    _, [problem] = find_pairs(config, "training")
    text = "images: '*' finds only files that masks: '*.png' finds too; add images, or give each"
    assert text in problem


def test_a_link_to_itself_is_a_file(tmp_path: Path) -> None:
    touch(tmp_path, "i/1.png")
    (tmp_path / "i/loop.png").symlink_to("loop.png")
    assert list_folder(tmp_path / "i") == (["1.png", "loop.png"], [])


def test_nested_names_hold_their_folders(tmp_path: Path) -> None:
    for patient in "abc":
        touch(tmp_path, f"{patient}/1.tif", f"{patient}/2.tif")
        touch(tmp_path, f"{patient}/1_m.tif", f"{patient}/2_m.tif")
    (tmp_path / "c/back").symlink_to(tmp_path)  # is followed, but not round in a circle
    (tmp_path / "d").symlink_to(tmp_path / "a")
    config = config_for(tmp_path, images="*/*.tif", masks="*/*_m.tif", group="^[^/]+")
    pairs = []
    for split in SPLITS:
        pairs += find_pairs(config, split)[0]
    assert sorted(pair.name for pair in pairs) == [f"{p}/{i}" for p in "abcd" for i in (1, 2)]
    assert {pair.group for pair in pairs} == set("abcd")
    deep = dict(config, images="**/*.tif", masks="**/*_m.tif", data=str(tmp_path / "c"))
    assert find_pairs(deep, "training")[1] == []


def test_group_in_brackets_is_what_they_find() -> None:
    assert group_of("slice0_patient1", r"slice\d+_(patient\d+)") == "patient1"
    assert group_of("slice0_patient1", r"patient\d+$") == "patient1"
    assert group_of("x_q7", r"^(p\d+)|x_(q\d+)") == "q7"
    assert group_of("left_2_a", r"^(left|right)_(\d+)") == "left/2"
    assert group_of("slice0_patient1", "") == "slice0_patient1"
    for expression in ("[A-Z]*", "P", r"slice0(_?)patient", "(x)?slice"):
        assert group_of("slice0+patient1", expression) == ""


def test_split_without_a_group_is_a_problem(tmp_path: Path) -> None:
    touch(tmp_path, *[f"{kind}/{i}.png" for kind in "im" for i in range(5)])
    config = config_for(tmp_path, images="i/*", masks="m/*", group="")
    config["split_shares"] = [0.1, 0.6, 0.3]
    assert find_pairs(config, "validation")[1] == []
    [problem] = find_pairs(config, "training")[1]
    assert "split_shares: [0.1, 0.6, 0.3] leaves none of 5 groups for training" in problem


def test_home_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path, *[f"set/{kind}/{i}.png" for kind in "im" for i in range(3)])
    config = config_for(tmp_path, data="~/set", images="i/*", masks="m/*", group="")
    assert find_pairs(config, "testing")[0][0].image.parent == tmp_path / "set/i"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["i/1.JPEG"], r"m/1.png: has no image .*i/1.jpg \(there is 1.JPEG\); add it"),
        (["i/img_01.jpg"], r"has no image .*i/1.jpg \(there is img_01.jpg\)"),
        (["i/2.jpg"], r"m/1.png: has no image .*i/1.jpg; add it"),
        (["i/0.jpg", "i/0.JPG"], r"i/0.jpg: has the name of .*i/0.JPG for a pair"),
    ],
)
def test_near_misses_are_named(tmp_path: Path, files: list, says: str) -> None:
    touch(tmp_path, *files, "i/0.jpg", "m/0.png", "m/1.png")
    config = config_for(tmp_path, images="i/*.jpg", masks="m/*.png", group="")
    problems = find_pairs(config, "training")[1]
    assert any(re.search(says, problem) for problem in problems), problems


@pytest.mark.parametrize(
    ("images", "says"),
    [
        ("j/*.png", "no such folder 'j'; .* has i, m"),
        ("i/*.[jJ]pg", r"no such files; .*/i has 2 \.jpg, 1 \.heic; only \* and {jpg,png} have"),
        ("*.jpg", r"no such files; .* has i, m; \*\*/ before the name of a file looks"),
        ("i\\*.jpg", "write / between folders"),
    ],
)
def test_empty_pattern_says_what_is_there(tmp_path: Path, images: str, says: str) -> None:
    touch(tmp_path, "i/0.jpg", "i/1.jpg", "i/2.heic", "m/0.png")
    config = config_for(tmp_path, images=images, masks="m/*.png", group="")
    [problem] = find_pairs(config, "training")[1]
    assert re.search(says, problem), problem
