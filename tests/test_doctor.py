"""Tests of tools/doctor.py: failing runs are recognised, healthy ones give no alarm."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny
from PIL import Image

from common import UserError
from config import dump, load_config
from data import Split
from metrics import confusion_matrices
from runs import advise_on_classes, locked
from tools import doctor
from train import train

CPU = torch.device("cpu")
CLASSES = ("background", "square", "triangle", "circle")
FALLING, RISING = [0.7, 0.2, 0.1, 0.06, 0.05, 0.04], [0.6, 0.8, 0.9, 0.93, 0.94, 0.945]


@pytest.fixture(scope="module")
def healthy(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on images in the colours of their masks, learnt in a second. Read-only: copy it."""
    root = tmp_path_factory.mktemp("doctor")
    data = shutil.copytree(dataset, root / "data", ignore=shutil.ignore_patterns(".cache"))
    for mask in data.glob("*/gt_image/*.png"):
        image = np.array(Image.open(mask)) // 2 + 40
        Image.fromarray(image).save(mask.parents[1] / "image" / mask.name.removeprefix("gt_"))
    settings = {
        "epochs": 3,
        "images_per_epoch": 240,
        "learning_rate": 0.03,
        "schedule": "one_cycle",
        "skip": "full",
        "encoder": "[[8, 3]]",
        "decoder": "[[8, 3], [8, 3]]",
    }
    with locked(root / "run"):
        train(load_config([], tiny(data, **settings)), root / "run", CPU, False, False)
    return root / "run"


@pytest.fixture
def run(healthy: Path, tmp_path: Path) -> Path:
    """Copy the healthy run and its data."""
    data = shutil.copytree(healthy.parent / "data", tmp_path / "data")
    run = shutil.copytree(healthy, tmp_path / "run")
    configure(run, data=str(data))
    return run


def configure(run: Path, **values: object) -> None:
    """Change keys of the config of a run."""
    config = load_config([run / "config.yaml"])
    config.update(values)
    (run / "config.yaml").write_text(dump(config))


def write_history(
    run: Path, losses: list, val_losses: list, ious: list, never: dict[int, list[str]]
) -> None:
    """Write a finished run without checkpoints.

    `never`: index of an epoch → classes that it never predicts; their IoU is 0.
    """
    lines = []
    for i, (loss, val_loss, iou) in enumerate(zip(losses, val_losses, ious, strict=True)):
        missing = never.get(i, [])
        scores = {
            "mean_iou": iou,
            "mean_iou_foreground": iou,
            "dead_classes": missing,
            "per_class_iou": {name: 0.0 if name in missing else iou for name in CLASSES},
        }
        entry = {
            "epoch": i + 1,
            "images_seen": 10_000 * (i + 1),
            "training": dict(scores, loss=loss),
            "validation": dict(scores, loss=val_loss),
        }
        lines.append(json.dumps(entry))
    (run / "metrics.jsonl").write_text("\n".join(lines))
    (run / "best.pt").unlink()
    (run / "last.pt").unlink()
    configure(run, epochs=len(losses), loss={"cross_entropy": 1.0}, schedule="constant")


