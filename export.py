"""Write a model for use elsewhere: as a program that needs no code of ours, or its weights alone.

Both are options of predict.py.
"""

import io
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints import restore_model, save_checkpoint
from common import write_atomically
from evaluate import cost_of


class Program(nn.Module):
    """From uint8 images (N, channels, H, W) to logits (N, C, H, W), resizing as `predict` does."""

    def __init__(self, model: nn.Module, resize: list[int]) -> None:
        super().__init__()
        self.model = model
        self.resize = resize  # [height, width], or [] for the size of the images

    def forward(self, images: Tensor) -> Tensor:
        original_size = images.shape[2:]
        if self.resize:
            images = F.interpolate(images, self.resize, mode="bilinear", antialias=True)
        logits = self.model(images.float() / 255)
        if self.resize:
            logits = F.interpolate(logits, original_size, mode="bilinear")
        return logits


def export(model: nn.Module, config: dict, path: Path) -> None:
    """Write a `torch.export` program for images of any number, height and width."""
    # A private module of PyTorch, which may move: if it does, only the export fails.
    from torch.fx.experimental import _config as fx_config

    model = model.to("cpu", memory_format=torch.contiguous_format)
    example = torch.zeros(2, config["in_channels"], 50, 70, dtype=torch.uint8)
    dynamic = torch.export.Dim.DYNAMIC
    any_size = {0: dynamic, 2: dynamic, 3: dynamic}  # number, height and width
    # Without this option a size of one (at the deepest stage) would be taken for a special case.
    with fx_config.patch(backed_size_oblivious=True), torch.no_grad():
        program = torch.export.export(
            Program(model, config["resize"]), (example,), dynamic_shapes=[any_size]
        )
    file = io.BytesIO()
    torch.export.save(program, file)
    write_atomically(path, file.getvalue())
    print(f"{path}: torch.export.load('{path}').module()(images), uint8 (N, channels, H, W)")


def slim(checkpoint: Path, path: Path) -> None:
    """Write only what predicting and evaluating need of a checkpoint, its weights in float16."""
    _, content = restore_model(checkpoint, torch.device("cpu"))
    kept = {"cost": cost_of(checkpoint, content)}
    for key in ("config", "data_digest", "epoch"):
        if key in content:
            kept[key] = content[key]
    kept["model"] = {}
    for name, tensor in content["model"].items():
        kept["model"][name] = tensor.half() if tensor.is_floating_point() else tensor
    save_checkpoint(path, kept)
    print(f"{path}: {path.stat().st_size / 2**20:.2f} MiB; next: python evaluate.py {path}")
