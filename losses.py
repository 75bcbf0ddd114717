"""Compute losses of logits (N, C, H, W) against masks (N, H, W), in float32.

A loss is a function of logits and mask. Its name in `LOSSES` is what a config uses:
`loss: {cross_entropy: 1.0, dice_per_class: 1.0}`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from common import UserError
from metrics import IGNORE


def cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Average the negative log-likelihood of the true class over the pixels; in [0, inf)."""
    total = F.cross_entropy(logits, mask.long(), ignore_index=IGNORE, reduction="sum")
    counted = (mask != IGNORE).sum().clamp(min=1)  # if all are ignored: a loss of 0, not 0/0
    return total / counted


def cross_entropy_per_class(logits: Tensor, mask: Tensor) -> Tensor:
    """Average the cross-entropy over the pixels of each class, then over classes; in [0, inf).

    mean_c (Σ_nk −t·log p) / Σ_nk t, with softmax p and one-hot t. Every class weighs the same
    however few pixels it has, as with weights that are inverse to the frequency of a class (Eigen
    and Fergus 2015, arXiv:1411.4734). A class without a pixel in the batch's masks is left out.
    """
    t = _one_hot(mask, logits)
    log_p = logits.flatten(2).log_softmax(dim=1)
    pixels = t.sum(dim=(0, 2))
    mean_of_class = -(t * log_p).sum(dim=(0, 2)) / pixels.clamp(min=1)
    return mean_of_class.sum() / (pixels > 0).sum().clamp(min=1)


def _one_hot(mask: Tensor, logits: Tensor) -> Tensor:
    """Turn a mask into (N, C, H*W), 1 in the channel of the true class, in the dtype of logits."""
    classes = torch.arange(logits.shape[1], device=mask.device)[:, None]  # (C, 1)
    return (mask.flatten(1)[:, None] == classes).to(logits.dtype)  # IGNORE is no class: all 0


def _probabilities_and_target(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Compute softmax and one-hot mask, both (N, C, H*W) float32, 0 where pixels are ignored."""
    counted = mask.flatten(1)[:, None] != IGNORE  # (N, 1, H*W)
    probabilities = logits.flatten(2).softmax(dim=1)
    return probabilities * counted, _one_hot(mask, logits)


def dice_pooled(logits: Tensor, mask: Tensor) -> Tensor:
    """Compute the lab's Dice loss: one soft Dice per image over all classes and pixels; in [0, 1].

    1 − mean_n 2·Σ_ck p·t / (Σ_ck p + Σ_ck t), with softmax p and one-hot t (the soft Dice of
    Sudre et al. 2017, arXiv:1707.03237, without class weights). Since Σ_c p = Σ_c t = 1 at every
    pixel it equals 1 − the mean probability of the true class. A class of few pixels hardly
    counts in it, so that a network can do without it.
    """
    p, t = _probabilities_and_target(logits, mask)
    overlap = (p * t).sum(dim=(1, 2))
    total = (p + t).sum(dim=(1, 2))
    dice = torch.where(total > 0, 2 * overlap / total.clamp(min=1e-12), 1.0)
    return 1 - dice.mean()


def dice_per_class(logits: Tensor, mask: Tensor) -> Tensor:
    """Average the soft Dice of each class over the whole batch; in [0, 1].

    1 − mean_c 2·Σ_nk p·t / (Σ_nk p + Σ_nk t) (Sudre et al. 2017, "batch Dice"). Every class
    weighs the same however few pixels it has. A class without a pixel in the batch's masks is
    left out: its Dice would be 0 whatever is predicted, so it has nothing to teach.
    """
    p, t = _probabilities_and_target(logits, mask)
    overlap = (p * t).sum(dim=(0, 2))
    total = (p + t).sum(dim=(0, 2))
    present = t.sum(dim=(0, 2)) > 0
    dice = torch.where(present, 2 * overlap / total.clamp(min=1e-12), 0.0)
    # Without any class the loss is 0. A tensor decides that, since an `if` would make a GPU wait.
    mean_dice = dice.sum() / present.sum().clamp(min=1)
    return torch.where(present.any(), 1 - mean_dice, 0.0)


LOSSES = {
    "cross_entropy": cross_entropy,
    "cross_entropy_per_class": cross_entropy_per_class,
    "dice_pooled": dice_pooled,
    "dice_per_class": dice_per_class,
}


def check_loss(weights: dict[str, float]) -> None:
    """Raise UserError unless each key of a config's `loss` is in `LOSSES`, its value finite."""
    known = ", ".join(LOSSES)
    if not weights:
        raise UserError(f"loss: names no loss; give at least one of {known}, with its weight")
    for name, weight in weights.items():
        if name not in LOSSES:
            raise UserError(f"loss: there is no loss '{name}'; known: {known}")
        if type(weight) not in (int, float) or not math.isfinite(weight):
            raise UserError(
                f"loss: {name}: {weight!r} is no weight; give a number, as 1.0 or 0.001"
            )


def weighted_loss(logits: Tensor, mask: Tensor, weights: dict[str, float]) -> Tensor:
    """Add up losses, each times its weight: `weights` has names of `LOSSES`; returns a scalar."""
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return sum(weight * LOSSES[name](logits, mask) for name, weight in weights.items())
