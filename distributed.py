"""Data-parallel training in several processes, one a GPU, that torchrun starts.

    torchrun --nproc_per_node=2 train.py --config configs/tuned.yaml

Every process ("rank") has the whole model and sends its share of each batch through it. Batch norm,
loss and gradients are of the whole batch, so that training does not depend on the number of ranks.
In a process that torchrun did not start, everything here is a no-op.
"""

import atexit
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import errors
from errors import UserError


def run(main: Callable[[], None]) -> None:
    """`errors.run`, on every rank if torchrun started this; rank 0 alone prints."""
    errors.run(functools.partial(_run_rank, main) if dist.is_torchelastic_launched() else main)


def _run_rank(main: Callable[[], None]) -> None:
    gpus, processes = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
    # Both where there are GPUs, so that what lies on the CPU anyway need not wait for one.
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    atexit.register(dist.destroy_process_group)
    rank, _ = rank_and_world()
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
    try:
        if 0 < gpus < processes:
            raise UserError(
                f"torchrun: {processes} processes for {gpus} GPUs; give --nproc_per_node={gpus}, "
                "or set CUDA_VISIBLE_DEVICES= to train on CPUs"
            )
        main()
    except UserError as error:  # that all ranks have, see `together`
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        agree(0)  # torchrun ends all ranks when one has left: none may before the line above
        sys.exit(2)


def rank_and_world() -> tuple[int, int]:
    """The number of this process and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that the ranks leave together: the UserError that one raises in it, all raise."""
    _, world = rank_and_world()
    if world == 1:
        yield
        return
    message = None
    try:
        yield
    except UserError as error:
        message = str(error)
    messages = [None] * world
    dist.all_gather_object(messages, message)
    for message in filter(None, messages):
        raise UserError(message)


def agree(number: int) -> int:
    """The largest of the numbers that the ranks give, once all have given theirs."""
    if rank_and_world()[1] == 1:
        return number
    largest = torch.tensor(number)  # on the CPU: no GPU is waited for
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


# ---- a step


def share(index: Tensor) -> Tensor:
    """(n,) int64: this rank's part of the indices (N,) of a batch; n differs by one at most.

    Where there are fewer images than ranks, those that would have none take the first: their
    networks have to run, since batch norm waits for them. `gather` leaves it out.
    """
    rank, world = rank_and_world()
    part = index.tensor_split(world)[rank]
    return part if len(part) else index[:1]


def gather(part: Tensor, total: int) -> Tensor:
    """(total, ...): the whole batch, in its order, from what the ranks computed of their shares.

    Gradients lead back to this rank's own part. Every rank computes the same loss of the same
    whole batch, so the sum of their gradients is that of the loss: see `sum_gradients`.

    Args:
        part: (n, ...), any dtype, of the images that `share` named.
        total: images in the batch.
    """
    rank, world = rank_and_world()
    if world == 1:
        return part
    sizes = [len(indices) for indices in torch.arange(total).tensor_split(world)]
    mine = part.new_zeros(sizes[0], *part.shape[1:])  # the first share is a largest one
    mine[: len(part)] = part.detach()
    parts = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(parts, mine)
    parts[rank] = part
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def sum_over_ranks(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over the ranks."""
    if rank_and_world()[1] > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def sum_gradients(model: nn.Module) -> None:
    """Replace each gradient by its sum over the ranks.

    In one message after the backward pass. DistributedDataParallel sends while it still runs, and
    averages; with networks of a few million weights there is little to gain, and this can be read.
    """
    if rank_and_world()[1] == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters()]
    message = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(message)
    for gradient, values in zip(
        gradients, message.split([gradient.numel() for gradient in gradients]), strict=True
    ):
        gradient.copy_(values.view_as(gradient))


# ---- batch norm


def synchronise_batch_norm(model: nn.Module) -> None:
    """Let each batch norm of a model normalise by the whole batch; in place, keys and all.

    With PyTorch's own SyncBatchNorm on GPUs; it runs nowhere else.
    """
    if rank_and_world()[1] == 1:
        return
    if next(model.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncedBatchNorm2d


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d that in training takes mean and variance over the batches of all ranks."""

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape and dtype; N may differ between the ranks."""
        if not self.training:
            return super().forward(features)
        features, mean, var, count = _Normalise.apply(features, self.weight, self.bias, self.eps)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * (count / (count - 1).clamp(min=1)), self.momentum)
        self.num_batches_tracked += 1
        return features


class _Normalise(torch.autograd.Function):
    """Batch norm over all ranks, of the fast operations that PyTorch has for one process.

    F.batch_norm with given statistics takes them for constants. Its gradient lacks what passes
    through them: with x̂ the normalised values, −weight/σ · (mean dy + x̂ · mean dy·x̂).
    """

    @staticmethod
    def forward(
        context: object, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Running statistics of float32 make it return float32 for bfloat16 as well; with a momentum
        # of 0 they stay as they are.
        unused = torch.zeros_like(weight), torch.zeros_like(weight)
        mean, var = (row.double() for row in torch.batch_norm_update_stats(x, *unused, 0.0))
        count = torch.full_like(mean, x.numel() / x.shape[1])
        # Merged in float64, where the difference of two squares is as good as exact.
        sums = torch.stack([count, count * mean, count * (var + mean**2)])
        dist.all_reduce(sums)
        count, total, squares = sums
        mean, var = total / count, squares / count - (total / count) ** 2
        mean, var, count = (row.to(weight.dtype) for row in (mean, var, count))
        context.save_for_backward(x, weight, mean, var, count)
        context.eps = eps
        context.mark_non_differentiable(mean, var, count)
        return F.batch_norm(x, mean, var, weight, bias, eps=eps), mean, var, count

    @staticmethod
    def backward(context: object, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = context.saved_tensors
        by_x, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, var, None, None, False, context.eps, [True, True, True]
        )
        sums = torch.stack([by_weight, by_bias])  # Σ dy·x̂ and Σ dy
        dist.all_reduce(sums)
        slope, shift = -weight * (var + context.eps).rsqrt() * sums / count
        by_x += F.batch_norm(x, mean, var, slope, shift, eps=context.eps)
        return by_x, by_weight, by_bias, None
