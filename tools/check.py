"""List every problem of a data set, with counts, sizes and class shares of its splits.

python data.py check [DIR] [--config FILE] [--set key=value] [--picture FILE.png]
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from common import SPLITS, UserError

import torch
from tqdm import tqdm

from config import add_arguments, load_config
from data import Pair, evenly, find_pairs, read_pair
from figures import grid, legend_of, overlay, save, thumbnail
from metrics import IGNORE


def examine(pair: Pair, config: dict) -> tuple[torch.Tensor, str, str]:
    """Read a pair: pixels by mask value (256,), size, and the digest of the image's pixels."""
    image, mask = read_pair(pair.image, pair.mask, config | {"resize": []})
    digest = sha256(image.numpy().tobytes()).hexdigest()
    return mask.flatten().bincount(minlength=256), f"{mask.shape[1]}×{mask.shape[0]}", digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", metavar="DIR", help="short for --set data=DIR")
    add_arguments(parser, required=False)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw samples, a row a split")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides + [f"data={args.data!r}"] * bool(args.data))
    classes, problems, rows, seen = config["classes"], [], [], {}
    line = "{:<12}{:>7}{:>8}  {:<12}" + "{:>12}" * (len(classes) + 1)
    print(line.format("split", "pairs", "groups", "size", *classes, "ignored"))
    for split in SPLITS:
        pairs, unpaired = find_pairs(config, split)
        problems += unpaired
        good, pixels = {}, torch.zeros(256, dtype=torch.int64)  # good: pair → size
        with ThreadPoolExecutor() as pool:
            futures = {pool.submit(examine, pair, config): pair for pair in pairs}
            for future, pair in tqdm(futures.items(), f"checking {split}", disable=None):
                try:
                    counts, good[pair], digest = future.result()
                    pixels += counts
                    first, where = seen.setdefault(digest, (pair.image, split))
                    if where != split:
                        problems.append(f"{pair.image}: is also in {where} ({first}); keep one")
                except UserError as error:
                    problems.append(str(error))
        sizes = sorted({*good.values()})
        if len(sizes) > 1 and not config["resize"]:
            problems.append(f"{split}: images of {len(sizes)} sizes; set resize: [height, width]")
        shares = (pixels / pixels.sum().clamp(min=1))[[*range(len(classes)), IGNORE]]
        cells = len(pairs), len({pair.group for pair in pairs}), ", ".join(sizes[:2])
        print(line.format(split, *cells, *(f"{share:.4f}" for share in shares)))
        chosen = [[*good][i] for i in evenly(len(good), 6)] if args.picture else []
        laid = (overlay(*read_pair(pair.image, pair.mask, config), classes) for pair in chosen)
        rows.append([(pair.name, thumbnail(p)) for pair, p in zip(chosen, laid, strict=True)])
    if any(rows):
        save(grid(rows, legend_of(config)), args.picture)
    problems = list(dict.fromkeys(problems))  # random splits have the same ones
    print("".join(f"problem: {problem}\n" for problem in problems), end="")
    if problems:
        raise UserError(f"{config['data']}: {len(problems)} problem(s), listed above; fix them")
