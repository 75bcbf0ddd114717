"""Read a run, finished or not, and say in plain words what is wrong with it and what to try.

    python -m tools.doctor RUN_DIR [--device auto]

Its thresholds are such that healthy runs of this project stay clear of them: a false alarm costs
more trust than a finding brings.
"""

import argparse
import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

from common import SPLITS, UserError, reading, run

import numpy as np
import torch

from config import load_config
from data import Split, limit
from evaluate import evaluate
from figures import curves
from metrics import mean_iou
from model import pick_device, restore_model
from runs import DEAD_CLASS_FIX, locked
from train import load_data

SAMPLE = 200  # images of a split that are looked at, evenly spaced: seconds on a processor
LOW_IOU = 0.5  # predicting one class of two or more everywhere stays below
JUMP = 1.5  # times the training loss of the epoch before, or of guessing
TRAINED = SPLITS[:2]  # training and validation, which training sees
CHECK = "python data.py check --config RUN_DIR/config.yaml --picture look.png"
Findings = Iterator[tuple[str, str, str]]  # title, evidence, what to try; main fills in RUN_DIR


def read_run(run_dir: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Read the config of a run and its E epochs; UserError if a file is damaged, or it is no run.

    Of the epochs "training loss", "validation mean_iou", "images_seen" and so on (E,), NaN where
    there is none; of validation "iou" (E, C), and "dead": classes in the masks, never predicted.
    """
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir}: is no run, has no config.yaml; give a folder train.py wrote")
    config, history, path = load_config([run_dir / "config.yaml"]), {}, run_dir / "metrics.jsonl"
    classes = config["classes"]
    with reading(path, "train this run again"):
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        epochs = [json.loads(line) for line in lines]
        for split in TRAINED:
            for key in ("loss", "mean_iou", "mean_iou_foreground"):
                history[f"{split} {key}"] = np.array([e[split][key] for e in epochs], float)
        history["images_seen"] = np.array([e["images_seen"] for e in epochs], int)
        rows = [e["validation"] for e in epochs]
        iou = np.array([[r["per_class_iou"][c] for c in classes] for r in rows], float)
        dead = np.array([[c in r["dead_classes"] for c in classes] for r in rows], bool)
    # Below 0.01 a class is found in a few stray pixels only: as good as never predicted.
    return config, history | {"iou": iou, "dead": dead | ((iou > 0) & (iou < 0.01))}


def diagnose(run_dir: Path, config: dict, history: dict, device: torch.device) -> Findings:
    """Run all checks on a run and what `read_run` returned, causes before symptoms."""
    try:
        splits = dict(zip(TRAINED, load_data(config), strict=True))
    except UserError as error:
        fix = f"fix the files, or what config.yaml says of them; {CHECK} lists every problem"
        yield "The data cannot be read as config.yaml says", str(error), fix
    else:
        causes = list(check_data(config, history, splits))
        yield from causes or check_checkpoint(run_dir, config, splits, device)
    yield from check_progress(run_dir, config, history)
    yield from check_loss(config, history)


def check_data(config: dict, history: dict, splits: dict[str, Split]) -> Findings:
    """Find black images, and classes that are absent from the training masks or rare."""
    for name, split in splits.items():
        if limit(split, 0, SAMPLE).images[:, :3].max() <= 1:  # alpha is no colour
            fix = "if they were saved as 0…1, multiply by 255 and save them again as uint8"
            yield f"The {name} images are black", "all values are 0 or 1, of 0 to 255", fix
    pixels = torch.bincount(splits["training"].masks.flatten(), minlength=256)
    pixels = pixels[: len(config["classes"])]  # by class, ignored ones left out
    absent = ", ".join(c for c, n in zip(config["classes"], pixels, strict=True) if n == 0)
    share = (pixels[1:].sum() / pixels.sum()).item()
    best = np.nan_to_num(history["validation mean_iou_foreground"]).max(initial=0)
    if absent:
        fix = f"fix `masks` or `classes` ({CHECK}); or limit_groups: 0, limit_images: 0"
        yield f"The training masks have no {absent}", "what no mask has cannot be learnt", fix
    elif share < 0.001 and best <= LOW_IOU:  # one image of 128×128 has 16 such pixels
        fix = "crop: 64, crop_on_objects: 1.0, loss: {cross_entropy: 1, dice_per_class: 1}"
        title = f"Only {share:.3%} of the training pixels are foreground"
        yield title, f"its mean IoU is {best:.3f} at best", fix


def check_checkpoint(run_dir: Path, config: dict, splits: dict, device: torch.device) -> Findings:
    """Find swapped channels, or else overfitting, by the best checkpoint on full images.

    The training score of metrics.jsonl is that of crops, with dropout, of a changing model.
    """
    path = run_dir / "best.pt"
    if not path.exists():
        return
    model, _ = restore_model(path, device)
    train, val = (limit(split, 0, SAMPLE) for split in splits.values())
    order, scores = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[config["in_channels"]], []
    for split in (train, val, val._replace(images=val.images[:, order])):
        matrices, _, _ = evaluate(model, split.images, split.masks, config, torch.float32)
        scores.append(mean_iou(matrices.sum(dim=0)).item())
    train, val, swapped = scores
    evidence = f"mean IoU: training {train:.3f}, validation {val:.3f}, this swapped {swapped:.3f}"
    if swapped - val >= 0.05:  # healthy runs: 0.01 at most
        fix = f"cv2.cvtColor(image, cv2.COLOR_BGR2RGB) for the split that looks wrong ({CHECK})"
        yield "One split has red and blue swapped (BGR instead of RGB)", evidence, fix
    elif train - val >= 0.1:  # healthy runs of the quick and full profile: 0.02 at most
        fix = "more images, of other places and days; horizontal_flip: 0.5, dropout: 0.1"
        yield "The model is much better on its training images (overfitting)", evidence, fix


def check_progress(run_dir: Path, config: dict, history: dict) -> Findings:
    """Find a run that stopped early, and dead classes."""
    done, epochs, rate = len(history["iou"]), config["epochs"], config["learning_rate"]
    with contextlib.suppress(UserError), locked(run_dir):  # an error: it is training now
        if done < epochs:
            fix = f"train.py --resume goes on; learning_rate: {rate / 10:g} if the loss was nan"
            yield f"The run stopped after {done} of {epochs} epochs", "no process trains now", fix
    dead, names = history["dead"], np.array(list(config["classes"]))
    if dead[-1:].any():
        since = 1 + np.flatnonzero([True, *~dead[:, dead[-1]].all(axis=1)]).max()
        alive, listed = names[~dead[-1]], ", ".join(names[dead[-1]])
        title = f"The model predicts only {alive[0]}" if len(alive) == 1 else "Dead classes"
        evidence = f"in the masks, but never predicted since epoch {since} of {done}: {listed}"
        yield title, evidence, f"{DEAD_CLASS_FIX}, crop: 64 with crop_on_objects: 1.0"


def check_loss(config: dict, history: dict) -> Findings:
    """Find a loss that jumps or does not move, or else scores that were still improving."""
    train, val = (history[f"{split} loss"] for split in TRAINED)
    iou, rate = np.nan_to_num(history["validation mean_iou"]), config["learning_rate"]
    done, best = len(iou), iou.max(initial=0)
    # The loss of guessing, where all classes are equally likely; that of Dice is at most 1.
    guess = {"cross_entropy": math.log(len(config["classes"]))}
    guess = sum(weight * guess.get(name, 1) for name, weight in config["loss"].items())
    # A rise by less than 5 % of that is noise of a loss that is almost zero.
    bad = train > [math.inf, *np.maximum(JUMP * train, train + 0.05 * guess)[:-1]]
    bad[-1:] |= train[-1:] > JUMP * guess
    steps = history["images_seen"][-1:].sum() // config["batch_size"]
    few = steps < 500 and best < 0.7  # half of the steps of the quick profile, which passes 0.7
    settled = config["schedule"] == "one_cycle" or done == 1
    gain = iou[-1:].sum() - iou[: 2 * done // 3].max(initial=0)  # of the last third
    if bad.any():
        i = np.flatnonzero(bad)[0]
        evidence = f"training / validation loss {train[i]:.3g} / {val[i]:.3g} in epoch {i + 1}"
        evidence += f"; guessing has {guess:.3g}"
        fix = f"learning_rate: {rate / 3:.2g} or {rate / 10:.2g}, schedule: one_cycle"
        yield f"The learning rate {rate:g} is too high: the loss is unstable", evidence, fix
    elif done > 1 and min(train[1:]) >= 0.97 * train[0] and best <= LOW_IOU:
        evidence = f"{train[0]:.4g} at first, {min(train[1:]):.4g} at best, mean IoU {best:.3f}"
        fix = f"learning_rate: {rate * 3:g} or {rate / 3:g}; or do masks fit their images? {CHECK}"
        yield "The training loss is not moving", evidence, fix
    elif done >= config["epochs"] and gain > 0.03 and (few or not settled):
        evidence = f"mean IoU rose to {best:.3f} in the last third of {steps:,} steps"
        fix = f"epochs: {3 * done}, schedule: one_cycle, or a larger images_per_epoch"
        yield "Too few steps: the model was still improving at the end", evidence, fix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a folder train.py wrote")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps …")
    args = parser.parse_args()
    config, history = read_run(args.run_dir)
    found = list(diagnose(args.run_dir, config, history, pick_device(args.device)))
    done = len(history["iou"])
    said = f"{len(found)} finding(s), causes first" if found else "nothing found wrong"
    drawn = ", curves in doctor.png" if done else ""
    print(f"{args.run_dir}: {said} (epoch {done} of {config['epochs']}{drawn})")
    for title, evidence, fix in found:
        text = f"\n{title}\n  evidence: {evidence}\n  try: {fix}"
        print(text.replace("RUN_DIR", str(args.run_dir)))
    if done:
        panels = {k: {s: [history[f"{s} {k}"]] for s in TRAINED} for k in ("loss", "mean_iou")}
        ious = zip(config["classes"], history["iou"].T[:, None], strict=True)
        curves(args.run_dir / "doctor.png", panels | {"validation IoU": dict(ious)})


if __name__ == "__main__":
    run(main)
