"""Measure training speed beside a textbook loop, in one run, alternating.

    python bench.py [--data DIR] [--rounds 5] [--json report/bench.json]

Both loops train the same model on the same images at the same batch size. The textbook loop is
written as people write it: float32, default memory format, a Dataset that decodes PNGs, a
DataLoader with workers. Ours is that of train.py, the scores of the training images included. Each
round times one after the other, so that a machine whose speed drifts slows both; medians with
minimum and maximum are printed.
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from augment import augment, take_batch
from config import load_config
from data import find_pairs, load_split
from device import peak_memory_mib, pick_device, pick_precision
from errors import UserError, run
from files import write_atomically
from images import read_pair
from losses import weighted_loss
from metrics import confusion_matrix, evaluate
from model import build_model
from train import train_step

MODELS = ("initial", "modified", "tuned", "best")
MATMUL_SIDE = 2048  # large enough that the peak no longer grows, small enough to take no time
STEPS = 3  # of each loop in each round


class TextbookDataset(Dataset):
    """PNG pairs decoded one by one, as float images in [0, 1] and int64 masks."""

    def __init__(self, config: dict) -> None:
        self.pairs, _ = find_pairs(config, "training")
        self.config = config

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, mask = read_pair(self.pairs[i].image, self.pairs[i].mask, self.config)
        return torch.from_numpy(image.copy()).permute(2, 0, 1) / 255, torch.from_numpy(mask).long()


def textbook_steps(config: dict, device: torch.device) -> Iterator[None]:
    """The textbook loop; a step for each value asked of it."""
    loader = DataLoader(
        TextbookDataset(config),
        config["batch_size"],
        shuffle=True,
        num_workers=2,
        multiprocessing_context="fork",  # as by itself; in a spawned process they would be spawned
    )
    model = build_model(config).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["learning_rate"])
    for images, masks in itertools.chain.from_iterable(itertools.repeat(loader)):
        images, masks = images.to(device), masks.to(device)
        loss = weighted_loss(model(images), masks, config["loss"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield


def our_steps(config: dict, device: torch.device, data_seconds: list[float]) -> Iterator[None]:
    """The loop of train.py; notes in `data_seconds` how long each batch took to make."""
    split, dtype = load_split(config, "training"), pick_precision(device, config["precision"])
    images, masks = split.images.to(device), split.masks.to(device)
    images.amax(), masks.amax()  # as after an epoch: every page of the mapped cache was touched
    model = build_model(config).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["learning_rate"], fused=True)
    classes = len(config["classes"])
    matrix = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    while True:
        for index in torch.randperm(len(images)).split(config["batch_size"])[:-1]:
            started = time.perf_counter()
            batch, mask = augment(*take_batch(images, masks, index, config), config)
            synchronise(device)
            data_seconds.append(time.perf_counter() - started)
            step = train_step(model, optimizer, batch, mask, config["loss"], dtype, len(index))
            matrix += confusion_matrix(step[1].argmax(dim=1), mask, classes)
            yield


def answer(questions: Connection, ours: bool, config: dict, device_name: str) -> None:
    """A process with one of the two loops; ends when the other end of `questions` is closed.

    The loops have a process each, so that what train.py arranges for its own (the memory of
    `pick_device`) serves neither the textbook loop nor its peak of memory.

    Answers "steps", after running `STEPS` of them, with the seconds they took and the seconds of
    them spent on data; "evaluation" with images/s and the peak of memory so far in MiB.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    data_seconds: list[float] = []
    if ours:
        device = pick_device(device_name)
        loop = our_steps(config, device, data_seconds)
    else:
        device = torch.device(device_name)
        loop = textbook_steps(config, device)
    next(loop)  # warm-up: memory is taken, kernels are chosen
    with contextlib.suppress(EOFError, ConnectionError):
        while question := questions.recv():
            data_seconds.clear()
            if question == "steps":
                took = seconds(lambda: [next(loop) for _ in range(STEPS)], device)
                questions.send((took, sum(data_seconds)))
            else:
                questions.send(evaluation(config, device))


def start(ours: bool, config: dict, device: torch.device) -> Connection:
    """Start a process with a loop; returns the connection to ask it through."""
    spawn = torch.multiprocessing.get_context("spawn")  # it inherits nothing of this process
    here, there = spawn.Pipe()
    spawn.Process(target=answer, args=(there, ours, config, device.type)).start()
    there.close()  # in this process, so that a loop that dies is noticed
    return here


def ask(loop: Connection, question: str) -> tuple[float, float]:
    """What `answer` answers."""
    try:
        loop.send(question)
        return loop.recv()
    except (EOFError, ConnectionError):
        raise UserError("bench: a loop ended early; the message above says why") from None


