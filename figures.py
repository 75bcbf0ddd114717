"""Pictures of masks, and the figures of runs, report and doctor."""

import io
from collections.abc import Collection
from itertools import cycle, zip_longest
from pathlib import Path

from common import write_atomically

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

GREY = [128, 128, 128]  # pixels that are ignored
SIDE = 160  # pixels of a picture in a grid
STYLES = {  # colour (Okabe and Ito 2008: the colour-blind can tell them apart), line style, marker
    **{"initial": ("#E69F00", "-", "o"), "modified": ("#56B4E9", "--", "s")},
    **{"tuned": ("#CC79A7", "-.", "^"), "best": ("#000000", ":", "D")},
}
OTHERS = [("#009E73", "-", "v"), ("#0072B2", "--", "P"), ("#D55E00", "-.", "X")]
OTHERS += [("#999999", ":", "*"), *STYLES.values()]  # in turn, for names without their own


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, np.ndarray]:
    """Make a figure of so many inches and its axes side by side, an array even if there is one."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    with rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        return figure, figure.subplots(1, columns, squeeze=False)[0]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG."""
    file = io.BytesIO()
    figure.savefig(file, facecolor="white")
    write_atomically(path, file.getvalue())


def colourise(mask: Tensor, classes: dict[str, list[int]]) -> Tensor:
    """Colour (H, W) class indices: (3, H, W) uint8, grey where they are of no class."""
    palette = [*classes.values(), *[GREY] * (256 - len(classes))]
    return torch.tensor(palette, dtype=torch.uint8)[mask.long()].permute(2, 0, 1)


def overlay(image: Tensor, mask: Tensor, classes: dict[str, list[int]]) -> Tensor:
    """Lay (H, W) classes, the first left clear, over (channels, H, W) uint8: (3, H, W) uint8."""
    rgb = image[:3].expand(3, -1, -1)
    return torch.where(mask > 0, rgb // 2 + colourise(mask, classes) // 2, rgb)


def thumbnail(picture: Tensor) -> Tensor:
    """Shrink a (3, H, W) uint8 picture to the size that a grid shows; small ones stay."""
    scale = min(1, SIDE / max(picture.shape))
    size = [max(1, round(side * scale)) for side in picture.shape[1:]]
    return F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]


def legend_of(config: dict) -> dict[str, list[int]]:
    """List the colours of masks in pictures by name: the classes, and ignored pixels if any."""
    return config["classes"] | ({"ignored": GREY} if config["ignore"] else {})


def grid(rows: list[list[tuple[str, Tensor]]], legend: dict[str, list[int]]) -> Figure:
    """Draw rows of (3, H, W) uint8 pictures with their captions, under a legend: name → colour."""
    columns, inches = max(map(len, rows)), SIDE / 110
    high = min(2, max(picture.shape[1] / picture.shape[2] for row in rows for _, picture in row))
    height = 0.6 + len(rows) * (inches * high + 0.25)
    figure = Figure(figsize=(max(4, inches * columns), height), dpi=110)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - 0.6 / height, wspace=0.05)
    bare = {"frame_on": False, "xticks": [], "yticks": []}
    axes = figure.subplots(len(rows), columns, squeeze=False, subplot_kw=bare)
    for y, row in enumerate(rows):
        for ax, (caption, picture) in zip(axes[y], row, strict=False):
            ax.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            ax.set(frame_on=True)  # a white picture has no edge of its own
            ax.set_title(caption[-25:], fontsize=7, pad=2, parse_math=False)
    handles = [Patch(fc=np.divide(c, 255), ec="grey", label=name) for name, c in legend.items()]
    figure.legend(handles=handles, loc="upper center", ncols=min(6, len(handles)), fontsize=8)
    return figure


def looks_of(names: Collection[str]) -> dict[str, tuple[str, str, str]]:
    """Choose colour, line style and marker of each name: its own, or those that no other has."""
    own = {name: STYLES[name] for name in names if name in STYLES}
    free = cycle([look for look in OTHERS if look not in own.values()])
    return {name: own.get(name) or next(free) for name in names}


def curves(
    path: Path, panels: dict[str, dict[str, list[list[float | None]]]], epoch: str = "epoch"
) -> None:
    """Draw mean and range by epoch: y axis → line → runs (seeds) → a value an epoch."""
    figure, axes = new_figure(max(7.5, 3.7 * len(panels)), 3.6, len(panels))
    handles = {}
    for ax, (label, lines) in zip(axes, panels.items(), strict=True):
        looks = looks_of(lines)
        for name, runs in lines.items():
            colour, line, marker = looks[name]
            values = np.array(list(zip_longest(*runs)), float)  # None becomes a hole in the line
            epochs, look = range(1, len(values) + 1), {"marker": marker, "ms": 5, "label": name}
            [handles[name]] = ax.plot(epochs, values.mean(axis=1), line, color=colour, **look)
            ax.fill_between(epochs, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.2)
        low, high = ax.dataLim.intervaly
        if "loss" in label and high > 20 * low > 0:
            ax.set_yscale("log")
        ax.set(xlabel=epoch, ylabel=label)
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        ax.grid(alpha=0.3)
    figure.legend(handles=list(handles.values()), loc="outside upper center", ncols=4)
    save(figure, path)


def confusion(path: Path, matrices: dict[str, np.ndarray], classes: list[str]) -> None:
    """Draw a confusion matrix for each model, each row in per cent of the true class's pixels."""
    side = max(2.75, 0.45 * len(classes))
    figure, axes = new_figure(side * len(matrices), side + 0.45, len(matrices))
    for ax, (name, matrix) in zip(axes, matrices.items(), strict=True):
        share = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        ax.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0, 100))  # mistakes stay visible
        for (y, x), value in np.ndenumerate(share):
            text = f"{value:.2f}" if value < 99.995 else "100"
            ax.text(x, y, text, ha="center", va="center", color="white" if value > 40 else "black")
        ax.set(title=name, xlabel="predicted", yticks=[])
        ax.set_xticks(range(len(classes)), classes, rotation=35, ha="right")
    label = "true class (% of its pixels)"
    axes[0].set(yticks=range(len(classes)), yticklabels=classes, ylabel=label)
    save(figure, path)


def dots(path: Path, models: dict[str, list[dict[str, float | None]]]) -> None:
    """Draw test scores, the mean ± standard deviation of: model → runs (seeds) → name → score."""
    groups = list(next(iter(models.values()))[0])
    figure, (ax,) = new_figure(max(7.5, 1.7 * len(groups)), 3.6)
    looks = looks_of(models)
    for i, (name, runs) in enumerate(models.items()):
        values = np.array([list(run.values()) for run in runs], float)  # None, no score: no dot
        std = values.std(axis=0, ddof=1) if len(runs) > 1 else None
        x = np.arange(len(groups)) + (i - (len(models) - 1) / 2) * 0.8 / len(models)
        colour, _, marker = looks[name]
        ax.errorbar(x, values.mean(0), std, fmt=marker, color=colour, ms=6, capsize=4, label=name)
    ax.set(xticks=range(len(groups)), xticklabels=groups, ylabel="test score")
    ax.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(models))
    save(figure, path)
