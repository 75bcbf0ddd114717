"""Score checkpoints on a whole split and print the comparison table.

    python evaluate.py CHECKPOINT... [--data DIR] [--split testing] [--json FILE]
    python evaluate.py RUN/best.pt... --beside

A file that --json wrote may stand in place of a checkpoint; it is read, and nothing is evaluated
again. So may the summary.json of a run; its validation scores are shown. With --beside each run
keeps its own results, and only those that were trained since are evaluated.
"""

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# Before torch: see machine.py.
from machine import autocast, keep_memory, pick_device, pick_precision

import numpy as np
import torch
from torch import Tensor, nn

import metrics
from checkpoints import restore_model
from common import ROOT, SPLITS, UserError, reading, require, run, write_atomically
from config import is_same
from data import Split, evenly, load_split, to_float
from losses import weighted_loss
from metrics import IGNORE
from model import count_parameters
from table import LAB, comparison_table, read_results

# Pixels of a batch. 32 images of 128×128 fit the caches of a processor, and larger batches were no
# faster there. A GPU needs more to be busy.
CPU_BATCH = 32 * 128**2
GPU_BATCH = 256 * 128**2
CODE_OF_TESTS = (ROOT / "evaluate.py", ROOT / "metrics.py")
SHOWN = 4  # evenly spaced images, and as many of the worst, that are kept for the report


# ---- the model on images


