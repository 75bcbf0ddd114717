"""Find where images and masks lie and which belong together, in the words of a config."""

import contextlib
import re
from pathlib import Path
from typing import NamedTuple

from common import UserError
from tools.pairing import (
    Around,
    Parts,
    Rule,
    apply_rule,
    common_folder,
    count_colours,
    find_other_masks,
    find_rules,
    list_both,
    list_other_splits,
    normal_name,
    separate,
    split_paths,
)

GROUPS = {  # what may stand for one video or patient in a name, the likeliest first
    "^[^/]+": "first folder",
    "^[^_]+": "text before the first _",
    "^[^-]+": "text before the first -",
    "^.*(?=_)": "text before the last _",
    "^.*(?=-)": "text before the last -",
}
LEAST_SHARE = 0.2  # of the files that a rule must pair: one folder may hold several kinds of masks
LEAST_SHARE_APART = 0.3  # where images and masks have folders of their own
SPLIT_WORDS = ("tr(ai)?n", "val|dev", "test")  # what the folders of the three splits begin with


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


# ---- patterns


def find_splits(texts: set[str]) -> list[str]:
    """Order folders' names as training, validation, testing; empty if they are not two or three."""
    folders = []
    for word in SPLIT_WORDS:
        fitting = [text for text in sorted(texts) if re.match(word, text, re.IGNORECASE)]
        if word == SPLIT_WORDS[0] and len(fitting) != 1:  # test1, test2 and test3 are no splits
            return []
        folders += fitting
    if len(folders) not in (2, 3) or set(folders) != texts:
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
    n_parts = len(shared[0])
    for number, texts in enumerate(zip(*shared, strict=True), start=1):
        folders = []
        if number < n_parts and not split_folders:  # the last part names files
            folders = find_splits(set(texts))
        if folders:
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
        if find_splits(groups):  # names like train_001 repeat the split, which is no group
            continue
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


def find_splits_of_images(
    image_list: list[Path], image_base: Path, mask_list: list[Path], mask_base: Path
) -> list[str]:
    """Find the folders of the splits if the images alone lie in such; else []."""
    are_masks_flat = all(path.parent == mask_base for path in mask_list)
    are_images_in_folders = all(path.parent.parent == image_base for path in image_list)
    names = {normal_name(path) for path in image_list}
    if not are_masks_flat or not are_images_in_folders or len(names) < len(image_list):
        return []
    return find_splits({path.parent.name for path in image_list})


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
    splits_of_images = find_splits_of_images(image_list, image_base, mask_list, mask_base)
    if splits_of_images:
        image_paths = {(normal_name(path),): path for path in image_list}
        mask_paths = split_paths(mask_list, mask_base, is_deep=False)
        is_deep = False
    else:
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
    image_folder = image_base.relative_to(root)
    if splits_of_images:
        split_folders = splits_of_images
        image_folder /= "{split}"
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
        images=write_pattern(image_folder, rule.image, stars, images_in_order),
        masks=write_pattern(mask_base.relative_to(root), rule.mask, stars, masks_in_order),
        split_folders=split_folders,
        names=[name_of(key, stars) for key in shared],
        pairs=list(zip(images_in_order, masks_in_order, strict=True)),
        alone=find_alone(image_files, mask_files),
        unused=sorted(unused),
        other_masks=find_other_masks(rules),
    )
