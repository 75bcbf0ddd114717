"""Train one model. One loop, read from top to bottom, serves every experiment.

    python train.py --config configs/tuned.yaml [--set key=value ...] [--data DIR]
                    [--run-dir DIR] [--resume] [--overwrite] [--device DEVICE]
    torchrun --nproc_per_node=N train.py ...    in N processes, each with a share of every batch

All randomness is a function of seed and step: the same seed gives the same weights on the same
machine, also in a run that was killed and resumed (on CPUs; GPUs are untested).
"""

import argparse
import contextlib
import copy
import math
import time
from pathlib import Path

# Before torch: see machine.py.
from machine import autocast, fits, keep_memory, pick_device, pick_precision

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import processes
import runs
from augment import check_sizes, get_batch
from checkpoints import load_state, load_weights, restore_best, save_best, save_checkpoint
from common import UserError, code_digest, run
from config import add_arguments, data_override, load_config
from data import load_data
from evaluate import evaluate
from figures import write_png
from losses import check_loss, weighted_loss
from metrics import confusion_matrices, scores
from model import bilinear_start_applies, build_model
from schedule import derive_seed, epoch_order, make_scheduler


def train(config: dict, run_dir: Path, device: torch.device, resume: bool, overwrite: bool) -> None:
    """Train the model of a config into a run directory.

    Writes config.yaml, environment.json, metrics.jsonl (a line for each epoch), TensorBoard
    events, best.pt (highest validation mean IoU) with predictions.png, last.pt (to resume from)
    and, at the very end, summary.json. For `resume` and `overwrite` see `runs.find_checkpoint`.
    UserError if data or config cannot be used, or the loss is not finite.
    """
    rank, world = processes.place()
    is_first = rank == 0  # this process writes the files
    stream = "step" if is_first else f"step of rank {rank}"  # of random numbers
    hide_bar = None if is_first else True  # None: tqdm shows its bar in a terminal only
    seed = config["seed"]
    classes = list(config["classes"])
    check_loss(config["loss"])
    code = code_digest()  # at once: an edit from now on has no effect in this process

    # ---- 1. data: uint8, on a GPU if there is room
    training, validation = load_data(config)
    images, masks = training.images, training.masks
    if fits(device, images.numel() + masks.numel()):
        images, masks = images.to(device), masks.to(device)
    data_digest = f"{training.digest} {validation.digest}"
    val_images = validation.images[rank::world]  # the share of this process
    val_masks = validation.masks[rank::world]
    batch_size = config["batch_size"]
    images_per_epoch = config["images_per_epoch"] or len(images)
    if config["last_batch"] == "drop" and images_per_epoch > batch_size:
        images_per_epoch -= images_per_epoch % batch_size
    processes.check_shares(config, images_per_epoch, len(validation.images))
    steps_per_epoch = math.ceil(images_per_epoch / batch_size)

    # ---- 2. model
    torch.manual_seed(seed)
    dtype = pick_precision(device, config["precision"])
    model = build_model(config).to(device, memory_format=torch.channels_last)
    smallest_batch = images_per_epoch % batch_size or batch_size
    check_sizes(config, images.shape[2], images.shape[3], model.stride, smallest_batch // world)
    try_batch(model, images, masks, device, dtype, config)
    if config["upsampling_init"] == "bilinear" and not bilinear_start_applies(model):
        needs = "skip: pooled and a last decoder stage of `classes` channels"
        print(f"note: upsampling_init: bilinear needs {needs}; here it has no effect")

    # ---- 3. optimizer and schedule of the learning rate
    # Another optimizer goes here; train into a new folder then. last.pt holds the state of the old
    # one and its settings, which would replace yours. one_cycle also moves Adam's first beta, or
    # the momentum of SGD.
    betas = (0.9, config["adam_beta2"])
    optimizer = torch.optim.Adam(model.parameters(), config["learning_rate"], betas, fused=True)
    steps = steps_per_epoch * config["epochs"]
    scheduler = make_scheduler(optimizer, config["schedule"], steps, config["warm_up"])

    # ---- 4. start over, or go on after the last finished epoch
    resumed = None
    if is_first:
        resumed = runs.find_checkpoint(run_dir, config, data_digest, resume, overwrite)
    resumed = processes.send_to_all(resumed)
    history = []  # an entry for each epoch
    if resumed is not None:
        history = resumed["history"]
        remedy = "discard this run: make … OVERWRITE=1 (--overwrite)"
        load_state(model, resumed["model"], run_dir / "last.pt", remedy)
        optimizer.load_state_dict(resumed["optimizer"])
        scheduler.load_state_dict(resumed["scheduler"])
        if is_first and history[-1] is runs.best_of(history):
            restore_best(run_dir, resumed)
    elif config["init"]:
        print(load_weights(model, Path(config["init"]).expanduser(), classes))
    if len(history) == config["epochs"]:  # nothing is left to train
        if is_first:
            runs.finish(run_dir, config, history, resumed["code"], training.digest, model)
        return
    if resumed is not None and resumed["code"] != code:
        code = "mixed"
    net = model
    if world > 1:
        if device.type == "cuda":  # CPUs have no SyncBatchNorm
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        net = DistributedDataParallel(model)
    if is_first:
        environment = runs.describe_environment(device, dtype, world)
        if code == "mixed":
            environment["commit"] += ", begun by other code"
        writer = runs.start_run(run_dir, config, environment, done=len(history))

    # ---- 5. the loop
    for epoch in range(len(history), config["epochs"]):
        title = f"{config['name']} epoch {epoch + 1}/{config['epochs']}"
        started = time.perf_counter()
        model.train()
        loss_sum = torch.zeros((), device=device)
        matrix = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=device)
        # The indices of images, shuffled; a pass over the data may end inside an epoch.
        order = epoch_order(epoch, images_per_epoch, len(images), seed).to(images.device)
        bar = tqdm(order.split(batch_size), title, disable=hide_bar)
        for step, index in enumerate(bar, start=epoch * steps_per_epoch):
            torch.manual_seed(derive_seed(seed, stream, step))
            share = index[rank::world]  # of this process
            batch, mask = get_batch(images, masks, share, device, config)
            with autocast(device, dtype):
                logits = net(batch)
            predicted = logits.argmax(dim=1)  # first: a loss of your own may change the logits
            loss = weighted_loss(logits, mask, config["loss"])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            loss_sum += loss.detach() * len(share)
            matrix += confusion_matrices(predicted, mask, len(classes)).sum(dim=0)
        matrix = processes.total(matrix)
        loss_sum = processes.total(loss_sum)
        train_loss = loss_sum.item() / images_per_epoch  # waits for the device: the clock is right
        seconds = time.perf_counter() - started

        processes.share_buffers(model)
        matrices, val_loss, predictions = evaluate(
            model, val_images, val_masks, len(classes), dtype, config["loss"]
        )
        val_matrix = processes.total(matrices.sum(dim=0))
        val_loss = processes.mean(val_loss, len(val_images))
        if not math.isfinite(train_loss + val_loss):
            values = f"{train_loss} in training and {val_loss} in validation"
            advice = "lower learning_rate, or look for log(0) or 0/0 in a loss of your own"
            raise UserError(f"{run_dir}: {title}: the loss is {values}; {advice}")
        entry = {
            "epoch": epoch + 1,
            "images_seen": (epoch + 1) * images_per_epoch,
            "train_seconds": seconds + (history[-1]["train_seconds"] if history else 0),
            "images_per_s": images_per_epoch / seconds,
            "learning_rate": scheduler.get_last_lr()[0],
            "training": {"loss": train_loss, **scores(matrix, classes)},
            "validation": {"loss": val_loss, **scores(val_matrix, classes)},
        }
        history.append(entry)

        if is_first:
            is_best = entry is runs.best_of(history)
            picture = runs.draw_predictions(val_images, val_masks, predictions, config)
            runs.write_history(run_dir, history)
            runs.log_epoch(writer, entry, picture)
            checkpoint = {
                "config": config,
                "data_digest": data_digest,
                "code": code,
                "history": history,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
            }
            # After the files above: a run that is killed before this line repeats the epoch.
            save_checkpoint(run_dir / "last.pt", checkpoint)
            if is_best:
                write_png(run_dir / "predictions.png", picture)
                save_best(run_dir, checkpoint)
            runs.print_epoch(config, entry, is_best)

    if is_first:
        runs.write_summary(run_dir, config, history, code, training.digest, model)
        runs.log_summary(writer, config, history)


