"""Read a run, finished or not, and say in plain words what is wrong with it and what to try.

    python -m tools.doctor RUN_DIR [--device auto]

The thresholds were chosen so that no healthy run of this project gets a finding.
"""

import argparse
import math
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from machine import pick_device

import torch
from torch import nn

from checkpoints import restore_model
from common import UserError, run, user_path
from config import read_run_config
from data import Split, limit, load_data
from evaluate import evaluate
from figures import curves
from metrics import lost_positions, mean_iou
from runs import advise_on_classes, is_training, read_history
from table import format_positions

SAMPLE = 200  # images of a split that are looked at, evenly spaced: this takes seconds on a CPU
LOW_IOU = 0.5  # predicting one class everywhere scores less, whatever the number of classes


class Finding(NamedTuple):
    """What is wrong, the numbers that show it, and what to try."""

    title: str
    evidence: str
    advice: str


def diagnose(
    run_dir: Path, config: dict, history: list[dict], device: torch.device
) -> list[Finding]:
    """Run all checks on a run; returns the findings, causes before symptoms.

    `history` are the epochs so far, as metrics.jsonl holds them.
    """
    check = ["python", "data.py", "check", "--config", str(run_dir / "config.yaml")]
    look = shlex.join([*check, "--picture", "look.png"])
    try:
        training, validation = load_data(config)
    except UserError as error:
        title = "The data cannot be used as config.yaml says"
        advice = f"correct the files or config.yaml; {look} lists every problem"
        findings = [Finding(title, str(error), advice)]
    else:
        findings = check_data(config, history, training, validation, look)
        if not findings and (run_dir / "best.pt").exists():
            model, _ = restore_model(run_dir / "best.pt", device)
            findings = check_model(model, config, training, validation, look)
    if len(history) < config["epochs"] and not is_training(run_dir):
        title = f"The run stopped after {len(history)} of {config['epochs']} epochs"
        lower_rate = config["learning_rate"] / 10
        config_path = str(run_dir / "config.yaml")
        again = ["python", "train.py", "--config", config_path, "--run-dir", str(run_dir)]
        lower = ["--overwrite", "--set", f"learning_rate={lower_rate:g}"]
        advice = (
            f"`{shlex.join([*again, '--resume'])}` goes on; if the loss was nan:"
            f" `{shlex.join([*again, *lower])}`"
        )
        findings.append(Finding(title, "no process trains now", advice))
    if history:
        findings += check_progress(config, history, look)
        findings += check_classes(config, history)
    return findings


def check_data(
    config: dict, history: list[dict], training: Split, validation: Split, look: str
) -> list[Finding]:
    """Find black images, and classes that are absent from the training masks or rare in them."""
    findings = []
    for name, split in (("training", training), ("validation", validation)):
        colours = limit(split, images=SAMPLE).images[:, :3]  # without alpha
        if colours.max() <= 1:
            title = f"The {name} images are black"
            evidence = "all values are 0 or 1, on a scale from 0 to 255"
            advice = "if they were saved as 0…1, multiply by 255 and save them again as uint8"
            findings.append(Finding(title, evidence, advice))

    classes = list(config["classes"])
    pixels = training.masks.flatten().bincount(minlength=256)[: len(classes)]
    absent = [name for name, count in zip(classes, pixels.tolist(), strict=True) if count == 0]
    foreground = (pixels[1:].sum() / pixels.sum()).item()
    best = 0.0
    for entry in history:
        best = max(best, entry["validation"]["mean_iou_foreground"] or 0.0)
    if absent:
        title = f"The training masks have no {', '.join(absent)}"
        evidence = "a class that appears in no mask cannot be learnt"
        advice = f"correct `masks` or `classes` ({look}); or limit_groups: 0, limit_images: 0"
        findings.append(Finding(title, evidence, advice))
    elif foreground < 0.001 and best <= LOW_IOU:  # 16 pixels of a 128×128 image
        title = f"Only {foreground:.3%} of the training pixels are foreground"
        evidence = f"the mean IoU of the foreground classes is {best:.3f} at best"
        advice = "crop: 64, crop_on_objects: 1.0, loss: {cross_entropy: 1, dice_per_class: 1}"
        findings.append(Finding(title, evidence, advice))
    return findings


