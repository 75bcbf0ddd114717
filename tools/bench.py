"""Measure training speed beside a baseline loop, and beside a busy neighbour.

    python -m tools.bench [--data DIR] [--models initial tuned] [--rounds 3] [--seconds 4]

Both loops train the same model on the same full images at the same batch size. The baseline is
written as people write it: float32, default memory format, a Dataset that decodes PNGs, a
DataLoader with two workers, which start and end within a round: neither loop works while the other
is timed. Ours repeats the step of train.py. Rounds alternate, each of at least two steps and about
`--seconds` long.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import ROOT, run, write_atomically

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.flop_counter import FlopCounterMode

from augment import augment, take_batch
from config import load_config
from data import Split, find_pairs, load_split, read_pair
from evaluate import evaluate
from losses import weighted_loss
from metrics import confusion_matrices
from model import autocast, build_model, keep_memory, pick_device, pick_precision

MODELS = ("initial", "modified", "tuned", "best")
SIDE = 2048  # of the matrices whose product shows the peak
NEIGHBOUR = ("images_per_epoch=1920", "epochs=1", "crop=48", "limit_validation=32")


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


class Baseline:
    """The loop that people write."""

    def __init__(self, config: dict, device: torch.device) -> None:
        self.config, self.device, self.data = config, device, PngDataset(config)
        self.model = build_model(config).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config["learning_rate"])

    def train(self, steps: int) -> None:
        """Train so many steps."""
        batch = self.config["batch_size"]
        chosen = torch.randint(len(self.data), (steps * batch,)).tolist()
        for images, masks in DataLoader(Subset(self.data, chosen), batch, num_workers=2):
            images, masks = images.to(self.device), masks.to(self.device)
            loss = weighted_loss(self.model(images), masks, self.config["loss"])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        loss.item()  # waits for the device


class Ours:
    """The step of train.py."""

    def __init__(self, config: dict, device: torch.device, split: Split) -> None:
        self.config, self.device, self.seconds_on_data = config, device, 0.0
        self.dtype = pick_precision(device, config["precision"])
        self.images, self.masks = split.images.to(device), split.masks.to(device)
        self.model = build_model(config).to(device, memory_format=torch.channels_last)
        parameters = self.model.parameters()
        self.optimizer = torch.optim.Adam(parameters, lr=config["learning_rate"], fused=True)

    def train(self, steps: int) -> None:
        """Train so many steps."""
        config, classes, matrix = self.config, len(self.config["classes"]), 0
        for _ in range(steps):
            started = time.perf_counter()
            index = torch.randint(len(self.images), (config["batch_size"],))
            batch, mask = augment(*take_batch(self.images, self.masks, index, config), config)
            self.seconds_on_data += time.perf_counter() - started
            with autocast(self.device, self.dtype):
                logits = self.model(batch)
            loss = weighted_loss(logits, mask, config["loss"])
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            matrix += confusion_matrices(logits.argmax(dim=1), mask, classes).sum(dim=0)
        matrix.sum().item()  # waits for the device


def seconds(work: Callable[..., object], *args: object) -> float:
    """Measure the wall-clock seconds of a call."""
    started = time.perf_counter()
    work(*args)
    return time.perf_counter() - started


def matmul_gflops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure GFLOP/s of one large matrix product, the best of five."""
    a = torch.randn(SIDE, SIDE, device=device, dtype=dtype)
    return 2 * SIDE**3 / min(seconds(lambda: (a @ a)[0, 0].item()) for _ in range(5)) / 1e9


def training_gflop(config: dict, size: tuple[int, int]) -> float:
    """Count GFLOP of forward and backward pass for an image of (height, width)."""
    model = build_model(config)
    with FlopCounterMode(display=False) as flops:
        model(torch.zeros(2, config["in_channels"], *size)).sum().backward()
    return flops.get_total_flops() / 2 / 1e9


def spread(values: list[float], form: str = "{:.0f}") -> str:
    """Format the median with minimum and maximum."""
    return "{} ({}–{})".format(*(form.format(f(values)) for f in (statistics.median, min, max)))


