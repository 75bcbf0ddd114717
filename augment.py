"""Make a batch: from the uint8 images of a split to an augmented float batch on the device.

Images and masks move together under crops and flips. Blur and colour jitter change images only,
unless `blur_masks` asks for the lab's way. Randomness is drawn anew for each image from torch's
global generator. Places of crops are drawn on the device of the split, all else on the CPU: how
many images change must be known at once, and a GPU would have to be waited for.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from common import UserError
from data import to_float
from metrics import IGNORE


def get_batch(
    images: Tensor, masks: Tensor, index: Tensor, device: torch.device, config: dict
) -> tuple[Tensor, Tensor]:
    """Take a batch out of a split, crop it and augment it as the config says.

    From (M, channels, H, W) images, (M, H, W) masks, both uint8, and `index` (N,) int64, which
    says which images, all three on one device. Returns (N, channels, h, w) float32 images in
    [0, 1] and (N, h, w) uint8 masks on `device`. schedule.epoch_order makes `index`.
    """
    batch, mask = take_batch(images, masks, index, config)
    batch = batch.to(device, non_blocking=True)
    mask = mask.to(device, non_blocking=True)
    return augment(batch, mask, config)


def check_sizes(config: dict, height: int, width: int, stride: int, smallest_batch: int) -> None:
    """Raise UserError if images or crops are too small for the blur or for batch normalisation.

    `height` and `width` are those of the images, in pixels. A deepest feature of the model stands
    for `stride` × `stride` pixels.
    """
    crop = config["crop"]
    if 0 < crop < min(height, width):
        height, width = crop, crop
    kernel = config["blur_kernel"]
    if config["blur"] > 0 and kernel // 2 >= min(height, width):
        raise UserError(f"blur_kernel: {kernel} is too large for images of {width}×{height} pixels")
    deepest = math.ceil(height / stride) * math.ceil(width / stride)
    if smallest_batch * deepest == 1:
        raise UserError(
            "batch_size: a batch has one image, of which the deepest stage sees one pixel; batch"
            " normalisation needs more than one value: raise batch_size or crop, or set last_batch:"
            " drop"
        )


def choose_corners(masks: Tensor, crop: int, on_objects: float) -> tuple[Tensor, Tensor]:
    """Choose top and left, (N,) int64, of crops in (N, H, W) masks, a share of them on objects.

    They keep to the labelled part of a mask: images of several sizes are padded (see data.py).
    """
    # The lowest value of a row or column is IGNORE only if all its pixels are.
    last_top = last_start(masks.amin(dim=2) != IGNORE, crop)
    last_left = last_start(masks.amin(dim=1) != IGNORE, crop)
    draw, which_pixel, share_y, share_x = torch.rand(4, len(masks), device=masks.device)
    # share_y and share_x place a crop anywhere in the image. For a crop on an object they say
    # instead where in the crop the chosen pixel lies.
    top = (share_y * (last_top + 1)).long()
    left = (share_x * (last_left + 1)).long()
    if on_objects > 0:
        y, x, has_object = choose_object_pixels(masks, which_pixel)
        use = (draw < on_objects) & has_object
        top = torch.where(use, start_around(y, last_top, crop, share_y), top)
        left = torch.where(use, start_around(x, last_left, crop, share_x), left)
    return top, left


def start_around(pixel: Tensor, last: Tensor, crop: int, share: Tensor) -> Tensor:
    """Start a crop, at `last` or before, so that `pixel` lies at a share of its side.

    Anywhere in the crop, not in its middle: else the model would learn that the middle of a
    picture is never background.
    """
    start = (pixel - (share * crop).long()).clamp(min=0)
    return torch.minimum(start, last)


def choose_object_pixels(masks: Tensor, choice: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Choose a pixel of an object in each of (N, H, W) masks: y, x and whether there is one, (N,).

    `choice` (N,) in [0, 1) says which: 0 is the first in reading order, 0.5 the middle one.
    """
    is_object = (masks > 0) & (masks != IGNORE)
    count_so_far = is_object.flatten(1).cumsum(dim=1, dtype=torch.int32)  # (N, H*W)
    total = count_so_far[:, -1]
    wanted = torch.minimum((choice * total).int() + 1, total)  # the first object pixel is 1
    place = torch.searchsorted(count_so_far, wanted[:, None])[:, 0]
    width = masks.shape[2]
    return place // width, place % width, total > 0