def check_model(
    model: nn.Module, config: dict, training: Split, validation: Split, look: str
) -> list[Finding]:
    """Find swapped colours, else overfitting, else stripes, in what a model predicts."""
    training = limit(training, images=SAMPLE)
    validation = limit(validation, images=SAMPLE)
    images, masks = validation.images, validation.masks
    bgr_images = torch.cat([images[:, :3].flip(1), images[:, 3:]], dim=1)  # alpha stays

    classes = list(config["classes"])
    full = torch.float32
    matrices, _, _ = evaluate(model, training.images, training.masks, len(classes), full)
    train_iou = mean_iou(matrices.sum(dim=0)).item()
    matrices, _, predictions = evaluate(model, images, masks, len(classes), full)
    val_iou = mean_iou(matrices.sum(dim=0)).item()
    matrices, _, _ = evaluate(model, bgr_images, masks, len(classes), full)
    bgr_iou = mean_iou(matrices.sum(dim=0)).item()
    lost = lost_positions(predictions, masks, classes)

    both = f"mean IoU: training {train_iou:.3f}, validation {val_iou:.3f}"
    if bgr_iou - val_iou >= 0.05:  # healthy runs: 0.01 at most
        title = "One split has red and blue swapped (BGR instead of RGB)"
        evidence = f"{both}, validation with red and blue swapped {bgr_iou:.3f}"
        convert = "cv2.cvtColor(image, cv2.COLOR_BGR2RGB)"
        return [Finding(title, evidence, f"{convert} for the split that looks wrong ({look})")]
    if train_iou - val_iou >= 0.1:  # healthy runs of the quick and full profile: 0.02 at most
        title = "The model is much better on its training images (overfitting)"
        advice = "more images, of other places and days; horizontal_flip: 0.5, dropout: 0.1"
        return [Finding(title, both, advice)]
    if lost:
        title = "The predicted masks are striped: the last up-sampling has not learnt every class"
        positions = format_positions(lost)
        evidence = f"IoU almost 0 at some positions of each 4×4 pixels (4/4 is all): {positions}"
        advice = "a last decoder stage wider than `classes`, upsampling_init: bilinear"
        return [Finding(title, evidence, advice)]
    return []


def check_classes(config: dict, history: list[dict]) -> list[Finding]:
    """Find classes that are never predicted, or hardly learnt, at the end of a run."""
    findings = []
    done = len(history)
    last = history[-1]["validation"]
    never = last["dead_classes"]
    advice = advise_on_classes(config)
    if config["crop_on_objects"] < 1:
        advice += ", crop: 64 with crop_on_objects: 1.0"
    if "cross_entropy_per_class" not in config["loss"]:
        advice += ", cross_entropy_per_class: 0.5 in the loss"
    if never:
        predicted = []
        for name, iou in last["per_class_iou"].items():
            if iou is not None and name not in never:  # None: neither in the masks nor predicted
                predicted.append(name)
        since = 1  # the epoch from which on none of them was predicted
        for epoch, entry in enumerate(history, start=1):
            if not set(never).issubset(entry["validation"]["dead_classes"]):
                since = epoch + 1
        title = f"The model predicts only {', '.join(predicted)}"
        missing = ", ".join(never)
        evidence = f"in the masks, but never predicted since epoch {since} of {done}: {missing}"
        findings.append(Finding(title, evidence, advice))

    poor = []
    for name, iou in last["per_class_iou"].items():
        if iou is not None and iou < 0.05 and name not in never:
            poor.append(name)
    if poor:
        title = f"The model has hardly learnt: {', '.join(poor)}"
        evidence = f"IoU below 0.05 on validation at the end of epoch {done}"
        findings.append(Finding(title, evidence, "the same" if never else advice))
    return findings


