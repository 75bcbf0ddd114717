"""The data set: pairs of image and mask, their splits, and a cache of each split as one array.

    python data.py generate --out data/generated [--sequences 300 60 60] [--frames K] [--seed 0]
    python data.py download --out data/afo [--archive FILE.zip]
    python data.py check [DIR] [--config FILE] [--picture FILE.png]
    python data.py describe --images FOLDER --masks FOLDER [--out my.yaml]

The keys from `data` to `in_channels` in configs/default.yaml say where the files lie, what masks
hold and how splits are made. pairs.py finds the files, images.py reads them.
"""

import argparse
import json
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO, NamedTuple

from machine import CORES, unpin_thread

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import ROOT, UserError, code_digest, naming_full_disk, reading, run, wait_for_lock
from images import read_pair, read_size
from masks import missing_classes_problem
from metrics import IGNORE
from pairs import Pair, data_root, find_pairs, stand_in_note

DATA_KEYS = (  # the keys that decide, beside `data`, which pixels a split holds
    "images",
    "masks",
    "split_folders",
    "group",
    "split_shares",
    "mask_format",
    "mask_tolerance",
    "other_values",
    "ignore",
    "value_range",
    "resize",
    "classes",
    "in_channels",
)
# Computed on import, when the code itself is read: a later edit has no effect in this process.
CODE_OF_PIXELS = code_digest(("data.py", "images.py", "masks.py"))
MOST_WAITING = 32  # pairs that are decoded ahead of the one in use, and fill memory meanwhile
MOST_PADDING = 4  # times the pixels of the images that they may have once padded to one size


class Split(NamedTuple):
    """One split of a data set. Its arrays are memory-mapped: only what is used is read.

    `digest` is the SHA-256 of names and pixel values, so it is the same wherever the data lie.
    """

    images: Tensor  # (N, channels, H, W) uint8
    masks: Tensor  # (N, H, W) uint8 class indices
    names: list[str]
    groups: list[str]
    digest: str


# ---- parts of splits


def evenly(total: int, count: int) -> list[int]:
    """Choose `count` of `total` indices, evenly spaced; all if `count` is 0 or above `total`."""
    if count == 0 or count > total:
        count = total
    return np.linspace(0, total - 1, count).astype(int).tolist()


