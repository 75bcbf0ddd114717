"""Tests of losses.py against formulas written as loops in numpy, and of what they promise."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from losses import LOSSES, weighted_loss
from metrics import IGNORE

each_loss = pytest.mark.parametrize("name", LOSSES)


def batch(
    seed: int = 0, shape: tuple[int, ...] = (3, 4, 5, 6), ignored: float = 0.2, scale: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Draw float64 logits (N, C, H, W) and a uint8 mask (N, H, W), a share of it ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    size = (shape[0], *shape[2:])
    mask = torch.randint(shape[1], size, generator=generator, dtype=torch.uint8)
    mask[torch.rand(size, generator=generator) < ignored] = IGNORE
    return logits, mask


# ---- the formulas, one pixel at a time


def pixels(logits: Tensor, mask: Tensor) -> list[tuple[int, np.ndarray, int]]:
    """List image, probabilities of the classes and true class of each pixel that counts."""
    found = []
    for n, y, x in (mask != 255).nonzero().tolist():
        powers = np.exp(logits[n, :, y, x].numpy())
        found.append((n, powers / powers.sum(), int(mask[n, y, x])))
    return found


def loop_cross_entropy(logits: Tensor, mask: Tensor) -> float:
    return float(np.mean([-math.log(p[true]) for _, p, true in pixels(logits, mask)]))


def loop_cross_entropy_per_class(logits: Tensor, mask: Tensor) -> float:
    of_class = {}
    for _, p, true in pixels(logits, mask):
        of_class.setdefault(true, []).append(-math.log(p[true]))
    return float(np.mean([np.mean(values) for values in of_class.values()]))


def loop_dice_pooled(logits: Tensor, mask: Tensor) -> float:
    per_image = []
    for n in range(len(mask)):
        overlap = total = 0.0
        for image, p, true in pixels(logits, mask):
            if image == n:
                overlap += p[true]
                total += p.sum() + 1
        per_image.append(2 * overlap / total if total else 1.0)
    return 1 - float(np.mean(per_image))


def loop_dice_per_class(logits: Tensor, mask: Tensor) -> float:
    per_class = []
    for c in range(logits.shape[1]):
        overlap = predicted = true_pixels = 0.0
        for _, p, true in pixels(logits, mask):
            overlap += p[c] * (true == c)
            predicted += p[c]
            true_pixels += true == c
        if true_pixels:
            per_class.append(2 * overlap / (predicted + true_pixels))
    return 1 - float(np.mean(per_class))


LOOPS = {
    "cross_entropy": loop_cross_entropy,
    "cross_entropy_per_class": loop_cross_entropy_per_class,
    "dice_pooled": loop_dice_pooled,
    "dice_per_class": loop_dice_per_class,
}


@each_loss
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_loss_is_its_formula(name: str, ignored: float) -> None:
    for seed in range(3):
        logits, mask = batch(seed, ignored=ignored)
        assert LOSSES[name](logits, mask).item() == pytest.approx(LOOPS[name](logits, mask))


@each_loss
def test_class_absent_from_the_batch(name: str) -> None:
    logits, mask = batch()
    mask[mask == 2] = 0
    assert LOSSES[name](logits, mask).item() == pytest.approx(LOOPS[name](logits, mask))
    mask[mask != IGNORE] = 0  # all pixels of one class
    mask[1] = IGNORE  # an image without a pixel
    assert LOSSES[name](logits, mask).item() == pytest.approx(LOOPS[name](logits, mask))


def test_weighted_sum() -> None:
    weights = {"cross_entropy": 0.5, "dice_per_class": 3.0, "dice_pooled": 2}
    logits, mask = batch()
    expected = sum(weight * LOOPS[name](logits, mask) for name, weight in weights.items())
    assert weighted_loss(logits, mask, weights).item() == pytest.approx(expected)


# ---- values known without a formula


@each_loss
def test_perfect_and_worst_prediction_and_equal_logits(name: str) -> None:
    _, mask = batch(shape=(2, 4, 8, 8), ignored=0.1)
    target = torch.stack([mask == c for c in range(4)], dim=1).double()
    assert LOSSES[name](50 * target, mask).item() == pytest.approx(0, abs=1e-9)
    worst = LOSSES[name](50 * target.roll(1, dims=1), mask).item()
    is_dice = name.startswith("dice")
    assert worst == pytest.approx(1.0 if is_dice else 50.0, abs=1e-9)
    mask = torch.arange(4, dtype=torch.uint8).repeat(1, 8, 1)  # each class a quarter
    # Dice of a class: overlap 1/4 · 1/4, total 1/4 + 1/4.
    expected = 0.75 if is_dice else math.log(4)
    assert LOSSES[name](torch.zeros(1, 4, 8, 4), mask).item() == pytest.approx(expected)


@each_loss
def test_gradient_is_the_slope(name: str) -> None:
    logits, mask = batch(shape=(2, 4, 3, 2), ignored=0.3, scale=1.0)
    mask[mask == 3] = 0  # a class that is absent
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: weighted_loss(x, mask, {name: 1.0}), (logits,))


@each_loss
def test_all_ignored_batch_is_zero_with_zero_gradient(name: str) -> None:
    logits = batch()[0].requires_grad_()
    loss = weighted_loss(logits, torch.full((3, 5, 6), IGNORE, dtype=torch.uint8), {name: 1.0})
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


@each_loss
def test_huge_logits_stay_finite(name: str) -> None:
    logits, mask = batch(scale=1e4)
    logits = logits.float().requires_grad_()
    loss = weighted_loss(logits, mask, {name: 1.0})
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_a_loss_computes_without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, mask = batch(shape=(2, 4, 8, 8))
    # CPU autocast would turn a matrix product into bfloat16.
    monkeypatch.setitem(LOSSES, "product", lambda x, mask: (x[0, 0] @ x[0, 0].T).sum())
    with torch.autocast("cpu", torch.bfloat16):
        assert weighted_loss(logits.float(), mask, {"product": 1.0}).dtype == torch.float32


@each_loss
def test_float32_whatever_autocast_does(name: str) -> None:
    logits, mask = batch(shape=(2, 4, 64, 64))
    half = logits.bfloat16()
    outside = weighted_loss(half.float(), mask, {name: 1.0})
    with torch.autocast("cpu", torch.bfloat16):
        inside = [weighted_loss(x, mask, {name: 1.0}) for x in (half, half.float())]
    assert all(loss.dtype == torch.float32 and torch.equal(loss, outside) for loss in inside)
    exact = LOSSES[name](half.double(), mask).item()
    assert outside.item() == pytest.approx(exact, rel=1e-5)  # bfloat16 has 3 decimal digits