def evaluation(config: dict, device: torch.device) -> tuple[float, float]:
    """Images per second of `metrics.evaluate` and the peak of memory so far in MiB."""
    split, dtype = load_split(config, "training"), pick_precision(device, config["precision"])
    model = build_model(config).to(device, memory_format=torch.channels_last)
    n = min(len(split.images), 512)
    took = seconds(
        lambda: evaluate(model, split.images[:n], split.masks[:n], config, dtype), device
    )
    return n / took, peak_memory_mib()


def synchronise(device: torch.device) -> None:
    """Wait for a GPU, so that the clock is right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of a call, the device's work included."""
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


def matmul_gflops(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of one large matrix product, the best of five."""
    a = torch.randn(MATMUL_SIDE, MATMUL_SIDE, device=device, dtype=dtype)
    return 2 * MATMUL_SIDE**3 / min(seconds(lambda: a @ a, device) for _ in range(5)) / 1e9


def training_gflop(config: dict, size: tuple[int, int]) -> float:
    """GFLOP of forward and backward pass per image of (height, width) `size`, counted."""
    model = build_model(config)
    with FlopCounterMode(display=False) as flops:
        model(torch.zeros(2, config["in_channels"], *size)).sum().backward()
    return flops.get_total_flops() / 2 / 1e9


def middle(values: list[float]) -> str:
    """Median with minimum and maximum."""
    return f"{statistics.median(values):.0f} ({min(values):.0f}–{max(values):.0f})"


def bench(name: str, root: Path, rounds: int, device: torch.device) -> dict:
    """Time one model and print its line; returns the figures for the JSON file."""
    config = load_config([Path(__file__).parent / "configs" / f"{name}.yaml"], [f"data={root}"])
    config["crop"] = 0  # whole frames for both
    images = load_split(config, "training").images
    if len(images) < 2 * config["batch_size"]:
        raise UserError(f"{root}: bench needs {2 * config['batch_size']} training images or more")
    times: dict[str, list[float]] = {"textbook": [], "ours": [], "peak": [], "peak32": []}
    data_seconds = 0.0
    with start(False, config, device) as textbook, start(True, config, device) as ours:
        for _ in range(rounds):
            for key, loop in (("textbook", textbook), ("ours", ours)):
                took, on_data = ask(loop, "steps")
                times[key].append(took)
                data_seconds += on_data
            times["peak"].append(matmul_gflops(device, torch.bfloat16))
            times["peak32"].append(matmul_gflops(device, torch.float32))
        evaluated, memory = ask(ours, "evaluation")
    batch = config["batch_size"] * STEPS
    rate = {key: [batch / t for t in times[key]] for key in ("textbook", "ours")}
    ratios = [t / o for t, o in zip(times["textbook"], times["ours"], strict=True)]
    gflops = training_gflop(config, images.shape[2:]) * statistics.median(rate["ours"])
    result = {
        "name": name,
        "images_per_s": statistics.median(rate["ours"]),
        "textbook_images_per_s": statistics.median(rate["textbook"]),
        "ratio": statistics.median(ratios),
        "gflop_per_s": gflops,
        "share_of_bf16_peak": gflops / statistics.median(times["peak"]),
        "share_of_fp32_peak": gflops / statistics.median(times["peak32"]),
        "data_share": data_seconds / sum(times["ours"]),
        "evaluation_images_per_s": evaluated,
        "peak_memory_mib": memory,
    }
    print(
        f"{name:<9}{middle(rate['textbook']):>16}{middle(rate['ours']):>16}"
        f"{result['ratio']:>7.2f} ({min(ratios):.2f}–{max(ratios):.2f}){gflops:>9.0f}"
        f"{result['share_of_bf16_peak']:>8.0%}{result['share_of_fp32_peak']:>8.0%}"
        f"{result['data_share']:>7.1%}{result['evaluation_images_per_s']:>12.0f}"
        f"{result['peak_memory_mib']:>10.0f}",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/quick/generated"), metavar="DIR")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--rounds", type=int, default=5, help=f"of {STEPS} steps of each loop")
    parser.add_argument("--json", type=Path, default=Path("report/bench.json"), metavar="FILE")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    print(
        f"training, images/s, median (min–max) of {args.rounds} rounds of {STEPS} steps; "
        f"{device}, {os.cpu_count()} cores, PyTorch {torch.__version__}\n"
        f"{'model':<9}{'textbook':>16}{'train.py':>16}{'ratio':>19}{'GFLOP/s':>9}{'of bf16':>8}"
        f"{'of fp32':>8}{'data':>7}{'evaluation':>12}{'peak MiB':>10}"
    )
    results = [bench(name, args.data, args.rounds, device) for name in args.models]
    write_atomically(args.json, (json.dumps(results, indent=2) + "\n").encode())
    print(f"written to {args.json}; 'of bf16' and 'of fp32' are shares of the matmul peak here")


if __name__ == "__main__":
    run(main)
