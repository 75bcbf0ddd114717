"""What is wrong with the data, or with what a checkpoint makes of it; see findings.py.

One function a finding, from plain values to a finding or None.
"""

from functools import partial
from pathlib import Path

import numpy as np

import figures
from findings import LOOK, LOW_IOU, Finding

RARE = 0.001  # share of the pixels: one image of 128×128 has 16 of them
CLEARLY_BETTER = 0.05  # of mean IoU, exchanged channels over those there are; healthy: 0.01 at most
SWAPPED = 0.5  # share of a class's pixels that are given to the other one: more than to itself
GAP = 0.1  # of mean IoU on whole frames; healthy runs of the quick and full profile: 0.02 at most


# ---- the data


def dark_images(split: str, values: list[int]) -> Finding | None:
    """Images of 0…1 that were saved without being scaled to 0…255.

    Args:
        values: how many pixels have the values 0 to 255, over the colour channels.
    """
    if not any(values[:2]) or any(values[2:]):
        return None
    return Finding(
        f"The {split} images are black: no value is above 1",
        f"Of the {sum(values):,} values looked at, {values[1]:,} are 1 and all others 0; images "
        "have 0 to 255.",
        "They were probably saved as numbers from 0 to 1: multiply by 255 before they are "
        "converted to uint8, and write the files anew.",
        partial(_histogram, values=values, label=f"share of the {split} images' values"),
    )


def empty_masks(pixels: dict[str, int], limited: bool) -> Finding | None:
    """Classes that no training mask shows.

    Args:
        pixels: class → its pixels in the training masks; the first is the background.
        limited: limit_groups or limit_images is set.
    """
    absent = [name for name, count in pixels.items() if count == 0]
    background, *foreground = pixels
    if not absent:
        return None
    nothing = set(foreground) <= set(absent)
    names = ", ".join(absent)
    return Finding(
        f"The training masks show nothing but {background}"
        if nothing
        else f"In no training mask: {names}",
        f"Not one of {sum(pixels.values()):,} pixels is {names}; what no mask shows cannot be "
        "learnt.",
        f"Look at masks over their images: {LOOK}. Check `masks` "
        "(the right folder?), `mask_format` and the values or colours under `classes`; remove a "
        "class that the data does not have."
        + (" limit_groups and limit_images may leave it out: set them to 0." if limited else ""),
        partial(_shares, pixels=pixels),
    )


def rare_foreground(pixels: dict[str, int], mean_iou: float | None) -> Finding | None:
    """Foreground so rare that predicting background everywhere is the easy way out.

    Args:
        pixels: class → its pixels in the training masks; the first is the background.
        mean_iou: the best of the foreground on validation; None: not known.
    """
    background, *foreground = pixels
    share = sum(pixels[name] for name in foreground) / max(sum(pixels.values()), 1)
    if not 0 < share < RARE or (mean_iou or 0) > LOW_IOU:
        return None
    return Finding(
        f"Only {100 * share:.3f} % of the training pixels are foreground",
        f"A model that predicts {background} everywhere is right at {100 * (1 - share):.3f} % of "
        "the pixels" + (f"; mean IoU of the foreground is {mean_iou:.3f}." if mean_iou else "."),
        "crop: 64 with crop_on_objects: 1.0 shows objects in every crop; loss: {cross_entropy: 1, "
        "dice_per_class: 1} weighs every class alike.",
        partial(_shares, pixels=pixels),
    )


# ---- what the checkpoint does with the data


def channel_order(as_is: dict, exchanged: dict, swapped: Finding | None) -> Finding | None:
    """Validation images that are better recognised with red and blue exchanged.

    Args:
        as_is: `metrics.scores` on the validation images; exchanged: on the same with red and blue
            exchanged.
        swapped: what `swapped_masks` found. Where colour decides the class, exchanged masks look
            the same as exchanged images, and only eyes can tell.
    """
    gain = exchanged["mean_iou"] - as_is["mean_iou"]
    if gain < CLEARLY_BETTER:
        return None
    groups = {
        name: {
            "as they are": _bar(iou),
            "red and blue exchanged": _bar(exchanged["per_class_iou"][name]),
        }
        for name, iou in as_is["per_class_iou"].items()
    }
    return Finding(
        f"One split has red and blue exchanged{' in its images or its masks' if swapped else ''} "
        "(BGR instead of RGB)",
        f"With red and blue of the validation images exchanged, mean IoU is "
        f"{exchanged['mean_iou']:.3f}; as they are it is {as_is['mean_iou']:.3f}."
        + (f" {swapped.evidence}" if swapped else ""),
        "The files of training or of validation were written as BGR: OpenCV reads and writes BGR, "
        f"everything else RGB. See which look wrong ({LOOK}), "
        "convert them with cv2.cvtColor(image, cv2.COLOR_BGR2RGB) and write them anew.",
        partial(figures.bars, groups=groups, label="validation IoU"),
    )


