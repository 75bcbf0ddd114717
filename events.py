"""What a run shows of itself: events for TensorBoard, a line an epoch for the terminal."""

import functools
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from errors import UserError
from images import colourise, contact_sheet, legend
from metrics import predict_split

PICTURES = 4  # frames
CURES = (
    "what usually cures a dead class: a last decoder stage wider than `classes`, "
    "loss: {cross_entropy: 1, dice_per_class: 1}, upsampling_init: bilinear, a lower learning_rate"
)


def prediction_pictures(
    model: nn.Module, images: Tensor, masks: Tensor, config: dict, dtype: torch.dtype
) -> Tensor:
    """(3, H, W) uint8: image, truth and prediction of a few frames, the same ones every time.

    Under a legend of the classes, a frame a row.

    Args:
        model: in evaluation mode.
        images: (M, channels, H, W) uint8; masks: (M, H, W) uint8, where the model is.
        config: for `classes` and `ignore`.
        dtype: autocast dtype.
    """
    shown = torch.linspace(0, len(images) - 1, PICTURES).long().unique()
    images, masks = images[shown], masks[shown]
    predictions = predict_split(model, images, dtype)
    classes, rows = config["classes"], []
    for image, mask, predicted in zip(images.cpu(), masks.cpu(), predictions, strict=True):
        pictures = {
            "image": image[:3].expand(3, -1, -1),
            "truth": colourise(mask, classes),
            "prediction": colourise(predicted, classes),
        }
        rows.append([(caption, [picture]) for caption, picture in pictures.items()])
    return contact_sheet(rows, legend(config))


def open_events(run_dir: Path, first_epoch: int) -> SummaryWriter:
    """A writer of TensorBoard events whose epochs from `first_epoch` on replace earlier ones."""

    def hook(failed: threading.ExceptHookArgs) -> None:
        # The next call of the writer raises what its thread could not write: once is enough.
        if not isinstance(failed.exc_value, OSError):
            threading.__excepthook__(failed)

    threading.excepthook = hook
    events = SummaryWriter(run_dir, purge_step=first_epoch)
    charts = {
        chart: ["Multiline", [f"{chart}/training", f"{chart}/validation"]]
        for chart in ("mean_iou", "loss")
    }
    events.add_custom_scalars({"training and validation": charts})
    return events


def _in_one_line(write: Callable[..., None]) -> Callable[..., None]:
    """Make a full disk, which TensorBoard tells as OSError, the user's error that it is."""

    @functools.wraps(write)
    def checked(events: SummaryWriter, *args: object) -> None:
        try:
            write(events, *args)
        except OSError as error:
            raise UserError(
                f"{events.log_dir}/events.out.tfevents…: cannot be written ({error.strerror}); "
                "make room, or write elsewhere"
            ) from None

    return checked


@_in_one_line
def log_hyperparameters(events: SummaryWriter, config: dict, best: dict) -> None:
    """Put a finished run into the HParams tab, its config beside what it reached; closes events."""
    values = {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in config.items()
        if key not in ("classes", "published_iou")
    }
    reached = {
        "result/best_validation_mean_iou": best["validation"]["mean_iou"],
        "result/best_training_mean_iou": best["training"]["mean_iou"],
        "result/best_epoch": best["epoch"],
    }
    # In the run's own folder, not one below it; a step behind the last epoch, which is where a run
    # that is resumed just before its end starts to replace events.
    events.add_hparams(values, reached, run_name=".", global_step=config["epochs"] + 1)
    events.close()


@_in_one_line
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


def report(entry: dict, config: dict, is_best: bool) -> None:
    """Print the line of an epoch."""
    training, validation = entry["training"], entry["validation"]
    dead = validation["dead_classes"]
    print(
        f"{config['name']} epoch {entry['epoch']}/{config['epochs']}  "
        f"loss {training['loss']:.4f} / {validation['loss']:.4f}  "
        f"mean IoU {training['mean_iou']:.4f} / {validation['mean_iou']:.4f}  "
        "(training / validation)  "
        f"{entry['images_per_s']:.0f} images/s"
        + ("  best" if is_best else "")
        + (f"  dead: {', '.join(dead)}" if dead else ""),
        flush=True,
    )
    if dead and entry["epoch"] in (1, config["epochs"]):
        print(CURES)
