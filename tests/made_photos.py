"""Small sets of photographs and masks, for the tests of describe and of its parts."""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from common import SPLITS
from config import load_config
from images import read_mask, read_pair
from pairs import find_pairs
from tools import describe

N = 12
LARGE = np.array([1, 0, 2], np.uint8)  # makes the background a class, and the disc the background
BLACK_RED_BLUE = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)


def draw(seed: int, height: int = 96, width: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Draw a disc (class 1) and a bar (class 2) on noise: (H, W, 3) image, (H, W) mask, uint8."""
    random = np.random.default_rng(seed)
    image = random.integers(40, 90, (height, width, 3)).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    y, x = np.mgrid[:height, :width]
    mask[(y - height // 2) ** 2 + (x - width // 2 - seed) ** 2 <= (height // 8) ** 2] = 1
    mask[: height // 6, seed : seed + width // 4] = 2
    image[mask == 1] = (220, 60, 60)
    image[mask == 2] = (60, 60, 220)
    return image, mask


def save(path: Path, pixels: np.ndarray | Image.Image, **options: object) -> None:
    """Save an image, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)


def write_set(root: Path, values: np.ndarray, image_ending: str = "png") -> None:
    """Write `photos` and `labels`, whose classes 0, 1, 2 have the given values or colours."""
    for i in range(N):
        image, mask = draw(i)
        save(root / f"photos/{i:03}.{image_ending}", image)
        save(root / f"labels/{i:03}.png", values[mask])


def write_config(root: Path, images: str = "photos", masks: str = "labels") -> tuple[dict, str]:
    """Call describe for two paths below a folder; the config that it wrote, and its text."""
    parser = argparse.ArgumentParser()
    describe.add_arguments(parser)
    out = root / "own.yaml"
    paths = ["--images", str(root / images), "--masks", str(root / masks), "--out", str(out)]
    describe.main(parser.parse_args(paths))
    return load_config([out]), out.read_text()


def read_masks(config: dict) -> list[np.ndarray]:
    """Read all masks of a config, in the order of their names; fails if one cannot be used."""
    pairs = []
    for split in SPLITS:
        split_pairs, problems = find_pairs(config, split)
        assert not problems
        pairs += split_pairs
    masks = []
    for pair in sorted(pairs, key=lambda pair: pair.name):
        read_pair(pair.image, pair.mask, config)
        masks.append(read_mask(pair.mask, config))
    return masks
