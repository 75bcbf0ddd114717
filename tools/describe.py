"""Look at images and their masks, and write a config that is ready to train.

    python data.py describe --images photos --masks labels [--out my.yaml]

Each line of the config has its reason as a comment. What could not be decided is printed, and
stands above the lines.
"""

import argparse
import math
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from common import SPLITS, UserError, user_path, write_atomically
from data import padding_factor
from figures import distinct_colours
from images import likely_range
from patterns import find_files
from tools.check import note_shared_groups
from tools.examine import (
    GREY_MODES,
    ExaminedPair,
    Masks,
    Value,
    collect,
    examine_all,
    look_at_pixels,
)
from tools.layout import Layout, find_layout, propose_group
from tools.meaning import (
    LIKELY_INDEX,
    Meaning,
    are_photographs,
    colour_of,
    find_meaning,
    find_unlabelled,
    fitting_names,
    leave_out_odd,
    object_side,
    read_class_names,
)

LOOKED_AT = 12  # images, to see whether they are grey or transparent
SMALLEST_CROP = 64
LARGEST_CROP = 256
CROP_OF_PHOTOGRAPHS = 224  # where everything is an object
LARGE_IMAGE = 1024
WORTH_PADDING = 2  # times their pixels; images whose sizes differ more are resized
COLUMN = 44  # where comments begin


class Line(NamedTuple):
    """A line of a config, and its reason."""

    text: str
    reason: str = ""


def percent(share: float) -> str:
    """Write a share as a percentage with two digits that count, or three near 100 %."""
    number = 100 * share
    if number >= 99.5:  # which .2g would write as 1e+02
        return f"{number:.1f} %"
    return f"{number:.2g} %"


def quote(text: str) -> str:
    """Write a text as YAML, in quotes where it needs them."""
    dumped = yaml.safe_dump([text], default_flow_style=True, allow_unicode=True, width=100000)
    return dumped.strip()[1:-1]


# ---- decisions, one a function


def describe_files(layout: Layout, notes: list[str]) -> list[Line]:
    """Say where images and masks lie, and in which splits."""
    root = layout.root
    if root.is_relative_to(Path.cwd()):
        root = root.relative_to(Path.cwd())
    lines = [
        Line(f"data: {quote(str(root))}", "relative paths start where make is called"),
        Line(f"images: {quote(layout.images)}", f"{len(layout.pairs)} pairs"),
        Line(f"masks: {quote(layout.masks)}", "the * is what an image and its mask share"),
    ]
    if layout.split_folders:
        folders = ", ".join(quote(folder) for folder in layout.split_folders)
        reason = "folders of training, validation, testing"
        if len(layout.split_folders) == 2:
            reason = "the second is validation and testing"
            notes.append(f"split_folders: only {folders}; a third folder would test better")
        lines.append(Line(f"split_folders: [{folders}]", reason))
    if layout.alone:
        first = layout.alone[0]
        number = len(layout.alone)
        notes.append(f"{number} files have no partner, as {first}: add it, or remove them")
    if layout.unused:
        first = layout.unused[0]
        notes.append(f"{len(layout.unused)} files are in no pair, as {first}")
    for mask in layout.other_masks:
        notes.append(f"masks: {mask} fits as well; to take its kind, give a pattern with --masks")
    return lines


def describe_group(layout: Layout, notes: list[str]) -> list[Line]:
    """Propose what stays together when splits are drawn: the images of a video or a patient."""
    expression, reason = propose_group(layout.names)
    if expression:
        notes.append(f"group: {reason}; set '' if such images are independent")
        notes += note_shared_groups(list_groups(layout, expression))
        return [Line(f"group: {quote(expression)}", reason)]
    if not layout.split_folders:
        if len(layout.pairs) < len(SPLITS):
            notes.append(f"{len(layout.pairs)} pairs: three splits need at least three")
        name = layout.names[0]
        notes.append(f"group: which images, as {name}, are of one video or patient is not known")
    return [Line('group: ""', reason)]


def list_groups(layout: Layout, expression: str) -> dict[str, list[tuple[str, str]]]:
    """List (group, name) of the images in the folder of each split, if splits have folders."""
    groups = {}
    images = [image for image, _ in layout.pairs]
    names = dict(zip(images, layout.names, strict=True))
    for split, folder in zip(SPLITS, layout.split_folders, strict=False):  # two folders or three
        groups[split] = []
        for file in find_files(layout.root, layout.images.replace("{split}", folder)):
            if file.path in names:
                name = names[file.path]
                groups[split].append((re.search(expression, name)[0], name))
    return groups


