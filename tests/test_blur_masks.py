"""Tests of tools/blur_masks.py: which pixels change class, and which files are left alone."""

import math
from pathlib import Path

import torch
from conftest import config_for

from data import load_split
from tools import blur_masks

CLASSES = {"background": [0, 0, 0], "square": [255, 0, 0]}


def test_blur_cuts_corners_and_keeps_straight_edges() -> None:
    mask = torch.zeros(16, 16, dtype=torch.uint8)
    mask[4:12, 4:12] = 1
    blurred = blur_masks.blur_mask(mask, 5.0, CLASSES)
    weights = [math.exp(-(d**2) / 50) for d in range(-2, 3)]  # of a Gaussian of sigma 5
    line = [sum(w for d, w in enumerate(weights, -2) if 4 <= i + d < 12) for i in range(16)]
    share = torch.tensor(line)[:, None] * torch.tensor(line) / sum(weights) ** 2
    assert torch.equal(blurred, (share > 0.5).long())
    assert (blurred != mask).sum() == 12  # three pixels of each corner
    assert torch.equal(blur_masks.blur_mask(mask, 0.1, CLASSES), mask.long())


def test_test_split_stays_clean(dataset: Path, tmp_path: Path, call) -> None:
    assert call(blur_masks.main, dataset, tmp_path / "blurred")[0] == 0
    for split, same in {"training": False, "validation": False, "testing": True}.items():
        old, new = (load_split(config_for(d), split) for d in (dataset, tmp_path / "blurred"))
        assert torch.equal(old.masks, new.masks) == same and torch.equal(old.images, new.images)
    assert call(blur_masks.main, tmp_path, tmp_path / "other")[0] == 2
