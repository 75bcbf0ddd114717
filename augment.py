"""From resident uint8 images to an augmented float batch on the device.

Images and masks move together under crops and flips; blur and colour jitter change images only.
Randomness is drawn anew for each image from torch's global generator, on the CPU where Python
needs the value, so that no step waits for a GPU.
"""

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.transforms import v2

from data import to_float
from metrics import IGNORE


def choose_corners(masks: Tensor, crop: int, on_objects: float) -> tuple[Tensor, Tensor]:
    """Choose top and left, (N,) int64, of crops in (N, H, W) masks, a share of them on objects."""
    n, height, width = masks.shape
    choice, pixel, y, x = torch.rand(4, n, device=masks.device)
    top, left = (y * (height - crop + 1)).long(), (x * (width - crop + 1)).long()
    if on_objects > 0:
        count = ((masks > 0) & (masks != IGNORE)).flatten(1).cumsum(dim=1, dtype=torch.int32)
        total = count[:, -1]
        k = torch.minimum((pixel * total).int() + 1, total)
        found = torch.searchsorted(count, k[:, None])[:, 0]  # the k-th pixel of an object
        # The pixel lies anywhere in the crop, not in its middle: else the model would learn that
        # the middle of a picture is never background.
        around_y = (found // width - (y * crop).long()).clamp(0, height - crop)
        around_x = (found % width - (x * crop).long()).clamp(0, width - crop)
        use = (choice < on_objects) & (total > 0)
        top, left = torch.where(use, around_y, top), torch.where(use, around_x, left)
    return top, left


def take_batch(images: Tensor, masks: Tensor, index: Tensor, config: dict) -> tuple[Tensor, Tensor]:
    """Copy a batch out of resident (M, channels, H, W) images and (M, H, W) masks, all uint8.

    `index` (N,) int64 says which images. With a `crop` smaller than they are in the config, a
    random part of each is taken: (N, channels, crop, crop) and (N, crop, crop).
    """
    crop, index = config["crop"], index.to(images.device)
    if crop == 0 or crop >= min(masks.shape[1:]):
        return images[index], masks[index]
    top, left = choose_corners(masks[index], crop, config["crop_on_objects"])
    side = torch.arange(crop, device=images.device)
    rows, columns = (top[:, None] + side)[:, :, None], (left[:, None] + side)[:, None, :]
    index = index[:, None, None]
    return images[index, :, rows, columns].permute(0, 3, 1, 2), masks[index, rows, columns]


def augment(images: Tensor, masks: Tensor, config: dict) -> tuple[Tensor, Tensor]:
    """Augment a batch on its own device: uint8 images to float32 in [0, 1], masks stay uint8."""
    for key, axis in (("vertical_flip", -2), ("horizontal_flip", -1)):
        if config[key] > 0:
            flip = torch.rand(len(images)).lt(config[key]).to(images.device, non_blocking=True)
            images = torch.where(flip[:, None, None, None], images.flip(axis), images)
            masks = torch.where(flip[:, None, None], masks.flip(axis), masks)
    images = to_float(images)
    if config["blur_masks"]:
        masks = masks.clone()  # the caller's stay as they are
    low, high = config["blur_sigma"]
    for i in chosen(images, config["blur"]):
        sigma = low + (high - low) * float(torch.rand(()))
        kernel, sigmas = [config["blur_kernel"]] * 2, [sigma] * 2
        images[i] = F.gaussian_blur(images[i], kernel, sigmas)
        if config["blur_masks"]:
            masks[i] = blur_mask(masks[i], len(config["classes"]), kernel, sigmas)
    colour_jitter = v2.ColorJitter(*config["jitter_strength"])
    for i in chosen(images, config["jitter"]):
        images[i, :3] = colour_jitter(images[i, :3])  # alpha, the fourth channel, is no colour
    return images, masks


def blur_mask(mask: Tensor, num_classes: int, kernel: list[int], sigma: list[float]) -> Tensor:
    """Blur an (H, W) mask as the lab did: one channel a class, then the strongest class again."""
    channels = torch.arange(num_classes, device=mask.device)[:, None, None] == mask
    blurred = F.gaussian_blur(channels.float(), kernel, sigma).argmax(dim=0).to(mask.dtype)
    return torch.where(mask == IGNORE, mask, blurred)


def chosen(images: Tensor, probability: float) -> list[int]:
    """Choose images of a batch at random; returns their indices."""
    return torch.rand(len(images)).lt(probability).nonzero()[:, 0].tolist() if probability else []
