"""Compute every score of the project from integer confusion matrices, and statistics over seeds.

The counts of images add up exactly to the counts of a split, in any order and batch size. A class
that is neither in the masks nor predicted has no score: NaN or None, which means leave out.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255  # mask value of a pixel that counts neither in losses nor in scores
OUTSIDE = 254  # value of pixels beyond the border of a mask; no class has it
BOUNDARY = 2  # pixels: width of the band along a contour that boundary IoU looks at
DRAWS = 2000  # resamples of an interval
BLOCK = 100  # resamples that are drawn at once, so that memory stays small for many images
MIN_GROUPS = 5  # fewer groups of images tell too little about other images
ANGLES = 20_000  # steps in which the t distribution is added up: four digits are right
ROUNDING = 1e-12  # a smaller difference of means may come from adding in another order
CHUNK = 2**20  # pixels that are counted at once, so that memory stays small for large images
SIDE = 4  # of the blocks in which lost positions are looked for: two up-samplings, each by two
LEAST_PIXELS = 10  # of a class at a position; fewer may be missed there by chance


class Comparison(NamedTuple):
    """Hold what `welch` finds out about the means of two lists of scores."""

    verdict: str  # "more" or "less" (a against b), "noise", or "one seed"
    difference: float  # mean of a minus mean of b
    margin: float | None  # half the 95 % interval of the difference; None for one seed


# ---- counting


def confusion_matrices(prediction: Tensor, mask: Tensor, num_classes: int) -> Tensor:
    """Count the pixels of each image by true class (rows) and predicted class (columns).

    From (N, H, W) predicted classes and (N, H, W) true classes to (N, C, C) int64. Pixels whose
    mask value is `IGNORE` are not counted.
    """
    # Ignored pixels get a cell of their own, behind all others. Removing them with a boolean index,
    # or counting with bincount, would make a GPU wait.
    n_cells = num_classes**2
    cell_of_pixel = mask.long() * num_classes + prediction  # row: true class, column: predicted
    cell_of_pixel = torch.where(mask == IGNORE, n_cells, cell_of_pixel).flatten(1)
    counts = torch.zeros(len(mask), n_cells + 1, dtype=torch.int64, device=mask.device)
    counts.scatter_add_(1, cell_of_pixel, torch.ones_like(cell_of_pixel))
    return counts[:, :n_cells].view(-1, num_classes, num_classes)


def chunks(prediction: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (N, H, W) predictions and masks a few images at a time, about `CHUNK` pixels."""
    height, width = mask.shape[1:]
    images = max(1, CHUNK // (height * width))
    yield from zip(prediction.split(images), mask.split(images), strict=True)


# ---- scores


def iou(matrices: Tensor) -> Tensor:
    """Divide overlap by union: IoU = TP / (TP + FP + FN) (Jaccard 1912).

    From (..., C, C) confusion matrices to (..., C) float64 in [0, 1], or NaN.
    """
    counts = matrices.double()
    right = counts.diagonal(dim1=-2, dim2=-1)
    true = counts.sum(dim=-1)
    predicted = counts.sum(dim=-2)
    return right / (true + predicted - right)


def mean_iou(matrices: Tensor) -> Tensor:
    """Average the IoU over the classes: (..., C, C) to (...) float64, NaN if there is no pixel."""
    return iou(matrices).nanmean(dim=-1)


def number(value: Tensor) -> float | None:
    """Convert a scalar to a float, and NaN to None, because JSON has no NaN."""
    return None if value.isnan() else value.item()


def scores(matrix: Tensor, classes: list[str]) -> dict:
    """Compute every score of a split from its (C, C) confusion matrix.

    Dice = 2·TP / (2·TP + FP + FN) (Dice 1945) = 2·IoU / (1 + IoU). All scores lie in [0, 1], or are
    None where no class has a score. `dead_classes` lists the classes that are in the masks but
    never predicted; their IoU is 0.
    """
    matrix = matrix.detach().cpu()
    class_ious = iou(matrix)
    class_dices = 2 * class_ious / (1 + class_ious)
    accuracy = matrix.double().trace() / matrix.double().sum()
    true = matrix.sum(dim=1)
    predicted = matrix.sum(dim=0)

    per_class_iou = {}
    never_predicted = []
    for index, name in enumerate(classes):
        per_class_iou[name] = number(class_ious[index])
        if true[index] > 0 and predicted[index] == 0:
            never_predicted.append(name)
    return {
        "pixel_accuracy": number(accuracy),
        "mean_iou": number(class_ious.nanmean()),
        "mean_iou_foreground": number(class_ious[1:].nanmean()),
        "mean_dice": number(class_dices.nanmean()),
        "per_class_iou": per_class_iou,
        "dead_classes": never_predicted,
    }


def lost_positions(prediction: Tensor, mask: Tensor, classes: list[str]) -> dict[str, float]:
    """Count at how many of the 16 positions of 4×4 pixels each class is lost, in units of four.

    A transposed convolution of stride 2 computes each of the four positions of 2×2 pixels with
    weights of its own. If it is the last layer, a class may be predicted only in every second row,
    say: the mask is striped and the IoU of the class is 0.5 at most. Together with the up-sampling
    before, there are 16 positions. A class lost at four of them, such as one of 2×2, counts as 1.

    From (N, H, W) predicted and true classes to class → 0.25 to 3.75. A position is lost if
    the IoU is below 0.05 there, and above 0.5 at another one. Classes of few pixels, see
    `LEAST_PIXELS`, are left out.
    """
    corners = [(top, left) for top in range(SIDE) for left in range(SIDE)]
    matrices = torch.zeros(len(corners), len(classes), len(classes), dtype=torch.int64)
    for predicted, true in chunks(prediction, mask):
        for index, (top, left) in enumerate(corners):
            predicted_here = predicted[:, top::SIDE, left::SIDE]
            true_here = true[:, top::SIDE, left::SIDE]
            counts = confusion_matrices(predicted_here, true_here, len(classes))
            matrices[index] += counts.sum(dim=0).cpu()
    ious = iou(matrices)  # (16, C), NaN where a class is neither in the masks nor predicted
    n_lost = (ious < 0.05).sum(dim=0).tolist()
    is_predicted = (ious > 0.5).any(dim=0).tolist()
    fewest_pixels = matrices.sum(dim=2).amin(dim=0).tolist()  # at a position

    positions = {}
    for index, name in enumerate(classes):
        if is_predicted[index] and n_lost[index] > 0 and fewest_pixels[index] >= LEAST_PIXELS:
            positions[name] = n_lost[index] / 4
    return positions


def boundary_matrices(prediction: Tensor, mask: Tensor, num_classes: int) -> Tensor:
    """Count the pixels near contours, which boundary IoU compares.

    Boundary IoU (Cheng et al. 2021, arXiv:2103.16562) is the IoU of bands along the inner side of
    the contours. Our band is `BOUNDARY` = 2 pixels wide for images of every size, where the paper
    takes 2 % of the image's diagonal. The border of an image is a contour, as in the authors' code.

    From (N, H, W) predicted and true classes to (N, C + 1, C + 1) int64 confusion matrices, where
    class C means "in no band". The boundary IoUs of the C classes are `iou(matrices)[..., :-1]`.
    """
    bands = []
    for labels in (prediction.where(mask != IGNORE, IGNORE), mask):
        labels = labels.to(torch.uint8)  # bytes are compared faster than int64
        in_no_band = inside(labels) | (labels == IGNORE)
        bands.append(labels.masked_fill(in_no_band, num_classes))
    predicted_bands, true_bands = bands
    return confusion_matrices(predicted_bands, true_bands, num_classes + 1)


def inside(labels: Tensor) -> Tensor:
    """Mark the pixels of (N, H, W) uint8 whose square of 5×5 pixels has one value only."""
    height, width = labels.shape[1:]
    side = 2 * BOUNDARY + 1
    padded = F.pad(labels, [BOUNDARY, BOUNDARY, BOUNDARY, BOUNDARY], value=OUTSIDE)
    # First within each row, then between rows: 5 + 5 comparisons of whole masks, not 25.
    unshifted = padded[:, :, BOUNDARY : BOUNDARY + width]  # its rows still have a margin
    row_is_plain = torch.ones_like(unshifted, dtype=torch.bool)
    for shift in range(side):
        row_is_plain &= padded[:, :, shift : shift + width] == unshifted
    square_is_plain = torch.ones_like(labels, dtype=torch.bool)
    for shift in range(side):
        square_is_plain &= row_is_plain[:, shift : shift + height]
        square_is_plain &= unshifted[:, shift : shift + height] == labels
    return square_is_plain


# ---- statistics


def interval(matrices: Tensor) -> list[float] | None:
    """Estimate a 95 % interval for the mean IoU on all images of the same kind, by a bootstrap.

    From (M, C, C) confusion matrices: of groups whose images resemble each other (a flight of AFO),
    or of single images. M of them are drawn with replacement, `DRAWS` times (Efron
    1979). Returns [low, high], or None for fewer than `MIN_GROUPS` groups, or fewer that have
    pixels of a class: draws that lack a class would be averages over the other classes.
    """
    groups = len(matrices)
    groups_with_class = (matrices.sum(dim=2) > 0).sum(dim=0)  # (C,); rows are the true classes
    is_rare = (groups_with_class > 0) & (groups_with_class < MIN_GROUPS)
    if groups < MIN_GROUPS or is_rare.any():
        return None
    generator = torch.Generator().manual_seed(0)
    cells = matrices.flatten(1).double()  # (M, C²)
    means = []
    for _ in range(DRAWS // BLOCK):
        drawn = torch.randint(groups, (BLOCK, groups), generator=generator)
        times_drawn = torch.zeros(BLOCK, groups, dtype=torch.float64)
        times_drawn.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        sums = (times_drawn @ cells).unflatten(1, matrices.shape[1:])  # (BLOCK, C, C)
        means.append(mean_iou(sums).nan_to_num(0))  # NaN: all pixels drawn are ignored
    limits = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return torch.cat(means).quantile(limits).tolist()


def mean_std(values: list[float | None]) -> dict | None:
    """Compute mean and sample standard deviation (None if n = 1); None if a value is missing."""
    if None in values:
        return None
    n = len(values)
    mean = math.fsum(values) / n
    std = None
    if n > 1:
        squares = math.fsum((value - mean) ** 2 for value in values)
        std = math.sqrt(squares / (n - 1))
    return {"mean": mean, "std": std, "n": n}


def t_quantile(freedom: float) -> float:
    """Compute the 97.5 % quantile of Student's t distribution of one or more degrees of freedom.

    They need not be whole. With t = √freedom · tan(angle), the density of t becomes one of the
    angle, from −90° to 90°, that is proportional to cos(angle) to the power of freedom − 1.
    """
    edges = np.linspace(0, np.pi / 2, ANGLES + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    shares = np.cumsum(np.cos(middles) ** (freedom - 1))
    # 2.5 % of t lie above the quantile and as many below minus the quantile: 95 % lie between.
    angle = np.interp(0.95, shares / shares[-1], edges[1:])
    return math.sqrt(freedom) * math.tan(angle)


def welch(a: list[float], b: list[float]) -> Comparison:
    """Compare the means of two lists of scores by Welch's t test (1947), two-sided, at 95 %.

    The verdict says whether the mean of a is beyond noise above ("more") or below ("less") the mean
    of b, or not ("noise"). It is "one seed" if a list has one score only, since nothing is then
    known about the noise.
    """
    first = mean_std(a)
    second = mean_std(b)
    difference = first["mean"] - second["mean"]
    if first["n"] == 1 or second["n"] == 1:
        return Comparison("one seed", difference, None)

    error_a = first["std"] ** 2 / first["n"]  # squared standard errors of the means
    error_b = second["std"] ** 2 / second["n"]
    spread = error_a**2 / (first["n"] - 1) + error_b**2 / (second["n"] - 1)
    freedom = 1.0
    if spread > 0:  # 0: each list has equal values
        freedom = (error_a + error_b) ** 2 / spread  # Welch-Satterthwaite equation
    margin = t_quantile(freedom) * math.sqrt(error_a + error_b)

    if abs(difference) <= margin + ROUNDING:
        verdict = "noise"
    elif difference > 0:
        verdict = "more"
    else:
        verdict = "less"
    return Comparison(verdict, difference, margin)
