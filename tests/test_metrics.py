"""Tests of metrics.py: counting against a double loop, and every score against its definition."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from losses import IGNORE, weighted_loss
from metrics import EVALUATION_BATCH, confusion_matrix, evaluate, in_batches, scores

CLASSES = ["background", "square", "triangle", "circle"]
COLOURS = {name: [i, i, i] for i, name in enumerate(CLASSES)}
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


# ---- over a whole split


class Net(nn.Module):
    """Batch norm and dropout: both must be in evaluation mode, else a batch shows in the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout2d(0.5), nn.Conv2d(8, 4, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.float32
        return self.layers(images)


def split(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 3, 6, 5), generator=generator, dtype=torch.uint8)
    masks = torch.randint(4, (count, 6, 5), generator=generator, dtype=torch.uint8)
    masks[torch.rand(masks.shape, generator=generator) < 0.1] = IGNORE
    return images, masks


@pytest.mark.parametrize("count", [1, EVALUATION_BATCH, 2 * EVALUATION_BATCH + 7])
def test_evaluate_is_the_same_as_at_once(count: int) -> None:
    torch.manual_seed(0)
    model = Net().train()
    before = [value.clone() for value in model.state_dict().values()]
    images, masks = split(count)
    config = {"classes": COLOURS, "loss": {"cross_entropy": 1.0, "dice_per_class": 0.5}}
    matrix, loss = evaluate(model, images, masks, config, torch.float32)
    assert not model.training
    for old, new in zip(before, model.state_dict().values(), strict=True):
        assert torch.equal(old, new)

    with torch.no_grad():
        logits = model(torch.from_numpy(images.numpy().astype(np.float32) / 255))
    assert matrix.tolist() == loop_matrix(logits.argmax(1), masks, 4)
    # The mean per image of the losses of the batches.
    expected = 0.0
    for start in range(0, count, EVALUATION_BATCH):
        part = slice(start, min(start + EVALUATION_BATCH, count))
        batch_loss = weighted_loss(logits[part], masks[part], config["loss"]).item()
        expected += batch_loss * (part.stop - part.start) / count
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("side", "sizes"), [(16, [32, 8]), (128, [32, 8]), (256, [8] * 5), (1024, [1] * 40)]
)
def test_batches_of_larger_images_hold_fewer(side: int, sizes: list[int]) -> None:
    images = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(40, 3, side, side)
    batches = list(in_batches(images, images[:, 0]))
    assert [len(batch) for batch, _ in batches] == [len(mask) for _, mask in batches] == sizes


def test_evaluate_leaves_no_gradients() -> None:
    model = Net()
    config = {"classes": COLOURS, "loss": {"cross_entropy": 1.0}}
    matrix, loss = evaluate(model, *split(3), config, torch.bfloat16)
    assert isinstance(loss, float) and not matrix.requires_grad
    assert all(p.grad is None for p in model.parameters())
