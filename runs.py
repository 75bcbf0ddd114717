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
import yaml
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from config import dump
from data import Split, evenly
from figures import colourise, grid, legend_of, save
from model import read_checkpoint, save_checkpoint

TEXTS = yaml.safe_load((ROOT / "docs/texts.yaml").read_text(encoding="utf-8"))
PICTURES = 4  # validation images in TensorBoard and predictions.png


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


def resume_run(run_dir: Path, about: dict, parts: dict, resume: bool, overwrite: bool) -> list:
    """Decide whether a run starts over or goes on after its last finished epoch.

    `resume` goes on with a run of the `config` and `data_digest` in `about`, and loads the states
    of `parts` (model, optimizer, scheduler) from last.pt; else `overwrite` starts over. Returns the
    epochs so far, none if it starts over. UserError if a run can be neither resumed nor replaced.
    """
    path = run_dir / "last.pt"
    why = "which --resume goes on with" if path.exists() else "without last.pt to go on from"
    there = {file.name for file in run_dir.glob("*")} - {"lock", "config.yaml.partial"}
    if there and "config.yaml" not in there:
        raise UserError(f"{run_dir}: holds other files than a run; give another --run-dir")
    if all(name in ("config.yaml", "environment.json") or "tfevents" in name for name in there):
        return []  # nothing that could be lost
    if resume and path.exists():
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
    run_dir: Path, config: dict, history: list, device: torch.device, dtype: torch.dtype, world: int
) -> SummaryWriter:
    """Empty the folder of a new run, write config and machine; returns a writer of events."""
    for path in run_dir.iterdir() if not history else ():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    options = {"shell": True, "cwd": ROOT, "capture_output": True, "text": True}
    commit = subprocess.run("git describe --always --dirty", **options).stdout.strip() or "unknown"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in older releases
    name = capabilities.get("cpu_name", platform.machine())
    if device.type != "cpu":
        name = getattr(torch.get_device_module(device), "get_device_name", device.__str__)()
    machine = {"commit": commit, "python": platform.python_version(), "torch": torch.__version__}
    machine |= {"device": name, "precision": str(dtype).removeprefix("torch.")}
    machine |= {"threads": torch.get_num_threads(), "processes": world}
    write_atomically(run_dir / "config.yaml", dump(config).encode())
    write_atomically(run_dir / "environment.json", json.dumps(machine, indent=2).encode())
    done = f", resuming after epoch {len(history)}" if history else ""
    print(f"{run_dir}: training in {machine['precision']}, {name}{done}", flush=True)
    writer = SummaryWriter(run_dir, purge_step=len(history) + 1)  # drops epochs to be repeated
    both = {k: ["Multiline", [f"{k}/training", f"{k}/validation"]] for k in ("mean_iou", "loss")}
    writer.add_custom_scalars({"training and validation": both})
    return writer


def best_of(history: list[dict]) -> dict:
    """Pick the epoch with the highest validation mean IoU, the first of equals."""
    return max(history, key=lambda entry: entry["validation"]["mean_iou"])


def show_predictions(validation: Split, predictions: Tensor, config: dict) -> Figure:
    """Draw image, truth and prediction of a few validation images."""
    rows, classes = [], config["classes"]
    for i in evenly(len(predictions), PICTURES):
        image = validation.images[i, :3].expand(3, -1, -1)
        truth, prediction = (colourise(m[i], classes) for m in (validation.masks, predictions))
        rows.append([("image", image), ("truth", truth), ("prediction", prediction)])
    return grid(rows, legend_of(config))


def write_epoch(
    run_dir: Path, about: dict, parts: dict, history: list, figure: Figure, writer: SummaryWriter
) -> None:
    """Log and print an epoch; write metrics.jsonl, last.pt and, if it is the best, best.pt."""
    config, entry, best = about["config"], history[-1], history[-1] is best_of(history)
    epoch, training, validation = (entry[key] for key in ("epoch", "training", "validation"))
    tags = {key: entry[key] for key in ("learning_rate", "images_per_s")}
    for split in ("training", "validation"):
        tags |= {f"{key}/{split}": entry[split][key] for key in ("loss", "mean_iou")}
        tags |= {f"iou_{split}/{name}": v for name, v in entry[split]["per_class_iou"].items()}
    for tag, value in tags.items():
        if value is not None:  # an absent class, or crops without a labelled pixel
            writer.add_scalar(tag, value, epoch)
    writer.add_figure("image | truth | prediction", figure, epoch)
    writer.flush()
    state = {name: part.state_dict() for name, part in parts.items()}
    if best:
        save_checkpoint(run_dir / "best.pt", about | {"model": state["model"], "epoch": epoch})
        save(figure, run_dir / "predictions.png")
    lines = "".join(json.dumps(entry) + "\n" for entry in history)
    write_atomically(run_dir / "metrics.jsonl", lines.encode())
    # Last of all: a run that is killed before repeats the epoch.
    save_checkpoint(run_dir / "last.pt", about | state | {"history": history})
    loss, iou = (f"{training[k] or 0:.4f} / {validation[k]:.4f}" for k in ("loss", "mean_iou"))
    dead = validation["dead_classes"]
    said = f"{config['name']} epoch {epoch}/{config['epochs']}  loss {loss}  mean IoU {iou}  "
    said += f"(training / validation)  {entry['images_per_s']:.0f} images/s{'  best' * best}"
    print(said + (f"  dead: {', '.join(dead)}" if dead else ""), flush=True)
    if dead and epoch in (1, config["epochs"]):
        print(TEXTS["dead_class_fix"])


def write_summary(
    run_dir: Path, about: dict, history: list[dict], parameters: int, writer: SummaryWriter
) -> None:
    """Write summary.json and TensorBoard's HParams; the costs are those of the whole run."""
    config, best = about["config"], best_of(history)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, else KiB
    summary = {key: config[key] for key in ("name", "seed", "profile")}
    summary |= {key: history[-1][key] for key in ("images_seen", "train_seconds")}
    summary |= {"best_epoch": best["epoch"], "parameters": parameters, "code": about["code"]}
    summary |= {"peak_memory_mib": peak / (2**20 if sys.platform == "darwin" else 2**10)}
    summary |= {"digest": about["data_digest"]} | {k: best[k] for k in ("training", "validation")}
    simple = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in config.items()}
    means = {split: best[split]["mean_iou"] for split in ("validation", "training")}
    reached = {f"result/{s}_mean_iou": mean for s, mean in means.items() if mean is not None}
    # In the run's own folder; a step behind the last epoch, so that resuming replaces it.
    writer.add_hparams(simple, reached, run_name=".", global_step=config["epochs"] + 1)
    writer.close()
    write_atomically(run_dir / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    advice = f"next: python evaluate.py {run_dir / 'best.pt'}"
    print(f"best epoch {best['epoch']}, validation mean IoU {means['validation']:.4f}; {advice}")
