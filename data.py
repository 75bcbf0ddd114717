"""The data set: pairs of image and mask, checked, and resident as one uint8 array per split.

    python data.py generate --sequences 300 60 60 --size 128 --seed 0 --out data/generated
    python data.py download --out data/afo [--archive FILE.zip]
    python data.py check data/generated

Where files lie, what masks hold and how splits are made: the keys up to `resize` of default.yaml.
"""

import argparse
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import add_arguments, load_config
from download import download
from errors import UserError, run
from files import write_atomically
from generate import SPLITS, generate
from images import IGNORE, contact_sheet, legend, png, read_pair, thumbnails

SAMPLES = 8  # pairs of a split in the picture that `check` draws


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


def find_pairs(config: dict, split: str) -> tuple[list[Pair], list[str]]:
    """Pair images with masks by name.

    Args:
        config: for `data`, `images`, `masks`, `split_folders`, `group` and `split_shares`.
        split: "training", "validation" or "testing".

    Returns:
        The pairs of the split sorted by name, and one line for each file without a partner, for
        each folder that is missing or empty, for each name that is of no group.
    """
    root = Path(config["data"])
    folder = config["split_folders"][SPLITS.index(split)]
    patterns = [config[key].replace("{split}", folder) for key in ("images", "masks")]
    patterns = [Path(pattern).as_posix() for pattern in patterns]  # as paths are written below
    found = []
    for pattern in patterns:
        fixed = itertools.takewhile(lambda part: "*" not in part, Path(pattern).parts)
        for place in (root, root.joinpath(*fixed)):
            if not (place.is_dir() and os.access(place, os.R_OK | os.X_OK)):
                where = "make data` or `make data DATA=afo`; your own are where the keys `data`, "
                where = f"no such folder, or not readable; the lab's comes by `{where}`images` and "
                return [], [f"{place}: {where}`masks` say"]
        name_of = re.compile(re.escape(pattern).replace(r"\*", "([^/]+)"))
        # Names that start with a dot are not data: macOS leaves such a file beside each.
        paths = [path for path in sorted(root.glob(pattern)) if not path.name.startswith(".")]
        matches = [name_of.fullmatch(path.relative_to(root).as_posix()) for path in paths]
        found.append({match[1]: path for match, path in zip(matches, paths, strict=True)})
    images, masks = found
    # Both in one folder, a.tif and a_mask.tif: a file that both patterns take is of the longer one.
    shorter = images if len(patterns[0]) < len(patterns[1]) else masks
    both = {*images.values()} & {*masks.values()}
    for name in [name for name, path in shorter.items() if path in both]:
        del shorter[name]
    image_at, mask_at = (str(root / pattern) for pattern in patterns)
    problems = [
        f"{images[name]}: has no mask {mask_at.replace('*', name)}; add it or remove the image"
        for name in images.keys() - masks.keys()
    ] + [
        f"{masks[name]}: has no image {image_at.replace('*', name)}; add it or remove the mask"
        for name in masks.keys() - images.keys()
    ]
    if not images and not masks:
        problems.append(f"{image_at}: no such files; a split needs at least one image")
    pairs = []
    for name in (name for name in images if name in masks):
        match = re.search(config["group"], name)
        if match is None:
            problems.append(f"{images[name]}: group: {config['group']!r} is not found in its name")
        else:  # an empty expression: every image is a group of its own
            pairs.append(Pair(name, match[0] or name, images[name], masks[name]))
    if "{split}" not in config["images"]:
        there = {pair.group for pair in pairs}
        groups = _groups_of(split, there, config["split_shares"])
        pairs = [pair for pair in pairs if pair.group in groups]
        if not groups and not problems:
            problems.append(
                f"{root}: {len(there)} group(s) of images are too few to draw three splits from; "
                f"group is {config['group']!r} and says which stay together; set group: '' if each "
                "image is by itself"
            )
    return pairs, sorted(problems)


def _groups_of(split: str, groups: set[str], shares: list[float]) -> set[str]:
    """The groups of a split that is drawn: always the same, and at least one for each split.

    Sorted by a hash, so that neighbours in name, which may be neighbours in time, are spread.
    """
    if len(groups) < len(SPLITS):
        return set()
    ordered = sorted(groups, key=lambda group: hashlib.sha256(os.fsencode(group)).digest())
    counts = [max(1, round(len(ordered) * share / sum(shares))) for share in shares]
    validation, testing = counts[1], counts[2]
    if validation + testing >= len(ordered):
        validation = testing = 1
    start = {"validation": 0, "testing": validation, "training": validation + testing}[split]
    stop = {"validation": validation, "testing": validation + testing}.get(split)
    return set(ordered[start:stop])