def bench(name: str, args: argparse.Namespace, device: torch.device) -> dict:
    """Time one model and print its line; returns the figures for the JSON file."""
    config = load_config([ROOT / "configs" / f"{name}.yaml"], [f"data={args.data}", "crop=0"])
    split, batch = load_split(config, "training"), config["batch_size"]
    loops = {"baseline": Baseline(config, device), "ours": Ours(config, device, split)}
    dtype, steps, peak, rates = loops["ours"].dtype, {}, [], {"baseline": [], "ours": []}
    for number in range(args.rounds + 1):
        for key, loop in loops.items():
            keep_memory(key == "ours")  # what train.py arranges serves ours alone
            if number == 0:  # warm-up, and how many steps make a round
                loop.train(1)
                steps[key] = max(2, int(args.seconds / seconds(loop.train, 1)))
                loop.seconds_on_data = 0.0
            else:
                took = seconds(loop.train, steps[key])
                rates[key].append(batch * steps[key] / took)
        peak.append(matmul_gflops(device, dtype))
    ratios = [o / b for b, o in zip(rates["baseline"], rates["ours"], strict=True)]
    gflops = training_gflop(config, split.images.shape[2:]) * statistics.median(rates["ours"])
    few = split.images[:256], split.masks[:256]
    on_data = loops["ours"].seconds_on_data / (args.rounds * steps["ours"] * batch)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, else KiB
    result = {
        "name": name,
        "precision": str(dtype).removeprefix("torch."),
        "images_per_s": statistics.median(rates["ours"]),
        "baseline_images_per_s": statistics.median(rates["baseline"]),
        "ratio": statistics.median(ratios),
        "gflop_per_s": gflops,
        "share_of_peak": gflops / statistics.median(peak),
        "data_share": on_data * statistics.median(rates["ours"]),
        "evaluation_images_per_s": len(few[0])
        / seconds(evaluate, loops["ours"].model, *few, config, dtype),
        "peak_memory_mib": memory / (2**20 if sys.platform == "darwin" else 2**10),
    }
    print(
        f"{name:<9}{spread(rates['baseline']):>16}{spread(rates['ours']):>16}"
        f"{spread(ratios, '{:.2f}'):>18}{gflops:>9.0f}{result['share_of_peak']:>9.0%}"
        f"{result['data_share']:>7.1%}{result['evaluation_images_per_s']:>12.0f}",
        flush=True,
    )
    return result


def beside_neighbour(args: argparse.Namespace) -> dict:
    """Measure training of tuned alone, then two of them side by side."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "train.py", "--config", ROOT / "configs/tuned.yaml"]
        command += ["--device", args.device, "--set", f"data={args.data}", *NEIGHBOUR]
        runs = [Path(folder, name) for name in ("alone", "left", "right")]
        commands = [[*command, "--run-dir", run_dir] for run_dir in runs]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(commands[0], check=True, **quiet)
        for process in [subprocess.Popen(command, **quiet) for command in commands[1:]]:
            process.wait()
        rates = [json.loads((r / "metrics.jsonl").read_text())["images_per_s"] for r in runs]
    shares = [rate / rates[0] for rate in rates[1:]]
    print(
        f"two trainings of tuned side by side: {shares[0]:.0%} and {shares[1]:.0%} of the speed of "
        f"one alone, {rates[0]:.0f} crops/s (GOMP_SPINCOUNT={os.environ['GOMP_SPINCOUNT']})"
    )
    return {"name": "tuned beside another", "images_per_s": rates[0], "shares": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/generated"), metavar="DIR")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4, help="of each loop in each round")
    parser.add_argument("--json", type=Path, default=Path("report/bench.json"), metavar="FILE")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps …")
    args = parser.parse_args()
    device = pick_device(args.device)
    dtype = str(pick_precision(device, "auto")).removeprefix("torch.")
    print(
        f"training, images/s, median (min–max) of {args.rounds} rounds; train.py in {dtype} and "
        f"channels_last; {device}, {os.cpu_count()} cores, PyTorch {torch.__version__}\n"
        f"{'model':<9}{'baseline':>16}{'train.py':>16}{'ratio':>18}{'GFLOP/s':>9}{'of peak':>9}"
        f"{'data':>7}{'evaluation':>12}"
    )
    results = [bench(name, args, device) for name in args.models]
    print(f"of peak: share of the {dtype} matrix product's GFLOP/s, measured in each round")
    results.append(beside_neighbour(args))
    write_atomically(args.json, (json.dumps(results, indent=2) + "\n").encode())


if __name__ == "__main__":
    run(main)
