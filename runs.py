"""The files of a run: its lock, checkpoints, history, TensorBoard events and summary."""

import contextlib
import fcntl
import json
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from common import ROOT, UserError, reading, write_atomically

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from config import dump
from data import Split, evenly
from model import read_checkpoint, save_checkpoint
from pictures import colourise, contact_sheet, legend, png

PICTURES = 4  # validation images in TensorBoard and predictions.png
DEAD_CLASS_FIX = (
    "what usually revives a dead class: a last decoder stage wider than `classes`, "
    "loss: {cross_entropy: 1, dice_per_class: 1}, upsampling_init: bilinear, a lower learning_rate"
)


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run directory; UserError if another process trains there."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run_dir}: another process trains here; wait for it") from None
        yield


def resume_run(
    run_dir: Path, about: dict, parts: dict[str, object], resume: bool, overwrite: bool
) -> list[dict]:
    """Decide whether a run starts over or goes on after its last finished epoch.

    Args:
        run_dir: of the run, perhaps new or empty.
        about: `config`, `data_digest` and `code`, of which the first two must be those of the run.
        parts: model, optimizer and scheduler, whose states are loaded from last.pt to go on.
        resume: go on where the run stopped, if there is one.
        overwrite: start over, which discards the run that is there, where `resume` cannot.

    Returns:
        The lines of metrics.jsonl so far; none if it starts over.

    Raises:
        UserError: there is a run, and it can neither be resumed nor overwritten.
    """
    there = {path.name for path in run_dir.iterdir()} - {"lock"} if run_dir.exists() else set()
    if there and "config.yaml" not in there:
        raise UserError(f"{run_dir}: holds other files than a run; give another --run-dir")
    if not there & {"last.pt", "best.pt"}:
        return []  # nothing that could be lost
    why = "which --resume goes on with"
    if resume and "last.pt" in there:
        path = run_dir / "last.pt"
        last = read_checkpoint(path, torch.device("cpu"))
        with reading(path, "train into another --run-dir"):
            changed = [k for k, v in about["config"].items() if last["config"][k] != v]
            changed += ["files of the data"] * (last["data_digest"] != about["data_digest"])
            if not changed:
                for name, part in parts.items():
                    part.load_state_dict(last[name])
                return last["history"]
        why = f"made with another {', '.join(changed)}"
    if not overwrite:
        raise UserError(f"{run_dir}: there is a run {why}; --overwrite discards it")
    print(f"{run_dir}: starting over, there was a run {why}")
    return []


def start_run(
    run_dir: Path,
    config: dict,
    device: torch.device,
    dtype: torch.dtype,
    processes: int,
    history: list[dict],
) -> SummaryWriter:
    """Empty the directory of a new run, write its config and environment.

    Args:
        dtype: in which convolutions compute; processes: how many train; history: the epochs done.

    Returns:
        A writer of TensorBoard events.
    """
    for path in run_dir.iterdir() if not history else ():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_atomically(run_dir / "config.yaml", dump(config).encode())
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown: not a git checkout"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in older releases
    environment = {
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": capabilities.get("cpu_name", platform.machine()),
        "threads": torch.get_num_threads(),
        "precision": str(dtype).removeprefix("torch."),
        "processes": processes,
        "seed": config["seed"],
    }
    if device.type != "cpu":
        environment["device"] = torch.get_device_module(device).get_device_name()
    write_atomically(run_dir / "environment.json", json.dumps(environment, indent=2).encode())
    done = f", resuming after epoch {len(history)}" if history else ""
    print(f"{run_dir}: training on {device.type} in {environment['precision']}{done}", flush=True)
    # purge_step drops the events of epochs that will be repeated.
    writer = SummaryWriter(run_dir, purge_step=len(history) + 1)
    charts = ("mean_iou", "loss")
    both = {key: ["Multiline", [f"{key}/training", f"{key}/validation"]] for key in charts}
    writer.add_custom_scalars({"training and validation": both})
    return writer


def best_of(history: list[dict]) -> dict:
    """Pick the epoch with the highest validation mean IoU, the first of equals."""
    return max(history, key=lambda entry: entry["validation"]["mean_iou"])


