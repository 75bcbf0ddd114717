"""Generate sequences like those of the Artificial Flying Objects data set.

    python data.py generate --out data/generated [--sequences 300 60 60] [--frames K] [--seed 0]
        [--with data/afo]

Shapes are markers of a plotting program; numbers were measured on the real training split, 128×128.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from multiprocessing import Pool
from pathlib import Path

from common import SPLITS, UserError

import numpy as np
from numpy import ndarray
from numpy.random import Generator, default_rng
from PIL import Image
from tqdm import tqdm

SHAPES = ("square", "triangle", "circular")  # red, green and blue in the mask
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}
KINDS = [(shape, colour) for shape in SHAPES for colour in COLOURS]  # of the moving object
# Where a pixel is sampled: (x, y) from its centre, the usual pattern of graphics hardware.
SAMPLES = np.array([(1, -3), (-1, 3), (5, 1), (-3, -5), (-5, 5), (-7, -1), (3, 7), (7, -7)]) / 16
WHITE, TARGET, MOVER, FIRST, SECOND = range(5)  # labels of a sample: the later hides the earlier

MARKER_SIZES = 21, 35  # points, all equally likely; the target has the size of the moving shape
PIXELS_PER_POINT = 4 / 3
CENTRES = (4.2, 4.0), (113.2, 120.2)  # all shapes: uniform in this box of (x, y), hence cut ones
PRESENCE = 0.7  # probability of each of the two shapes that stand still
APPROACH = 0.1  # share of the way left to the target, in each frame
ARRIVED = 1.12, 1.167  # (x, y) in pixels: one unit of the plot's axes, where a sequence ends


def covered(shape: str, centre: ndarray, diameter: float, xs: ndarray, ys: ndarray) -> ndarray:
    """Tell which points a marker covers, bool; in pixels, y downwards, whole at pixel centres."""
    if shape == "square":  # snapped to whole pixels; its boundary is always 7/8 covered
        half = np.floor(0.4 * diameter - 0.4) + 0.375
        x, y = np.round(centre)
        return (np.abs(xs - x) <= half) & (np.abs(ys - y) <= half)
    # Regular polygons: `distance` and `angles` of the sides' normals; symmetry spares most sides.
    x, y = xs - centre[0], np.abs(ys - centre[1])
    if shape == "triangle":
        angles, distance = np.pi / 3 * np.array([1, 3]), (diameter + 1 / 6) / 3
    else:
        x, radius = np.abs(x), (diameter + 1) / 2
        sides = np.ceil(1.5 * np.sqrt(radius))  # in each quarter, six to eight
        angles = np.pi / 2 / sides * (np.arange(sides) + 0.5)
        distance = radius * np.cos(np.pi / 4 / sides)
    return np.logical_and.reduce([x * np.cos(a) + y * np.sin(a) <= distance for a in angles])


def paint(labels: ndarray, label: int, shape: str, centre: ndarray, diameter: float) -> None:
    """Give the samples that a marker covers, (8, size, size), its label, over those below it."""
    # Only the samples near it are looked at; the rest of the scene would take most of the time.
    reach = 0.7 * diameter + 1
    near = [slice(max(0, int(c - reach)), int(c + reach) + 1) for c in centre]
    places = np.arange(labels.shape[1]) + SAMPLES[:, :, None]  # (8, 2, size)
    xs, ys = places[:, 0, None, near[0]], places[:, 1, near[1], None]
    window = labels[:, near[1], near[0]]
    window[covered(shape, centre, diameter, xs, ys) & (window < label)] = label


def resolve(labels: ndarray, colours: ndarray, classes: ndarray) -> tuple[ndarray, ndarray]:
    """Reduce the labels of samples, (8, H, W), to image and mask, both uint8 (H, W, 3)."""
    # A pixel of the image is the mean of its samples, one of the mask has a class if all have it.
    counts = np.stack([(labels == k).sum(axis=0, dtype=np.uint8) for k in range(5)], axis=2)
    counts = counts.astype(np.float32)  # exact, and many times faster to multiply than integers
    image = ((counts @ colours + 4) / 8).astype(np.uint8)
    return image, 255 * (counts @ classes == 8 * 255).astype(np.uint8)


def draw_sequence(shape: str, colour: str, size: int, rng: Generator, frames: int) -> Iterator:
    """Yield (number, image, mask), uint8 (size, size, 3), of random `frames` of a scene, 0: all."""
    # One shape of each other kind stands still; shapes and colours follow the moving one in turn.
    kinds = np.roll([0, 1, 2], -SHAPES.index(shape))
    tints = np.roll(list(COLOURS.values()), -list(COLOURS).index(colour), axis=0)[:3]
    colours = np.array([(255, 255, 255), (0, 0, 0), *tints], np.float32)
    classes = np.vstack([np.zeros(3), 255 * np.eye(3)[[kinds[0], *kinds]]]).astype(np.float32)
    scale = size / 128
    diameters = rng.integers(*MARKER_SIZES, 3, endpoint=True) * PIXELS_PER_POINT * scale
    centres = rng.uniform(*CENTRES, (4, 2)) * scale
    still, places = centres[[0, 2, 3]], [centres[1]]  # the target first; a place for each frame
    present = [True, *(rng.random(2) < PRESENCE)]
    while not (np.abs(still[0] - places[-1]) <= np.multiply(ARRIVED, scale)).all():
        places.append(places[-1] + APPROACH * (still[0] - places[-1]))
    scene = np.full((len(SAMPLES), size, size), WHITE, np.uint8)
    for i, label in enumerate((TARGET, FIRST, SECOND)):
        if present[i]:
            paint(scene, label, SHAPES[kinds[i]], still[i], diameters[i])
    number = min(frames, len(places)) or len(places)
    for i in sorted(rng.choice(len(places), number, replace=False)):
        labels = scene.copy()
        paint(labels, MOVER, shape, places[i], diameters[0])
        yield i + 1, *resolve(labels, colours, classes)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to fill, renamed to `out` at the end; UserError if `out` has files already."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: is there already; remove it or give another --out")
    out = out.resolve()
    incomplete = out.with_name(out.name + ".partial")
    shutil.rmtree(incomplete, ignore_errors=True)  # left by a process that was killed
    incomplete.mkdir(parents=True)
    try:
        yield incomplete
        incomplete.rename(out)
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)


def write_sequence(job: tuple, folder: Path, size: int, seed: int, frames: int) -> int:
    """Draw and write the frames of one sequence (split, index, number of all); returns how many."""
    split, index, total = job
    # A seed for each sequence: its bytes depend neither on the order nor on the other splits.
    rng = default_rng([seed, SPLITS.index(split), index])
    shape, colour = KINDS[index * len(KINDS) // total]  # grouped, as in the real data
    drawn = list(draw_sequence(shape, colour, size, rng, frames))
    for frame, image, mask in drawn:
        name = f"{index + 1:06d}_{shape}_{colour}_{frame:06d}.png"
        Image.fromarray(image).save(folder / split / "image" / name, compress_level=1)
        Image.fromarray(mask).save(folder / split / "gt_image" / f"gt_{name}", compress_level=1)
    return len(drawn)


def link(other: Path, folder: Path) -> None:
    """Link the files of another data set of this layout into a folder, its name before theirs."""
    paths = [path for split in SPLITS for path in (other / split).glob("*image/*.png")]
    if not paths:
        raise UserError(f"--with {other}: holds no training/image/*.png; give data/afo or the like")
    for path in paths:
        place = folder / path.parent.relative_to(other)
        name = re.sub("^(gt_)?", rf"\1{other.name}_", path.name)
        (place / name).symlink_to(os.path.relpath(path.resolve(), place))  # the whole may be moved


def generate(
    out: Path, sequences: dict, size: int, seed: int, frames: int = 0, other: Path | None = None
) -> int:
    """Generate `size`×`size` RGB PNG pairs in the layout of the real data; returns their number.

    `sequences` by split, `frames` (random) of each, 0: all. The pairs of the data set `other` are
    linked in among them. UserError if `out` is not empty.
    """
    if min(sequences.values()) < 1 or size < 16 or seed < 0 or frames < 0:
        raise UserError("--sequences, --size, --seed, --frames: must be at least 1, 16, 0 and 0")
    jobs = [(split, index, count) for split, count in sequences.items() for index in range(count)]
    deaf = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}  # to Ctrl-C
    with new_folder(out) as folder, Pool(**deaf) as pool:
        for path in [folder / s / kind for s in sequences for kind in ("image", "gt_image")]:
            path.mkdir(parents=True)
        if other:
            link(other, folder)
        write = partial(write_sequence, folder=folder, size=size, seed=seed, frames=frames)
        done = pool.imap(write, jobs, chunksize=8)
        return sum(tqdm(done, "generate", len(jobs), disable=None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", nargs=3, type=int, default=(300, 60, 60), metavar=SPLITS)
    parser.add_argument("--frames", type=int, default=0, help="random frames of each; 0: all")
    among = "link the pairs of this data set in among them, its name before theirs"
    parser.add_argument("--with", dest="other", type=Path, metavar="DIR", help=among)
    parser.add_argument("--size", type=int, default=128, help="side of an image in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    sequences = dict(zip(SPLITS, args.sequences, strict=True))
    images = generate(args.out, sequences, args.size, args.seed, args.frames, args.other)
    print(f"{images} images in {args.out}; next: python data.py check {args.out}")