def last_start(is_labelled: Tensor, crop: int) -> Tensor:
    """Find the last place, (N,) int64, at which a crop still ends inside the labelled part.

    `is_labelled` (N, side) says of each row or column whether it has a labelled pixel. The place is
    0 if the crop is larger than the labelled part.
    """
    side = torch.arange(1, is_labelled.shape[1] + 1, device=is_labelled.device)
    end = (is_labelled * side).amax(dim=1)  # of the labelled part; 0 if there is none
    return (end - crop).clamp(min=0)


def take_batch(images: Tensor, masks: Tensor, index: Tensor, config: dict) -> tuple[Tensor, Tensor]:
    """Copy the images and masks of a batch, or a random crop of each.

    With a `crop` smaller than the images, (N, channels, crop, crop) and (N, crop, crop); else
    whole images. Only the crops of the images are copied, not the whole images.
    """
    crop = config["crop"]
    if crop == 0 or crop >= min(masks.shape[1:]):
        return images[index], masks[index]
    top, left = choose_corners(masks[index], crop, config["crop_on_objects"])
    side = torch.arange(crop, device=images.device)
    rows = (top[:, None] + side)[:, :, None]  # (N, crop, 1)
    columns = (left[:, None] + side)[:, None, :]  # (N, 1, crop)
    number = index[:, None, None]  # (N, 1, 1)
    # number, rows and columns broadcast to (N, crop, crop): they say where each pixel lies. PyTorch
    # puts the channels last.
    cropped = images[number, :, rows, columns]  # (N, crop, crop, channels)
    return cropped.permute(0, 3, 1, 2), masks[number, rows, columns]


def augment(images: Tensor, masks: Tensor, config: dict) -> tuple[Tensor, Tensor]:
    """Augment a batch on its own device: uint8 images to float32 in [0, 1], masks stay uint8."""
    images, masks = flip(images, masks, config["vertical_flip"], -2)
    images, masks = flip(images, masks, config["horizontal_flip"], -1)
    images = to_float(images)
    if config["blur"] > 0:
        images, masks = blur_some(images, masks, config)
    if config["jitter"] > 0:
        jitter_some(images, config)
    return images, masks


def choose(images: Tensor, probability: float) -> Tensor:
    """Choose images of a batch at random; returns their indices, (n,) int64, on the CPU."""
    return torch.rand(len(images)).lt(probability).nonzero()[:, 0]


def flip(images: Tensor, masks: Tensor, probability: float, axis: int) -> tuple[Tensor, Tensor]:
    """Flip some images of a batch, and their masks, along an axis."""
    if probability == 0:
        return images, masks
    chosen = torch.rand(len(images)).lt(probability).to(images.device, non_blocking=True)
    images = torch.where(chosen[:, None, None, None], images.flip(axis), images)
    masks = torch.where(chosen[:, None, None], masks.flip(axis), masks)
    return images, masks


def blur_some(images: Tensor, masks: Tensor, config: dict) -> tuple[Tensor, Tensor]:
    """Blur some images of a batch, each by a standard deviation of its own.

    With `blur_masks` their masks as well, as the lab did: one channel a class, the background
    included, is blurred like the image, and each pixel gets the strongest class.
    """
    index = choose(images, config["blur"])
    if len(index) == 0:  # a convolution takes no empty batch
        return images, masks
    low, high = config["blur_sigma"]
    sigma = (low + (high - low) * torch.rand(len(index))).to(images.device, non_blocking=True)
    index = index.to(images.device, non_blocking=True)
    images[index] = gaussian_blur(images[index], config["blur_kernel"], sigma)
    if config["blur_masks"]:
        mask = masks[index]
        classes = torch.arange(len(config["classes"]), device=mask.device)[:, None, None]
        channels = (mask[:, None] == classes).float()  # (n, C, H, W)
        blurred = gaussian_blur(channels, config["blur_kernel"], sigma)
        strongest = blurred.argmax(dim=1).to(mask.dtype)
        masks = masks.clone()  # those of the caller stay sharp
        masks[index] = torch.where(mask == IGNORE, mask, strongest)
    return images, masks


