"""Generate flights like those of the Artificial Flying Objects data set.

    python data.py generate --out data/generated [--sequences 300 60 60] [--frames K] [--seed 0]

A flight (a sequence of images of one scene) shows a shape that moves towards a black target of its
own kind. Shapes are drawn as a plotting program draws its markers. The numbers below were measured
on the training split of the real data, whose images have 128×128 pixels.
"""

import argparse
import contextlib
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy import ndarray
from numpy.random import Generator, default_rng
from PIL import Image
from tqdm import tqdm

from common import SPLITS, UserError, naming_full_disk, wait_for_lock

SHAPES = ("square", "triangle", "circular")
MASK_COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255)])  # of the shapes, in their order
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}
KINDS = [(shape, colour) for shape in SHAPES for colour in COLOURS]  # of the moving shape

# Each pixel is sampled at eight points, (x, y) from its centre: the pattern of graphics hardware.
SAMPLES = np.array([(1, -3), (-1, 3), (5, 1), (-3, -5), (-5, 5), (-7, -1), (3, 7), (7, -7)]) / 16
# The label of a sample says what is seen there. A higher label hides a lower one.
WHITE, TARGET, MOVER, FIRST, SECOND = range(5)

NATIVE_SIZE = 128  # pixels; the numbers below are for images of this side
SMALLEST, LARGEST = 21, 35  # points: the diameter of a shape, all whole numbers equally likely
PIXELS_PER_POINT = 4 / 3
LOWEST_CENTRE = (4.2, 4.0)  # (x, y): centres are uniform in a box, so the border cuts some shapes
HIGHEST_CENTRE = (113.2, 120.2)
PRESENCE = 0.7  # probability of each of the two shapes that stand still
APPROACH = 0.1  # share of the way left to the target that the moving shape goes in each frame
ARRIVED = (1.12, 1.167)  # (x, y) in pixels: a flight ends this near to its target


def covered(shape: str, centre: ndarray, diameter: float, xs: ndarray, ys: ndarray) -> ndarray:
    """Tell which points a marker covers, as bool of the shape that xs and ys broadcast to.

    All lengths are in pixels, y points down, and pixel centres have whole coordinates.
    """
    x = xs - centre[0]
    y = np.abs(ys - centre[1])  # every marker is symmetric up and down
    if shape == "square":
        # It is snapped to whole pixels, and its boundary always covers 7/8 of a pixel.
        half = np.floor(0.4 * diameter - 0.4) + 0.375
        column, row = np.round(centre)
        return (np.abs(xs - column) <= half) & (np.abs(ys - row) <= half)
    if shape == "triangle":  # it points to the right: one slanted side, and one on the left
        normals = np.pi / 3 * np.array([1, 3])
        distance = (diameter + 1 / 6) / 3
    else:  # a circle is a polygon with six to eight sides in each quarter
        x = np.abs(x)
        radius = (diameter + 1) / 2
        sides = np.ceil(1.5 * np.sqrt(radius))
        normals = np.pi / 2 / sides * (np.arange(sides) + 0.5)
        distance = radius * np.cos(np.pi / 4 / sides)
    # A regular polygon is what lies on the inner side of every side. A side is given by the angle
    # of its normal and by its distance from the centre.
    inside = np.ones(np.broadcast_shapes(x.shape, y.shape), bool)
    for angle in normals:
        inside &= x * np.cos(angle) + y * np.sin(angle) <= distance
    return inside


def paint(labels: ndarray, label: int, shape: str, centre: ndarray, diameter: float) -> None:
    """Give the samples that a marker covers, of (8, size, size), its label if it hides theirs."""
    # Only the window around the marker is computed: the rest would take most of the time.
    reach = 0.7 * diameter + 1
    left = max(0, int(centre[0] - reach))
    right = int(centre[0] + reach) + 1
    top = max(0, int(centre[1] - reach))
    bottom = int(centre[1] + reach) + 1
    window = labels[:, top:bottom, left:right]
    pixels = np.arange(labels.shape[1])
    xs = pixels[left:right] + SAMPLES[:, 0, None, None]  # (8, 1, width)
    ys = pixels[top:bottom, None] + SAMPLES[:, 1, None, None]  # (8, height, 1)
    hit = covered(shape, centre, diameter, xs, ys)
    window[hit & (window < label)] = label