def check_progress(config: dict, history: list[dict], look: str) -> list[Finding]:
    """Find a loss that jumps, else one that does not move, else scores that are still improving."""
    done = len(history)
    train_losses = [entry["training"]["loss"] for entry in history]
    val_losses = [entry["validation"]["loss"] for entry in history]
    ious = [entry["validation"]["mean_iou"] for entry in history]
    best = max(ious)
    rate = config["learning_rate"]

    guess = loss_of_guessing(config)
    jump = find_jump(train_losses, guess)
    if jump is not None:
        title = f"The learning rate {rate:g} is too high: the loss is unstable"
        losses = f"{train_losses[jump]:.3g} / {val_losses[jump]:.3g}"
        evidence = f"training / validation loss {losses} in epoch {jump + 1}"
        if guess is not None:
            evidence += f"; guessing scores {guess:.3g}"
        advice = f"learning_rate: {rate / 3:.2g} or {rate / 10:.2g}, schedule: one_cycle"
        return [Finding(title, evidence, advice)]

    if done > 1 and min(train_losses[1:]) >= 0.97 * train_losses[0] and best <= LOW_IOU:
        lowest = min(train_losses[1:])
        title = "The training loss is not moving"
        evidence = f"{train_losses[0]:.4g} at first, {lowest:.4g} at best, mean IoU {best:.3f}"
        rates = f"{rate * 3:g} or {rate / 3:g}"
        advice = f"learning_rate: {rates}; or do the masks fit their images? {look}"
        return [Finding(title, evidence, advice)]

    earlier = ious[: 2 * done // 3]
    gain = ious[-1] - max(earlier, default=0)  # of the last third
    steps = history[-1]["images_seen"] // config["batch_size"]
    too_few = steps < 500 and best < 0.7  # the quick profile passes 0.7 in 1,000 steps
    cut_off = config["schedule"] == "constant" and done > 1
    if done >= config["epochs"] and gain > 0.03 and (too_few or cut_off):
        title = "Too few steps: the model was still improving at the end"
        evidence = f"mean IoU rose to {best:.3f} in the last third of {steps:,} steps"
        advice = f"epochs: {3 * done} or a larger images_per_epoch"
        if config["schedule"] != "one_cycle":
            advice += ", schedule: one_cycle"
        return [Finding(title, evidence, advice)]
    return []


def loss_of_guessing(config: dict) -> float | None:
    """Compute the loss of a model that gives all C classes the same probability.

    Cross-entropy is then ln C. The Dice losses are at most 1. None if there is another loss.
    """
    total = 0.0
    for name, weight in config["loss"].items():
        if name in ("cross_entropy", "cross_entropy_per_class"):
            total += weight * math.log(len(config["classes"]))
        elif name in ("dice_pooled", "dice_per_class"):
            total += weight
        else:
            return None
    return total


def find_jump(losses: list[float], guess: float | None) -> int | None:
    """Find the first epoch, counted from 0, whose loss is over 1.5 times the loss before it.

    A rise by less than 5 % of `guess`, the loss of guessing, is noise of a loss that is almost
    zero; if nobody knows that loss, the first loss stands for it. A last loss that is much worse
    than guessing counts as well. None if there is no such epoch.
    """
    scale = abs(losses[0]) if guess is None else guess
    for epoch in range(1, len(losses)):
        rise = losses[epoch] - losses[epoch - 1]
        if rise > abs(losses[epoch - 1]) / 2 and rise > scale / 20:
            return epoch
    if guess is not None and losses[-1] > 1.5 * guess:
        return len(losses) - 1
    return None


def draw_curves(path: Path, classes: list[str], history: list[dict]) -> None:
    """Draw loss and IoU of a run by epoch."""
    panels = {}
    for key in ("loss", "mean_iou"):
        panels[key] = {}
        for split in ("training", "validation"):
            panels[key][split] = [[entry[split][key] for entry in history]]
    panels["validation IoU"] = {}
    for name in classes:
        ious = [entry["validation"]["per_class_iou"][name] for entry in history]
        panels["validation IoU"][name] = [ious]
    curves(path, panels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "run_dir", type=user_path, metavar="RUN_DIR", help="a folder train.py wrote"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps …")
    args = parser.parse_args()
    run_dir = args.run_dir
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir}: is no run, has no config.yaml; give a folder train.py wrote")
    config = read_run_config(run_dir)
    history = []
    if (run_dir / "metrics.jsonl").exists():
        history = read_history(run_dir / "metrics.jsonl", "train this run again")

    findings = diagnose(run_dir, config, history, pick_device(args.device))
    where = f"epoch {len(history)} of {config['epochs']}"
    if history:
        try:
            draw_curves(run_dir / "doctor.png", list(config["classes"]), history)
            where += ", curves in doctor.png"
        except UserError as error:  # a full disk, or a folder of somebody else
            print(f"note: no curves: {error}", file=sys.stderr)
    if not findings:
        print(f"{run_dir}: nothing found wrong ({where})")
        return
    print(f"{run_dir}: {len(findings)} finding(s), causes first ({where})")
    for title, evidence, advice in findings:
        print(f"\n{title}\n  evidence: {evidence}\n  try: {advice}")


if __name__ == "__main__":
    run(main)
