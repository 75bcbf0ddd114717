"""Read a run and say in plain words what is wrong with it and what to try.

    python doctor.py runs/generated/quick/tuned/seed0

Nothing is trained: it looks at the scores of the epochs, at a sample of the data, and at what the
checkpoint makes of that sample. The findings (findings.py, findings_data.py) come worst first,
each with a figure in RUN/doctor/; a healthy run gets one line.
"""

import argparse
import contextlib
import fcntl
import textwrap
from pathlib import Path

import torch
from torch import Tensor

import findings
import findings_data
from checkpoint import load_checkpoint, restore_model
from collect import read_json, run_config
from config import load_config
from data import Split, find_pairs, limit, load_split
from device import pick_device
from errors import UserError, run
from files import write_atomically
from findings import Finding
from images import contact_sheet, png, read_colours, read_image
from metrics import evaluate, scores

SAMPLE = 200  # images of a split that are looked at, spread evenly: seconds on a processor
# The findings by the names of their figures, worst first, and what explains another before it.
ORDER = (
    *("unreadable-data", "dark-images", "empty-masks", "rare-foreground"),
    *("channel-order", "swapped-masks", "stopped", "dead-classes", "learning-rate-too-high"),
    *("loss-not-moving", "overfitting", "too-few-steps"),
)


def diagnose(run_dir: Path, device: torch.device) -> tuple[dict[str, Finding | None], str]:
    """All there is to find in a run.

    Args:
        run_dir: what train.py wrote, finished or not.
        device: where to run the checkpoint.

    Returns:
        A finding, or None, for each name in `ORDER`; and in a few words how far the run came.

    Raises:
        UserError: the folder is no run, or a file of it is damaged.
    """
    if not (run_dir / "config.yaml").is_file():
        raise UserError(
            f"{run_dir}: is no run, it has no config.yaml; give a folder that train.py wrote, as "
            "in runs/generated/quick/tuned/seed0"
        )
    config, history = run_config(run_dir), []
    if (run_dir / "metrics.jsonl").exists():
        needed = ("epoch", "images_seen", "training", "validation")
        history = read_json(run_dir / "metrics.jsonl", needed, lines=True)
    rate, epochs = config["learning_rate"], config["epochs"]
    found: dict[str, Finding | None] = dict.fromkeys(ORDER)

    if not is_training(run_dir):
        found["stopped"] = findings.stopped(history, epochs, rate)
    best = max(history, key=lambda entry: entry["validation"]["mean_iou"], default=None)

    splits = {}
    for split in ("validation", "training"):  # if both are bad, training is told
        try:
            splits[split] = load_split(config, split)
        except UserError as error:
            found["unreadable-data"] = unreadable(config, split, str(error))
    if len(splits) == 2:
        training = limit(splits["training"], config["limit_groups"], config["limit_images"])
        found |= of_the_data(training, splits["validation"], config, best)
        found |= of_the_checkpoint(run_dir, training, splits["validation"], config, device)
        if any(found[name] for name in ORDER[: ORDER.index("stopped")]):
            found["overfitting"] = None  # the gap has another reason, which is told already

    default = load_config([], [])["learning_rate"]
    found["dead-classes"] = findings.dead_classes(history, config)
    found["learning-rate-too-high"] = findings.learning_rate_too_high(history, config, default)
    found["loss-not-moving"] = findings.loss_not_moving(history, rate, default)
    if not (found["learning-rate-too-high"] or found["loss-not-moving"]):
        found["too-few-steps"] = findings.too_few_steps(history, config)
    state = f"epoch {len(history)} of {epochs}"
    return found, state + (f", mean IoU {best['validation']['mean_iou']:.4f}" if best else "")


