"""The data set: pairs of image and mask, checked, and resident as one uint8 array per split.

    python data.py generate --out data/generated [--sequences 300 60 60] [--frames K] [--seed 0]
    python data.py download --out data/afo [--archive FILE.zip]
    python data.py check data/generated [--picture FILE.png]
    python data.py compare data/afo data/generated [--models FILE FILE]

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
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from metrics import IGNORE

DATA_KEYS = ("data", "images", "masks", "split_folders", "group", "split_shares", "mask_format")
DATA_KEYS += ("ignore", "resize", "classes", "in_channels")  # decide which pixels a split holds


class Pair(NamedTuple):
    """An image, its mask, the name they share, and the group that must stay in one split."""

    name: str
    group: str
    image: Path
    mask: Path


class Split(NamedTuple):
    """One split, memory-mapped; `digest`, the SHA-256 of names and values, identifies its data."""

    images: Tensor  # (N, channels, H, W) uint8
    masks: Tensor  # (N, H, W) uint8 class indices
    names: list[str]
    groups: list[str]
    digest: str


def read_image(path: Path, channels: int | None = None) -> np.ndarray:
    """Read an image, upright as its EXIF orientation says, as (H, W, channels) uint8.

    What is transparent is white, unless channels is 4; None: what the file holds, of a palette the
    indices. UserError if it cannot be read, or has other than 8 bits a channel.
    """
    with reading(path):
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
            raise UserError(f"{path}: has pixels of mode {image.mode}; save it as 8-bit RGB")
    if channels in (1, 3) and image.has_transparency_data:  # colours there are arbitrary
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(channels, image.mode)  # Pillow's names
    if image.mode != mode:  # through RGBA, to which Pillow converts all without loss
        image = image.convert("RGBA").convert(mode)
    return np.atleast_3d(np.array(image, np.uint8))


def mask_values(config: dict) -> np.ndarray:
    """List the values of masks: a row of 3 (colours) or 1 (indices) a class, one for `ignore`."""
    with reading("classes, ignore", "see configs/default.yaml for their form"):
        for name, colour in config["classes"].items():
            if type(name) is not str or [type(value) for value in colour] != [int] * 3:
                raise ValueError(f"{name}: give a name, quoted, and a colour [r, g, b]")
        values = np.array([*config["classes"].values()], np.uint8).reshape(-1, 3)
        if config["mask_format"] == "indices":
            values = np.arange(len(values), dtype=np.uint8)[:, None]
        if config["ignore"]:
            values = np.concatenate([values, np.array([config["ignore"]], np.uint8)])
        if not 2 <= len(config["classes"]) < IGNORE or len(np.unique(values, axis=0)) < len(values):
            raise ValueError("must be 2 to 254 classes, and all values different")
    return values


def read_mask(path: Path, config: dict) -> np.ndarray:
    """Read (H, W) uint8 class indices, or `IGNORE`; UserError if a pixel's value is of no class."""
    values, number = mask_values(config), len(config["classes"])
    if config["mask_format"] == "colours":  # one number for a colour, whatever its alpha
        pixels, places = read_image(path, 4), np.float32([1 << 16, 1 << 8, 1, 0])  # exact
        codes, known = pixels @ places, values @ places[:3]
    else:  # grey may be written as three equal channels
        pixels = read_image(path)[..., :3]
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
        fix = "mask_format: indices" if values.shape[1] == 3 else "ignore: [255]"
        what = f"{stray.sum()} pixels are of no class, the first is {found} at x={x}, y={y}"
        raise UserError(f"{path}: {what}; fix the mask or `classes`, or set {fix}")
    return mask


