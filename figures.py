"""Pictures of masks, and the figures of the report and the doctor.

matplotlib is imported where a figure is drawn: a script that only needs the pictures, as training
does, does not load it.
"""

import colorsys
import io
import math
from itertools import combinations, cycle, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common import write_atomically
from masks import list_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = [128, 128, 128]  # pixels that are ignored
ALIKE = 32  # colours that differ by less than this in each channel look alike
SIDE = 160  # pixels of a picture in a grid
DPI = 110
LONGEST_CAPTION = 22  # letters that fit over a picture; the end of a name tells most
FAR = 10  # times the distance from the median to the best: runs that are lower become an arrow
SMALLEST_GAP = 0.001  # of mean IoU, which counts as that distance at least

# Colours (Okabe and Ito 2008: the colour-blind can tell them apart), line styles and markers.
LOOKS = [
    ("#E69F00", "-", "o"),
    ("#56B4E9", "--", "s"),
    ("#CC79A7", "-.", "^"),
    ("#000000", ":", "D"),
    ("#009E73", "-", "v"),
    ("#0072B2", "--", "P"),
    ("#D55E00", "-.", "X"),
    ("#999999", ":", "*"),
]

# ---- the colours of classes


def class_colours(config: dict) -> dict[str, list[int]]:
    """Choose the colour of each class in pictures: name → [red, green, blue].

    It is the first colour that the config gives the class. But where two of these look alike, as
    the greys 0, 1 and 2 do, all classes get other colours.
    """
    colours = {name: list_colours(value)[0] for name, value in config["classes"].items()}
    for one, other in combinations(colours.values(), 2):
        difference = max(abs(one[channel] - other[channel]) for channel in range(3))
        if difference < ALIKE:
            return dict(zip(colours, distinct_colours(len(colours)), strict=True))
    return colours


def distinct_colours(number: int) -> list[list[int]]:
    """Make colours that the eye tells apart: black, then bright ones of different hues."""
    colours = [[0, 0, 0]]
    for i in range(number - 1):
        hue = i * 0.618 % 1  # the golden ratio: each hue lies far from those just before it
        red, green, blue = colorsys.hsv_to_rgb(hue, 1, 1)
        colours.append([round(255 * red), round(255 * green), round(255 * blue)])
    return colours


def legend_of(config: dict) -> dict[str, list[int]]:
    """List the colours of masks in pictures by name: the classes, and ignored pixels if any."""
    legend = class_colours(config)
    if config["ignore"]:
        legend["ignored"] = GREY
    return legend


# ---- pictures: (3, H, W) uint8 tensors


def colourise(mask: Tensor, classes: dict[str, list[int]]) -> Tensor:
    """Colour (H, W) class indices: (3, H, W) uint8, grey where they are of no class."""
    palette = torch.tensor([GREY] * 256, dtype=torch.uint8)
    palette[: len(classes)] = torch.tensor(list(classes.values()), dtype=torch.uint8)
    return palette[mask.long()].permute(2, 0, 1)


def highest_near(labels: Tensor, width: int) -> Tensor:
    """Find the highest of (1, H, W) values among the pixels up to `width` away on each axis."""
    side = 2 * width + 1
    rows = F.max_pool2d(labels, (side, 1), stride=1, padding=(width, 0))
    return F.max_pool2d(rows, (1, side), stride=1, padding=(0, width))