def prediction_grid(validation: Split, predictions: Tensor, config: dict) -> Tensor:
    """Show image, truth and prediction of a few validation images, (3, H, W) uint8."""
    rows, classes = [], config["classes"]
    for i in evenly(len(predictions), PICTURES):
        pictures = {
            "image": validation.images[i, :3].expand(3, -1, -1),
            "truth": colourise(validation.masks[i], classes),
            "prediction": colourise(predictions[i], classes),
        }
        rows.append([(caption, [picture]) for caption, picture in pictures.items()])
    return contact_sheet(rows, legend(config))


def write_epoch(
    run_dir: Path,
    about: dict,
    parts: dict[str, object],
    history: list[dict],
    picture: Tensor,
    writer: SummaryWriter,
) -> None:
    """Log the last epoch and write metrics.jsonl, last.pt and, if it is the best, best.pt.

    last.pt comes last: a run that is killed before it repeats the epoch.

    Args:
        about, parts: see `resume_run`.
        history: the lines of metrics.jsonl.
        picture: (3, H, W) uint8, see `prediction_grid`.
    """
    log_epoch(writer, history, about["config"], picture)
    state = {name: part.state_dict() for name, part in parts.items()}
    if history[-1] is best_of(history):
        best = about | {"model": state["model"], "epoch": len(history)}
        save_checkpoint(run_dir / "best.pt", best)
        write_atomically(run_dir / "predictions.png", png(picture))
    lines = "".join(json.dumps(entry) + "\n" for entry in history)
    write_atomically(run_dir / "metrics.jsonl", lines.encode())
    save_checkpoint(run_dir / "last.pt", about | state | {"history": history})


def log_epoch(writer: SummaryWriter, history: list[dict], config: dict, picture: Tensor) -> None:
    """Write the last epoch for TensorBoard and print its line."""
    entry = history[-1]
    epoch, training, validation = (entry[key] for key in ("epoch", "training", "validation"))
    for split in ("training", "validation"):
        values = {"loss": entry[split]["loss"], "mean_iou": entry[split]["mean_iou"]}
        tags = {f"{key}/{split}": value for key, value in values.items()}
        tags |= {f"iou_{split}/{name}": v for name, v in entry[split]["per_class_iou"].items()}
        for tag, value in tags.items():
            if value is not None:  # an absent class, or crops without a labelled pixel
                writer.add_scalar(tag, value, epoch)
    writer.add_scalar("learning_rate", entry["learning_rate"], epoch)
    writer.add_scalar("images_per_s", entry["images_per_s"], epoch)
    writer.add_image("image | truth | prediction", picture, epoch)
    writer.flush()
    iou, dead = training["mean_iou"] or 0.0, validation["dead_classes"]
    print(
        f"{config['name']} epoch {epoch}/{config['epochs']}  "
        f"loss {training['loss']:.4f} / {validation['loss']:.4f}  "
        f"mean IoU {iou:.4f} / {validation['mean_iou']:.4f}  (training / validation)  "
        f"{entry['images_per_s']:.0f} images/s"
        + ("  best" if entry is best_of(history) else "")
        + (f"  dead: {', '.join(dead)}" if dead else ""),
        flush=True,
    )
    if dead and epoch in (1, config["epochs"]):
        print(DEAD_CLASS_FIX)


def write_summary(
    run_dir: Path, about: dict, history: list[dict], parameters: int, writer: SummaryWriter
) -> None:
    """Write summary.json and TensorBoard's HParams.

    images_seen and train_seconds count the whole run, not the epochs up to the best one.
    """
    config, best = about["config"], best_of(history)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, else KiB
    summary = {
        "name": config["name"],
        "seed": config["seed"],
        **{key: history[-1][key] for key in ("images_seen", "train_seconds")},
        "best_epoch": best["epoch"],
        "training": best["training"],
        "validation": best["validation"],
        "peak_memory_mib": peak / (2**20 if sys.platform == "darwin" else 2**10),
        "parameters": parameters,
        "code": about["code"],
        "digest": about["data_digest"],
    }
    simple = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in config.items()}
    reached = {f"result/{k}_mean_iou": best[k]["mean_iou"] for k in ("validation", "training")}
    # In the run's own folder; a step behind the last epoch, so that resuming replaces it.
    writer.add_hparams(simple, reached, run_name=".", global_step=config["epochs"] + 1)
    writer.close()
    write_atomically(run_dir / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    print(
        f"best epoch {best['epoch']}, validation mean IoU {best['validation']['mean_iou']:.4f}; "
        f"next: python evaluate.py {run_dir / 'best.pt'}"
    )
