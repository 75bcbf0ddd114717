"""Score checkpoints on a whole split and print the comparison table.

    python evaluate.py CHECKPOINT... [--data DIR] [--split testing] [--json FILE]

A file of results that --json wrote can stand in the place of a checkpoint: it is read, not
evaluated again, so a table of many runs costs nothing to print. The summary.json of runs gives a
table of their validation instead.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from checkpoint import load_checkpoint, restore_model
from data import SPLITS, load_split
from device import pick_device, pick_precision
from errors import UserError, run
from files import write_atomically
from metrics import evaluate, scores
from model import count_parameters

RESULT_KEYS = (
    *("name", "seed", "checkpoint", "data", "split", "images", "digest", "profile", "parameters"),
    *("pixel_accuracy", "mean_dice", "mean_iou", "per_class_iou", "dead_classes"),
    "confusion_matrix",
)
SUMMARY_KEYS = ("name", "seed", "images_seen", "training", "validation")


def evaluate_checkpoint(path: Path, data: str | None, split: str, device_name: str) -> dict:
    """Evaluate one checkpoint on a split.

    Args:
        path: best.pt or last.pt of a run.
        data: folder of the data set; None: the one it was trained on.
        split: "training", "validation" or "testing".
        device_name: "auto", "cpu" or "cuda".

    Returns:
        The scores of `metrics.scores` and what the checkpoint says of itself, as plain data.

    Raises:
        UserError: the checkpoint or the data cannot be read.
    """
    device = pick_device(device_name)
    checkpoint = load_checkpoint(path, device)
    config = checkpoint["config"]
    data = data or config["data"]
    loaded = load_split(config | {"data": data}, split)
    model = restore_model(checkpoint, path, device)
    dtype = pick_precision(device, config["precision"])
    started = time.perf_counter()
    matrix, _ = evaluate(model, loaded.images, loaded.masks, config, dtype)
    if not matrix.any():
        raise UserError(f"{data}: ignore: leaves no pixel of the {split} split")
    seconds = time.perf_counter() - started
    print(f"{path}: {len(loaded.names)} images of {data}/{split} in {seconds:.1f} s", flush=True)
    return {
        "name": config["name"],
        "checkpoint": str(path),
        "data": data,
        "split": split,
        "images": len(loaded.names),
        **scores(matrix, list(config["classes"])),
        "seed": config["seed"],
        "profile": config["profile"],
        "parameters": count_parameters(model),
        **checkpoint.get(
            "cost", {key: checkpoint.get(key) for key in ("images_seen", "train_seconds")}
        ),
        "published_iou": config["published_iou"],
        "digest": loaded.digest,
        "confusion_matrix": matrix.tolist(),
    }


def read_results(path: Path, needed: tuple[str, ...] = RESULT_KEYS) -> list[dict]:
    """Read the rows that --json wrote, or a summary; UserError if the file holds anything else."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such results; `make report` makes them") from None
    except (OSError, ValueError):
        raise UserError(f"{path}: cannot be read as JSON; remove it and run make again") from None
    rows = rows if isinstance(rows, list) else [rows]
    if not rows or not all(
        isinstance(row, dict) and all(key in row for key in needed) for row in rows
    ):
        raise UserError(f"{path}: is not a file of results; remove it and run make again")
    return rows


def over_seeds(values: list[float | None]) -> dict | None:
    """Mean and sample standard deviation (None if n = 1); None where a value is not defined."""
    if any(value is None for value in values):
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "n": len(values), "values": values}


def show(stat: dict | None, form: str = "{:.4f}", spread: bool = True) -> str:
    """What `over_seeds` returns as text: the mean and, if wanted, ± the standard deviation."""
    if stat is None:
        return "–"
    deviation = stat["std"] if spread else None
    return form.format(stat["mean"]) + ("" if deviation is None else f" ± {form.format(deviation)}")


def goal_line(rows: list[dict], goal: float) -> str:
    """In words: which runs reached a mean IoU, and after how much training.

    Raises:
        UserError: one of them did not, or is not finished.
    """
    for row in rows:
        if row["train_seconds"] is None:
            raise UserError(f"{row['checkpoint']}: is not the best.pt of a finished run")
    runs = [f"{r['mean_iou']:.4f} in {r['train_seconds']:.1f} s (seed {r['seed']})" for r in rows]
    reached = sum(row["mean_iou"] >= goal for row in rows)
    text = f"mean IoU of {goal} reached by {reached} of {len(rows)} runs: {', '.join(runs)}"
    if reached < len(rows):
        raise UserError(text)
    seconds = statistics.median(row["train_seconds"] for row in rows)
    return f"{text}; median {seconds:.1f} s of training"


