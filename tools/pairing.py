"""Learn from the names of files which mask belongs to which image, and say it as patterns.

A path below a folder is handled as its parts, the last without its ending: a/img_1.png becomes
("a", "img_1"). An image and its mask share some text of each part. What stands around that text is
the same for all images, and the same for all masks: that is a rule.
"""

import contextlib
import difflib
import os
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import UserError
from data import evenly
from patterns import ENDINGS, find_files
from tools.examine import read_numbers

GROUPS = {  # what may stand for one video or patient in a name, the likeliest first
    "^[^/]+": "first folder",
    "^[^_]+": "text before the first _",
    "^[^-]+": "text before the first -",
    "^.*(?=_)": "text before the last _",
    "^.*(?=-)": "text before the last -",
}
SAMPLES = 8  # masks whose images are looked for, to learn a rule
MOST_CANDIDATES = 2000  # images that each of them is compared with
LEAST_SHARE = 0.2  # of the files that a rule must pair: one folder may hold several kinds of masks
LEAST_SHARE_APART = 0.3  # where images and masks have folders of their own
SPLIT_WORDS = ("tr(ai)?n", "val|dev", "test")  # what the folders of the three splits begin with
OTHER_SPLITS = ("val", "valid", "validation", "dev", "test", "testing")
LAST_TRAIN = re.compile(r"train(ing)?(?!.*train)")

Parts = tuple[str, ...]
Files = dict[Parts, Path]
Around = tuple[tuple[str, str], ...]  # for each part, what stands before and after the shared text


class Rule(NamedTuple):
    """What stands around the shared texts of all images, and of all masks."""

    image: Around
    mask: Around


class Layout(NamedTuple):
    """Where the files lie, in the words of a config, and which belong together."""

    root: Path
    images: str
    masks: str
    split_folders: list[str]  # empty if there are none
    names: list[str]  # of the pairs, without the folder of the split
    pairs: list[tuple[Path, Path]]  # image, mask
    alone: list[Path]  # files that fit a pattern and have no partner
    unused: list[Path]  # files that fit no pattern
    other_masks: list[Path]  # one of each other kind of mask that fits the images as well


# ---- files


def list_files(text: str) -> list[Path]:
    """List the images in a folder, at any depth, or those of a pattern; UserError if none."""
    folder = Path(text.replace("{split}", "*")).expanduser().absolute()
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
    raise UserError(f"{text}: has no images; {advice}")


def list_both(images: str, masks: str) -> tuple[list[Path], list[Path]]:
    """List the images and the masks; both lists are the same where they lie in one folder."""
    return separate(list_files(images), list_files(masks))


def list_other_splits(images: str, masks: str) -> tuple[list[Path], list[Path]]:
    """List the files in the folders of the other splits, beside those of the training split."""
    image_files = []
    mask_files = []
    for word in OTHER_SPLITS:  # CamVid/train and CamVid/trainannot → CamVid/val and CamVid/valannot
        other_images = LAST_TRAIN.sub(word, images)
        other_masks = LAST_TRAIN.sub(word, masks)
        is_other = images != other_images and masks != other_masks
        if is_other and os.path.isdir(other_images) and os.path.isdir(other_masks):
            more_images = [file.path for file in find_files(Path(other_images), "**/*")]
            more_masks = [file.path for file in find_files(Path(other_masks), "**/*")]
            if more_images and more_masks:
                image_files += more_images
                mask_files += more_masks
    return image_files, mask_files


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


def split_paths(files: list[Path], base: Path, is_deep: bool) -> Files:
    """Split paths below a folder into parts; if they differ in depth, into folders and name."""
    paths = {}
    for path in files:
        *folders, name = path.relative_to(base).with_suffix("").parts
        parts = (*folders, unicodedata.normalize("NFC", name))  # as pairs.by_name has it
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


# ---- patterns


def find_splits(texts: set[str]) -> list[str]:
    """Order folders' names as training, validation, testing; empty if they are not two or three."""
    folders = []
    for word in SPLIT_WORDS:
        folders += [text for text in sorted(texts) if re.match(word, text, re.IGNORECASE)]
    if len(folders) not in (2, 3) or set(folders) != texts or len(set(folders)) != len(folders):
        return []
    return folders


def write_pattern(folder: Path, around: Around, stars: list[str], files: list[Path]) -> str:
    """Write a pattern: the folder, then each part with its star, then the endings of the files."""
    parts = []
    for (before, after), star in zip(around, stars, strict=True):
        part = f"{before}{star}{after}"
        if part:  # the folders are empty where all pairs lie at the top
            parts.append(part)
    endings = sorted({path.suffix.lower().removeprefix(".") for path in files})
    ending = endings[0] if len(endings) == 1 else "{" + ",".join(endings) + "}"
    return (folder / "/".join(parts)).as_posix() + f".{ending}"


def choose_stars(shared: list[Parts]) -> tuple[list[str], list[str]]:
    """Choose what a pattern has for each part of the shared texts; also list the split folders."""
    stars = []
    split_folders = []
    for texts in zip(*shared, strict=True):
        folders = find_splits(set(texts))
        if folders and not split_folders:
            split_folders = folders
            stars.append("{split}")
        elif len(set(texts)) == 1 and len(shared) > 1:
            stars.append(texts[0])
        else:
            stars.append("*")
    return stars, split_folders


