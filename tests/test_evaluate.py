"""Tests of evaluate.py: scores against numpy, the lab's batch, the command line."""

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import config_for, write_checkpoint
from PIL import Image
from test_table import read_table

import evaluate
import losses
import metrics
from checkpoints import read_checkpoint, save_checkpoint
from common import UserError
from data import load_split
from metrics import IGNORE
from model import build_model
from table import LAB

CLASSES = ["background", "square", "triangle", "circle"]
CPU = torch.device("cpu")
LARGER = {"encoder": [[4, 3], [8, 3]], "decoder": [[8, 3], ["classes", 3]]}


@pytest.fixture(scope="module")
def paths(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write checkpoints: three seeds of one model, one of another."""
    root = tmp_path_factory.mktemp("checkpoints")
    checkpoints = []
    for seed in (0, 1, 2):
        checkpoints.append(write_checkpoint(root / f"small/seed{seed}", dataset, "small", seed))
    checkpoints.append(write_checkpoint(root / "tuned/seed0", dataset, "tuned", 0, **LARGER))
    return checkpoints


@pytest.fixture
def run(call: Callable) -> Callable:
    """Call evaluate.py as its command line does: (exit code, stdout, stderr)."""
    return functools.partial(call, evaluate.main, "--device", "cpu")


# ---- scores


def scores_by_hand(true: np.ndarray, predicted: np.ndarray) -> dict:
    """Score predictions in numpy, with sets of pixels."""
    iou, dice, dead = {}, {}, []
    for c, name in enumerate(CLASSES):
        is_true = true == c
        is_predicted = predicted == c
        overlap = (is_true & is_predicted).sum()
        union = (is_true | is_predicted).sum()
        iou[name] = overlap / union if union else None
        dice[name] = 2 * overlap / (union + overlap) if union else None
        if is_true.any() and not is_predicted.any():
            dead.append(name)
    known = [value for value in iou.values() if value is not None]
    foreground = [value for name, value in iou.items() if name != CLASSES[0] and value is not None]
    return {
        "images": len(true),
        "pixel_accuracy": (true == predicted).mean(),
        "mean_iou": np.mean(known),
        "mean_iou_foreground": np.mean(foreground),
        "mean_dice": np.mean([value for value in dice.values() if value is not None]),
        "per_class_iou": iou,
        "dead_classes": dead,
    }


def predict_by_hand(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Predict the images of a split one by one: true and predicted classes."""
    checkpoint = torch.load(path, weights_only=True)
    model = build_model(checkpoint["config"]).eval()
    model.load_state_dict(checkpoint["model"])
    loaded = load_split(checkpoint["config"], split)
    predicted = []
    with torch.no_grad():
        for image in loaded.images:
            predicted.append(model(image[None] / 255)[0].argmax(dim=0).numpy())
    return loaded.masks.numpy(), np.stack(predicted)


def test_command_line_on_two_models(
    run: Callable, paths: list[Path], dataset: Path, tmp_path: Path
) -> None:
    results = tmp_path / "new/results.json"
    code, out, _ = run(paths[0], paths[3], "--json", results)
    assert code == 0
    rows = json.loads(results.read_text())
    table = read_table(out)
    for row, path, name in zip(rows, (paths[0], paths[3]), ("small", "tuned"), strict=True):
        assert row["name"] == name
        assert row["checkpoint"] == str(path)
        assert row["data"] == str(dataset)
        assert row["split"] == "testing"
        expected = scores_by_hand(*predict_by_hand(path, "testing"))
        assert row["dead_classes"] == expected.pop("dead_classes")
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, abs=1e-5), key
        assert row["lab_batch"] is None and row["lab_batch_training_mode"] is None
        cells = table[name]
        assert cells["accuracy"] == f"{row['pixel_accuracy']:.4f}"
        assert cells["mean IoU"] == f"{row['mean_iou']:.4f}"
        assert cells["never predicted"] == (", ".join(row["dead_classes"]) or "none")
    # encoder 3→4, 4→4; decoder 4→6, 6→6; up-sampling 6→4; batch norms 4, 4, 6, 6
    count = 9 * (12 + 16 + 24 + 36 + 24) + (4 + 4 + 6 + 6 + 4) + 2 * (4 + 4 + 6 + 6)
    assert table["small"]["parameters"] == f"{count:,}"
    assert table["tuned"]["lab IoU"] == "0.9878"


