"""The figures of the report and the doctor: each function draws what it is given into a PNG.

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; line styles
and markers say the same again for a print in grey.
"""

import io
from pathlib import Path

from common import write_atomically

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from metrics import IGNORE

# model: colour, line style, marker. No colour is one of a class below.
STYLES = {
    "initial": ("#E69F00", "-", "o"),
    "modified": ("#56B4E9", "--", "s"),
    "tuned": ("#CC79A7", "-.", "^"),
    "best": ("#000000", ":", "D"),
}
CLASS_COLOURS = ("#F2F2F2", "#D55E00", "#009E73", "#0072B2", "#F0E442")
IGNORED = "#999999"
DPI = 110


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, np.ndarray]:
    """Make a figure of so many inches and its axes side by side, an array even if there is one."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG."""
    file = io.BytesIO()
    figure.savefig(file, facecolor="white")
    write_atomically(path, file.getvalue())


def style(name: str, i: int) -> tuple[str, str, str]:
    """Pick colour, line style and marker: a model's own, for others the i-th."""
    return STYLES.get(name, list(STYLES.values())[i % len(STYLES)])


def curves(path: Path, panels: dict[str, dict[str, list[list[float | None]]]]) -> None:
    """Draw values by epoch.

    Args:
        panels: label of a y axis → name of a line → runs (seeds) → a value an epoch. The line is
            the mean over the runs, the band reaches from the lowest to the highest. A label that
            ends in "loss" gets a logarithmic axis if it spans a factor of twenty.
    """
    figure, axes = new_figure(max(7.5, 3.7 * len(panels)), 3.6, len(panels))
    handles: dict[str, Line2D] = {}
    for ax, (label, lines) in zip(axes, panels.items(), strict=True):
        for i, (name, runs) in enumerate(lines.items()):
            colour, line, marker = style(name, i)
            values = np.array(runs, float)  # None, no score, becomes NaN: a hole in the line
            epochs = np.arange(1, values.shape[1] + 1)
            look = {"color": colour, "marker": marker, "ms": 5, "label": name}
            handles[name] = ax.plot(epochs, values.mean(axis=0), line, **look)[0]
            ax.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2)
        low, high = ax.dataLim.intervaly
        if "loss" in label and high > 20 * low > 0:
            ax.set_yscale("log")
        ax.set_ylabel(label)
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        ax.grid(alpha=0.3)
    figure.legend(handles=list(handles.values()), loc="outside upper center", ncols=4)
    save(figure, path)


def panels(
    path: Path,
    images: np.ndarray,
    masks: np.ndarray,
    predictions: dict[str, np.ndarray],
    captions: list[dict[str, str]],
    classes: dict[str, list[int]],
) -> None:
    """Draw a row for each image: image, truth, and of each model prediction and wrong pixels.

    Args:
        images: (K, channels, H, W) uint8; masks and each model's predictions: (K, H, W) uint8.
        captions: of each image, the text under a column by its name ("image", or a model's).
        classes: name → colour in the masks, used here only if the classes are too many for ours.
    """
    own = len(classes) > len(CLASS_COLOURS)
    colours = [np.array(c) / 255 for c in classes.values()] if own else CLASS_COLOURS
    palette = np.full((256, 3), to_rgb(IGNORED))
    palette[: len(colours)] = [to_rgb(colour) for colour in colours]
    titles = ["image", "truth"] + [t for name in predictions for t in (name, "errors")]
    rows, side = len(images), 1.25
    figure = Figure(figsize=(side * len(titles), (side + 0.32) * rows + 0.8), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for row, axes in enumerate(figure.subplots(rows, len(titles), squeeze=False)):
        rgb = np.broadcast_to(images[row, :3], (3, *images.shape[2:])).transpose(1, 2, 0)
        pictures, texts = [rgb, palette[masks[row]]], [captions[row]["image"], ""]
        for name, predicted in predictions.items():
            wrong = (predicted[row] != masks[row]) & (masks[row] != IGNORE)
            pictures += [palette[predicted[row]], wrong]
            texts += [captions[row][name], ""]
        for ax, picture, title, text in zip(axes, pictures, titles, texts, strict=True):
            ax.imshow(picture, interpolation="nearest", cmap="binary", vmin=0, vmax=1)
            ax.set_xticks([]), ax.set_yticks([])
            ax.set_xlabel(text, fontsize=7.5, labelpad=2)
            ax.set_title(title if row == 0 else "", fontsize=10)
    legend = [*zip(classes, colours, strict=False), ("wrong pixel (errors)", "black")]
    handles = [Patch(facecolor=colour, edgecolor="grey", label=name) for name, colour in legend]
    columns = min(6, len(handles))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, fontsize=9)
    save(figure, path)


