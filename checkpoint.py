"""Checkpoints: plain data, written atomically, that describe themselves."""

import os
import pickle
from pathlib import Path

import torch
from torch import nn

from errors import UserError
from model import build_model

FORMAT = "flying-objects-segmentation 1"


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; UserError if the disk is full or the folder read-only."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room") from None


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint atomically.

    Args:
        path: the .pt file.
        checkpoint: `config`, `model` (a state dict) and whatever else, as plain data and tensors.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        torch.save({"format": FORMAT, **checkpoint}, partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as either
        partial.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: the checkpoint cannot be written ({reason}); make room") from None


def load_checkpoint(path: Path, device: torch.device) -> dict:
    """Read a checkpoint of this project; nothing in the file is executed.

    Raises:
        UserError: the file is missing, damaged, or of another project.
    """
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; `make train-tuned` makes one") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError):
        raise UserError(
            f"{path}: damaged, or not a checkpoint; give a best.pt or last.pt"
        ) from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path}: is not a checkpoint of this project; give a best.pt or last.pt")
    return checkpoint


def restore_model(checkpoint: dict, device: torch.device) -> nn.Module:
    """The trained model of a checkpoint, in evaluation mode."""
    model = build_model(checkpoint["config"]).to(device, memory_format=torch.channels_last)
    model.load_state_dict(checkpoint["model"])
    return model.eval()
