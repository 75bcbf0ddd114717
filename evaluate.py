"""Score checkpoints on a whole split and print the comparison table.

    python evaluate.py CHECKPOINT... [--data DIR] [--split testing] [--json FILE]

A file that --json wrote can stand in the place of a checkpoint: it is read, not evaluated again. So
can the summary.json of a run, for its validation scores.
"""

import argparse
import io
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from common import ROOT, UserError, code_digest, reading, require, run, write_atomically

import numpy as np
import torch
import yaml
from torch import Tensor, nn

import metrics
from data import SPLITS, evenly, load_split, to_float
from losses import weighted_loss
from metrics import IGNORE, mean_std
from model import count_parameters, keep_memory, pick_device, pick_precision, restore_model

BATCH = 32  # images of 128×128; more leave the processor's caches, and were no faster
LAB_BATCH = 50  # test images that the lab scored
SHOWN = 4  # evenly spaced images, and as many of the worst, that are kept for the report
LAB = yaml.safe_load((ROOT / "docs/lab.yaml").read_text())  # what its report of 2021 says
NEEDED = dict.fromkeys(("name", "checkpoint", "split", "digest", "profile"), str)  # of a row
NEEDED |= dict.fromkeys(("pixel_accuracy", "mean_iou", "mean_dice"), float)
NEEDED |= {"mean_iou_foreground": (float, type(None))}
NEEDED |= {"seed": int, "parameters": int, "per_class_iou": dict, "dead_classes": list}
NEEDED |= {"dead_places": dict}  # of tests; older ones lack them
EPOCH = dict.fromkeys(("mean_iou", "mean_iou_foreground"), (float, type(None)))
EPOCH |= {"loss": float, "per_class_iou": dict, "dead_classes": list}  # of either split


