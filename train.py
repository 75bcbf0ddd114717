"""Train one model. One loop, read from top to bottom, serves every experiment.

    python train.py --config configs/tuned.yaml [--set key=value ...] [--data DIR]
                    [--run-dir DIR] [--resume]
    torchrun --nproc_per_node=N train.py ...    in N processes, see distributed.py

Everything random in a step is a function of (seed, step, process), and in the order of the images
of (seed, pass over the data): the same seed gives the same weights on the same machine, and a
resumed run needs no saved random state to go on as if it had never stopped.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import distributed
from augment import augment, take_batch
from checkpoint import (
    clear_run,
    load_checkpoint,
    load_last,
    save_checkpoint,
)
from config import add_arguments, check_sizes, dump, load_config
from data import limit, load_split
from device import autocast, environment, peak_memory_mib, pick_device, pick_precision
from errors import UserError, catch_signals
from events import log, log_hyperparameters, open_events, prediction_pictures, report
from files import lock_run, write_atomically
from images import IGNORE, png
from losses import weighted_loss
from metrics import confusion_matrix, evaluate, scores
from model import build_model
from seeds import epoch_order, seeded


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    masks: Tensor,
    loss_weights: dict[str, float],
    dtype: torch.dtype,
    total: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of gradient descent on an augmented batch.

    Args:
        images: (n, channels, H, W) float in [0, 1]; masks: (n, H, W) uint8, on the same device:
            this process's share of the batch, which is all of it where there is one process.
        loss_weights: see `losses.weighted_loss`.
        dtype: autocast dtype.
        total: images N in the batch.

    Returns:
        The loss, a scalar, the logits (N, C, H, W), both detached and before the step, and the
        masks (N, H, W): of the whole batch.
    """
    with autocast(images.device, dtype):
        logits = model(images)
    logits, masks = distributed.gather(logits, total), distributed.gather(masks, total)
    loss = weighted_loss(logits, masks, loss_weights)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    distributed.sum_gradients(model)
    optimizer.step()
    return loss.detach(), logits.detach(), masks


