"""Write and read checkpoints: the weights of a model with the config that describes it."""

import io
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from common import UserError, reading, require, write_atomically
from config import with_todays_keys
from model import build_model

FORMAT = "flying-objects-segmentation 1"
MOST_NAMED = 8  # layers that a message names


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint: `config`, `model` (a state dict) and other plain data and tensors.

    Section 5 of train.py has all keys of last.pt, `save_best` those of best.pt, export.py those of
    weights/best.pt.
    """
    content = {"format": FORMAT}
    content.update(checkpoint)
    # In memory first, since torch.save's own message on a full disk does not say what happened.
    file = io.BytesIO()
    torch.save(content, file)
    write_atomically(path, file.getvalue())


def save_best(run_dir: Path, checkpoint: dict) -> None:
    """Write best.pt from the content of last.pt, whose epoch is the best so far.

    It is written after last.pt: an epoch that a killed run repeats may turn out otherwise.
    """
    best = {
        "config": checkpoint["config"],
        "data_digest": checkpoint["data_digest"],
        "code": checkpoint["code"],
        "epoch": len(checkpoint["history"]),
        "model": checkpoint["model"],
    }
    save_checkpoint(run_dir / "best.pt", best)


def restore_best(run_dir: Path, last: dict) -> None:
    """Write best.pt if a kill came just before it: `last`, of last.pt, has the best epoch."""
    try:
        epoch = read_checkpoint(run_dir / "best.pt").get("epoch")
    except UserError:  # it is missing or damaged, and last.pt has all that belongs into it
        epoch = None
    if epoch != len(last["history"]):
        save_best(run_dir, last)


def read_checkpoint(path: Path) -> dict:
    """Read what `save_checkpoint` was given, onto the CPU; nothing in the file is executed.

    The config gets today's keys, so that older checkpoints can be used. UserError if the file is
    damaged or is no checkpoint of this project.
    """
    advice = "give a .pt file that train.py wrote, or train its run again: make … OVERWRITE=1"
    if not path.exists():
        raise UserError(f"{path}: there is no such file; {advice}")
    with reading(path, advice):
        damaged = zipfile.ZipFile(path).testzip()  # torch.load does not look
        if damaged:
            raise ValueError(f"{damaged} in it is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] != FORMAT:
            raise ValueError(f"its format is {checkpoint['format']}, not {FORMAT}")
        require(checkpoint, {"config": dict, "model": dict})
    with reading(path, "undo the change of this key in configs/default.yaml, or train again"):
        checkpoint["config"] = with_todays_keys(checkpoint["config"])
    return checkpoint


def restore_model(path: Path, device: torch.device) -> tuple[nn.Module, dict]:
    """Restore the model of a checkpoint, in evaluation mode; returns it and the checkpoint.

    UserError if the file cannot be read, or its weights are of another model.
    """
    checkpoint = read_checkpoint(path)
    model = build_model(checkpoint["config"])
    load_state(model, checkpoint["model"], path, "train again")
    model.to(device, memory_format=torch.channels_last)
    model.eval()
    return model, checkpoint


def load_state(model: nn.Module, state: dict, path: Path, remedy: str) -> None:
    """Load the weights of a checkpoint at `path`; UserError if they are of another model."""
    misfit = find_misfit(state, model.state_dict())
    if misfit:
        advice = f"undo the change of model.py, or {remedy}"
        raise UserError(f"{path}: its weights do not fit the model ({misfit}); {advice}")
    model.load_state_dict(state)


def find_misfit(state: dict, expected: dict[str, Tensor]) -> str | None:
    """Describe the first difference of two state dicts in names and shapes; None if they agree."""
    for name, tensor in expected.items():
        if not isinstance(state.get(name), Tensor):
            return f"the file has no {name}"
        if state[name].shape != tensor.shape:
            return f"{name} is {list(state[name].shape)} in the file, {list(tensor.shape)} here"
    for name in state:
        if name not in expected:
            return f"the model has no {name}"
    return None


def load_weights(model: nn.Module, path: Path, classes: list[str]) -> str:
    """Load the layers of a checkpoint that fit a model, which may be of other classes or channels.

    A layer fits if the file has all its tensors, in the same shapes. The last layer, which is the
    prediction of `classes`, also needs the same classes in the same order. All other layers keep
    their fresh weights. Returns a line that names the fresh layers. UserError if no layer fits.
    """
    checkpoint = read_checkpoint(path)
    saved = checkpoint["model"]
    fits = {}  # layer → whether it fits, in the order of the model
    for name, tensor in model.state_dict().items():
        layer = layer_of(name)
        fits.setdefault(layer, True)
        if not isinstance(saved.get(name), Tensor) or saved[name].shape != tensor.shape:
            fits[layer] = False
    if list(checkpoint["config"]["classes"]) != classes:
        last_layer = list(fits)[-1]
        fits[last_layer] = False
    taken = {}
    for name, tensor in saved.items():
        if fits.get(layer_of(name)):
            taken[name] = tensor
    if not taken:
        advice = "set model, encoder, decoder … to what it was trained with"
        raise UserError(f"{path}: init: no layer of it fits the model; {advice}")
    model.load_state_dict(taken, strict=False)
    fresh = [layer for layer in fits if not fits[layer]]
    text = f"init: {len(fits) - len(fresh)} of {len(fits)} layers start from {path}"
    if fresh:
        text += f", fresh are {', '.join(fresh[:MOST_NAMED])}"
    if len(fresh) > MOST_NAMED:
        text += f" and {len(fresh) - MOST_NAMED} more"
    return text


def layer_of(name: str) -> str:
    """Cut the name of a tensor to the name of its layer: up.4.weight to up.4.

    A tensor that belongs to the model itself keeps its name.
    """
    return name.rpartition(".")[0] or name