def load_split(config: dict, split: str) -> Split:
    """Load a split through its cache, DIR/.cache/, which is rebuilt when any file changed.

    Args:
        config: for the keys from `data` to `in_channels`.
        split: "training", "validation" or "testing".

    Raises:
        UserError: a file is missing, unpaired, unreadable or of another size than the first.
    """
    root, channels = Path(config["data"]), config["in_channels"]
    pairs, problems = find_pairs(config, split)
    if problems:
        more = f" (and {len(problems) - 1} more: `make check` lists them)"
        raise UserError(problems[0] + (more if len(problems) > 1 else ""))
    made_by = [2, list(config["classes"].items()), channels]  # 2: counts changes of the decoding
    made_by += [config[key] for key in ("mask_format", "ignore", "resize")]
    settings = hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:8]
    stamp = hashlib.sha256()
    for path in (path for pair in pairs for path in (pair.image, pair.mask)):
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"{path}: no such file ({error.strerror}); was it moved?") from None
        stamp.update(os.fsencode(path.relative_to(root)))
        stamp.update(f" {status.st_size} {status.st_mtime_ns}\n".encode())
    # The name tells how and of which files a cache was made, so that a stale one is never opened.
    cache = root / ".cache" / f"{split}-{settings}-{stamp.hexdigest()[:16]}"
    try:
        if not cache.is_dir():
            cache.parent.mkdir(exist_ok=True)
            with open(cache.parent / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # runs that start together build it once
                if not cache.is_dir():
                    for old in cache.parent.glob(f"{split}-{settings}-*"):
                        shutil.rmtree(old)
                    try:
                        _build_cache(cache, pairs, config)
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
    names, groups = [pair.name for pair in pairs], [pair.group for pair in pairs]
    return Split(images, masks, names, groups, digest)


def _map(path: Path) -> Tensor:
    """A .npy file as a tensor that must not be written to.

    A private writable mapping would be counted as memory that may be needed one day, and refused
    for a file larger than the machine's.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.load(path, mmap_mode="r"))


def limit(split: Split, groups: int, images: int) -> Split:
    """The first so many groups of a split, and so many of their images, evenly spaced.

    Args:
        groups, images: 0 means no limit.
    """
    first = set(sorted(set(split.groups))[: groups or None])
    chosen = torch.tensor([i for i, group in enumerate(split.groups) if group in first])
    if 0 < images < len(chosen):
        chosen = chosen[torch.linspace(0, len(chosen) - 1, images).long()]
    if len(chosen) == len(split.names):
        return split  # still memory-mapped
    names, groups_left = ([of[i] for i in chosen.tolist()] for of in (split.names, split.groups))
    return Split(split.images[chosen], split.masks[chosen], names, groups_left, split.digest)


def _build_cache(cache: Path, pairs: list[Pair], config: dict) -> None:
    """Decode all pairs into the files of a cache; complete or not there at all."""
    partial = cache.with_name(cache.name + ".partial")
    partial.mkdir()
    first, _ = read_pair(pairs[0].image, pairs[0].mask, config)
    height, width, channels = first.shape
    digest = hashlib.sha256()

    def decode(pair: Pair) -> tuple[np.ndarray, np.ndarray, str]:
        image, mask = read_pair(pair.image, pair.mask, config)
        line = "".join(
            f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
            for path in (pair.image, pair.mask)
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
        block = 4 * os.cpu_count()
        blocks = (pairs[i : i + block] for i in range(0, len(pairs), block))
        decoded = itertools.chain.from_iterable(pool.map(decode, some) for some in blocks)
        progress = tqdm(decoded, f"caching {config['data']}", len(pairs), disable=None)
        for i, (image, mask, line) in enumerate(progress):
            if mask.shape != (height, width):
                raise UserError(
                    f"{pairs[i].image}: is {mask.shape[1]}×{mask.shape[0]} but "
                    f"{pairs[0].image.name} is {width}×{height}; make them one size, or set "
                    f"resize: [{height}, {width}]"
                )
            images.write(image.transpose(2, 0, 1).tobytes())
            masks.write(mask.tobytes())
            digest.update(os.fsencode(line))
    (partial / "digest").write_text(digest.hexdigest())
    partial.rename(cache)


class _Examined(NamedTuple):
    """What `check` found of a pair: what is wrong, pixels by mask value, size, SHA-256 of image."""

    problem: str | None
    pixels: np.ndarray
    size: str
    digest: bytes


def _examine(pair: Pair, config: dict) -> _Examined:
    nothing = np.zeros(256, np.int64)
    try:
        image, mask = read_pair(pair.image, pair.mask, config | {"resize": []})
        digest = hashlib.sha256(pair.image.read_bytes()).digest()
    except UserError as error:
        return _Examined(str(error), nothing, "", b"")
    size = f"{image.shape[1]}×{image.shape[0]}"
    return _Examined(None, np.bincount(mask.ravel(), minlength=256), size, digest)


def check(config: dict, picture: Path | None) -> None:
    """Print counts, sizes and class shares of each split and every problem there is.

    Args:
        config: for the keys from `data` to `in_channels`.
        picture: where to write a few pairs of each split, the masks laid over the images.

    Raises:
        UserError: at least one file is bad; the lines before it name them all.
    """
    root, classes = Path(config["data"]), list(config["classes"])
    problems: list[str] = []
    shown, seen = [], {}
    print(
        f"{'split':<12}{'pairs':>7}{'groups':>8}  {'size':<12}"
        + "".join(f"{name:>12}" for name in (*classes, "ignored"))
    )
    for split in SPLITS:
        pairs, unpaired = find_pairs(config, split)
        problems += unpaired
        pixels, sizes = np.zeros(256, np.int64), set()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = pool.map(_examine, pairs, itertools.repeat(config))
            results = tqdm(results, f"checking {split}", len(pairs), disable=None)
            for pair, (problem, counts, size, digest) in zip(pairs, results, strict=True):
                if problem:
                    problems.append(problem)
                    continue
                pixels += counts
                sizes.add(size)
                twin, twins_split = seen.setdefault(digest, (pair.image, split))
                if twins_split != split:
                    problems.append(
                        f"{pair.image}: is the same file as {twin} of the {twins_split} split; a "
                        "picture must be in one split only"
                    )
        if len(sizes) > 1 and not config["resize"]:
            problems.append(
                f"{root}: the {split} split has images of {len(sizes)} sizes; set resize: "
                "[height, width], or make them one size"
            )
        size = min(sizes) if len(sizes) == 1 else f"{len(sizes)} sizes"
        shares = pixels[[*range(len(classes)), IGNORE]] / max(pixels.sum(), 1)
        print(
            f"{split:<12}{len(pairs):>7}{len({pair.group for pair in pairs}):>8}  {size:<12}"
            + "".join(f"{share:12.4f}" for share in shares)
        )
        row = []
        for i in np.unique(np.linspace(0, len(pairs) - 1, SAMPLES).astype(int)) if pairs else []:
            with contextlib.suppress(UserError):  # it is among the problems
                array, mask = read_pair(pairs[i].image, pairs[i].mask, config | {"resize": []})
                image = torch.from_numpy(array.transpose(2, 0, 1).copy())
                pictures = thumbnails(image, torch.from_numpy(mask), config["classes"])
                row.append((f"{split} {pairs[i].name}", pictures))
        shown.append(row)
    if config["resize"]:
        print("resized to {1}×{0}".format(*config["resize"]) + " for training and evaluation")
    problems = list(dict.fromkeys(problems))  # a missing folder is found once for each split
    if picture and any(shown):
        write_atomically(picture, png(contact_sheet(shown, legend(config))))
        print(f"samples with their masks: {picture}")
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        number = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}, listed above"
        raise UserError(f"{root}: {number}; mend the files, or the keys that describe them")


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
    look.add_argument("data", nargs="?", metavar="DIR", help="short for --set data=DIR")
    add_arguments(look, required=False)
    look.add_argument("--picture", type=Path, metavar="FILE", help="draw samples with their masks")
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
        folder = [f"data={args.data}"] if args.data else []
        check(load_config(args.config, args.overrides + folder), args.picture)


if __name__ == "__main__":
    run(main)
