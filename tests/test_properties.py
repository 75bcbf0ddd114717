"""Properties that hold for every input, across modules: what the tests of each module leave open.

Elsewhere: sums of confusion matrices, Dice and IoU (test_metrics.py), bounds of the losses
(test_losses.py), a config that is written and read back (test_config.py).
"""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from augment import augment, take_batch, to_float
from config import PROBABILITIES, dump, load_config
from losses import IGNORE, LOSSES, weighted_loss
from metrics import confusion_matrix, scores
from model import UNet

ROOT = Path(__file__).parent.parent
DEFAULTS = load_config([ROOT / "configs/default.yaml"], [])
quick = {"deadline": None, "derandomize": True, "phases": [Phase.explicit, Phase.generate]}
few = settings(max_examples=20, **quick)
seeds = st.integers(0, 10_000)
sides = st.integers(1, 24)


def speaking(seed: int, count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Images that tell the class, row and column of each pixel, and their masks."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(4, (count, height, width), generator=generator, dtype=torch.uint8)
    rows = torch.arange(height, dtype=torch.uint8)[:, None].expand_as(masks)
    columns = torch.arange(width, dtype=torch.uint8).expand_as(masks)
    return torch.stack([masks, rows, columns], dim=1), masks


# ---- counting


@few
@given(seeds, st.integers(2, 9), st.permutations(range(9)))
def test_renaming_the_classes_permutes_matrix_and_scores(
    seed: int, classes: int, order: list[int]
) -> None:
    names = [name for name in order if name < classes]  # class i is called names[i] from now on
    generator = torch.Generator().manual_seed(seed)
    prediction, mask = torch.randint(classes, (2, 40), generator=generator)
    matrix = confusion_matrix(prediction, mask, classes)
    renamed = torch.tensor(names)
    again = confusion_matrix(renamed[prediction], renamed[mask], classes)
    assert torch.equal(again[renamed][:, renamed], matrix)
    labels = [str(i) for i in range(classes)]
    before, after = scores(matrix, labels), scores(again, labels)
    for i, name in enumerate(names):
        for key in ("per_class_iou", "per_class_dice"):
            assert after[key][str(name)] == before[key][str(i)]
    for key in ("mean_iou", "mean_dice", "pixel_accuracy"):
        assert after[key] == pytest.approx(before[key])


@few
@given(seeds, st.integers(2, 6))
def test_exchanging_truth_and_prediction_transposes_the_matrix(seed: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randint(classes, (2, 50), generator=generator)
    assert torch.equal(confusion_matrix(a, b, classes), confusion_matrix(b, a, classes).T)


@few
@given(seeds, st.integers(2, 6))
def test_a_pixel_put_right_raises_its_class(seed: int, classes: int) -> None:
    """The scores of both classes of a wrong pixel rise when it is put right, accuracy too."""
    generator = torch.Generator().manual_seed(seed)
    prediction, mask = torch.randint(classes, (2, 60), generator=generator)
    wrong = (prediction != mask).nonzero().flatten()
    better = prediction.clone()
    better[wrong[0]] = mask[wrong[0]]
    labels = [str(i) for i in range(classes)]
    before, after = (
        scores(confusion_matrix(p, mask, classes), labels) for p in (prediction, better)
    )
    assert after["pixel_accuracy"] > before["pixel_accuracy"]
    for key in ("per_class_iou", "per_class_dice"):
        true, guess = str(mask[wrong[0]].item()), str(prediction[wrong[0]].item())
        assert after[key][true] > before[key][true]
        assert (after[key][guess] or 0) >= before[key][guess]


# ---- losses


@settings(max_examples=8, **quick)
@given(
    seeds,
    st.dictionaries(st.sampled_from(list(LOSSES)), st.floats(0.1, 3), min_size=1),
    st.floats(0, 0.5),
)
def test_gradient_of_every_sum_of_losses_is_its_slope(
    seed: int, weights: dict[str, float], ignored: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.randint(3, (2, 2, 3), generator=generator)
    mask[torch.rand(mask.shape, generator=generator) < ignored] = IGNORE
    assert torch.autograd.gradcheck(lambda x: weighted_loss(x, mask, weights), (logits,))


# ---- crops and flips


@few
@given(
    seed=seeds,
    count=st.integers(1, 5),
    height=sides,
    width=sides,
    crop=st.integers(0, 30),
    on_objects=st.sampled_from([0.0, 0.5, 1.0]),
    flips=st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 2),
)
def test_image_and_mask_move_together_whatever_is_switched_on(
    seed: int,
    count: int,
    height: int,
    width: int,
    crop: int,
    on_objects: float,
    flips: tuple[float, float],
) -> None:
    images, masks = speaking(seed, count, height, width)
    config = DEFAULTS | {"crop": crop, "crop_on_objects": on_objects}
    config |= {"vertical_flip": flips[0], "horizontal_flip": flips[1]}
    torch.manual_seed(seed)
    index = torch.arange(count).flip(0)
    batch, mask = augment(*take_batch(images, masks, index, config), config)
    whole = crop == 0 or crop >= min(height, width)
    shape = (count, height, width) if whole else (count, crop, crop)
    assert mask.shape == shape and batch.shape == (count, 3, *shape[1:])
    told = (batch * 255).round().to(torch.uint8)
    assert torch.equal(told[:, 0], mask)
    for i, number in enumerate(index.tolist()):  # each pixel is one of its own image
        place = masks[number][told[i, 1].long(), told[i, 2].long()]
        assert torch.equal(place, mask[i])


@few
@given(seeds, sides, sides, st.sampled_from(["vertical_flip", "horizontal_flip"]))
def test_a_flip_twice_is_the_identity(seed: int, height: int, width: int, key: str) -> None:
    images, masks = speaking(seed, 2, height, width)
    config = DEFAULTS | {key: 1.0}
    once, mask = augment(images, masks, config)
    twice, mask = augment((once * 255).round().to(torch.uint8), mask, config)
    assert torch.equal(twice, to_float(images)) and torch.equal(mask, masks)


@few
@given(seeds, st.integers(3, 24), st.integers(3, 24), st.sampled_from([1, 3, 4]))
def test_blur_and_jitter_leave_the_mask_and_the_range(
    seed: int, height: int, width: int, channels: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = (2, channels, height, width)
    images = torch.randint(256, size, generator=generator, dtype=torch.uint8)
    masks = torch.randint(4, (2, height, width), generator=generator, dtype=torch.uint8)
    torch.manual_seed(seed)
    batch, mask = augment(images, masks, DEFAULTS | {"blur": 1.0, "jitter": 1.0})
    assert torch.equal(mask, masks) and batch.shape == images.shape
    assert batch.min() >= -1e-5 and batch.max() <= 1 + 1e-5


# ---- the model


@settings(max_examples=15, **quick)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    skip=st.sampled_from(["pooled", "full"]),
    depth=st.integers(1, 4),
    classes=st.integers(2, 5),
)
def test_output_has_the_size_of_any_input(
    height: int, width: int, skip: str, depth: int, classes: int
) -> None:
    decoder = [(3, 3)] * (depth + (skip == "full"))
    model = UNet(3, classes, [(2, 3)] * depth, decoder, skip, 0.0, "random").eval()
    with torch.inference_mode():
        logits = model(torch.rand(1, 3, height, width))
    assert logits.shape == (1, classes, height, width)
    assert torch.isfinite(logits).all()


# ---- configs


@few
@given(
    st.dictionaries(st.sampled_from(PROBABILITIES), st.floats(0, 1)),
    st.integers(0, 2**31 - 1),
    st.floats(1e-12, 1e3),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1),
)
def test_overrides_in_json_say_what_a_file_says(
    tmp_path_factory: pytest.TempPathFactory,
    probabilities: dict[str, float],
    seed: int,
    rate: float,
    name: str,
) -> None:
    values = {"name": name, "seed": seed, "learning_rate": rate, **probabilities}
    path = tmp_path_factory.getbasetemp() / "values.yaml"
    path.write_text(dump(values), encoding="utf-8")
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    assert load_config([path], []) == load_config([], overrides) == DEFAULTS | values