def describe_format(meaning: Meaning, masks: Masks) -> list[Line]:
    """Say how pixels of masks hold their class."""
    lines = [Line(f"mask_format: {meaning.mask_format}", meaning.reason)]
    if meaning.tolerance:
        listed = sum(masks.values[number].share for number in meaning.classes)
        reason = f"smoothed or JPEG: {percent(1 - listed)} of the pixels take the nearest class"
        lines.append(Line(f"mask_tolerance: {meaning.tolerance}", reason))
    if meaning.ignored:
        values = meaning.ignored
        if meaning.mask_format == "colours":
            values = colour_of(masks, meaning.ignored[0])
        shares = sum(masks.values[n].share for n in meaning.ignored if n in masks.values)
        reason = f"{percent(shares)} of the pixels: {meaning.ignore_reason}"
        lines.append(Line(f"ignore: {values}", reason))
    unlabelled = find_unlabelled(meaning, masks)
    if unlabelled is not None and not meaning.ignored:
        reason = f"use this line if {unlabelled} marks pixels without a label"
        lines.append(Line(f"# ignore: [{unlabelled}]", reason))
    return lines


def describe_classes(meaning: Meaning, masks: Masks, names: list[str]) -> list[Line]:
    """List the classes with their shares. Their names are to be edited."""
    what = "rename them; colours are for pictures"
    if meaning.mask_format == "colours":
        what = "rename them; the colours are in the masks"
    lines = [Line("classes:", what)]
    pictured = distinct_colours(len(meaning.classes))
    has_background = meaning.numbers_objects or not are_photographs(meaning, masks)
    unlabelled = find_unlabelled(meaning, masks)
    for index, number in enumerate(meaning.classes):
        name = "background" if index == 0 and has_background else f"class_{index}"
        if names:
            name = names[number]
        colour = colour_of(masks, number)
        if meaning.mask_format == "indices" and masks.kind != "palette":
            colour = pictured[index]
        value = masks.values.get(number, Value(0, 0, 0))
        masks_with_it = f"{value.n_masks} of {masks.n_masks} masks"
        reason = f"{percent(value.share)} of the pixels, in {masks_with_it}"
        if meaning.mask_format == "indices" or masks.kind == "palette":
            reason = f"{number}: {reason}"
        if number == unlabelled and not meaning.ignored:
            reason += f"; remove this line if you use ignore: [{number}]"
        lines.append(Line(f"  {quote(name)}: {colour}", reason))
    if meaning.numbers_objects:
        share = 1 - masks.values[meaning.classes[0]].share
        background = colour_of(masks, meaning.classes[0])
        colour = [255, 255, 255] if background != [255, 255, 255] else [0, 0, 0]
        lines.append(Line(f"  object: {colour}", f"{percent(share)} of the pixels"))
        lines.append(Line("other_values: object", "every other value is an object"))
    return lines


def note_doubts(meaning: Meaning, masks: Masks, is_drawn: bool, notes: list[str]) -> None:
    """Say which values may mean something else."""
    values = masks.values
    shares = [values[number].share for number in meaning.classes]
    if len(masks.kinds) > 1:
        kinds = ", ".join(f"{number} {kind}" for kind, number in masks.kinds.items())
        text = "so what they show counts; if all hold numbers, save them as one kind"
        notes.append(f"masks: of several kinds ({kinds}), {text}")
    if meaning.numbers_objects:
        text = "if they are classes, list each of them, without other_values"
        notes.append(f"classes: {len(values) - 1} values are taken for numbers of objects; {text}")
    others = [number for number in meaning.classes if number != 255]
    are_indices = masks.kind == "grey" and len(others) > 2 and max(others) <= LIKELY_INDEX
    if are_indices and 255 in meaning.classes:
        text = "if 255 marks pixels without a label, set ignore: [255, 255, 255]"
        notes.append(f"classes: {text} and remove its class")
    n_scattered = sum(values[number].n_masks < masks.n_masks / 2 for number in meaning.classes[1:])
    may_number_objects = masks.kind == "grey" and n_scattered > 2
    unlabelled = find_unlabelled(meaning, masks)
    if unlabelled is not None and not may_number_objects:
        ignored = sorted([*meaning.ignored, unlabelled])
        text = f"if {unlabelled} marks pixels without a label, set ignore: {ignored}"
        notes.append(f"classes: {text} and remove its class")
    if are_photographs(meaning, masks):
        notes.append("classes: the first counts as background, but others cover most of the pixels")
    rare = [number for number in meaning.classes if values[number].n_masks < len(SPLITS)]
    if rare and is_drawn:
        text = f"{len(rare)} of {len(shares)} are in one or two masks"
        notes.append(f"classes: {text}; the training split may get none of them")
    if may_number_objects:
        text = "if the values number objects, keep two classes"
        notes.append(f"classes: {text} and set other_values to the second")
    for number in meaning.ignored:
        if number in values:
            text = "is taken for pixels without a label; if it is a class, list it as one"
            value = number if meaning.mask_format == "indices" else colour_of(masks, number)
            notes.append(f"ignore: {value} {text}")


