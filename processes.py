"""What several processes tell each other while they train one model with torchrun.

In a single process there is nothing to tell: values come back as they were given.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common import UserError


def join(device: torch.device) -> None:
    """Join the processes that torchrun started, if it did. Only the first prints to stdout."""
    if not dist.is_torchelastic_launched():
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend)
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)


def leave() -> None:
    """Leave the processes that `join` joined, all at one time.

    The first of them still writes files when the others have nothing left to do. If they left
    then, it could end with their broken connections.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def place() -> tuple[int, int]:
    """Return the number of this process, from 0 on, and how many there are."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def check_shares(config: dict, images_per_epoch: int, validation_images: int) -> None:
    """Raise UserError unless every process gets as large a share of every batch."""
    _, world = place()
    if world == 1:
        return
    if validation_images < world:
        text = f"images of the validation split: {validation_images}, too few for {world} processes"
        raise UserError(f"{config['data']}: {text}; start fewer processes")
    is_shared = config["batch_size"] % world == 0 and images_per_epoch % config["batch_size"] == 0
    if not is_shared or config["last_batch"] == "keep":
        raise UserError(
            f"batch_size, last_batch: {world} processes share every batch evenly; set batch_size to"
            f" a multiple of {world}, at most all images, and last_batch: drop"
        )


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