def finish(run_dir: Path, config: dict, history: list[dict], events: SummaryWriter) -> None:
    """Write what a run came to: hyperparameters, the cost into best.pt, summary.json, a line.

    What it cost is what all of it cost, not what it took to the best epoch.
    """
    best = max(history, key=lambda entry: entry["validation"]["mean_iou"])
    log_hyperparameters(events, config, best)
    cost = {key: history[-1][key] for key in ("images_seen", "train_seconds")}
    checkpoint = load_checkpoint(run_dir / "best.pt", torch.device("cpu"))
    save_checkpoint(run_dir / "best.pt", checkpoint | {"cost": cost})
    summary = {
        "name": config["name"],
        "seed": config["seed"],
        **cost,
        "best_epoch": best["epoch"],
        "training": best["training"],
        "validation": best["validation"],
        "peak_memory_mib": peak_memory_mib(),
    }
    write_atomically(run_dir / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    print(
        f"best epoch {best['epoch']}, validation mean IoU {best['validation']['mean_iou']:.4f}; "
        f"next: python evaluate.py {run_dir / 'best.pt'}"
    )


def train(config: dict, run_dir: Path, resume: bool) -> None:
    """Train the model of a config into a run directory.

    Writes config.yaml, environment.json, metrics.jsonl (a line per epoch), TensorBoard events,
    last.pt (to resume from), best.pt (highest validation mean IoU) with predictions.png (image,
    truth and prediction of a few validation frames) and, at the very end, summary.json.

    Raises:
        UserError: bad data or config; a loss that is not finite; a full disk.
    """
    rank, world = distributed.rank_and_world()  # 0 writes the files; only it prints anything
    device = pick_device(config["device"])
    dtype = pick_precision(device, config["precision"])
    torch.manual_seed(config["seed"])
    classes = list(config["classes"])
    # ---- data: resident as uint8, on the GPU where there is one
    with distributed.together():
        training, validation = (load_split(config, split) for split in ("training", "validation"))
        training = limit(training, config["limit_groups"], config["limit_images"])
        per_epoch = config["images_per_epoch"] or len(training.images)
        for split, masks in (("training", training.masks), ("validation", validation.masks)):
            if all((mask == IGNORE).all() for mask in masks):  # the first that is not ends it
                raise UserError(f"{config['data']}: ignore: leaves no pixel of the {split} split")
        check_sizes(config, training.images.shape[2:], per_epoch)
    steps_per_epoch = math.ceil(per_epoch / config["batch_size"])
    images, masks, val_images, val_masks = (
        array.to(device)
        for array in (training.images, training.masks, validation.images, validation.masks)
    )

    # ---- model, optimizer, schedule
    model = build_model(config).to(device, memory_format=torch.channels_last)
    distributed.synchronise_batch_norm(model)
    if config["compile"]:
        model.compile()
    optimizer = torch.optim.Adam(model.parameters(), lr=config["learning_rate"], fused=True)
    if config["schedule"] == "one_cycle":
        # A step more than there are, so that the rate noted after the last one is of the cycle too;
        # 0.21, since OneCycleLR divides by zero where the share is one whole step.
        cycle = steps_per_epoch * config["epochs"] + 1
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, config["learning_rate"], cycle, pct_start=0.21
        )
    else:
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

    # ---- start afresh, or where the run stopped: between two epochs, or after a step of one
    step = 0  # steps done
    history: list[dict] = []  # the lines of metrics.jsonl
    matrix = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=device)
    loss_sum, seconds = torch.zeros((), device=device), 0.0  # of the epoch so far
    with distributed.together():
        lock = lock_run(run_dir) if rank == 0 else None  # held until the process ends
    with distributed.together():
        last = load_last(run_dir, device) if resume else None
        now = config | {"data (its files)": training.digest}
        then = last["config"] | {"data (its files)": last["data_digest"]} if last else now
        changed = [key for key in now if then.get(key) != now[key] and key != "device"]
        if changed:
            raise UserError(
                f"{run_dir}: was trained with another {', '.join(changed)}; go back to that, or "
                "train without --resume, which starts over"
            )
    if last:
        model.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        scheduler.load_state_dict(last["scheduler"])
        step, history = last["step"], last["history"]
        matrix, loss_sum, seconds = last["matrix"], last["loss_sum"], last["seconds"]
        print(f"{run_dir}: resuming after step {step}, {len(history)} epochs of {config['epochs']}")
    with distributed.together():
        if rank == 0:
            if not last:
                clear_run(run_dir)
            write_atomically(run_dir / "config.yaml", dump(config).encode())
            where = environment(device, dtype) | {"processes": world, "seed": config["seed"]}
            write_atomically(run_dir / "environment.json", json.dumps(where, indent=2).encode())
            # What an interrupted run logged of an epoch that is done again is purged.
            events = open_events(run_dir, first_epoch=len(history) + 1)

    def save_last() -> None:
        """Save all that a resumed run needs to go on as if it had not stopped."""
        save_checkpoint(
            run_dir / "last.pt",
            state
            | {
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "step": step,
                "history": history,
                "matrix": matrix,
                "loss_sum": loss_sum,
                "seconds": seconds,
            },
            keep=run_dir / "previous.pt",
        )

    # ---- the loop
    state = {"config": config, "data_digest": training.digest, "model": model.state_dict()}
    signals = catch_signals()
    purpose = f"step of rank {rank}" if rank else "step"  # each draws its own augmentation
    for epoch in range(len(history), config["epochs"]):
        started = time.perf_counter() - seconds
        model.train()
        order = epoch_order(epoch, per_epoch, len(images), config["seed"])
        batches = order.split(config["batch_size"])[step - epoch * steps_per_epoch :]
        title = f"{config['name']} epoch {epoch + 1}/{config['epochs']}"
        for index in tqdm(batches, title, disable=True if rank else None):
            torch.manual_seed(seeded(config["seed"], purpose, step))
            batch, mask = take_batch(images, masks, distributed.share(index), config)
            batch, mask = augment(batch, mask, config)
            loss, logits, mask = train_step(
                model, optimizer, batch, mask, config["loss"], dtype, len(index)
            )
            scheduler.step()
            step += 1
            loss_sum += loss * len(index)
            matrix += confusion_matrix(logits.argmax(dim=1), mask, len(classes))
            # On a GPU looking at a value waits for it, so look seldom: the sum keeps a NaN.
            if (device.type == "cpu" or step % 50 == 0) and not torch.isfinite(loss_sum):
                raise UserError(
                    f"{run_dir}: the loss is {loss.item()} at step {step} (epoch {epoch + 1}); "
                    "lower learning_rate; the checkpoints are those of the last good epoch"
                )
            if stop := distributed.agree(signals[0] if signals else 0):
                seconds = time.perf_counter() - started
                with distributed.together():
                    if rank == 0:
                        save_last()
                        note = f"stopped after step {step}; --resume goes on from here"
                        print(f"{run_dir}: {note}", flush=True)
                sys.exit(128 + stop)
        train_loss = loss_sum.item() / per_epoch  # waits for the device, so the clock is right
        train_seconds = time.perf_counter() - started

        # ---- validation, on the whole split
        val_matrix, val_loss = evaluate(model, val_images, val_masks, config, dtype)
        if not math.isfinite(train_loss + val_loss):
            raise UserError(
                f"{run_dir}: the loss is {train_loss} in training and {val_loss} in validation "
                f"after epoch {epoch + 1}; lower learning_rate"
            )
        entry = {
            "epoch": epoch + 1,
            "images_seen": (epoch + 1) * per_epoch,
            "learning_rate": scheduler.get_last_lr()[0],
            "train_seconds": (history[-1]["train_seconds"] if history else 0) + train_seconds,
            "images_per_s": per_epoch / train_seconds,
            "training": {"loss": train_loss, **scores(matrix, classes)},
            "validation": {"loss": val_loss, **scores(val_matrix, classes)},
        }
        is_best = entry["validation"]["mean_iou"] > max(
            (old["validation"]["mean_iou"] for old in history), default=-1
        )
        history.append(entry)
        matrix.zero_(), loss_sum.zero_()
        seconds = 0.0

        # ---- files, last.pt at the end: what it does not know of, a resumed run does again
        with distributed.together():
            if rank == 0:
                pictures = prediction_pictures(model, val_images, val_masks, config, dtype)
                log(events, entry, pictures)
                report(entry, config, is_best)
                if is_best:
                    save_checkpoint(run_dir / "best.pt", {**state, **entry})
                    write_atomically(run_dir / "predictions.png", png(pictures))
                lines = "".join(json.dumps(line) + "\n" for line in history)
                write_atomically(run_dir / "metrics.jsonl", lines.encode())
                save_last()

    with distributed.together():
        if rank == 0:
            finish(run_dir, config, history, events)
            lock.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--data", metavar="DIR", help="short for --set data=DIR")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="where to write the run")
    parser.add_argument("--resume", action="store_true", help="go on from last.pt if there is one")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides + ([f"data={args.data}"] if args.data else []))
    where = (Path(config["data"]).name, config["profile"], config["name"], f"seed{config['seed']}")
    train(config, args.run_dir or Path("runs", *where), args.resume)


if __name__ == "__main__":
    distributed.run(main)
