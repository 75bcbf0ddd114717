"""From resident uint8 images to an augmented float batch on the device.

Images and masks move together under crops and flips; blur and colour jitter touch images only.
Randomness is drawn per image from torch's global generator.
"""

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.transforms import v2

from images import IGNORE


def _corner(mask: Tensor, crop: int, on_objects: float) -> tuple[int, int]:
    """Top and left of a random crop within a (H, W) mask."""
    height, width = mask.shape
    if on_objects > 0 and torch.rand(()) < on_objects:
        foreground = ((mask > 0) & (mask != IGNORE)).flatten().nonzero()
        if len(foreground):
            # The pixel lies anywhere in the crop, not in its middle: else the model would learn
            # that the middle of a picture is never background.
            pixel = int(foreground[torch.randint(len(foreground), ())])
            dy, dx = torch.randint(crop, (2,)).tolist()
            top, left = pixel // width - dy, pixel % width - dx
            return min(max(top, 0), height - crop), min(max(left, 0), width - crop)
    top = int(torch.randint(height - crop + 1, ()))
    return top, int(torch.randint(width - crop + 1, ()))


def take_batch(images: Tensor, masks: Tensor, index: Tensor, config: dict) -> tuple[Tensor, Tensor]:
    """Copy a batch out of the resident arrays, whole or cropped.

    Args:
        images: (M, channels, H, W) uint8; masks: (M, H, W) uint8.
        index: (N,) int64, the images to take.
        config: for `crop`, the side of a random crop in pixels (0, or no less than the image: all
            of it), and `crop_on_objects`, the share of crops around a random foreground pixel.

    Returns:
        (N, channels, h, w) and (N, h, w) uint8.
    """
    crop, on_objects = config["crop"], config["crop_on_objects"]
    if crop == 0 or crop >= min(masks.shape[1:]):
        return images[index], masks[index]
    image_crops, mask_crops = [], []
    for i in index.tolist():
        top, left = _corner(masks[i], crop, on_objects)
        rows, columns = slice(top, top + crop), slice(left, left + crop)
        image_crops.append(images[i, :, rows, columns])
        mask_crops.append(masks[i, rows, columns])
    return torch.stack(image_crops), torch.stack(mask_crops)


def to_float(images: Tensor) -> Tensor:
    """uint8 (N, channels, H, W) in 0…255 to float32 in [0, 1], channels-last in memory."""
    return images.float().div_(255).contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, masks: Tensor, config: dict) -> tuple[Tensor, Tensor]:
    """Augment a batch where it lies.

    Args:
        images: (N, channels, H, W) uint8; masks: (N, H, W) uint8.
        config: the augmentation keys of configs/default.yaml.

    Returns:
        Images (N, channels, H, W) float32 in [0, 1] and masks (N, H, W) uint8.
    """
    for key, axis in (("vertical_flip", -2), ("horizontal_flip", -1)):
        if config[key] > 0:
            flip = torch.rand(len(images)).lt(config[key]).to(images.device, non_blocking=True)
            images = torch.where(flip[:, None, None, None], images.flip(axis), images)
            masks = torch.where(flip[:, None, None], masks.flip(axis), masks)
    images = to_float(images)
    if config["blur"] > 0:
        low, high = config["blur_sigma"]
        for i in torch.rand(len(images)).lt(config["blur"]).nonzero().flatten().tolist():
            sigma = low + (high - low) * float(torch.rand(()))
            images[i] = F.gaussian_blur(images[i], [config["blur_kernel"]] * 2, [sigma] * 2)
    if config["jitter"] > 0:
        brightness, contrast, saturation, hue = config["jitter_strength"]
        colour_jitter = v2.ColorJitter(brightness, contrast, saturation, hue)
        for i in torch.rand(len(images)).lt(config["jitter"]).nonzero().flatten().tolist():
            colour = slice(0, min(3, images.shape[1]))  # alpha, the fourth channel, is no colour
            images[i, colour] = colour_jitter(images[i, colour])
    return images, masks
