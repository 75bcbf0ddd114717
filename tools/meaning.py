"""Look at pairs of image and mask, and work out what the values in the masks mean."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common import UserError, reading
from data import evenly, in_parallel
from images import is_turned, open_image, read_deep, read_size, read_values
from masks import number_pixels

MOST_EXAMINED = 1000  # pairs, evenly spaced, that are read
NAME_FILES = ("class_names.txt", "classes.txt", "labels.txt")  # labelme writes the first
VOC_BORDER = 0xE0E0C0  # the colour of index 255 in the palette of PASCAL VOC
LARGEST_COLOUR = 0xFFFFFF
ROUGH = 3  # pixels: values that reach less far, on average, are no mask's
THIN = 4  # pixels: a value whose areas are thinner on average lies along edges
OUTLINE = 12  # pixels: an outline that nobody labelled is thinner
LARGEST_INDEX = 64  # 0, 128 and 255 are no indices
MOST_CLASSES = 40  # more values than that are numbers of objects, or smoothed
MOST_NUMBERS = 20  # more values than that, 1, 2, 3 … in each mask, are numbers of objects
MOST_THIN_VALUES = 8  # more thin values in a mask than that come from smoothing or JPEG
NEAR = 48  # colours that differ by less in each channel are one class, changed by JPEG
SMALLEST_SHARE = 0.002  # of a class that smoothing or JPEG changed; what has less is beside edges
LARGEST_TOLERANCE = 128


class ExaminedPair(NamedTuple):
    """What is known of a pair of files."""

    image: Path
    size: tuple[int, int]  # height and width, upright
    mask_size: tuple[int, int]
    mode: str  # Pillow's name for the kind of the image's pixels
    bits: int  # a channel of the image
    highest: int  # value in the image, if it has more than 8 bits
    only_image_turned: bool  # EXIF data turn the image upright, but not the mask
    kind: str  # of the mask: grey, palette or colours
    palette: dict[int, int]  # of a palette mask: value → colour
    numbers: np.ndarray  # (K,) the values in the mask; a colour is red × 65536 + green × 256 + blue
    pixels: np.ndarray  # (K,) how many have each value
    thickness: np.ndarray  # (K,) of the areas of each value, in pixels, mean over the pixels
    flatness: float  # median thickness of areas of exactly one value


class Value(NamedTuple):
    """What is known of a value over all masks."""

    share: float  # of all pixels
    thickness: float  # of its areas, in pixels, mean over its pixels
    n_masks: int  # that have it


class Masks(NamedTuple):
    """What is known of all masks."""

    kind: str
    palette: dict[int, int]
    values: dict[int, Value]
    n_masks: int


class Meaning(NamedTuple):
    """What the values in the masks mean."""

    mask_format: str
    reason: str
    classes: list[int]  # their values, in order
    ignored: Sequence[int] = ()
    ignore_reason: str = ""
    tolerance: int = 0
    numbers_objects: bool = False  # every value that is not listed is the number of an object


# ---- files


def run_lengths(numbers: np.ndarray) -> np.ndarray:
    """Compute how many equal pixels lie side by side at each pixel: (H, W) to (H, W)."""
    is_start = np.ones(numbers.shape, bool)
    is_start[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    starts = np.flatnonzero(is_start)
    lengths = np.diff(starts, append=numbers.size)
    return np.repeat(lengths, lengths).reshape(numbers.shape)


def measure_thickness(numbers: np.ndarray) -> np.ndarray:
    """Measure at each pixel how far its value reaches across or down, the shorter of both."""
    return np.minimum(run_lengths(numbers), run_lengths(numbers.T).T)


def read_numbers(path: Path) -> tuple[np.ndarray, str, dict[int, int]]:
    """Read a mask as (H, W) numbers; also its kind and its palette, as in ExaminedPair."""
    with reading(path):
        image, _ = open_image(path)
    if image.mode == "P":
        colours = np.array(image.getpalette("RGB")).reshape(-1, 3)
        palette = dict(enumerate(number_pixels(colours).tolist()))
        return read_values(path, "indices")[..., 0], "palette", palette
    if image.mode in ("RGB", "RGBA", "CMYK", "YCbCr"):
        values = read_values(path, "colours")
        if (values != values[..., :1]).any():
            return number_pixels(values), "colours", {}
        return values[..., 0], "grey", {}
    return read_values(path, "indices")[..., 0], "grey", {}


def count_values(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """List the K values of (H, W) numbers; the place of each pixel among them; their pixels."""
    if numbers.max() > 65535:
        return np.unique(numbers, return_inverse=True, return_counts=True)
    counts = np.bincount(numbers.ravel())  # faster than sorting all pixels
    values = np.flatnonzero(counts)
    place_of = np.cumsum(counts > 0) - 1
    return values, place_of[numbers], counts[values]


def coarse_colours(numbers: np.ndarray) -> np.ndarray:
    """Round each channel of colours, each one number, to five steps: 0, 64, 128, 192 and 255."""
    coarse = np.zeros_like(numbers)
    for shift in (16, 8, 0):
        channel = numbers >> shift & 255
        coarse = coarse * 8 + (channel + 32) // 64
    return coarse


def examine(pair: tuple[Path, Path]) -> ExaminedPair:
    """Look at an image and its mask; UserError if one cannot be read."""
    image_path, mask_path = pair
    image, bits = open_image(image_path)
    highest = int(read_deep(image_path, image, bits).max()) if bits > 8 else 0
    numbers, kind, palette = read_numbers(mask_path)
    values, places, pixels = count_values(numbers)
    thickness = measure_thickness(numbers)
    flatness = float(np.median(thickness))
    if len(values) > MOST_CLASSES and values[-1] <= LARGEST_COLOUR:
        # What JPEG changes a little is one area.
        thickness = measure_thickness(coarse_colours(numbers))
    return ExaminedPair(
        image=image_path,
        size=read_size(image_path),
        mask_size=numbers.shape,
        mode=image.mode,
        bits=bits,
        highest=highest,
        only_image_turned=is_turned(image_path) and not is_turned(mask_path),
        kind=kind,
        palette=palette,
        numbers=values,
        pixels=pixels,
        flatness=flatness,
        thickness=np.bincount(places.ravel(), weights=thickness.ravel()) / pixels,
    )


def examine_all(pairs: list[tuple[Path, Path]]) -> tuple[list[ExaminedPair], list[str]]:
    """Look at pairs, at most MOST_EXAMINED; also list what is wrong. UserError if none is read."""
    chosen = [pairs[i] for i in evenly(len(pairs), MOST_EXAMINED)]
    examined = []
    problems = []
    results = in_parallel(examine, chosen)
    for _, future in tqdm(results, "looking", len(chosen), disable=None):
        try:
            examined.append(future.result())
        except UserError as error:
            problems.append(str(error))
    if not examined:
        raise UserError(f"{problems[0]} ({len(problems)} pairs cannot be read)")
    if len(problems) > 1:
        problems = [f"{problems[0]} (and {len(problems) - 1} more)"]
    if len(chosen) < len(pairs):
        problems.append(f"{len(chosen)} of {len(pairs)} pairs were looked at, check reads all")
    misfits = [pair for pair in examined if pair.size != pair.mask_size]
    if misfits:
        height, width = misfits[0].size
        mask_height, mask_width = misfits[0].mask_size
        text = f"{mask_width}×{mask_height} for {width}×{height}"
        number = f"{len(misfits)} of {len(examined)} masks"
        problems.append(f"{number} differ in size from their image, as {text}")
    return examined, problems


def collect(examined: list[ExaminedPair]) -> Masks:
    """Add up what is known of the masks. Masks of several kinds or palettes count as colours."""
    kinds = {pair.kind for pair in examined}
    palette, is_shared = merge_palettes(examined)
    kind = examined[0].kind if len(kinds) == 1 and is_shared else "colours"
    pixels_of, weighted_of, masks_of = Counter(), Counter(), Counter()
    for pair in examined:
        in_this_mask = set()
        for i, number in enumerate(pair.numbers.tolist()):
            if kind == "colours":
                number = colour_number(number, pair.kind, pair.palette)
            pixels = int(pair.pixels[i])
            pixels_of[number] += pixels
            weighted_of[number] += pixels * float(pair.thickness[i])
            in_this_mask.add(number)
        masks_of.update(in_this_mask)
    all_pixels = pixels_of.total()
    values = {}
    for number, pixels in sorted(pixels_of.items()):
        thickness = weighted_of[number] / pixels
        values[number] = Value(pixels / all_pixels, thickness, masks_of[number])
    return Masks(kind, palette, values, len(examined))


def merge_palettes(examined: list[ExaminedPair]) -> tuple[dict[int, int], bool]:
    """Merge the palettes of masks; also tell whether no number has two colours."""
    merged = {}
    is_shared = True
    for pair in examined:
        if not pair.palette:
            continue
        for number in pair.numbers.tolist():
            colour = pair.palette.get(number, 0)
            if merged.setdefault(number, colour) != colour:
                is_shared = False
    return merged, is_shared


def colour_number(number: int, kind: str, palette: dict[int, int]) -> int:
    """Return the colour that a value of a mask stands for, as one number."""
    if kind == "palette":
        return palette.get(number, 0)
    if kind == "grey":
        return min(number, 255) * 0x010101
    return number


def split_colour(number: int) -> list[int]:
    """Split a colour that is one number into [red, green, blue]."""
    return [number >> 16, number >> 8 & 255, number & 255]


def read_class_names(folder: Path) -> list[str]:
    """Read the names of classes that a program left beside the data, by index; [] if none."""
    for name in NAME_FILES:
        path = folder / name
        if path.is_file():
            with reading(path):
                names = [line.strip().strip("_") for line in path.read_text("utf-8").splitlines()]
            names = [name for name in names if name]
            if names and names[0] == "ignore":
                names = names[1:]
            return names if len(set(names)) == len(names) else []
    return []


# ---- what values mean


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
    smoothed = [pair for pair in examined if (pair.thickness < THIN).sum() > MOST_THIN_VALUES]
    if len(smoothed) > len(examined) / 10:
        return find_smoothed(masks)
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
    if listed == [0, 255]:
        reason = "0 and 255: black and white"
    return Meaning("colours", reason, order_colours(masks, listed), ignored, ignore_reason)


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
    """The largest difference of a channel, as `mask_tolerance` measures it."""
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
    if value.thickness <= OUTLINE and others[-1] <= LARGEST_INDEX:
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