def test_another_split_and_several_seeds(run: Callable, paths: list[Path], tmp_path: Path) -> None:
    results = tmp_path / "rows.json"
    code, out, _ = run(*paths[:3], "--split", "validation", "--json", results)
    assert code == 0 and read_table(out)["small"]["n"] == "3"
    for seed, row in enumerate(json.loads(results.read_text())):
        expected = scores_by_hand(*predict_by_hand(paths[seed], "validation"))
        assert (row["seed"], row["split"]) == (seed, "validation")
        assert row["mean_iou"] == pytest.approx(expected["mean_iou"], abs=1e-5)
        assert row["train_seconds"] == 60 + seed


def test_arrays_belong_to_the_row(paths: list[Path], dataset: Path) -> None:
    row, arrays = evaluate.evaluate_checkpoint(paths[0], None, "testing", CPU)
    assert arrays["matrices"].sum(dim=0).tolist() == row["confusion_matrix"]
    assert len(arrays["names"]) == len(arrays["groups"]) == len(arrays["predictions"])
    assert row["groups"] == len(set(arrays["groups"]))
    split = load_split(config_for(dataset), "testing")
    shown = arrays["shown"]
    assert shown[0] == 0 and shown[3] == len(split.names) - 1
    assert torch.equal(arrays["images"], split.images[shown])
    assert torch.equal(arrays["masks"], split.masks[shown])
    ious = metrics.mean_iou(arrays["matrices"])
    assert ious[shown[4]] == ious.min()  # the worst image follows the evenly spaced ones
    assert len({arrays["groups"][i] for i in shown[4:]}) == len(shown[4:])


