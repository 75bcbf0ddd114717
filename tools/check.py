"""List every problem of a data set, with counts, sizes and class shares of its splits.

python data.py check [DIR] [--config FILE] [--set key=value] [--picture FILE.png]
"""

import argparse
import hashlib
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from common import SPLITS, UserError, write_atomically

import torch
from torch import Tensor
from tqdm import tqdm

from config import add_arguments, load_config
from data import Pair, evenly, find_pairs, read_pair
from metrics import IGNORE
from pictures import contact_sheet, legend, overlay, png, thumbnail

SAMPLES = 8  # pairs of a split in the picture


class Examined(NamedTuple):
    """What is wrong with a pair, or: pixels by mask value (256,), size, SHA-256 of the image.

    `pictures` are the image and its mask laid over it, if they were asked for.
    """

    problem: str
    pixels: Tensor | None
    size: str
    digest: str
    pictures: list[Tensor]


def examine(pair: Pair, config: dict, is_sample: bool) -> Examined:
    """Read a pair in its own size."""
    try:
        image, mask = read_pair(pair.image, pair.mask, config | {"resize": []})
    except UserError as error:
        return Examined(str(error), None, "", "", [])
    pixels = torch.bincount(mask.flatten(), minlength=256)
    digest = hashlib.sha256(pair.image.read_bytes()).hexdigest()
    pictures = [image[:3].expand(3, -1, -1), overlay(image, mask, config["classes"])]
    pictures = [thumbnail(picture) for picture in pictures] if is_sample else []
    return Examined("", pixels, f"{mask.shape[1]}×{mask.shape[0]}", digest, pictures)


def check(config: dict, picture: Path | None) -> None:
    """Print a line for each split and every problem there is.

    Args:
        config: for the keys from `data` to `in_channels`.
        picture: where to write a few pairs of each split, the masks laid over the images.

    Raises:
        UserError: at least one file is bad; the lines before it name them all.
    """
    classes, problems, rows = list(config["classes"]), [], []
    seen: dict[str, tuple[Path, str]] = {}  # digest of an image → where it was first
    heads = "".join(f"{name:>12}" for name in (*classes, "ignored"))
    print(f"{'split':<12}{'pairs':>7}{'groups':>8}  {'size':<12}{heads}")
    for split in SPLITS:
        pairs, unpaired = find_pairs(config, split)
        samples = {*evenly(len(pairs), SAMPLES)} if picture else set()
        with ThreadPoolExecutor() as pool:
            results = pool.map(
                examine, pairs, repeat(config), map(samples.__contains__, range(len(pairs)))
            )
            results = list(tqdm(results, f"checking {split}", len(pairs), disable=None))
        problems += unpaired + [result.problem for result in results if result.problem]
        for pair, result in zip(pairs, results, strict=True):
            first, where = seen.setdefault(result.digest, (pair.image, split))
            if result.digest and where != split:
                problems.append(f"{pair.image}: is also in {where} ({first}); keep one of them")
        good = [result for result in results if not result.problem]
        sizes = {result.size for result in good}
        if len(sizes) > 1 and not config["resize"]:
            problems.append(f"{split}: images of {len(sizes)} sizes; set resize: [height, width]")
        pixels = sum((result.pixels for result in good), torch.zeros(256))
        shares = (pixels / pixels.sum().clamp(min=1))[[*range(len(classes)), IGNORE]]
        columns = "".join(f"{share:12.4f}" for share in shares)
        groups, size = len({pair.group for pair in pairs}), ", ".join(sorted(sizes)[:2])
        print(f"{split:<12}{len(pairs):>7}{groups:>8}  {size:<12}{columns}")
        named = zip(pairs, results, strict=True)
        rows.append([(f"{split} {pair.name}", r.pictures) for pair, r in named if r.pictures])
    if picture and any(rows):
        write_atomically(picture, png(contact_sheet(rows, legend(config))))
        print(f"samples with their masks: {picture}")
    problems = list(dict.fromkeys(problems))
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        raise UserError(f"{config['data']}: {len(problems)} problem(s), listed above; fix them")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", metavar="DIR", help="short for --set data=DIR")
    add_arguments(parser, required=False)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="show samples with masks")
    args = parser.parse_args()
    folder = [f"data={args.data}"] if args.data else []
    check(load_config(args.config, args.overrides + folder), args.picture)
