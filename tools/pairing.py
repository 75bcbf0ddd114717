"""Learn from the names of files which mask belongs to which image.

A path below a folder is handled as its parts, the last without its ending: a/img_1.png becomes
("a", "img_1"). An image and its mask share some text of each part. What stands around that text is
the same for all images, and the same for all masks: that is a rule.
"""

import difflib
import os
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import UserError
from data import evenly
from patterns import ENDINGS, WILDCARD, find_files
from tools.examine import read_numbers

SAMPLES = 8  # masks whose images are looked for, to learn a rule
MOST_CANDIDATES = 2000  # images that each of them is compared with
OTHER_SPLITS = ("val", "valid", "validation", "dev", "test", "testing")
LAST_TRAIN = re.compile(r"train(ing)?(?!.*train)", re.IGNORECASE)

Parts = tuple[str, ...]
Files = dict[Parts, Path]
Around = tuple[tuple[str, str], ...]  # for each part, what stands before and after the shared text


class Rule(NamedTuple):
    """What stands around the shared texts of all images, and of all masks."""

    image: Around
    mask: Around


# ---- files


def list_files(text: str) -> list[Path]:
    """List the images in a folder, at any depth, or those of a pattern; UserError if none."""
    pattern = text.replace("{split}", "*")
    folder = Path(pattern).expanduser().absolute()
    is_missing = WILDCARD.search(pattern) is None and not folder.exists()
    patterns = ["**/*"]
    if not folder.is_dir():
        pattern = folder.name
        folder = folder.parent
        while not folder.is_dir():
            pattern = f"{folder.name}/{pattern}"
            folder = folder.parent
        patterns = [pattern, f"{pattern}/**/*"]  # of files, or of folders
    for pattern in patterns:
        files = sorted(file.path for file in find_files(folder, pattern))
        if files:
            return files
    kinds = ", ".join(ENDINGS)
    advice = f"give a folder with images ({kinds}), or a pattern in quotes, as in 'photos/*.jpg'"
    if is_missing:
        raise UserError(f"{text}: there is no such folder; {advice}")
    raise UserError(f"{text}: has no images; {advice}")


def list_both(images: str, masks: str) -> tuple[list[Path], list[Path]]:
    """List the images and the masks; both lists are the same where they lie in one folder."""
    return separate(list_files(images), list_files(masks))


def list_other_splits(images: str, masks: str) -> tuple[list[Path], list[Path]]:
    """List the files in the folders of the other splits, beside those of the training split."""
    images = str(Path(images).expanduser().absolute())  # paths as list_files gives them
    masks = str(Path(masks).expanduser().absolute())
    image_files = []
    mask_files = []
    for word in OTHER_SPLITS:  # CamVid/train and CamVid/trainannot → CamVid/val and CamVid/valannot
        other_images = folder_of_split(images, word)
        other_masks = folder_of_split(masks, word)
        is_other = images != other_images and masks != other_masks
        if is_other and os.path.isdir(other_images) and os.path.isdir(other_masks):
            more_images = [file.path for file in find_files(Path(other_images), "**/*")]
            more_masks = [file.path for file in find_files(Path(other_masks), "**/*")]
            if more_images and more_masks:
                image_files += more_images
                mask_files += more_masks
    return image_files, mask_files


def folder_of_split(text: str, word: str) -> str:
    """Put the word for another split in the place of "train", in capitals as there."""
    match = LAST_TRAIN.search(text)
    if match is None:
        return text
    if match[0].isupper():
        word = word.upper()
    elif match[0][0].isupper():
        word = word.title()
    return text[: match.start()] + word + text[match.end() :]


