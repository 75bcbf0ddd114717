"""Generate sequences like those of the Artificial Flying Objects data set.

    python data.py generate --out data/generated [--sequences 300 60 60] [--frames K] [--seed 0]

Every number below was measured on the real training split (128×128), by fitting the shapes of the
first frames: redrawn from fitted places and sizes, two of three come out identical, nearly all
masks do, and the rest differ in a pixel or two. The shapes are the square, triangle and circle
markers of a plotting program, drawn with eight samples per pixel.
"""

import argparse
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

from common import SPLITS, UserError

import numpy as np
from PIL import Image
from tqdm import tqdm

SHAPES = ("square", "triangle", "circular")  # drawn in the mask's red, green and blue
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}
MIN_SIZE = 16  # a square is then one to four pixels wide

# Where a pixel is sampled: (x, y) from its centre, the usual pattern of graphics hardware.
SAMPLES = np.array([(1, -3), (-1, 3), (5, 1), (-3, -5), (-5, 5), (-7, -1), (3, 7), (7, -7)]) / 16
WHITE, TARGET, MOVER, FIRST, SECOND = range(5)  # what a sample shows: the later hides the earlier

MARKER_SIZES = 21, 35  # points, all equally likely; the target has the size of the moving shape
PIXELS_PER_POINT = 4 / 3
CENTRES = (4.2, 4.0), (113.2, 120.2)  # all shapes: uniform in this box of (x, y), hence cut ones
PRESENCE = 0.7  # of either shape that stands still
APPROACH = 0.1  # share of the way left to the target, in each frame
ARRIVED = 1.12, 1.167  # (x, y) in pixels: one unit of the plot's axes, where a sequence ends


def covered(
    shape: str, centre: np.ndarray, diameter: float, xs: np.ndarray, ys: np.ndarray
) -> np.ndarray:
    """Tell which of the points (`xs`, `ys`) a marker covers, bool of their broadcast shape.

    `centre` (x, y), the marker's `diameter` and the points are in pixels, y downwards; the centres
    of pixels lie on whole numbers.
    """
    if shape == "square":  # snapped to whole pixels; its rim is always 7/8 covered
        half = np.floor(0.4 * diameter - 0.4) + 0.375
        x, y = np.round(centre)
        return (np.abs(xs - x) <= half) & (np.abs(ys - y) <= half)
    x, y = xs - centre[0], ys - centre[1]
    if shape == "triangle":
        width = diameter + 1 / 6
        return (x >= -width / 3) & (x + np.sqrt(3) * np.abs(y) <= 2 * width / 3)
    radius = (diameter + 1) / 2
    # A circle is a polygon of 24, 28 or 32 sides: the points behind all sides of a quarter of it.
    x, y = np.abs(x), np.abs(y)
    sides = np.ceil(1.5 * np.sqrt(radius))
    step = np.pi / 2 / sides
    reach = radius * np.cos(step / 2)
    angles = step * (np.arange(sides) + 0.5)
    return np.logical_and.reduce([x * np.cos(a) + y * np.sin(a) <= reach for a in angles])


