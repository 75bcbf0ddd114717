"""What a run writes for TensorBoard."""

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from augment import to_float
from data import colourise
from device import autocast

PICTURES = 4  # frames


def prediction_pictures(
    model: nn.Module, images: Tensor, masks: Tensor, config: dict, dtype: torch.dtype
) -> Tensor:
    """(3, H, W) uint8: image, truth and prediction of a few frames, the same ones every time.

    Args:
        model: in evaluation mode.
        images: (M, channels, H, W) uint8; masks: (M, H, W) uint8, where the model is.
        config: for `classes`.
        dtype: autocast dtype.
    """
    shown = torch.linspace(0, len(images) - 1, PICTURES).long()
    images, masks = images[shown], masks[shown]
    with torch.inference_mode(), autocast(images.device, dtype):
        predictions = model(to_float(images)).argmax(dim=1)
    rows = [
        torch.cat(
            [
                image[:3].expand(3, -1, -1),
                colourise(mask, config["classes"]),
                colourise(prediction, config["classes"]),
            ],
            dim=2,
        )
        for image, mask, prediction in zip(
            images.cpu(), masks.cpu(), predictions.cpu(), strict=True
        )
    ]
    return torch.cat(rows, dim=1)


def log(events: SummaryWriter, entry: dict, pictures: Tensor) -> None:
    """Write the scalars and pictures of an epoch for TensorBoard."""
    for split in ("training", "validation"):
        events.add_scalar(f"loss/{split}", entry[split]["loss"], entry["epoch"])
        events.add_scalar(f"mean_iou/{split}", entry[split]["mean_iou"], entry["epoch"])
        for name, iou in entry[split]["per_class_iou"].items():
            if iou is not None:
                events.add_scalar(f"iou_{split}/{name}", iou, entry["epoch"])
    events.add_scalar("learning_rate", entry["learning_rate"], entry["epoch"])
    events.add_scalar("images_per_s", entry["images_per_s"], entry["epoch"])
    events.add_image("image | truth | prediction", pictures, entry["epoch"])
    events.flush()