def propose_group(names: list[str]) -> tuple[str, str]:
    """Propose an expression for `group` if parts of names repeat, else ""; and the reason."""
    for expression, meaning in GROUPS.items():
        matches = [re.search(expression, name) for name in names]
        if not all(matches):
            continue
        groups = {match[0] for match in matches}
        has_separator = not groups & set(names)
        if has_separator and 3 <= len(groups) <= len(names) / 2:
            return expression, f"{len(groups)} groups by the {meaning}, as {min(groups)}"
    return "", "no part of the names repeats: each image stands for itself"


def explain_nothing(images: str, masks: str, image_list: list[Path], mask_list: list[Path]) -> str:
    """Say that no rule pairs images with masks."""
    if image_list == mask_list:
        advice = "give the folder of the images and the folder of the masks, or two patterns"
        return f"{images}: no file has the name of another's mask; {advice}"
    text = f"names do not fit, as {image_list[0].name} and {mask_list[0].name}"
    return f"{images}, {masks}: {text}; give an image and its mask the same name"


def name_of(key: tuple[str, ...], stars: list[str]) -> str:
    """Join the parts of a path that stand for a star, which image and mask share."""
    parts = []
    for part, star in zip(key, stars, strict=True):
        if "*" in star:
            parts.append(part)
    return "/".join(parts)


def find_alone(image_files: dict[tuple, Path], mask_files: dict[tuple, Path]) -> list[Path]:
    """List the images without a mask and the masks without an image."""
    alone = []
    for key in sorted(image_files.keys() ^ mask_files.keys()):
        alone.append(image_files.get(key) or mask_files[key])
    return alone


def find_layout(images: str, masks: str) -> Layout:
    """Pair the images and masks of two folders or patterns; UserError if nothing fits.

    Folders of the training split bring the folders of the other splits with them, if their files
    are named alike.
    """
    image_list, mask_list = list_both(images, masks)
    other_images, other_masks = list_other_splits(images, masks)
    if not other_images or not other_masks:
        return pair_lists(images, masks, image_list, mask_list)
    more_images, more_masks = separate(image_list + other_images, mask_list + other_masks)
    with contextlib.suppress(UserError):  # nothing fits both
        layout = pair_lists(images, masks, more_images, more_masks)
        if layout.split_folders:
            return layout
    layout = pair_lists(images, masks, image_list, mask_list)
    return layout._replace(unused=sorted(layout.unused + other_images + other_masks))


def pair_lists(images: str, masks: str, image_list: list[Path], mask_list: list[Path]) -> Layout:
    """Pair the images and masks of two lists, which `images` and `masks` name in messages."""
    root = common_folder(image_list + mask_list)
    if image_list == mask_list:
        image_base = mask_base = root
    else:
        image_base = common_folder(image_list)
        mask_base = common_folder(mask_list)
    depths = {len(path.relative_to(image_base).parts) for path in image_list}
    depths.update(len(path.relative_to(mask_base).parts) for path in mask_list)
    is_deep = len(depths) > 1
    image_paths = split_paths(image_list, image_base, is_deep)
    mask_paths = split_paths(mask_list, mask_base, is_deep)
    rules = find_rules(image_paths, mask_paths)
    rule = next(iter(rules), None)
    least = LEAST_SHARE if image_list == mask_list else LEAST_SHARE_APART
    if rule is None or len(rules[rule]) < least * min(len(image_list), len(mask_list)):
        raise UserError(explain_nothing(images, masks, image_list, mask_list))
    image_files, mask_files = apply_rule(rule, image_paths, mask_paths)
    shared = sorted(image_files.keys() & mask_files.keys())
    first_image, first_mask = image_files[shared[0]], mask_files[shared[0]]
    if image_list == mask_list and count_colours(first_image) < count_colours(first_mask):
        image_files, mask_files = mask_files, image_files
        rule = Rule(image=rule.mask, mask=rule.image)

    stars, split_folders = choose_stars(shared)
    if is_deep and stars[0] == "*":
        stars[0] = "**"
        if rule.image[0] != ("", "") or rule.mask[0] != ("", ""):
            advice = "give the folder of the images and the folder of the masks"
            raise UserError(f"{images}: has files at several depths; {advice}")
    images_in_order = [image_files[key] for key in shared]
    masks_in_order = [mask_files[key] for key in shared]
    unused = set(image_list + mask_list) - set(image_files.values()) - set(mask_files.values())
    return Layout(
        root=root,
        images=write_pattern(image_base.relative_to(root), rule.image, stars, images_in_order),
        masks=write_pattern(mask_base.relative_to(root), rule.mask, stars, masks_in_order),
        split_folders=split_folders,
        names=[name_of(key, stars) for key in shared],
        pairs=list(zip(images_in_order, masks_in_order, strict=True)),
        alone=find_alone(image_files, mask_files),
        unused=sorted(unused),
        other_masks=find_other_masks(rules),
    )
