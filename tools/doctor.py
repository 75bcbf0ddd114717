"""Read a run, finished or not, and say in plain words what is wrong with it and what to try.

    python -m tools.doctor RUN_DIR [--device auto]

The thresholds were set so that healthy runs of this project, from three epochs of crops to the full
protocol, stay clear of them: a false alarm costs more trust than a finding brings.
"""

import argparse
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path

from common import UserError, reading, run, write_atomically

import numpy as np
import torch
from matplotlib.figure import Figure

from config import load_config
from data import Split, limit
from evaluate import evaluate
from metrics import mean_iou
from model import pick_device, restore_model
from runs import DEAD_CLASS_FIX, locked
from train import load_data

SAMPLE = 200  # images of a split that are looked at, evenly spaced: seconds on a processor
RARE = 0.001  # share of the pixels: one image of 128×128 has 16 of them
CLEARLY_BETTER = 0.05  # of mean IoU with swapped channels; healthy: 0.01 at most
DEAD_IOU = 0.01  # a class below is found in a few stray pixels only: as good as never predicted
JUMP = 1.5  # times the epoch before; training losses are means over an epoch and calmer than that
SPIKE = 3.0  # times the worse of the epochs beside it; or, in any epoch, times the loss of guessing
NOTABLE = 0.05  # of the loss of guessing: a smaller rise is noise of a loss that is almost zero
STILL = 0.03  # share of its first value that a loss falls by in any epoch that learns
LOW_IOU = 0.5  # predicting one class of two or more everywhere stays below
GAP = 0.1  # of mean IoU on full images; healthy runs of the quick and full profile: 0.02 at most
CLIMB = 0.03  # of mean IoU over the last third of the epochs, and a third of it in the last one
FEW_STEPS = 500  # half of the quick profile's
POOR_IOU = 0.7  # what the quick profile passes within its first 500 steps
CHECK = "python data.py check --config RUN_DIR/config.yaml --picture look.png"
Findings = Iterator[tuple[str, str, str]]  # title, evidence, advice


