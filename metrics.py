"""Every score of the project, read from integer confusion matrices; statistics over seeds.

Counts of images add up exactly to those of a split, in any order and batch size. A class that is
neither in the masks nor predicted has no score: NaN or None, and left out of means.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255  # mask value of a pixel that counts neither in losses nor in scores
BOUNDARY = 2  # pixels: width of the band along a contour that boundary IoU looks at
DRAWS = 2000  # of an interval: its limits then move by a few per cent of their distance
T_QUANTILES = {  # 97.5 % quantiles of Student's t distribution by degrees of freedom
    **{1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262},
    **{10: 2.228, 12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980},
}


def confusion_matrices(prediction: Tensor, mask: Tensor, num_classes: int) -> Tensor:
    """Count pixels of (N, H, W) by (true class, predicted class): (N, C, C) int64, no `IGNORE`."""
    # Ignored pixels have a cell of their own; a boolean index or bincount would make a GPU wait.
    cells = num_classes**2
    cell = torch.where(mask == IGNORE, cells, mask.long() * num_classes + prediction).flatten(1)
    counts = torch.zeros(len(mask), cells + 1, dtype=torch.int64, device=mask.device)
    counts.scatter_add_(1, cell, torch.ones_like(cell))
    return counts[:, :-1].view(-1, num_classes, num_classes)


def iou(matrices: Tensor) -> Tensor:
    """Divide true positives by the union: IoU = TP / (TP + FP + FN) (Jaccard 1912).

    From (..., C, C) confusion matrices to (..., C) float64 in [0, 1], or NaN.
    """
    m = matrices.double()
    tp = m.diagonal(dim1=-2, dim2=-1)
    return tp / (m.sum(dim=-1) + m.sum(dim=-2) - tp)


def mean_iou(matrices: Tensor) -> Tensor:
    """Average the IoU over the classes: (..., C, C) to (...) float64, NaN if there is no pixel."""
    return iou(matrices).nanmean(dim=-1)


def scores(matrix: Tensor, classes: list[str]) -> dict:
    """Read every score of a split from its confusion matrix.

    Dice = 2·TP / (2·TP + FP + FN) (Dice 1945) = 2·IoU / (1 + IoU). A class that is in the masks
    and never predicted has IoU 0 and is listed as dead. Scores lie in [0, 1]; None: no pixel.
    """
    m = matrix.detach().cpu().double()
    each = iou(m)
    dice = 2 * each / (1 + each)
    dead = (m.sum(dim=1) > 0) & (m.sum(dim=0) == 0)
    return {
        "pixel_accuracy": number(m.trace() / m.sum()),
        "mean_iou": number(each.nanmean()),
        "mean_iou_foreground": number(each[1:].nanmean()),
        "mean_dice": number(dice.nanmean()),
        "per_class_iou": dict(zip(classes, map(number, each), strict=True)),
        "per_class_dice": dict(zip(classes, map(number, dice), strict=True)),
        "dead_classes": [name for name, is_dead in zip(classes, dead, strict=True) if is_dead],
    }


def dead_places(prediction: Tensor, mask: Tensor, classes: list[str]) -> dict[str, int]:
    """Count at how many of the four places of each 2×2 pixels a class is dead that lives at others.

    A transposed conv of stride 2 computes each place by weights of its own. Where it is the last
    layer, a class can live on, say, every second row alone: its IoU is then 0.5 at most. From
    (N, H, W) classes and masks to class → 1, 2 or 3, for classes with an IoU below 0.05 at so many
    places and above 0.5 at one.
    """
    each = []
    for top, left in ((0, 0), (0, 1), (1, 0), (1, 1)):
        place = (slice(None), slice(top, None, 2), slice(left, None, 2))
        pairs = zip(prediction[place].split(64), mask[place].split(64), strict=True)
        each.append(iou(sum(confusion_matrices(*pair, len(classes)).sum(dim=0) for pair in pairs)))
    ious = torch.stack(each)  # (4, C), NaN where a class is neither in the masks nor predicted
    dead = (ious < 0.05).sum(dim=0) * (ious > 0.5).any(dim=0)
    return {name: n for name, n in zip(classes, dead.tolist(), strict=True) if n}


def number(value: Tensor) -> float | None:
    """Convert a scalar to a float, NaN to None, as JSON has no NaN."""
    return None if value.isnan() else value.item()


def boundary_matrices(prediction: Tensor, mask: Tensor, num_classes: int) -> Tensor:
    """Count the bands that boundary IoU (Cheng et al. 2021, arXiv:2103.16562) compares.

    The band of a class is its pixels at most `BOUNDARY` away (in rows and columns) from one that is
    not of the class. As in the authors' code, the image border is a contour.
    From (N, H, W) as in `confusion_matrices` to (N, C + 1, C + 1) int64; class C is "in no band":
    boundary IoU is `iou(matrices)[..., :-1]`.
    """
    bands = []
    for labels in (prediction.where(mask != IGNORE, IGNORE), mask):
        padded = F.pad(labels[:, None].float(), [BOUNDARY] * 4, value=-1)  # no class has this value
        # −max(−x) is the minimum: where both are the same, the window holds one class alone.
        high, low = (s * F.max_pool2d(s * padded, 2 * BOUNDARY + 1, 1)[:, 0] for s in (1, -1))
        bands.append(labels.masked_fill((high == low) | (labels == IGNORE), num_classes))
    return confusion_matrices(*bands, num_classes + 1)


def interval(matrices: Tensor, size: int | None = None) -> list[float] | None:
    """Estimate between which limits 95 % of the mean IoUs of other images would lie.

    From (M, C, C) confusion matrices of images, or of scenes where images of one are alike. M of
    them are drawn anew with replacement (a bootstrap, Efron 1979), or `size` of them without. None
    if there are too few to tell.
    """
    number, generator = len(matrices), torch.Generator().manual_seed(0)
    if number <= (size or 1):
        return None
    flat, sums = matrices.flatten(1).double(), []
    for _ in range(DRAWS):
        drawn = torch.multinomial(torch.ones(number), size or number, not size, generator=generator)
        sums.append(drawn.bincount(minlength=number).double() @ flat)
    means = mean_iou(torch.stack(sums).unflatten(1, matrices.shape[1:]))
    return means.nan_to_num(0).quantile(torch.tensor([0.025, 0.975]).double()).tolist()


def contributions(matrices: Tensor) -> list[float]:
    """Compute what each scene contributes to the mean IoU of all, by the jackknife.

    From (M, C, C) confusion matrices of scenes to M pseudo-values (Tukey 1958): M times the mean
    IoU of all, less M − 1 times that without the scene. Their mean is nearly the mean IoU, and
    statistics treat them as independent scores. A scene's own mean IoU would not do: a class that
    it lacks and one predicted pixel make it 0.
    """
    total, number = matrices.sum(dim=0), len(matrices)
    without = mean_iou(total - matrices).nan_to_num(0)  # of the only scene: no pixel is left
    return (number * mean_iou(total) - (number - 1) * without).tolist()


def mean_std(values: list[float | None]) -> dict | None:
    """Compute mean and sample standard deviation (None if n = 1); None if a value is missing."""
    if any(value is None for value in values):
        return None
    n, mean = len(values), math.fsum(values) / len(values)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else None
    return {"mean": mean, "std": std, "n": n, "values": values}


def compare(a: dict, b: dict) -> tuple[str, float | None]:
    """Compare the means of two results of `mean_std` by Welch's t test (1947), two-sided, at 95 %.

    Returns "more" or "less" if a lies beyond noise above or below b, else "noise"; and half of the
    95 % interval of their difference. "one seed" and None if n = 1.
    """
    if a["std"] is None or b["std"] is None:
        return "one seed", None
    parts = [stat["std"] ** 2 / stat["n"] for stat in (a, b)]
    # Welch-Satterthwaite; rounded down to a row of the table, which asks for more
    weights = [part**2 / (stat["n"] - 1) for part, stat in zip(parts, (a, b), strict=True)]
    freedom = sum(parts) ** 2 / sum(weights) if sum(weights) else 1
    quantile = T_QUANTILES[max(row for row in T_QUANTILES if row <= max(freedom, 1))]
    margin, difference = quantile * math.sqrt(sum(parts)), a["mean"] - b["mean"]
    if abs(difference) <= margin:
        return "noise", margin
    return "more" if difference > 0 else "less", margin


def fisher(a: int, n: int, b: int, m: int) -> float:
    """Compute the p value of a of n against b of m, by Fisher's exact test (1922), two-sided.

    The share of the ways to deal a + b hits to n and m runs that are as rare as this one or rarer.
    """
    hits = range(max(0, a + b - m), min(n, a + b) + 1)  # that the first n may have
    ways = {x: math.comb(n, x) * math.comb(m, a + b - x) for x in hits}
    return sum(w for w in ways.values() if w <= ways[a]) / math.comb(n + m, a + b)