def resolve(
    labels: np.ndarray, colours: np.ndarray, classes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels of an image and of its mask, both uint8 (H, W, 3).

    `labels` (8, H, W) says what each sample shows; `colours` and `classes` (5, 3) are its colour in
    the image and in the mask, 0 to 255. Pixels are the rounded mean of their samples, but a pixel
    has a class only where all its samples have that class, be it in one shape or in several.
    """
    counts = np.stack([(labels == label).sum(axis=0, dtype=np.uint8) for label in range(5)], axis=2)
    image = (counts @ colours + 4) // 8
    mask = 255 * (counts @ classes == 8 * 255)
    return image.astype(np.uint8), mask.astype(np.uint8)


def draw_sequence(
    shape: str, colour: str, size: int, rng: np.random.Generator, frames: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield the frames of a sequence as (number, image, mask), both uint8 (size, size, 3).

    Args:
        shape, colour: of the moving object, in `SHAPES` and `COLOURS`.
        size: side of a frame in pixels.
        rng: the only source of randomness.
        frames: how many frames, chosen at random; 0: all of them.
    """
    scale = size / 128
    # One shape of each other kind stands still; shapes and colours follow the moving one in turn.
    kinds = [(SHAPES.index(shape) + step) % 3 for step in range(3)]
    names = list(COLOURS)
    tints = [COLOURS[names[(names.index(colour) + step) % 4]] for step in range(3)]
    colours = np.array([(255, 255, 255), (0, 0, 0), *tints], np.uint16)
    palette = 255 * np.eye(3, dtype=np.uint16)
    classes = np.stack([np.zeros(3, np.uint16), *palette[[kinds[0], *kinds]]])

    low, high = MARKER_SIZES
    diameters = rng.integers(low, high, 3, endpoint=True) * PIXELS_PER_POINT * scale
    target, place, *still = rng.uniform(*CENTRES, (4, 2)) * scale
    present = rng.random(2) < PRESENCE

    xs = np.arange(size)[None, None, :] + SAMPLES[:, 0, None, None]
    ys = np.arange(size)[None, :, None] + SAMPLES[:, 1, None, None]
    scene = np.full((len(SAMPLES), size, size), WHITE, np.uint8)
    scene[covered(shape, target, diameters[0], xs, ys)] = TARGET
    for i, label in enumerate((FIRST, SECOND)):
        if present[i]:
            other = SHAPES[kinds[i + 1]]
            scene[covered(other, still[i], diameters[i + 1], xs, ys)] = label
    without_mover = resolve(scene, colours, classes)

    places = [place]
    while not (np.abs(target - places[-1]) <= np.multiply(ARRIVED, scale)).all():
        places.append(places[-1] + APPROACH * (target - places[-1]))
    kept = range(len(places))
    if 0 < frames < len(places):
        kept = sorted(rng.choice(len(places), frames, replace=False))
    for i in kept:
        # Only what is near the moving shape differs between frames.
        reach = 2 / 3 * diameters[0] + 2
        left, top = np.clip(np.floor(places[i] - reach).astype(int), 0, size)
        right, bottom = np.clip(np.ceil(places[i] + reach).astype(int), 0, size)
        near = np.s_[:, top:bottom, left:right]
        mover = covered(shape, places[i], diameters[0], xs[:, :, left:right], ys[:, top:bottom])
        labels = np.maximum(scene[near], MOVER * mover.astype(np.uint8))
        image, mask = (pixels.copy() for pixels in without_mover)
        image[near[1:]], mask[near[1:]] = resolve(labels, colours, classes)
        yield i + 1, image, mask


def write_sequence(
    folder: Path, split: str, index: int, total: int, size: int, seed: int, frames: int
) -> int:
    """Draw and save sequence `index` of `total` of a split; returns the number of its images."""
    # A seed of its own for every sequence: nothing depends on the workers or the other splits.
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    combination = index * len(SHAPES) * len(COLOURS) // total  # grouped, as in the real data
    shape = SHAPES[combination // len(COLOURS)]
    colour = list(COLOURS)[combination % len(COLOURS)]
    images = 0
    for frame, image, mask in draw_sequence(shape, colour, size, rng, frames):
        name = f"{index + 1:06d}_{shape}_{colour}_{frame:06d}.png"
        Image.fromarray(image).save(folder / split / "image" / name, compress_level=1)
        Image.fromarray(mask).save(folder / split / "gt_image" / f"gt_{name}", compress_level=1)
        images += 1
    return images


def ignore_interrupt() -> None:
    """Leave Ctrl-C to the parent process, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def generate(
    out: Path,
    sequences: dict[str, int],
    size: int,
    seed: int,
    frames: int = 0,
    workers: int | None = None,
) -> int:
    """Generate a data set of `size`×`size` RGB PNG pairs in the layout of the real one.

    The same seed gives the same bytes whatever the workers and the other splits.

    Args:
        out: a new or empty folder; it appears only when all is written.
        sequences: number of sequences of each split.
        size: side of an image in pixels.
        seed: whole number, 0 or more.
        frames: random frames of each sequence; 0: all of them.
        workers: processes; None: one per core.

    Returns:
        The number of images.

    Raises:
        UserError: a value is out of range; `out` is not empty.
    """
    total = sum(sequences.values())
    if min(sequences.values()) < 1 or max(sequences.values()) > 999_999:
        raise UserError("--sequences: must be from 1 to 999999")
    if size < MIN_SIZE or seed < 0 or frames < 0:
        raise UserError(f"--size: must be {MIN_SIZE} or more, --seed and --frames 0 or more")
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    if out.exists():
        raise UserError(f"{out}: is there already; remove it or give another --out")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    for split in sequences:
        for folder in ("image", "gt_image"):
            (partial / split / folder).mkdir(parents=True)
    jobs = [(split, index, count) for split, count in sequences.items() for index in range(count)]
    columns = (
        repeat(partial),
        *zip(*jobs, strict=True),
        repeat(size),
        repeat(seed),
        repeat(frames),
    )
    workers = min(workers or os.cpu_count() or 1, total)
    # Spawned, not forked: the caller may have threads (torch) that a fork would break.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, ignore_interrupt) if workers > 1 else None
    try:
        written = (pool.map if pool else map)(write_sequence, *columns)
        images = sum(tqdm(written, "generate", total, unit="sequence", disable=None))
        partial.rename(out)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
        shutil.rmtree(partial, ignore_errors=True)
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    counts = {"nargs": 3, "type": int, "default": [300, 60, 60], "metavar": "N"}
    parser.add_argument("--sequences", help="training, validation, testing", **counts)
    parser.add_argument("--frames", type=int, default=0, help="random frames of each; 0: all")
    parser.add_argument("--size", type=int, default=128, help="side of an image in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    sequences = dict(zip(SPLITS, args.sequences, strict=True))
    images = generate(args.out, sequences, args.size, args.seed, args.frames)
    print(f"{images} images in {args.out}; next: python data.py check {args.out}")
