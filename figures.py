"""The numbers behind the report's figures, and the figures.

First what is computed (no drawing), then one function a figure, which draws what it is given into
a PNG. Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; line
styles, markers and hatches say the same again for a print in grey.
"""

import io
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor, nn

from files import write_atomically
from images import IGNORE
from metrics import confusion_matrix

BAND = 2  # pixels: width of the band along a contour that boundary IoU looks at
BATCH = 50  # test images the lab scored
DRAWS = 2000  # of each bootstrap: its 95 % limits then move by a few per cent of their distance

# model: colour, line style, marker, hatch. No colour is one of a class below.
STYLES = {
    "initial": ("#E69F00", "-", "o", ""),
    "modified": ("#56B4E9", "--", "s", "//"),
    "tuned": ("#CC79A7", "-.", "^", ".."),
    "best": ("#000000", ":", "D", "xx"),
}
OTHER = ("#999999", "-", "v", "")
CLASS_COLOURS = ("#F2F2F2", "#D55E00", "#009E73", "#0072B2", "#F0E442")
WRONG = "#000000"
IGNORED = "#999999"
DPI = 110


# ---- what is computed


def frame_matrices(predictions: Tensor, masks: Tensor, num_classes: int) -> np.ndarray:
    """(M, C, C) int64 confusion matrix of each frame; their sum is that of the split.

    Args:
        predictions, masks: (M, H, W) class indices.
    """
    pairs = zip(predictions, masks, strict=True)
    return np.stack([confusion_matrix(p, m, num_classes).numpy() for p, m in pairs])


def mean_iou(matrices: np.ndarray) -> np.ndarray:
    """(...) mean IoU of each of many (..., C, C) matrices, as `metrics.scores` defines it."""
    m = matrices.astype(float)
    tp = np.diagonal(m, axis1=-2, axis2=-1)
    union = m.sum(axis=-1) + m.sum(axis=-2) - tp
    present = union > 0
    return (tp / np.where(present, union, 1)).sum(axis=-1) / present.sum(axis=-1)


def boundary_iou(
    predictions: Tensor, masks: Tensor, num_classes: int, width: int = BAND
) -> tuple[float, list[float | None]]:
    """Boundary IoU (Cheng et al. 2021, arXiv:2103.16562) over a whole split.

    The IoU of the inner bands alone: of a class, the pixels at most `width` away (in rows and
    columns) from one that is not of the class. As in the authors' code, the image border is a
    contour. Pixels are summed over the split before dividing, as for mean IoU.

    Args:
        predictions, masks: (M, H, W) class indices.

    Returns:
        The mean over the classes that have a band, and each class's, None where it has none.
    """
    both, either = torch.zeros(2, num_classes, dtype=torch.int64)
    for predicted, true in zip(predictions.split(64), masks.split(64), strict=True):
        a, b = (_bands(part, num_classes, width) for part in (predicted, true))
        both += (a & b).sum(dim=(0, 2, 3))
        either += (a | b).sum(dim=(0, 2, 3))
    each = [i / u if u else None for i, u in zip(both.tolist(), either.tolist(), strict=True)]
    present = [value for value in each if value is not None]
    return sum(present) / len(present), each


def _bands(mask: Tensor, num_classes: int, width: int) -> Tensor:
    """(N, H, W) class indices to (N, C, H, W) bool: the inner band of each class."""
    inside = torch.stack([mask == c for c in range(num_classes)], dim=1)
    outside = nn.functional.pad((~inside).float(), [width] * 4, value=1.0)
    return inside & nn.functional.max_pool2d(outside, 2 * width + 1, stride=1).bool()


def bootstrap(matrices: np.ndarray, groups: list[str], seed: int = 0) -> dict:
    """How far the mean IoU of one and the same model scatters with the images it is tested on.

    Three samplings, `DRAWS` times each: "whole" draws as many sequences as there are, with
    replacement (Efron 1979), and takes all their frames; frames of a sequence resemble each other,
    so sequences are the independent samples. "batch" draws `BATCH` frames of this very split
    without replacement, as the lab did. "batch of new" draws the sequences first and then `BATCH`
    of their frames: it holds both kinds of chance.

    Args:
        matrices: (M, C, C) confusion matrix of each frame; groups: the M groups (sequences).

    Returns:
        score of the split, number of images and sequences, and of each sampling its sorted
        `values` and the limits `low`, `high` that hold 95 % of them.
    """
    rng = np.random.default_rng(seed)
    sequences, index = np.unique(groups, return_inverse=True)
    per_sequence = np.zeros((len(sequences), *matrices.shape[1:]))
    np.add.at(per_sequence, index, matrices)
    frames = [np.flatnonzero(index == s) for s in range(len(sequences))]
    size = min(BATCH, len(groups))
    drawn: dict[str, list] = {"whole": [], "batch": [], "batch of new": []}
    for _ in range(DRAWS):
        chosen = rng.integers(len(sequences), size=len(sequences))
        new = np.concatenate([frames[s] for s in chosen])
        drawn["whole"].append(per_sequence[chosen].sum(axis=0))
        drawn["batch"].append(matrices[rng.choice(len(groups), size, replace=False)].sum(axis=0))
        few = rng.choice(new, min(size, len(new)), replace=False)
        drawn["batch of new"].append(matrices[few].sum(axis=0))
    result: dict = {
        "score": float(mean_iou(matrices.sum(axis=0))),
        "images": len(groups),
        "sequences": len(sequences),
        "batch_images": size,
        "draws": DRAWS,
        "seed": seed,
    }
    for kind, sums in drawn.items():
        values = np.sort(mean_iou(np.stack(sums)))
        low, high = np.quantile(values, (0.025, 0.975))
        result[kind] = {"low": float(low), "high": float(high), "values": values.tolist()}
    return result


