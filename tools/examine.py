"""Look at pairs of image and mask: sizes, kinds of pixels, and which values the masks hold."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common import UserError
from data import evenly, in_parallel
from images import open_image, read_deep, read_image, read_size, read_values, turned_alone
from masks import number_pixels

MOST_EXAMINED = 1000  # pairs, evenly spaced, that are read
MOST_CLASSES = 40  # more values than that are numbers of objects, or smoothed
LARGEST_COLOUR = 0xFFFFFF
GREY_MODES = ("1", "L", "LA", "I", "I;16")  # Pillow's names for images without colours


class ExaminedPair(NamedTuple):
    """What is known of a pair of files."""

    image: Path
    mask: Path
    size: tuple[int, int]  # height and width, upright
    mask_size: tuple[int, int]
    mode: str  # Pillow's name for the kind of the image's pixels
    bits: int  # a channel of the image
    lowest: int  # value in the image, if it has more than 8 bits
    highest: int
    turned_alone: str  # "image" or "mask" if EXIF data turn one of them upright alone, else ""
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
    kinds: dict[str, int]  # kind → how many masks are of it


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
    values = read_values(path, "indices")[..., 0]
    if image.mode == "1":
        values = 255 * values.astype(np.int64)  # black and white, as masks of 8 bits have it
    return values, "grey", {}


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
    lowest, highest = 0, 0
    if bits > 8:
        values_of_image = read_deep(image_path, image, bits)
        lowest, highest = int(values_of_image.min()), int(values_of_image.max())
    numbers, kind, palette = read_numbers(mask_path)
    values, places, pixels = count_values(numbers)
    thickness = measure_thickness(numbers)
    flatness = float(np.median(thickness))
    if len(values) > MOST_CLASSES and values[-1] <= LARGEST_COLOUR:
        # What JPEG changes a little is one area.
        thickness = measure_thickness(coarse_colours(numbers))
    return ExaminedPair(
        image=image_path,
        mask=mask_path,
        size=read_size(image_path),
        mask_size=numbers.shape,
        mode=image.mode,
        bits=bits,
        lowest=lowest,
        highest=highest,
        turned_alone=turned_alone(image_path, mask_path),
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


def look_at_pixels(
    examined: list[ExaminedPair], value_range: list[int], number: int
) -> tuple[bool, set[int]]:
    """Tell whether a number of images are grey, 0: all; also list the values of their alpha."""
    is_grey = True
    opacities = set()
    for i in evenly(len(examined), number):
        try:
            pixels = read_image(examined[i].image, 4, value_range)
        except UserError:  # it is damaged: make check will say so
            continue
        is_grey = is_grey and bool((pixels[..., :3] == pixels[..., :1]).all())
        opacities.update(np.unique(pixels[..., 3]).tolist())
    return is_grey, opacities


def collect(examined: list[ExaminedPair]) -> Masks:
    """Add up what is known of the masks. Masks of several kinds or palettes count as colours."""
    kinds = Counter(pair.kind for pair in examined)
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
    return Masks(kind, palette, values, len(examined), dict(kinds))


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
