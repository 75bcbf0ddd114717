"""What each process does that test_distributed.py starts with torchrun: the parts, then runs.

    python -m torch.distributed.run --nproc_per_node=2 tests/ranks.py DATA OUT

`step` and `normalise` are called by the test as well, as one process.
"""

import signal
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import distributed
import train as train_module
from config import load_config
from errors import UserError
from files import lock_run
from model import build_model

ROOT = Path(__file__).parent.parent
TINY = {
    "name": "tiny",
    "encoder": "[[4, 3], [8, 3]]",
    "decoder": "[[8, 3], [6, 3]]",
    "loss": "{cross_entropy: 1, dice_per_class: 1}",
    "images_per_epoch": "20",
    "batch_size": "7",  # two processes share it unevenly, and the last batch of six evenly
    "learning_rate": "0.0001",
    "epochs": "2",
    "device": "cpu",
    "precision": "float32",
}
RANDOM = {"dropout": "0.3", "crop": "16", "vertical_flip": "0.5", "blur": "0.5", "jitter": "0.5"}
LOSSES = {"cross_entropy": 1.0, "dice_per_class": 0.5, "dice_pooled": 2.0}


def settings(data: Path, **changes: str) -> list[str]:
    """For --set."""
    return [f"{key}={value}" for key, value in ({"data": data} | TINY | changes).items()]


def step(total: int) -> dict:
    """A step of gradient descent on a batch of so many images, in float64."""
    torch.manual_seed(0)
    model = build_model(load_config([], settings(Path()))).double()
    images = torch.rand(total, 3, 16, 16, dtype=torch.float64)
    masks = torch.randint(4, (total, 16, 16), dtype=torch.uint8)
    distributed.synchronise_batch_norm(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    part = distributed.share(torch.arange(total))
    loss, logits, masks = train_module.train_step(
        model, optimizer, images[part], masks[part], LOSSES, torch.float32, total
    )
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    whole = {"loss": loss, "logits": logits, "masks": masks}
    return {"part": part, "model": model.state_dict(), "gradients": gradients} | whole


def normalise(dtype: torch.dtype) -> dict[str, Tensor]:
    """Batch norm in training, forward and backward, of features far from zero."""
    torch.manual_seed(0)
    features = (100 + 2 * torch.randn(5, 3, 4, 6)).to(dtype)
    slope = torch.randn(features.shape)
    norm = nn.Sequential(nn.BatchNorm2d(3))
    distributed.synchronise_batch_norm(norm)
    part = features[distributed.share(torch.arange(5))].requires_grad_()
    output = distributed.gather(norm(part), 5)
    (output.float() * slope).sum().backward()
    distributed.sum_gradients(norm)
    return {
        "output": output.detach(),
        "gradient": distributed.gather(part.grad, 5),
        "gradient of weight": norm[0].weight.grad,
        "gradient of bias": norm[0].bias.grad,
        **norm.state_dict(),
    }


def runs(data: Path, out: Path, rank: int) -> None:
    """A run of two epochs left alone, and one that a signal to one process interrupts."""
    config = load_config([], settings(data, **RANDOM))
    train_module.train(config, out / "alone", resume=False)
    original, seeds = train_module.train_step, []

    def interrupted(*args: object) -> object:
        seeds.append(torch.initial_seed())
        if len(seeds) == 4 and rank == 1:  # in the second epoch
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    train_module.train_step = interrupted
    try:
        train_module.train(config, out / "interrupted", resume=False)
    except SystemExit as ended:
        torch.save({"code": ended.code, "seeds": seeds}, out / f"interrupted{rank}.pt")
    train_module.train_step = original
    torch.manual_seed(99)
    train_module.train(config, out / "interrupted", resume=True)


def main() -> None:
    data, out = (Path(argument) for argument in sys.argv[1:])
    rank, _ = distributed.rank_and_world()
    results = {f"step of {total}": step(total) for total in (1, 6, 7)}
    for dtype in (torch.float32, torch.bfloat16):
        results[str(dtype)] = normalise(dtype)
    results["agreed"] = distributed.agree(10 + rank)
    try:
        with distributed.together():
            if rank == 1:
                raise UserError("of one")
    except UserError as error:
        results["error"] = str(error)
    torch.save(results, out / f"rank{rank}.pt")
    runs(data, out, rank)
    lock = lock_run(out / "taken") if rank == 0 else None
    train_module.train(load_config([], settings(data)), out / "taken", resume=False)
    lock.close()


if __name__ == "__main__":
    distributed.run(main)