@torch.inference_mode()
def predict_batches(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the logits (n, C, H, W) of batches of whole (M, channels, H, W) uint8 images."""
    device = next(model.parameters()).device  # larger images make smaller batches: memory is flat
    size = max(1, min(BATCH, BATCH * 128**2 // (images.shape[-2] * images.shape[-1])))
    for batch in images.split(size):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(to_float(batch.to(device, non_blocking=True)))
        yield logits


def evaluate(
    model: nn.Module, images: Tensor, masks: Tensor, config: dict, dtype: torch.dtype
) -> tuple[Tensor, float, Tensor]:
    """Run a model once over (M, channels, H, W) uint8 images and their (M, H, W) masks.

    Returns (M, C, C) int64 confusion matrices of the images; the mean loss per image (Dice losses
    pool the images of a batch); (M, H, W) uint8 predicted classes; all on the CPU.
    """
    model.eval()
    matrices, predictions, loss, done = [], [], 0.0, 0
    for logits in predict_batches(model, images, dtype):
        mask = masks[done : done + len(logits)].to(logits.device)
        predicted = logits.argmax(dim=1)
        matrices.append(metrics.confusion_matrices(predicted, mask, len(config["classes"])))
        loss = loss + weighted_loss(logits, mask, config["loss"]) * len(mask)
        predictions.append(predicted.to(torch.uint8).cpu())
        done += len(mask)
    return torch.cat(matrices).cpu(), float(loss) / done, torch.cat(predictions)


def cost_of(path: Path, checkpoint: dict) -> dict:
    """Look up images_seen and train_seconds of the whole run; None if it is not finished."""
    file = path.with_name("summary.json")
    with reading(file, "train this run again"):
        found = checkpoint.get("cost") or json.loads(file.read_text() if file.exists() else "{}")
        return {key: found.get(key) for key in ("images_seen", "train_seconds")}


def evaluate_checkpoint(
    path: Path, data: str | None, split: str, device: torch.device
) -> tuple[dict, dict]:
    """Evaluate one checkpoint on a split of `data`, or of the data that it was trained on.

    Returns a row of the table: scores and what the checkpoint says of itself, as plain data. And
    what numpy can save: names, groups (M,), matrices (M, C, C), predictions (M, H, W); of the
    images in `shown` (K,), evenly spaced and worst ones, images and masks. UserError if the
    checkpoint or the data cannot be read, or all pixels are ignored.
    """
    model, checkpoint = restore_model(path, device)
    config, started = checkpoint["config"], time.perf_counter()
    classes, data = list(config["classes"]), data or config["data"]
    images, masks, names, groups, digest = load_split(config | {"data": data}, split)
    dtype = pick_precision(device, config["precision"])
    matrices, _, predictions = evaluate(model, images, masks, config, dtype)
    matrix = matrices.sum(dim=0)
    if not matrix.any():
        raise UserError(f"{data}: ignore: leaves no pixel of the {split} split")
    pairs = zip(predictions.split(64), masks.split(64), strict=True)
    bands = sum(metrics.boundary_matrices(*pair, len(classes)).sum(dim=0) for pair in pairs)
    ids, group = np.unique(groups, return_inverse=True)
    scenes = matrix.new_zeros(len(ids), *matrix.shape).index_add(0, torch.tensor(group), matrices)
    print(f"{path}: {len(masks)} images, {time.perf_counter() - started:.1f} s", file=sys.stderr)
    worst: dict[str, int] = {}  # group → its worst image, groups from the worst
    for i in metrics.mean_iou(matrices).nan_to_num(1).argsort(stable=True).tolist():
        worst.setdefault(groups[i], i)
    shown = [*evenly(len(masks), SHOWN), *list(worst.values())[:SHOWN]]
    row = {key: config[key] for key in ("name", "seed", "profile")} | cost_of(path, checkpoint)
    row |= {"checkpoint": str(path), "data": data, "split": split, "digest": digest}
    row |= {"images": len(masks), "groups": len(scenes), "parameters": count_parameters(model)}
    row |= metrics.scores(matrix, classes) | {"interval": metrics.interval(scenes)}
    row["contributions"] = [round(value, 6) for value in metrics.contributions(scenes)]
    row["dead_places"] = metrics.dead_places(predictions, masks, classes)
    row["interval_of_lab_batch"] = metrics.interval(matrices, LAB_BATCH)
    row["boundary_iou"] = metrics.number(metrics.iou(bands)[:-1].nanmean())
    row |= {"code": checkpoint.get("code"), "confusion_matrix": matrix.tolist()}
    arrays = {"names": names, "groups": groups, "shown": shown, "matrices": matrices.int()}
    arrays["predictions"] = predictions.where(masks != IGNORE, IGNORE)
    return row, arrays | {"images": images[shown], "masks": masks[shown]}


def format_stat(values: list, form: str = "{:.4f}", std: bool = False) -> str:
    """Format the mean of values, ± the standard deviation if asked for; – if one is missing."""
    if (stat := mean_std(values)) is None:
        return "–"
    shown = (stat["mean"], stat["std"] if std else None)
    return " ± ".join(form.format(value) for value in shown if value is not None)


def published(row: dict) -> float | None:
    """Look up the test IoU in the lab's report; None for other experiments and other data."""
    of_lab = list(row["per_class_iou"]) == LAB["classes"] and row["split"] == "testing"
    return LAB["test_iou"].get(row["name"]) if of_lab else None


def format_places(places: list[dict[str, int]]) -> str:
    """Format dead places: "square 2/4" is a class that is dead at two of four; – if none is."""
    found = [f"{name} {n}/4" for one in places for name, n in one.items()]
    return ", ".join(dict.fromkeys(found)) or "–"


# A column of a table: heading → function of the rows of an experiment to the text of its cell.
COLUMNS = {
    "parameters": lambda rows: f"{rows[0]['parameters']:,}",
    "images seen": lambda rows: format_stat([r.get("images_seen") for r in rows], "{:,.0f}"),
    "training": lambda rows: format_stat([r.get("train_seconds") for r in rows], "{:.0f} s"),
    "accuracy": lambda rows: format_stat([r["pixel_accuracy"] for r in rows]),
    "mean Dice": lambda rows: format_stat([r["mean_dice"] for r in rows]),
    "boundary IoU": lambda rows: format_stat([r.get("boundary_iou") for r in rows], std=True),
    "mean IoU": lambda rows: format_stat([r["mean_iou"] for r in rows], std=True),
    "dead classes": lambda rows: (
        ", ".join(dict.fromkeys(c for row in rows for c in row["dead_classes"])) or "none"
    ),
    "dead places": lambda rows: format_places([row.get("dead_places", {}) for row in rows]),
    "lab IoU": lambda rows: format_stat([published(rows[0])]),
    "n": lambda rows: str(len(rows)),
}


def tabulate(experiments: dict[str, list[dict]], columns: dict) -> list[list[str]]:
    """Fill a table, the heading first; * marks what other code than today's trained."""
    known = (None, code_digest())
    names = [n + "*" * any(r.get("code") not in known for r in e) for n, e in experiments.items()]
    filled = {head: [cell(rows) for rows in experiments.values()] for head, cell in columns.items()}
    filled = {k: c for k, c in filled.items() if set(c) != {"1" if k == "n" else "–"}}
    return [["model", *filled], *map(list, zip(names, *filled.values(), strict=True))]


def align(lines: list[list[str]]) -> str:
    """Align cells in columns, the first flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    text = "\n".join("  ".join(cells).rstrip() for cells in padded)
    if any(line[0].endswith("*") for line in lines):
        text += "\n* trained by other code than today's; remove its folder to train it again"
    return text


def group_rows(rows: list[dict]) -> dict[str, list[dict]]:
    """Group rows by experiment: name, and folder where several have runs of one name."""
    groups: dict[tuple[str, Path], list[dict]] = {}
    for row in {row["checkpoint"]: row for row in rows}.values():  # one given twice counts once
        folder = Path(row["checkpoint"]).parent
        folder = folder.parent if folder.name == f"seed{row['seed']}" else folder
        groups.setdefault((row["name"], folder), []).append(row)
    folders = Counter(name for name, _ in groups)
    return {f"{n} ({f})" if folders[n] > 1 else n: found for (n, f), found in groups.items()}


def rank(experiments: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Sort experiments by their mean IoU, the highest first."""
    means = {n: statistics.fmean(r["mean_iou"] for r in e) for n, e in experiments.items()}
    return {name: experiments[name] for name in sorted(means, key=means.get, reverse=True)}


def differences(row: dict, first: dict) -> list[str]:
    """List why two rows cannot share a table: they differ in split, data, profile or classes."""
    found = [key for key in ("split", "digest", "profile") if row[key] != first[key]]
    return found + ["classes"] * (list(row["per_class_iou"]) != list(first["per_class_iou"]))


def background_only(row: dict) -> dict:
    """Score a model that predicts the first class everywhere, on the split of `row`."""
    true = torch.tensor(row["confusion_matrix"]).sum(dim=1)
    matrix, classes = torch.zeros(len(true), len(true)).long(), list(row["per_class_iou"])
    matrix[:, 0] = true
    name = {"name": f"{classes[0]} only", "parameters": 0, "split": row["split"]}
    return name | metrics.scores(matrix, classes)


def comparison_table(rows: list[dict]) -> str:
    """Format the table of the lab, a line a model; UserError if the rows cannot share a table."""
    first = rows[0]
    for row in rows:
        if differ := differences(row, first):
            both = f"{row['checkpoint']}: differs from {first['checkpoint']}"
            raise UserError(f"{both} in {', '.join(differ)}; give them apart")
    experiments, classes = group_rows(rows), list(first["per_class_iou"])
    if "confusion_matrix" not in first:  # of validation: to choose by, so the best comes first
        return align(tabulate(rank(experiments), COLUMNS))
    nothing = background_only(first)
    ious = {c: lambda e, c=c: format_stat([r["per_class_iou"][c] for r in e]) for c in classes}
    lines = align(tabulate({nothing["name"]: [nothing]} | experiments, COLUMNS | ious))
    return (
        f"{first['data']}, {first['split']} split, {first['images']} images, {first['profile']} "
        f"profile. IoU by class at the right.\n{lines}"
    )


def read_results(path: Path) -> list[dict]:
    """Read rows that --json wrote, or a summary.json; UserError if the file holds anything else."""
    with reading(path, "remove it and run make again"):
        rows = json.loads(path.read_text(encoding="utf-8"))
        if "validation" in rows:
            rows = [rows | rows["validation"] | {"split": "validation", "checkpoint": str(path)}]
        for row in rows or [{}]:
            require({"dead_places": {}} | row, NEEDED)
            if "confusion_matrix" in row:
                require(row, {"data": str, "images": int, "boundary_iou": float})
                matrix, classes = torch.tensor(row["confusion_matrix"]), list(row["per_class_iou"])
                found = metrics.scores(matrix, classes)
                if any(row[key] != value for key, value in found.items()):
                    raise ValueError("its scores are not those of its confusion matrix")
    return rows


def read_history(path: Path, advice: str) -> list[dict]:
    """Read the epochs of a metrics.jsonl; UserError, with advice, if it is damaged."""
    with reading(path, advice):
        history = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for entry in history or [{}]:
            for split in ("training", "validation"):
                require(entry[split], EPOCH)
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="CHECKPOINT", help="or JSON of one")
    parser.add_argument("--data", metavar="DIR", help="another data set than it was trained on")
    parser.add_argument("--split", choices=SPLITS, default="testing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--predictions", type=Path, metavar="FILE.npz", help="of one checkpoint")
    parser.add_argument("--goal", type=float, metavar="IOU", help="fail unless all runs reach it")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps …")
    args = parser.parse_args()
    if args.predictions and len(args.files) > 1:
        raise UserError(f"{args.predictions}: holds the predictions of one checkpoint; give one")
    keep_memory()
    rows, device = [], pick_device(args.device)
    for path in args.files:
        if path.suffix == ".json":
            rows += read_results(path)
            continue
        row, arrays = evaluate_checkpoint(path, args.data, args.split, device)
        rows.append(row)
        if args.predictions:
            file = io.BytesIO()
            np.savez_compressed(file, **arrays)
            write_atomically(args.predictions, file.getvalue())
    if args.json:
        write_atomically(args.json, (json.dumps(rows, indent=2) + "\n").encode())
    print(comparison_table(rows))
    if args.goal is not None:
        seconds = [row.get("train_seconds") or math.nan for row in rows]  # nan: unfinished
        print(f"median {statistics.median(seconds):.1f} s of training")
        if any(map(math.isnan, seconds)) or not min(row["mean_iou"] for row in rows) >= args.goal:
            raise UserError(f"mean IoU {args.goal}: a run has not reached it, or is not finished")


if __name__ == "__main__":
    run(main)
