"""Score checkpoints on a whole split and print the comparison table.

    python evaluate.py CHECKPOINT... [--data DIR] [--split testing] [--json FILE]

A file of results that --json wrote can stand in the place of a checkpoint: it is read, not
evaluated again, so a table of many runs costs nothing to print. The summary.json of runs gives a
table of their validation instead.
"""

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from common import SPLITS, UserError, code_digest, read_json, reading, run, write_atomically

import numpy as np
import torch
from torch import Tensor, nn

from augment import to_float
from data import evenly, load_split
from losses import weighted_loss
from metrics import (
    IGNORE,
    boundary_iou,
    boundary_matrices,
    confusion_matrices,
    mean_iou,
    mean_std,
    number,
    scores,
)
from model import autocast, count_parameters, pick_device, pick_precision, restore_model

BATCH = 32  # images of 128×128; more leave the processor's caches, and were no faster
SHOWN = 4  # evenly spaced images, and as many of the worst, that are kept for the report
# Test IoU in the lab's report of 2021, measured on one batch of 50 images.
PUBLISHED = {
    **{"initial": 0.9824, "modified": 0.9778, "tuned": 0.9878, "final": 0.9950},
    **{"flip-0.3": 0.8008, "flip-0.5": 0.9914, "flip-0.8": 0.9880},
    **{"blur-0.3": 0.9887, "blur-0.5": 0.8563, "blur-0.8": 0.9896},
    **{"flip-blur-0.5": 0.9258, "flip-blur-0.3": 0.9263, "flip-blur-0.8": 0.9171},
}
LAB_CLASSES = ["background", "square", "triangle", "circle"]


# ---- a model on a split


