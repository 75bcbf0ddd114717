"""Measure training speed beside a baseline loop, and beside a busy neighbour.

    python -m tools.bench [--data DIR] [--models initial tuned] [--rounds 3] [--seconds 4]

Both loops train the same model on the same full images at the same batch size. The baseline is
written as people write it: float32, default memory format, a Dataset that decodes PNGs, a
DataLoader with two workers. Ours repeats the step of train.py. They alternate in rounds, each at
least two steps and about `--seconds` long; the baseline's workers are started in a round and have
ended with it, so that neither loop works while the other is timed. Each loop has a process of its
own: what train.py arranges for memory serves it alone.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from common import ROOT, run, write_atomically

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.flop_counter import FlopCounterMode

from augment import augment, take_batch
from config import load_config
from data import find_pairs, load_split, read_pair
from evaluate import evaluate
from losses import weighted_loss
from metrics import confusion_matrices
from model import autocast, build_model, keep_memory, pick_device, pick_precision

MODELS = ("initial", "modified", "tuned", "best")
SIDE = 2048  # of the matrices whose product shows the peak


class PngDataset(Dataset):
    """PNG pairs decoded one by one, as float images in [0, 1] and int64 masks."""

    def __init__(self, config: dict) -> None:
        self.pairs, _ = find_pairs(config, "training")
        self.config = config

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, mask = read_pair(self.pairs[i].image, self.pairs[i].mask, self.config)
        return image / 255, mask.long()


def baseline(config: dict, device: torch.device) -> Callable[[int], float]:
    """Make a function that trains so many steps of the baseline; returns its seconds on data."""
    dataset, batch = PngDataset(config), config["batch_size"]
    model = build_model(config).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["learning_rate"])

    def steps(number: int) -> float:
        chosen = torch.randint(len(dataset), (number * batch,)).tolist()
        for images, masks in DataLoader(Subset(dataset, chosen), batch, num_workers=2):
            images, masks = images.to(device), masks.to(device)
            loss = weighted_loss(model(images), masks, config["loss"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return 0.0

    return steps


def ours(config: dict, device: torch.device) -> Callable[[int], float]:
    """Make a function that trains so many steps as train.py; returns its seconds on data."""
    keep_memory()
    split, dtype = load_split(config, "training"), pick_precision(device, config["precision"])
    images, masks = split.images.to(device), split.masks.to(device)
    model = build_model(config).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["learning_rate"], fused=True)
    classes = len(config["classes"])
    matrix = torch.zeros(classes, classes, dtype=torch.int64, device=device)

    def steps(number: int) -> float:
        on_data = 0.0
        for _ in range(number):
            started = time.perf_counter()
            index = torch.randint(len(images), (config["batch_size"],))
            batch, mask = augment(*take_batch(images, masks, index, config), config)
            on_data += time.perf_counter() - started
            with autocast(device, dtype):
                logits = model(batch)
            loss = weighted_loss(logits, mask, config["loss"])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            matrix.add_(confusion_matrices(logits.argmax(dim=1), mask, classes).sum(dim=0))
        matrix.sum().item()  # waits for the device
        return on_data

    return steps


def serve(loop: str, config: dict, device: torch.device) -> None:
    """Answer each line of standard input, a number of steps, with seconds and seconds on data.

    0 asks ours for evaluation: images per second, and peak memory in MiB.
    """
    steps = {"baseline": baseline, "ours": ours}[loop](config, device)
    for line in sys.stdin:
        started = time.perf_counter()
        if int(line):
            on_data = steps(int(line))
            print(time.perf_counter() - started, on_data, flush=True)
            continue
        split, dtype = load_split(config, "training"), pick_precision(device, config["precision"])
        model = build_model(config).to(device, memory_format=torch.channels_last)
        few = split.images[:256], split.masks[:256]
        started = time.perf_counter()
        evaluate(model, *few, config, dtype)
        rate = len(few[0]) / (time.perf_counter() - started)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(rate, peak / (2**20 if sys.platform == "darwin" else 2**10), flush=True)


class Loop:
    """A process with one of the loops, and how many steps it takes in a round."""

    def __init__(self, loop: str, name: str, args: argparse.Namespace) -> None:
        command = [sys.executable, "-m", "tools.bench", "--serve", loop, "--models", name]
        command += ["--data", str(args.data), "--device", args.device]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=Path.cwd(), env=ENV, **pipes)
        self.ask(1)  # memory is taken, kernels are chosen
        self.steps = max(2, int(args.seconds / self.ask(1)[0]))

    def ask(self, steps: int) -> list[float]:
        """Train so many steps; returns seconds and seconds on data."""
        print(steps, file=self.process.stdin, flush=True)
        return [float(part) for part in self.process.stdout.readline().split()]


ENV = os.environ | {"PYTHONPATH": str(ROOT)}