def try_batch(
    model: nn.Module,
    images: Tensor,
    masks: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    config: dict,
) -> None:
    """Try a batch on a copy of the model: most mistakes show before an old run is discarded.

    It computes what a step of the loop computes up to the gradients, with blur and jitter in every
    image if the config has them. ValueError if the logits have another shape than the loss needs,
    or the loss is not a single finite number.
    """
    always = dict(config)
    for key in ("blur", "jitter"):
        if config[key] > 0:
            always[key] = 1.0
    index = torch.zeros(2, dtype=torch.int64, device=images.device)
    batch, mask = get_batch(images, masks, index, device, always)
    copied = copy.deepcopy(model).train()
    with autocast(device, dtype):
        logits = copied(batch)
    needed = (len(mask), len(config["classes"]), *mask.shape[1:])
    if logits.shape != needed:
        raise ValueError(f"the model gives logits of shape {tuple(logits.shape)}, not {needed}")
    loss = weighted_loss(logits, mask, config["loss"])
    if not isinstance(loss, Tensor):
        raise ValueError(f"the loss is {loss!r}, not a tensor")
    if loss.shape != ():
        raise ValueError(f"the loss has shape {tuple(loss.shape)}, not () as a single number")
    if not loss.isfinite():
        raise ValueError(
            f"the loss of a first batch is {loss.item()}; look for log(0) or 0/0 in it"
        )
    loss.backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--data", metavar="DIR", help="short for --set data=DIR")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="where to write the run")
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="go on with the run that is there")
    earlier.add_argument("--overwrite", action="store_true", help="discard the run that is there")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps …")
    args = parser.parse_args()
    overrides = list(args.overrides)
    if args.data:
        overrides.append(data_override(args.data))
    config = load_config(args.config, overrides)
    run_dir = args.run_dir or runs.default_folder(config)
    device = pick_device(args.device)
    keep_memory()

    processes.join(device)
    rank, _ = processes.place()
    lock = runs.locked(run_dir) if rank == 0 else contextlib.nullcontext()
    with lock:
        train(config, run_dir, device, args.resume, args.overwrite)
    processes.leave()


if __name__ == "__main__":
    run(main)
