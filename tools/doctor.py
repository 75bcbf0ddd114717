"""Read a run, finished or not, and say in plain words what is wrong with it and what to try.

    python -m tools.doctor RUN_DIR [--device auto]

It speaks by docs/texts.yaml; healthy runs of this project stay clear of all its thresholds.
"""

import argparse
import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

from common import SPLITS, UserError, run

import torch

from config import load_config
from data import Split, limit
from evaluate import evaluate, format_places, read_history
from figures import curves
from metrics import dead_places, mean_iou
from model import pick_device, restore_model
from runs import TEXTS, locked
from train import load_data

SAMPLE = 200  # images of a split that are looked at, evenly spaced: seconds on a processor
LOW_IOU = 0.5  # predicting one class of two or more everywhere stays below
TRAINED = SPLITS[:2]  # training and validation, which training sees
Findings = Iterator[tuple[str, dict]]  # the key of a text, and what to fill in


def diagnose(run_dir: Path, config: dict, log: list[dict], device: torch.device) -> Findings:
    """Run all checks on a run, causes before symptoms."""
    try:
        splits = dict(zip(TRAINED, load_data(config), strict=True))
    except UserError as error:
        yield "unreadable", {"error": error}
    else:
        causes = list(check_data(config, log, splits))
        yield from causes or check_checkpoint(run_dir / "best.pt", config, splits, device)
    with contextlib.suppress(UserError), locked(run_dir):  # an error: it is training now
        if len(log) < config["epochs"]:
            yield "stopped", {}
    if log:
        yield from check_epochs(config, log)


def check_data(config: dict, log: list[dict], splits: dict[str, Split]) -> Findings:
    """Find black images, and classes that are absent from the training masks or rare."""
    for name, split in splits.items():
        if limit(split, 0, SAMPLE).images[:, :3].max() <= 1:  # alpha is no colour
            yield "black", {"split": name}
    pixels = splits["training"].masks.flatten().bincount(minlength=256)[: len(config["classes"])]
    absent = ", ".join(c for c, n in zip(config["classes"], pixels, strict=True) if n == 0)
    share = (pixels[1:].sum() / pixels.sum()).item()
    best = max((e["validation"]["mean_iou_foreground"] or 0 for e in log), default=0)
    if absent:
        yield "absent", {"absent": absent}
    elif share < 0.001 and best <= LOW_IOU:  # one image of 128×128 has 16 such pixels
        yield "rare", {"share": share, "best": best}


def check_checkpoint(path: Path, config: dict, splits: dict, device: torch.device) -> Findings:
    """Find swapped channels, else overfitting, else stripes: the best checkpoint, full images."""
    if not path.exists():
        return
    model, _ = restore_model(path, device)
    train, val = (limit(split, 0, SAMPLE) for split in splits.values())
    bgr = val._replace(images=torch.cat([val.images[:, :3].flip(1), val.images[:, 3:]], dim=1))
    found = [evaluate(model, *s[:2], config, torch.float32) for s in (train, val, bgr)]
    places = dead_places(found[1][2], val.masks, list(config["classes"]))
    train, val, swapped = (mean_iou(matrices.sum(dim=0)).item() for matrices, _, _ in found)
    if swapped - val >= 0.05:  # healthy runs: 0.01 at most
        yield "swapped", {"train": train, "val": val, "swapped": swapped}
    elif train - val >= 0.1:  # healthy runs of the quick and full profile: 0.02 at most
        yield "overfitting", {"train": train, "val": val}
    elif places:
        yield "striped", {"striped": format_places([places])}


def check_epochs(config: dict, log: list[dict]) -> Findings:
    """Find dead, poor classes; a loss that jumps, or does not move, or scores still improving."""
    train, val = ([e[split]["loss"] for e in log] for split in TRAINED)
    iou, dead = ([e["validation"][key] for e in log] for key in ("mean_iou", "dead_classes"))
    done, best = len(log), max(iou)
    if dead[-1]:
        since = 1 + max((i for i, d in enumerate(dead, 1) if {*dead[-1]} - {*d}), default=0)
        alive = ", ".join(name for name in config["classes"] if name not in dead[-1])
        yield "dead", {"alive": alive, "dead": ", ".join(dead[-1]), "since": since}
    ious = log[-1]["validation"]["per_class_iou"].items()
    poor = [c for c, value in ious if value is not None and value < 0.05 and c not in dead[-1]]
    if poor:
        yield "poor", {"poor": ", ".join(poor)}
    # The loss of guessing, where all classes are equally likely; that of Dice is at most 1.
    guess = {"cross_entropy": math.log(len(config["classes"]))}
    guess = sum(weight * guess.get(name, 1) for name, weight in config["loss"].items())
    # A rise by less than 5 % of that is noise of a loss that is almost zero.
    bad = [i for i in range(1, done) if train[i] - train[i - 1] > max(train[i - 1] / 2, guess / 20)]
    bad += [done - 1] * (train[-1] > 1.5 * guess)
    steps = log[-1]["images_seen"] // config["batch_size"]  # the quick profile passes 0.7 in 1,000
    hasty = (steps < 500 and best < 0.7) or (config["schedule"] == "constant" and done > 1)
    gain = iou[-1] - max(iou[: 2 * done // 3], default=0)  # of the last third
    if bad:
        i = bad[0]
        yield "unstable", {"train": train[i], "val": val[i], "guess": guess, "epoch": i + 1}
    elif done > 1 and min(train[1:]) >= 0.97 * train[0] and best <= LOW_IOU:
        yield "still", {"first": train[0], "lowest": min(train[1:]), "best": best}
    elif done >= config["epochs"] and gain > 0.03 and hasty:
        yield "short", {"best": best, "steps": steps, "more": 3 * done}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a folder train.py wrote")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps …")
    args = parser.parse_args()
    run_dir, path = args.run_dir, args.run_dir / "metrics.jsonl"
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir}: is no run, has no config.yaml; give a folder train.py wrote")
    log = read_history(path, "train this run again") if path.exists() else []
    config = load_config([run_dir / "config.yaml"])
    found = list(diagnose(run_dir, config, log, pick_device(args.device)))
    said = f"{len(found)} finding(s), causes first" if found else "nothing found wrong"
    drawn = ", curves in doctor.png" if log else ""
    print(f"{run_dir}: {said} (epoch {len(log)} of {config['epochs']}{drawn})")
    rate = config["learning_rate"]  # these and the keys of the config can be filled in any text
    known = config | {"done": len(log), "third": rate / 3, "tenth": rate / 10, "triple": rate * 3}
    for key, values in found:
        text = TEXTS[key].format(**known, **values, fix=TEXTS["dead_class_fix"])
        print("\n" + text.replace("RUN_DIR", str(run_dir)), end="")
    if log:
        panels = {k: {s: [[e[s][k] for e in log]] for s in TRAINED} for k in ("loss", "mean_iou")}
        ious = {c: [[e["validation"]["per_class_iou"][c] for e in log]] for c in config["classes"]}
        curves(run_dir / "doctor.png", panels | {"validation IoU": ious})


if __name__ == "__main__":
    run(main)
