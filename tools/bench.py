"""Measure training speed beside a baseline loop, and beside a busy neighbour.

    python -m tools.bench [--data DIR] [--models initial tuned] [--rounds 3] [--seconds 3]

Both loops train on full images, in turn: median (min–max). The peak is that of a matrix product.
"""

import argparse
import json
import os
import tempfile
import timeit
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from common import ROOT, run, write_atomically

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from config import load_config
from data import find_pairs, load_split, read_pair
from losses import weighted_loss
from model import build_model, keep_memory, pick_device, pick_precision
from runs import locked
from train import train

MODELS = ("initial", "modified", "tuned", "best")
LINE = "{:<9}{:>20}{:>20}{:>16}{:>9}{:>9}{:>11} channels_last"


def read_batch(batch: list[tuple[Path, Path, dict]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode a batch of (image, mask, config): float images in [0, 1] and int64 masks."""
    images, masks = map(torch.stack, zip(*(read_pair(*pair) for pair in batch), strict=True))
    return images / 255, masks.long()


def train_baseline(config: dict, device: torch.device, steps: int) -> float:
    """Train so many steps in float32 and the default memory format; returns images/s."""
    keep_memory(False)
    (pairs, _), batch_size = find_pairs(config, "training"), config["batch_size"]
    model = build_model(config).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["learning_rate"])
    files = [(*pairs[i][2:], config) for i in torch.randint(len(pairs), (steps * batch_size,))]
    started = timeit.default_timer()
    for images, masks in DataLoader(files, batch_size, num_workers=2, collate_fn=read_batch):
        loss = weighted_loss(model(images.to(device)), masks.to(device), config["loss"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss.item()  # waits for the device
    return len(files) / (timeit.default_timer() - started)


def train_ours(config: dict, device: torch.device, steps: int) -> float:
    """Train two epochs of so many steps with train.py; returns images/s of the second."""
    keep_memory(True)
    config = config | {"epochs": 2, "images_per_epoch": steps * config["batch_size"]}
    with tempfile.TemporaryDirectory() as folder, locked(Path(folder)):
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            train(config, Path(folder), device, resume=False, overwrite=False)
        return json.loads(Path(folder, "metrics.jsonl").read_text().splitlines()[1])["images_per_s"]


def bench(config: dict, args: argparse.Namespace) -> dict:
    """Time both loops, after a first step of each, and print a line; returns the same for JSON."""
    with FlopCounterMode(display=False) as flops:  # and the cache is built, if need be
        build_model(config)(load_split(config, "training").images[:1] / 255).sum().backward()
    loops, size = (train_baseline, train_ours), config["batch_size"]
    steps = {f: max(1, int(args.seconds * f(config, args.device, 1) / size)) for f in loops}
    rounds = [[f(config, args.device, n) for f, n in steps.items()] for _ in range(args.rounds)]
    baseline, ours = np.array(rounds).T
    rates = {"baseline_images_per_s": baseline, "images_per_s": ours, "ratio": ours / baseline}
    dtype = pick_precision(args.device, config["precision"])
    matrix = torch.randn(2048, 2048).to(args.device, dtype)
    took = timeit.repeat(lambda: (matrix @ matrix)[0, 0].item(), number=1, repeat=5)
    gflops = flops.get_total_flops() * np.median(ours) / 1e9
    share, precision = gflops / (2 * 2048**3 / min(took) / 1e9), str(dtype).removeprefix("torch.")
    cells = [f"{np.median(v):.1f} ({v.min():.1f}–{v.max():.1f})" for v in rates.values()]
    cells += [f"{gflops:.0f}", f"{share:.0%}", precision]
    print(LINE.format(config["name"], *cells), flush=True)
    result = {"name": config["name"], "precision": precision, "gflop_per_s": gflops}
    return result | {"share_of_peak": share, **{key: np.median(v) for key, v in rates.items()}}


def beside_neighbour(config: dict, device: torch.device) -> dict:
    """Train in one process, then in two at once; returns the figures for the JSON file."""
    rates = []
    if "OMP_NUM_THREADS" not in os.environ:  # as common.py does for train.py
        os.environ.setdefault("OMP_PROC_BIND", "true")
    for number in (1, 2):
        with ProcessPoolExecutor(number, torch.multiprocessing.get_context("spawn")) as pool:
            rates += pool.map(train_ours, [config] * number, [device] * number, [15] * number)
    shares = [rate / rates[0] for rate in rates[1:]]
    print("two trainings at once: {:.0%} and {:.0%} of the speed of one alone".format(*shares))
    return {"name": "tuned beside another", "images_per_s": rates[0], "shares": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="data/generated", metavar="DIR")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3, help="of each loop in each round")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, default=Path("report/bench.json"), metavar="FILE")
    parser.add_argument("--device", type=pick_device, default="auto", help="auto, cpu, cuda, mps …")
    args = parser.parse_args()
    common = ["crop=48", "limit_validation=8", f"data={args.data}", *args.overrides]
    configs = {name: load_config([ROOT / f"configs/{name}.yaml"], common) for name in MODELS}
    print(LINE.format("images/s", "baseline", "train.py", "ratio", "GFLOP/s", "of peak", "format:"))
    results = [bench(configs[name] | {"crop": 0}, args) for name in args.models]
    results.append(beside_neighbour(configs["tuned"], args.device))
    write_atomically(args.json, (json.dumps(results, indent=2) + "\n").encode())


if __name__ == "__main__":
    run(main)
