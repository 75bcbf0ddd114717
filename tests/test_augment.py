"""Tests of augment.py: images and masks move together, and pixels stay what they are."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from augment import augment, take_batch, to_float
from config import load_config
from losses import LOSSES, weighted_loss
from metrics import confusion_matrices


def settings(**changes: object) -> dict:
    """The config with nothing switched on but what is given."""
    return load_config([]) | changes


def windows(crop: int, on_objects: float) -> dict:
    return settings(crop=crop, crop_on_objects=on_objects)


def speaking(
    count: int = 8, height: int = 12, width: int = 10, channels: int = 3
) -> tuple[Tensor, Tensor]:
    """Images whose channels tell row, column and class (and the image in the fourth)."""
    generator = torch.Generator().manual_seed(5)
    masks = torch.randint(4, (count, height, width), generator=generator, dtype=torch.uint8)
    rows = torch.arange(height, dtype=torch.uint8)[:, None].expand_as(masks)
    columns = torch.arange(width, dtype=torch.uint8).expand_as(masks)
    number = torch.arange(count, dtype=torch.uint8)[:, None, None].expand_as(masks)
    images = torch.stack([rows, columns, masks, number], dim=1)
    return images[:, :channels].contiguous(), masks


def noise(count: int, channels: int = 3, side: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    shape = (count, channels, side, side)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return images, torch.randint(4, (count, side, side), generator=generator, dtype=torch.uint8)


def back(images: Tensor) -> Tensor:
    """Floats in [0, 1] to the uint8 they came from; fails if they are none."""
    scaled = images * 255
    assert (scaled - scaled.round()).abs().max() < 1e-3
    return scaled.round().to(torch.uint8)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# ---- to_float


def test_to_float() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 4, 8, 8)
    before = images.clone()
    out = to_float(images)
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)
    np.testing.assert_allclose(out.numpy(), np.arange(256).reshape(1, 4, 8, 8) / 255, rtol=1e-7)


# ---- crops


@pytest.mark.parametrize("on_objects", [0.0, 0.5, 1.0])
def test_crop_cuts_the_same_window_out_of_image_and_mask(on_objects: float) -> None:
    images, masks = speaking(channels=4)
    index = torch.tensor([3, 3, 0, 7, 5])
    batch, mask = take_batch(images, masks, index, windows(6, on_objects))
    assert batch.shape == (5, 4, 6, 6) and mask.shape == (5, 6, 6)
    assert batch.dtype == mask.dtype == torch.uint8
    for image, part, i in zip(batch, mask, index.tolist(), strict=True):
        top, left = int(image[0, 0, 0]), int(image[1, 0, 0])
        window = np.s_[top : top + 6, left : left + 6]
        assert torch.equal(part, masks[i][window])
        assert torch.equal(image, images[i][(slice(None), *window)])
        assert (image[3] == i).all()


def test_crops_reach_every_place_of_the_image() -> None:
    images, masks = speaking(1, 6, 5)
    batch, _ = take_batch(images, masks, torch.zeros(300, dtype=torch.int64), windows(3, 0.0))
    corners = {(int(image[0, 0, 0]), int(image[1, 0, 0])) for image in batch}
    assert corners == {(top, left) for top in range(4) for left in range(3)}


def one_pixel_each(side: int = 8) -> tuple[Tensor, Tensor]:
    """As many images as pixels, each with one foreground pixel elsewhere."""
    masks = torch.eye(side * side, dtype=torch.uint8).view(-1, side, side) * 2
    return masks[:, None].expand(-1, 3, -1, -1).contiguous(), masks


@pytest.mark.parametrize("crop", [1, 3, 7])
def test_every_crop_on_objects_shows_one(crop: int) -> None:
    images, masks = one_pixel_each()
    batch, mask = take_batch(images, masks, torch.arange(64).repeat(3), windows(crop, 1.0))
    assert mask.shape == (192, crop, crop)
    assert ((mask == 2).sum(dim=(1, 2)) == 1).all()
    assert torch.equal(batch[:, 0], mask)


def test_object_lies_anywhere_in_its_crop() -> None:
    masks = torch.zeros(1, 9, 9, dtype=torch.uint8)
    masks[0, 4, 4] = 1
    images = masks[:, None].expand(-1, 3, -1, -1)
    _, mask = take_batch(images, masks, torch.zeros(300, dtype=torch.int64), windows(4, 1.0))
    counts = mask.sum(dim=0, dtype=torch.int64)
    assert counts.sum() == 300
    assert counts.min() >= 5  # about 19 each


def test_share_of_crops_on_objects() -> None:
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[0, 0, 0] = 1  # by chance only one crop in 3,600 shows it
    images = masks[:, None].expand(-1, 3, -1, -1)
    _, mask = take_batch(images, masks, torch.zeros(400, dtype=torch.int64), windows(5, 0.3))
    assert 80 < int(mask.flatten(1).any(dim=1).sum()) < 160  # 120 ± 9


def test_every_foreground_pixel_is_as_likely() -> None:
    masks = torch.zeros(1, 40, 40, dtype=torch.uint8)
    masks[0, :2, :2], masks[0, 30:32, 30:32] = 1, 3
    images = masks[:, None].expand(-1, 3, -1, -1)
    _, mask = take_batch(images, masks, torch.zeros(300, dtype=torch.int64), windows(4, 1.0))
    first, second = (int((mask == c).flatten(1).any(dim=1).sum()) for c in (1, 3))
    assert first + second == 300
    assert 110 < first < 190


def test_crop_on_objects_of_an_empty_image() -> None:
    images, masks = speaking()
    masks.zero_()
    batch, mask = take_batch(images, masks, torch.arange(8), windows(6, 1.0))
    assert batch.shape == (8, 3, 6, 6)
    assert not mask.any()


@pytest.mark.parametrize("crop", [0, 10, 11, 999])
@pytest.mark.parametrize("on_objects", [0.0, 1.0])
def test_crop_of_the_image_or_more_is_the_whole(crop: int, on_objects: float) -> None:
    images, masks = speaking()
    index = torch.tensor([2, 0, 2])
    batch, mask = take_batch(images, masks, index, windows(crop, on_objects))
    assert torch.equal(batch, images[index])
    assert torch.equal(mask, masks[index])


# ---- flips


def test_nothing_switched_on_changes_nothing() -> None:
    images, masks = speaking(channels=4)
    out, mask = augment(images, masks, settings())
    assert torch.equal(out, to_float(images))
    assert torch.equal(mask, masks)


@pytest.mark.parametrize(("key", "axis"), [("vertical_flip", 1), ("horizontal_flip", 2)])
def test_certain_flip(key: str, axis: int) -> None:
    images, masks = speaking(channels=4)
    once, mask = augment(images, masks, settings(**{key: 1.0}))
    assert np.array_equal(back(once).numpy(), np.flip(images.numpy(), axis + 1))
    assert np.array_equal(mask.numpy(), np.flip(masks.numpy(), axis))
    twice, mask = augment(back(once), mask, settings(**{key: 1.0}))
    assert torch.equal(back(twice), images)
    assert torch.equal(mask, masks)


def test_flips_are_drawn_for_each_image_and_move_the_mask_along() -> None:
    images, masks = speaking(400)
    out, mask = augment(images, masks, settings(vertical_flip=0.3, horizontal_flip=0.5))
    out = back(out)
    assert torch.equal(out[:, 2], mask)
    kinds = {(False, False): 0, (False, True): 0, (True, False): 0, (True, True): 0}
    for image, part, whole in zip(out, mask, masks, strict=True):
        upside_down, mirrored = bool(image[0, 0, 0] > 0), bool(image[1, 0, 0] > 0)
        axes = [axis for axis, flipped in enumerate((upside_down, mirrored)) if flipped]
        assert torch.equal(part, whole.flip(axes))
        kinds[upside_down, mirrored] += 1
    for (upside_down, _), count in kinds.items():  # independent: 0.15 or 0.35 of 400, ± 4 σ
        assert abs(count - (60 if upside_down else 140)) < 40


# ---- blur


def widths(blurred: Tensor) -> list[float]:
    """Standard deviation of the Gaussian that made each blurred impulse.

    The row through the middle goes like exp(−x²/2σ²): log of middle over neighbour is 1/2σ².
    """
    middle = blurred.shape[-1] // 2
    peak, beside = blurred[:, 0, middle, middle], blurred[:, 0, middle, middle + 1]
    return [
        math.sqrt(0.5 / math.log(a / b))
        for a, b in zip(peak.tolist(), beside.tolist(), strict=True)
    ]


def impulses(count: int, side: int = 11) -> tuple[Tensor, Tensor]:
    images = torch.zeros(count, 3, side, side, dtype=torch.uint8)
    images[:, :, side // 2, side // 2] = 255
    return images, torch.ones(count, side, side, dtype=torch.uint8)


def test_sigma_is_drawn_for_each_image_over_its_range() -> None:
    images, masks = impulses(100)
    config = settings(blur=1.0, blur_kernel=7, blur_sigma=[0.5, 2.0])
    drawn = widths(augment(images, masks, config)[0])
    assert len({round(sigma, 4) for sigma in drawn}) > 90
    assert 0.499 < min(drawn) < 0.6 and 1.9 < max(drawn) < 2.001
    assert np.mean(drawn) == pytest.approx(1.25, abs=0.2)  # uniform: ± 0.04


@pytest.mark.parametrize("sigma", [0.1, 0.8, 5.0])
@pytest.mark.parametrize("kernel", [3, 5])
def test_blur_is_torchvisions_and_leaves_masks_alone(sigma: float, kernel: int) -> None:
    images, masks = noise(3)
    config = settings(blur=1.0, blur_kernel=kernel, blur_sigma=[sigma, sigma])
    out, mask = augment(images, masks.clone(), config)
    expected = reference.gaussian_blur(images.float() / 255, kernel, sigma)
    torch.testing.assert_close(out, expected)
    assert torch.equal(mask, masks)


def test_blur_reaches_as_far_as_its_kernel() -> None:
    images, masks = impulses(1)
    out, _ = augment(images, masks, settings(blur=1.0, blur_kernel=5, blur_sigma=[9.0, 9.0]))
    touched = out[0, 0] > 0
    assert touched[3:8, 3:8].all() and touched.sum() == 25
    assert out[0, 0].sum().item() == pytest.approx(1)


def test_share_of_blurred_images() -> None:
    images, masks = impulses(400)
    out, _ = augment(images, masks, settings(blur=0.3, blur_sigma=[1.0, 1.0]))
    changed = (out != to_float(images)).flatten(1).any(dim=1)
    assert 80 < int(changed.sum()) < 160  # 120 ± 9


# ---- colour jitter


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_jitter_changes_colours_and_neither_mask_nor_alpha(channels: int) -> None:
    images, masks = noise(6, channels)
    out, mask = augment(images, masks.clone(), settings(jitter=1.0))
    plain = to_float(images)
    assert torch.equal(mask, masks)
    assert torch.equal(out[:, 3:], plain[:, 3:])
    assert (out[:, :3] != plain[:, :3]).flatten(1).any(dim=1).all()


def test_jitter_is_drawn_for_each_image() -> None:
    image, mask = noise(1)
    images, masks = image.expand(300, -1, -1, -1), mask.expand(300, -1, -1)
    out, _ = augment(images, masks, settings(jitter=0.5, jitter_strength=[0.3, 0.0, 0.0, 0.0]))
    factors = (out.mean(dim=(1, 2, 3)) / to_float(image).mean()).tolist()  # of brightness
    changed = [factor for factor in factors if abs(factor - 1) > 1e-6]
    assert 110 < len(changed) < 190
    assert len({round(factor, 5) for factor in changed}) > 100
    assert 0.699 < min(changed) < 0.8 and 1.15 < max(changed) < 1.301


def test_no_strength_no_change() -> None:
    images, masks = noise(3)
    out, _ = augment(images, masks, settings(jitter=1.0, jitter_strength=[0.0] * 4))
    assert torch.equal(out, to_float(images))


# ---- all of it


def everything(**changes: object) -> dict:
    on = {"horizontal_flip": 0.5, "vertical_flip": 0.5, "blur": 0.7, "jitter": 0.7}
    return settings(**on, jitter_strength=[0.9, 0.9, 0.9, 0.5], **changes)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_what_comes_out(channels: int) -> None:
    images, masks = noise(20, channels)
    images[:5], images[5:10] = 255, 0
    before = images.clone(), masks.clone()
    batch, mask = take_batch(images, masks, torch.arange(20), windows(8, 0.5))
    batch, mask = augment(batch, mask, everything())
    assert batch.shape == (20, channels, 8, 8) and mask.shape == (20, 8, 8)
    assert batch.dtype == torch.float32 and mask.dtype == torch.uint8
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.isfinite(batch).all()
    assert batch.min() >= -1e-6 and batch.max() <= 1 + 1e-6  # a blur of white may round up
    assert torch.equal(images, before[0]) and torch.equal(masks, before[1])


def test_the_seed_decides() -> None:
    images, masks = noise(10)
    runs = []
    for number in (1, 1, 2):
        torch.manual_seed(number)
        batch, mask = take_batch(images, masks, torch.arange(10), windows(8, 0.5))
        runs.append(augment(batch, mask, everything()))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[2][0])


def test_colour_and_blur_do_not_disturb_each_others_images() -> None:
    """An image that is drawn for nothing comes out bit for bit, whatever its neighbours get."""
    images, masks = noise(200)
    out, mask = augment(images, masks, settings(blur=0.3, jitter=0.3))
    same = (out == to_float(images)).flatten(1).all(dim=1)
    assert 60 < int(same.sum()) < 140  # 0.49 of 200
    assert torch.equal(mask, masks)


@pytest.mark.parametrize("key", ["horizontal_flip", "vertical_flip"])
def test_flip_of_one_image_of_odd_size(key: str) -> None:
    images, masks = speaking(1, 7, 5)
    out, mask = augment(images, masks, settings(**{key: 1.0}))
    assert torch.equal(back(out)[:, 2], mask)
    assert not torch.equal(mask, masks)


class NoWaiting(TorchDispatchMode):
    """Refuse operations on large tensors that make the host wait for a GPU's result."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, on_device = str(function), [a for a in args if isinstance(a, Tensor) and a.dim() > 1]
        waits = ("nonzero", "bincount", "_local_scalar_dense", "masked_select", "unique")
        assert not (on_device and any(word in name for word in waits)), name
        if "index.Tensor" in name:
            assert all(i is None or i.dtype != torch.bool for i in args[1]), name
        return function(*args, **(kwargs or {}))


def test_no_step_waits_for_a_gpu() -> None:
    images, masks = speaking(count=6)
    with NoWaiting():
        batch = take_batch(images, masks, torch.arange(6), windows(6, 0.5))
        batch, mask = augment(*batch, everything())
        confusion_matrices(mask.long(), mask, 4)
        logits = torch.zeros(6, 4, 6, 6, requires_grad=True)
        weighted_loss(logits, mask, dict.fromkeys(LOSSES, 1.0)).backward()