def confusion(path: Path, matrices: dict[str, np.ndarray], classes: list[str]) -> None:
    """Draw a confusion matrix for each model, each row in per cent of the true class's pixels."""
    side = max(2.75, 0.45 * len(classes))
    figure, axes = new_figure(side * len(matrices), side + 0.45, len(matrices))
    for i, (ax, (name, matrix)) in enumerate(zip(axes, matrices.items(), strict=True)):
        share = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        # The root makes the small shares visible, which are the mistakes.
        ax.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0, 100))
        for (y, x), value in np.ndenumerate(share):
            text = f"{value:.2f}" if value < 99.995 else "100"
            ax.text(x, y, text, ha="center", va="center", color="white" if value > 40 else "black")
        ax.set_title(name)
        ax.set_xticks(range(len(classes)), classes, rotation=35, ha="right")
        ax.set_yticks(range(len(classes)), classes if i == 0 else [""] * len(classes))
        ax.set_xlabel("predicted")
    axes[0].set_ylabel("true class (% of its pixels)")
    save(figure, path)


def dots(path: Path, groups: dict[str, dict[str, dict | None]], label: str) -> None:
    """Draw scores as dots, with ± the standard deviation over seeds, on an axis that they fill.

    Args:
        groups: group on the x axis → model → result of `metrics.mean_std`.
        label: of the y axis.
    """
    figure, (ax,) = new_figure(max(7.5, 2.2 * len(groups)), 3.6)
    models = list(next(iter(groups.values())))
    for i, name in enumerate(models):
        colour, _, marker = style(name, i)
        for g, stats in enumerate(groups.values()):
            if stat := stats[name]:
                x = g + (i - (len(models) - 1) / 2) * 0.8 / len(models)
                look = {"color": colour, "marker": marker, "ms": 7, "capsize": 4}
                ax.errorbar(x, stat["mean"], yerr=stat["std"], **look)
                where = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center"}
                ax.annotate(f"{stat['mean']:.3f}", (x, stat["mean"]), fontsize=8, **where)
    ax.margins(y=0.2)
    ax.set_xlim(-0.5, len(groups) - 0.5)
    ax.set_xticks(range(len(groups)), groups)
    ax.set_ylabel(label)
    ax.grid(axis="y", alpha=0.3)
    styles = [(name, style(name, i)) for i, name in enumerate(models)]
    handles = [Line2D([], [], color=c, marker=m, ls="", label=name) for name, (c, _, m) in styles]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(models))
    save(figure, path)


def intervals(path: Path, samples: dict[str, dict], score: float, label: str) -> None:
    """Draw how a score scatters over resampled images, each sampling with its 95 % interval.

    Args:
        samples: name → `values`, `low` and `high`.
        score: on the whole split; label: of the x axis.
    """
    figure, (ax,) = new_figure(9, 3.4)
    colours = ("#0072B2", "#D55E00", "#999999")
    for y, (sample, colour) in enumerate(zip(reversed(samples.values()), colours, strict=False)):
        low, high = sample["low"], sample["high"]
        heights, edges = np.histogram(sample["values"], bins=60)
        top = y + 0.75 * heights / heights.max()
        ax.stairs(top, edges, baseline=y, fill=True, color=colour)
        ax.plot([low, high], [y - 0.09] * 2, color="black", lw=3, solid_capstyle="butt")
        ax.text(high, y - 0.11, f"  {low:.4f} to {high:.4f}", va="center", fontsize=9)
    ax.axvline(score, color="black", lw=1, ls="--")
    ax.set_yticks(np.arange(len(samples)) + 0.3, reversed(samples))
    ax.set_ylim(-0.3, len(samples) - 0.1)
    ax.margins(x=0.12)
    ax.set_xlabel(label)
    interval = Line2D([], [], color="black", lw=3, label="95 % of the samples")
    whole = Line2D([], [], color="black", lw=1, ls="--", label="whole split")
    figure.legend(handles=[interval, whole], loc="outside upper center", ncols=2)
    save(figure, path)


def dead_classes(path: Path, rows: dict[str, list[list[str]]], classes: list[str]) -> None:
    """Draw which classes were dead on validation, a row a run, a cell an epoch.

    Args:
        rows: run → the dead classes of each epoch.
    """
    last = max(map(len, rows.values()))
    figure, (ax,) = new_figure(max(6.0, min(0.75 * last + 2.5, 12)), 0.26 * len(rows) + 1.1)
    counts = np.full((len(rows), last), np.nan)
    for y, epochs in enumerate(rows.values()):
        for x, dead in enumerate(epochs):
            counts[y, x] = len(dead)
            text = " ".join(name[: 3 if last <= 16 else 1] for name in dead)
            ax.text(x + 1, y, text, ha="center", va="center", fontsize=7)
    extent = (0.5, last + 0.5, len(rows) - 0.5, -0.5)
    ax.imshow(counts, cmap="Oranges", vmin=0, vmax=len(classes), aspect="auto", extent=extent)
    separate(ax, len(rows), last)
    ax.set_yticks(range(len(rows)), rows, fontsize=8)
    ax.set_xticks(range(1, last + 1))
    ax.set_xlabel("epoch (a pale cell: no class dead; no cell: the run was shorter)")
    save(figure, path)


def separate(ax: Axes, rows: int, columns: int) -> None:
    """Draw white lines between the cells of an image."""
    ax.set_xticks(np.arange(0.5, columns + 1), minor=True)
    ax.set_yticks(np.arange(-0.5, rows), minor=True)
    ax.grid(which="minor", color="white", lw=1.5)
    ax.tick_params(which="minor", length=0)
