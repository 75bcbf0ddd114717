"""Read a run, finished or not, and say in plain words what is wrong with it and what to try.

    python -m tools.doctor RUN_DIR [--device auto]

The thresholds were set so that healthy runs of this project, from three epochs of crops to the full
protocol, stay clear of them: a false alarm costs more trust than a finding brings.
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
from matplotlib.figure import Figure

from config import load_config
from data import Split, limit
from evaluate import evaluate
from metrics import mean_iou
from model import pick_device, restore_model
from runs import DEAD_CLASS_FIX, locked
from train import load_data

SAMPLE = 200  # images of a split that are looked at, evenly spaced: seconds on a processor
LOW_IOU = 0.5  # predicting one class of two or more everywhere stays below
JUMP = 1.5  # times the epoch before; training losses are means over an epoch and calmer than that
SPIKE = 3.0  # times the worse of the epochs beside it; or, in any epoch, times the loss of guessing
NOTABLE = 0.05  # of the loss of guessing: a smaller rise is noise of a loss that is almost zero
CLIMB = 0.03  # of mean IoU over the last third of the epochs, and a third of it in the last one
TRAINED = SPLITS[:2]  # training and validation, which training sees
CHECK = "python data.py check --config RUN_DIR/config.yaml --picture look.png"
Findings = Iterator[tuple[str, str, str]]  # title, evidence, what to try; main fills in RUN_DIR


def read_run(run_dir: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Read config.yaml and metrics.jsonl; UserError if one is damaged or the folder is no run.

    Returns:
        The config; and of E epochs "training loss", "validation mean_iou" and so on (E,), NaN where
        there is none, "images_seen" (E,), and of the validation split "iou" (E, C) and "dead"
        (E, C) bool: which classes are in its masks and (almost) never predicted.
    """
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir}: is no run, has no config.yaml; give a folder train.py wrote")
    config, history, path = load_config([run_dir / "config.yaml"]), {}, run_dir / "metrics.jsonl"
    with reading(path, "train this run again"):
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        epochs = [json.loads(line) for line in lines]
        for split in TRAINED:
            for key in ("loss", "mean_iou", "mean_iou_foreground"):
                history[f"{split} {key}"] = np.array([e[split][key] for e in epochs], float)
        history["images_seen"] = np.array([e["images_seen"] for e in epochs], int)
        rows = [e["validation"] for e in epochs]
        iou = np.array([[r["per_class_iou"][c] for c in config["classes"]] for r in rows], float)
        dead = np.array([[c in r["dead_classes"] for c in config["classes"]] for r in rows], bool)
        # Below 0.01 a class is found in a few stray pixels only: as good as never predicted.
        history |= {"iou": iou, "dead": dead | ((iou > 0) & (iou < 0.01))}
    return config, history


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
        colours = limit(split, 0, SAMPLE).images[:, :3]  # alpha is no colour
        if colours.max() <= 1:
            evidence = f"all {colours.numel():,} values looked at are 0 or 1, of 0 to 255"
            fix = "if they were saved as 0…1, multiply by 255 and save them again as uint8"
            yield f"The {name} images are black", evidence, fix
    counts = torch.bincount(splits["training"].masks.flatten(), minlength=256).tolist()
    counts = dict(zip(config["classes"], counts, strict=False))
    absent = ", ".join(name for name, count in counts.items() if count == 0)
    background, pixels = next(iter(counts)), sum(counts.values())
    share = 1 - counts[background] / pixels
    best = np.nan_to_num(history["validation mean_iou_foreground"]).max(initial=0)
    if absent:
        evidence = f"0 of {pixels:,} pixels; what no mask has cannot be learnt"
        fix = f"fix `masks` or `classes` ({CHECK}); or limit_groups: 0, limit_images: 0"
        yield f"The training masks have no {absent}", evidence, fix
    elif share < 0.001 and best <= LOW_IOU:  # one image of 128×128 has 16 such pixels
        evidence = f"{background} everywhere would be right at {1 - share:.3%} of the pixels"
        fix = "crop: 64, crop_on_objects: 1.0, loss: {cross_entropy: 1, dice_per_class: 1}"
        yield f"Only {share:.3%} of the training pixels are foreground", evidence, fix


