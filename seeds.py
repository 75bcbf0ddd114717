"""Where the random numbers of a run start, which is all the random state it has."""

import hashlib

import torch
from torch import Tensor


def seeded(seed: int, purpose: str, number: int) -> int:
    """A 32-bit seed of its own for each number of each purpose of each run.

    Hashed, since the CPU's generator looks at the low 32 bits of a seed alone.
    """
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def epoch_order(epoch: int, per_epoch: int, total: int, seed: int) -> Tensor:
    """(per_epoch,) int64: the images of an epoch, walking through one shuffled pass after another.

    No image comes again before every other has come once, whatever the length of an epoch.
    """
    start, stop = epoch * per_epoch, (epoch + 1) * per_epoch
    passes = []
    for number in range(start // total, (stop - 1) // total + 1):
        generator = torch.Generator().manual_seed(seeded(seed, "pass", number))
        passes.append(torch.randperm(total, generator=generator))
    return torch.cat(passes)[start % total :][:per_epoch]
