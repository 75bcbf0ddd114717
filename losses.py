"""Losses on logits (N, C, H, W) against masks (N, H, W); all in float32 whatever autocast does.

A loss is a function of logits and mask in `LOSSES`; `loss: {name: weight}` in a config uses it.
"""

from common import UserError

import torch
import torch.nn.functional as F
from torch import Tensor

from metrics import IGNORE


def cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Average the negative log-likelihood of the true class over the pixels; in [0, inf)."""
    counted = (mask != IGNORE).sum().clamp(min=1)  # all ignored: a loss of 0, not 0/0
    return F.cross_entropy(logits, mask.long(), ignore_index=IGNORE, reduction="sum") / counted


def _probabilities_and_target(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over classes and one-hot mask, both (N, C, H*W) float32, 0 where ignored."""
    classes, mask = torch.arange(logits.shape[1], device=mask.device), mask.flatten(1)[:, None]
    target = (mask == classes[:, None]).to(logits.dtype)
    return logits.flatten(2).softmax(dim=1) * (mask != IGNORE), target


def dice_pooled(logits: Tensor, mask: Tensor) -> Tensor:
    """Compute the lab's Dice loss: one soft Dice per image over all classes and pixels; in [0, 1].

    1 − mean_n 2·Σ_ck p·t / (Σ_ck p + Σ_ck t), with softmax p and one-hot t (the soft Dice of
    Sudre et al. 2017, arXiv:1707.03237, without class weights). Since Σ_c p = Σ_c t = 1 at every
    pixel it equals 1 − the mean probability of the true class: a class of few pixels weighs next
    to nothing, which is how classes die under it.
    """
    p, t = _probabilities_and_target(logits, mask)
    overlap, total = (p * t).sum(dim=(1, 2)), (p + t).sum(dim=(1, 2))
    dice = torch.where(total > 0, 2 * overlap / total.clamp(min=1e-12), 1.0)
    return 1 - dice.mean()


def dice_per_class(logits: Tensor, mask: Tensor) -> Tensor:
    """Average the soft Dice of each class over the whole batch; in [0, 1].

    1 − mean_c 2·Σ_nk p·t / (Σ_nk p + Σ_nk t) (Sudre et al. 2017, "batch Dice"). Every class
    weighs the same however few pixels it has. A class without a pixel in the batch's masks is
    left out: its Dice is 0 for every prediction but an exact zero and would give no direction.
    """
    p, t = _probabilities_and_target(logits, mask)
    overlap, total, true = (p * t).sum(dim=(0, 2)), (p + t).sum(dim=(0, 2)), t.sum(dim=(0, 2))
    present = true > 0
    dice = torch.where(present, 2 * overlap / total.clamp(min=1e-12), 0.0)
    # No class present: a loss of 0. A tensor decides, since an `if` would make a GPU wait.
    return present.any().to(dice) - dice.sum() / present.sum().clamp(min=1)


LOSSES = {
    "cross_entropy": cross_entropy,
    "dice_pooled": dice_pooled,
    "dice_per_class": dice_per_class,
}


def weighted_loss(logits: Tensor, mask: Tensor, weights: dict[str, float]) -> Tensor:
    """Add up losses by weight, name in `LOSSES` → weight; UserError if a name is unknown."""
    for name, weight in weights.items() or [("nothing", None)]:
        if name not in LOSSES or not isinstance(weight, (int, float)):
            known = ", ".join(LOSSES)
            raise UserError(f"loss: {name}: {weight} is no loss with its weight; known: {known}")
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return sum(weight * LOSSES[name](logits, mask) for name, weight in weights.items())
