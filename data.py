"""The data set: PNG pairs on disk, checked, and resident as one uint8 array per split.

    python data.py generate --sequences 300 60 60 --size 128 --seed 0 --out data/generated
    python data.py download --out data/afo [--archive FILE.zip]
    python data.py check data/generated

Layout: DIR/{training,validation,testing}/image/NAME.png with gt_image/gt_NAME.png beside it.
"""

import argparse
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from config import DEFAULT, load_config
from download import download
from errors import UserError, run
from generate import SPLITS, generate

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name of a colour space, by channels


class Split(NamedTuple):
    """One split, resident.

    images (N, channels, H, W) uint8 and masks (N, H, W) uint8 class indices are memory-mapped:
    the operating system reads them in as they are used and may drop them again. `names` are the
    image file names; `digest` is the SHA-256 of the split's files, which tells data sets apart.
    """

    images: Tensor
    masks: Tensor
    names: list[str]
    digest: str


def read_image(path: Path, channels: int) -> np.ndarray:
    """Read an image as (H, W, channels) uint8, converting grey, palette, RGB and RGBA.

    Raises:
        UserError: the file is missing, damaged, too large to be honest, or has 16 bits.
    """
    image = _open(path)
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        raise UserError(
            f"{path}: has pixels of mode {image.mode} (16 bits or not RGB); save it as 8-bit RGB"
        )
    # Through RGBA: the one mode to which Pillow converts all the others without loss.
    image = image if image.mode == MODES[channels] else image.convert("RGBA")
    return np.asarray(image.convert(MODES[channels])).reshape(image.height, image.width, channels)


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        deep = any(";16" in str(tile[3]) for tile in image.tile)
        image.load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; was it moved?") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path}: claims far too many pixels for an image; remove it") from None
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on damaged files
        reason = getattr(error, "strerror", None) or "damaged, or not an image"
        raise UserError(f"{path}: cannot be read ({reason}); replace it") from None
    if deep:  # Pillow would drop half of the bits of a 16-bit RGB file without a word
        raise UserError(f"{path}: has 16 bits a channel; save it with 8")
    if path.suffix.lower() == ".png" and image.format != "PNG":
        raise UserError(f"{path}: is a {image.format} file named .png; convert it to PNG")
    return image


def read_mask(path: Path, classes: dict[str, list[int]]) -> np.ndarray:
    """Read a colour mask as (H, W) uint8 class indices.

    Raises:
        UserError: the file cannot be read, or has a colour that is of no class; the first such
            pixel is named.
    """
    rgb = read_image(path, 3).astype(np.uint32)
    colour = rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
    mask = np.full(colour.shape, len(classes), np.uint8)
    for index, (r, g, b) in enumerate(classes.values()):
        mask[colour == (r << 16 | g << 8 | b)] = index
    stray = mask == len(classes)
    if stray.any():
        y, x = np.argwhere(stray)[0]
        raise UserError(
            f"{path}: {stray.sum()} pixels of colours that are no class, first "
            f"({', '.join(map(str, rgb[y, x]))}) at x={x}, y={y}; classes are "
            + ", ".join(f"{name} {tuple(c)}" for name, c in classes.items())
        )
    return mask


def colourise(mask: Tensor, classes: dict[str, list[int]]) -> Tensor:
    """(H, W) class indices to a (3, H, W) uint8 picture in the colours of the masks."""
    palette = torch.tensor(list(classes.values()), dtype=torch.uint8)
    return palette[mask.long()].permute(2, 0, 1)


