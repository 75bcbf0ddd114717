"""Read a run, finished or not, and say in plain words what is wrong with it and what to try.

    python -m tools.doctor RUN_DIR [--device auto]

Each threshold was set so that healthy runs of this project, from three epochs of crops to the full
protocol, stay clear of it: a false alarm costs more trust than a finding brings.
"""

import argparse
import fcntl
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
from runs import DEAD_CLASS_FIX
from train import load_data

SAMPLE = 200  # images of a split that are looked at, evenly spaced: seconds on a processor
RARE = 0.001  # share of the pixels: one image of 128×128 has 16 of them
CLEARLY_BETTER = 0.05  # of mean IoU with swapped channels; healthy: 0.01 at most
GAP = 0.1  # of mean IoU on full images; healthy runs of the quick and full profile: 0.02 at most
DEAD_IOU = 0.01  # a class below is found in a few stray pixels only: as good as never predicted
STILL = 0.03  # share of its first value that a loss falls by in any epoch that learns
LOW_IOU = 0.5  # predicting one class of two or more everywhere stays below
JUMP = 1.5  # times the epoch before; training losses are means over an epoch and calmer than that
SPIKE = 3.0  # times the worse of the epochs beside it; or, in any epoch, times the loss of guessing
NOTABLE = 0.05  # of the loss of guessing: a smaller rise is noise of a loss that is almost zero
CLIMB = 0.03  # of mean IoU over the last third of the epochs, and a third of it in the last one
FEW_STEPS = 500  # half of the quick profile's
POOR_IOU = 0.7  # what the quick profile passes within its first 500 steps
CHECK = "python data.py check --config RUN_DIR/config.yaml --picture look.png"
Finding = tuple[str, str, str]  # title, evidence, advice


def read_run(run_dir: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Read config.yaml and metrics.jsonl; UserError if it is no run or a file is damaged.

    Returns:
        The config, and of E epochs: "training loss", "validation mean_iou" and so on (E,) float64,
        NaN where there is no score; "steps" so far (E,); of the validation split "iou" (E, C) and
        "dead" (E, C) bool: classes in the masks that are (almost) never predicted.
    """
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir}: is no run (no config.yaml); give a folder that train.py wrote")
    config, history, path = load_config([run_dir / "config.yaml"]), {}, run_dir / "metrics.jsonl"
    with reading(path, "train this run again"):
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        epochs = [json.loads(line) for line in lines]
        for split in ("training", "validation"):
            for key in ("loss", "mean_iou", "mean_iou_foreground", "pixel_accuracy"):
                history[f"{split} {key}"] = np.array([e[split][key] for e in epochs], float)
        history["steps"] = np.array([e["images_seen"] for e in epochs], int) // config["batch_size"]
        rows, shape = [e["validation"] for e in epochs], (len(epochs), len(config["classes"]))
        iou = np.array([[r["per_class_iou"][c] for c in config["classes"]] for r in rows], float)
        dead = np.array([[c in r["dead_classes"] for c in config["classes"]] for r in rows], bool)
        history["iou"], dead = iou.reshape(shape), dead.reshape(shape)
        history["dead"] = dead | ((history["iou"] > 0) & (history["iou"] < DEAD_IOU))
    return config, history


def is_training(run_dir: Path) -> bool:
    """Tell whether a process holds the lock of the run: it trains there now."""
    try:
        with open(run_dir / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # or there is no lock: it never started, or was copied without it
        return isinstance(error, BlockingIOError)
    return False


def diagnose(run_dir: Path, config: dict, history: dict, device: torch.device) -> list[Finding]:
    """Run all checks; returns the findings, causes before symptoms.

    Raises:
        UserError: the checkpoint is damaged, or of other classes or channels than config.yaml.
    """
    scores = [0.0, 0.0, 0.0]
    try:
        splits = load_data(config)
    except UserError as error:
        fix = f"fix the files or the keys of the data in config.yaml; {CHECK} lists every problem"
        causes = [("The data cannot be read as config.yaml says", str(error), fix)]
    else:
        scores = score_checkpoint(run_dir, config, *splits, device)
        causes = [*check_data(config, history, *splits), *check_channels(scores)]
    if len(history["steps"]) < config["epochs"] and not is_training(run_dir):
        causes.append(stopped(config, history))
    symptoms = [*check_classes(config, history), *check_loss(config, history)]
    return causes + symptoms + ([] if causes else [*check_gap(scores, config), *check_steps()])


def score_checkpoint(
    run_dir: Path, config: dict, training: Split, validation: Split, device: torch.device
) -> list[float]:
    """Score best.pt, or else last.pt, on full images; zeros if there is neither.

    The training score of metrics.jsonl would not do: it is that of crops, with dropout, of a model
    that changed while it was taken.

    Returns:
        mean IoU on training, on validation, and on validation with red and blue swapped.
    """
    path = run_dir / ("best.pt" if (run_dir / "best.pt").exists() else "last.pt")
    if not path.exists():
        return [0.0, 0.0, 0.0]
    model, checkpoint = restore_model(path, device)
    for key in ("classes", "in_channels"):
        if checkpoint["config"][key] != config[key]:
            raise UserError(f"{path}: was trained with another {key} than config.yaml; train again")
    swap = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[config["in_channels"]]
    training, validation = (limit(split, 0, SAMPLE) for split in (training, validation))
    scores = []
    for split in (training, validation, validation._replace(images=validation.images[:, swap])):
        matrices, *_ = evaluate(model, split.images, split.masks, checkpoint["config"], torch.float32)
        scores.append(mean_iou(matrices.sum(dim=0)).item())
    return scores
