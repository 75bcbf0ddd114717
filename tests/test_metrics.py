"""Tests of metrics.py: counting against a double loop, and every score against its definition."""

import json
import math
from itertools import combinations, product

import numpy as np
import pytest
import torch
from torch import Tensor

from metrics import (
    IGNORE,
    T_QUANTILES,
    boundary_matrices,
    compare,
    confusion_matrices,
    contributions,
    dead_places,
    fisher,
    interval,
    iou,
    mean_std,
    scores,
)

CLASSES = ["background", "square", "triangle", "circle"]


def pair(seed: int, classes: int = 4, ignored: float = 0.2) -> tuple[Tensor, Tensor]:
    """Draw a prediction (int64) and a mask (uint8): half of the pixels right, a share ignored."""
    shape, generator = (6, 5, 7), torch.Generator().manual_seed(seed)
    mask, guess = (torch.randint(classes, shape, generator=generator) for _ in range(2))
    prediction = torch.where(torch.rand(shape, generator=generator) < 0.5, mask, guess)
    mask[torch.rand(shape, generator=generator) < ignored] = IGNORE
    return prediction, mask.to(torch.uint8)


def split_matrix(prediction: Tensor, mask: Tensor, classes: int = 4) -> Tensor:
    return confusion_matrices(prediction, mask, classes).sum(dim=0)


# ---- the confusion matrix


@pytest.mark.parametrize("ignored", [0, 0.3, 1])
@pytest.mark.parametrize("classes", [2, 4, 7, 255])  # 255²: more than the mask's type can hold
def test_each_image_is_counted_as_by_a_loop(classes: int, ignored: float) -> None:
    prediction, mask = pair(classes, classes, ignored)
    matrices = confusion_matrices(prediction, mask, classes)
    assert matrices.dtype == torch.int64 and len(matrices) == len(mask)
    counts = np.zeros((len(mask), classes, classes), int)
    for n, y, x in product(*map(range, mask.shape)):
        if mask[n, y, x] != 255:
            counts[n, int(mask[n, y, x]), int(prediction[n, y, x])] += 1
    assert matrices.tolist() == counts.tolist()


# ---- the scores


def by_sets(prediction: Tensor, mask: Tensor, c: int) -> tuple[float, float]:
    """IoU and Dice of a class as ratios of sets of pixels."""
    counted = {i for i, t in enumerate(mask.flatten().tolist()) if t != 255}
    true = {i for i in counted if mask.flatten()[i] == c}
    predicted = {i for i in counted if prediction.flatten()[i] == c}
    both = len(true & predicted)
    return both / len(true | predicted), 2 * both / (len(true) + len(predicted))


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_their_definitions(seed: int) -> None:
    prediction, mask = pair(seed)
    result = scores(split_matrix(prediction, mask), CLASSES)
    ious, dices = zip(*(by_sets(prediction, mask, c) for c in range(4)), strict=True)
    assert list(result["per_class_iou"]) == list(result["per_class_dice"]) == CLASSES
    assert list(result["per_class_iou"].values()) == pytest.approx(ious)
    assert list(result["per_class_dice"].values()) == pytest.approx(dices)
    assert result["mean_iou"] == pytest.approx(np.mean(ious))
    assert result["mean_iou_foreground"] == pytest.approx(np.mean(ious[1:]))
    assert result["mean_dice"] == pytest.approx(np.mean(dices))
    counted = mask != IGNORE
    right = (prediction[counted] == mask[counted]).float().mean().item()
    assert result["pixel_accuracy"] == pytest.approx(right)
    assert result["dead_classes"] == []
    assert json.loads(json.dumps(result)) == result  # plain data


