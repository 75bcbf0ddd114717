"""What several processes tell each other while they train one model with torchrun.

In a single process these functions return what they are given.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn


def send_to_all(checkpoint: dict | None) -> dict | None:
    """Send the checkpoint of the first process to all; returns it.

    The others may run on machines that do not have the files.
    """
    if not dist.is_initialized():
        return checkpoint
    shared = [checkpoint]
    dist.broadcast_object_list(shared)
    return shared[0]


def share_buffers(model: nn.Module) -> None:
    """Copy the statistics of batch norm from the first process: each has seen other images."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def total(value: Tensor) -> Tensor:
    """Add up the values of all processes."""
    if not dist.is_initialized():
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value


def mean(value: float, images: int) -> float:
    """Average the values of all processes, each the mean over its number of images."""
    if not dist.is_initialized():
        return value
    sums = torch.tensor([value * images, images], dtype=torch.float64)
    dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()