def read_pair(image_path: Path, mask_path: Path, config: dict) -> tuple[Tensor, Tensor]:
    """Read a (channels, H, W) image and its (H, W) mask, both uint8; UserError if sizes differ."""
    image = torch.from_numpy(read_image(image_path, config["in_channels"])).permute(2, 0, 1)
    mask = torch.from_numpy(read_mask(mask_path, config))
    if image.shape[1:] != mask.shape:
        sizes = [f"{width}×{height}" for height, width in (mask.shape, image.shape[1:])]
        raise UserError(f"{mask_path}: is {sizes[0]} but its image is {sizes[1]}; make them alike")
    if size := config["resize"]:  # classes cannot be averaged
        image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        mask = F.interpolate(mask[None, None], size, mode="nearest-exact")[0, 0]
    return image, mask


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 (N, channels, H, W) in 0…255 to float32 in [0, 1], channels-last in memory."""
    return images.float().div_(255).contiguous(memory_format=torch.channels_last)


def check_data_keys(config: dict) -> None:
    """Refuse a config that cannot describe a data set; UserError names the key."""
    if any(p.count("*") != 1 or p.startswith("/") for p in (config["images"], config["masks"])):
        raise UserError("images, masks: must be paths below `data` with one *: 'photos/*.jpg'")
    size = config["resize"]
    if size and (len(size) != 2 or any(type(n) is not int or not 8 <= n <= 1 << 14 for n in size)):
        raise UserError("resize: must be [], or [height, width] of 8 pixels or more")
    with reading("group", "give a regular expression, as in '^[^_]+'"):
        re.compile(config["group"])
    mask_values(config)


def find_pairs(config: dict, split: str) -> tuple[list[Pair], list[str]]:
    """Pair the images of a split with their masks, sorted by name; also list its problems."""
    check_data_keys(config)
    root, folder = Path(config["data"]), config["split_folders"][SPLITS.index(split)]
    patterns = [config[key].replace("{split}", folder) for key in ("images", "masks")]
    found: list[dict[str, Path]] = []  # what * stands for → path
    for pattern in patterns:
        before, after = str(Path(pattern)).split("*")
        files = [p for p in root.glob(pattern) if p.name[0] != "."]  # macOS leaves such files
        names = (str(p.relative_to(root)).removeprefix(before).removesuffix(after) for p in files)
        found.append(dict(zip(names, files, strict=True)))
    images, masks = found
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
        _, val, test = (max(1, round(len(groups) * share / sum(shares))) for share in shares)
        both = val + test  # training takes the rest
        ends = {"validation": (0, val), "testing": (val, both), "training": (both, None)}[split]
        chosen = {*groups[slice(*ends)]}
        pairs = [pair for pair in pairs if pair.group in chosen]
        if not pairs and not problems:
            problems.append(f"{root}: too few groups to choose splits from; try group: ''")
    return pairs, problems


def load_split(config: dict, split: str) -> Split:
    """Load a split through a cache of its decoded files; UserError if one cannot be used."""
    pairs, problems = find_pairs(config, split)
    if problems:
        more = f" (and {len(problems) - 1} more: `make check` lists them)"
        raise UserError(problems[0] + more * (len(problems) > 1))
    root = Path(config["data"]).resolve()
    keys = {key: config[key] for key in DATA_KEYS} | {"data": str(root)}
    status = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for p in pairs for f in p[2:]]
    # The name tells how and of which files a cache was made, so that a stale one is never opened.
    settings, stamp = (sha256(json.dumps(x).encode()).hexdigest()[:12] for x in (keys, status))
    place = root if os.access(root, os.W_OK) else ROOT / "data"  # read-only
    cache = place / ".cache" / f"{split}-{settings}-{stamp}"
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
    shape = read_pair(pairs[0].image, pairs[0].mask, config)[0].shape
    digest = sha256(json.dumps([pair.name for pair in pairs]).encode())
    with TemporaryDirectory(None, cache.name, cache.parent) as new, ThreadPoolExecutor() as pool:
        decoded = pool.map(lambda pair: read_pair(pair.image, pair.mask, config), pairs)
        folder = Path(new) / "cache"
        folder.mkdir()
        with open(folder / "images.npy", "wb") as images, open(folder / "masks.npy", "wb") as masks:
            for file, size in ((images, shape), (masks, shape[1:])):
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(pairs), *size)}
                np.lib.format.write_array_header_1_0(file, header)
            for pair, both in zip(tqdm(pairs, "caching", disable=None), decoded, strict=True):
                if both[0].shape != shape:
                    raise UserError(f"{pair.image}: not of the size of the first; set `resize`")
                for file, pixels in zip((images, masks), both, strict=True):
                    data = pixels.numpy().tobytes()
                    digest.update(data)
                    file.write(data)
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
    command = "".join(sys.argv[1:2])
    if command not in ("generate", "download", "check", "compare"):
        raise UserError(f"python data.py {command}: give one of generate, download, check, compare")
    sys.argv[:2] = [f"data.py {command}"]
    import_module(f"tools.{command}").main()  # each has its own options


if __name__ == "__main__":
    run(main)