def running_mean(values: list[float], before: list[float] | None = None) -> list[float]:
    """The mean of all values so far, at each: what a metric shows that is never reset.

    Args:
        values: one an epoch.
        before: those of an earlier run whose metric is carried on; none by default.
    """
    start = list(before or [])
    sums = np.cumsum(start + values) / np.arange(1, len(start) + len(values) + 1)
    return sums[len(start) :].tolist()


# ---- how it is drawn


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, np.ndarray]:
    """A figure of so many inches and its axes side by side, an array even if there is one."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    file = io.BytesIO()
    figure.savefig(file, facecolor="white")
    write_atomically(path, file.getvalue())


def _per_epoch(ax: Axes, last: int) -> None:
    ax.set_xlabel("epoch")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlim(0.8, last + 0.2)
    ax.grid(alpha=0.3)


def curves(path: Path, histories: dict[str, list[list[dict]]]) -> None:
    """Training and validation mean IoU and validation loss per epoch, the models overlaid.

    Args:
        histories: model → seed → lines of metrics.jsonl. The line is the mean over the seeds, the
            band reaches from the lowest to the highest.
    """
    figure, axes = _figure(11, 3.6, 3)
    last = max(len(history) for runs in histories.values() for history in runs)
    shown = (
        ("training", "mean_iou", "training mean IoU"),
        ("validation", "mean_iou", "validation mean IoU"),
        ("validation", "loss", "validation loss (each model's own)"),
    )
    axes[1].sharey(axes[0])
    for ax, (split, key, label) in zip(axes, shown, strict=True):
        for name, runs in histories.items():
            colour, line, marker, _ = STYLES.get(name, OTHER)
            style = {"color": colour, "marker": marker, "ms": 5, "label": name}
            values = np.array([[entry[split][key] for entry in history] for history in runs])
            epochs = np.arange(1, values.shape[1] + 1)
            ax.plot(epochs, values.mean(axis=0), line, **style)
            ax.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2)
        ax.set_ylabel(label)
        if key == "loss":
            ax.set_yscale("log")
        _per_epoch(ax, last)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    _save(figure, path)


def panels(
    path: Path,
    images: Tensor,
    masks: Tensor,
    predictions: dict[str, Tensor],
    captions: list[dict[str, str]],
    classes: dict[str, list[int]],
) -> None:
    """A row a frame: image, truth, and of each model its prediction and where that is wrong.

    Args:
        images: (K, channels, H, W) uint8; masks and each model's predictions: (K, H, W).
        captions: of each frame, the text under a column by its name ("image", or a model's).
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
        rgb = images[row, :3].expand(3, -1, -1).permute(1, 2, 0).numpy()
        pictures = [rgb, palette[masks[row].long().numpy()]]
        under = [captions[row]["image"], ""]
        for name, predicted in predictions.items():
            pictures.append(palette[predicted[row].long().numpy()])
            wrong = (predicted[row] != masks[row]) & (masks[row] != IGNORE)
            pictures.append(wrong.numpy())
            under += [captions[row][name], ""]
        for ax, picture, title, text in zip(axes, pictures, titles, under, strict=True):
            shades = {"cmap": "binary", "vmin": 0, "vmax": 1} if picture.ndim == 2 else {}
            ax.imshow(picture, interpolation="nearest", **shades)
            ax.set_xticks([]), ax.set_yticks([])
            ax.set_xlabel(text, fontsize=7.5, labelpad=2)
            if row == 0:
                ax.set_title(title, fontsize=10)
    handles = [
        Patch(facecolor=colour, edgecolor="grey", label=name)
        for name, colour in zip(classes, colours, strict=False)
    ]
    handles.append(Patch(facecolor=WRONG, edgecolor="grey", label="wrong pixel (errors)"))
    columns = min(6, len(handles))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, fontsize=9)
    _save(figure, path)


def confusion(path: Path, matrices: dict[str, np.ndarray], classes: list[str]) -> None:
    """One confusion matrix a model, each row in per cent of the true class's pixels."""
    side = max(2.75, 0.45 * len(classes))
    figure, axes = _figure(side * len(matrices), side + 0.45, len(matrices))
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
    _save(figure, path)


