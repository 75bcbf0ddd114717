"""The benchmark compares like with like, and its file holds what it promises. No timing here."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import config_for

from augment import to_float
from bench import TextbookDataset, training_gflop
from data import load_split


def test_both_loops_see_the_same_images(dataset: Path) -> None:
    config = config_for(dataset)
    split, textbook = load_split(config, "training"), TextbookDataset(config)
    assert len(textbook) == len(split.images)
    for i in (0, len(textbook) - 1):
        image, mask = textbook[i]
        torch.testing.assert_close(image, to_float(split.images[i : i + 1])[0])
        assert torch.equal(mask, split.masks[i].long())


def test_training_gflop_is_what_the_layers_come_to(dataset: Path) -> None:
    """By hand: a multiply-add is two operations, backward is twice forward, but for the images."""
    config = config_for(
        dataset, encoder=[[5, 3]], decoder=[["classes", 3]], in_channels=3, skip="pooled"
    )
    height, width = 8, 6
    full, half = height * width, height * width // 4
    per_layer = [(full, 3, 5), (full, 5, 5), (half, 5, 4), (half, 4, 4), (half, 4, 4)]
    forward = [2 * pixels * before * after * 9 for pixels, before, after in per_layer]
    # The gradient with respect to the images themselves is not computed.
    expected = 3 * sum(forward) - forward[0]
    assert training_gflop(config, (height, width)) == pytest.approx(expected / 1e9)


def test_the_file_holds_the_figures_of_each_model(
    dataset: Path, tmp_path: Path, script: Callable
) -> None:
    path = tmp_path / "deep/bench.json"
    options = ["--models", "tuned", "--rounds", 1, "--device", "cpu", "--json", path]
    done = script("bench.py", "--data", dataset, *options)
    assert done.returncode == 0, done.stderr
    [row] = json.loads(path.read_text())
    assert {
        *("name", "images_per_s", "textbook_images_per_s", "ratio", "gflop_per_s"),
        *("share_of_bf16_peak", "data_share"),
    } <= row.keys()
    assert row["name"] == "tuned"
    # One round: its ratio is that of its two rates.
    assert row["ratio"] == pytest.approx(row["images_per_s"] / row["textbook_images_per_s"])
    assert 0 < row["data_share"] < 1
    assert done.stdout.splitlines()[2].startswith("tuned")


def test_too_few_images_are_one_line(dataset: Path, tmp_path: Path, script: Callable) -> None:
    few = tmp_path / "few"
    for split in ("training", "validation", "testing"):
        for folder in ("image", "gt_image"):
            (few / split / folder).mkdir(parents=True)
            for path in sorted((dataset / split / folder).iterdir())[:3]:
                (few / split / folder / path.name).write_bytes(path.read_bytes())
    done = script("bench.py", "--data", few, "--rounds", 1)
    assert done.returncode == 2
    assert done.stderr == f"error: {few}: bench needs 64 training images or more\n"