def test_absent_class_has_no_score_and_is_left_out() -> None:
    matrix = torch.tensor([[8, 2, 0, 0], [0, 5, 0, 5], [0, 0, 0, 0], [0, 0, 0, 10]])
    result = scores(matrix, CLASSES)
    ious = [8 / 10, 5 / 12, None, 10 / 15]
    assert result["per_class_iou"] == pytest.approx(dict(zip(CLASSES, ious, strict=True)))
    assert result["per_class_dice"]["triangle"] is None
    assert result["mean_iou"] == pytest.approx((8 / 10 + 5 / 12 + 10 / 15) / 3)
    assert result["mean_iou_foreground"] == pytest.approx((5 / 12 + 10 / 15) / 2)
    assert result["mean_dice"] == pytest.approx((16 / 18 + 10 / 17 + 20 / 25) / 3)
    assert result["dead_classes"] == []


def test_class_predicted_but_not_there_scores_zero_and_is_not_dead() -> None:
    result = scores(torch.tensor([[8, 0, 2, 0]] + [[0] * 4] * 3), CLASSES)
    assert list(result["per_class_iou"].values()) == [0.8, None, 0, None]
    assert result["mean_iou"] == pytest.approx(0.4)
    assert result["dead_classes"] == []


def test_dead_places_are_those_of_each_two_by_two_pixels() -> None:
    _, mask = pair(0)
    prediction = mask.where(mask != IGNORE, 0)
    prediction[:, ::2][mask[:, ::2] == 1] = 0  # squares live on odd rows alone
    prediction[:, 1::2, ::2][mask[:, 1::2, ::2] == 3] = 2  # circles are dead at one place
    assert dead_places(prediction, mask, CLASSES) == {"square": 2, "circle": 1}
    prediction[:, 1::2][mask[:, 1::2] == 1] = 0  # now squares are dead, and no longer striped
    assert dead_places(prediction, mask, CLASSES) == {"circle": 1}


def test_all_ignored() -> None:
    result = scores(split_matrix(*pair(0, ignored=1)), CLASSES)
    assert result["pixel_accuracy"] is result["mean_iou"] is result["mean_dice"] is None
    assert result["mean_iou_foreground"] is None and {*result["per_class_iou"].values()} == {None}
    assert result["dead_classes"] == []


# ---- boundaries


def slow_band(labels: np.ndarray, c: int) -> np.ndarray:
    """Mark the pixels of class c at most two rows and columns from another or from outside."""
    padded = np.pad(labels, ((0, 0), (2, 2), (2, 2)), constant_values=254)
    band = np.zeros(labels.shape, bool)
    for n, y, x in product(*map(range, labels.shape)):
        window = padded[n, y : y + 5, x : x + 5]
        band[n, y, x] = labels[n, y, x] == c and (window != c).any()
    return band


def test_boundary_iou_is_the_iou_of_inner_bands() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(3, (2, 3, 2, 3), generator=generator, dtype=torch.uint8)
    mask, prediction = blocks.repeat_interleave(7, 2).repeat_interleave(7, 3)  # 14×21 each
    mask[0, 3:5, 4:9] = IGNORE
    found = iou(boundary_matrices(prediction, mask, 4).sum(dim=0))[:-1].tolist()
    seen = np.where(mask.numpy() == 255, 255, prediction.numpy())
    for c in range(3):
        a, b = slow_band(seen, c), slow_band(mask.numpy(), c)
        assert found[c] == pytest.approx((a & b).sum() / (a | b).sum())
    assert math.isnan(found[3])  # a class without a band


# ---- statistics over seeds


def test_mean_and_standard_deviation() -> None:
    stat = mean_std([0.5, 0.7, 0.9])
    assert stat["mean"] == pytest.approx(0.7) and stat["std"] == pytest.approx(0.2)
    assert stat["n"] == 3 and mean_std([0.5])["std"] is None and mean_std([0.5, None]) is None


def p_value(t: float, df: float) -> float:
    """Two-sided p of Student's t, by summing up its density."""
    xs = np.linspace(0, t, 20_001)
    log_factor = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2
    density = np.exp(log_factor - (df + 1) / 2 * np.log1p(xs**2 / df))
    return 1 - 2 * float(((density[1:] + density[:-1]) / 2 * np.diff(xs)).sum())