def images_per_batch(height: int, width: int, device: torch.device) -> int:
    """Choose how many images of a size a batch holds, so that its memory is the same for all."""
    pixels = CPU_BATCH if device.type == "cpu" else GPU_BATCH
    most = pixels // 128**2  # of smaller images no more: that was no faster
    return max(1, min(most, pixels // (height * width)))


@torch.no_grad()  # not inference_mode, which forbids a loss to change logits in place
def predict_batches(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the logits (n, C, H, W) of batches of whole (M, channels, H, W) uint8 images.

    The logits have the given dtype. Only one batch of images is on the device of the model at a
    time.
    """
    device = next(model.parameters()).device
    height, width = images.shape[-2:]
    for batch in images.split(images_per_batch(height, width, device)):
        with autocast(device, dtype):
            logits = model(to_float(batch.to(device, non_blocking=True)))
        yield logits


def evaluate(
    model: nn.Module,
    images: Tensor,
    masks: Tensor,
    num_classes: int,
    dtype: torch.dtype,
    loss: dict[str, float] | None = None,
) -> tuple[Tensor, float | None, Tensor]:
    """Run a model in evaluation mode once over images and compare its predictions with masks.

    From (M, channels, H, W) images and (M, H, W) masks, both uint8; `loss` is that of a config.
    Returns, all on the CPU: (M, C, C) int64 confusion matrices of the images; the mean of the
    batches' losses, weighted by their images, None without a `loss`; (M, H, W) uint8 predicted
    classes.
    """
    model.eval()
    matrices = []
    predictions = []
    loss_sum = 0.0
    done = 0
    for logits in predict_batches(model, images, dtype):
        mask = masks[done : done + len(logits)].to(logits.device)
        predicted = logits.argmax(dim=1)
        matrices.append(metrics.confusion_matrices(predicted, mask, num_classes))
        predictions.append(predicted.to(torch.uint8).cpu())
        if loss is not None:
            # A tensor on the device: converting it to a number each time would make a GPU wait.
            loss_sum = loss_sum + weighted_loss(logits, mask, loss) * len(mask)
        done += len(mask)
    mean_loss = None if loss is None else float(loss_sum) / done
    return torch.cat(matrices).cpu(), mean_loss, torch.cat(predictions)


# ---- the lab's test batch


def find_lab_batch(names: list[str], split: str) -> list[int] | None:
    """Find the lab's fifty test images, in its order; None unless the split holds all of them."""
    if split != "testing":
        return None
    index_of = {name: index for index, name in enumerate(names)}
    if not all(name in index_of for name in LAB["test_batch"]):
        return None
    return [index_of[name] for name in LAB["test_batch"]]


def score_in_training_mode(
    path: Path, config: dict, batch: tuple[Tensor, Tensor], device: torch.device
) -> float | None:
    """Measure the mean IoU as the lab did: on one batch, by a model that is in training mode.

    Batch norm then uses the statistics of this batch of images and masks. The weights are from the
    last epoch: from last.pt beside the checkpoint `path`. None if no last.pt of this run is there.
    """
    last = path.with_name("last.pt")
    if not last.exists():
        return None
    model, checkpoint = restore_model(last, device)  # a model of its own, which may change
    # `epochs` may have grown since the best epoch, if the run was continued.
    keys = [key for key in config if key != "epochs"]
    if not all(is_same(checkpoint["config"][key], config[key]) for key in keys):
        return None
    images, masks = batch
    dtype = pick_precision(device, config["precision"])
    torch.manual_seed(0)  # for dropout
    model.train()
    with torch.inference_mode(), autocast(device, dtype):
        predicted = model(to_float(images.to(device))).argmax(dim=1).cpu()
    matrices = metrics.confusion_matrices(predicted, masks, len(config["classes"]))
    return metrics.number(metrics.mean_iou(matrices.sum(dim=0)))


def lab_scores(
    path: Path,
    config: dict,
    loaded: Split,
    split: str,
    matrices: Tensor,
    device: torch.device,
) -> dict[str, float | None]:
    """Score the checkpoint `path` on the lab's test batch: two keys of a row, None for other data.

    `matrices` are the (M, C, C) confusion matrices of all images of the split, in evaluation mode.
    """
    scores = {"lab_batch": None, "lab_batch_training_mode": None}
    lab_batch = find_lab_batch(loaded.names, split)
    if lab_batch is None:
        return scores
    scores["lab_batch"] = metrics.number(metrics.mean_iou(matrices[lab_batch].sum(dim=0)))
    batch = loaded.images[lab_batch], loaded.masks[lab_batch]
    scores["lab_batch_training_mode"] = score_in_training_mode(path, config, batch, device)
    return scores


# ---- a checkpoint on a split


def cost_of(path: Path, checkpoint: dict) -> dict:
    """Look up images_seen and train_seconds of the whole run; None if it is not finished."""
    cost = checkpoint.get("cost")  # of weights that were exported; others have a summary.json
    summary = path.with_name("summary.json")
    if not cost and summary.exists():
        with reading(summary, "train this run again"):
            cost = json.loads(summary.read_text(encoding="utf-8"))
            require(cost, {"images_seen": int, "train_seconds": float})
    if not cost:
        return {"images_seen": None, "train_seconds": None}
    return {"images_seen": cost["images_seen"], "train_seconds": cost["train_seconds"]}


def sum_by_group(matrices: Tensor, groups: list[str]) -> Tensor:
    """Add up the (M, C, C) confusion matrices of each group of images: (G, C, C)."""
    names, group_of_image = np.unique(groups, return_inverse=True)
    sums = matrices.new_zeros(len(names), *matrices.shape[1:])
    return sums.index_add(0, torch.from_numpy(group_of_image), matrices)


def mean_boundary_iou(predictions: Tensor, masks: Tensor, num_classes: int) -> float | None:
    """Average the boundary IoU of (M, H, W) predicted and true classes over the classes."""
    total = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64)
    for predicted, mask in metrics.chunks(predictions, masks):
        total += metrics.boundary_matrices(predicted, mask, num_classes).sum(dim=0)
    return metrics.number(metrics.iou(total)[:-1].nanmean())


def choose_shown(matrices: Tensor, groups: list[str]) -> list[int]:
    """Choose images for the report: `SHOWN` evenly spaced, then the worst of as many groups."""
    ious = metrics.mean_iou(matrices).nan_to_num(1)  # NaN: all pixels are ignored
    worst: dict[str, int] = {}  # group → its worst image; the worst group first
    for index in ious.argsort(stable=True).tolist():
        worst.setdefault(groups[index], index)
    return evenly(len(groups), SHOWN) + list(worst.values())[:SHOWN]


def pack_arrays(loaded: Split, matrices: Tensor, predictions: Tensor) -> dict:
    """Collect what the report shows of a split, as arrays that numpy can save.

    names and groups (M,); matrices (M, C, C); predictions (M, H, W), IGNORE where the mask is; and
    images and masks of the few images whose indices are in `shown` (K,).
    """
    shown = choose_shown(matrices, loaded.groups)
    return {
        "names": loaded.names,
        "groups": loaded.groups,
        "shown": shown,
        "matrices": matrices.int(),
        "predictions": predictions.where(loaded.masks != IGNORE, IGNORE),
        "images": loaded.images[shown],
        "masks": loaded.masks[shown],
    }


def evaluate_checkpoint(
    path: Path, data: str | None, split: str, device: torch.device
) -> tuple[dict, dict]:
    """Evaluate a checkpoint on a split of `data`, or of the data that it was trained on.

    Returns a row of the table: scores, and what the checkpoint says about itself, as plain data.
    And the arrays of `pack_arrays`. UserError if the checkpoint or the data cannot be read, or if
    all pixels are ignored.
    """
    started = time.perf_counter()
    model, checkpoint = restore_model(path, device)
    config = checkpoint["config"]
    data_config = dict(config)
    if data is not None:
        data_config["data"] = data
    loaded = load_split(data_config, split)
    masks = loaded.masks
    dtype = pick_precision(device, config["precision"])
    classes = list(config["classes"])
    matrices, _, predictions = evaluate(model, loaded.images, masks, len(classes), dtype)
    matrix = matrices.sum(dim=0)
    if not matrix.any():
        raise UserError(f"{data_config['data']}: ignore: leaves no pixel of the {split} split")

    scores = metrics.scores(matrix, classes)
    lab = lab_scores(path, config, loaded, split, matrices, device)
    cost = cost_of(path, checkpoint)
    group_matrices = sum_by_group(matrices, loaded.groups)
    row = {
        "name": config["name"],
        "seed": config["seed"],
        "profile": config["profile"],
        "images_seen": cost["images_seen"],
        "train_seconds": cost["train_seconds"],
        "checkpoint": str(path),
        "data": data_config["data"],
        "split": split,
        "digest": loaded.digest,
        "images": len(masks),
        "groups": len(group_matrices),
        "parameters": count_parameters(model),
        "pixel_accuracy": scores["pixel_accuracy"],
        "mean_iou": scores["mean_iou"],
        "mean_iou_foreground": scores["mean_iou_foreground"],
        "mean_dice": scores["mean_dice"],
        "per_class_iou": scores["per_class_iou"],
        "dead_classes": scores["dead_classes"],
        "interval": metrics.interval(group_matrices),
        "lost_positions": metrics.lost_positions(predictions, masks, classes),
        "boundary_iou": mean_boundary_iou(predictions, masks, len(classes)),
        "lab_batch": lab["lab_batch"],
        "lab_batch_training_mode": lab["lab_batch_training_mode"],
        "code": checkpoint.get("code"),
        "confusion_matrix": matrix.tolist(),
    }
    print(f"{path}: {len(masks)} images, {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return row, pack_arrays(loaded, matrices, predictions)


# ---- the command line


def parse_arguments() -> argparse.Namespace:
    """Read the command line; UserError if options contradict each other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="CHECKPOINT", help="or JSON of one")
    parser.add_argument("--data", metavar="DIR", help="another data set than it was trained on")
    parser.add_argument("--split", choices=SPLITS, default="testing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument(
        "--beside",
        action="store_true",
        help="write testing.json and testing.npz beside each checkpoint; keep those that are newer",
    )
    parser.add_argument("--goal", type=float, metavar="IOU", help="fail unless all runs reach it")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps …")
    args = parser.parse_args()
    if args.beside and (args.data or args.split != "testing"):
        raise UserError("--beside: is for the test split that belongs to a run; use --json")
    return args


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write rows of the table as JSON."""
    write_atomically(path, (json.dumps(rows, indent=2) + "\n").encode())


def write_arrays(path: Path, arrays: dict) -> None:
    """Write the arrays of `pack_arrays` as .npz."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    write_atomically(path, file.getvalue())


def score_run(path: Path, device: torch.device) -> Path:
    """Test a run on its own data, unless it was tested after its training; returns testing.json.

    A run is tested again as well if evaluate.py or metrics.py is newer than its test.
    """
    results = path.with_name("testing.json")
    trained = path.with_name("summary.json")
    if not trained.exists():
        raise UserError(f"{path}: its run is not finished; train it to the end first")
    newest = max(file.stat().st_mtime_ns for file in (trained, *CODE_OF_TESTS))
    if not results.exists() or results.stat().st_mtime_ns < newest:
        row, arrays = evaluate_checkpoint(path, None, "testing", device)
        write_arrays(path.with_name("testing.npz"), arrays)
        write_rows(results, [row])
    return results


def check_goal(rows: list[dict], goal: float) -> None:
    """Print the median training time; UserError unless all runs are finished and reach the goal."""
    seconds = [row.get("train_seconds") for row in rows]
    if None in seconds:
        raise UserError("goal: a run is not finished; train it to the end first")
    print(f"median {statistics.median(seconds):.1f} s of training")
    if any(row["mean_iou"] < goal for row in rows):
        raise UserError(f"mean IoU {goal}: a run has not reached it")


def main() -> None:
    args = parse_arguments()
    keep_memory()
    device = pick_device(args.device)
    rows = []
    for path in args.files:
        if args.beside:
            path = score_run(path, device)
        if path.suffix == ".json":
            rows += read_results(path)
            continue
        row, _ = evaluate_checkpoint(path, args.data, args.split, device)
        rows.append(row)
    if args.json:
        write_rows(args.json, rows)
    print(comparison_table(rows))
    if args.goal is not None:
        check_goal(rows, args.goal)


if __name__ == "__main__":
    run(main)
