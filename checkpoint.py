"""Checkpoints: plain data, written atomically, that describe themselves."""

import hashlib
import io
from pathlib import Path

import torch
from torch import nn

from config import load_config
from errors import UserError
from files import write_atomically
from model import build_model

FORMAT = "flying-objects-segmentation 1"


def save_checkpoint(path: Path, checkpoint: dict, keep: Path | None = None) -> None:
    """Write a checkpoint atomically; see `write_atomically` for `keep` and errors.

    Args:
        path: the .pt file.
        checkpoint: `config`, `model` (a state dict) and whatever else, as plain data and tensors.
        keep: where the file that was there before is kept; None: it is replaced.
    """
    checkpoint = {"format": FORMAT, **checkpoint}
    # Through memory: on a full disk torch.save tells of positions in a file, not of the disk.
    file = io.BytesIO()
    torch.save(checkpoint | {"digest": _digest(checkpoint)}, file)
    write_atomically(path, file.getvalue(), keep)


def _digest(value: object) -> str:
    """SHA-256 of nested dicts, lists, tensors and plain values, whatever device they are on."""
    sha = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            tensor = value.detach().cpu().contiguous()
            sha.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key, item in value.items():
                sha.update(f"{key!r}:".encode())
                add(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                sha.update(b",")
                add(item)
        else:
            sha.update(repr(value).encode())

    add(value)
    return sha.hexdigest()


def load_checkpoint(path: Path, device: torch.device) -> dict:
    """Read a checkpoint of this project; nothing in the file is executed.

    Raises:
        UserError: the file is missing, damaged, or of another project.
    """
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; `make train-tuned` makes one") from None
    except (IsADirectoryError, PermissionError) as error:
        reason = error.strerror
        raise UserError(f"{path}: cannot be read ({reason}); give a best.pt or last.pt") from None
    except Exception:  # noqa: BLE001 (what unpickling damaged bytes can raise has no end)
        raise UserError(
            f"{path}: damaged, or not a checkpoint; give a best.pt or last.pt"
        ) from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path}: is not a checkpoint of this project; give a best.pt or last.pt")
    if checkpoint.pop("digest", None) != _digest(checkpoint):
        raise UserError(f"{path}: damaged (its digest does not match); train it again")
    if isinstance(checkpoint.get("config"), dict):  # keys newer than the file have their default
        checkpoint["config"] = load_config([], []) | checkpoint["config"]
    return checkpoint


def load_last(run_dir: Path, device: torch.device) -> dict | None:
    """What a run resumes from: last.pt, or previous.pt if that is damaged; None if there is none.

    Raises:
        UserError: both are damaged.
    """
    last, previous = run_dir / "last.pt", run_dir / "previous.pt"
    if not last.exists():  # killed between the two renames of `save_checkpoint`
        last = previous
    if not last.exists():
        return None
    try:
        checkpoint = load_checkpoint(last, device)
    except UserError as error:
        if last == previous or not previous.exists():
            raise
        print(f"{error}: falling back to {previous}")
        checkpoint = load_checkpoint(previous, device)
    if "optimizer" not in checkpoint:
        raise UserError(
            f"{last}: holds nothing to resume from (is it a best.pt?); train without --resume, "
            "which starts over"
        )
    return checkpoint


def clear_run(run_dir: Path) -> None:
    """Remove what an earlier run left in its directory."""
    for name in ("last.pt", "previous.pt", "best.pt", "summary.json", "metrics.jsonl"):
        (run_dir / name).unlink(missing_ok=True)
    for events in run_dir.glob("events.out.tfevents.*"):
        events.unlink()


def restore_model(checkpoint: dict, path: Path, device: torch.device) -> nn.Module:
    """The trained model of a checkpoint, read from `path`, in evaluation mode."""
    try:
        model = build_model(checkpoint["config"])
        model.load_state_dict(checkpoint["model"])
    except (KeyError, RuntimeError):
        raise UserError(
            f"{path}: was made by another version of this project; train it again"
        ) from None
    return model.to(device, memory_format=torch.channels_last).eval()
