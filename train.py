"""Train one model. One loop, read from top to bottom, serves every experiment.

    python train.py --config configs/tuned.yaml [--set key=value ...] [--data DIR]
                    [--run-dir DIR] [--resume] [--overwrite] [--device DEVICE]
    torchrun --nproc_per_node=N train.py ...    in N processes, each with a share of every batch

All randomness is a function of seed and step: the same seed gives the same weights on the same
machine, also in a run that was killed and resumed.
"""

import argparse
import contextlib
import copy
import hashlib
import math
import os
import time
from pathlib import Path

from common import UserError, code_digest, reading, run

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR
from tqdm import tqdm

import runs
from augment import augment, take_batch
from config import add_arguments, load_config
from data import Split, limit, load_split
from evaluate import evaluate
from losses import weighted_loss
from metrics import IGNORE, confusion_matrices, scores
from model import build_model, count_parameters, keep_memory, pick_device, pick_precision


def train(config: dict, run_dir: Path, device: torch.device, resume: bool, overwrite: bool) -> None:
    """Train the model of a config into a run directory.

    Writes config.yaml, environment.json, metrics.jsonl (a line an epoch), TensorBoard events,
    last.pt (to resume from), best.pt (highest validation mean IoU) with predictions.png and, at
    the very end, summary.json. For `resume` and `overwrite` see `runs.resume_run`. UserError if
    data or config are bad, or a loss is not finite.
    """
    # The number of this process and of all; rank 0 writes the files.
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    dtype, seed = pick_precision(device, config["precision"]), config["seed"]
    epochs, batch_size, classes = config["epochs"], config["batch_size"], list(config["classes"])

    # ---- data: resident as uint8, on the device
    training, validation = load_data(config)
    images, masks = training.images.to(device), training.masks.to(device)
    per_epoch = config["images_per_epoch"] or len(images)
    if config["last_batch"] == "drop" and per_epoch > batch_size:
        per_epoch -= per_epoch % batch_size
    steps = math.ceil(per_epoch / batch_size)  # per epoch

    # ---- model, optimizer, learning-rate schedule
    torch.manual_seed(seed)
    model = build_model(config).to(device, memory_format=torch.channels_last)
    try_batch(model, images, masks, config, min(2, per_epoch % batch_size or batch_size))
    optimizer = torch.optim.Adam(model.parameters(), lr=config["learning_rate"], fused=True)
    scheduler = make_scheduler(optimizer, config["schedule"], steps * epochs, config["warm_up"])

    # ---- start over, or go on after the last finished epoch; `about` is in every checkpoint
    about = {"config": config, "data_digest": training.digest, "code": code_digest()}
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    history = runs.resume_run(run_dir, about, parts, resume, overwrite)  # an entry an epoch
    net = model
    if world > 1:
        if device.type == "cuda":  # there is none for CPUs
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        net = DistributedDataParallel(model)
    if rank == 0:
        writer = runs.start_run(run_dir, config, history, device, dtype, world)

    for epoch in range(len(history), epochs):
        # ---- train
        started = time.perf_counter()
        model.train()
        loss_sum = torch.zeros((), device=device)
        matrix = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=device)
        batches = epoch_order(epoch, per_epoch, len(images), seed).split(batch_size)
        title, first_step = f"{config['name']} epoch {epoch + 1}/{epochs}", epoch * steps
        bar = tqdm(batches, title, disable=rank > 0 or None)  # None: a bar in a terminal only
        for step, index in enumerate(bar, first_step):
            torch.manual_seed(derive_seed(seed, f"step of rank {rank}" if rank else "step", step))
            index = index[rank % len(index) :: world]  # this process's share, never empty
            batch, mask = augment(*take_batch(images, masks, index, config), config)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = net(batch)
            loss = weighted_loss(logits, mask, config["loss"])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            loss_sum += loss.detach() * len(index)
            matrix += confusion_matrices(logits.argmax(dim=1), mask, len(classes)).sum(dim=0)
        if world > 1:
            dist.all_reduce(loss_sum), dist.all_reduce(matrix)
        train_loss = loss_sum.item() / per_epoch  # waits for the device, so the clock is right
        seconds = time.perf_counter() - started

        # ---- validate
        pixels = validation.images, validation.masks
        matrices, val_loss, predictions = evaluate(model, *pixels, config, dtype)
        if not math.isfinite(train_loss + val_loss):
            found = f"{train_loss} in training and {val_loss} in validation"
            raise UserError(f"{run_dir}: {title}: the loss is {found}; lower learning_rate")
        entry = {
            "epoch": epoch + 1,
            "images_seen": (epoch + 1) * per_epoch,
            "train_seconds": seconds + (history[-1]["train_seconds"] if history else 0),
            "images_per_s": per_epoch / seconds,
            "learning_rate": scheduler.get_last_lr()[0],
            "training": {"loss": train_loss, **scores(matrix, classes)},
            "validation": {"loss": val_loss, **scores(matrices.sum(dim=0), classes)},
        }
        history.append(entry)

        if rank == 0:
            figure = runs.show_predictions(validation, predictions, config)
            runs.write_epoch(run_dir, about, parts, history, figure, writer)

    if rank == 0:
        runs.write_summary(run_dir, about, history, count_parameters(model), writer)


