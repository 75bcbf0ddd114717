"""The data set: pairs of image and mask, checked, and resident as one uint8 array per split.

    python data.py generate --out data/generated [--sequences 300 60 60] [--frames K] [--seed 0]
    python data.py download --out data/afo [--archive FILE.zip]
    python data.py check data/generated [--picture FILE.png]

Where files lie, what masks hold and how splits are made: the keys up to `resize` of default.yaml.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from common import ROOT, SPLITS, UserError, reading, run

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from tqdm import tqdm

from metrics import IGNORE

COMMANDS = ("generate", "download", "check")  # in tools/
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name of a colour space, by channels
# What decides which pixels a split holds.
DATA_KEYS = ("data", "images", "masks", "split_folders", "group", "split_shares", "mask_format")
DATA_KEYS += ("ignore", "resize", "classes", "in_channels")


class Pair(NamedTuple):
    """An image, its mask, the name they share, and the group that must stay in one split."""

    name: str
    group: str
    image: Path
    mask: Path


class Split(NamedTuple):
    """One split, resident.

    images (N, channels, H, W) uint8 and masks (N, H, W) uint8 class indices are memory-mapped:
    the operating system reads them in as they are used and may drop them again. `names` and
    `groups` are those of the pairs; `digest` is the SHA-256 of the split's files, which tells data
    sets apart.
    """

    images: Tensor
    masks: Tensor
    names: list[str]
    groups: list[str]
    digest: str


# ---- single images and masks


def open_image(path: Path) -> Image.Image:
    """Open an image of 8 bits a channel, turned upright as its EXIF orientation says."""
    with reading(path):
        image = Image.open(path)
        if any(";16" in str(tile[3]) for tile in image.tile):  # Pillow would drop half of the bits
            raise UserError(f"{path}: has 16 bits a channel; save it with 8")
        image = ImageOps.exif_transpose(image)
        image.load()
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        raise UserError(f"{path}: has pixels of mode {image.mode}; save it as 8-bit RGB")
    return image


def to_array(image: Image.Image, channels: int) -> np.ndarray:
    """Convert a Pillow image to (H, W, channels) uint8."""
    # Through RGBA: the one mode to which Pillow converts all the others without loss.
    image = image if image.mode == MODES[channels] else image.convert("RGBA")
    return np.asarray(image.convert(MODES[channels])).reshape(image.height, image.width, channels)


def read_image(path: Path, channels: int) -> np.ndarray:
    """Read an image as (H, W, channels) uint8, converting grey, palette, RGB and RGBA.

    Without an alpha channel to keep them, transparent pixels are composited on white.

    Raises:
        UserError: the file is missing, damaged, too large, or has 16 bits.
    """
    image = open_image(path)
    if channels < 4 and image.has_transparency_data:  # colours under transparency are arbitrary
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return to_array(image, channels)


def mask_values(config: dict) -> np.ndarray:
    """List what masks hold: a row for each class, then one for `ignore` if it is set.

    Returns:
        (C or C + 1, 3) uint8 colours, or (C or C + 1, 1) indices, as `mask_format` says.

    Raises:
        UserError: a class has no colour; two values are the same.
    """
    with reading("classes, ignore", "see configs/default.yaml for their form"):
        values = np.array(list(config["classes"].values()), np.uint8).reshape(-1, 3)
        number = len(config["classes"])
        if config["mask_format"] == "indices":
            values = np.arange(number, dtype=np.uint8)[:, None]
        if config["ignore"]:
            values = np.concatenate([values, np.array([config["ignore"]], np.uint8)])
        if not 2 <= number < IGNORE or len(np.unique(values, axis=0)) < len(values):
            raise ValueError("must be 2 to 254 classes, and all values different")
    return values


def read_mask(path: Path, config: dict) -> np.ndarray:
    """Read a mask as (H, W) uint8 class indices, `IGNORE` where the config's `ignore` says so.

    Args:
        path: the file.
        config: for `classes`, `mask_format` and `ignore`.

    Raises:
        UserError: the file cannot be read, or a pixel is of no class; the first one is named.
    """
    image, known, number = open_image(path), mask_values(config), len(config["classes"])
    if config["mask_format"] == "colours":
        pixels = to_array(image, 3)
    else:
        pixels = np.atleast_3d(np.array(image, np.uint8))  # of a palette file the indices
        if pixels.shape[2] > 1 and (pixels[..., :3] != pixels[..., :1]).any():
            raise UserError(f"{path}: holds colours; set mask_format: colours, and `classes`")
        pixels = pixels[..., :1]  # grey that was written as colours
    places = np.array([1 << 16, 1 << 8, 1][-pixels.shape[2] :])  # one number for a colour
    codes, mask = pixels @ places, np.full(pixels.shape[:2], number, np.uint8)
    for index, code in enumerate(known @ places):
        mask[codes == code] = index if index < number else IGNORE
    stray = mask == number
    if stray.any():
        y, x = np.argwhere(stray)[0].tolist()
        found = pixels[y, x].tolist()
        hint = ""
        if found == [255]:
            hint = "; if 255 marks pixels without a label, set ignore: [255]"
        elif len(found) == 3 and len({*found}) == 1:
            hint = "; if masks hold class indices, set mask_format: indices"
        raise UserError(
            f"{path}: {stray.sum()} pixels are of no class, the first is {found} at x={x}, y={y}; "
            f"fix the mask or `classes`{hint}"
        )
    return mask


def resize(pixels: Tensor, size: list[int], smooth: bool) -> Tensor:
    """Resize (..., H, W) uint8 to (..., *size): bilinear, antialiased, or else nearest."""
    mode = InterpolationMode.BILINEAR if smooth else InterpolationMode.NEAREST_EXACT
    return F.resize(pixels, size, mode, antialias=smooth)


def read_pair(image_path: Path, mask_path: Path, config: dict) -> tuple[Tensor, Tensor]:
    """Read an image and its mask, both resized to the config's `resize` if that is set.

    Returns:
        (channels, H, W) uint8 image and (H, W) uint8 class indices.

    Raises:
        UserError: as `read_image` and `read_mask`, or the two differ in size.
    """
    image = torch.from_numpy(read_image(image_path, config["in_channels"]).copy()).permute(2, 0, 1)
    mask = torch.from_numpy(read_mask(mask_path, config))
    if image.shape[1:] != mask.shape:
        sizes = [f"{width}×{height}" for height, width in (mask.shape, image.shape[1:])]
        raise UserError(f"{mask_path}: is {sizes[0]} but its image is {sizes[1]}; make them alike")
    if config["resize"]:
        image = resize(image, config["resize"], smooth=True)
        mask = resize(mask[None], config["resize"], smooth=False)[0]
    return image, mask


# ---- pairs and splits


def check_data_keys(config: dict) -> None:
    """Refuse a config that cannot describe a data set; UserError names the key."""
    images, masks, size = config["images"], config["masks"], config["resize"]
    for pattern in (images, masks):
        if pattern.count("*") != 1 or set("?[]") & set(pattern) or pattern.startswith("/"):
            raise UserError("images, masks: must be paths below `data` with one *: 'photos/*.jpg'")
    if images == masks or ("{split}" in images) != ("{split}" in masks):
        raise UserError("images, masks: must differ, with {split} in both or in neither")
    if len(set(config["split_folders"])) < 3:
        raise UserError("split_folders: must be three folders, as in [train, val, test]")
    if size and (len(size) != 2 or any(type(n) is not int or not 8 <= n <= 1 << 14 for n in size)):
        raise UserError("resize: must be [], or [height, width] of 8 pixels or more")
    with reading("group", "give a regular expression, as in '^[^_]+'"):
        re.compile(config["group"])
    mask_values(config)


def find_files(root: Path, pattern: str) -> dict[str, Path]:
    """Find the files of a pattern with one *; returns the name that the * stands for → path."""
    before, after = pattern.split("*")
    return {
        path.relative_to(root).as_posix()[len(before) : -len(after) or None]: path
        for path in sorted(root.glob(pattern))
        if not path.name.startswith(".")  # macOS leaves such a file beside each
    }


def find_pairs(config: dict, split: str) -> tuple[list[Pair], list[str]]:
    """Pair images with masks by name.

    Args:
        config: for `data`, `images`, `masks`, `split_folders`, `group` and `split_shares`.
        split: one of `SPLITS`.

    Returns:
        The pairs of the split sorted by name, and a line for each file without a partner, for a
        split without files, for each name without a group.
    """
    check_data_keys(config)
    root, folder = Path(config["data"]), config["split_folders"][SPLITS.index(split)]
    patterns = [config[key].replace("{split}", folder) for key in ("images", "masks")]
    images, masks = (find_files(root, pattern) for pattern in patterns)
    if not images:
        there = "no such files" if root.is_dir() else "no such folder"
        return [], [f"{root / patterns[0]}: {there}; run make data, or set data, images, masks"]
    # Both in one folder, a.png and a_mask.png: a file of both patterns is of the longer one.
    both = {*images.values()} & {*masks.values()}
    shorter = images if len(patterns[0]) < len(patterns[1]) else masks
    for name in [name for name, path in shorter.items() if path in both]:
        del shorter[name]
    problems = []
    for files, others, pattern in ((images, masks, patterns[1]), (masks, images, patterns[0])):
        for name in files.keys() - others.keys():
            partner = root / pattern.replace("*", name)
            problems.append(f"{files[name]}: has no {partner}; add it, or remove this file")
    pairs = []
    for name in images.keys() & masks.keys():
        match = re.search(config["group"], name)
        if match is None:
            problems.append(f"{images[name]}: group: {config['group']!r} is not found in its name")
        else:  # an empty expression: every image is a group of its own
            pairs.append(Pair(name, match[0] or name, images[name], masks[name]))
    if "{split}" not in config["images"]:
        groups = choose_groups({pair.group for pair in pairs}, split, config["split_shares"])
        pairs = [pair for pair in pairs if pair.group in groups]
        if not pairs and not problems:
            problems.append(f"{root}: too few groups to choose splits from; try group: ''")
    return sorted(pairs), sorted(problems)


def choose_groups(groups: set[str], split: str, shares: list[float]) -> set[str]:
    """Choose the groups of a random split: always the same ones, at least one for each split.

    They are sorted by a hash, so that neighbours in name, which may be neighbours in time, are
    spread.
    """
    if len(groups) < len(SPLITS):
        return set()
    ordered = sorted(groups, key=lambda group: hashlib.sha256(os.fsencode(group)).digest())
    _, validation, testing = (max(1, round(len(ordered) * s / sum(shares))) for s in shares)
    if validation + testing >= len(ordered):
        validation = testing = 1
    start = {"validation": 0, "testing": validation, "training": validation + testing}[split]
    stop = {"validation": validation, "testing": validation + testing}.get(split)
    return set(ordered[start:stop])


# ---- the resident arrays


def load_split(config: dict, split: str) -> Split:
    """Load a split through a cache of its decoded files, which is rebuilt when any of them changed.

    The cache lies beside the data in .cache/, or in data/.cache/ of this project where that folder
    cannot be written to.

    Args:
        config: for the keys from `data` to `in_channels`.
        split: one of `SPLITS`.

    Raises:
        UserError: a file is missing, without a partner, unreadable or of another size.
    """
    pairs, problems = find_pairs(config, split)
    if problems:
        more = f" (and {len(problems) - 1} more: `make check` lists them)"
        raise UserError(problems[0] + (more if len(problems) > 1 else ""))
    root = Path(config["data"]).resolve()
    keys = {key: config[key] for key in DATA_KEYS} | {"data": str(root)}
    settings = hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:12]
    stamp = hashlib.sha256()
    for path in (path for pair in pairs for path in (pair.image, pair.mask)):
        status = path.stat()
        stamp.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode(errors="replace"))
    # The name tells how and of which files a cache was made, so that a stale one is never opened.
    place = root if os.access(root, os.W_OK) else ROOT / "data"
    cache = place / ".cache" / f"{split}-{settings}-{stamp.hexdigest()[:12]}"
    if not cache.is_dir():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with open(cache.parent / f"{settings}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # runs that start together build it once
            if not cache.is_dir():
                for old in cache.parent.glob(f"{split}-{settings}-*"):
                    shutil.rmtree(old)
                build_cache(cache, pairs, config)
    with reading(cache, "remove this folder"), warnings.catch_warnings():
        # A mapping that may be written to would be refused for a file larger than the memory.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        arrays = (np.load(cache / f"{name}.npy", mmap_mode="r") for name in ("images", "masks"))
        images, masks = map(torch.from_numpy, arrays)
        digest = (cache / "digest").read_text()
    return Split(images, masks, [p.name for p in pairs], [p.group for p in pairs], digest)


def build_cache(cache: Path, pairs: list[Pair], config: dict) -> None:
    """Decode all pairs into the files of a cache; complete or not there at all."""
    partial_cache = cache.with_name(cache.name + ".partial")
    partial_cache.mkdir()
    shape = read_pair(pairs[0].image, pairs[0].mask, config)[0].shape
    with (
        open(partial_cache / "images.npy", "wb") as images,
        open(partial_cache / "masks.npy", "wb") as masks,
        ThreadPoolExecutor() as pool,
    ):
        for file, item in ((images, shape), (masks, shape[1:])):
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(pairs), *item)}
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
        starts = images.tell(), masks.tell()
        decode = partial(decode_pair, files=(images, masks), starts=starts, shape=shape)
        lines = pool.map(decode, range(len(pairs)), pairs, [config] * len(pairs))
        title = f"caching {config['data']}"
        try:
            digest = hashlib.sha256("".join(tqdm(lines, title, len(pairs), disable=None)).encode())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            shutil.rmtree(partial_cache)
            raise
    (partial_cache / "digest").write_text(digest.hexdigest())
    partial_cache.rename(cache)


def decode_pair(
    i: int, pair: Pair, config: dict, files: tuple, starts: tuple[int, int], shape: torch.Size
) -> str:
    """Write a pair to its place in the cache; returns its line of the digest."""
    image, mask = read_pair(pair.image, pair.mask, config)
    if image.shape != shape:
        sizes = [f"{width}×{height}" for height, width in (image.shape[1:], shape[1:])]
        raise UserError(f"{pair.image}: is {sizes[0]}, the first image {sizes[1]}; set `resize`")
    # Written, not mapped: on a full disk a write is an error, a mapped page ends the process.
    for file, start, array in zip(files, starts, (image, mask), strict=True):
        os.pwrite(file.fileno(), array.numpy().tobytes(), start + i * array.numel())
    hashes = (hashlib.sha256(path.read_bytes()).hexdigest() for path in (pair.image, pair.mask))
    names = (os.fsencode(path.name).decode(errors="replace") for path in (pair.image, pair.mask))
    return "".join(f"{digest}  {name}\n" for digest, name in zip(hashes, names, strict=True))


def evenly(total: int, count: int) -> list[int]:
    """Choose `count` of `total` indices, evenly spaced; all of them if 0 or too many."""
    return np.linspace(0, total - 1, min(count or total, total)).astype(int).tolist()


def limit(split: Split, groups: int = 0, images: int = 0) -> Split:
    """Take so many groups of a split, and so many of their images; 0 means all."""
    names = sorted(set(split.groups))
    kept = {names[i] for i in evenly(len(names), groups)}
    indices = [i for i, group in enumerate(split.groups) if group in kept]
    indices = [indices[i] for i in evenly(len(indices), images)]
    if len(indices) == len(split.names):
        return split  # still memory-mapped
    names, groups = ([of[i] for i in indices] for of in (split.names, split.groups))
    return Split(split.images[indices], split.masks[indices], names, groups, split.digest)


def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in COMMANDS:
        raise UserError(f"python data.py {command}: give one of {', '.join(COMMANDS)}")
    sys.argv[:2] = [f"data.py {command}"]
    import_module(f"tools.{command}").main()  # each has its own options


if __name__ == "__main__":
    run(main)