def swapped_masks(
    training: np.ndarray, validation: np.ndarray, classes: list[str]
) -> Finding | None:
    """Two classes of which one split's masks have exchanged the colours.

    Args:
        training, validation: (C, C) confusion matrices; row = true class, column = predicted.
        classes: the C names.

    Returns:
        A finding or None.
    """
    t, v = (m / np.maximum(m.sum(axis=1, keepdims=True), 1) for m in (training, validation))
    for a in range(len(classes)):
        for b in range(a):
            crossed = min(v[a, b], v[b, a])
            if crossed > SWAPPED and min(t[a, a], t[b, b]) > SWAPPED:
                return Finding(
                    f"{classes[b]} and {classes[a]} are exchanged in the masks of one split",
                    f"In training {classes[b]} and {classes[a]} are recognised ("
                    f"{t[b, b]:.0%} and {t[a, a]:.0%} of their pixels), in validation each is "
                    f"taken for the other ({v[b, a]:.0%} and {v[a, b]:.0%}).",
                    "The masks of training or of validation were written with these two colours "
                    "(or indices) exchanged; for red and blue that is BGR. See which "
                    f"({LOOK}) and write them anew.",
                    partial(
                        figures.confusion,
                        matrices={"training": training, "validation": validation},
                        classes=classes,
                    ),
                )
    return None


def gap(training: dict, validation: dict, images: int, config: dict) -> Finding | None:
    """Overfitting: the same checkpoint, on whole frames without augmentation, of both splits.

    The training score of metrics.jsonl would not do: it is that of crops, with dropout, of a model
    that changed while it was taken.

    Args:
        training, validation: `metrics.scores`; images: how many there are to train on.
        config: for the keys that work against overfitting.
    """
    difference = training["mean_iou"] - validation["mean_iou"]
    if difference < GAP:
        return None
    keys = ("horizontal_flip", "vertical_flip", "crop", "blur", "jitter", "dropout")
    off = [key for key in keys if not config[key]]
    groups = {
        name: {"training": _bar(iou), "validation": _bar(validation["per_class_iou"][name])}
        for name, iou in training["per_class_iou"].items()
    }
    return Finding(
        "The model does much better on the images it was trained on (overfitting)",
        f"Mean IoU is {training['mean_iou']:.3f} on training and {validation['mean_iou']:.3f} on "
        f"validation images: a gap of {difference:.3f}. It was trained on {images:,} images.",
        "More data, from more places and days, helps most. "
        + (f"Augmentation and regularisation that are off: {', '.join(off)}. " if off else "")
        + "If there is enough of both, see whether the validation images are of another kind.",
        partial(figures.bars, groups=groups, label="IoU of the checkpoint"),
    )


# ---- figures that figures.py has not


def _bar(value: float | None) -> dict | None:
    return None if value is None else {"mean": value, "std": None}


def _shares(path: Path, pixels: dict[str, int]) -> None:
    """The share of each class in the pixels of the training masks."""
    figure, (ax,) = figures._figure(6, 3.4)
    total = max(sum(pixels.values()), 1)
    for i, count in enumerate(pixels.values()):
        ax.bar(i, 100 * count / total, color="#56B4E9")
        ax.text(i, 100 * count / total, f"{100 * count / total:.4g} %", ha="center", va="bottom")
    ax.set_xticks(range(len(pixels)), pixels)
    ax.set_yscale("symlog", linthresh=0.01)
    ax.set_ylim(0, 300)
    ax.set_ylabel("share of the training masks' pixels (%)")
    figures._save(figure, path)


def _histogram(path: Path, values: list[int], label: str) -> None:
    """How often the pixel values 0 to 255 occur."""
    figure, (ax,) = figures._figure(6, 3.4)
    ax.bar(range(256), 100 * np.array(values) / sum(values), width=1.5, color="#0072B2")
    ax.set_xlabel("pixel value")
    ax.set_xlim(-3, 258)
    ax.set_ylabel(label + " (%)")
    figures._save(figure, path)