def test_ignored_pixels_are_in_no_score(dataset: Path, tmp_path: Path) -> None:
    data = shutil.copytree(dataset, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    for path in (data / "testing/gt_image").iterdir():
        mask = np.array(Image.open(path))
        mask[:16] = 9
        Image.fromarray(mask).save(path)
    path = write_checkpoint(tmp_path / "run", data, "small", 0, ignore=[9, 9, 9])
    row, arrays = evaluate.evaluate_checkpoint(path, None, "testing", CPU)
    predictions = arrays["predictions"]
    assert (predictions[:, :16] == IGNORE).all() and (predictions[:, 16:] < 4).all()
    masks, predicted = predict_by_hand(path, "testing")
    boundary = metrics.boundary_matrices(torch.tensor(predicted), torch.tensor(masks), 4)
    ious = metrics.iou(boundary.sum(dim=0))[:4]  # the last one is of pixels in no band
    assert row["boundary_iou"] == pytest.approx(ious.nanmean().item())
    for path_of_mask in (data / "testing/gt_image").iterdir():
        Image.new("RGB", (32, 32), (9, 9, 9)).save(path_of_mask)
    with pytest.raises(UserError, match="ignore: leaves no pixel of the testing split"):
        evaluate.evaluate_checkpoint(path, None, "testing", CPU)


def test_groups_are_added_up() -> None:
    matrices = torch.arange(12).view(3, 2, 2)
    sums = evaluate.sum_by_group(matrices, ["b", "a", "b"])
    assert sums.tolist() == [matrices[1].tolist(), (matrices[0] + matrices[2]).tolist()]


# ---- batches


def test_batches_fit_the_device_and_the_size_of_the_images() -> None:
    gpu = torch.device("cuda")
    assert evaluate.images_per_batch(128, 128, CPU) == 32
    assert evaluate.images_per_batch(32, 32, CPU) == 32
    assert evaluate.images_per_batch(256, 256, CPU) == 8
    assert evaluate.images_per_batch(4000, 6000, CPU) == 1
    assert evaluate.images_per_batch(128, 128, gpu) > 32  # a GPU would be idle
    assert evaluate.images_per_batch(4000, 6000, gpu) == 1


def test_scores_do_not_depend_on_the_size_of_the_batches(
    paths: list[Path], dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = evaluate.restore_model(paths[0], CPU)
    images, masks, *_ = load_split(config_for(dataset), "testing")
    loss = {"cross_entropy": 1.0}
    whole = evaluate.evaluate(model, images, masks, 4, torch.float32, loss)
    monkeypatch.setattr(evaluate, "CPU_BATCH", 5 * 128**2)
    parts = evaluate.evaluate(model, images, masks, 4, torch.float32, loss)
    assert torch.equal(whole[0], parts[0])
    assert parts[1] == pytest.approx(whole[1], rel=1e-5)  # a mean over images, not over batches
    assert torch.equal(whole[2], parts[2])


def test_a_loss_may_change_logits_in_place(
    paths: list[Path], dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        losses.LOSSES, "shifted", lambda x, mask: losses.cross_entropy(x.sub_(5.0), mask)
    )
    model, _ = evaluate.restore_model(paths[0], CPU)
    images, masks, *_ = load_split(config_for(dataset), "testing")
    values = []
    for name in ("cross_entropy", "shifted"):
        _, loss, _ = evaluate.evaluate(model, images, masks, 4, torch.float32, {name: 1.0})
        values.append(loss)
    assert values[1] == pytest.approx(values[0], rel=1e-5)  # softmax is the same


def test_checkpoint_whose_loss_is_there_no_more_is_scored(
    paths: list[Path], tmp_path: Path, dataset: Path
) -> None:
    checkpoint = read_checkpoint(paths[0])
    checkpoint["config"]["loss"] = {"renamed": 1.0}
    save_checkpoint(tmp_path / "old.pt", checkpoint)
    row, _ = evaluate.evaluate_checkpoint(tmp_path / "old.pt", str(dataset), "testing", CPU)
    before, _ = evaluate.evaluate_checkpoint(paths[0], str(dataset), "testing", CPU)
    assert row["mean_iou"] == before["mean_iou"]


# ---- the lab's test batch


@pytest.fixture(scope="module")
def lab_data(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy test images to sixty names, of which fifty are the lab's test batch."""
    root = tmp_path_factory.mktemp("lab")
    sources = sorted((dataset / "testing/image").glob("*.png"))
    names = LAB["test_batch"] + [f"000060_square_red_{i:06d}" for i in range(10)]
    for i, name in enumerate(names):
        source = sources[i % len(sources)]
        for folder, prefix in (("image", ""), ("gt_image", "gt_")):
            place = root / "testing" / folder
            place.mkdir(parents=True, exist_ok=True)
            original = source.parent.with_name(folder) / f"{prefix}{source.name}"
            shutil.copy(original, place / f"{prefix}{name}.png")
    return root


def write_last(path: Path, **config: object) -> dict:
    """Write a last.pt beside a checkpoint, with other weights; returns its content."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["config"].update(config)
    torch.manual_seed(7)
    for name, values in checkpoint["model"].items():
        if name.endswith("weight"):
            values += 0.1 * torch.randn(values.shape)
    save_checkpoint(path.with_name("last.pt"), checkpoint)
    return checkpoint


def test_lab_batch_in_both_modes(lab_data: Path, dataset: Path, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, dataset, "small", 0)
    row, arrays = evaluate.evaluate_checkpoint(path, str(lab_data), "testing", CPU)
    loaded = load_split(config_for(lab_data), "testing")
    lab = [loaded.names.index(name) for name in LAB["test_batch"]]
    masks = loaded.masks[lab].numpy()
    expected = scores_by_hand(masks, arrays["predictions"][lab].numpy())
    assert row["images"] == 60
    assert row["lab_batch"] == pytest.approx(expected["mean_iou"])
    assert row["lab_batch"] != row["mean_iou"]
    assert row["lab_batch_training_mode"] is None  # without last.pt

    checkpoint = write_last(path)
    before = path.with_name("last.pt").read_bytes()
    with_last, _ = evaluate.evaluate_checkpoint(path, str(lab_data), "testing", CPU)
    model = build_model(checkpoint["config"]).train()
    model.load_state_dict(checkpoint["model"])
    predicted = model(loaded.images[lab] / 255).argmax(dim=1).numpy()
    expected = scores_by_hand(masks, predicted)
    assert with_last["lab_batch_training_mode"] == pytest.approx(expected["mean_iou"], abs=1e-4)
    assert with_last["lab_batch_training_mode"] != with_last["lab_batch"]
    with_last["lab_batch_training_mode"] = None
    assert with_last == row  # all else is as without last.pt
    assert path.with_name("last.pt").read_bytes() == before


def test_lab_batch_is_of_this_run_and_of_the_test_split_only(
    lab_data: Path, dataset: Path, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path, dataset, "small", 0)
    write_last(path, learning_rate=0.5)  # of another run
    row, _ = evaluate.evaluate_checkpoint(path, str(lab_data), "testing", CPU)
    assert row["lab_batch"] is not None and row["lab_batch_training_mode"] is None
    write_last(path, epochs=16)  # the run was continued
    row, _ = evaluate.evaluate_checkpoint(path, str(lab_data), "testing", CPU)
    assert row["lab_batch_training_mode"] is not None
    row, _ = evaluate.evaluate_checkpoint(path, str(dataset), "testing", CPU)
    assert row["lab_batch"] is None and row["lab_batch_training_mode"] is None
    names = LAB["test_batch"]
    assert evaluate.find_lab_batch(names, "testing") == list(range(50))
    assert evaluate.find_lab_batch(names, "validation") is None
    assert evaluate.find_lab_batch(names[1:], "testing") is None


# ---- the command line


def test_results_stand_for_their_checkpoints(
    run: Callable, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, direct, _ = run(*paths, "--json", tmp_path / "all.json")
    run(paths[0], "--json", tmp_path / "one.json")
    _, mixed, _ = run(tmp_path / "one.json", *paths[1:])
    assert read_table(mixed) == read_table(direct)
    monkeypatch.delattr(evaluate, "evaluate_checkpoint")  # from here on nothing is evaluated
    code, out, _ = run(tmp_path / "all.json", "--json", tmp_path / "again.json")
    assert code == 0 and read_table(out) == read_table(direct)
    assert (tmp_path / "again.json").read_text() == (tmp_path / "all.json").read_text()


def test_goal(run: Callable, paths: list[Path], dataset: Path, tmp_path: Path) -> None:
    run(*paths, "--json", tmp_path / "all.json")
    code, out, _ = run(tmp_path / "all.json", "--goal", "0")
    assert code == 0 and "median 60.5 s of training" in out
    code, _, error = run(tmp_path / "all.json", "--goal", "0.99")
    assert code == 2 and error.startswith("error: mean IoU 0.99: ")
    unfinished = write_checkpoint(tmp_path, dataset, "small", 0, cost={})
    code, _, error = run(unfinished, "--goal", "0", "--json", tmp_path / "kept.json")
    assert code == 2 and "not finished" in error and (tmp_path / "kept.json").exists()


def test_cost_comes_from_the_checkpoint_or_from_its_summary(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    unknown = {"images_seen": None, "train_seconds": None}
    known = {"images_seen": 1000, "train_seconds": 60.0}
    assert evaluate.cost_of(path, {}) == unknown
    assert evaluate.cost_of(path, {"cost": known}) == known
    (tmp_path / "summary.json").write_text(json.dumps({**known, "seed": 1}))
    assert evaluate.cost_of(path, {}) == known
    (tmp_path / "summary.json").write_text('{"images_seen": "many", "train_seconds": 1.0}')
    with pytest.raises(evaluate.UserError, match=r"summary.json: cannot be read"):
        evaluate.cost_of(path, {})


def test_mixing_is_refused_after_the_results_are_written(
    run: Callable, paths: list[Path], tmp_path: Path
) -> None:
    other = tmp_path / "other.json"
    assert run(paths[1], "--split", "validation", "--json", other)[0] == 0
    code, out, error = run(paths[0], other, "--json", tmp_path / "mixed.json")
    assert code == 2 and out == ""
    assert error.splitlines()[-1].startswith(f"error: {paths[1]}: differs")
    assert "split" in error
    assert len(json.loads((tmp_path / "mixed.json").read_text())) == 2


def test_run_is_tested_again_after_training_or_other_code_alone(
    run: Callable, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(paths[0].parent, folder)
    best, summary, results = folder / "best.pt", folder / "summary.json", folder / "testing.json"
    code, _, error = run(best, "--beside")
    assert code == 2 and "best.pt: its run is not finished" in error
    summary.write_text("{}")
    code, table, _ = run(best, "--beside")
    assert code == 0 and (folder / "testing.npz").exists()
    [row] = json.loads(results.read_text())
    assert row["split"] == "testing"

    results.write_text(json.dumps([row]))  # known by its bytes
    written = results.read_bytes()
    assert run(best, "--beside")[:2] == (0, table)
    assert results.read_bytes() == written
    later = results.stat().st_mtime + 1
    os.utime(summary, (later, later))
    assert run(best, "--beside")[:2] == (0, table)
    assert results.read_bytes() != written

    os.utime(summary, (0, 0))
    results.write_text(json.dumps([row]))
    assert run(best, "--beside")[:2] == (0, table)
    assert results.read_bytes() == written
    changed = tmp_path / "metrics.py"
    changed.touch()
    os.utime(changed, (later + 9, later + 9))
    monkeypatch.setattr(evaluate, "CODE_OF_TESTS", (changed,))
    assert run(best, "--beside")[:2] == (0, table)
    assert results.read_bytes() != written