def check_checkpoint(run_dir: Path, config: dict, splits: dict, device: torch.device) -> Findings:
    """Find swapped channels, or else overfitting: run best.pt or last.pt on full images.

    The training score of metrics.jsonl would not do: it is that of crops, with dropout, of a model
    that changed while it was taken. UserError if the checkpoint is damaged or of other classes.
    """
    path = run_dir / ("best.pt" if (run_dir / "best.pt").exists() else "last.pt")
    if not path.exists():
        return
    model, checkpoint = restore_model(path, device)
    if any(checkpoint["config"][key] != config[key] for key in ("classes", "in_channels")):
        raise UserError(f"{path}: has other classes or channels than config.yaml; train again")
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
    """Find a loss that is unstable, or not moving, or else scores that were still improving."""
    train, val = (history[f"{split} loss"].tolist() for split in TRAINED)
    train_iou, iou = (np.nan_to_num(history[f"{split} mean_iou"]) for split in TRAINED)
    rate, epochs, best = config["learning_rate"], config["epochs"], iou.max(initial=0)
    # The loss of guessing, where all classes are equally likely; that of Dice is at most 1.
    guess = {"cross_entropy": math.log(len(config["classes"]))}
    guess = sum(weight * guess.get(name, 1) for name, weight in config["loss"].items())
    notes = []
    for i, (t, v) in enumerate(zip(train, val, strict=True)):
        before = train[i - 1] if i else math.inf
        beside = max(val[i - 1 : i] + val[i + 1 : i + 2]) if i else math.inf
        later = min(val[i + 1 :], default=math.inf)  # a first epoch may be bad and come down
        jumps = t > max(JUMP * before, before + NOTABLE * guess)
        spikes = v > min(max(SPIKE * beside, beside + NOTABLE * guess), SPIKE * max(guess, later))
        useless = t > JUMP * guess and i + 1 == len(train)
        if jumps or spikes or useless or not math.isfinite(t + v):
            notes.append(f"{t:.3g} / {v:.3g} in epoch {i + 1}")
    steps = history["images_seen"][-1:].sum() // config["batch_size"]
    # Half of the steps of the quick profile, which passes 0.7 in them.
    few = steps < 500 and max(best, train_iou.max(initial=0)) < 0.7
    early = iou[: len(iou) - math.ceil(len(iou) / 3)]  # all but the last third
    climbing = config["schedule"] == "constant" and len(early) and iou[-1] - early.max() > CLIMB
    rising = iou[-1:].sum() - iou[:-1].max(initial=0) > CLIMB / 3
    if notes:
        evidence = f"loss (training / validation) {', '.join(notes)}; guessing has {guess:.3g}"
        fix = f"learning_rate: {rate / 3:.2g} or {rate / 10:.2g}, schedule: one_cycle"
        yield f"The learning rate {rate:g} is too high: the loss is unstable", evidence, fix
    elif len(train) > 1 and min(train[1:]) >= 0.97 * train[0] and best <= LOW_IOU:
        evidence = f"{train[0]:.4g} at first, {min(train[1:]):.4g} at best, mean IoU {best:.3f}"
        fix = f"learning_rate: {load_config([])['learning_rate']:g}, {rate * 3:g} or {rate / 3:g}"
        fix += f"; look whether masks belong to their images: {CHECK}"
        yield "The training loss is not moving", evidence, fix
    elif len(iou) >= epochs and rising and (few or climbing):
        evidence = f"mean IoU is highest, {best:.3f}, in the last epoch, after {steps:,} steps"
        fix = f"epochs: {3 * epochs}, schedule: one_cycle, or a larger images_per_epoch"
        yield "Too few steps: the model was still improving at the end", evidence, fix


def draw(config: dict, history: dict, path: Path) -> None:
    """Draw loss and mean IoU of both splits, and validation IoU of each class, by epoch."""
    panels = {key: {s: history[f"{s} {key}"] for s in TRAINED} for key in ("loss", "mean_iou")}
    panels["validation IoU"] = dict(zip(config["classes"], history["iou"].T, strict=True))
    figure = Figure(figsize=(14, 4), layout="constrained")
    for ax, (title, lines) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name, values in lines.items():
            ax.plot(range(1, len(values) + 1), values, ".-", label=name)
        ax.set(title=title, xlabel="epoch", yscale="log" if title == "loss" else "linear")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a folder train.py wrote")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps …")
    args = parser.parse_args()
    config, history = read_run(args.run_dir)
    found = list(diagnose(args.run_dir, config, history, pick_device(args.device)))
    done = len(history["iou"])
    said = f"{len(found)} finding(s), causes first" if found else "nothing found wrong"
    curves = ", curves in doctor.png" if done else ""
    print(f"{args.run_dir}: {said} (epoch {done} of {config['epochs']}{curves})")
    for title, evidence, fix in found:
        text = f"\n{title}\n  evidence: {evidence}\n  try: {fix}"
        print(text.replace("RUN_DIR", str(args.run_dir)))
    if done:
        draw(config, history, args.run_dir / "doctor.png")


if __name__ == "__main__":
    run(main)