@pytest.fixture
def findings(call: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`findings(run)`: title, evidence and advice of each finding that the doctor prints.

    Without its figure, which takes longer than all the rest.
    """
    monkeypatch.setattr(doctor, "draw_curves", lambda *_: None)

    def read(run: Path) -> list[list[str]]:
        code, out, _ = call(doctor.main, run, "--device", "cpu")
        assert code == 0
        return [text.strip().split("\n") for text in out.split("\n\n")[1:]]

    return read


def test_healthy_run_gets_one_line_and_a_figure(run: Path, call: Callable) -> None:
    code, out, _ = call(doctor.main, run, "--device", "cpu")
    assert code == 0
    assert out == f"{run}: nothing found wrong (epoch 3 of 3, curves in doctor.png)\n"
    assert Image.open(run / "doctor.png").width > 800


BAD_DATA = {
    "only background": ("*/gt_image", lambda m: m * 0, "have no square, triangle, circle"),
    "no circle": ("*/gt_image", lambda m: m * [1, 1, 0], "have no circle"),
    "images of 0…1": ("*/image", lambda i: i // 128, "training images are black"),
    "black validation": ("validation/image", lambda i: i // 255, "validation images are black"),
    "BGR": ("validation/image", lambda i: i[..., ::-1], "red and blue swapped"),
    "grey": ("validation/image", lambda i: i[..., [0, 0, 0]], "overfitting"),
    "masks of 0…1": ("*/gt_image", lambda m: m // 255, "cannot be used"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_found_first(run: Path, case: str, findings: Callable) -> None:
    folders, edit, expected = BAD_DATA[case]
    configure(run, limit_images=1000)  # without a limit, an absent class is an error of the data
    for path in (run.parent / "data").glob(f"{folders}/*.png"):
        Image.fromarray(edit(np.array(Image.open(path))).astype(np.uint8)).save(path)
    titles = [title for title, _, _ in findings(run)]
    assert expected in titles[0]
    assert not any("loss" in title or "stopped" in title for title in titles)


def test_rare_foreground_matters_only_where_it_is_not_learnt() -> None:
    images = torch.full((4, 3, 100, 100), 9, dtype=torch.uint8)
    masks = torch.zeros(4, 100, 100, dtype=torch.uint8)
    masks[0, 0, :30] = torch.tensor([1, 2, 3], dtype=torch.uint8).repeat(10)  # 0.075 %
    split = Split(images, masks, ["a"] * 4, ["a"] * 4, "")
    config = {"classes": dict.fromkeys(CLASSES)}
    for iou, number in ((0.1, 1), (None, 1), (0.8, 0)):
        history = [{"validation": {"mean_iou_foreground": iou}}]
        found = doctor.check_data(config, history, split, split, "")
        assert len(found) == number
        assert all(finding.title.startswith("Only 0.075%") for finding in found)


HIGH = [2.3, 2.1, 1.85, 1.7, 1.6, 1.5]  # of a loss that falls, and is above 1 to the end
OWN_LOSS = {"loss": {"mine": 1.0}}
PER_CLASS = {"loss": {"cross_entropy_per_class": 2.0}}
STILL, LOW = [1.4, 1.39, 1.4, 1.4, 1.4, 1.38], [0.2] * 6
CLIMBING, ONE_CYCLE = [0.3, 0.4, 0.5, 0.6, 0.7, 0.75], {"schedule": "one_cycle"}
HISTORIES = {  # training loss, validation loss, mean IoU, config → start of the title, evidence
    "ripple near zero": ([*FALLING[:4], 0.08, 0.05], FALLING, RISING, {}, "", ""),
    "jump": ([0.7, 0.2, 0.1, 0.5, 0.2, 0.1], FALLING, RISING, {}, "The learning", "0.5 / 0.06"),
    "worse than guessing": ([9.0] * 6, [9.0] * 6, LOW, {}, "The learning", "1.39"),
    "loss of one's own": (HIGH, HIGH, RISING, OWN_LOSS, "", ""),
    "negative loss": ([-0.1, -0.5, -0.8, -0.79, -0.85, -0.9], FALLING, RISING, OWN_LOSS, "", ""),
    "weighted cross-entropy": (HIGH, HIGH, RISING, PER_CLASS, "", ""),  # guessing: 2 ln 4 = 2.77
    "own loss rises": ([*HIGH[:5], 2.6], HIGH, RISING, OWN_LOSS, "The learning", "2.6 / 1.5 in"),
    "still": (STILL, STILL, LOW, {}, "The training loss is not moving", "1.38"),
    "climbing": (FALLING, FALLING, CLIMBING, {}, "Too few steps", "0.750"),
    "climbing to zero rate": (FALLING, FALLING, CLIMBING, ONE_CYCLE, "", ""),
    "few steps": ([1.3], [1.3], [0.3], {"batch_size": 32}, "Too few steps", "312 steps"),
}


@pytest.mark.parametrize("case", HISTORIES)
def test_history_is_judged(run: Path, case: str, findings: Callable) -> None:
    losses, val_losses, ious, values, title, evidence = HISTORIES[case]
    write_history(run, losses, val_losses, ious, {})
    configure(run, **values)
    found = findings(run)
    if title == "":
        assert found == []
    else:
        assert len(found) == 1
        assert found[0][0].startswith(title) and evidence in found[0][1]


def test_classes_never_predicted_are_named_with_epoch_and_advice(
    run: Path, findings: Callable
) -> None:
    never = {2: ["circle"], 3: CLASSES[1:], 4: CLASSES[1:], 5: CLASSES[1:]}
    write_history(run, FALLING, FALLING, RISING, never)
    [(title, evidence, advice)] = findings(run)
    assert title == "The model predicts only background" and "dice_per_class: 1" in advice
    *lines, last = (run / "metrics.jsonl").read_text().splitlines()
    entry = json.loads(last)
    entry["validation"]["dead_classes"] = ["square"]
    entry["validation"]["per_class_iou"] = {"background": 0.9, "square": 0.0, "triangle": 0.9}
    entry["validation"]["per_class_iou"]["circle"] = None  # in no mask, and never predicted
    (run / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(entry)]))
    [(title, *_)] = findings(run)
    assert title == "The model predicts only background, triangle"
    assert "since epoch 4 of 6: square, triangle, circle" in evidence


def test_poor_class_is_named(run: Path, findings: Callable) -> None:
    write_history(run, FALLING, FALLING, RISING, {})
    *lines, last = (run / "metrics.jsonl").read_text().splitlines()
    entry = json.loads(last)
    entry["validation"]["per_class_iou"]["circle"] = 0.002
    (run / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(entry)]))
    [(title, _, advice)] = findings(run)
    assert title == "The model has hardly learnt: circle"
    assert "dice_per_class" in advice and "wider" not in advice  # 8 channels are wide already


def test_advice_leaves_out_what_the_config_has() -> None:
    narrow = {"decoder": [[8, 3], ["classes", 3]], "classes": CLASSES, "loss": {"dice_pooled": 1}}
    narrow.update(model="unet", skip="pooled", upsampling_init="random")
    advice = advise_on_classes(narrow)
    assert advice.startswith("a last decoder stage wider than `classes`, upsampling_init: bilinear")
    assert "bilinear" not in advise_on_classes(dict(narrow, upsampling_init="bilinear"))
    wide = dict(narrow, decoder=[[8, 3], [8, 3]], loss={"dice_per_class": 1})
    assert advise_on_classes(wide) == "more steps, a lower learning_rate"
    assert "bilinear" not in advise_on_classes(dict(narrow, skip="full"))  # no effect there
    own_model = dict(narrow, model="mine", decoder=[])
    assert advise_on_classes(own_model).startswith("loss: {cross_entropy: 1, dice_per_class: 1}")


def test_too_few_steps_come_before_the_class_that_they_cost(run: Path, findings: Callable) -> None:
    write_history(run, [1.3], [1.3], [0.3], {0: ["circle"]})
    configure(run, batch_size=32, epochs=1)
    titles = [title for title, _, _ in findings(run)]
    assert titles[0].startswith("Too few steps") and titles[1].startswith("The model predicts only")


def test_stripes_are_found(run: Path, findings: Callable, monkeypatch) -> None:
    def evaluate(model, images, masks, num_classes, dtype) -> tuple:
        circles_on_odd_rows = masks.clone()
        circles_on_odd_rows[:, ::2][masks[:, ::2] == 3] = 0
        matrices = confusion_matrices(circles_on_odd_rows, masks, len(CLASSES))
        return matrices, 0.0, circles_on_odd_rows

    monkeypatch.setattr(doctor, "evaluate", evaluate)
    [(title, evidence, advice)] = findings(run)
    assert "striped" in title and evidence.endswith(": circle 2/4") and "wider" in advice


def test_stopped_run_is_told_from_one_that_trains(run: Path, findings: Callable) -> None:
    configure(run, epochs=9)
    [(title, _, advice)] = findings(run)
    assert title == "The run stopped after 3 of 9 epochs"
    assert f"train.py --config {run}/config.yaml --run-dir {run} --resume" in advice
    with locked(run):
        assert findings(run) == []
    (run / "lock").unlink()
    findings(run)
    assert not (run / "lock").exists()  # in the folder of a partner it could not be made
    for name in ("metrics.jsonl", "best.pt", "last.pt"):
        (run / name).unlink()
    assert findings(run)[0][0] == "The run stopped after 0 of 9 epochs"


def test_findings_are_told_though_the_figure_cannot_be_written(
    run: Path, call: Callable, monkeypatch
) -> None:
    def refuse(path: Path, *_: object) -> None:
        raise UserError(f"{path}: cannot be written (Read-only file system)")

    monkeypatch.setattr(doctor, "draw_curves", refuse)
    configure(run, epochs=9)
    code, out, error = call(doctor.main, run, "--device", "cpu")
    assert code == 0 and "The run stopped after 3 of 9 epochs" in out
    assert error.startswith(f"note: no curves: {run}/doctor.png: cannot be written")


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "best.pt"])
def test_damaged_file_is_one_line(run: Path, name: str, call: Callable) -> None:
    (run / name).write_bytes(b"{" + (run / name).read_bytes()[:-60])
    code, out, error = call(doctor.main, run, "--device", "cpu")
    assert code == 2 and out == "" and error.count("\n") == 1
    assert error.startswith(f"error: {run / name}: ")
    code, _, error = call(doctor.main, run.parent)
    assert code == 2 and error.startswith(f"error: {run.parent}: is no run")
