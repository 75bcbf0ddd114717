"""Draw sequences like those of the Artificial Flying Objects data set.

Every number below was measured on the real training split (128×128), by fitting the shapes of the
first frames: redrawn from fitted places and sizes, two of three come out identical, nearly all
masks do, and the rest differ in a pixel or two. The shapes are the square, triangle and circle
markers of a plotting program, drawn with eight samples per pixel.
"""

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from errors import UserError

SPLITS = ("training", "validation", "testing")
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
    """Return which of the points (`xs`, `ys`) a marker covers, bool of their broadcast shape.

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
    shape: str, colour: str, size: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the frames of a sequence as (image, mask), both uint8 (size, size, 3)."""
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

    arrived = False
    while not arrived:
        # Only what is near the moving shape differs between frames.
        reach = 2 / 3 * diameters[0] + 2
        left, top = np.clip(np.floor(place - reach).astype(int), 0, size)
        right, bottom = np.clip(np.ceil(place + reach).astype(int), 0, size)
        near = np.s_[:, top:bottom, left:right]
        mover = covered(shape, place, diameters[0], xs[:, :, left:right], ys[:, top:bottom])
        labels = np.maximum(scene[near], MOVER * mover.astype(np.uint8))
        image, mask = (pixels.copy() for pixels in without_mover)
        image[near[1:]], mask[near[1:]] = resolve(labels, colours, classes)
        yield image, mask
        arrived = (np.abs(target - place) <= np.multiply(ARRIVED, scale)).all()
        place = place + APPROACH * (target - place)


def write_sequence(folder: Path, split: str, index: int, total: int, size: int, seed: int) -> int:
    """Draw and save sequence `index` of `total` of a split; return the number of its frames."""
    # A seed of its own for every sequence: nothing depends on the workers or the other splits.
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    combination = index * len(SHAPES) * len(COLOURS) // total  # grouped, as in the real data
    shape = SHAPES[combination // len(COLOURS)]
    colour = list(COLOURS)[combination % len(COLOURS)]
    for frame, (image, mask) in enumerate(draw_sequence(shape, colour, size, rng), start=1):
        name = f"{index + 1:06d}_{shape}_{colour}_{frame:06d}.png"
        Image.fromarray(image).save(folder / split / "image" / name, compress_level=1)
        Image.fromarray(mask).save(folder / split / "gt_image" / f"gt_{name}", compress_level=1)
    return frame


def follow_parent() -> None:
    """Leave Ctrl-C to the parent process, which tidies up; end when it is killed.

    A worker that outlives it would write into the folder of the next run.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def write_all(folder: Path, sequences: dict[str, int], size: int, seed: int, workers: int) -> int:
    """Write all splits into `folder`; return the number of frames."""
    jobs = [(split, index, total) for split, total in sequences.items() for index in range(total)]
    for split in sequences:
        (folder / split / "image").mkdir(parents=True)
        (folder / split / "gt_image").mkdir()
    arguments = (repeat(folder), *zip(*jobs, strict=True), repeat(size), repeat(seed))
    progress = {"total": len(jobs), "unit": "sequence", "desc": "generate", "disable": None}
    if workers == 1:
        return sum(tqdm(map(write_sequence, *arguments), **progress))
    # Spawned, not forked: the caller may have threads (torch) that a fork would break.
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), multiprocessing.get_context("spawn"), follow_parent
    )
    try:
        return sum(tqdm(pool.map(write_sequence, *arguments), **progress))
    finally:
        pool.shutdown(cancel_futures=True)


def generate(
    out: Path, sequences: dict[str, int], size: int, seed: int, workers: int | None = None
) -> int:
    """Generate a data set of `size`×`size` RGB PNG pairs in the layout of the real one.

    `sequences` maps split names to numbers of sequences, `workers` is a number of processes (None:
    one per core). The same seed gives the same bytes whatever the workers and the other splits.
    `out` appears only when all is written. Returns the number of frames. Raises UserError for bad
    values, for an `out` that exists and is not an empty folder, and where it cannot be written.
    """
    out = Path(out).absolute()
    if size < MIN_SIZE:
        raise UserError(f"size {size} is too small: use {MIN_SIZE} or more")
    if seed < 0:
        raise UserError(f"seed {seed} is negative: use 0 or more")
    for split, total in sequences.items():
        if not 1 <= total <= 999_999:
            raise UserError(f"{total} {split} sequences: use 1 to 999999")

    partial = out.parent / (out.name + ".partial")
    try:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"{out} exists and is not empty: remove it or choose another folder")
        if partial.exists():
            shutil.rmtree(partial)  # left by a run that was killed
        partial.mkdir(parents=True)
        try:
            frames = write_all(partial, sequences, size, seed, workers or os.cpu_count() or 1)
            if out.exists():
                out.rmdir()
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    return frames