def gaussian_blur(images: Tensor, kernel: int, sigma: Tensor) -> Tensor:
    """Blur (N, C, H, W) images by Gaussians of `sigma` (N,) in pixels; borders are mirrored.

    What torchvision's gaussian_blur does for one sigma, for all images of a batch at once. A
    kernel of `kernel` pixels (odd) must be smaller than twice the image.
    """
    n, channels, height, width = images.shape
    distance = torch.arange(kernel, device=images.device) - kernel // 2
    weights = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)
    weights = weights / weights.sum(dim=1, keepdim=True)  # (N, kernel)
    weights = weights.repeat_interleave(channels, dim=0)  # a row for each plane
    planes = images.reshape(1, n * channels, height, width)
    margin = kernel // 2
    planes = F.pad(planes, (margin, margin, margin, margin), mode="reflect")
    planes = F.conv2d(planes, weights[:, None, :, None], groups=n * channels)
    planes = F.conv2d(planes, weights[:, None, None, :], groups=n * channels)
    return planes.reshape(n, channels, height, width)


def jitter_some(images: Tensor, config: dict) -> None:
    """Change brightness, contrast, saturation and hue, in this order, of some images, in place.

    Each image by factors of its own. The formulas are torchvision's, whose ColorJitter takes one
    image at a time: dozens of small kernels for each, which a GPU waits for.
    """
    index = choose(images, config["jitter"])
    strength = torch.tensor(config["jitter_strength"])[:, None]
    change = strength * (2 * torch.rand(4, len(index)) - 1)  # (4, n)
    change = change.to(images.device, non_blocking=True)
    brightness, contrast, saturation, hue = change[:, :, None, None, None]  # (n, 1, 1, 1) each
    index = index.to(images.device, non_blocking=True)
    colours = images[index, :3]  # alpha, the fourth channel, is no colour
    colours = (colours * (1 + brightness)).clamp(0, 1)
    mean = to_grey(colours).mean(dim=(1, 2, 3), keepdim=True)
    colours = (mean + (colours - mean) * (1 + contrast)).clamp(0, 1)
    if colours.shape[1] == 3:
        grey = to_grey(colours)
        colours = (grey + (colours - grey) * (1 + saturation)).clamp(0, 1)
        colours = turn_hue(colours, hue[:, 0])
    images[index, :3] = colours


def to_grey(images: Tensor) -> Tensor:
    """Average the colours of (N, 3, H, W) images as the eye does; returns (N, 1, H, W)."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of (N, 3, H, W) images by shares (N, 1, 1) of the colour circle.

    The hue runs from 0 to 6: red 0, yellow 1, green 2, cyan 3, blue 4, magenta 5.
    """
    red, green, blue = images.unbind(dim=1)
    highest = images.amax(dim=1)
    chroma = highest - images.amin(dim=1)
    divisor = chroma.clamp(min=1e-9)  # a grey pixel has no hue, and needs none
    from_red = (green - blue) / divisor
    from_green = 2 + (blue - red) / divisor
    from_blue = 4 + (red - green) / divisor
    hue = torch.where(highest == green, from_green, from_blue)
    hue = torch.where(highest == red, from_red, hue) + 6 * turn
    planes = []
    for shift in (5, 3, 1):  # red, green and blue are high at hues 0, 2 and 4
        distance = (hue + shift) % 6
        share = torch.minimum(distance, 4 - distance).clamp(0, 1)
        planes.append(highest - chroma * share)
    return torch.stack(planes, dim=1)
