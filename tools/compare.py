"""Compare two data sets of the classes of default.yaml: their masks, and how models get across.

python data.py compare DIR DIR [--models CHECKPOINT CHECKPOINT]
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from config import load_config
from data import load_split
from evaluate import align, evaluate_checkpoint
from metrics import IGNORE
from model import keep_memory, pick_device


def describe(masks: Tensor, index: int) -> dict[str, str]:
    """Describe a class of (N, H, W) masks; sizes and places are of the images that have it."""
    has = (masks == index).any(dim=2).any(dim=1)
    mine = masks[has] == index
    share = mine.sum() / masks.numel()
    found = {"in images": f"{has.float().mean():.3f}", "of all pixels": f"{share:.4f}"}
    if not has.any():
        return found
    columns, lines = mine.sum(dim=1).float(), mine.sum(dim=2).float()
    area = columns.sum(dim=1)
    x, y = (counts @ torch.arange(counts.shape[1]).float() / area for counts in (columns, lines))
    for name, values in {"pixels": area, "x": x, "y": y}.items():
        low, middle, high = values.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
        found[f"{name}: median (5–95 %)"] = f"{middle:.0f} ({low:.0f}–{high:.0f})"
    # Shapes that overlap come within two pixels: mixed pixels between them are background.
    near = F.max_pool2d(mine.float(), 5, 1, 2) > 0
    others = (masks[has] != index) & (masks[has] != 0) & (masks[has] != IGNORE)
    touching = (near & others).flatten(1).any(dim=1).float().mean()
    return found | {"touches another": f"{touching:.3f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs=2, metavar="DIR", help="their training splits are compared")
    models = "trained on the first and on the second, to score on the test splits of both"
    parser.add_argument("--models", nargs=2, default=[], type=Path, metavar="FILE", help=models)
    args = parser.parse_args()
    keep_memory()
    configs = [load_config([], [f"data={data!r}"]) for data in args.data]
    splits = [load_split(config, "training") for config in configs]
    lines = [["training split", *args.data], ["images", *(str(len(s.masks)) for s in splits)]]
    lines.append(["scenes", *(str(len(set(split.groups))) for split in splits)])
    for index, name in [*enumerate(configs[0]["classes"])][1:]:  # the background is the rest
        first, second = (describe(split.masks, index) for split in splits)
        lines += [[f"{name}: {k}", first.get(k, "–"), second.get(k, "–")] for k in first | second]
    for path in args.models:
        device = pick_device("auto")
        rows = [evaluate_checkpoint(path, data, "testing", device)[0] for data in args.data]
        lines.append([f"test mean IoU of {path}", *(f"{row['mean_iou']:.4f}" for row in rows)])
    print(align(lines))
