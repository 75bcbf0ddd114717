"""Tests of metrics.py: counts against a plain loop, and every score against its definition."""

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import metrics
from metrics import (
    IGNORE,
    boundary_matrices,
    confusion_matrices,
    interval,
    iou,
    lost_positions,
    mean_std,
    scores,
    t_quantile,
    welch,
)

CLASSES = ["background", "square", "triangle", "circle"]


def draw_pair(seed: int, classes: int = 4, ignored: float = 0.2) -> tuple[Tensor, Tensor]:
    """Draw a prediction (int64) and a mask (uint8): half of the pixels right, a share ignored."""
    shape = (6, 5, 7)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(classes, shape, generator=generator)
    guess = torch.randint(classes, shape, generator=generator)
    is_right = torch.rand(shape, generator=generator) < 0.5
    prediction = torch.where(is_right, mask, guess)
    mask[torch.rand(shape, generator=generator) < ignored] = IGNORE
    return prediction, mask.to(torch.uint8)


def split_matrix(prediction: Tensor, mask: Tensor) -> Tensor:
    return confusion_matrices(prediction, mask, len(CLASSES)).sum(dim=0)


# ---- the confusion matrix


@pytest.mark.parametrize("ignored", [0, 0.3, 1])
@pytest.mark.parametrize("classes", [2, 4, 7, 255])  # 255²: more than the mask's type can hold
def test_each_image_is_counted_as_by_a_loop(classes: int, ignored: float) -> None:
    prediction, mask = draw_pair(classes, classes, ignored)
    matrices = confusion_matrices(prediction, mask, classes)
    assert matrices.dtype == torch.int64
    counts = np.zeros((len(mask), classes, classes), int)
    for n, y, x in np.ndindex(*mask.shape):
        if mask[n, y, x] != 255:
            counts[n, int(mask[n, y, x]), int(prediction[n, y, x])] += 1
    assert matrices.tolist() == counts.tolist()


def test_chunks_are_small_and_hold_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    prediction, mask = draw_pair(0)  # 35 pixels an image
    for pixels, sizes in ((80, [2, 2, 2]), (140, [4, 2]), (1, [1] * 6)):
        monkeypatch.setattr(metrics, "CHUNK", pixels)
        pairs = list(metrics.chunks(prediction, mask))
        assert [len(predicted) for predicted, _ in pairs] == sizes
        assert torch.equal(torch.cat([true for _, true in pairs]), mask)


# ---- the scores


def by_sets(prediction: Tensor, mask: Tensor, c: int) -> tuple[float, float]:
    """Compute IoU and Dice of a class as ratios of sets of pixels."""
    true_classes = mask.flatten().tolist()
    predicted_classes = prediction.flatten().tolist()
    counted = [i for i, true in enumerate(true_classes) if true != 255]
    true = {i for i in counted if true_classes[i] == c}
    predicted = {i for i in counted if predicted_classes[i] == c}
    both = len(true & predicted)
    return both / len(true | predicted), 2 * both / (len(true) + len(predicted))


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_their_definitions(seed: int) -> None:
    prediction, mask = draw_pair(seed)
    result = scores(split_matrix(prediction, mask), CLASSES)
    ious = [by_sets(prediction, mask, c)[0] for c in range(4)]
    dices = [by_sets(prediction, mask, c)[1] for c in range(4)]
    assert list(result["per_class_iou"]) == CLASSES
    assert list(result["per_class_iou"].values()) == pytest.approx(ious)
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
    ious = {"background": 8 / 10, "square": 5 / 12, "triangle": None, "circle": 10 / 15}
    assert result["per_class_iou"] == pytest.approx(ious)
    assert result["mean_iou"] == pytest.approx((8 / 10 + 5 / 12 + 10 / 15) / 3)
    assert result["mean_iou_foreground"] == pytest.approx((5 / 12 + 10 / 15) / 2)
    assert result["mean_dice"] == pytest.approx((16 / 18 + 10 / 17 + 20 / 25) / 3)
    assert result["dead_classes"] == []


def test_dead_classes_are_in_the_masks_and_never_predicted() -> None:
    result = scores(torch.tensor([[8, 0, 0, 0], [3, 0, 0, 1], [0] * 4, [0, 0, 0, 2]]), CLASSES)
    assert result["dead_classes"] == ["square"]
    assert result["per_class_iou"]["square"] == 0
    assert result["per_class_iou"]["triangle"] is None  # in no mask


