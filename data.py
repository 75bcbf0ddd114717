"""The data set: pairs of image and mask, checked, and resident as one uint8 array per split.

    python data.py generate --out data/generated [--sequences 300 60 60] [--frames K] [--seed 0]
    python data.py download --out data/afo [--archive FILE.zip]
    python data.py check data/generated [--picture FILE.png]

Where files lie, what masks hold and how splits are made: the keys up to `resize` of default.yaml.
"""

import fcntl
import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
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
    """One split: images (N, channels, H, W) uint8 and masks (N, H, W) uint8 class indices.

    Both are memory-mapped. `names` and `groups` are those of the pairs; `digest`, the SHA-256 of
    names and values, tells data sets apart.
    """

    images: Tensor
    masks: Tensor
    names: list[str]
    groups: list[str]
    digest: str


def open_image(path: Path) -> Image.Image:
    """Open an image of 8 bits a channel, turned upright as its EXIF orientation says."""
    with reading(path):
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
            raise UserError(f"{path}: has pixels of mode {image.mode}; save it as 8-bit RGB")
    return image


def read_image(path: Path, channels: int) -> np.ndarray:
    """Read an image as (H, W, channels) uint8; what is transparent is white unless channels is 4.

    UserError if the file cannot be read, or has other than 8 bits a channel.
    """
    image = open_image(path)
    if channels < 4 and image.has_transparency_data:  # colours under transparency are arbitrary
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    if image.mode != MODES[channels]:  # through RGBA, to which Pillow converts all without loss
        image = image.convert("RGBA").convert(MODES[channels])
    return np.array(image).reshape(image.height, image.width, channels)


def mask_values(config: dict) -> np.ndarray:
    """List the values of masks: a row of 3 (colours) or 1 (indices) a class, and one for `ignore`.

    UserError if a class has no colour, or two values are the same.
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

    UserError if the file cannot be read, or a pixel is of no class: the first one is named.
    """
    values, number = mask_values(config), len(config["classes"])
    if config["mask_format"] == "colours":  # one number for a colour, whatever its alpha
        pixels, places = read_image(path, 4), np.float32([1 << 16, 1 << 8, 1, 0])
        codes, known = pixels @ places, values @ places[:3]
    else:  # of a palette file np.array has the indices; grey may be written as colours
        pixels = np.atleast_3d(np.array(open_image(path), np.uint8))[..., :3]
        if (pixels != pixels[..., :1]).any():
            raise UserError(f"{path}: holds colours; set mask_format: colours, and `classes`")
        codes, known = pixels[..., 0], values[:, 0]
    mask = np.full(codes.shape, number, np.uint8)
    for index, code in enumerate(known):
        mask[codes == code] = index if index < number else IGNORE
    stray = mask == number
    if stray.any():
        y, x = np.argwhere(stray)[0].tolist()
        found = pixels[y, x, : values.shape[1]].tolist()
        fix = "fix the mask or `classes`"
        if found == [255]:
            fix = "if 255 marks pixels without a label, set ignore: [255]"
        elif len(found) == 3 and len(set(found)) == 1:
            fix = "if masks hold class indices, set mask_format: indices"
        what = f"{stray.sum()} pixels are of no class, the first is {found} at x={x}, y={y}"
        raise UserError(f"{path}: {what}; {fix}")
    return mask


def resize(pixels: Tensor, size: list[int], smooth: bool) -> Tensor:
    """Resize (..., H, W) uint8 to (..., *size): bilinear, antialiased, or else nearest."""
    mode = InterpolationMode.BILINEAR if smooth else InterpolationMode.NEAREST_EXACT
    return F.resize(pixels, size, mode, antialias=smooth)


def read_pair(image_path: Path, mask_path: Path, config: dict) -> tuple[Tensor, Tensor]:
    """Read a (channels, H, W) uint8 image and its (H, W) mask, both resized if the config says so.

    UserError as in `read_image` and `read_mask`, or if the two differ in size.
    """
    image = torch.from_numpy(read_image(image_path, config["in_channels"])).permute(2, 0, 1)
    mask = torch.from_numpy(read_mask(mask_path, config))
    if image.shape[1:] != mask.shape:
        sizes = [f"{width}×{height}" for height, width in (mask.shape, image.shape[1:])]
        raise UserError(f"{mask_path}: is {sizes[0]} but its image is {sizes[1]}; make them alike")
    if config["resize"]:
        image = resize(image, config["resize"], smooth=True)
        mask = resize(mask[None], config["resize"], smooth=False)[0]
    return image, mask


def check_data_keys(config: dict) -> None:
    """Refuse a config that cannot describe a data set; UserError names the key."""
    for pattern in (config["images"], config["masks"]):
        if pattern.count("*") != 1 or pattern.startswith("/"):
            raise UserError("images, masks: must be paths below `data` with one *: 'photos/*.jpg'")
    size = config["resize"]
    if size and (len(size) != 2 or any(type(n) is not int or not 8 <= n <= 1 << 14 for n in size)):
        raise UserError("resize: must be [], or [height, width] of 8 pixels or more")
    with reading("group", "give a regular expression, as in '^[^_]+'"):
        re.compile(config["group"])
    mask_values(config)


