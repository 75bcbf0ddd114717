"""Copy a data set, its masks blurred as the lab blurred them, to measure what that costs.

    python -m tools.blur_masks data/afo data/afo-blurred

The lab's Gaussian blur (kernel 5, sigma 0.1 to 5 pixels) went over image and mask alike. Here it
goes over every mask of training and validation, and each pixel takes the class of the nearest
colour. Images and the masks of the test split stay as they are.
"""

import argparse
import shutil
from pathlib import Path

from common import SPLITS, UserError, run

import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from config import load_config
from data import read_mask
from figures import colourise
from metrics import confusion_matrices, mean_iou
from tools.generate import new_folder

KERNEL, SIGMA = 5, (0.1, 5.0)  # pixels: the lab's first row of blur


def blur_mask(mask: Tensor, sigma: float, classes: dict[str, list[int]]) -> Tensor:
    """Blur (H, W) class indices as a picture of their colours; returns the nearest classes."""
    picture = F.gaussian_blur(colourise(mask, classes).float(), [KERNEL] * 2, [sigma] * 2)
    colours = torch.tensor([*classes.values()])[:, :, None, None]
    return (picture - colours).square().sum(dim=1).argmin(dim=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="DIR", help="of the layout of data/afo")
    parser.add_argument("out", type=Path, metavar="DIR")
    args = parser.parse_args()
    masks = [p for s in SPLITS[:2] for p in sorted((args.source / s).glob("gt_image/*.png"))]
    if not masks:
        raise UserError(f"{args.source}: holds no training/gt_image/*.png; give data/afo")
    config, generator = load_config([]), torch.Generator().manual_seed(0)
    number, matrix = len(config["classes"]), 0
    with new_folder(args.out) as folder:
        hidden = shutil.ignore_patterns(".*")  # the cache of decoded files
        shutil.copytree(args.source, folder, ignore=hidden, dirs_exist_ok=True)
        for path in tqdm(masks, "blur", disable=None):
            mask = torch.from_numpy(read_mask(path, config))
            low, high = SIGMA
            sigma = low + (high - low) * float(torch.rand((), generator=generator))
            blurred = blur_mask(mask, sigma, config["classes"])
            matrix += confusion_matrices(blurred[None], mask[None], number)[0]
            colours = colourise(blurred, config["classes"]).permute(1, 2, 0).numpy()
            Image.fromarray(colours).save(folder / path.relative_to(args.source))
    print(f"{args.out}: the blurred masks have mean IoU {mean_iou(matrix):.4f} with the clean ones")


if __name__ == "__main__":
    run(main)