def test_class_predicted_but_in_no_mask_scores_zero_and_is_not_dead() -> None:
    result = scores(torch.tensor([[8, 0, 2, 0], [0] * 4, [0] * 4, [0] * 4]), CLASSES)
    assert list(result["per_class_iou"].values()) == [0.8, None, 0, None]
    assert result["mean_iou"] == pytest.approx(0.4)
    assert result["dead_classes"] == []


def test_lost_positions_of_each_two_by_two_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CHUNK", 800)  # counted two images at a time
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(4, (6, 20, 20), generator=generator).to(torch.uint8)
    mask[torch.rand(6, 20, 20, generator=generator) < 0.2] = IGNORE
    prediction = mask.where(mask != IGNORE, 0)
    prediction[:, ::2][mask[:, ::2] == 1] = 0  # squares are predicted in odd rows only
    prediction[:, 1::2, ::2][mask[:, 1::2, ::2] == 3] = 2  # circles are lost at one position
    assert lost_positions(prediction, mask, CLASSES) == {"square": 2, "circle": 1}
    prediction[:, 1::2][mask[:, 1::2] == 1] = 0  # now squares are never predicted: no stripes
    assert lost_positions(prediction, mask, CLASSES) == {"circle": 1}
    prediction[:, 1::4, ::2][mask[:, 1::4, ::2] == 3] = 3  # found again at half of that position
    assert lost_positions(prediction, mask, CLASSES) == {"circle": 0.5}
    assert lost_positions(prediction[:1], mask[:1], CLASSES) == {}  # of too few pixels to tell


def test_a_position_is_lost_below_one_level_and_known_above_another() -> None:
    def stripes(here: int, elsewhere: int) -> dict[str, float]:
        """Lost positions if so many of 100 pixels are right at (0, 0), and at each other place."""
        mask = torch.ones(1, 40, 40, dtype=torch.uint8)
        prediction = torch.zeros_like(mask)
        for top, left in np.ndindex(4, 4):
            number = here if (top, left) == (0, 0) else elsewhere
            right = (torch.arange(100) < number).view(10, 10).to(torch.uint8)
            prediction[0, top::4, left::4] = right
        return lost_positions(prediction, mask, CLASSES)

    assert stripes(here=4, elsewhere=51) == {"square": 0.25}  # IoU 0.04 and 0.51
    assert stripes(here=5, elsewhere=51) == {} and stripes(here=4, elsewhere=50) == {}


def test_all_ignored() -> None:
    prediction, mask = draw_pair(0, ignored=1)
    result = scores(split_matrix(prediction, mask), CLASSES)
    assert result["pixel_accuracy"] is result["mean_iou"] is result["mean_dice"] is None
    assert result["mean_iou_foreground"] is None
    assert list(result["per_class_iou"].values()) == [None] * 4
    assert result["dead_classes"] == []


# ---- boundaries