def separate(image_files: list[Path], mask_files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Take the masks out of the images, or the other way round, where one list has the other."""
    if set(image_files) > set(mask_files):  # the masks lie in a folder among the images
        image_files = sorted(set(image_files) - set(mask_files))
    elif set(mask_files) > set(image_files):
        mask_files = sorted(set(mask_files) - set(image_files))
    return image_files, mask_files


def common_folder(files: list[Path]) -> Path:
    """Find the deepest folder that holds all files."""
    return Path(os.path.commonpath([path.parent for path in files]))


def normal_name(path: Path) -> str:
    """Take the name of a file without its ending, in the form in which pairs.by_name compares."""
    return unicodedata.normalize("NFC", path.stem)


def split_paths(files: list[Path], base: Path, is_deep: bool) -> Files:
    """Split paths below a folder into parts; if they differ in depth, into folders and name."""
    paths = {}
    for path in files:
        parts = (*path.relative_to(base).parts[:-1], normal_name(path))
        if is_deep:
            parts = ("/".join(parts[:-1]), parts[-1])
        paths[parts] = path
    return paths


# ---- rules


def shared_text(image: str, mask: str, where: str) -> str:
    """Find the longest text that two parts share, anywhere or at their end."""
    if where == "end":
        shared = ""
        for character, other in zip(reversed(image), reversed(mask), strict=False):
            if character != other:
                break
            shared = character + shared
        return shared
    matcher = difflib.SequenceMatcher(None, image, mask, autojunk=False)
    match = matcher.find_longest_match()
    return image[match.a : match.a + match.size]


def learn_rule(image: Parts, mask: Parts, where: str) -> Rule:
    """Learn from an image and its mask what stands around the text that they share."""
    around_image = []
    around_mask = []
    for image_part, mask_part in zip(image, mask, strict=True):
        shared = shared_text(image_part, mask_part, where)
        if image_part != mask_part:
            shared = shared.strip("_- .")  # a separator belongs to what was added
        for part, around in ((image_part, around_image), (mask_part, around_mask)):
            before, _, after = part.partition(shared) if shared else (part, "", "")
            around.append((before, after))
    return Rule(tuple(around_image), tuple(around_mask))


def numbers_of(parts: Parts) -> list[str]:
    """List the numbers in a path, which an image and its mask mostly share."""
    return re.findall(r"\d+", "/".join(parts))


def find_image(mask: Parts, images: list[Parts]) -> Parts | None:
    """Find the image that shares most text with a mask; of equals, the shortest."""
    numbers = numbers_of(mask)
    longest = max(numbers, key=len, default="")
    images = [image for image in images if len(image) == len(mask)]
    candidates = [image for image in images if numbers_of(image) == numbers]
    if not candidates:
        candidates = [image for image in images if longest in "/".join(image)]

    def likeness(image: Parts) -> tuple[int, int]:
        shared = 0
        for image_part, mask_part in zip(image, mask, strict=True):
            shared += len(shared_text(image_part, mask_part, "anywhere"))
        return shared, -len("".join(image))

    return max(candidates[:MOST_CANDIDATES], key=likeness, default=None)


def select(files: Files, around: Around) -> Files:
    """Select the files that have the given texts around their shared text, by the shared text."""
    selected = {}
    for parts, path in files.items():
        if len(parts) != len(around):
            continue
        shared = []
        for part, (before, after) in zip(parts, around, strict=True):
            has_both = len(part) >= len(before) + len(after)
            if has_both and part.startswith(before) and part.endswith(after):
                shared.append(part[len(before) : len(part) - len(after)])
        if len(shared) == len(parts) and any(shared):
            selected[tuple(shared)] = path
    return selected


def apply_rule(rule: Rule, images: Files, masks: Files) -> tuple[Files, Files]:
    """Select the images and the masks that a rule fits, by their shared texts."""
    selected_masks = select(masks, rule.mask)
    selected_images = select(images, rule.image)
    used = set(selected_masks.values())
    for shared in list(selected_images):
        # Where x.png and x_mask.png lie in one folder, x_mask.png is no image.
        if selected_images[shared] in used:
            del selected_images[shared]
    return selected_images, selected_masks


def find_rules(images: Files, masks: Files) -> dict[Rule, list[tuple[Path, Path]]]:
    """Learn rules from some masks: each rule with the pairs that it makes, the best rule first."""
    keys = sorted(masks)
    rules = {}
    for i in evenly(len(keys), SAMPLES):
        mask = keys[i]
        others = [image for image, path in images.items() if path != masks[mask]]
        image = find_image(mask, others)
        if image is None:
            continue
        for where in ("anywhere", "end"):  # "m" is the longest of img1 and mask1
            rule = learn_rule(image, mask, where)
            if rule not in rules:
                image_files, mask_files = apply_rule(rule, images, masks)
                shared = sorted(image_files.keys() & mask_files.keys())
                rules[rule] = [(image_files[key], mask_files[key]) for key in shared]
    best_first = sorted(rules, key=lambda rule: -len(rules[rule]))
    return {rule: rules[rule] for rule in best_first}


def find_other_masks(rules: dict[Rule, list[tuple[Path, Path]]]) -> list[Path]:
    """List a mask of each other kind that fits the images as well as the kind that was chosen."""
    pairs_of_rules = list(rules.values())
    chosen = pairs_of_rules[0]
    first_image, first_mask = chosen[0]
    other_masks = set()
    for pairs in pairs_of_rules[1:]:
        image, mask = pairs[0] if pairs else (None, None)
        if len(pairs) == len(chosen) and image == first_image and mask != first_mask:
            other_masks.add(mask)
    return sorted(other_masks)


def count_colours(path: Path) -> int:
    """Count the colours of a file: a mask has fewer than its image."""
    return len(np.unique(read_numbers(path)[0]))
