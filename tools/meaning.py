"""Work out what the values in masks mean: classes, numbers of objects, pixels without a label."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import UserError, reading
from tools.examine import (
    MOST_CLASSES,
    ExaminedPair,
    Masks,
    Value,
    collect,
    colour_number,
    split_colour,
)

NAME_FILES = ("class_names.txt", "classes.txt", "labels.txt")  # labelme writes the first
VOC_BORDER = 0xE0E0C0  # the colour of index 255 in the palette of PASCAL VOC
ROUGH = 3  # pixels: values that reach less far, on average, are no mask's
THIN = 4  # pixels: a value whose areas are thinner on average lies along edges
OUTLINE = 12  # pixels: an outline that nobody labelled is thinner
LIKELY_INDEX = 64  # the largest; 0, 128 and 255 are no indices
MOST_NUMBERS = 20  # more values than that, 1, 2, 3 … in each mask, are numbers of objects
MOST_THIN_VALUES = 8  # more thin values in a mask than that come from smoothing or JPEG
NEAR = 48  # colours that differ by less in each channel are one class, changed by JPEG
SMALLEST_SHARE = 0.002  # of a class that smoothing or JPEG changed; what has less is beside edges
LARGEST_TOLERANCE = 128
SHARE_OF_ODD = 0.1  # of the masks: if no more of them were smoothed, they are left out
MOST_NEW = 20  # values that a sound mask may have and no other


class Meaning(NamedTuple):
    """What the values in the masks mean."""

    mask_format: str
    reason: str
    classes: list[int]  # their values, in order
    ignored: Sequence[int] = ()
    ignore_reason: str = ""
    tolerance: int = 0
    numbers_objects: bool = False  # every value that is not listed is the number of an object


def read_class_names(folder: Path) -> list[str]:
    """Read the names of classes that a program left beside the data, by index; [] if none."""
    for name in NAME_FILES:
        path = folder / name
        if path.is_file():
            with reading(path):
                lines = path.read_text("utf-8-sig").splitlines()
            names = [line.strip().strip("_") for line in lines]
            names = [name for name in names if name]
            if names and names[0] == "ignore":
                names = names[1:]
            return names if len(set(names)) == len(names) else []
    return []


def fitting_names(names: list[str], meaning: Meaning, masks: Masks) -> list[str]:
    """Return the names of classes if every class has one by its index, else []."""
    if masks.kind == "colours" or meaning.numbers_objects or max(meaning.classes) >= len(names):
        return []
    return names


# ---- what values mean


def has_thin_values(pair: ExaminedPair) -> bool:
    """Tell whether a mask has many values beside edges: it was smoothed, or is a photograph."""
    is_photograph = len(pair.numbers) > MOST_CLASSES and pair.flatness < ROUGH
    return is_photograph or (pair.thickness < THIN).sum() > MOST_THIN_VALUES


def leave_out_odd(examined: list[ExaminedPair], notes: list[str]) -> list[ExaminedPair]:
    """Leave out a few masks that were smoothed, where the others were not, and note it.

    A smoothed mask has many values that no other mask has. So has one with many small objects, if
    the values number objects: then all stay.
    """
    usual = [pair for pair in examined if not has_thin_values(pair)]
    odd = [pair for pair in examined if has_thin_values(pair)]
    if not odd or len(odd) > SHARE_OF_ODD * len(examined):
        return examined
    all_masks = collect(examined)
    usual_values = collect(usual).values
    if all_masks.kind != "colours" and are_numbers_of_objects(examined, all_masks.values):
        return examined
    if len(usual_values) > MOST_CLASSES or len(all_masks.values) <= len(usual_values) + MOST_NEW:
        return examined
    text = f"hold many values beside edges, unlike the others, as {odd[0].mask}"
    notes.append(f"masks: {len(odd)} {text}; save them again, or remove them")
    return usual


def check_white(examined: list[ExaminedPair]) -> None:
    """Raise UserError if white is 255 in some masks of two classes, and 1 in others."""
    first_with = {}  # white → the first mask that has it
    for pair in examined:
        foreground = set(pair.numbers.tolist()) - {0}
        if pair.kind != "grey" or len(foreground) > 1:
            return
        for white in foreground:
            first_with.setdefault(white, pair.mask)
    if set(first_with) == {1, 255}:
        text = f"hold 0 and 1 ({first_with[1]}), or 0 and 255 ({first_with[255]})"
        raise UserError(f"masks: {text}; save all with the same two values")


def find_meaning(examined: list[ExaminedPair], masks: Masks) -> Meaning:
    """Work out what the values in the masks mean; UserError if they cannot be classes."""
    if len(masks.values) == 1:
        value = next(iter(masks.values))
        raise UserError(f"masks: every pixel is {value}; masks of at least two classes are needed")
    if masks.kind != "colours" and are_numbers_of_objects(examined, masks.values):
        if 0 not in masks.values:
            lowest = min(masks.values)
            raise UserError(f"masks: hold {lowest} and more, but no 0 for the background; add it")
        highest = max(masks.values)
        reason = f"values up to {highest}, {len(masks.values)} of them: numbers of objects"
        return Meaning("indices", reason, [0], numbers_objects=True)
    if len(masks.values) > MOST_CLASSES and np.median([p.flatness for p in examined]) < ROUGH:
        text = f"hold {len(masks.values)} values that change at every pixel, as photographs do"
        raise UserError(f"masks: {text}; exchange --images and --masks, or correct the masks")
    smoothed = [pair for pair in examined if has_thin_values(pair)]
    if len(smoothed) > SHARE_OF_ODD * len(examined):
        return find_smoothed(masks)
    check_white(examined)
    if len(masks.values) > MOST_CLASSES and masks.kind == "colours":
        reason = f"{len(masks.values)} colours: each object has its own"
        background = order_colours(masks, list(masks.values))[0]
        return Meaning("colours", reason, [background], numbers_objects=True)
    ignored, ignore_reason = find_border(masks)
    listed = [number for number in masks.values if number not in ignored]
    if masks.kind != "colours" and listed == list(range(len(listed))):
        reason = f"the masks hold {listed[0]} to {listed[-1]}"
        return Meaning("indices", reason, listed, ignored, ignore_reason)
    if masks.kind != "colours" and listed == list(range(1, len(listed) + 1)):
        reason = f"the masks hold {listed[0]} to {listed[-1]}"
        ignore_reason = f"no mask has 0; {ignore_reason}".rstrip("; ")
        return Meaning("indices", reason, listed, [0, *ignored], ignore_reason)
    what = {
        "grey": "grey values with gaps, as colours: 7 is [7, 7, 7]",
        "palette": "a palette with gaps, by its colours",
        "colours": f"{len(masks.values)} colours",
    }
    reason = what[masks.kind]
    if masks.kind == "palette":
        check_palette(masks, [*listed, *ignored])
    if listed == [0, 255]:
        reason = "0 and 255: black and white"
    return Meaning("colours", reason, order_colours(masks, listed), ignored, ignore_reason)


def check_palette(masks: Masks, numbers: list[int]) -> None:
    """Raise UserError if two numbers of a palette have one colour, which cannot be two classes."""
    first_with = {}  # colour → the first number that has it
    for number in numbers:
        colour = colour_of(masks, number)
        first = first_with.setdefault(tuple(colour), number)
        if first != number:
            text = f"{first} and {number} have the same colour in the palette, {colour}"
            raise UserError(f"masks: {text}; save the numbers as grey files")


def are_numbers_of_objects(examined: list[ExaminedPair], values: dict[int, Value]) -> bool:
    """Tell whether values count objects: too large for classes, or 1, 2, 3 … in each mask."""
    if max(values) > 255:
        return True
    if len(values) <= MOST_NUMBERS:
        return False
    for pair in examined:
        objects = pair.numbers[pair.numbers > 0]
        if len(objects) > 0 and objects.max() != len(objects):
            return False
    return True


def find_smoothed(masks: Masks) -> Meaning:
    """Find the classes of masks whose edges were smoothed, or that were saved as JPEG."""
    values = masks.values
    colours = {number: colour_of(masks, number) for number in values}
    clusters = {}  # of values that cover areas: the most frequent one → share of all
    for number in sorted(values, key=lambda number: -values[number].share):
        if values[number].thickness < THIN:
            continue
        near = [other for other in clusters if distance(colours[number], colours[other]) <= NEAR]
        cluster = near[0] if near else number
        clusters[cluster] = clusters.get(cluster, 0) + values[number].share
    classes = [number for number, share in clusters.items() if share > SMALLEST_SHARE]
    if len(classes) < 2:
        text = f"hold {len(values)} values, but not two that cover areas"
        raise UserError(f"masks: {text}; save them again with one value for each class")
    distances = {}
    for number in values:
        distances[number] = min(distance(colours[number], colours[c]) for c in classes)
    farthest = max(distances.values())
    tolerance = min(LARGEST_TOLERANCE, (farthest // 8 + 2) * 8)
    reason = f"{len(classes)} colours, and {len(values) - len(classes)} values beside edges"
    return Meaning("colours", reason, order_colours(masks, classes), tolerance=tolerance)


def distance(colour: list[int], other: list[int]) -> int:
    """Return the largest difference of a channel, as `mask_tolerance` measures it."""
    return max(abs(a - b) for a, b in zip(colour, other, strict=True))


def find_border(masks: Masks) -> tuple[list[int], str]:
    """Find a value that marks pixels without a label, and why it looks like one; [] if none."""
    border = VOC_BORDER if masks.kind == "colours" else 255
    value = masks.values.get(border)
    others = [number for number in masks.values if number != border]
    if value is None or len(others) < 2:
        return [], ""
    if VOC_BORDER in (border, masks.palette.get(border)):
        return [border], "the colour that PASCAL VOC gives to pixels without a label"
    if value.thickness <= OUTLINE and others[-1] <= LIKELY_INDEX:
        return [border], f"outlines, {value.thickness:.0f} pixels wide on average"
    if others[0] <= 1 and others[-1] - others[0] == len(others) - 1:
        return [border], "the other values have no gap, so it marks pixels without a label"
    return [], ""


def order_colours(masks: Masks, numbers: list[int]) -> list[int]:
    """Order values by their share, the largest first, but black before all."""
    return sorted(numbers, key=lambda number: (number != 0, -masks.values[number].share))


def colour_of(masks: Masks, number: int) -> list[int]:
    """Return the colour that a value stands for in pictures, and in masks of colours."""
    return split_colour(colour_number(number, masks.kind, masks.palette))


def find_unlabelled(meaning: Meaning, masks: Masks) -> int | None:
    """Find an index that may mark pixels without a label: a rare first one, or the last of many."""
    if meaning.mask_format != "indices":
        return None
    shares = [masks.values[number].share for number in meaning.classes]
    if len(shares) > 2 and shares[0] == min(shares):
        return meaning.classes[0]
    if len(shares) > 4:
        return meaning.classes[-1]
    return None


def are_photographs(meaning: Meaning, masks: Masks) -> bool:
    """Tell whether everything is an object, as in a street: no background covers half of it."""
    return masks.values[meaning.classes[0]].share < 0.5


def object_side(meaning: Meaning, masks: Masks) -> float:
    """Estimate the side of the objects in pixels."""
    background = meaning.classes[0]
    share = 0.0
    thickness = 0.0
    for number, value in masks.values.items():
        is_class = number in meaning.classes or meaning.numbers_objects
        if is_class and number != background and number not in meaning.ignored:
            share += value.share
            thickness += value.share * value.thickness
    # A row through a disc is about two thirds of its diameter long, on average over its pixels.
    return 1.5 * thickness / max(share, 1e-9)
