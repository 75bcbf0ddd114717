"""Compare two data sets of the same classes: what their masks hold, and how models get across.

python data.py compare DIR DIR [--split training] [--models CHECKPOINT CHECKPOINT]
"""

import argparse
from pathlib import Path

from common import SPLITS

import torch
import torch.nn.functional as F
from torch import Tensor

from config import load_config
from data import load_split
from evaluate import align, evaluate_checkpoint
from metrics import IGNORE
from model import keep_memory, pick_device

QUANTILES = torch.tensor([0.05, 0.5, 0.95])


def describe(masks: Tensor, index: int) -> dict[str, str]:
    """Describe one class of (N, H, W) masks; sizes and places are of the images that have it."""
    mine = masks == index
    area = mine.sum(dim=(1, 2)).float()
    has = area > 0
    if not has.any():
        return {"in images": "0.000"}
    shares = has.float().mean(), mine.float().mean()
    found = {"in images": f"{shares[0]:.3f}", "of all pixels": f"{shares[1]:.4f}"}
    measures = {"pixels": area}
    for name, dim in (("x", 1), ("y", 2)):  # where its pixels lie on average
        line = mine.sum(dim=dim).float()
        measures[name] = line @ torch.arange(line.shape[1]).float() / area
    for name, values in measures.items():
        low, middle, high = values[has].quantile(QUANTILES).tolist()
        found[f"{name}: median (5–95 %)"] = f"{middle:.0f} ({low:.0f}–{high:.0f})"
    # Shapes that overlap come within two pixels: mixed pixels between them are background.
    others = (masks != index) & (masks != 0) & (masks != IGNORE)
    near = F.max_pool2d(mine.float(), 5, 1, 2) > 0
    touching = (near & others).any(dim=(1, 2)) & has
    return found | {"touches another": f"{touching.sum() / has.sum():.3f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs=2, metavar="DIR")
    parser.add_argument("--split", choices=SPLITS, default="training", help="whose masks")
    models = "trained on the first and on the second, to score on both test splits"
    parser.add_argument("--models", nargs=2, default=[], type=Path, metavar="FILE", help=models)
    args = parser.parse_args()
    keep_memory()
    configs = [load_config([], [f"data={data!r}"]) for data in args.data]
    splits = [load_split(config, args.split) for config in configs]
    lines = [[f"{args.split} split", *args.data]]
    lines.append(["images", *(str(len(split.masks)) for split in splits)])
    lines.append(["groups", *(str(len(set(split.groups))) for split in splits)])
    for index, name in [*enumerate(configs[0]["classes"])][1:]:  # the background is the rest
        first, second = (describe(split.masks, index) for split in splits)
        lines += [[f"{name}: {key}", first.get(key, "–"), second.get(key, "–")] for key in first]
    print(align(lines))
    device = pick_device("auto")
    for path in args.models:
        rows = [evaluate_checkpoint(path, data, "testing", device)[0] for data in args.data]
        print(f"{path}: test mean IoU", *(f"{row['mean_iou']:.4f}" for row in rows))