def slow_band(labels: np.ndarray, c: int) -> np.ndarray:
    """Mark the pixels of class c at most two rows and columns from another or from outside."""
    padded = np.pad(labels, ((0, 0), (2, 2), (2, 2)), constant_values=254)
    band = np.zeros(labels.shape, bool)
    for n, y, x in np.ndindex(*labels.shape):
        window = padded[n, y : y + 5, x : x + 5]
        band[n, y, x] = labels[n, y, x] == c and (window != c).any()
    return band


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])  # of a prediction
def test_boundary_iou_is_the_iou_of_inner_bands(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(3, (2, 3, 2, 3), generator=generator, dtype=torch.uint8)
    mask, prediction = blocks.repeat_interleave(7, 2).repeat_interleave(7, 3)  # 14×21 each
    mask[0, 3:5, 4:9] = IGNORE
    prediction[1, 4, 15] = 1  # a single wrong pixel
    matrices = boundary_matrices(prediction.to(dtype), mask, 4)
    assert matrices.shape == (3, 5, 5)
    ious = iou(matrices.sum(dim=0))[:-1].tolist()
    seen = np.where(mask.numpy() == 255, 255, prediction.numpy())
    for c in range(3):
        predicted_band = slow_band(seen, c)
        true_band = slow_band(mask.numpy(), c)
        overlap = (predicted_band & true_band).sum()
        union = (predicted_band | true_band).sum()
        assert ious[c] == pytest.approx(overlap / union)
    assert math.isnan(ious[3])  # a class without a band


# ---- statistics over seeds


def test_mean_and_standard_deviation() -> None:
    stat = mean_std([0.5, 0.7, 0.9])
    assert stat["mean"] == pytest.approx(0.7) and stat["std"] == pytest.approx(0.2)
    assert stat["n"] == 3
    assert mean_std([0.5])["std"] is None
    assert mean_std([0.5, None]) is None


def p_value(t: float, df: float) -> float:
    """Compute the two-sided p of Student's t by adding up its density."""
    xs = np.linspace(0, t, 20_001)
    log_factor = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2
    density = np.exp(log_factor - (df + 1) / 2 * np.log1p(xs**2 / df))
    return 1 - 2 * float(((density[1:] + density[:-1]) / 2 * np.diff(xs)).sum())


def test_quantiles_leave_five_percent_outside() -> None:
    for df in (1, 1.3, 2, 3.95, 10, 120):
        assert p_value(t_quantile(df), df) == pytest.approx(0.05, abs=1e-5), df
    assert t_quantile(1) == pytest.approx(12.706, abs=1e-3)  # as printed in tables
    assert t_quantile(120) == pytest.approx(1.980, abs=1e-3)


def test_welch_agrees_with_the_p_value() -> None:
    rng = np.random.default_rng(0)
    verdicts = set()
    for _ in range(300):
        a = (rng.normal(0, 1, rng.integers(2, 8)) + rng.normal(0, 2)).tolist()
        b = rng.normal(0, rng.choice([0.3, 1, 3]), rng.integers(2, 8)).tolist()
        va = np.var(a, ddof=1) / len(a)
        vb = np.var(b, ddof=1) / len(b)
        difference = np.mean(a) - np.mean(b)
        df = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
        p = p_value(abs(difference) / math.sqrt(va + vb), df)
        result = welch(a, b)
        verdicts.add(result.verdict)
        assert result.difference == pytest.approx(difference)
        if p > 0.05:
            assert result.verdict == "noise"
        else:
            assert result.verdict == ("more" if difference > 0 else "less")
    assert verdicts == {"noise", "more", "less"}


def test_welch_margin_is_half_the_interval_of_the_difference() -> None:
    result = welch([0.0, 1.0, 2.0], [2.0, 3.0, 4.0])  # standard error √(1/3 + 1/3), 4 df
    assert result.verdict == "noise"
    assert result.difference == -2
    assert result.margin == pytest.approx(2.776 * math.sqrt(2 / 3), abs=1e-3)  # a printed table's


def test_welch_of_one_seed_and_of_equal_values() -> None:
    result = welch([0.5], [0.4, 0.4])
    assert result.verdict == "one seed" and result.margin is None
    assert result.difference == pytest.approx(0.1)
    assert welch([0.4, 0.4], [0.5]).verdict == "one seed"
    assert welch([0.5] * 3, [0.5] * 3).verdict == "noise"  # exactly, without rounding
    assert welch([0.75] * 3, [0.5] * 3).verdict == "more"
    x = 0.4049341374504143  # means of three and of ten such values differ in the last digit
    assert welch([x] * 3, [x] * 10).verdict == "noise"


# ---- statistics over groups of images


def test_interval_is_the_spread_of_repeated_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    right = torch.randint(1000, (40,), generator=generator).tolist()  # of 1000 background pixels
    matrices = torch.tensor([[[count, 1000 - count], [0, 1000]] for count in right])
    rng = np.random.default_rng(1)
    means = []
    for _ in range(4000):
        drawn = rng.integers(40, size=40)
        share = sum(right[i] for i in drawn) / 40_000
        means.append((share + 1 / (2 - share)) / 2)  # the IoU of both classes
    expected = np.quantile(means, (0.025, 0.975))
    assert interval(matrices) == pytest.approx(expected, abs=0.005)
    assert interval(matrices) == interval(matrices)
    assert interval(0 * matrices) == [0, 0]  # all ignored: no NaN in JSON


def test_no_interval_of_fewer_than_five_groups() -> None:
    matrices = torch.randint(1, 9, (5, 2, 2), generator=torch.Generator().manual_seed(0))
    assert interval(matrices[:4]) is None
    low, high = interval(matrices)
    assert low < high
    matrices[1:, 1] = 0  # the second class is in one group alone: most draws would lack it
    assert interval(matrices) is None
    matrices[0, 1] = 0  # in none: it is no class of these groups
    assert interval(matrices) is not None
    all_classes = torch.randint(1, 9, (5, 2, 2), generator=torch.Generator().manual_seed(0))
    absent_third = torch.nn.functional.pad(all_classes, (0, 1, 0, 1))
    assert interval(absent_third) == pytest.approx(interval(all_classes))