def is_training(run_dir: Path) -> bool:
    """Whether a process has the lock of the run: it trains there now."""
    try:
        with open(run_dir / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock: it never started, or was copied without it
        return False
    return False


def of_the_data(training: Split, validation: Split, config: dict, best: dict | None) -> dict:
    """Findings in the images and masks. `best`: the line of metrics.jsonl, if there is one."""
    found = {}
    for name, split in (("validation", validation), ("training", training)):
        colours = limit(split, 0, SAMPLE).images[:, :3]  # alpha is no colour
        values = torch.bincount(colours.flatten(), minlength=256).tolist()
        found["dark-images"] = findings_data.dark_images(name, values) or found.get("dark-images")
    number = len(config["classes"])
    counts = pixels_by_value(limit(training, 0, SAMPLE).masks)[:number]
    if 0 in counts:  # in a sample a class may be missing by chance
        counts = pixels_by_value(training.masks)[:number]
    pixels = dict(zip(config["classes"], counts, strict=True))
    limited = bool(config["limit_groups"] or config["limit_images"])
    found["empty-masks"] = findings_data.empty_masks(pixels, limited)
    score = best["validation"]["mean_iou_foreground"] if best else None
    found["rare-foreground"] = findings_data.rare_foreground(pixels, score)
    return found


def pixels_by_value(masks: Tensor) -> list[int]:
    """How many pixels of (M, H, W) uint8 masks have the values 0 to 255."""
    return sum(torch.bincount(m.flatten(), minlength=256) for m in masks.split(64)).tolist()


def of_the_checkpoint(
    run_dir: Path, training: Split, validation: Split, config: dict, device: torch.device
) -> dict:
    """Findings in what best.pt, or else last.pt, makes of whole frames; {} if there is neither.

    Raises:
        UserError: the checkpoint is damaged or of a model with other classes or channels.
    """
    path = next((p for p in (run_dir / "best.pt", run_dir / "last.pt") if p.exists()), None)
    if path is None:
        return {}
    checkpoint = load_checkpoint(path, device)
    for key in ("classes", "in_channels"):
        if checkpoint["config"][key] != config[key]:
            raise UserError(f"{path}: was trained with another {key} than config.yaml; train again")
    model = restore_model(checkpoint, path, device)

    classes = list(config["classes"])
    order = [2, 1, 0, 3][: config["in_channels"]]
    matrices, results = {}, {}
    for name, split in (
        ("training", training),
        ("validation", validation),
        ("exchanged", validation),
    ):
        few = limit(split, 0, SAMPLE)
        images = few.images[:, order] if name == "exchanged" and len(order) > 1 else few.images
        matrix, _ = evaluate(model, images, few.masks, config, torch.float32)
        matrices[name], results[name] = matrix.cpu().numpy(), scores(matrix, classes)
    swapped = findings_data.swapped_masks(matrices["training"], matrices["validation"], classes)
    channels = findings_data.channel_order(results["validation"], results["exchanged"], swapped)
    return {
        "channel-order": channels,
        "swapped-masks": None if channels else swapped,
        "overfitting": findings_data.gap(
            results["training"], results["validation"], len(training.names), config
        ),
    }


def unreadable(config: dict, split: str, error: str) -> Finding:
    """The finding that `load_split` made, with the files it complains of, or the first ones."""
    pairs, _ = find_pairs(config, split)
    pairs.sort(key=lambda pair: str(pair.mask) not in error and str(pair.image) not in error)
    rows, highest = [], 0
    for pair in pairs[:3]:
        with contextlib.suppress(UserError):  # it may be the one that cannot be read
            row = []
            for path in (pair.image, pair.mask):
                pixels = read_image(path, 3) if path == pair.image else read_colours(path)
                picture = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
                values = f" {picture.min()}…{picture.max()}"
                row.append((path.name + values, [picture]))
            rows.append(row)
            highest = max(highest, int(picture.max()))  # of the mask
    hint = ""
    if highest == 1 and config["mask_format"] == "colours":
        hint = (
            "The masks look like 0 and 1 in the place of 0 and 255: multiply them by 255, or set "
            "mask_format: indices if their numbers are those of the classes. "
        )

    def draw(path: Path) -> None:
        write_atomically(path, png(contact_sheet(rows, config["classes"])))

    return Finding(
        f"The {split} data cannot be read as config.yaml says",
        error,
        hint + "Mend the files or the keys from `data` to `in_channels`; python data.py check "
        "--config RUN_DIR/config.yaml lists every problem.",
        draw if rows else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="a folder that train.py wrote")
    parser.add_argument("--out", type=Path, metavar="DIR", help="figures; default: RUN_DIR/doctor")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    found, state = diagnose(args.run, pick_device(args.device))
    out = args.out or args.run / "doctor"
    number = sum(finding is not None for finding in found.values())
    said = f"{number} finding{'s' if number > 1 else ''}" if number else "nothing found wrong"
    print(f"{args.run}: {said} ({state})")
    for name, finding in found.items():
        path = out / f"{name}.png"
        path.unlink(missing_ok=True)  # of an earlier call
        if finding is None:
            continue
        print(f"\n{finding.title}")
        if finding.draw:
            finding.draw(path)
        advice = finding.advice.replace("RUN_DIR", str(args.run))
        seen = {"evidence": finding.evidence, "try": advice}
        for label, text in (seen | ({"figure": str(path)} if finding.draw else {})).items():
            print(_wrapped(f"{label + ':':<10}{text}"))
    if number and not found["unreadable-data"]:
        print(
            _wrapped('to try a key: the make that trained it, with RUNS=runs/try SET="key=value"')
        )


def _wrapped(text: str) -> str:
    return textwrap.fill(
        text,
        98,
        initial_indent="  ",
        subsequent_indent=" " * 12,
        break_long_words=False,
        break_on_hyphens=False,
    )


if __name__ == "__main__":
    run(main)
