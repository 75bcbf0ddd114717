"""Tests of augment.py: images and masks move together, and pixels stay what they are."""

import math
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from augment import augment, check_sizes, gaussian_blur, get_batch, jitter_some, take_batch
from common import UserError
from config import load_config
from data import to_float
from losses import LOSSES
from metrics import IGNORE, confusion_matrices


def settings(**changes: object) -> dict:
    """Load the config with nothing switched on but what is given."""
    return load_config([]) | changes


def labelled(count: int = 8, height: int = 12, width: int = 10) -> tuple[Tensor, Tensor]:
    """Make images whose four channels are row, column, class and number of the image."""
    generator = torch.Generator().manual_seed(5)
    masks = torch.randint(4, (count, height, width), generator=generator, dtype=torch.uint8)
    rows = torch.arange(height, dtype=torch.uint8)[:, None].expand_as(masks)
    columns = torch.arange(width, dtype=torch.uint8).expand_as(masks)
    number = torch.arange(count, dtype=torch.uint8)[:, None, None].expand_as(masks)
    return torch.stack([rows, columns, masks, number], dim=1), masks


def noise(count: int, channels: int = 3, side: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    shape = (count, channels, side, side)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return images, torch.randint(4, (count, side, side), generator=generator, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def torchvision() -> ModuleType:
    """Import torchvision's formulas here: only one of the processes of the tests waits for it."""
    from torchvision.transforms.v2 import functional

    return functional


# ---- crops


def crops_of(mask: Tensor, number: int, crop: int, on_objects: float) -> Tensor:
    """Crop one (H, W) mask so many times: (number, crop, crop)."""
    images, index = mask.expand(1, 3, -1, -1), torch.zeros(number, dtype=torch.int64)
    return take_batch(images, mask[None], index, settings(crop=crop, crop_on_objects=on_objects))[1]


@pytest.mark.parametrize("on_objects", [0.0, 0.5, 1.0])
def test_crop_cuts_the_same_window_out_of_image_and_mask(on_objects: float) -> None:
    images, masks = labelled()
    index = torch.tensor([3, 3, 0, 7, 5])
    batch, mask = take_batch(images, masks, index, settings(crop=6, crop_on_objects=on_objects))
    assert batch.shape == (5, 4, 6, 6) and mask.shape == (5, 6, 6)
    assert batch.dtype == mask.dtype == torch.uint8
    for image, part, i in zip(batch, mask, index.tolist(), strict=True):
        top, left = int(image[0, 0, 0]), int(image[1, 0, 0])
        window = np.s_[top : top + 6, left : left + 6]
        assert torch.equal(part, masks[i][window])
        assert torch.equal(image, images[i][(slice(None), *window)])


def test_crops_reach_every_place_of_the_image() -> None:
    places = torch.arange(30, dtype=torch.uint8).view(6, 5)  # row · 5 + column
    corners = crops_of(places, 300, crop=3, on_objects=0.0)[:, 0, 0]
    every_place = {5 * top + left for top in range(4) for left in range(3)}
    assert {*corners.tolist()} == every_place
    padded = F.pad(places, (0, 3, 0, 2), value=IGNORE)  # as images of several sizes are
    corners = crops_of(padded, 300, crop=3, on_objects=0.0)[:, 0, 0]
    assert {*corners.tolist()} == every_place


@pytest.mark.parametrize("crop", [1, 3, 7])
def test_every_crop_on_objects_shows_one(crop: int) -> None:
    masks = torch.eye(64, dtype=torch.uint8).view(-1, 8, 8) * 2  # one foreground pixel each
    config = settings(crop=crop, crop_on_objects=1.0)
    _, mask = take_batch(masks[:, None], masks, torch.arange(64).repeat(3), config)
    assert ((mask == 2).sum(dim=(1, 2)) == 1).all()


@pytest.mark.parametrize(
    ("value", "share", "low", "high"),
    [(1, 0.3, 80, 160), (IGNORE, 1.0, 0, 5), (0, 1.0, 0, 0)],  # 120 ± 9; no object: at random
)
def test_share_of_crops_on_objects(value: int, share: float, low: int, high: int) -> None:
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[0, 0] = value  # by chance only one crop in 3,600 shows it
    found = crops_of(mask, 400, crop=5, on_objects=share).flatten(1).any(dim=1)
    assert low <= int(found.sum()) <= high


def test_every_foreground_pixel_is_as_likely_and_lies_anywhere_in_its_crop() -> None:
    mask = torch.zeros(40, 40, dtype=torch.uint8)
    mask[4, 4], mask[30, 30] = 1, 3
    crops = crops_of(mask, 600, crop=4, on_objects=1.0)
    first, second = ((crops == c).sum(dim=0) for c in (1, 3))
    assert first.sum() + second.sum() == 600 and 240 < first.sum() < 360  # 300 ± 12
    assert min(first.min(), second.min()) >= 5  # about 19 at each place


@pytest.mark.parametrize("crop", [0, 10, 999])
def test_crop_of_the_image_or_more_is_the_whole(crop: int) -> None:
    images, masks = labelled()
    index = torch.tensor([2, 0, 2])
    batch, mask = take_batch(images, masks, index, settings(crop=crop, crop_on_objects=0.5))
    assert torch.equal(batch, images[index]) and torch.equal(mask, masks[index])


# ---- flips


def test_each_image_is_flipped_by_itself_and_its_mask_with_it() -> None:
    images, masks = labelled(400)
    out, mask = augment(images, masks, settings(vertical_flip=0.3, horizontal_flip=0.5))
    kinds = {(False, False): 0, (False, True): 0, (True, False): 0, (True, True): 0}
    for image, part, plain, whole in zip(out, mask, images, masks, strict=True):
        upside_down, mirrored = bool(image[0, 0, 0] > 0), bool(image[1, 0, 0] > 0)
        axes = [axis for axis, flipped in ((-2, upside_down), (-1, mirrored)) if flipped]
        assert torch.equal(image, plain.flip(axes) / 255)
        assert torch.equal(part, whole.flip(axes))
        kinds[upside_down, mirrored] += 1
    for (upside_down, _), count in kinds.items():  # independent: 0.15 or 0.35 of 400, ± 4 σ
        assert abs(count - (60 if upside_down else 140)) < 40


# ---- blur


def test_sigma_is_chosen_for_each_image_over_its_range() -> None:
    images = torch.zeros(200, 3, 11, 11, dtype=torch.uint8)
    images[:, :, 5, 5] = 255
    config = settings(blur=0.5, blur_kernel=7, blur_sigma=[0.5, 2.0])
    out, _ = augment(images, images[:, 0], config)
    blurred = out[(out != to_float(images)).flatten(1).any(dim=1), 0, 5]
    assert 70 < len(blurred) < 130  # 100 ± 7; the others stay bit for bit
    # The row through the middle goes like exp(−x²/2σ²): log of middle over neighbour is 1/2σ².
    sigmas = [math.sqrt(0.5 / math.log(row[5] / row[6])) for row in blurred.tolist()]
    assert len({round(sigma, 4) for sigma in sigmas}) > 0.9 * len(sigmas)
    assert 0.499 < min(sigmas) < 0.6 and 1.9 < max(sigmas) < 2.001
    assert np.mean(sigmas) == pytest.approx(1.25, abs=0.2)  # uniform: ± 0.04


@pytest.mark.parametrize("kernel", [3, 5])
def test_blur_of_a_batch_is_torchvisions_blur_of_each_image(
    torchvision: ModuleType, kernel: int
) -> None:
    images = torch.rand(3, 4, 9, 12)
    sigmas = [0.1, 0.8, 5.0]
    blurred = gaussian_blur(images, kernel, torch.tensor(sigmas))
    for image, sigma, out in zip(images, sigmas, blurred, strict=True):
        expected = torchvision.gaussian_blur(image, [kernel, kernel], [sigma, sigma])
        torch.testing.assert_close(out, expected)


def test_blur_leaves_masks_alone(torchvision: ModuleType) -> None:
    images, masks = noise(3)
    config = settings(blur=1.0, blur_kernel=5, blur_sigma=[0.8, 0.8])
    out, mask = augment(images, masks.clone(), config)
    expected = torchvision.gaussian_blur(images / 255, [5, 5], [0.8, 0.8])
    torch.testing.assert_close(out, expected)
    assert torch.equal(mask, masks)


def test_masks_are_blurred_as_the_lab_blurred_them(torchvision: ModuleType) -> None:
    images, masks = noise(6)
    masks[:, :3] = IGNORE
    config = settings(blur=1.0, blur_kernel=5, blur_sigma=[1.5, 1.5], blur_masks=True)
    before = masks.clone()
    _, blurred = augment(images, masks, config)
    assert torch.equal(masks, before)  # those of the caller
    for mask, out in zip(masks, blurred, strict=True):
        channels = torch.stack([(mask == c).float() for c in range(4)])
        expected = torchvision.gaussian_blur(channels, [5, 5], [1.5, 1.5]).argmax(dim=0)
        expected[mask == IGNORE] = IGNORE
        agree = (out == expected).float().mean()
        assert agree > 0.99  # where two classes are equally strong, rounding decides
        assert (out != mask).float().mean() > 0.3


def test_batch_may_have_no_image_to_blur() -> None:
    images, masks = noise(3)
    out, mask = augment(images, masks, settings(blur=1e-9, blur_masks=True))
    assert torch.equal(out, to_float(images)) and torch.equal(mask, masks)


def test_only_blurred_images_get_blurred_masks() -> None:
    images, masks = noise(200)
    out, blurred = augment(images, masks, settings(blur=0.5, blur_masks=True))
    image_changed = (out != to_float(images)).flatten(1).any(dim=1)
    mask_changed = (blurred != masks).flatten(1).any(dim=1)
    assert 70 < int(mask_changed.sum()) < 130
    assert not (mask_changed & ~image_changed).any()


# ---- colour jitter


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_jitter_changes_colours_and_neither_mask_nor_alpha(channels: int) -> None:
    images, masks = noise(6, channels)
    out, mask = augment(images, masks.clone(), settings(jitter=1.0))
    plain = to_float(images)
    assert torch.equal(mask, masks)
    assert torch.equal(out[:, 3:], plain[:, 3:])
    assert (out[:, :3] != plain[:, :3]).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_jitter_of_a_batch_is_torchvisions_of_each_image(
    torchvision: ModuleType, channels: int
) -> None:
    images = torch.rand(40, channels, 7, 9)
    images[:5, :, 0] = 0.5  # grey
    images[5:10, :, 1] = images[5:10, :, 1].round()  # black, white and full colours
    plain = images.clone()
    torch.manual_seed(3)
    jitter_some(images, settings(jitter=1.0, jitter_strength=[0.3, 0.4, 0.5, 0.2]))
    torch.manual_seed(3)
    torch.rand(40)  # which images: all
    draws = 2 * torch.rand(4, 40) - 1
    for i in range(40):
        brightness, contrast, saturation, hue = draws[:, i].tolist()
        expected = torchvision.adjust_brightness(plain[i, :3], 1 + 0.3 * brightness)
        expected = torchvision.adjust_contrast(expected, 1 + 0.4 * contrast)
        if channels > 1:
            expected = torchvision.adjust_saturation(expected, 1 + 0.5 * saturation)
            expected = torchvision.adjust_hue(expected, 0.2 * hue)
        torch.testing.assert_close(images[i, :3], expected, rtol=0, atol=2e-5)


def test_jitter_is_chosen_for_each_image() -> None:
    image, mask = noise(1)
    images, masks = image.expand(300, -1, -1, -1), mask.expand(300, -1, -1)
    out, _ = augment(images, masks, settings(jitter=0.5, jitter_strength=[0.3, 0.0, 0.0, 0.0]))
    factors = (out.mean(dim=(1, 2, 3)) / to_float(image).mean()).tolist()  # of brightness
    changed = [factor for factor in factors if abs(factor - 1) > 1e-6]
    assert 110 < len(changed) < 190
    assert len({round(factor, 5) for factor in changed}) > 100
    assert 0.699 < min(changed) < 0.8 and 1.15 < max(changed) < 1.301


# ---- everything at once


def everything() -> dict:
    on = {"horizontal_flip": 0.5, "vertical_flip": 0.5, "blur": 0.7, "jitter": 0.7}
    on |= {"crop": 8, "crop_on_objects": 0.5, "jitter_strength": [0.9, 0.9, 0.9, 0.5]}
    return settings(**on)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_shapes_types_range_and_untouched_input(channels: int) -> None:
    images, masks = noise(20, channels)
    images[:5], images[5:10] = 255, 0
    before = images.clone(), masks.clone()
    cpu = torch.device("cpu")
    batch, mask = get_batch(images, masks, torch.arange(20), cpu, everything())
    assert batch.shape == (20, channels, 8, 8) and mask.shape == (20, 8, 8)
    assert batch.dtype == torch.float32 and mask.dtype == torch.uint8
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert batch.min() >= -1e-6 and batch.max() <= 1 + 1e-6  # a blur of white may round up
    assert torch.equal(images, before[0]) and torch.equal(masks, before[1])


@pytest.mark.parametrize(
    ("values", "smallest_batch", "says"),
    [
        ({"blur": 0.1, "blur_kernel": 31, "crop": 15}, 8, "blur_kernel: 31 is too large"),
        ({"blur": 0.1, "blur_kernel": 31, "crop": 99}, 8, "blur_kernel: 31 is too large"),
        ({"blur": 0.1, "blur_kernel": 31, "crop": 16}, 8, None),
        ({"blur": 0.0, "blur_kernel": 31, "crop": 15}, 8, None),
        ({"crop": 16}, 1, "batch_size: a batch has one image"),
        ({"crop": 17}, 1, None),
        ({"crop": 16}, 2, None),
    ],
)
def test_sizes_that_cannot_work_are_named(values: dict, smallest_batch: int, says: str) -> None:
    height = 15 if values.get("crop") == 99 else 64
    arguments = (settings(**values), height, 64, 16, smallest_batch)
    if says is None:
        check_sizes(*arguments)
    else:
        with pytest.raises(UserError, match=says):
            check_sizes(*arguments)


def count_operations(number: int) -> int:
    """Count the operations that PyTorch starts for a batch of so many images."""
    images, masks = noise(number)
    config = settings(blur=1.0, jitter=1.0, blur_masks=True, horizontal_flip=0.5)
    with torch.profiler.profile() as profile:
        augment(images, masks, config)
    return sum(event.cpu_parent is None for event in profile.events())


def test_many_images_take_no_more_operations_than_few() -> None:
    """A GPU waits for each of them, however small it is."""
    assert count_operations(24) == count_operations(3)


def test_no_step_waits_for_a_gpu() -> None:
    """Tensors of the meta device have no values: whatever would wait for one fails."""
    images, masks = (tensor.to("meta") for tensor in noise(6))
    _, mask = augment(*take_batch(images, masks, torch.arange(6), everything()), everything())
    confusion_matrices(mask.long(), mask, 4)
    logits = torch.zeros(6, 4, 8, 8, device="meta", requires_grad=True)
    sum(loss(logits, mask) for loss in LOSSES.values()).backward()
