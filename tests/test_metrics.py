"""Tests of metrics.py: counting against a double loop, and every score against its definition."""

import json
import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metrics import (
    IGNORE,
    boundary_iou,
    boundary_matrices,
    compare,
    confusion_matrices,
    mean_iou,
    mean_std,
    scores,
)

CLASSES = ["background", "square", "triangle", "circle"]
few = settings(max_examples=30, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


def pair(
    seed: int, shape: tuple[int, ...] = (6, 5, 7), classes: int = 4, ignored: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Random prediction (int64) and mask (uint8), half of the pixels right, a share ignored."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(classes, shape, generator=generator)
    guess = torch.randint(classes, shape, generator=generator)
    right = torch.rand(shape, generator=generator) < 0.5
    prediction = torch.where(right, mask, guess)
    mask[torch.rand(shape, generator=generator) < ignored] = IGNORE
    return prediction, mask.to(torch.uint8)


def confusion_matrix(prediction: Tensor, mask: Tensor, classes: int) -> Tensor:
    """Count all images together."""
    return confusion_matrices(prediction.flatten()[None], mask.flatten()[None], classes)[0]


def loop_matrix(prediction: Tensor, mask: Tensor, classes: int) -> list[list[int]]:
    counts = [[0] * classes for _ in range(classes)]
    for p, t in zip(prediction.flatten().tolist(), mask.flatten().tolist(), strict=True):
        if t != 255:
            counts[t][p] += 1
    return counts


# ---- the confusion matrix


@few
@given(seeds, st.integers(2, 7), st.floats(0, 1))
def test_confusion_matrix_is_the_double_loop(seed: int, classes: int, ignored: float) -> None:
    prediction, mask = pair(seed, classes=classes, ignored=ignored)
    matrix = confusion_matrix(prediction, mask, classes)
    assert matrix.dtype == torch.int64
    assert matrix.tolist() == loop_matrix(prediction, mask, classes)
    assert matrix.sum() == (mask != IGNORE).sum()


def test_rows_are_true_and_columns_predicted() -> None:
    prediction, mask = torch.tensor([1, 1, 0]), torch.tensor([0, 0, 2], dtype=torch.uint8)
    assert confusion_matrix(prediction, mask, 3).tolist() == [[0, 2, 0], [0, 0, 0], [1, 0, 0]]


@few
@given(seeds, st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_matrices_add_up_over_any_batches_and_order(seed: int, cuts: list[int]) -> None:
    prediction, mask = pair(seed, shape=(12, 4, 3))
    whole = confusion_matrix(prediction, mask, 4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    sizes = [*cuts, 12 - sum(cuts)] if sum(cuts) < 12 else [12]
    total = torch.zeros(4, 4, dtype=torch.int64)
    for index in order.split(sizes):
        total += confusion_matrix(prediction[index], mask[index], 4)
    assert torch.equal(total, whole)


def test_255_classes_do_not_overflow_the_masks_type() -> None:
    mask = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(confusion_matrix(mask, mask, 255), torch.eye(255, dtype=torch.int64))


# ---- the scores


def by_sets(prediction: Tensor, mask: Tensor, c: int) -> tuple[float | None, float | None]:
    """IoU and Dice of a class as ratios of sets of pixels."""
    counted = {i for i, t in enumerate(mask.flatten().tolist()) if t != 255}
    true = {i for i in counted if mask.flatten()[i] == c}
    predicted = {i for i in counted if prediction.flatten()[i] == c}
    if not true | predicted:
        return None, None
    both = len(true & predicted)
    return both / len(true | predicted), 2 * both / (len(true) + len(predicted))


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_their_definitions(seed: int) -> None:
    prediction, mask = pair(seed)
    result = scores(confusion_matrix(prediction, mask, 4), CLASSES)
    expected = [by_sets(prediction, mask, c) for c in range(4)]
    assert list(result["per_class_iou"]) == list(result["per_class_dice"]) == CLASSES
    assert list(result["per_class_iou"].values()) == pytest.approx([iou for iou, _ in expected])
    assert list(result["per_class_dice"].values()) == pytest.approx([dice for _, dice in expected])
    assert result["mean_iou"] == pytest.approx(np.mean([iou for iou, _ in expected]))
    assert result["mean_iou_foreground"] == pytest.approx(np.mean([i for i, _ in expected[1:]]))
    assert result["mean_dice"] == pytest.approx(np.mean([dice for _, dice in expected]))
    counted = mask != IGNORE
    right = (prediction[counted] == mask[counted]).float().mean().item()
    assert result["pixel_accuracy"] == pytest.approx(right)
    assert result["dead_classes"] == []
    assert json.loads(json.dumps(result)) == result  # plain data


matrices = st.lists(
    st.lists(st.integers(0, 10**12), min_size=4, max_size=4), min_size=4, max_size=4
)


@few
@given(matrices)
def test_dice_and_iou_are_bound_to_each_other(rows: list[list[int]]) -> None:
    result = scores(torch.tensor(rows), CLASSES)
    for name in CLASSES:
        iou, dice = result["per_class_iou"][name], result["per_class_dice"][name]
        if iou is None:
            assert dice is None
        else:
            assert 0 <= iou <= dice <= 1
            assert dice == pytest.approx(2 * iou / (1 + iou))


@few
@given(matrices, st.permutations([1, 2, 3]))
def test_means_do_not_depend_on_the_order_of_the_foreground(
    rows: list[list[int]], order: list[int]
) -> None:
    order = [0, *order]
    matrix = torch.tensor(rows)
    result, other = scores(matrix, CLASSES), scores(matrix[order][:, order], CLASSES)
    for key in ("pixel_accuracy", "mean_iou", "mean_iou_foreground", "mean_dice"):
        assert other[key] == (None if result[key] is None else pytest.approx(result[key]))


def test_perfect_prediction() -> None:
    result = scores(torch.diag(torch.tensor([900, 40, 30, 20])), CLASSES)
    for key in ("pixel_accuracy", "mean_iou", "mean_iou_foreground", "mean_dice"):
        assert result[key] == 1
    assert result["dead_classes"] == []


def test_worst_prediction() -> None:
    matrix = torch.diag(torch.tensor([900, 40, 30, 20])).roll(1, dims=1)  # always the next class
    result = scores(matrix, CLASSES)
    for key in ("pixel_accuracy", "mean_iou", "mean_iou_foreground", "mean_dice"):
        assert result[key] == 0
    assert result["dead_classes"] == []  # wrong everywhere, but all are predicted


def test_background_everywhere_is_accurate_and_bad() -> None:
    matrix = torch.zeros(4, 4, dtype=torch.int64)
    matrix[:, 0] = torch.tensor([863, 41, 41, 55])
    result = scores(matrix, CLASSES)
    assert result["pixel_accuracy"] == pytest.approx(0.863)
    assert result["mean_iou"] == pytest.approx(0.863 / 4)
    assert result["mean_iou_foreground"] == 0
    assert result["dead_classes"] == ["square", "triangle", "circle"]


def test_absent_class_has_no_score_and_is_left_out() -> None:
    matrix = torch.tensor([[8, 2, 0, 0], [0, 5, 0, 5], [0, 0, 0, 0], [0, 0, 0, 10]])
    result = scores(matrix, CLASSES)
    assert result["per_class_iou"] == {
        "background": pytest.approx(8 / 10),
        "square": pytest.approx(5 / 12),
        "triangle": None,
        "circle": pytest.approx(10 / 15),
    }
    assert result["per_class_dice"]["triangle"] is None
    assert result["mean_iou"] == pytest.approx((8 / 10 + 5 / 12 + 10 / 15) / 3)
    assert result["mean_iou_foreground"] == pytest.approx((5 / 12 + 10 / 15) / 2)
    assert result["mean_dice"] == pytest.approx((16 / 18 + 10 / 17 + 20 / 25) / 3)
    assert result["dead_classes"] == []


def test_class_predicted_but_not_there_scores_zero_and_is_not_dead() -> None:
    result = scores(torch.tensor([[8, 0, 2, 0]] + [[0] * 4] * 3), CLASSES)
    assert result["per_class_iou"] == {
        "background": 0.8,
        "square": None,
        "triangle": 0,
        "circle": None,
    }
    assert result["mean_iou"] == pytest.approx(0.4)
    assert result["dead_classes"] == []


def test_dead_class_is_there_and_never_predicted() -> None:
    result = scores(torch.tensor([[9, 1, 0, 0], [0, 9, 0, 0], [1, 0, 0, 0], [0] * 4]), CLASSES)
    assert result["dead_classes"] == ["triangle"]
    assert result["per_class_iou"]["triangle"] == 0


def test_all_ignored() -> None:
    prediction, mask = torch.zeros(2, 3, 3, dtype=torch.int64), torch.full((2, 3, 3), IGNORE)
    result = scores(confusion_matrix(prediction, mask, 4), CLASSES)
    for key in ("pixel_accuracy", "mean_iou", "mean_iou_foreground", "mean_dice"):
        assert result[key] is None
    assert set(result["per_class_iou"].values()) == {None}
    assert result["dead_classes"] == []


def test_large_counts_are_exact() -> None:
    # 10¹² + 1 pixels: float32 would lose the one.
    matrix = torch.tensor([[10**12, 1], [0, 10**12]])
    result = scores(matrix, ["a", "b"])
    assert 1 - result["pixel_accuracy"] == pytest.approx(0.5e-12, rel=1e-3)


# ---- many matrices at once, boundaries


def test_each_image_has_its_matrix_and_mean_iou() -> None:
    prediction, mask = pair(0)
    mask[2] = IGNORE
    each = confusion_matrices(prediction, mask, 4)
    for i in range(len(mask)):
        assert each[i].tolist() == loop_matrix(prediction[i], mask[i], 4)
        expected = scores(each[i], CLASSES)["mean_iou"]
        value = mean_iou(each)[i].item()
        assert math.isnan(value) if expected is None else value == pytest.approx(expected)
    assert torch.equal(each.sum(dim=0), confusion_matrix(prediction, mask, 4))


def slow_bands(labels: np.ndarray, c: int) -> np.ndarray:
    """Pixels of class c at most two rows and columns from one that is not, border included."""
    padded = np.pad(labels, 2, constant_values=254)
    band = np.zeros(labels.shape, bool)
    for n, y, x in product(*map(range, labels.shape)):
        window = np.pad(labels[n], 2, constant_values=254)[y : y + 5, x : x + 5]
        band[n, y, x] = labels[n, y, x] == c and (window != c).any()
    assert padded.shape[1] == labels.shape[1] + 4
    return band


def test_boundary_iou_is_the_iou_of_inner_bands() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(3, (2, 3, 2, 3), generator=generator, dtype=torch.uint8)
    mask, prediction = blocks.repeat_interleave(7, 2).repeat_interleave(7, 3)  # 14×21 each
    mask[0, 3:5, 4:9] = IGNORE
    found = boundary_iou(boundary_matrices(prediction, mask, 4).sum(dim=0)).tolist()
    seen = np.where(mask.numpy() == 255, 255, prediction.numpy())
    for c in range(3):
        a, b = slow_bands(seen, c), slow_bands(mask.numpy(), c)
        assert found[c] == pytest.approx((a & b).sum() / (a | b).sum())
    assert math.isnan(found[3])  # a class without a band


# ---- statistics over seeds


def test_mean_and_standard_deviation() -> None:
    stat = mean_std([0.5, 0.7, 0.9])
    assert stat["mean"] == pytest.approx(0.7) and stat["std"] == pytest.approx(0.2)
    assert stat["n"] == 3 and mean_std([0.5])["std"] is None and mean_std([0.5, None]) is None


def p_value(a: list[float], b: list[float]) -> float:
    """Two-sided p of Welch's t test, by summing up the density of Student's t."""
    va, vb = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    t = abs(np.mean(a) - np.mean(b)) / math.sqrt(va + vb)
    df = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    xs = np.linspace(0, t, 20_001)
    factor = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    density = factor * (1 + xs**2 / df) ** (-(df + 1) / 2)
    return 1 - 2 * float(((density[1:] + density[:-1]) / 2 * np.diff(xs)).sum())


def test_compare_is_welchs_t_test() -> None:
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(300):
        a = (rng.normal(0, 1, rng.integers(2, 8)) + rng.normal(0, 2)).tolist()
        b = rng.normal(0, rng.choice([0.3, 1, 3]), rng.integers(2, 8)).tolist()
        found, p = compare(mean_std(a), mean_std(b)), p_value(a, b)
        outcomes.add(found)
        if p > 0.05:
            assert found == "noise"
        elif p < 0.02:  # degrees of freedom are rounded down, which asks for a little more
            assert found == ("more" if np.mean(a) > np.mean(b) else "less")
    assert outcomes == {"noise", "more", "less"}
    assert compare(mean_std([0.5]), mean_std([0.1, 0.2])) == "one seed"


def test_two_standard_errors_are_not_enough_for_three_seeds() -> None:
    a, b = mean_std([0.0, 1.0, 2.0]), mean_std([2.0, 3.0, 4.0])  # difference 2, error 0.816
    assert compare(a, b) == "noise"
