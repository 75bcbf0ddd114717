"""Runs made by hand for the tests of the report: every score is given."""

from pathlib import Path

from report_runs import Run, Study, sort_runs

CLASSES = ["background", "square", "triangle", "circle"]
CONFIG = {
    "name": "x",
    "seed": 0,
    "profile": "quick",
    "data": "data/afo",
    "classes": {name: [index, 0, 0] for index, name in enumerate(CLASSES)},
    "epochs": 2,
    "batch_size": 10,
    "images_per_epoch": 50,
    "limit_images": 0,
    "limit_validation": 0,
    "group": "^.{1,6}",
    "loss": {"dice_pooled": 1.0},
    "horizontal_flip": 0.0,
    "blur": 0.0,
}


def scores(iou: float, never: list[str] | None = None) -> dict:
    """Make the scores of a split, every class with the same IoU."""
    return {
        "loss": 1 - iou,
        "pixel_accuracy": 0.9,
        "mean_iou": iou,
        "mean_iou_foreground": iou,
        "mean_dice": iou,
        "per_class_iou": dict.fromkeys(CLASSES, iou),
        "dead_classes": never or [],
    }


def make_run(experiment: str, seed: int, iou: float, seen: int = 100, **config: object) -> Run:
    """Make a run of two epochs, which scores `iou` on every split; background is 86 % of pixels."""
    first = {"epoch": 1, "training": scores(iou / 2), "validation": scores(iou / 2, ["circle"])}
    last = {"epoch": 2, "training": scores(iou), "validation": scores(iou)}
    row = scores(iou)
    row["name"] = experiment.split("/")[-1]
    row["seed"] = seed
    row["profile"] = "quick"
    row["digest"] = "d"
    row["parameters"] = 9
    row["images_seen"] = seen
    row["train_seconds"] = 7.0
    row["checkpoint"] = f"runs/{experiment}/seed{seed}/best.pt"
    row["split"] = "validation"
    test = dict(row)
    test["split"] = "testing"
    test["images"] = 40
    test["groups"] = 8
    test["interval"] = [iou - 0.01, iou + 0.01]
    test["boundary_iou"] = iou
    test["lost_positions"] = {}
    test["confusion_matrix"] = [[86, 0, 0, 0], [0, 4, 0, 0], [0, 0, 4, 0], [0, 0, 0, 6]]
    values = dict(CONFIG)
    values.update(config)
    machine = {"commit": "abc", "device": "toy", "precision": "float32", "threads": 1, "torch": "2"}
    run = Run(experiment, "afo", "quick", seed, None, values, machine, [first, last], row, test)
    if experiment.split("/")[0] in ("tune", "overfit", "heads"):
        run.test = None
    return run


def make_study(runs: list[Run], folder: Path) -> Study:
    return sort_runs(runs, folder, "figures")
