"""Find the pairs of image and mask that a config describes, and their splits.

What the wildcards of `images` and `masks` match is the name of a pair, which its image and its mask
share. patterns.py finds the files.
"""

import os
import re
import unicodedata
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from common import SPLITS, UserError, reading
from masks import check_mask_keys
from patterns import (
    OTHER_ENDINGS,
    File,
    count_stars,
    file_expression,
    fill,
    find_files,
    find_folders,
    list_folder,
    parts_of,
    specificity,
)

MOST_EXPLAINED = 20  # files without a partner for which a near miss is looked for


class Pair(NamedTuple):
    """An image and its mask."""

    name: str  # what the wildcards match in both paths, joined by /
    group: str  # pairs of one group must stay in one split
    image: Path
    mask: Path


# ---- keys of the config


def check_data_keys(config: dict) -> None:
    """Raise UserError, which names the key, if a config cannot describe a data set."""
    for key in ("images", "masks"):
        pattern = config[key]
        if "*" not in pattern or pattern.startswith("/"):
            advice = "give a path below `data` with a *, as in 'photos/*.jpg'"
            raise UserError(f"{key}: is {pattern!r}; {advice}")
    if config["images"] == config["masks"]:
        raise UserError(f"images, masks: both are {config['images']!r}; give each its own files")
    n_images = count_stars(config["images"])
    n_masks = count_stars(config["masks"])
    if n_images != n_masks:
        advice = "give both the same number, since a pair shares what they match"
        raise UserError(f"images, masks: have {n_images} and {n_masks} wildcards; {advice}")
    if "{split}" in config["masks"] and "{split}" not in config["images"]:
        advice = "write it in both, or in neither"
        raise UserError(f"masks: has {{split}}, but images: {config['images']!r} has not; {advice}")
    folders = config["split_folders"]
    if len(folders) not in (2, 3):
        raise UserError(f"split_folders: is {folders}; give two or three folders")
    if folders[0] in folders[1:]:
        text = "would train and be scored on the same images"
        raise UserError(f"split_folders: is {folders}: a model {text}; give each split its folder")
    check_pair_of_numbers("resize", config["resize"], 8, 16384, "[height, width] in pixels")
    value_range = config["value_range"]
    check_pair_of_numbers("value_range", value_range, -(2**31), 2**31, "[lowest, highest]")
    if value_range and value_range[0] >= value_range[1]:
        raise UserError(f"value_range: is {value_range}; give the lower value first")
    with reading("group", "give a regular expression, as in '^[^_]+'"):
        re.compile(config["group"])
    check_mask_keys(config)


def check_pair_of_numbers(key: str, value: list, low: int, high: int, meaning: str) -> None:
    """Raise UserError unless a value is [] or two whole numbers in low…high."""
    fits = all(type(number) is int and low <= number <= high for number in value)
    if value and (len(value) != 2 or not fits):
        raise UserError(f"{key}: is {value}; give [], or {meaning}, each {low} to {high}")


def data_root(config: dict) -> Path:
    """Return the folder of the data; ~ stands for the home folder."""
    return Path(config["data"]).expanduser()


def split_folder(config: dict, split: str) -> str:
    """Return what stands for {split}. Of two folders, the second is validation and testing."""
    folders = config["split_folders"]
    return folders[min(SPLITS.index(split), len(folders) - 1)]


def stand_in_note(config: dict) -> str | None:
    """Say so if the validation images are the test images too."""
    folder = split_folder(config, "validation")
    if "{split}" not in config["images"] or folder != split_folder(config, "testing"):
        return None
    text = f"the folder {folder} stands in for the test split too"
    return f"split_folders: {text}; the best epoch is chosen on it, so its scores are a bit high"


# ---- pairs and splits


def patterns_of(config: dict, split: str) -> tuple[str, str]:
    """Return the patterns of images and of masks for a split."""
    folder = split_folder(config, split)
    images = config["images"].replace("{split}", folder)
    masks = config["masks"].replace("{split}", folder)
    return images, masks