def resolve(labels: ndarray, colours: ndarray, classes: ndarray) -> tuple[ndarray, ndarray]:
    """Reduce the labels of samples, (8, H, W), to image and mask, both (H, W, 3) uint8.

    `colours` and `classes`, (5, 3) in 0…255, have the colour of each label in image and mask. A
    pixel of the image is the mean of its samples; a pixel of the mask has a class if all have it.
    """
    counts = [(labels == label).sum(axis=0, dtype=np.uint8) for label in range(5)]
    # Floats are exact here, and many times faster to multiply than integers.
    counts = np.stack(counts, axis=2).astype(np.float32)  # (H, W, 5)
    image = (counts @ colours + 4) / 8  # rounded to the nearest
    in_class = (counts @ classes) == 8 * 255
    return image.astype(np.uint8), 255 * in_class.astype(np.uint8)


def fly(start: ndarray, target: ndarray, scale: float) -> list[ndarray]:
    """List the places (x, y) of a flight from start to target, one for each frame."""
    near = np.multiply(ARRIVED, scale)
    places = [start]
    while not (np.abs(target - places[-1]) <= near).all():
        places.append(places[-1] + APPROACH * (target - places[-1]))
    return places


def draw_sequence(
    shape: str, colour: str, size: int, rng: Generator, frames: int
) -> Iterator[tuple[int, ndarray, ndarray]]:
    """Yield (frame number, image, mask) of a flight, both (size, size, 3) uint8.

    `frames` of them are chosen at random; 0 yields all.
    """
    # Beside the moving shape and its target, one shape of each other kind may stand still. Kinds
    # and colours go in turn, beginning with those of the moving shape.
    kinds = np.roll([0, 1, 2], -SHAPES.index(shape))
    first_colour = list(COLOURS).index(colour)
    paints = np.roll(list(COLOURS.values()), -first_colour, axis=0)
    white = (255, 255, 255)
    black = (0, 0, 0)
    moving_class, first_class, second_class = MASK_COLOURS[kinds]
    # In the order of the labels: white, target, moving shape, first and second shape.
    colours = np.array([white, black, paints[0], paints[1], paints[2]], np.float32)
    classes = np.array([black, moving_class, moving_class, first_class, second_class], np.float32)

    # The order of these draws decides which pictures a seed gives.
    scale = size / NATIVE_SIZE
    diameters = rng.integers(SMALLEST, LARGEST, 3, endpoint=True) * PIXELS_PER_POINT * scale
    centres = rng.uniform(LOWEST_CENTRE, HIGHEST_CENTRE, (4, 2)) * scale
    target, start, first_centre, second_centre = centres
    has_first, has_second = rng.random(2) < PRESENCE

    still = np.full((len(SAMPLES), size, size), WHITE, np.uint8)
    paint(still, TARGET, shape, target, diameters[0])
    if has_first:
        paint(still, FIRST, SHAPES[kinds[1]], first_centre, diameters[1])
    if has_second:
        paint(still, SECOND, SHAPES[kinds[2]], second_centre, diameters[2])
    places = fly(start, target, scale)
    if frames == 0 or frames > len(places):
        frames = len(places)
    for i in sorted(rng.choice(len(places), frames, replace=False)):
        labels = still.copy()
        paint(labels, MOVER, shape, places[i], diameters[0])
        image, mask = resolve(labels, colours, classes)
        yield i + 1, image, mask


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to fill, renamed to `out` at the end; UserError if `out` has files already.

    Processes that fill the same folder wait for each other.
    """
    resolved = out.resolve()
    incomplete = resolved.with_name(f".{resolved.name}.partial")
    lock = resolved.with_name(f".{resolved.name}.lock")
    advice = "give another --out"
    with contextlib.ExitStack() as stack:
        try:
            resolved.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(wait_for_lock(lock))
            stack.callback(lock.unlink, missing_ok=True)
            is_empty_folder = resolved.is_dir() and not any(resolved.iterdir())
            if resolved.exists() and not is_empty_folder:
                raise UserError(f"{out}: is there already; remove it or {advice}")
            shutil.rmtree(incomplete, ignore_errors=True)  # left by a process that was killed
            incomplete.mkdir()
        except OSError as error:
            raise UserError(f"{out}: cannot be made ({error.strerror}); {advice}") from None
        try:
            with naming_full_disk(out):
                yield incomplete
            incomplete.rename(resolved)
        finally:
            shutil.rmtree(incomplete, ignore_errors=True)


class Job(NamedTuple):
    """One flight to draw."""

    split: str
    index: int  # of the flight in its split
    total: int  # flights in its split


def write_sequence(job: Job, folder: Path, size: int, seed: int, frames: int) -> int:
    """Draw the frames of one flight and write them to their folders; returns how many."""
    # A flight has its own seed, so that its files depend neither on the order nor on other splits.
    rng = default_rng([seed, SPLITS.index(job.split), job.index])
    shape, colour = KINDS[job.index * len(KINDS) // job.total]  # grouped, as in the real data
    images = folder / job.split / "image"
    masks = folder / job.split / "gt_image"
    written = 0
    for frame, image, mask in draw_sequence(shape, colour, size, rng, frames):
        name = f"{job.index + 1:06d}_{shape}_{colour}_{frame:06d}.png"
        Image.fromarray(image).save(images / name, compress_level=1)
        Image.fromarray(mask).save(masks / f"gt_{name}", compress_level=1)
        written += 1
    return written


def generate(out: Path, sequences: dict[str, int], size: int, seed: int, frames: int = 0) -> int:
    """Generate pairs of size×size RGB PNGs in the layout of the real data; returns their number.

    `sequences` has the number of flights of each split. Of each flight, `frames` images are chosen
    at random; 0 takes all. UserError if `out` has files already.
    """
    if min(sequences.values()) < 1 or size < 16 or seed < 0 or frames < 0:
        raise UserError("--sequences, --size, --seed, --frames: must be at least 1, 16, 0 and 0")
    jobs = []
    for split, total in sequences.items():
        for index in range(total):
            jobs.append(Job(split, index, total))
    # Ctrl-C reaches all processes; the workers ignore it, so that only this one cleans up.
    ignore_interrupts = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    with new_folder(out) as folder, Pool(initializer=ignore_interrupts) as pool:
        for split in sequences:
            (folder / split / "image").mkdir(parents=True)
            (folder / split / "gt_image").mkdir()
        write = partial(write_sequence, folder=folder, size=size, seed=seed, frames=frames)
        counts = pool.imap(write, jobs, chunksize=8)
        return sum(tqdm(counts, "generate", len(jobs), disable=None))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python data.py generate`."""
    numbers = "number of flights in each split"
    parser.add_argument(
        "--sequences", nargs=3, type=int, default=(300, 60, 60), metavar=SPLITS, help=numbers
    )
    parser.add_argument("--frames", type=int, default=0, help="random images of each; 0: all")
    parser.add_argument("--size", type=int, default=NATIVE_SIZE, help="side of an image in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")


def main(args: argparse.Namespace) -> None:
    sequences = dict(zip(SPLITS, args.sequences, strict=True))
    images = generate(args.out, sequences, args.size, args.seed, args.frames)
    print(f"{images} images in {args.out}; next: python data.py check {args.out}")