def find_files(root: Path, pattern: str) -> dict[str, Path]:
    """Find the files of a pattern with one *; returns the name that the * stands for → path."""
    before, after = Path(pattern).as_posix().split("*")
    paths = [p for p in root.glob(pattern) if not p.name.startswith(".")]  # macOS leaves such files
    return {p.relative_to(root).as_posix()[len(before) : -len(after) or None]: p for p in paths}


def find_pairs(config: dict, split: str) -> tuple[list[Pair], list[str]]:
    """Pair the images of a split with their masks by name; returns the pairs sorted by name.

    And a line for each problem: a file without a partner, no files, a name without a group.
    """
    check_data_keys(config)
    root, folder = Path(config["data"]), config["split_folders"][SPLITS.index(split)]
    patterns = [config[key].replace("{split}", folder) for key in ("images", "masks")]
    images, masks = (find_files(root, pattern) for pattern in patterns)
    taken = {*masks.values()}  # both in one folder, a.png and a_mask.png: a mask is no image
    images = {name: path for name, path in images.items() if path not in taken}
    if not images:
        what = "no such files" if root.is_dir() else "no such folder"
        return [], [f"{root / patterns[0]}: {what}; run make data, or set data, images, masks"]
    pairs, problems = [], []
    for name in sorted({*images, *masks}):
        file, match = images.get(name) or masks[name], re.search(config["group"], name)
        if name not in images or name not in masks:
            partner = root / patterns[name in images].replace("*", name)
            problems.append(f"{file}: has no {partner}; add it, or remove this file")
        elif match is None:
            problems.append(f"{file}: group: {config['group']!r} is not found in its name")
        else:  # an empty expression: every image is a group of its own
            pairs.append(Pair(name, match[0] or name, file, masks[name]))
    if "{split}" not in config["images"]:
        # Groups are sorted by a hash, so that neighbours in name, perhaps in time, are spread.
        groups = sorted({p.group for p in pairs}, key=lambda g: sha256(os.fsencode(g)).digest())
        shares = config["split_shares"]
        _, validation, testing = (max(1, round(len(groups) * s / sum(shares))) for s in shares)
        edges = [0, validation, validation + testing, None]
        i = ("validation", "testing", "training").index(split)
        chosen = {*groups[edges[i] : edges[i + 1]]}
        pairs = [pair for pair in pairs if pair.group in chosen]
        if not pairs and not problems:
            problems.append(f"{root}: too few groups to choose splits from; try group: ''")
    return pairs, problems


def load_split(config: dict, split: str) -> Split:
    """Load a split through a cache of its decoded files, which is rebuilt when any of them changed.

    It lies beside the data in .cache/, or where that folder is read-only, in data/.cache/ of this
    project. UserError if a file is missing, unreadable or of another size.
    """
    pairs, problems = find_pairs(config, split)
    if problems:
        more = f" (and {len(problems) - 1} more: `make check` lists them)"
        raise UserError(problems[0] + more * (len(problems) > 1))
    root = Path(config["data"]).resolve()
    keys = {key: config[key] for key in DATA_KEYS} | {"data": str(root)}
    status = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for p in pairs for f in p[2:]]
    # The name tells how and of which files a cache was made, so that a stale one is never opened.
    settings, stamp = (sha256(json.dumps(x).encode()).hexdigest()[:12] for x in (keys, status))
    place = root if os.access(root, os.W_OK) else ROOT / "data"
    cache = place / ".cache" / f"{split}-{settings}-{stamp}"
    if not cache.is_dir():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with open(cache.parent / f"{settings}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # runs that start together build it once
            if not cache.is_dir():
                for old in cache.parent.glob(f"{split}-{settings}-*"):
                    shutil.rmtree(old)
                build_cache(cache, pairs, config)
    with reading(cache, "remove this folder"):
        arrays = (np.load(cache / f"{name}.npy", mmap_mode="c") for name in ("images", "masks"))
        images, masks = map(torch.from_numpy, arrays)
        digest = (cache / "digest").read_text()
    return Split(images, masks, [p.name for p in pairs], [p.group for p in pairs], digest)


def build_cache(cache: Path, pairs: list[Pair], config: dict) -> None:
    """Decode all pairs into the files of a cache; complete or not there at all."""
    first, _ = read_pair(pairs[0].image, pairs[0].mask, config)

    def decode(pair: Pair) -> list[bytes]:
        image, mask = read_pair(pair.image, pair.mask, config)
        if image.shape != first.shape:
            raise UserError(f"{pair.image}: is of another size than the first; set `resize`")
        return [image.numpy().tobytes(), mask.numpy().tobytes()]

    digest = sha256(json.dumps([pair.name for pair in pairs]).encode())
    with TemporaryDirectory(None, cache.name, cache.parent) as new, ThreadPoolExecutor() as pool:
        folder = Path(new) / "cache"
        folder.mkdir()
        with open(folder / "images.npy", "wb") as images, open(folder / "masks.npy", "wb") as masks:
            for file, shape in ((images, first.shape), (masks, first.shape[1:])):
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(pairs), *shape)}
                np.lib.format.write_array_header_1_0(file, header)
            for image, mask in tqdm(pool.map(decode, pairs), "caching", len(pairs), disable=None):
                images.write(image)
                masks.write(mask)
                digest.update(image + mask)
        (folder / "digest").write_text(digest.hexdigest())
        folder.rename(cache)


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