def limit(split: Split, groups: int = 0, images: int = 0) -> Split:
    """Keep some groups of a split, then some of their images, both evenly spaced; 0 keeps all."""
    group_names = sorted(set(split.groups))
    kept_groups = {group_names[i] for i in evenly(len(group_names), groups)}
    rows = [i for i, group in enumerate(split.groups) if group in kept_groups]
    rows = [rows[i] for i in evenly(len(rows), images)]
    if len(rows) == len(split.names):
        return split  # still memory-mapped, while a choice of rows is copied into memory
    return Split(
        images=split.images[rows],
        masks=split.masks[rows],
        names=[split.names[i] for i in rows],
        groups=[split.groups[i] for i in rows],
        digest=split.digest,
    )


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 (N, channels, H, W) in 0…255 to float32 in [0, 1], channels-last in memory."""
    return images.float().div_(255).contiguous(memory_format=torch.channels_last)


# ---- splits and their cache of decoded files


def load_data(config: dict) -> tuple[Split, Split]:
    """Load the training and the validation split, limited as the config says.

    UserError if a file cannot be used, if `ignore` leaves no pixel of a split, or if a class has no
    pixel in the training masks, unless the limits may have left its masks out.
    """
    training = load_split(config, "training")
    training = limit(training, config["limit_groups"], config["limit_images"])
    validation = load_split(config, "validation")
    validation = limit(validation, images=config["limit_validation"])
    for name, split in (("training", training), ("validation", validation)):
        # Stops at the first mask with a pixel that counts, so that few masks are read.
        if not any((mask != IGNORE).any() for mask in split.masks):
            raise UserError(f"{config['data']}: ignore: leaves no pixel of the {name} split")
    missing = find_missing_classes(training.masks, list(config["classes"]))
    if missing and (config["limit_groups"] or config["limit_images"]):
        names = ", ".join(missing)
        print(f"note: limits: the chosen training masks have no {names}", file=sys.stderr)
    elif missing:
        text = missing_classes_problem(missing, config)
        if config["resize"]:
            text += "; if `make check` finds its pixels, `resize` loses them: make it larger"
        raise UserError(f"{config['data']}: {text}")
    return training, validation


def find_missing_classes(masks: Tensor, classes: list[str]) -> list[str]:
    """List the classes without a pixel in (N, H, W) masks; reads until all have been seen."""
    missing = dict(enumerate(classes))
    for mask in masks:
        counts = mask.flatten().bincount()
        for index in counts.nonzero().flatten().tolist():
            missing.pop(index, None)
        if not missing:
            break
    return list(missing.values())


def load_split(config: dict, split: str) -> Split:
    """Load a split from its cache.

    The cache is built first if a file, a key or the code that reads the files has changed.
    UserError if a file of the split cannot be used.
    """
    pairs, problems = find_pairs(config, split)
    if problems:
        others = ""
        if len(problems) > 1:
            others = f" (and {len(problems) - 1} more: see `make check`)"
        raise UserError(problems[0] + others)
    note = stand_in_note(config)
    if note and split == "testing":
        print(f"note: {note}", file=sys.stderr)
    root = data_root(config)
    folder = cache_folder(root)
    # The name of a cache says how and of which files it was made: an outdated one is never opened.
    settings = digest_settings(config)
    cache = folder / f"{split}-{settings}-{digest_files(root, pairs)}"
    with wait_for_lock(folder / f"{settings}.lock"):  # scripts that start together build it once
        if not cache.is_dir():
            for outdated in folder.glob(f"{split}-{settings}-*"):
                shutil.rmtree(outdated)
            with naming_full_disk(folder):
                build_cache(cache, pairs, config)
        images, masks, digest = open_cache(cache)
    if config["crop"] == 0 and (cache / "padded").exists():
        raise UserError(f"{root}: has images of several sizes; set resize or crop")
    return Split(
        images=images,
        masks=masks,
        names=[pair.name for pair in pairs],
        groups=[pair.group for pair in pairs],
        digest=digest,
    )


def cache_folder(root: Path) -> Path:
    """Make the folder of caches: in that of the data, or in data/ if that one is read-only.

    UserError if neither can be made.
    """
    folder = root / ".cache"
    above = folder if folder.is_dir() else root
    if not os.access(above, os.W_OK):
        folder = ROOT / "data/.cache"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        advice = "let it be written, or copy the data"
        raise UserError(f"{folder}: cannot be made ({error.strerror}); {advice}") from None
    return folder


def open_cache(cache: Path) -> tuple[Tensor, Tensor, str]:
    """Open images, masks and digest of a cache; pixels are read when they are used."""
    with reading(cache, "remove this folder"):
        images = np.load(cache / "images.npy", mmap_mode="c")
        masks = np.load(cache / "masks.npy", mmap_mode="c")
        digest = (cache / "digest").read_text(encoding="utf-8")
    return torch.from_numpy(images), torch.from_numpy(masks), digest


def digest_settings(config: dict) -> str:
    """Compute a digest, twelve digits, of the keys that decide which pixels a split has."""
    values = {"root": str(data_root(config).resolve())}  # however the folder is spelled
    for key in DATA_KEYS:
        values[key] = config[key]
    # Of the classes, names decide nothing: their values do, and which of them is other_values.
    classes = config["classes"]
    values["classes"] = list(classes.values())
    values["other_values"] = [name == config["other_values"] for name in classes]
    return sha256(json.dumps(values).encode()).hexdigest()[:12]


def digest_files(root: Path, pairs: list[Pair]) -> str:
    """Compute a digest, twelve digits, of the names, sizes and times of the files.

    It changes with the code that reads the files too.
    """
    files = [CODE_OF_PIXELS]
    for pair in pairs:
        for path in (pair.image, pair.mask):
            with reading(path):  # a link may lead nowhere
                status = path.stat()
            name = str(path).removeprefix(f"{root}/")  # however the folder is spelled
            files.append((name, status.st_size, status.st_mtime_ns))
    return sha256(json.dumps(files).encode()).hexdigest()[:12]


def in_parallel(
    function: Callable[[object], object], items: list
) -> Iterator[tuple[object, Future]]:
    """Call function(item) for each item on all cores; yield (item, its future) in order."""
    # A training pins its main thread to one core, which the threads of a pool would inherit.
    with ThreadPoolExecutor(max_workers=len(CORES) or None, initializer=unpin_thread) as pool:
        waiting = deque()
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) == MOST_WAITING:
                yield waiting.popleft()
        yield from waiting


def decode(pair: Pair, config: dict) -> tuple[Tensor, Tensor]:
    """Read the image, (channels, H, W) uint8, and the mask, (H, W) uint8, of a pair."""
    return read_pair(pair.image, pair.mask, config)


def build_cache(cache: Path, pairs: list[Pair], config: dict) -> None:
    """Decode all pairs into the files of a cache folder, which is there complete or not at all."""
    first_image, _ = decode(pairs[0], config)
    channels, height, width = first_image.shape
    common_size = find_common_size(pairs, config)
    if common_size is not None:
        height, width = common_size
    names = [pair.name for pair in pairs]
    digest = sha256(json.dumps(names).encode())
    # A killed process leaves this folder. Its name begins with that of the cache, so that
    # whatever removes the cache removes it as well.
    with TemporaryDirectory(prefix=cache.name, dir=cache.parent) as temporary:
        folder = Path(temporary) / "cache"
        folder.mkdir()
        with open(folder / "images.npy", "wb") as images, open(folder / "masks.npy", "wb") as masks:
            write_header(images, (len(pairs), channels, height, width))
            write_header(masks, (len(pairs), height, width))
            decoded = in_parallel(partial(decode, config=config), pairs)
            for pair, future in tqdm(decoded, "caching", len(pairs), disable=None):
                image, mask = future.result()
                if common_size is not None:
                    image, mask = pad(image, mask, height, width)
                if image.shape[1:] != (height, width):
                    text = "differs in size from the first"
                    advice = "set resize: [height, width], or crop, to train on parts of images"
                    raise UserError(f"{pair.image}: {text}; {advice}")
                for file, pixels in ((images, image), (masks, mask)):
                    values = pixels.numpy().tobytes()
                    digest.update(values)
                    file.write(values)
        if common_size is not None:
            (folder / "padded").touch()
        (folder / "digest").write_text(digest.hexdigest(), encoding="utf-8")
        folder.rename(cache)


def find_common_size(pairs: list[Pair], config: dict) -> tuple[int, int] | None:
    """Find the height and width that images of several sizes get; None if nothing is padded."""
    if config["crop"] == 0 or config["resize"]:
        return None
    sizes = [read_size(pair.image) for pair in pairs]
    if len(set(sizes)) == 1:
        return None
    return padded_size(sizes, config)


def largest_size(sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """Find the largest height and the largest width among sizes."""
    return max(height for height, _ in sizes), max(width for _, width in sizes)


def padding_factor(sizes: list[tuple[int, int]]) -> float:
    """Compute how many times their pixels images have once all are padded to the largest size."""
    height, width = largest_size(sizes)
    pixels = sum(size[0] * size[1] for size in sizes)
    return len(sizes) * height * width / pixels


def padded_size(sizes: list[tuple[int, int]], config: dict) -> tuple[int, int]:
    """Find the height and width that images of several `sizes` are padded to: the largest ones.

    UserError if that takes too much memory.
    """
    height, width = largest_size(sizes)
    factor = padding_factor(sizes)
    if factor > MOST_PADDING:
        text = f"padded to {width}×{height}, its images have {factor:.1f} times their pixels"
        raise UserError(f"{config['data']}: {text}; set resize: [height, width]")
    return height, width


def pad(image: Tensor, mask: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Pad an image and its mask at the bottom and on the right, by pixels that count nowhere.

    From (channels, h, w) and (h, w) to (channels, height, width) and (height, width), all uint8.
    The image goes on mirrored, so that a model predicts its border as if nothing were added.
    """
    bottom = max(0, height - image.shape[1])
    right = max(0, width - image.shape[2])
    margins = ((0, bottom), (0, right))
    pixels = np.pad(image.numpy(), ((0, 0), *margins), mode="symmetric")
    values = np.pad(mask.numpy(), margins, constant_values=IGNORE)
    return torch.from_numpy(pixels), torch.from_numpy(values)


def write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """Write the header of a .npy file for a uint8 array of a shape; its values follow."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


# ---- commands


def main() -> None:
    # Here and not at the top, since these modules import this one.
    from tools import check, describe, download, generate

    parser = argparse.ArgumentParser(description="Make, fetch or check a data set.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    tools = {
        "generate": generate,
        "download": download,
        "check": check,
        "describe": describe,
    }
    for name, tool in tools.items():
        purpose = tool.__doc__.splitlines()[0]
        command = commands.add_parser(name, help=purpose, description=purpose)
        tool.add_arguments(command)
        command.set_defaults(main=tool.main)
    args = parser.parse_args()
    args.main(args)


if __name__ == "__main__":
    run(main)