def read_run(run_dir: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Read config.yaml and metrics.jsonl; UserError if a file is damaged or it is no run.

    Returns:
        The config; and for E epochs "training loss", "validation mean_iou" and so on (E,), NaN
        where there is none, "images_seen" (E,), and of the validation split "iou" (E, C) and
        "dead" (E, C) bool: in the masks, but (almost) never predicted.
    """
    config_path, path, history = run_dir / "config.yaml", run_dir / "metrics.jsonl", {}
    if not config_path.is_file():
        raise UserError(f"{run_dir}: is no run, without config.yaml; give a folder train.py wrote")
    config = load_config([config_path])
    classes = list(config["classes"])
    with reading(path, "train this run again"):
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        epochs = [json.loads(line) for line in lines]
        for split in ("training", "validation"):
            for key in ("loss", "mean_iou", "mean_iou_foreground", "pixel_accuracy"):
                history[f"{split} {key}"] = np.array([e[split][key] for e in epochs], float)
        history["images_seen"] = np.array([e["images_seen"] for e in epochs], int)
        scores = [e["validation"] for e in epochs]
        iou = np.array([[s["per_class_iou"][name] for name in classes] for s in scores], float)
        dead = np.array([[name in s["dead_classes"] for name in classes] for s in scores], bool)
        history["iou"] = iou = iou.reshape(-1, len(classes))
        history["dead"] = dead.reshape(iou.shape) | ((iou > 0) & (iou < DEAD_IOU))
    return config, history


def score_checkpoint(
    run_dir: Path, config: dict, training: Split, validation: Split, device: torch.device
) -> list[float]:
    """Score best.pt, or else last.pt, on full images; NaN if there is neither.

    The training score of metrics.jsonl would not do: it is that of crops, with dropout, of a model
    that changed while it was taken.

    Returns:
        mean IoU on training, on validation, and on validation with red and blue swapped.
    """
    path = run_dir / ("best.pt" if (run_dir / "best.pt").exists() else "last.pt")
    if not path.exists():
        return [math.nan] * 3
    model, checkpoint = restore_model(path, device)
    for key in ("classes", "in_channels"):
        if checkpoint["config"][key] != config[key]:
            raise UserError(f"{path}: was trained with another {key} than config.yaml; train again")
    swap = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[config["in_channels"]]
    training, validation = (limit(split, 0, SAMPLE) for split in (training, validation))
    scores = []
    for split in (training, validation, validation._replace(images=validation.images[:, swap])):
        pixels = split.images, split.masks
        matrices, _, _ = evaluate(model, *pixels, checkpoint["config"], torch.float32)
        scores.append(mean_iou(matrices.sum(dim=0)).item())
    return scores


def check_data(config: dict, history: dict, training: Split, validation: Split) -> Findings:
    """Find black images, and classes that are absent or rare."""
    for name, split in (("training", training), ("validation", validation)):
        colours = limit(split, 0, SAMPLE).images[:, :3]  # alpha is no colour
        if colours.max() <= 1:
            yield (
                f"The {name} images are black: no value is above 1",
                f"all {colours.numel():,} values looked at are 0 or 1; images have 0 to 255",
                "0…1 was probably saved without a factor of 255: multiply, and save them again",
            )
    names, counts = list(config["classes"]), torch.zeros(256, dtype=torch.int64)
    for masks in training.masks.split(64):
        counts += torch.bincount(masks.flatten(), minlength=256)
    shares = (counts / counts[: len(names)].sum()).tolist()[: len(names)]
    absent = ", ".join(name for name, share in zip(names, shares, strict=True) if share == 0)
    learnt = np.nan_to_num(history["validation mean_iou_foreground"]).max(initial=0) > LOW_IOU
    if absent or (sum(shares[1:]) < RARE and not learnt):
        yield (
            f"No training mask has {absent}" if absent else "Nearly all of the masks is background",
            f"foreground is {sum(shares[1:]):.3%} of the training pixels, {names[0]} {shares[0]:.3%}",
            f"see whether the masks are right ({CHECK}): `masks`, `mask_format`, `classes`, "
            "limit_groups: 0, limit_images: 0. For rare classes crop: 64, crop_on_objects: 1.0, "
            "loss: {cross_entropy: 1, dice_per_class: 1}",
        )


def check_classes(config: dict, history: dict) -> Findings:
    """Find dead classes."""
    dead, names = history["dead"], np.array([str(name) for name in config["classes"]])
    if dead[-1:].any():
        others, listed = names[~dead[-1]], ", ".join(names[dead[-1]])
        since = np.flatnonzero([True, *~dead[:, dead[-1]].all(axis=1)]).max() + 1
        accuracy = history["validation pixel_accuracy"][-1]
        yield (
            f"The model predicts only {others[0]}" if len(others) == 1 else f"Dead classes: {listed}",
            f"since epoch {since} of {len(dead)} (almost) never predicted, though in the validation "
            f"masks: {listed}. Pixel accuracy is {accuracy:.3f}",
            f"{DEAD_CLASS_FIX}. For rare classes crop: 64, crop_on_objects: 1.0",
        )


def check_loss(config: dict, history: dict) -> Findings:
    """Find a loss that is not finite, jumps, spikes or is not moving."""
    train, val = (history[f"{split} loss"].tolist() for split in ("training", "validation"))
    rate, normal = config["learning_rate"], load_config([])["learning_rate"]
    # Guessing: all classes are called equally likely at every pixel. Dice is 1 at most.
    guess = {"cross_entropy": math.log(len(config["classes"]))}
    guess = sum(weight * guess.get(name, 1) for name, weight in config["loss"].items())
    notes = []
    for i, (t, v) in enumerate(zip(train, val, strict=True)):
        before = train[i - 1] if i else math.inf
        beside = max(val[i - 1 : i] + val[i + 1 : i + 2]) if i else math.inf
        lowest = min(val[i + 1 :], default=math.inf)  # that it comes down to later
        if not math.isfinite(t + v):
            notes.append(f"epoch {i + 1}: {t} in training, {v} in validation")
        elif t > JUMP * before and t - before > NOTABLE * guess:
            notes.append(f"epoch {i + 1}: jumps from {before:.3g} to {t:.3g} in training")
        elif v > SPIKE * max(guess, lowest) or v - beside > max(NOTABLE * guess, (SPIKE - 1) * beside):
            notes.append(f"epoch {i + 1}: spikes to {v:.3g} in validation")
    if train and train[-1] > JUMP * guess:
        notes.append(f"at the end {train[-1]:.3g} in training, where guessing has {guess:.3g}")
    if notes:
        yield (
            "The learning rate is too high: the loss is unstable",
            f"loss in {'; '.join(notes)}",
            f"learning_rate: {rate / 3:.2g} or {rate / 10:.2g} instead of {rate:g}, and schedule: "
            "one_cycle, which ends with small steps",
        )
    best = np.nan_to_num(history["validation mean_iou"]).max(initial=0)
    if len(train) > 1 and min(train[1:]) >= (1 - STILL) * train[0] and best <= LOW_IOU:
        ...


def main() -> None:
    pass
