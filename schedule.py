"""Decide what every step sees: the learning rate, the order of the images, the random numbers."""

import hashlib

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR


def make_scheduler(
    optimizer: torch.optim.Optimizer, schedule: str, steps: int, warm_up: float
) -> LRScheduler:
    """Make the schedule of the learning rate, to be stepped after every batch.

    "one_cycle" also moves Adam's first beta, from 0.95 down to 0.85 and up again.
    """
    if schedule == "constant":
        return ConstantLR(optimizer, factor=1.0)
    total = steps + 1  # one more, since the rate is noted after the last step
    peak_step = warm_up * total - 1  # the rate rises from step 0 to this one
    if peak_step == 0:
        # No rise: the peak lies half a step before the first. At 0, PyTorch would divide 0 by 0.
        warm_up = 0.5 / total
    return OneCycleLR(optimizer, optimizer.param_groups[0]["lr"], total, pct_start=warm_up)


def derive_seed(seed: int, stream: str, index: int) -> int:
    """Turn the seed of a run, the name of a purpose and a number into a 32-bit seed."""
    # Hashed, since the CPU's generator looks at the low 32 bits of a seed only.
    digest = hashlib.sha256(f"{seed} {stream} {index}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def epoch_order(epoch: int, images_per_epoch: int, total: int, seed: int) -> Tensor:
    """Order the images of an epoch, (images_per_epoch,) int64.

    The epochs go round the data: one shuffled pass follows another, wherever an epoch ends.
    """
    start = epoch * images_per_epoch
    stop = start + images_per_epoch
    first_pass, last_pass = start // total, (stop - 1) // total
    passes = []
    for number in range(first_pass, last_pass + 1):
        generator = torch.Generator().manual_seed(derive_seed(seed, "pass", number))
        passes.append(torch.randperm(total, generator=generator))
    in_a_row = torch.cat(passes)
    used = start - first_pass * total  # images of the first pass that are in earlier epochs
    return in_a_row[used : used + images_per_epoch]