def describe_images(examined: list[ExaminedPair], notes: list[str]) -> list[Line]:
    """Say how many channels and bits the images have."""
    lines = []
    value_range = []
    deep = [pair for pair in examined if pair.bits > 8]
    if deep:
        bits = max(pair.bits for pair in deep)
        lowest = min(pair.lowest for pair in deep)
        highest = max(pair.highest for pair in deep)
        value_range = likely_range(lowest, highest)
        reason = f"{bits} bits a channel, values from {lowest} to {highest}"
        lines.append(Line(f"value_range: {value_range}", reason))
    modes = Counter(pair.mode for pair in examined)
    kinds = ", ".join(f"{number} {mode}" for mode, number in modes.most_common())
    reason = f"kinds of pixels: {kinds}"
    channels = 3
    is_grey, opacities = look_at_pixels(examined, value_range, LOOKED_AT)
    if is_grey:  # a few coloured ones would lose their colours
        may_have_colours = [pair for pair in examined if pair.mode not in GREY_MODES]
        is_grey, more_opacities = look_at_pixels(may_have_colours, value_range, 0)
        opacities |= more_opacities
    if is_grey:
        channels = 1
        reason += "; without colours"
    elif len(opacities) > 1:
        channels = 4
        reason += "; some pixels are transparent"
    elif opacities == {0}:
        notes.append("in_channels: every pixel is transparent, so transparency is not used")
    lines.append(Line(f"in_channels: {channels}", reason))
    for kind, others in (("image", "masks"), ("mask", "images")):
        turned = sum(pair.turned_alone == kind for pair in examined)
        if turned:
            text = f"are turned upright by their EXIF data, but not their {others}"
            notes.append(f"{turned} {kind}s {text}: see in the picture of make check if they fit")
    return lines


def describe_sizes(
    examined: list[ExaminedPair], meaning: Meaning, masks: Masks, notes: list[str]
) -> list[Line]:
    """Choose `resize`, `crop` and `crop_on_objects` by the sizes of images and of objects."""
    sizes = [pair.size for pair in examined]
    height = int(np.median([height for height, _ in sizes]))
    width = int(np.median([width for _, width in sizes]))
    side = object_side(meaning, masks)
    is_photograph = are_photographs(meaning, masks)
    crop, factor = choose_crop(side, is_photograph)
    n_sizes = len(set(sizes))
    lines = []
    if factor < 1:
        reason = f"objects of {side:.0f} pixels are large; images are {width}×{height}"
    else:
        reason = f"{n_sizes} sizes, the median is {width}×{height}"
    if n_sizes > 1 and factor == 1 and crops_fit(sizes, crop):
        lines.append(Line(f"# {range_of_sizes(sizes)}: crops need no resize"))
    elif n_sizes > 1 or factor < 1:
        height = round_up_to_16(height * factor)
        width = round_up_to_16(width * factor)
        lines.append(Line(f"resize: [{height}, {width}]", reason))
        if n_sizes > 1:
            notes.append("resize: images of other proportions are distorted")
    background = masks.values[meaning.classes[0]].share
    if is_photograph and max(height, width) > LARGE_IMAGE:
        notes.append(f"crop: {crop} pixels are little of {width}×{height}; `resize` shows more")
    if crop >= min(height, width):
        lines.append(Line("crop: 0", f"whole images of {width}×{height}"))
    elif is_photograph:
        reason = f"everything is an object: {percent(1 - background)} is not of the first class"
        lines.append(Line(f"crop: {crop}", reason))
        lines.append(Line("crop_on_objects: 0.0", "crops anywhere"))
    else:
        reason = f"objects are about {side * factor:.0f} pixels wide"
        lines.append(Line(f"crop: {crop}", reason))
        lines.append(Line("crop_on_objects: 1.0", f"{percent(background)} is background"))
    return lines


