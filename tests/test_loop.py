"""Tests of the loop in train.py: which images and random numbers a step sees, what is averaged."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import lines, load, train_tiny
from torch import Tensor

import train as script_module
from data import load_split
from losses import weighted_loss
from metrics import confusion_matrices, scores
from model import build_model


def test_last_batch_is_dropped_and_comes_first_in_the_next_epoch(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    original = script_module.get_batch

    def recording(images: Tensor, masks: Tensor, index: Tensor, *rest: object) -> tuple:
        batches.append(index)
        return original(images, masks, index, *rest)

    monkeypatch.setattr(script_module, "get_batch", recording)
    for last_batch in ("drop", "keep"):
        values = {"images_per_epoch": 0, "limit_images": 17, "last_batch": last_batch}
        train_tiny(dataset, tmp_path / last_batch, **values)
    sizes = [len(index) for index in batches]
    # The first of each run tries two images; then two epochs of 17 images in batches of 8.
    assert sizes == [2, 8, 8, 8, 8, 2, 8, 8, 1, 8, 8, 1]
    assert len(torch.cat(batches[1:4])[:17].unique()) == 17
    assert [entry["images_seen"] for entry in lines(tmp_path / "drop")] == [16, 32]
    batches.clear()
    train_tiny(dataset, tmp_path / "few", images_per_epoch=0, limit_images=5, epochs=1)
    assert [len(index) for index in batches] == [2, 5]  # fewer than a batch: kept


def test_every_step_of_every_seed_draws_other_numbers(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []  # of torch's generator, at each step
    original = script_module.get_batch

    def recording(*args: object) -> tuple[Tensor, Tensor]:
        seeds.append(torch.initial_seed())
        return original(*args)

    monkeypatch.setattr(script_module, "get_batch", recording)
    for seed in (0, 1):
        train_tiny(dataset, tmp_path / str(seed), seed=seed)  # two epochs of two steps
    steps = seeds[1:5] + seeds[6:]  # the first of each run tries two images
    assert len(steps) == len(set(steps)) == 8


def test_training_scores_are_of_every_image_once(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, sizes = [], []
    matrix = torch.zeros(4, 4, dtype=torch.int64)

    def recording(logits: Tensor, mask: Tensor, weights: dict) -> Tensor:
        loss = weighted_loss(logits, mask, weights)
        if sizes:  # the first call tries two images
            matrix.add_(confusion_matrices(logits.argmax(dim=1), mask, 4).sum(dim=0))
            logits.data[:, 0] = -1000.0  # as a loss may do: the scores were taken before
        losses.append(loss.item())
        sizes.append(len(mask))
        return loss

    monkeypatch.setattr(script_module, "weighted_loss", recording)
    train_tiny(dataset, tmp_path / "run", images_per_epoch=17, last_batch="keep", epochs=1)
    [entry] = lines(tmp_path / "run")
    assert sizes[1:] == [8, 8, 1]
    assert entry["training"]["loss"] == pytest.approx(np.average(losses[1:], weights=sizes[1:]))
    assert entry["training"]["mean_iou"] == scores(matrix, list("abcd"))["mean_iou"]


def test_validation_loss_is_the_loss_of_the_config(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_tiny(dataset, run, epochs=1, precision="float32", loss="{cross_entropy: 2}")
    best = load(run / "best.pt")
    model = build_model(best["config"]).eval()
    model.load_state_dict(best["model"])
    split = load_split(best["config"], "validation")
    logits = model(split.images / 255)
    loss = 2 * torch.nn.functional.cross_entropy(logits, split.masks.long())
    assert lines(run)[0]["validation"]["loss"] == pytest.approx(loss.item(), abs=1e-4)


def test_best_checkpoint_is_of_the_best_epoch(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ious = iter((0.1, 0.5, 0.1, 0.9, 0.1, 0.6))  # training and validation of three epochs
    original = script_module.scores

    def invented(*args: object) -> dict:
        made = original(*args)
        made["mean_iou"] = next(ious)
        return made

    monkeypatch.setattr(script_module, "scores", invented)
    train_tiny(dataset, tmp_path / "run", epochs=3)
    assert load(tmp_path / "run/best.pt")["epoch"] == 2