def by_experiment(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of each experiment, one a seed.

    Runs of one name in several folders, or of one seed, were made with other settings: the folder
    that holds the seeds tells them apart, or else the file. One given twice counts once.

    Args:
        rows: with name, seed and checkpoint (the path of the file they are of).
    """
    rows = list({(row["name"], row["seed"], str(row["checkpoint"])): row for row in rows}.values())
    experiments: dict[str, list[dict]] = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        group = [row for row in rows if row["name"] == name]
        paths = [Path(row["checkpoint"]) for row in group]
        folders = [path.parent.parent for path in paths]
        seeds = {(folder, row["seed"]) for folder, row in zip(folders, group, strict=True)}
        places = paths if len(seeds) < len(group) else folders
        for place, row in zip(places, group, strict=True):
            label = name if len({*places}) == 1 else f"{name} ({place})"
            experiments.setdefault(label, []).append(row)
    return experiments


def background_only(row: dict) -> dict:
    """The row of a model that predicts the first class everywhere, on the split of `row`."""
    true = torch.tensor(row["confusion_matrix"]).sum(dim=1)
    matrix = torch.zeros(len(true), len(true), dtype=torch.int64)
    matrix[:, 0] = true
    classes = list(row["per_class_iou"])
    return {"name": f"{classes[0]} only", "parameters": 0, **scores(matrix, classes)}


def comparison_table(rows: list[dict]) -> str:
    """The table of the lab: one line a model, the mean ± standard deviation over its seeds.

    Raises:
        UserError: the rows were not made on the same data, split and profile.
    """
    first = rows[0]
    for row in rows[1:]:
        terms = [{key: r[key] for key in ("split", "digest", "profile")} for r in (first, row)]
        for term, r in zip(terms, (first, row), strict=True):
            term["classes"] = list(r["per_class_iou"])
            term["number of pixels"] = sum(map(sum, r["confusion_matrix"]))
        for key, value in terms[0].items():
            if terms[1][key] != value:
                raise UserError(
                    f"{row['checkpoint']}: {key} is {terms[1][key]}, that of "
                    f"{first['checkpoint']} is {value}; such rows cannot share a table, give them "
                    "apart"
                )
    nothing = background_only(first)
    experiments = {nothing["name"]: [nothing], **by_experiment(rows)}
    classes = list(first["per_class_iou"])

    def mean(rows: list[dict], key: str, form: str = "{:.4f}", spread: bool = False) -> str:
        return show(over_seeds([row.get(key) for row in rows]), form, spread)

    several = max(map(len, experiments.values())) > 1
    header = ["model", "parameters", "images seen", "training", "accuracy", "mean Dice", "mean IoU"]
    from_lab = any(row.get("published_iou") is not None for row in rows)
    header += [*classes, "dead classes"] + ["lab IoU"] * from_lab + ["n"] * several
    lines = [header]
    for name, group in experiments.items():
        dead = sorted({d for row in group for d in row["dead_classes"]}, key=classes.index)
        published = group[0].get("published_iou")
        lines.append(
            [
                name,
                f"{group[0]['parameters']:,}",
                mean(group, "images_seen", "{:,.0f}"),
                mean(group, "train_seconds", "{:.0f} s"),
                *(mean(group, key) for key in ("pixel_accuracy", "mean_dice")),
                mean(group, "mean_iou", spread=True),
                *(mean([row["per_class_iou"] for row in group], name) for name in classes),
                ", ".join(dead) or "none",
                *["–" if published is None else f"{published:.4f}"] * from_lab,
                *[str(len(group))] * several,
            ]
        )
    text = [
        f"{first['data']}, {first['split']} split, {first['images']} images, "
        f"{first['profile']} profile. IoU by class at the right.",
        align(lines),
    ]
    text.append(
        f"High accuracy is not good performance: predicting {classes[0]} everywhere has accuracy "
        f"{nothing['pixel_accuracy']:.3f} and mean IoU {nothing['mean_iou']:.3f}."
    )
    return "\n".join(text)


def validation_table(summaries: list[dict]) -> str:
    """Runs by validation mean IoU, best first: mean ± standard deviation over the seeds.

    Args:
        summaries: what train.py writes as summary.json, with its path as `checkpoint`; the test
            split has no part in them.
    """
    lines = [["experiment", "images seen", "training IoU", "validation IoU", "gap", "dead", "n"]]
    rows = []
    for name, group in by_experiment(summaries).items():
        train, val = ([g[split]["mean_iou"] for g in group] for split in ("training", "validation"))
        dead = sorted({d for g in group for d in g["validation"]["dead_classes"]})
        rows.append(
            (
                statistics.fmean(val),
                [
                    name,
                    f"{group[0]['images_seen']:,}",
                    show(over_seeds(train)),
                    show(over_seeds(val)),
                    f"{statistics.fmean(train) - statistics.fmean(val):+.4f}",
                    ", ".join(dead) or "none",
                    str(len(group)),
                ],
            )
        )
    lines += [line for _, line in sorted(rows, key=lambda row: -row[0])]
    return align(lines)


def align(lines: list[list[str]]) -> str:
    """Cells as text in columns, the first flush left, the others flush right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        ).rstrip()
        for line in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "files",
        type=Path,
        nargs="+",
        metavar="CHECKPOINT",
        help="best.pt, testing.json or summary.json",
    )
    parser.add_argument("--data", metavar="DIR", help="another data set than it was trained on")
    parser.add_argument("--split", choices=SPLITS, help="default: testing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--goal", type=float, metavar="IOU", help="fail unless all runs reach it")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    summaries = [path for path in args.files if path.name == "summary.json"]
    if summaries and len(summaries) < len(args.files):
        raise UserError(
            f"{summaries[0]}: tells of validation, the other files of a test; give them apart"
        )
    if (args.data or args.split) and any(path.suffix == ".json" for path in args.files):
        raise UserError("--data, --split: are for checkpoints; a .json file holds results already")
    if (args.json or args.goal) and summaries:
        raise UserError("--json, --goal: are for tests, not for summary.json")
    if summaries:
        rows = [read_results(path, SUMMARY_KEYS)[0] | {"checkpoint": path} for path in summaries]
        print(validation_table(rows))
        return
    rows = []
    for path in args.files:
        if path.suffix == ".json":
            rows += read_results(path)
        else:
            split = args.split or "testing"
            rows.append(evaluate_checkpoint(path, args.data, split, args.device))
    table = comparison_table(rows)
    if args.json:
        write_atomically(args.json, (json.dumps(rows, indent=2) + "\n").encode())
    print(table)
    if args.goal:
        print(goal_line(rows, args.goal))


if __name__ == "__main__":
    run(main)