def crops_fit(sizes: list[tuple[int, int]], crop: int) -> bool:
    """Tell whether a crop fits into all images, and their sizes are near enough for padding."""
    smallest = min(min(size) for size in sizes)
    return crop < smallest and padding_factor(sizes) <= WORTH_PADDING


def range_of_sizes(sizes: list[tuple[int, int]]) -> str:
    """Say how many sizes there are, and from which to which they reach."""
    heights = [height for height, _ in sizes]
    widths = [width for _, width in sizes]
    wide = f"{min(widths)} to {max(widths)} wide"
    return f"{len(set(sizes))} sizes, {wide}, {min(heights)} to {max(heights)} high"


def choose_crop(side: float, is_photograph: bool) -> tuple[int, float]:
    """Choose the side of a crop that shows objects of a side, and a factor to resize images by."""
    if is_photograph:
        return CROP_OF_PHOTOGRAPHS, 1.0
    factor = 1.0
    if 1.5 * side > LARGEST_CROP:
        factor = LARGEST_CROP / (2 * side)
    return max(SMALLEST_CROP, round_up_to_16(1.5 * side * factor)), factor


def round_up_to_16(side: float) -> int:
    """Round a side up to a multiple of 16 pixels: four times halved, it stays whole."""
    return max(16, math.ceil(round(side) / 16) * 16)


# ---- the config


def write_config(lines: list[Line], notes: list[str], args: argparse.Namespace) -> str:
    """Write the config: what could not be decided, then each line with its reason."""
    command = ["python", "data.py", "describe", "--images", args.images, "--masks", args.masks]
    text = f"# Written by: {shlex.join(command)}\n"
    for note in notes:
        text += f"# To decide: {note}\n"
    for line in lines:
        if line.reason:
            text += f"{line.text:<{COLUMN}}  # {line.reason}\n"
        else:
            text += f"{line.text}\n"
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python data.py describe`."""
    what = "a folder, or a pattern in quotes"
    parser.add_argument("--images", required=True, metavar="PATH", help=what)
    parser.add_argument("--masks", required=True, metavar="PATH", help=f"{what}; may be the same")
    parser.add_argument("--out", type=user_path, metavar="FILE", help="a new file to write it to")


def main(args: argparse.Namespace) -> None:
    if args.out and args.out.exists():
        raise UserError(f"{args.out}: exists already; give another --out, or remove it")
    is_taken = str(args.out) in ("afo.yaml", "generated.yaml")
    has_space = " " in str(args.out)
    if args.out and (args.out.suffix != ".yaml" or is_taken or has_space):
        text = "make takes DATA=NAME.yaml without spaces, and afo and generated are taken"
        raise UserError(f"{args.out}: {text}; give another name")
    if not args.images or not args.masks:
        raise UserError("give both folders: make describe IMAGES=photos MASKS=labels")
    layout = find_layout(args.images, args.masks)
    examined, notes = examine_all(layout.pairs)
    usual = leave_out_odd(examined, notes)
    masks = collect(usual)
    meaning = find_meaning(usual, masks)
    names = fitting_names(read_class_names(layout.root), meaning, masks)
    lines = describe_files(layout, notes)
    lines += describe_group(layout, notes)
    lines += describe_format(meaning, masks)
    lines += describe_classes(meaning, masks, names)
    lines += describe_images(examined, notes)
    lines += describe_sizes(examined, meaning, masks, notes)
    note_doubts(meaning, masks, not layout.split_folders, notes)
    if names:
        text = "are those of a list beside the data: its first for 0, its second for 1 …"
        notes.append(f"classes: their names {text}; see by their shares if that is right")
    text = write_config(lines, notes, args)
    if args.out is None:
        print(text, end="")
        return
    write_atomically(args.out, text.encode())
    for note in notes:
        print(f"to decide: {note}")
    experiment = "photos" if are_photographs(meaning, masks) else "best"
    check, train = f"make check DATA={args.out}", f"make train-{experiment} DATA={args.out}"
    print(f"wrote {args.out}; rename the classes in it, then: {check}, and then: {train}")
