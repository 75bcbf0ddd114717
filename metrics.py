"""One integer confusion matrix for a whole split, and every score read from it."""

import math
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor, nn

from augment import to_float
from device import autocast
from distributed import rank_and_world, sum_over_ranks
from images import IGNORE
from losses import weighted_loss

EVALUATION_BATCH = 32  # images of 128×128; more leave the processor's caches, and were no faster


def in_batches(images: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Batches of whole images: `EVALUATION_BATCH`, or fewer if they are larger than 128×128.

    So the memory that evaluation takes hardly grows with the images. Args: (M, …, H, W) each.
    """
    size = EVALUATION_BATCH * 128**2 // (images.shape[-2] * images.shape[-1])
    size = min(max(size, 1), EVALUATION_BATCH)
    return zip(*(tensor.split(size) for tensor in (images, *others)), strict=True)


def confusion_matrix(prediction: Tensor, mask: Tensor, num_classes: int) -> Tensor:
    """Count pixels by (true class, predicted class).

    Matrices of batches add up to the matrix of the split exactly, in any order and batch size.

    Args:
        prediction: integer class indices in [0, C), any shape.
        mask: class indices in [0, C) or `IGNORE` (not counted), of the same shape.
        num_classes: C.

    Returns:
        (C, C) int64 on the same device; row = true class, column = predicted class.
    """
    counted = mask != IGNORE
    # Ignored pixels go to one extra bin rather than through a boolean index, which would make
    # a GPU wait for their number.
    index = torch.where(counted, mask.long() * num_classes + prediction.long(), num_classes**2)
    counts = torch.bincount(index.flatten(), minlength=num_classes**2 + 1)
    return counts[:-1].view(num_classes, num_classes)


def scores(matrix: Tensor, classes: list[str]) -> dict:
    """Every score of a split from its confusion matrix.

    With true positives TP, false positives FP and false negatives FN of a class over all pixels:
    IoU = TP / (TP + FP + FN) (Jaccard 1912), Dice = 2·TP / (2·TP + FP + FN) (Dice 1945). A class
    that is neither in the masks nor predicted has no score: it is None here and left out of the
    means. A class that is in the masks and never predicted scores 0 and is listed as dead.

    Args:
        matrix: (C, C) integer, row = true class, column = predicted class.
        classes: C names; the first is the background.

    Returns:
        pixel_accuracy, mean_iou, mean_iou_foreground (without class 0), mean_dice in [0, 1], or
        None if no pixel was counted; per_class_iou, per_class_dice by name; dead_classes by name.
    """
    m = matrix.detach().cpu().double()
    tp, true, predicted = m.diag(), m.sum(dim=1), m.sum(dim=0)
    union = true + predicted - tp
    iou = [_ratio(a, b) for a, b in zip(tp.tolist(), union.tolist(), strict=True)]
    dice = [_ratio(2 * a, b) for a, b in zip(tp.tolist(), (true + predicted).tolist(), strict=True)]
    return {
        "pixel_accuracy": _ratio(tp.sum().item(), m.sum().item()),
        "mean_iou": _mean(iou),
        "mean_iou_foreground": _mean(iou[1:]),
        "mean_dice": _mean(dice),
        "per_class_iou": dict(zip(classes, iou, strict=True)),
        "per_class_dice": dict(zip(classes, dice, strict=True)),
        "dead_classes": [
            name
            for name, t, p in zip(classes, true.tolist(), predicted.tolist(), strict=True)
            if t > 0 and p == 0
        ],
    }


@torch.inference_mode()
def evaluate(
    model: nn.Module, images: Tensor, masks: Tensor, config: dict, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """Run a model over a whole split, of which several processes share the batches.

    Args:
        model: maps (N, channels, H, W) float in [0, 1] to (N, C, H, W) logits; set to eval mode.
        images: (M, channels, H, W) uint8; masks: (M, H, W) uint8, on any device.
        config: for `classes` and `loss`.
        dtype: autocast dtype.

    Returns:
        (C, C) int64 confusion matrix on the model's device and the mean loss per image, in the
        batches of `in_batches` (Dice losses depend on what is pooled).
    """
    device = next(model.parameters()).device
    model.eval()
    num_classes = len(config["classes"])
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    loss_sum = torch.zeros((), device=device)
    rank, world = rank_and_world()
    # Whole batches to each rank, since the Dice losses pool them.
    for batch, mask in islice(in_batches(images, masks), rank, None, world):
        mask = mask.to(device, non_blocking=True)
        with autocast(device, dtype):
            logits = model(to_float(batch.to(device, non_blocking=True)))
        matrix += confusion_matrix(logits.argmax(dim=1), mask, num_classes)
        loss_sum += weighted_loss(logits, mask, config["loss"]) * len(batch)
    sum_over_ranks(matrix, loss_sum)
    return matrix, loss_sum.item() / len(images)


@torch.inference_mode()
def predict_split(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, H, W) uint8 class indices that a model in evaluation mode gives to a split.

    Args:
        images: (M, channels, H, W) uint8.
        dtype: autocast dtype.
    """
    device = next(model.parameters()).device
    predictions = []
    for (batch,) in in_batches(images):
        with autocast(device, dtype):
            logits = model(to_float(batch.to(device)))
        predictions.append(logits.argmax(dim=1).to(torch.uint8).cpu())
    return torch.cat(predictions)


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator > 0 else None


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return math.fsum(present) / len(present) if present else None