def overlay(image: Tensor, mask: Tensor, classes: dict[str, list[int]]) -> Tensor:
    """Draw the contours of classes on a grey version of their image.

    From (channels, H, W) uint8 and (H, W) classes to (3, H, W) uint8. The first class, the
    background, gets no contour. All that is coloured has exactly the colour of its class.
    """
    grey = image[:3].float().mean(dim=0).to(torch.uint8).expand(3, -1, -1)
    width = min(8, max(1, min(mask.shape) // 50))  # of a contour, in pixels
    labels = mask[None].float()
    highest = highest_near(labels, width)[0]
    lowest = -highest_near(-labels, width)[0]
    is_contour = (highest != lowest) & (mask > 0)
    return torch.where(is_contour, colourise(mask, classes), grey)


def write_png(path: Path, picture: Tensor) -> None:
    """Write a (3, H, W) uint8 picture as a PNG."""
    write_image(path, Image.fromarray(picture.permute(1, 2, 0).numpy()))


def write_image(path: Path, image: Image.Image) -> None:
    """Write an image as a PNG, whole or not at all."""
    file = io.BytesIO()
    image.save(file, "PNG")
    write_atomically(path, file.getvalue())


def thumbnail(picture: Tensor) -> Tensor:
    """Shrink a (3, H, W) uint8 picture to the size that a grid shows; small ones stay."""
    scale = min(1, SIDE / max(picture.shape))
    size = [max(1, round(side * scale)) for side in picture.shape[1:]]
    return F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]


# ---- figures


def new_figure(width: float, height: float, columns: int = 1) -> tuple["Figure", np.ndarray]:
    """Make a figure of so many inches and its axes side by side, an array even if there is one."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    with rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        axes = figure.subplots(1, columns, squeeze=False)
    return figure, axes[0]


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as a PNG."""
    file = io.BytesIO()
    figure.savefig(file, facecolor="white")
    write_atomically(path, file.getvalue())


def grid(
    rows: list[list[tuple[str, Tensor]]],
    legend: dict[str, list[int]],
    row_names: tuple[str, ...] = (),
) -> "Figure":
    """Draw rows of (3, H, W) uint8 pictures with their captions, under a legend: name → colour.

    `row_names` stand at the left of the rows.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    # All lengths are inches. Each picture has a box, into which it fits.
    columns = max(len(row) for row in rows)
    shapes = [picture.shape for row in rows for _, picture in row]
    tallest = max(height / width for _, height, width in shapes)
    box_width = SIDE / DPI
    box_height = box_width * min(2, tallest)
    column_width = box_width + 0.07
    row_height = 0.25 + box_height  # with the captions
    names_width = 0.25 if row_names else 0.05
    width = max(4, names_width + columns * column_width)  # few pictures leave room for the legend
    longest = max(len(name) for name in legend)
    name_width = 0.6 + 0.08 * longest  # about, at 8 points
    legend_columns = max(1, min(6, int(width / name_width), len(legend)))
    top = 0.15 + 0.2 * math.ceil(len(legend) / legend_columns)  # the height of the legend
    height = top + len(rows) * row_height + 0.07
    figure = Figure(figsize=(width, height), dpi=DPI)
    # All pictures are drawn in one axes: making axes takes longer than drawing the pictures.
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(height, 0))  # y grows downwards
    ax.axis("off")
    for y, row in enumerate(rows):
        bottom = top + (y + 1) * row_height
        for x, (caption, picture) in enumerate(row):
            centre = names_width + x * column_width + box_width / 2, bottom - box_height / 2
            draw_picture(ax, picture, caption, centre, box_width, box_height)
        if row_names:
            style = {"rotation": 90, "va": "center", "fontsize": 8}
            ax.text(0.05, bottom - box_height / 2, row_names[y], **style)
    handles = []
    for name, colour in legend.items():
        handles.append(Patch(facecolor=np.divide(colour, 255), edgecolor="grey", label=name))
    figure.legend(handles=handles, loc="upper center", ncols=legend_columns, fontsize=8)
    return figure


def draw_picture(
    ax: "Axes",
    picture: Tensor,
    caption: str,
    centre: tuple[float, float],
    box_width: float,
    box_height: float,
) -> None:
    """Draw a (3, H, W) uint8 picture, as large as its box, in axes whose y grows downwards."""
    from matplotlib.patches import Rectangle

    _, rows, columns = picture.shape
    scale = min(box_width / columns, box_height / rows)
    left, right = centre[0] - scale * columns / 2, centre[0] + scale * columns / 2
    top, bottom = centre[1] - scale * rows / 2, centre[1] + scale * rows / 2
    pixels = picture.permute(1, 2, 0).numpy()
    extent = (left, right, bottom, top)
    ax.imshow(pixels, extent=extent, aspect="auto", interpolation="nearest")
    frame = Rectangle((left, top), right - left, bottom - top, fill=False, linewidth=0.8)
    ax.add_patch(frame)  # a white picture has no edge of its own
    style = {"ha": "center", "fontsize": 7, "parse_math": False}
    ax.text(centre[0], top - 0.03, caption[-LONGEST_CAPTION:], **style)


def curves(
    path: Path, panels: dict[str, dict[str, list[list[float | None]]]], epoch: str = "epoch"
) -> None:
    """Draw mean and range by epoch: y axis → line → runs (seeds) → a value for each epoch."""
    figure, axes = new_figure(max(7.5, 3.7 * len(panels)), 3.6, len(panels))
    handles = {}
    for ax, (label, lines) in zip(axes, panels.items(), strict=True):
        for (name, runs), look in zip(lines.items(), cycle(LOOKS), strict=False):
            colour, line_style, marker = look
            # (epochs, runs): None, and epochs that a run lacks, become holes in the line.
            values = np.array(list(zip_longest(*runs)), float)
            epochs = np.arange(1, len(values) + 1)
            mean, low, high = values.mean(axis=1), values.min(axis=1), values.max(axis=1)
            style = {"color": colour, "linestyle": line_style, "marker": marker, "ms": 5}
            handles[name] = ax.plot(epochs, mean, label=name, **style)[0]
            if len(runs) > 1:
                ax.fill_between(epochs, low, high, color=colour, alpha=0.2)
        lowest, highest = ax.dataLim.intervaly
        if "loss" in label and highest > 20 * lowest > 0:
            ax.set_yscale("log")
        ax.set(xlabel=epoch, ylabel=label)
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        ax.grid(alpha=0.3)
    figure.legend(handles=list(handles.values()), loc="outside upper center", ncols=4)
    save(figure, path)


def scatter(
    path: Path, groups: dict[str, list[tuple[float, float]]], x_label: str, y_label: str
) -> None:
    """Draw three groups of points (x, y), the first as crosses: name → points."""
    figure, (ax,) = new_figure(7.5, 4)
    looks = [("#999999", "x", "#999999"), ("#D55E00", "s", "none"), ("#0072B2", "o", "#0072B2")]
    for (name, points), (colour, marker, inside) in zip(groups.items(), looks, strict=True):
        x, y = zip(*points, strict=True)
        style = {"marker": marker, "color": colour, "markerfacecolor": inside, "label": name}
        ax.plot(x, y, linestyle="", ms=7, zorder=3 if marker == "x" else 2, **style)
    ax.set(xlabel=x_label, ylabel=y_label)
    ax.grid(alpha=0.3)
    ax.legend(loc="lower left")
    save(figure, path)


def lowest_shown(scores: list[float]) -> float:
    """Choose the lowest of the scores that is drawn at its place, since more would squeeze all."""
    median = float(np.median(scores))
    return median - FAR * max(max(scores) - median, SMALLEST_GAP)


def ranking(path: Path, scores: dict[str, list[float]], label: str) -> bool:
    """Draw a line for each experiment, the first at the top: its runs as dots, their mean.

    Runs that are far below the others become an arrow with their number, so that the others are
    not squeezed together. Returns whether there is an arrow.
    """
    figure, (ax,) = new_figure(7.5, 0.8 + 0.27 * len(scores))
    every = [value for values in scores.values() for value in values]
    left = lowest_shown(every)
    for y, values in enumerate(scores.values()):
        shown = [value for value in values if value >= left]
        far = len(values) - len(shown)
        ax.plot(shown, [y] * len(shown), "o", color="#0072B2", ms=5, alpha=0.6)
        if far > 0:
            ax.plot([left], [y], "<", color="#0072B2", ms=5)
            ax.annotate(str(far), (left, y), (4, 0), "data", "offset points", va="center", size=8)
        else:
            ax.plot([np.mean(values)], [y], "|", color="black", ms=14, mew=2)
    ax.set(yticks=range(len(scores)), yticklabels=list(scores), xlabel=label)
    ax.set_ylim(len(scores) - 0.5, -0.5)
    ax.grid(alpha=0.3)
    save(figure, path)
    return min(every) < left
