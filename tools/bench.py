"""Measure the speed of training, beside a textbook loop, and of evaluation.

    python -m tools.bench [--data DIR] [--models initial tuned] [--rounds 3] [--seconds 1]

Both loops train on whole images, in turn, and evaluate.py's loop scores some; the median of the
rounds is printed (min–max). "Of peak" compares the arithmetic of train.py, or of evaluate.py, with
the arithmetic of one large matrix product.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import timeit
from pathlib import Path

from machine import keep_memory, pick_device, pick_precision

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from common import ROOT, run
from config import data_override, load_config
from data import load_split
from evaluate import evaluate
from images import read_pair
from losses import weighted_loss
from model import build_model
from pairs import find_pairs
from runs import locked
from train import train

MODELS = ("initial", "modified", "tuned", "best")
HEADINGS = [
    "images/s",
    "textbook",
    "train.py",
    "ratio",
    "of peak",
    "evaluate.py",
    "of peak",
    "format",
]
MATRIX = 2048  # side of the matrices whose product is the peak


# ---- the loops


def decode_batch(files: list[tuple[Path, Path, dict]]) -> tuple[Tensor, Tensor]:
    """Decode a batch of (image, mask, config): float images in [0, 1] and int64 masks."""
    images = []
    masks = []
    for image_path, mask_path, config in files:
        image, mask = read_pair(image_path, mask_path, config)
        images.append(image)
        masks.append(mask)
    return torch.stack(images) / 255, torch.stack(masks).long()


def train_textbook(config: dict, device: torch.device, steps: int) -> float:
    """Train a number of steps as a textbook would; returns images per second.

    In float32 and PyTorch's default memory format, with PNGs decoded by two worker processes.
    """
    keep_memory(False)
    pairs, _ = find_pairs(config, "training")
    batch_size = config["batch_size"]
    chosen = torch.randint(len(pairs), (steps * batch_size,)).tolist()
    files = [(pairs[i].image, pairs[i].mask, config) for i in chosen]
    model = build_model(config).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["learning_rate"])
    started = timeit.default_timer()
    loader = DataLoader(files, batch_size, num_workers=2, collate_fn=decode_batch)
    for images, masks in loader:
        logits = model(images.to(device))
        loss = weighted_loss(logits, masks.to(device), config["loss"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss.item()  # waits for the device
    return len(files) / (timeit.default_timer() - started)


def train_ours(config: dict, device: torch.device, steps: int) -> float:
    """Train two epochs of a number of steps with train.py; returns images per second of the second.

    The first epoch warms up. Validation and the writing of files are not timed.
    """
    keep_memory(True)
    config = dict(config)
    config["epochs"] = 2
    config["images_per_epoch"] = steps * config["batch_size"]
    with tempfile.TemporaryDirectory() as folder, locked(Path(folder)):
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            train(config, Path(folder), device, resume=False, overwrite=False)
        lines = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(lines[1])["images_per_s"]


def evaluate_ours(config: dict, device: torch.device, images: int) -> float:
    """Score a number of training images with a fresh model; returns images per second."""
    keep_memory(True)
    split = load_split(config, "training")
    chosen = torch.arange(images) % len(split.images)
    model = build_model(config).to(device, memory_format=torch.channels_last)
    dtype = pick_precision(device, config["precision"])
    started = timeit.default_timer()
    evaluate(model, split.images[chosen], split.masks[chosen], len(config["classes"]), dtype)
    return images / (timeit.default_timer() - started)


# ---- arithmetic


def gflop_per_image(config: dict) -> tuple[float, float]:
    """Count the arithmetic of one image in 10⁹ operations: forward and backward; forward alone."""
    image = load_split(config, "training").images[:1] / 255
    model = build_model(config)
    with FlopCounterMode(display=False) as counter:
        logits = model(image)
        forward = counter.get_total_flops() / 1e9
        logits.sum().backward()
    return counter.get_total_flops() / 1e9, forward


def peak_gflop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Measure 10⁹ operations per second of a matrix product, the best of five."""
    matrix = torch.randn(MATRIX, MATRIX).to(device, dtype)

    def multiply() -> None:
        (matrix @ matrix)[0, 0].item()  # waits for the device

    seconds = min(timeit.repeat(multiply, number=1, repeat=5))
    return 2 * MATRIX**3 / 1e9 / seconds


# ---- the table


def format_median(values: list[float]) -> str:
    """Format the median of some values and their range."""
    return f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def format_line(cells: list[str]) -> str:
    """Align the cells of a line of the table."""
    widths = [8, 18, 19, 15, 8, 19, 8, 9]
    padded = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return " ".join([cells[0].ljust(widths[0]), *padded])


def bench(config: dict, device: torch.device, rounds: int, seconds: float) -> None:
    """Time the loops for a number of rounds and print the line of a config."""
    # Builds the cache of the data as well.
    training_gflop, evaluation_gflop = gflop_per_image(config)

    # One step of each loop warms up and tells how many steps take so many seconds.
    batch_size = config["batch_size"]
    rate = train_textbook(config, device, steps=1)
    textbook_steps = max(1, int(seconds * rate / batch_size))
    rate = train_ours(config, device, steps=1)
    our_steps = max(1, int(seconds * rate / batch_size))
    rate = evaluate_ours(config, device, batch_size)
    evaluated_images = max(batch_size, int(seconds * rate))

    textbook = []
    ours = []
    evaluation = []
    for _ in range(rounds):
        textbook.append(train_textbook(config, device, textbook_steps))
        ours.append(train_ours(config, device, our_steps))
        evaluation.append(evaluate_ours(config, device, evaluated_images))
    ratios = [our_rate / rate for our_rate, rate in zip(ours, textbook, strict=True)]

    dtype = pick_precision(device, config["precision"])
    peak = peak_gflop_per_s(device, dtype)
    training_share = training_gflop * statistics.median(ours) / peak
    evaluation_share = evaluation_gflop * statistics.median(evaluation) / peak
    cells = [
        config["name"],
        format_median(textbook),
        format_median(ours),
        format_median(ratios),
        f"{training_share:.0%}",
        format_median(evaluation),
        f"{evaluation_share:.0%}",
        str(dtype).removeprefix("torch."),
    ]
    print(format_line(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="data/generated", metavar="DIR")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1, help="of each loop in each round")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps …")
    args = parser.parse_args()
    device = pick_device(args.device)
    overrides = [data_override(args.data), "limit_validation=8", *args.overrides, "crop=0"]
    print(format_line(HEADINGS))
    for name in args.models:
        config = load_config([ROOT / f"configs/{name}.yaml"], overrides)
        bench(config, device, args.rounds, args.seconds)


if __name__ == "__main__":
    run(main)