def test_quantiles_leave_five_percent_outside() -> None:
    for df, quantile in T_QUANTILES.items():
        assert p_value(quantile, df) == pytest.approx(0.05, abs=1e-4), df


def test_compare_is_welchs_t_test() -> None:
    rng, outcomes = np.random.default_rng(0), set()
    for _ in range(300):
        a = (rng.normal(0, 1, rng.integers(2, 8)) + rng.normal(0, 2)).tolist()
        b = rng.normal(0, rng.choice([0.3, 1, 3]), rng.integers(2, 8)).tolist()
        va, vb = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
        t = abs(np.mean(a) - np.mean(b)) / math.sqrt(va + vb)
        p = p_value(t, (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1)))
        found, _ = compare(mean_std(a), mean_std(b))
        outcomes.add(found)
        if p > 0.05:
            assert found == "noise"
        elif p < 0.02:  # degrees of freedom are rounded down, which asks for a little more
            assert found == ("more" if np.mean(a) > np.mean(b) else "less")
    assert outcomes == {"noise", "more", "less"}


def test_compare_of_one_seed_and_of_equal_values() -> None:
    one, constant, higher = mean_std([0.5]), mean_std([0.4] * 3), mean_std([0.6] * 3)
    assert compare(one, constant) == compare(constant, one) == ("one seed", None)
    assert compare(constant, constant)[0] == "noise" and compare(higher, constant)[0] == "more"
    a, b = mean_std([0.0, 1.0, 2.0]), mean_std([2.0, 3.0, 4.0])  # difference 2, error 0.816
    assert compare(a, b) == ("noise", pytest.approx(2.776 * 0.8165, abs=1e-3))  # t of df = 4


def test_fisher_counts_every_way_to_deal_the_hits() -> None:
    for a, n, b, m in ((3, 4, 1, 4), (0, 5, 4, 5), (2, 3, 2, 6), (1, 2, 1, 2)):
        dealt = [sum(i < n for i in hits) for hits in combinations(range(n + m), a + b)]
        rare = sum(dealt.count(x) for x in set(dealt) if dealt.count(x) <= dealt.count(a))
        assert fisher(a, n, b, m) == pytest.approx(rare / len(dealt))
    assert fisher(3, 4, 1, 4) == pytest.approx(34 / 70)  # the lady tasting tea


def test_contributions_are_the_jackknife_of_the_pooled_score() -> None:
    matrices = torch.randint(1, 100, (6, 3, 3), generator=torch.Generator().manual_seed(0)).numpy()

    def pooled(chosen: list[int]) -> float:
        m = sum(matrices[i].astype(float) for i in chosen)
        return np.mean([m[c, c] / (m[c].sum() + m[:, c].sum() - m[c, c]) for c in range(3)])

    everyone = list(range(6))
    expected = [
        6 * pooled(everyone) - 5 * pooled([j for j in everyone if j != i]) for i in everyone
    ]
    assert contributions(torch.from_numpy(matrices)) == pytest.approx(expected, abs=1e-12)
    assert contributions(torch.from_numpy(matrices[:1])) == pytest.approx([pooled([0])])


def test_interval_is_that_of_repeated_draws() -> None:
    values = torch.rand(40, generator=torch.Generator().manual_seed(0)) * 1000
    matrices = torch.stack([torch.tensor([[int(v), 1000 - int(v)], [0, 1000]]) for v in values])
    rng, means = np.random.default_rng(1), []
    for _ in range(4000):
        right = sum(int(values[i]) for i in rng.integers(40, size=40)) / 40000
        means.append((right + 1 / (2 - right)) / 2)  # the IoU of both classes
    low, high = interval(matrices)
    assert [low, high] == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.005)
    assert np.diff(interval(matrices, 10)) > 1.5 * (high - low)  # √(4 · 30/39) times as wide
    assert interval(matrices, 40) is None and interval(matrices[:1]) is None  # nothing to draw
    assert interval(0 * matrices) == [0, 0]  # all ignored: no NaN in JSON