def read_pair(
    image_path: Path, mask_path: Path, classes: dict[str, list[int]], channels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Read (H, W, channels) uint8 image and (H, W) uint8 mask; UserError if sizes differ too."""
    image, mask = read_image(image_path, channels), read_mask(mask_path, classes)
    if image.shape[:2] != mask.shape:
        raise UserError(
            f"{mask_path}: is {mask.shape[1]}×{mask.shape[0]} but its image is "
            f"{image.shape[1]}×{image.shape[0]}; they must be of one size"
        )
    return image, mask


def find_pairs(root: Path, split: str) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Pair images with masks by name.

    Returns:
        (image, mask) paths sorted by name, and one line for each file without a partner or each
        folder that is missing or empty.
    """
    image_dir, mask_dir = root / split / "image", root / split / "gt_image"
    for folder in (root, image_dir, mask_dir):
        if not folder.is_dir():
            return [], [f"{folder}: no such folder; `make data` prepares the data"]
    images = {path.name: path for path in sorted(image_dir.glob("*.png"))}
    masks = {path.name.removeprefix("gt_"): path for path in sorted(mask_dir.glob("gt_*.png"))}
    problems = [
        f"{images[name]}: has no mask {mask_dir / ('gt_' + name)}; add it or remove the image"
        for name in images.keys() - masks.keys()
    ] + [
        f"{masks[name]}: has no image {image_dir / name}; add it or remove the mask"
        for name in masks.keys() - images.keys()
    ]
    if not images and not masks:
        problems.append(f"{image_dir}: holds no .png files; a split needs at least one image")
    return [(images[n], masks[n]) for n in images if n in masks], sorted(problems)


def load_split(root: Path, split: str, classes: dict[str, list[int]], channels: int) -> Split:
    """Load a split through its cache, DIR/.cache/, which is rebuilt when any file changed.

    Args:
        root: folder of the data set.
        split: "training", "validation" or "testing".
        classes: name → RGB colour in the masks; the order gives the class index.
        channels: 1, 3 or 4.

    Raises:
        UserError: a file is missing, unpaired, unreadable or of another size than the first.
    """
    pairs, problems = find_pairs(root, split)
    if problems:
        more = f" (and {len(problems) - 1} more: python data.py check {root})"
        raise UserError(problems[0] + (more if len(problems) > 1 else ""))
    stamp = hashlib.sha256(json.dumps([list(classes.items()), channels]).encode())
    for path in (path for pair in pairs for path in pair):
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"{path}: no such file ({error.strerror}); was it moved?") from None
        stamp.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    # The name tells which files a cache was made of, so that a stale one is never opened.
    cache = root / ".cache" / f"{split}-{channels}-{stamp.hexdigest()[:16]}"
    try:
        cache.parent.mkdir(exist_ok=True)
        with open(cache.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # runs that start together build it once
            if not cache.is_dir():
                for old in cache.parent.glob(f"{split}-{channels}-*"):
                    shutil.rmtree(old)
                try:
                    _build_cache(cache, pairs, classes, channels)
                finally:  # of a build that failed; one that was killed is removed by the next
                    shutil.rmtree(f"{cache}.partial", ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"{cache}: the cache cannot be written ({error.strerror}); make room, or copy the data "
            "to a folder that can be written to"
        ) from None
    try:
        images, masks = (_map(cache / f"{name}.npy") for name in ("images", "masks"))
        digest = (cache / "digest").read_text()
        if len(digest) != 64 or not len(images) == len(masks) == len(pairs):
            raise ValueError
    except (OSError, ValueError, EOFError):
        raise UserError(f"{cache}: the cache is damaged; remove this folder") from None
    return Split(images, masks, [image.name for image, _ in pairs], digest)


def _map(path: Path) -> Tensor:
    """A .npy file as a tensor that must not be written to.

    A private writable mapping would be counted as memory that may be needed one day, and refused
    for a file larger than the machine's.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.load(path, mmap_mode="r"))


def limit(split: Split, sequences: int, images: int) -> Split:
    """The first so many sequences of a split, and so many of their images, evenly spaced.

    A sequence is what shares the first six characters of its file names. 0 means no limit.
    """
    first = sorted({name[:6] for name in split.names})[: sequences or None]
    chosen = torch.tensor([i for i, name in enumerate(split.names) if name[:6] in first])
    if 0 < images < len(chosen):
        chosen = chosen[torch.linspace(0, len(chosen) - 1, images).long()]
    if len(chosen) == len(split.names):
        return split  # still memory-mapped
    names = [split.names[i] for i in chosen.tolist()]
    return Split(split.images[chosen], split.masks[chosen], names, split.digest)


def _build_cache(
    cache: Path, pairs: list[tuple[Path, Path]], classes: dict[str, list[int]], channels: int
) -> None:
    """Decode all pairs into the files of a cache; complete or not there at all."""
    partial = cache.with_name(cache.name + ".partial")
    partial.mkdir()
    first, _ = read_pair(*pairs[0], classes, channels)
    height, width = first.shape[:2]
    digest = hashlib.sha256()

    def decode(pair: tuple[Path, Path]) -> tuple[np.ndarray, np.ndarray, str]:
        image, mask = read_pair(*pair, classes, channels)
        line = "".join(
            f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in pair
        )
        return image, mask, line

    # Written, not mapped: on a full disk a write is an error, a mapped page ends the process.
    with (
        open(partial / "images.npy", "wb") as images,
        open(partial / "masks.npy", "wb") as masks,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for file, shape in ((images, (channels, height, width)), (masks, (height, width))):
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(pairs), *shape)}
            np.lib.format.write_array_header_1_0(file, header)
        # In blocks, so that what is decoded and not yet written never fills the memory.
        blocks = (pairs[i : i + 256] for i in range(0, len(pairs), 256))
        decoded = itertools.chain.from_iterable(pool.map(decode, block) for block in blocks)
        progress = tqdm(decoded, f"caching {pairs[0][0].parent.parent}", len(pairs), disable=None)
        for i, (image, mask, line) in enumerate(progress):
            if mask.shape != (height, width):
                raise UserError(
                    f"{pairs[i][0]}: is {mask.shape[1]}×{mask.shape[0]} but {pairs[0][0].name} is "
                    f"{width}×{height}; images of a split must be of one size"
                )
            images.write(image.transpose(2, 0, 1).tobytes())
            masks.write(mask.tobytes())
            digest.update(line.encode())
    (partial / "digest").write_text(digest.hexdigest())
    partial.rename(cache)


def _problems_and_shares(
    pairs: list[tuple[Path, Path]], classes: dict[str, list[int]], channels: int
) -> Iterator[tuple[str | None, np.ndarray, tuple[int, int] | None]]:
    """For each pair: what is wrong with it, its pixels per class, its (width, height)."""

    def examine(pair: tuple[Path, Path]) -> tuple[str | None, np.ndarray, tuple[int, int] | None]:
        try:
            _, mask = read_pair(*pair, classes, channels)
        except UserError as error:
            return str(error), np.zeros(len(classes), np.int64), None
        return None, np.bincount(mask.ravel(), minlength=len(classes)), mask.shape[::-1]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(examine, pairs)


def check(root: Path, classes: dict[str, list[int]], channels: int) -> None:
    """Print counts, sizes and class shares of each split and every problem there is.

    Raises:
        UserError: at least one file is bad; the lines before it name them all.
    """
    problems: list[str] = []
    print(f"{'split':<12}{'pairs':>7}  {'size':<12}" + "".join(f"{name:>12}" for name in classes))
    for split in SPLITS:
        pairs, unpaired = find_pairs(root, split)
        problems += unpaired
        pixels, sizes = np.zeros(len(classes), np.int64), set()
        results = _problems_and_shares(pairs, classes, channels)
        for problem, counts, size in tqdm(results, f"checking {split}", len(pairs), disable=None):
            problems += [problem] if problem else []
            pixels += counts
            sizes |= {size} if size else set()
        if len(sizes) > 1:
            problems.append(f"{root / split}: has images of {len(sizes)} sizes; make them one size")
        size = "×".join(map(str, min(sizes))) if len(sizes) == 1 else f"{len(sizes)} sizes"
        shares = "".join(f"{share:12.4f}" for share in pixels / max(pixels.sum(), 1))
        print(f"{split:<12}{len(pairs):>7}  {size:<12}{shares}")
    problems = list(dict.fromkeys(problems))  # a missing folder is found once for each split
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        raise UserError(f"{root}: {len(problems)} problems, listed above; mend or remove the files")


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare and check a data set.")
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("generate", help="draw artificial flying objects")
    make.add_argument(
        "--sequences",
        type=int,
        nargs=3,
        default=[300, 60, 60],
        metavar=("TRAINING", "VALIDATION", "TESTING"),
    )
    make.add_argument("--size", type=int, default=128, help="side of a frame in pixels")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--out", type=Path, required=True, metavar="DIR")
    fetch = commands.add_parser("download", help="get the real Artificial Flying Objects")
    fetch.add_argument("--out", type=Path, required=True, metavar="DIR")
    fetch.add_argument("--archive", type=Path, metavar="FILE", help="a local zip, not the network")
    fetch.add_argument("--url", help="another place of the archive")
    fetch.add_argument("--digest", help="SHA-256 that the contents must have")
    look = commands.add_parser("check", help="list all problems of a data set, and class shares")
    look.add_argument("dir", type=Path)
    look.add_argument("--config", type=Path, default=DEFAULT, help="for classes and in_channels")
    args = parser.parse_args()

    if args.command == "generate":
        frames = generate(
            args.out, dict(zip(SPLITS, args.sequences, strict=True)), args.size, args.seed
        )
        print(f"{frames} frames in {args.out}; next: python data.py check {args.out}")
    elif args.command == "download":
        source = {"url": args.url} if args.url else {}
        digest = download(args.out, args.archive, digest=args.digest, **source)
        print(f"data in {args.out}, SHA-256 {digest}; next: python data.py check {args.out}")
    else:
        config = load_config([args.config], [])
        check(args.dir, config["classes"], config["in_channels"])


if __name__ == "__main__":
    run(main)