def bars(path: Path, groups: dict[str, dict[str, dict]], label: str) -> None:
    """Grouped bars with their values written on them and ± the standard deviation over seeds.

    Args:
        groups: group on the x axis → bar in it → {"mean", "std" (None if one seed)}, or None.
            The models are either the groups or the bars, and have their colours in both.
        label: of the y axis.
    """
    figure, (ax,) = _figure(max(11, 1.8 * len(groups)), 3.6)
    names = list(next(iter(groups.values())))
    width = 0.84 / len(names)

    def style(i: int, name: str, group: str) -> dict:
        colour, _, _, hatch = STYLES.get(name, STYLES.get(group, OTHER))
        hatch = hatch if name in STYLES else "//" * i
        return {"facecolor": colour, "edgecolor": "white", "hatch": hatch}

    for i, name in enumerate(names):
        for g, (group, values) in enumerate(groups.items()):
            if values[name] is None:
                continue
            x, mean = g + (i - (len(names) - 1) / 2) * width, values[name]["mean"]
            spread = values[name]["std"]
            ax.bar(x, mean, width * 0.94, yerr=spread, ecolor="#666666", **style(i, name, group))
            top = mean + (spread or 0) + 0.012
            ax.text(x, top, f"{mean:.3f}", ha="center", va="bottom", fontsize=8)
    ax.set_xticks(range(len(groups)), groups)
    ax.set_ylabel(label)
    ax.set_ylim(0, 1.1)
    ax.set_yticks(np.linspace(0, 1, 6))
    handles = [Patch(**style(i, name, ""), label=name) for i, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(names))
    _save(figure, path)


def running(path: Path, lines: dict[str, list[float]]) -> None:
    """The true mean IoU per epoch and what a metric that is never reset makes of it.

    Args:
        lines: label → a value an epoch; the first is the true one.
    """
    figure, (ax,) = _figure(8, 3.6)
    styles = ((STYLES["tuned"][0], "-", "^"), ("#000000", "--", "o"), ("#666666", ":", "s"))
    for (label, values), (colour, line, marker) in zip(lines.items(), styles, strict=False):
        ax.plot(range(1, len(values) + 1), values, line, color=colour, marker=marker, label=label)
    ax.set_ylabel("validation mean IoU")
    _per_epoch(ax, max(map(len, lines.values())))
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    _save(figure, path)


def intervals(path: Path, result: dict, model: str) -> None:
    """The scatter of `bootstrap`, each sampling with its 95 % interval."""
    few = f"{result['batch_images']} frames"
    labels = {
        "whole": f"whole split,\n{result['sequences']} sequences redrawn",
        "batch": f"{few} of this split\n(the lab's test)",
        "batch of new": f"{few}\nof redrawn sequences",
    }
    figure, (ax,) = _figure(9, 3.4)
    colours = ("#0072B2", "#D55E00", "#999999")
    for y, (kind, colour) in enumerate(zip(labels, colours, strict=True)):
        values, low, high = (result[kind][key] for key in ("values", "low", "high"))
        heights, edges = np.histogram(values, bins=60)
        base = 2 - y
        ax.stairs(
            base + 0.75 * heights / heights.max(), edges, baseline=base, fill=True, color=colour
        )
        ax.plot([low, high], [base - 0.09] * 2, color="black", lw=3, solid_capstyle="butt")
        ax.text(high, base - 0.11, f"  {low:.4f} to {high:.4f}", va="center", fontsize=9)
    ax.axvline(result["score"], color="black", lw=1, ls="--")
    ax.set_yticks([2.3, 1.3, 0.3], labels.values())
    ax.set_ylim(-0.3, 2.9)
    ax.margins(x=0.12)
    ax.set_xlabel(f"test mean IoU of {model}")
    handles = [
        Line2D([], [], color="black", lw=3, label="95 % of the draws"),
        Line2D([], [], color="black", lw=1, ls="--", label="whole split"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    _save(figure, path)


def dead_classes(path: Path, rows: list[tuple[str, list[list[str]]]], classes: list[str]) -> None:
    """Which classes were dead on validation, a row a run, a cell an epoch.

    Args:
        rows: (run, the dead classes of each epoch).
    """
    last = max(len(epochs) for _, epochs in rows)
    short = {name: name[: 3 if last <= 16 else 1] for name in classes}
    figure, (ax,) = _figure(max(6.0, min(0.75 * last + 2.5, 12)), 0.26 * len(rows) + 1.1)
    counts = np.full((len(rows), last), np.nan)
    for y, (_, epochs) in enumerate(rows):
        for x, dead in enumerate(epochs):
            counts[y, x] = len(dead)
            text = " ".join(short[name] for name in dead)
            ax.text(x + 1, y, text, ha="center", va="center", fontsize=7)
    extent = (0.5, last + 0.5, len(rows) - 0.5, -0.5)
    ax.imshow(counts, cmap="Oranges", vmin=0, vmax=len(classes), aspect="auto", extent=extent)
    ax.set_xticks(np.arange(0.5, last + 1), minor=True)
    ax.set_yticks(np.arange(-0.5, len(rows)), minor=True)
    ax.grid(which="minor", color="white", lw=1.5)
    ax.tick_params(which="minor", length=0)
    ax.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    ax.set_xticks(range(1, last + 1))
    ax.set_xlabel("epoch (a pale cell: no class dead; no cell: the run was shorter)")
    _save(figure, path)
