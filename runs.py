"""Keep the folder of a run: its lock, what it goes on from, its history, pictures and summary."""

import contextlib
import fcntl
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from machine import name_device

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints import read_checkpoint
from common import ROOT, UserError, reading, require, write_atomically
from config import dump, is_same
from data import evenly
from figures import class_colours, colourise
from model import count_parameters

if TYPE_CHECKING:  # takes seconds to import
    from torch.utils.tensorboard import SummaryWriter

# What may lie in a folder without last.pt, since a run writes it before or removes it after, and
# what a run or other scripts add later.
FIRST_FILES = {"config.yaml", "environment.json", "best.pt", "predictions.png", "metrics.jsonl"}
FINISHED_FILES = {"summary.json", "testing.json", "testing.npz", "on-afo.json", "on-scenes.json"}
LATER_FILES = FINISHED_FILES | {"last.pt", "doctor.png"}
EVENTS = "events.out.tfevents"  # how the names of TensorBoard's files begin
LONG = 300  # seconds of training that are not discarded unless the user asks for it
SHOWN = 4  # validation images in TensorBoard and predictions.png
SCORES = {  # what every epoch has of either split, and of which type
    "loss": float,
    "mean_iou": (float, type(None)),
    "mean_iou_foreground": (float, type(None)),
    "per_class_iou": dict,
    "dead_classes": list,
}


def default_folder(config: dict) -> Path:
    """Name the folder of a run: runs/<folder of the data>/<profile>/<experiment>/seed<n>.

    make does the same for the experiments at the top of configs/ with the data in data/.
    """
    seed = f"seed{config['seed']}"
    data = Path(os.path.abspath(config["data"]))  # whatever its spelling, such as ..
    return Path("runs", data.name, config["profile"], config["name"], seed)


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run directory; UserError if another process trains there."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / "lock", "a")  # noqa: SIM115 (closed below)
    except OSError as error:
        text = f"cannot be written ({error.strerror}); give another --run-dir"
        raise UserError(f"{run_dir}: {text}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run_dir}: another process trains here; wait for it") from None
        yield