def find_pairs(config: dict, split: str) -> tuple[list[Pair], list[str]]:
    """Pair the images of a split with their masks, sorted by name; also list the problems met."""
    check_data_keys(config)
    pairs, problems = pair_files(config, split)
    if "{split}" in config["images"]:
        return pairs, problems
    root = data_root(config)
    groups = {pair.group for pair in pairs}
    chosen = choose_groups(groups, config["split_shares"], split)
    if len(groups) < len(SPLITS):
        if not problems:
            problems.append(explain_too_few(root, len(groups), len(pairs)))
    elif not chosen:
        text = f"leaves none of {len(groups)} groups for {split}; give it a larger share"
        problems.append(f"{root}: split_shares: {config['split_shares']} {text}")
    return [pair for pair in pairs if pair.group in chosen], problems


def pair_files(config: dict, split: str) -> tuple[list[Pair], list[str]]:
    """Pair the files of the folder of a split, or of all splits if `images` has no {split}."""
    root = data_root(config)
    image_pattern, mask_pattern = patterns_of(config, split)
    image_files = find_files(root, image_pattern)
    mask_files = find_files(root, mask_pattern)
    if not image_files:
        return [], [explain_nothing(root, image_pattern)]
    if not mask_files:
        return [], [explain_nothing(root, mask_pattern)]
    # Where a.png and a_mask.png lie in one folder, *.png finds masks too.
    if specificity(image_pattern) > specificity(mask_pattern):
        mask_files = without(mask_files, image_files)
    else:
        image_files = without(image_files, mask_files)
    if not image_files or not mask_files:
        kind, other = ("masks", "images") if image_files else ("images", "masks")
        text = (
            f"{kind}: {config[kind]!r} finds only files that {other}: {config[other]!r} finds too"
        )
        return [], [f"{root}: {text}; add {kind}, or give each a pattern of its own"]
    images, same_images = by_name(image_files)
    masks, same_masks = by_name(mask_files)
    problems = same_images + same_masks

    pairs = []
    for name in sorted(images.keys() | masks.keys()):
        if name in images and name in masks:
            image = images[name]
            group = group_of(name, config["group"])
            if not group:
                text = f"group: {config['group']!r} finds nothing in its name; correct it"
                problems.append(f"{image.path}: {text}")
                continue
            pairs.append(Pair(name, group, image.path, masks[name].path))
    problems += list_alone(root, images, masks, mask_pattern, "mask")
    # If only `images` has {split}, the images of other masks lie in the folders of other splits.
    if "{split}" in config["masks"] or "{split}" not in config["images"]:
        problems += list_alone(root, masks, images, image_pattern, "image")
    return pairs, problems


def group_of(name: str, expression: str) -> str:
    """Find the group in the NFC name of a pair: what `group` matches, or what its (…) match.

    With group: "" every image is its own group. Returns "" if nothing is found.
    """
    if expression == "":
        return name
    match = re.search(unicodedata.normalize("NFC", expression), name)
    if match is None:
        return ""
    if match.re.groups:
        return "/".join(text for text in match.groups() if text)
    return match[0]


def by_name(files: list[File]) -> tuple[dict[str, File], list[str]]:
    """Make a dict of files by name; also list the files whose name another one has.

    Macs write ä as two characters. Here names that look the same are the same.
    """
    named = {}
    problems = []
    for file in files:
        first = named.setdefault(unicodedata.normalize("NFC", file.name), file)
        if first is not file:
            same = f"has the name of {first.path} for a pair, {file.name!r}"
            problems.append(f"{file.path}: {same}; keep one, or put a * where they differ")
    return named, problems


def without(files: list[File], others: list[File]) -> list[File]:
    """Leave out the files that are among others."""
    paths = {file.path for file in others}
    return [file for file in files if file.path not in paths]


def choose_groups(groups: set[str], shares: list[float], split: str) -> set[str]:
    """Choose the groups of a split by its share of them: the same ones each time, at least one.

    Training gets what validation and testing leave.
    """
    # In the order of a hash, neighbours in name, perhaps taken at one time, are spread.
    shuffled = sorted(groups, key=lambda group: sha256(os.fsencode(group)).digest())
    _, validation_share, testing_share = shares
    n_validation = max(1, round(len(groups) * validation_share / sum(shares)))
    n_testing = max(1, round(len(groups) * testing_share / sum(shares)))
    if split == "validation":
        chosen = shuffled[:n_validation]
    elif split == "testing":
        chosen = shuffled[n_validation : n_validation + n_testing]
    else:
        chosen = shuffled[n_validation + n_testing :]
    return set(chosen)