@torch.inference_mode()
def predict_batches(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the logits of batches of whole images, (n, C, H, W), on the model's device.

    Images larger than 128×128 make smaller batches, so that memory hardly grows with their size.

    Args:
        model: in evaluation mode.
        images: (M, channels, H, W) uint8, on any device.
        dtype: autocast dtype.
    """
    device = next(model.parameters()).device
    size = max(1, min(BATCH, BATCH * 128**2 // (images.shape[-2] * images.shape[-1])))
    for batch in images.split(size):
        with autocast(device, dtype):
            logits = model(to_float(batch.to(device, non_blocking=True)))
        yield logits


def evaluate(
    model: nn.Module, images: Tensor, masks: Tensor, config: dict, dtype: torch.dtype
) -> tuple[Tensor, float, Tensor]:
    """Run a model once over a whole split.

    Args:
        model: maps (N, channels, H, W) float in [0, 1] to (N, C, H, W) logits; set to eval mode.
        images: (M, channels, H, W) uint8; masks: (M, H, W) uint8, on any device.
        config: for `classes` and `loss`.
        dtype: autocast dtype.

    Returns:
        (M, C, C) int64 confusion matrices of the images, the mean loss per image (Dice losses pool
        the images of a batch, see `predict_batches`), and (M, H, W) uint8 predicted classes, on
        the CPU.
    """
    model.eval()
    matrices, predictions, loss, done = [], [], 0.0, 0
    for logits in predict_batches(model, images, dtype):
        mask = masks[done : done + len(logits)].to(logits.device)
        predicted = logits.argmax(dim=1)
        matrices.append(confusion_matrices(predicted, mask, len(config["classes"])))
        loss = loss + weighted_loss(logits, mask, config["loss"]) * len(mask)
        predictions.append(predicted.to(torch.uint8).cpu())
        done += len(mask)
    return torch.cat(matrices).cpu(), float(loss) / done, torch.cat(predictions)


def cost_of(path: Path, checkpoint: dict) -> dict:
    """Look up images_seen and train_seconds of the whole run; {} if it is not finished."""
    summary = path.with_name("summary.json")
    found = checkpoint.get("cost") or (read_json(summary) if summary.exists() else {})
    with reading(summary, "train this run again"):
        return {key: found[key] for key in ("images_seen", "train_seconds") if found}


def evaluate_checkpoint(
    path: Path, data: str | None, split: str, device: torch.device
) -> tuple[dict, dict[str, np.ndarray]]:
    """Evaluate one checkpoint on a split.

    Args:
        path: best.pt or last.pt of a run.
        data: folder of the data set; None: the one it was trained on.
        split: one of `SPLITS`.

    Returns:
        A row of the table: `metrics.scores`, boundary IoU and what the checkpoint says of itself,
        as plain data. And arrays by name: names, groups (M,), matrices (M, C, C), predictions
        (M, H, W); of the images in `shown` (K,), evenly spaced and worst ones, images and masks.

    Raises:
        UserError: the checkpoint or the data cannot be read, or all pixels are ignored.
    """
    model, checkpoint = restore_model(path, device)
    config = checkpoint["config"]
    classes, data = list(config["classes"]), data or config["data"]
    loaded = load_split(config | {"data": data}, split)
    dtype = pick_precision(device, config["precision"])
    started = time.perf_counter()
    matrices, _, predictions = evaluate(model, loaded.images, loaded.masks, config, dtype)
    matrix = matrices.sum(dim=0)
    if not matrix.any():
        raise UserError(f"{data}: ignore: leaves no pixel of the {split} split")
    pairs = zip(predictions.split(64), loaded.masks.split(64), strict=True)
    bands = sum(boundary_matrices(p, m, len(classes)).sum(dim=0) for p, m in pairs)
    took = time.perf_counter() - started
    print(f"{path}: {len(predictions)} images of {data}/{split} in {took:.1f} s", file=sys.stderr)
    worst: dict[str, int] = {}  # group → its worst image, groups from the worst
    for i in mean_iou(matrices).nan_to_num(1).argsort(stable=True).tolist():
        worst.setdefault(loaded.groups[i], i)
    shown = [*evenly(len(matrices), SHOWN), *list(worst.values())[:SHOWN]]
    boundary = boundary_iou(bands)
    row = {
        "name": config["name"],
        "checkpoint": str(path),
        "data": data,
        "split": split,
        "images": len(matrices),
        "groups": len(worst),
        **scores(matrix, classes),
        "boundary_iou": number(boundary.nanmean()),
        "per_class_boundary_iou": dict(zip(classes, map(number, boundary), strict=True)),
        "seed": config["seed"],
        "profile": config["profile"],
        "parameters": count_parameters(model),
        **{"images_seen": None, "train_seconds": None, **cost_of(path, checkpoint)},
        "code": checkpoint.get("code"),
        "digest": loaded.digest,
        "confusion_matrix": matrix.tolist(),
    }
    arrays = {
        "names": np.array(loaded.names),
        "groups": np.array(loaded.groups),
        "matrices": matrices.to(torch.int32).numpy(),
        "predictions": predictions.where(loaded.masks != IGNORE, IGNORE).numpy(),
        "shown": np.array(shown),
        "images": loaded.images[shown].numpy(),
        "masks": loaded.masks[shown].numpy(),
    }
    return row, arrays


# ---- tables


def read_results(path: Path) -> list[dict]:
    """Read rows that --json wrote, or a summary.json; UserError if the file holds anything else."""
    rows = read_json(path)
    rows = rows if isinstance(rows, list) else [rows]
    with reading(path, "remove it and run make again"):
        for row in rows:
            path_in_run = {"checkpoint": str(path)} if "validation" in row else {}
            row |= path_in_run
            needed = {"name", "seed", "checkpoint", "images_seen"}
            if not needed <= row.keys() or not rows:
                raise ValueError(f"lacks {', '.join(needed - row.keys())}")
    return rows


def background_only(row: dict) -> dict:
    """Score a model that predicts the first class everywhere, on the split of `row`."""
    true = torch.tensor(row["confusion_matrix"]).sum(dim=1)
    matrix = torch.zeros(len(true), len(true), dtype=torch.int64)
    matrix[:, 0] = true
    classes = list(row["per_class_iou"])
    return {"name": f"{classes[0]} only", "parameters": 0, **scores(matrix, classes)}


def published(row: dict) -> float | None:
    """Look up the test IoU in the lab's report; None for other experiments and other data."""
    of_lab = list(row["per_class_iou"]) == LAB_CLASSES
    return PUBLISHED.get(row["name"]) if of_lab else None


def by_experiment(rows: list[dict]) -> dict[str, list[dict]]:
    """Group rows, one a seed, by experiment; a row given twice counts once.

    Runs of one name in several folders were made with other settings: the folder that holds the
    seeds tells them apart. Rows of a name and a seed in one folder are told apart by their path.
    """
    rows = list({(row["name"], row["seed"], row["checkpoint"]): row for row in rows}.values())
    experiments: dict[str, list[dict]] = {}
    for row in rows:
        same = [other for other in rows if other["name"] == row["name"]]
        places = {Path(other["checkpoint"]).parent.parent for other in same}
        twins = len({other["seed"] for other in same}) < len(same)
        place = row["checkpoint"] if len(places) == 1 else Path(row["checkpoint"]).parent.parent
        label = f"{row['name']} ({place})" if len(places) > 1 or twins else row["name"]
        # other code than today's may have trained other weights from the same config
        mark = "" if row.get("code", code_digest()) in (None, code_digest()) else "*"
        experiments.setdefault(label + mark, []).append(row)
    return experiments


def format_mean_std(stat: dict | None, form: str = "{:.4f}") -> str:
    """Format a result of `metrics.mean_std`: the mean, ± the standard deviation if it has one."""
    if stat is None:
        return "–"
    return " ± ".join(form.format(v) for v in (stat["mean"], stat["std"]) if v is not None)


def align(lines: list[list[str]]) -> str:
    """Align cells in columns, the first flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    text = "\n".join("  ".join(cells).rstrip() for cells in padded)
    if any(line[0].endswith("*") for line in lines):
        text += "\n* trained by other code than today's; remove its folder to train it again"
    return text


def check_comparable(rows: list[dict]) -> None:
    """Refuse rows that were not made on the same data, split and profile; UserError names one."""
    for row in rows[1:]:
        for key in ("split", "digest", "profile"):
            if row[key] != rows[0][key]:
                raise UserError(
                    f"{row['checkpoint']}: {key} is {row[key]}, that of {rows[0]['checkpoint']} is "
                    f"{rows[0][key]}; such rows cannot share a table, give them apart"
                )
        if list(row["per_class_iou"]) != list(rows[0]["per_class_iou"]):
            raise UserError(f"{row['checkpoint']}: has other classes; give it apart")


def comparison_table(rows: list[dict]) -> str:
    """Format the table of the lab: a line a model, the mean ± standard deviation over its seeds.

    Raises:
        UserError: the rows cannot share a table.
    """
    check_comparable(rows)
    first, nothing = rows[0], background_only(rows[0])
    experiments = {nothing["name"]: [nothing], **by_experiment(rows)}
    classes = list(first["per_class_iou"])
    several = max(map(len, experiments.values())) > 1
    from_lab = any(published(row) for row in rows)
    header = ["model", "parameters", "images seen", "training", "accuracy", "mean Dice", "mean IoU"]
    lines = [header + [*classes, "dead classes"] + ["lab IoU"] * from_lab + ["n"] * several]
    for name, group in experiments.items():
        stats = {key: mean_std([row.get(key) for row in group]) for key in KEYS}
        stats |= {c: mean_std([row["per_class_iou"][c] for row in group]) for c in classes}
        means = {key: stat and stat | {"std": None} for key, stat in stats.items()}
        dead = [c for c in classes if any(c in row["dead_classes"] for row in group)]
        lab = published(group[0])
        lines.append(
            [
                name,
                f"{group[0]['parameters']:,}",
                format_mean_std(means["images_seen"], "{:,.0f}"),
                format_mean_std(means["train_seconds"], "{:.0f} s"),
                format_mean_std(means["pixel_accuracy"]),
                format_mean_std(means["mean_dice"]),
                format_mean_std(stats["mean_iou"]),
                *(format_mean_std(means[c]) for c in classes),
                ", ".join(dead) or "none",
                *["–" if lab is None else f"{lab:.4f}"] * from_lab,
                *[str(len(group))] * several,
            ]
        )
    accuracy, iou = nothing["pixel_accuracy"], nothing["mean_iou"]
    return (
        f"{first['data']}, {first['split']} split, {first['images']} images, "
        f"{first['profile']} profile. IoU by class at the right.\n{align(lines)}\n"
        f"Predicting {classes[0]} everywhere has accuracy {accuracy:.3f} and mean IoU {iou:.3f}."
    )


KEYS = ("images_seen", "train_seconds", "pixel_accuracy", "mean_dice", "mean_iou")


def validation_table(summaries: list[dict]) -> str:
    """Tabulate runs by validation mean IoU, best first: mean ± standard deviation over the seeds.

    Args:
        summaries: what train.py writes as summary.json; the test split has no part in them.
    """
    lines = []
    for name, group in by_experiment(summaries).items():
        train, val = (
            mean_std([row[split]["mean_iou"] for row in group])
            for split in ("training", "validation")
        )
        dead = sorted({c for row in group for c in row["validation"]["dead_classes"]})
        gap = f"{train['mean'] - val['mean']:+.4f}"
        cells = [name, f"{group[0]['images_seen']:,}", format_mean_std(train), format_mean_std(val)]
        lines.append((-val["mean"], [*cells, gap, ", ".join(dead) or "none", str(len(group))]))
    header = ["experiment", "images seen", "training IoU", "validation IoU", "gap", "dead", "n"]
    return align([header, *(line for _, line in sorted(lines))])


def goal_line(rows: list[dict], goal: float) -> str:
    """Tell which runs reached a mean IoU, and after how much training.

    Raises:
        UserError: one of them did not, or is not finished.
    """
    for row in rows:
        if row["train_seconds"] is None:
            raise UserError(f"{row['checkpoint']}: is of an unfinished run; --goal needs its time")
    runs = [f"{r['mean_iou']:.4f} in {r['train_seconds']:.1f} s (seed {r['seed']})" for r in rows]
    reached = sum(row["mean_iou"] >= goal for row in rows)
    text = f"mean IoU of {goal} reached by {reached} of {len(rows)} runs: {', '.join(runs)}"
    if reached < len(rows):
        raise UserError(text)
    seconds = statistics.median(row["train_seconds"] for row in rows)
    return f"{text}; median {seconds:.1f} s of training"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    files = "best.pt, testing.json or summary.json"
    parser.add_argument("files", type=Path, nargs="+", metavar="CHECKPOINT", help=files)
    parser.add_argument("--data", metavar="DIR", help="another data set than it was trained on")
    parser.add_argument("--split", choices=SPLITS, default="testing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--predictions", type=Path, metavar="FILE.npz", help="of one checkpoint")
    parser.add_argument("--goal", type=float, metavar="IOU", help="fail unless all runs reach it")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps …")
    args = parser.parse_args()
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
    if all("validation" in row for row in rows):
        print(validation_table(rows))
    elif any("validation" in row for row in rows):
        raise UserError(
            "a summary.json holds validation scores, the other files tests; give them apart"
        )
    else:
        print(comparison_table(rows))
        if args.goal:
            print(goal_line(rows, args.goal))


if __name__ == "__main__":
    run(main)