def load_data(config: dict) -> tuple[Split, Split]:
    """Load training and validation split, limited as the config says; UserError if none is left."""
    training = limit(load_split(config, "training"), config["limit_groups"], config["limit_images"])
    validation = limit(load_split(config, "validation"), 0, config["limit_validation"])
    for name, split in (("training", training), ("validation", validation)):
        if all((mask == IGNORE).all() for mask in split.masks):  # the first that is not ends it
            raise UserError(f"{config['data']}: ignore: leaves no pixel of the {name} split")
    return training, validation


def try_batch(model: nn.Module, images: Tensor, masks: Tensor, config: dict, size: int) -> None:
    """Try a small batch on a copy of the model; UserError if the config cannot be used with it."""
    always = {key: 1.0 for key in ("blur", "jitter") if config[key] > 0}
    with reading("the config", "change the key that this is about"), torch.no_grad():
        index = torch.arange(size) % len(images)
        batch, mask = augment(*take_batch(images, masks, index, config), config | always)
        weighted_loss(copy.deepcopy(model).train()(batch), mask, config["loss"])


def make_scheduler(
    optimizer: torch.optim.Optimizer, schedule: str, steps: int, warm_up: float
) -> LRScheduler:
    """Make the schedule of learning rate and Adam's first beta, stepped after every batch."""
    if schedule == "constant":
        return ConstantLR(optimizer, factor=1.0)
    # One step more, since the rate is noted after the last one.
    return OneCycleLR(optimizer, optimizer.param_groups[0]["lr"], steps + 1, pct_start=warm_up)


def derive_seed(seed: int, stream: str, index: int) -> int:
    """Derive an independent 32-bit seed for each item of each random stream of each run."""
    # Hashed, since the CPU's generator looks at the low 32 bits of a seed alone.
    digest = hashlib.sha256(f"{seed} {stream} {index}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def epoch_order(epoch: int, per_epoch: int, total: int, seed: int) -> Tensor:
    """Order the images of an epoch, (per_epoch,) int64: one shuffled pass after another."""
    start, stop = epoch * per_epoch, (epoch + 1) * per_epoch
    passes = []
    for number in range(start // total, (stop - 1) // total + 1):
        generator = torch.Generator().manual_seed(derive_seed(seed, "pass", number))
        passes.append(torch.randperm(total, generator=generator))
    return torch.cat(passes)[start % total :][:per_epoch]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--data", metavar="DIR", help="short for --set data=DIR")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="where to write the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run that is there")
    parser.add_argument("--overwrite", action="store_true", help="discard the run that is there")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps …")
    args = parser.parse_args()
    data = [f"data={args.data!r}"] if args.data else []
    config = load_config(args.config, args.overrides + data)
    where = (Path(config["data"]).name, config["profile"], config["name"], f"seed{config['seed']}")
    run_dir = args.run_dir or Path("runs", *where)
    device = pick_device(args.device)
    keep_memory()
    if dist.is_torchelastic_launched():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    with contextlib.nullcontext() if int(os.environ.get("RANK", 0)) else runs.locked(run_dir):
        train(config, run_dir, device, args.resume, args.overwrite)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