# ---- messages


def list_alone(
    root: Path,
    files: dict[str, File],
    others: dict[str, File],
    pattern_of_others: str,
    kind_of_others: str,
) -> list[str]:
    """List the files whose name no other file has, and a file that may be meant instead."""
    alone = sorted(files.keys() - others.keys())
    if not alone:
        return []
    problems = []
    kind = "mask" if kind_of_others == "image" else "image"
    used = {other.path for name, other in others.items() if name in files}
    for name in alone:
        partner = root / fill(pattern_of_others, files[name].matches)
        hint = ""
        if len(problems) < MOST_EXPLAINED and partner.parent.is_dir():
            near = find_near(partner, used | {files[name].path})
            if near is not None:
                hint = f" (there is {near})"
        text = f"has no {kind_of_others} {partner}{hint}; add it, or remove this {kind}"
        problems.append(f"{files[name].path}: {text}")
    return problems


def words_of(name: str) -> set[str]:
    """Split a name into its words and numbers: {'img', '7'} of 'IMG_007.png'."""
    stem = name.rpartition(".")[0].lower() or name.lower()
    return {word.lstrip("0") for word in re.findall(r"\d+|[^\W\d_]+", stem)}


def find_near(partner: Path, used: set[Path]) -> str | None:
    """Find a file that may be meant by a missing one: it has all words and numbers of its name."""
    words = words_of(partner.name)
    for file_name in list_folder(partner.parent)[0]:
        if words <= words_of(file_name) and partner.parent / file_name not in used:
            return file_name
    return None


def explain_nothing(root: Path, pattern: str) -> str:
    """Say why a pattern has no files: the folder that is not there, or the files that are."""
    start = f"{root / pattern}: no such"
    if root.is_file():
        return f"{root}: is a file, but `data` is a folder; give the one that holds the images"
    if not root.is_dir():
        return f"{start} folder; run make data, or set data, images, masks"
    if "\\" in pattern:
        return f"{start} files; write / between folders, not \\"
    parts = parts_of(pattern)
    for depth in range(len(parts) - 1):
        above = find_folders(root, parts[:depth])
        if not find_folders(root, parts[: depth + 1]):
            names = list_folder(above[0][0])[1]
            return f"{start} folder {parts[depth]!r}; {above[0][0]} has {shorten(names)}"
    folder = find_folders(root, parts[:-1])[0][0]
    files, folders = list_folder(folder)
    endings = Counter(os.path.splitext(name)[1] or name for name in files)
    counts = [f"{number} {ending}" for ending, number in endings.most_common()]
    advice = "only * and {jpg,png} have a meaning in a pattern"
    if folders:
        advice = "**/ before the name of a file looks into folders too"
    return f"{start} files; {folder} has {shorten(counts + folders)}; {advice}"


def shorten(names: list[str]) -> str:
    """Join a few names, and say how many more there are."""
    text = ", ".join(names[:4]) or "nothing"
    if len(names) > 4:
        text += f" and {len(names) - 4} more"
    return text


def explain_too_few(root: Path, n_groups: int, n_pairs: int) -> str:
    """Say that the groups do not suffice for three splits."""
    advice = "add images"
    kind = "images"
    if n_groups < n_pairs:
        advice = "add images, or set group: '' if every image stands for itself"
        kind = f"groups of its {n_pairs} images"
    text = f"has {n_groups} {kind}, too few for three splits, which need at least three"
    return f"{root}: {text}; {advice}"


def find_unread(root: Path, patterns: tuple[str, ...]) -> list[str]:
    """List, as notes, the kinds of images that patterns below a folder leave out."""
    counts = Counter()
    for pattern in dict.fromkeys(patterns):
        expression = file_expression(parts_of(pattern)[-1])
        for folder, _ in find_folders(root, parts_of(pattern)[:-1]):
            for file_name in list_folder(folder)[0]:
                ending = file_name.rpartition(".")[2].lower()
                if ending in OTHER_ENDINGS and not expression.fullmatch(file_name):
                    counts[folder, ending] += 1
    notes = []
    for (folder, ending), number in counts.items():
        notes.append(f"{folder}: {number} .{ending} left out; convert them to .png to use them")
    return notes
