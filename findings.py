"""What a sick run looks like in its scores: a function a finding, from plain values to it or None.

A threshold is where a finding starts. Each was set so that healthy runs of this project, from three
epochs of crops to the full protocol, stay clear of it: a false alarm costs more trust than a
finding brings.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import figures
from events import CURES

DEAD_IOU = 0.01  # a class below is found in a few stray pixels only: as good as never predicted
STILL = 0.03  # share of its first value that a loss falls by in any epoch that learns
LOW_IOU = 0.5  # predicting one class of two or more everywhere stays below
JUMP = 1.5  # times the epoch before; training losses are means over an epoch and calmer than that
SPIKE = 3.0  # times the worse of the epochs beside it; or, in any epoch, times the loss of guessing
NOTABLE = 0.05  # of the loss of guessing: a smaller rise is noise of a loss that is almost zero
CLIMB = 0.03  # of mean IoU over the last third of the epochs, and a third of it in the last one
FEW_STEPS = 500  # half of the quick profile's
POOR_IOU = 0.7  # what the quick profile passes within its first 500 steps
# How to see images and masks; doctor.py puts the folder in the place of RUN_DIR.
LOOK = "python data.py check --config RUN_DIR/config.yaml --picture look.png"


class Finding(NamedTuple):
    """Something wrong: what, the numbers that show it, what to try, and the figure of it.

    `draw(path)` writes the PNG; None where nothing was recorded that could be drawn.
    """

    title: str
    evidence: str
    advice: str
    draw: Callable[[Path], None] | None


# ---- the run as a whole


def stopped(history: list[dict], epochs: int, rate: float) -> Finding | None:
    """A run that no process trains and that has fewer epochs than its config asks for.

    Args:
        history: here and below, the lines of metrics.jsonl as train.py writes them. It writes none
            for an epoch whose loss is NaN or infinite.
        epochs, rate: `epochs` and `learning_rate` of the config.
    """
    if len(history) >= epochs:
        return None
    return Finding(
        f"The run stopped after {len(history)} of {epochs} epochs",
        f"metrics.jsonl holds {len(history)} of {epochs} epochs, and no process trains here now.",
        "The last line that the run printed says why. If it was interrupted: the same make again, "
        "or train.py with --resume, goes on where it was. If the loss was nan or inf: "
        f"learning_rate: {rate / 10:g} instead of {rate:g}.",
        partial(_curves, history=history) if history else None,
    )


# ---- how the scores went


def dead_classes(history: list[dict], config: dict) -> Finding | None:
    """Classes that are in the validation masks and, at the last epoch, never predicted.

    Args:
        config: for `classes`, `loss`, `decoder`, `crop_on_objects` and `batch_size`.
    """
    classes = list(config["classes"])
    per_epoch = [_dead(entry["validation"]) for entry in history]
    if not per_epoch or not per_epoch[-1]:
        return None
    dead, last = per_epoch[-1], history[-1]
    since = len(history)
    while since > 1 and set(dead) <= set(per_epoch[since - 2]):
        since -= 1
    scores = last["validation"]["per_class_iou"]
    alive = [name for name in classes if name not in dead and scores[name] is not None]
    names = ", ".join(dead)
    evidence = f"In the validation masks and (almost) never predicted since epoch {since} of "
    evidence += f"{len(history)}: {names}."
    if len(alive) == 1:
        evidence += (
            f" Pixel accuracy is {last['validation']['pixel_accuracy']:.3f} all the same: that is "
            f"the share of {alive[0]}."
        )
    advice = CURES[0].upper() + CURES[1:] + "."
    if config["loss"].get("dice_pooled"):
        advice += " dice_pooled weighs a class by its pixels, so a small one may die unnoticed."
    if config["decoder"][-1][0] == "classes":
        advice += (
            f" The last decoder stage is [classes, {config['decoder'][-1][1]}] here: a ReLU as "
            "wide as there are classes, of which any may stay at zero."
        )
    if config["crop_on_objects"] < 1:
        advice += " For rare classes: crop: 64 with crop_on_objects: 1.0."
    steps = last["images_seen"] // config["batch_size"]
    if steps < FEW_STEPS:
        advice += f" The run had only {steps} steps: a class may also come to life later."
    best = max(history, key=lambda entry: entry["validation"]["mean_iou"])
    if not _dead(best["validation"]):
        advice += f" best.pt is of epoch {best['epoch']}, when no class was dead."
    lines = {
        name + (" (dead)" if name in dead else ""): [
            entry["validation"]["per_class_iou"][name] for entry in history
        ]
        for name in classes
    }
    return Finding(
        f"The model predicts only {alive[0]}" if len(alive) == 1 else f"Dead classes: {names}",
        evidence,
        advice,
        partial(_lines, panels={"validation IoU": lines}),
    )


def learning_rate_too_high(history: list[dict], config: dict, default: float) -> Finding | None:
    """A loss that jumps up, that spikes on validation alone, or that is worse than guessing.

    Args:
        config: for `learning_rate`, `schedule`, `loss` and `classes`.
        default: the learning_rate of configs/default.yaml.
    """
    train, val = ([entry[s]["loss"] for entry in history] for s in ("training", "validation"))
    if not history:
        return None
    guessing = sum(  # the loss of calling all classes equally likely at every pixel; Dice: at most
        weight * (math.log(len(config["classes"])) if name == "cross_entropy" else 1)
        for name, weight in config["loss"].items()
    )
    notable = NOTABLE * guessing
    jumps = [
        i
        for i in range(1, len(train))
        if train[i] > JUMP * train[i - 1] and train[i] - train[i - 1] > notable
    ]
    spikes = {}  # epoch → what the loss is compared with
    for i in set(range(len(val))) - set(jumps):
        near = max(val[i - 1 : i] + val[i + 1 : i + 2]) if i else math.inf
        if val[i] > SPIKE * near and val[i] - near > notable:
            spikes[i] = f"with {near:.3g} beside it"
        elif val[i] > SPIKE * max(guessing, min(val[i + 1 :], default=math.inf)):
            spikes[i] = f"where guessing has {guessing:.3g}, and comes down later"
    evidence = []
    if train[-1] > JUMP * guessing:
        evidence.append(
            f"After epoch {len(train)} the training loss is {train[-1]:.3g}; guessing has "
            f"{guessing:.3g}."
        )
    if jumps:
        i = max(jumps, key=lambda i: train[i] / train[i - 1])
        evidence.append(
            f"The training loss jumps up in {_epochs(jumps)}, at most from {train[i - 1]:.3g} to "
            f"{train[i]:.3g}."
        )
    if spikes:
        i = max(spikes, key=lambda i: val[i])
        evidence.append(
            f"The validation loss spikes in {_epochs(sorted(spikes))}, at most to {val[i]:.3g} "
            f"{spikes[i]}: the weights move faster than the running statistics of batch norm, "
            "which only validation uses."
        )
    if not evidence:
        return None
    rate = config["learning_rate"]
    return Finding(
        "The learning rate is too high",
        " ".join(evidence),
        f"learning_rate: {rate / 3:.2g} or {rate / 10:.2g} instead of {rate:g}"
        + (f", or {default:g}, the default." if rate > 10 * default else ".")
        + (
            " schedule: one_cycle, which ends with small steps."
            if config["schedule"] == "constant"
            else ""
        ),
        partial(_curves, history=history, marked=[i + 1 for i in (*jumps, *spikes)]),
    )


def loss_not_moving(history: list[dict], rate: float, default: float) -> Finding | None:
    """A training loss that stays where it started, at a low score.

    Args:
        rate: the learning_rate; default: that of configs/default.yaml.
    """
    train = [entry["training"]["loss"] for entry in history]
    best = max((entry["validation"]["mean_iou"] for entry in history), default=0)
    if len(train) < 2 or min(train[1:]) < (1 - STILL) * train[0] or best > LOW_IOU:
        return None
    if rate < default / 3:
        advice = f"The learning rate is low: try learning_rate: {default:g}, the default."
    elif rate > 3 * default:
        advice = f"The learning rate is high: try learning_rate: {default:g}, the default."
    else:
        advice = (
            f"Try learning_rate {rate * 3:g} and {rate / 3:g}. If neither moves it, see whether "
            f"masks belong to their images ({LOOK}) and whether "
            "eight images can be learnt at all (--set limit_images=8 batch_size=8); if not, part "
            "of the model may not be trained."
        )
    return Finding(
        "The loss is not moving",
        f"The training loss was {train[0]:.4g} in epoch 1 and never below {min(train[1:]):.4g} in "
        f"{len(train)} epochs; validation mean IoU is {best:.3f} at best. learning_rate is "
        f"{rate:g}.",
        advice,
        partial(_curves, history=history),
    )


def too_few_steps(history: list[dict], config: dict) -> Finding | None:
    """A finished run that was still learning when it ended.

    Args:
        config: for `epochs`, `schedule` and `batch_size`.
    """
    if not history or len(history) < config["epochs"]:
        return None
    train, val = ([entry[s]["mean_iou"] for entry in history] for s in ("training", "validation"))
    steps = history[-1]["images_seen"] // config["batch_size"]
    before = len(val) - math.ceil(len(val) / 3)
    climbed = val[-1] - max(val[:before]) if before else 0
    rising = len(val) < 2 or val[-1] - max(val[:-1]) > CLIMB / 3
    climbing = config["schedule"] == "constant" and rising and climbed > CLIMB
    few = rising and steps < FEW_STEPS and max(val) < POOR_IOU and max(train) < POOR_IOU
    if not (few or climbing):
        return None
    evidence = f"The run had {steps:,} steps and ended at validation mean IoU {val[-1]:.3f}"
    if climbing:
        evidence += f", {climbed:.3f} above its best before the last third of the epochs"
    return Finding(
        "Too few steps: the model was still learning when the run ended",
        evidence + ".",
        f"epochs: {3 * config['epochs']} instead of {config['epochs']}, or a larger "
        "images_per_epoch; schedule: one_cycle gets more out of few steps.",
        partial(_curves, history=history),
    )


def _dead(validation: dict) -> list[str]:
    return [
        name
        for name, iou in validation["per_class_iou"].items()
        if name in validation["dead_classes"] or (iou is not None and 0 < iou < DEAD_IOU)
    ]


def _epochs(indices: list[int]) -> str:
    numbers = ", ".join(str(i + 1) for i in indices)
    return f"epoch{'s' if len(indices) > 1 else ''} {numbers}"


# ---- figures that figures.py has not


def _curves(path: Path, history: list[dict], marked: list[int] | None = None) -> None:
    """Loss and mean IoU of both splits per epoch."""
    panels = {
        label: {s: [entry[s][key] for entry in history] for s in ("training", "validation")}
        for label, key in (("loss", "loss"), ("mean IoU", "mean_iou"))
    }
    _lines(path, panels, marked or [])


def _lines(path: Path, panels: dict[str, dict], marked: list[int] | None = None) -> None:
    """Values per epoch: a panel each label of a y axis, a line each name, epochs of note marked."""
    figure, axes = figures._figure(max(8, 5.5 * len(panels)), 3.6, len(panels))
    styles = [*figures.STYLES.values(), figures.OTHER]
    for ax, (label, lines) in zip(axes, panels.items(), strict=True):
        for i, (name, values) in enumerate(lines.items()):
            colour, line, marker, _ = styles[i % len(styles)]
            values = np.array(values, float)  # None, no score, becomes NaN: a hole in the line
            style = {"color": colour, "marker": marker, "ms": 5 + 3 * i, "fillstyle": "none"}
            ax.plot(np.arange(1, len(values) + 1), values, line, label=name, **style)
        for epoch in marked or []:
            span = ax.axvspan(epoch - 0.3, epoch + 0.3, color="#F0E442", alpha=0.5, zorder=0)
            span.set_label("named in the finding" if epoch == marked[0] else None)
        ax.set_ylabel(label)
        figures._per_epoch(ax, len(values))
        ax.set_xlim(0.5, len(values) + 0.5)  # room for a tick if there is one epoch only
        ax.xaxis.get_major_locator().set_params(min_n_ticks=1)
        if label != "loss":
            ax.set_ylim(-0.03, 1.03)
            continue
        low, high = min(map(min, lines.values())), max(map(max, lines.values()))
        if high > 20 * low > 0:
            ax.set_yscale("log")
        else:
            ax.set_ylim(0, 1.1 * high)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figures._save(figure, path)