def is_training(run_dir: Path) -> bool:
    """Tell whether a process trains in a run directory now; it may belong to somebody else."""
    path = run_dir / "lock"
    if not path.exists():
        return False
    with reading(path, "let it be read"), open(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


# ---- to go on or to start over


def find_checkpoint(
    run_dir: Path, config: dict, data_digest: str, resume: bool, overwrite: bool
) -> dict | None:
    """Return the checkpoint that a run goes on from, or None if it starts over.

    `overwrite` starts over, whatever run is there. `resume` goes on with a run of the same config
    and data, and replaces one of another config if it is short (`LONG`). UserError if a run would
    be lost unasked.
    """
    files = list_files(run_dir)
    if not files:
        return None
    strangers = sorted(files - FIRST_FILES - LATER_FILES)
    if strangers or "config.yaml" not in files:
        example = f", such as {strangers[0]}" if strangers else ""
        text = f"holds other files than a run's{example}"
        raise UserError(f"{run_dir}: {text}; give another --run-dir")
    killed_in_first_epoch = files <= FIRST_FILES and count_epochs(run_dir) <= 1
    if overwrite or killed_in_first_epoch:
        return None
    discard = "make … OVERWRITE=1 (--overwrite) discards it"
    path = run_dir / "last.pt"
    if not path.exists():
        raise UserError(f"{run_dir}: a run without last.pt to go on from; {discard}")
    if not resume:
        raise UserError(f"{run_dir}: there is a run; --resume goes on with it, {discard}")

    last = read_checkpoint(path)
    with reading(path, "train into another --run-dir"):
        require(last, {"history": list, "data_digest": str, "code": str})
        seconds = last["history"][-1]["train_seconds"]
    changed = list_changes(last, config, data_digest)
    if not changed:
        return last
    if seconds > LONG:
        raise UserError(
            f"{run_dir}: holds {seconds / 60:.1f} minutes of training with another {changed}; "
            f"with the old values and data it goes on, {discard}, RUNS=… (--run-dir) trains anew"
        )
    print(f"{run_dir}: starting over, the run there was made with another {changed}")
    return None


def list_files(run_dir: Path) -> set[str]:
    """List the files of a folder, without hidden ones and those of a run that come and go."""
    names = set()
    for path in run_dir.iterdir():
        is_passing = path.name == "lock" or path.name.startswith(EVENTS) or is_partial(path.name)
        if not is_passing and not path.name.startswith("."):
            names.add(path.name)
    return names


def is_partial(name: str) -> bool:
    """Tell whether a file of a run was being written when its process was killed."""
    match = re.fullmatch(r"(.*?)(\.\d+)?\.partial", name)  # the number is that of a process
    return match is not None and match[1] in FIRST_FILES | LATER_FILES


def count_epochs(run_dir: Path) -> int:
    """Count the epochs in the metrics.jsonl of a run; 0 if it has none."""
    path = run_dir / "metrics.jsonl"
    return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0


def list_changes(last: dict, config: dict, data_digest: str) -> str:
    """List what keeps a run from going on: the keys that changed, and the data; "" if nothing."""
    changed = [key for key in config if not is_same(config[key], last["config"][key])]
    more_epochs = config["epochs"] >= len(last["history"])
    if "epochs" in changed and config["schedule"] == "constant" and more_epochs:
        changed.remove("epochs")  # the epochs so far are the same, however many follow
    if last["data_digest"] != data_digest:
        changed.append("files of the data")
    return ", ".join(changed)


# ---- what is written at the start


def start_run(run_dir: Path, config: dict, environment: dict, done: int) -> "SummaryWriter":
    """Write config and environment of a run; returns a writer of TensorBoard events.

    A new run (`done` is 0 epochs) removes the files of the run before it.
    """
    from torch.utils.tensorboard import SummaryWriter

    if done == 0:
        remove_run(run_dir)
    # The run is not finished any more, and its tests were of weights that training may replace.
    for name in sorted(FINISHED_FILES):
        (run_dir / name).unlink(missing_ok=True)
    for path in list(run_dir.iterdir()):
        if is_partial(path.name):
            path.unlink()
    write_atomically(run_dir / "config.yaml", dump(config).encode())
    write_atomically(run_dir / "environment.json", json.dumps(environment, indent=2).encode())
    resuming = f", resuming after epoch {done}" if done > 0 else ""
    machine = f"{environment['precision']}, {environment['device']}"
    print(f"{run_dir}: training in {machine}{resuming}", flush=True)
    writer = SummaryWriter(run_dir, purge_step=done + 1)  # drops epochs that are repeated
    layout = {}
    for key in ("mean_iou", "loss"):
        layout[key] = ["Multiline", [f"{key}/training", f"{key}/validation"]]
    writer.add_custom_scalars({"training and validation": layout})
    return writer


def remove_run(run_dir: Path) -> None:
    """Remove the files of a run, in an order that a kill may interrupt.

    As long as last.pt is there, the run can go on. Without last.pt and metrics.jsonl it is taken
    for one that was killed in its first epoch. config.yaml is removed last, since it shows that the
    folder is a run's.
    """
    in_order = sorted(LATER_FILES - {"last.pt"})
    in_order += ["metrics.jsonl", "last.pt"]
    in_order += sorted(FIRST_FILES - {"metrics.jsonl", "config.yaml"})
    for name in in_order:
        (run_dir / name).unlink(missing_ok=True)
    for path in list(run_dir.iterdir()):
        if path.name.startswith(EVENTS):
            path.unlink()
    (run_dir / "config.yaml").unlink(missing_ok=True)


def describe_environment(device: torch.device, dtype: torch.dtype, processes: int) -> dict:
    """Describe code, versions and machine of a run, as environment.json keeps them."""
    command = ["git", "describe", "--always", "--dirty"]
    commit = ""
    with contextlib.suppress(OSError):  # there is no git
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": name_device(device),
        "precision": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


# ---- what is written after an epoch


def best_of(history: list[dict]) -> dict:
    """Pick the epoch with the highest validation mean IoU, the first of equals."""
    return max(history, key=lambda entry: entry["validation"]["mean_iou"])


def draw_predictions(images: Tensor, masks: Tensor, predictions: Tensor, config: dict) -> Tensor:
    """Draw image, truth and prediction of a few images side by side, (3, height, width) uint8.

    From (N, channels, H, W) images, (N, H, W) masks and predicted classes, all uint8.
    """
    colours = class_colours(config)
    rows = []
    for i in evenly(len(images), SHOWN):
        image = images[i, :3].expand(3, -1, -1).cpu()
        truth = colourise(masks[i].cpu(), colours)
        prediction = colourise(predictions[i], colours)
        tiles = [F.pad(tile, (2, 2, 2, 2), value=128) for tile in (image, truth, prediction)]
        rows.append(torch.cat(tiles, dim=2))
    return torch.cat(rows, dim=1)


def log_epoch(writer: "SummaryWriter", entry: dict, picture: Tensor) -> None:
    """Show an epoch in TensorBoard: its numbers and the picture of `draw_predictions`."""
    scalars = {"learning_rate": entry["learning_rate"], "images_per_s": entry["images_per_s"]}
    for split in ("training", "validation"):
        scalars[f"loss/{split}"] = entry[split]["loss"]
        scalars[f"mean_iou/{split}"] = entry[split]["mean_iou"]
        for name, value in entry[split]["per_class_iou"].items():
            scalars[f"iou_{split}/{name}"] = value
    for tag, value in scalars.items():
        if value is not None:  # a class that is absent, or crops without a labelled pixel
            writer.add_scalar(tag, value, entry["epoch"])
    writer.add_image("image | truth | prediction", picture, entry["epoch"])
    writer.flush()


def write_history(run_dir: Path, history: list[dict]) -> None:
    """Write metrics.jsonl, a line for each epoch."""
    text = "".join(json.dumps(entry) + "\n" for entry in history)
    write_atomically(run_dir / "metrics.jsonl", text.encode())


def read_history(path: Path, advice: str) -> list[dict]:
    """Read the epochs of a metrics.jsonl; UserError, with advice, if it is damaged."""
    with reading(path, advice):
        lines = path.read_text(encoding="utf-8").splitlines()
        if not lines:
            raise ValueError("it is empty")
        history = [json.loads(line) for line in lines]
        for entry in history:
            require(entry["training"], SCORES)
            require(entry["validation"], SCORES)
    return history


def advise_on_classes(config: dict) -> str:
    """Say what a config lacks that brings back classes never predicted, the surest first."""
    advice = []
    if config["model"] == "unet":
        width = config["decoder"][-1][0]  # of the last stage: a number, or "classes"
        if width == "classes" or width <= len(config["classes"]):
            advice.append("a last decoder stage wider than `classes`")
            if config["skip"] == "pooled" and config["upsampling_init"] != "bilinear":
                advice.append("upsampling_init: bilinear")
    if "dice_per_class" not in config["loss"]:
        advice.append("loss: {cross_entropy: 1, dice_per_class: 1}")
    advice += ["more steps", "a lower learning_rate"]
    return ", ".join(advice)


def print_epoch(config: dict, entry: dict, is_best: bool) -> None:
    """Print the line of an epoch; the first and the last have advice on classes never predicted."""
    epoch, epochs = entry["epoch"], config["epochs"]
    training, validation = entry["training"], entry["validation"]
    training_iou = "–"  # no crop had a labelled pixel
    if training["mean_iou"] is not None:
        training_iou = f"{training['mean_iou']:.4f}"
    line = (
        f"{config['name']} epoch {epoch}/{epochs}  "
        f"loss {training['loss']:.4f} / {validation['loss']:.4f}  "
        f"mean IoU {training_iou} / {validation['mean_iou']:.4f}  "
        f"(training / validation)  {entry['images_per_s']:.0f} images/s"
    )
    if is_best:
        line += "  best"
    never = ", ".join(validation["dead_classes"])
    if never:
        line += f"  never predicted: {never}"
    print(line, flush=True)
    if never and epoch in (1, epochs):
        advice = advise_on_classes(config)
        print(
            f"what brings a class back that is never predicted, the surest first: {advice}",
            flush=True,
        )


# ---- what is written at the end


def finish(
    run_dir: Path,
    config: dict,
    history: list[dict],
    code: str,
    training_digest: str,
    model: nn.Module,
) -> None:
    """End a run that has nothing left to train: write its summary if it is missing."""
    # Fewer epochs may be asked for than when the run was begun: make compares with this file.
    write_atomically(run_dir / "config.yaml", dump(config).encode())
    write_history(run_dir, history)  # a kill in `remove_run` leaves none
    print(f"{run_dir}: all {len(history)} epochs are trained")
    path = run_dir / "summary.json"
    if path.exists():
        path.touch()  # make learns that the run is newer than the data
    else:
        write_summary(run_dir, config, history, code, training_digest, model)


def write_summary(
    run_dir: Path,
    config: dict,
    history: list[dict],
    code: str,
    training_digest: str,
    model: nn.Module,
) -> None:
    """Write summary.json: the scores of the best epoch, and what the whole run cost.

    `training_digest`, of all training images, tells runs of other data apart.
    """
    best = best_of(history)
    summary = {
        "name": config["name"],
        "seed": config["seed"],
        "profile": config["profile"],
        "images_seen": history[-1]["images_seen"],
        "train_seconds": history[-1]["train_seconds"],
        "best_epoch": best["epoch"],
        "parameters": count_parameters(model),
        "code": code,
        "digest": training_digest,
        "training": best["training"],
        "validation": best["validation"],
    }
    write_atomically(run_dir / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    mean_iou = best["validation"]["mean_iou"]
    print(f"best epoch {best['epoch']}, validation mean IoU {mean_iou:.4f}: {run_dir / 'best.pt'}")


def log_summary(writer: "SummaryWriter", config: dict, history: list[dict]) -> None:
    """Show config and best scores in TensorBoard's HParams, and close the writer."""
    hyperparameters = {}
    for key, value in config.items():
        hyperparameters[key] = value if isinstance(value, (int, float, str)) else str(value)
    best = best_of(history)
    scores = {}
    for split in ("validation", "training"):
        if best[split]["mean_iou"] is not None:
            scores[f"result/{split}_mean_iou"] = best[split]["mean_iou"]
    # In the run's own folder, and a step behind the last epoch, so that resuming replaces it.
    step = config["epochs"] + 1
    writer.add_hparams(hyperparameters, scores, run_name=".", global_step=step)
    writer.close()
