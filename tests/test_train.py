"""Tests of train.py: what a run leaves, that it repeats and resumes exactly, how it fails."""

import functools
import io
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT, SIGTERM

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import train as script_module
from config import load_config
from data import load_split
from errors import UserError
from images import SIDE
from metrics import confusion_matrix, scores
from model import UNet, build_model
from train import epoch_order, seeded, train

ROOT = Path(__file__).parent.parent
TINY = {
    "name": "tiny",
    "encoder": [[4, 3], [8, 3]],
    "decoder": [[8, 3], [6, 3]],
    "loss": {"cross_entropy": 1.0},
    "images_per_epoch": 24,
    "batch_size": 8,
    "learning_rate": 0.01,
    "epochs": 3,
    "device": "cpu",
    "precision": "float32",
}
RANDOM = {  # everything that draws random numbers
    "schedule": "one_cycle",
    "dropout": 0.3,
    "crop": 16,
    "crop_on_objects": 0.5,
    "horizontal_flip": 0.5,
    "vertical_flip": 0.5,
    "blur": 0.5,
    "jitter": 0.5,
}
CLOCK = ("train_seconds", "images_per_s", "digest")  # the digest is of the times, too


def tiny(data: Path, **changes: object) -> dict:
    return load_config([ROOT / "configs/default.yaml"], []) | TINY | {"data": str(data)} | changes


load = functools.partial(torch.load, weights_only=True)


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def plain(value: object) -> object:
    """To be compared with ==, bit for bit; without what a clock says."""
    if isinstance(value, Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items() if key not in CLOCK}
    return [plain(v) for v in value] if isinstance(value, list) else value


def tensorboard(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0}).Reload()


# ---- the order of the images


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 8), st.integers(0, 2**31 - 1))
def test_every_pass_shows_every_image_once(
    total: int, per_epoch: int, epochs: int, seed: int
) -> None:
    parts = [epoch_order(epoch, per_epoch, total, seed) for epoch in range(epochs)]
    assert all(part.shape == (per_epoch,) and part.dtype == torch.int64 for part in parts)
    walk = torch.cat(parts)
    for one_pass in walk.split(total):
        images = one_pass.tolist()
        assert len(set(images)) == len(images) and set(images) <= set(range(total))
        if len(images) == total:
            assert set(images) == set(range(total))


def test_order_depends_on_pass_and_seed_and_not_on_the_length_of_epochs() -> None:
    orders = [epoch_order(epoch, 50, 50, seed) for epoch in (0, 1) for seed in (0, 1)]
    assert len({tuple(order.tolist()) for order in [torch.arange(50), *orders]}) == 5
    short = torch.cat([epoch_order(epoch, 12, 17, seed=3) for epoch in range(5)])
    assert torch.equal(epoch_order(0, 60, 17, seed=3), short)


def test_every_step_of_every_seed_draws_other_numbers() -> None:
    draws = set()
    for seed in (0, 1, 2, 2**31 - 1):
        for step in range(50):
            torch.manual_seed(seeded(seed, "step", step))
            draws.add(tuple(torch.rand(4).tolist()))
    assert len(draws) == 4 * 50


# ---- a run from the command line


@pytest.fixture(scope="module")
def run(dataset: Path, script: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three epochs, everything random on, as a user starts it."""
    folder = tmp_path_factory.mktemp("train") / "deep" / "run"
    values = [f"{key}={json.dumps(value)}" for key, value in (TINY | RANDOM).items()]
    arguments = ("--config", "configs/tuned.yaml", "--data", dataset, "--run-dir", folder)
    done = script("train.py", *arguments, "--set", *values)
    assert done.returncode == 0, done.stderr
    assert all(f"tiny epoch {epoch}/3  loss " in done.stdout for epoch in (1, 2, 3))
    return folder


def test_run_leaves_its_files(run: Path, dataset: Path) -> None:
    names = {path.name for path in run.iterdir()}
    files = {"config.yaml", "environment.json", "metrics.jsonl", "summary.json", "predictions.png"}
    assert files | {"best.pt", "last.pt"} <= names
    assert any("tfevents" in name for name in names)
    expected = load_config([ROOT / "configs/tuned.yaml"], []) | TINY | RANDOM
    assert load_config([run / "config.yaml"], []) == expected | {"data": str(dataset)}
    environment = json.loads((run / "environment.json").read_text())
    assert {"commit", "python", "torch", "device", "precision", "seed"} <= set(environment)


def test_metrics_have_a_line_per_epoch(run: Path) -> None:
    history = lines(run)
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    assert [entry["images_seen"] for entry in history] == [24, 48, 72]
    seconds = [entry["train_seconds"] for entry in history]
    assert 0 < seconds[0] < seconds[1] < seconds[2]  # adds up
    rates = [entry["learning_rate"] for entry in history]
    assert 0.01 >= rates[0] > rates[1] > rates[2] == pytest.approx(0.01 / 25 / 1e4)  # of one-cycle
    for part in (entry[split] for entry in history for split in ("training", "validation")):
        assert math.isfinite(part["loss"])
        assert 0 <= part["mean_iou"] <= 1 and 0 <= part["pixel_accuracy"] <= 1
        assert list(part["per_class_iou"]) == ["background", "square", "triangle", "circle"]
    summary = json.loads((run / "summary.json").read_text())
    best = max(history, key=lambda entry: entry["validation"]["mean_iou"])
    assert (summary["name"], summary["images_seen"]) == ("tiny", 72)
    assert (summary["best_epoch"], summary["validation"]) == (best["epoch"], best["validation"])
    assert summary["train_seconds"] == history[-1]["train_seconds"]


def test_best_checkpoint_describes_itself_and_scores_what_it_says(run: Path, dataset: Path) -> None:
    best, last = load(run / "best.pt"), load(run / "last.pt")
    config = load_config([run / "config.yaml"], [])
    assert best["config"] == last["config"] == config
    assert best["cost"]["images_seen"] == 72
    assert plain(last["history"]) == plain(lines(run))
    model = build_model(config).eval()
    model.load_state_dict(best["model"])
    split = load_split(config | {"data": str(dataset)}, "validation")
    prediction = model(split.images / 255).argmax(dim=1)
    again = scores(confusion_matrix(prediction, split.masks, 4), list(config["classes"]))
    assert again["mean_iou"] == pytest.approx(best["validation"]["mean_iou"], abs=1e-4)


def test_tensorboard_shows_both_splits_and_pictures(run: Path) -> None:
    board, history = tensorboard(run), lines(run)
    for key in ("loss", "mean_iou"):
        for split in ("training", "validation"):
            scalars = board.Scalars(f"{key}/{split}")
            assert [scalar.step for scalar in scalars] == [1, 2, 3]
            expected = [entry[split][key] for entry in history]
            assert [scalar.value for scalar in scalars] == pytest.approx(expected, rel=1e-5)
    [tag] = board.Tags()["images"]
    pictures = board.Images(tag)
    assert [picture.step for picture in pictures] == [1, 2, 3]
    shown = Image.open(io.BytesIO(pictures[0].encoded_image_string)).convert("RGB")
    # Image, truth and prediction of four frames; the truth is there in the colours of the masks.
    assert shown.width > 3 * SIDE and shown.height > 4 * SIDE
    colours = {colour for _, colour in shown.getcolors(2**24)}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255)} <= colours


def test_resume_with_another_config_is_refused(run: Path, script: Callable) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    arguments = ("--config", run / "config.yaml", "--run-dir", run, "--resume")
    done = script("train.py", *arguments, "--set", "batch_size=4", "dropout=0.1")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert str(run) in line and "batch_size" in line and "dropout" in line
    assert "learning_rate" not in line
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


# ---- the same again


def test_seed_decides_the_weights(dataset: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        torch.manual_seed(ord(name))  # the state before does not matter
        train(tiny(dataset, **RANDOM, epochs=2, seed=seed), tmp_path / name, resume=False)
    a, b, c = (plain(load(tmp_path / name / "last.pt")) for name in "abc")
    assert a == b
    assert a["model"] != c["model"]


def stop_at(patch: pytest.MonkeyPatch, name: str, call: int, file: str = "", send: int = 0) -> None:
    """Let the `call`-th call of a function of train.py (for a file) crash, or send a signal."""
    original, calls = getattr(script_module, name), []

    def stopping(*args: object, **kwargs: object) -> object:
        calls.extend(args[:1] if not file or args[0].name == file else ())
        if len(calls) == call and send:
            os.kill(os.getpid(), send)
        elif len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    patch.setattr(script_module, name, stopping)


@pytest.mark.parametrize(
    ("stop", "steps_kept"),
    [
        ({"name": "evaluate", "call": 1}, 0),  # before anything is saved
        ({"name": "weighted_loss", "call": 5}, 3),  # within the second epoch of three steps
        ({"name": "save_checkpoint", "call": 2, "file": "last.pt"}, 3),  # between two files
        ({"name": "weighted_loss", "call": 5, "send": SIGTERM}, 5),
        ({"name": "weighted_loss", "call": 6, "send": SIGINT}, 6),  # the last step of an epoch
        ({"name": "evaluate", "call": 2, "send": SIGTERM}, 7),
    ],
)
def test_resumed_run_is_the_uninterrupted_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: dict, steps_kept: int
) -> None:
    config = load_config([run / "config.yaml"], [])
    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)) as ended:
        stop_at(patch, **stop)
        train(config, tmp_path, resume=False)
    assert getattr(ended.value, "code", None) == (128 + stop["send"] if "send" in stop else None)
    del ended  # it holds the run's frame, and that the lock
    assert not (tmp_path / "summary.json").exists()
    [events] = tmp_path.glob("*tfevents*")
    events.rename(tmp_path / "events.out.tfevents.0")  # older by name, as a real one is by seconds
    assert (load(tmp_path / "last.pt")["step"] if steps_kept else 0) == steps_kept
    torch.manual_seed(99)
    train(config, tmp_path, resume=True)

    for file in ("last.pt", "best.pt"):
        assert plain(load(tmp_path / file)) == plain(load(run / file)), file
    assert plain(lines(tmp_path)) == plain(lines(run))
    steps = [scalar.step for scalar in tensorboard(tmp_path).Scalars("mean_iou/validation")]
    assert steps == [1, 2, 3]  # none missing, none twice


def test_damaged_last_checkpoint_costs_an_epoch(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "last.pt").write_bytes((run / "last.pt").read_bytes()[:-500])
    train(load_config([run / "config.yaml"], []), copy, resume=True)
    for file in ("last.pt", "best.pt"):
        assert plain(load(copy / file)) == plain(load(run / file)), file


def test_finished_run_is_left_alone_or_begun_anew(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny(dataset, epochs=2), tmp_path, resume=False)
    before = [plain(load(tmp_path / name)) for name in ("last.pt", "best.pt")]
    with monkeypatch.context() as patch:
        stop_at(patch, "weighted_loss", 1)  # it does not come that far
        train(tiny(dataset, epochs=2), tmp_path, resume=True)
    assert [plain(load(tmp_path / name)) for name in ("last.pt", "best.pt")] == before

    train(tiny(dataset, epochs=1, seed=1), tmp_path, resume=False)
    assert [entry["epoch"] for entry in lines(tmp_path)] == [1]
    assert load(tmp_path / "best.pt")["config"]["seed"] == 1
    assert [s.step for s in tensorboard(tmp_path).Scalars("loss/training")] == [1]


def test_compiled_model_trains_alike_and_keeps_its_names(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def compile_without_a_compiler(model: UNet) -> None:
        torch.nn.Module.compile(model, backend="eager")
        compiled.append(model)

    monkeypatch.setattr(UNet, "compile", compile_without_a_compiler)
    for value in (False, True):
        train(tiny(dataset, epochs=1, compile=value), tmp_path / str(value), resume=False)
    assert len(compiled) == 1
    eager, compiled = (load(tmp_path / name / "best.pt")["model"] for name in ("False", "True"))
    torch.testing.assert_close(compiled, eager)


# ---- what goes wrong


@pytest.mark.parametrize("place", ["weighted_loss", "train_step"])
def test_run_that_blows_up_stops_and_keeps_the_last_good_checkpoint(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    original, calls = getattr(script_module, place), []

    def spoilt(*args: object) -> object:
        result = original(*args)
        calls.append(place)
        if place == "weighted_loss":  # a loss within the second epoch
            return result * (math.nan if len(calls) == 5 else 1)
        if len(calls) == 6:  # the weights, in its last step: no loss of the epoch shows it
            next(args[0].parameters()).data.fill_(math.nan)
        return result

    monkeypatch.setattr(script_module, place, spoilt)
    with pytest.raises(UserError) as caught:
        train(tiny(dataset), tmp_path, resume=False)
    [message] = str(caught.value).splitlines()
    assert all(part in message for part in (str(tmp_path), "epoch 2", "learning_rate"))
    for name in ("last.pt", "best.pt"):
        assert all(torch.isfinite(value).all() for value in load(tmp_path / name)["model"].values())
    assert len(load(tmp_path / "last.pt")["history"]) == len(lines(tmp_path)) == 1


def test_dead_classes_are_named_with_their_cures(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def blind(config: dict) -> torch.nn.Module:
        model = build_model(config)
        with torch.no_grad():
            model.up[-1].bias[:] = torch.tensor([1e3, 0, 0, 0])
        return model

    monkeypatch.setattr(script_module, "build_model", blind)
    train(tiny(dataset, epochs=1, learning_rate=1e-12), tmp_path, resume=False)
    [entry] = lines(tmp_path)
    assert entry["validation"]["dead_classes"] == ["square", "triangle", "circle"]
    output = capsys.readouterr().out
    assert "dead: square, triangle, circle" in output
    for cure in ("dice_per_class", "upsampling_init", "learning_rate", "decoder"):
        assert cure in output


@pytest.mark.parametrize("epochs", [1, 2, 4, 5])
def test_one_cycle_of_any_number_of_steps(dataset: Path, tmp_path: Path, epochs: int) -> None:
    changes = {"schedule": "one_cycle", "images_per_epoch": 8, "epochs": epochs}
    train(tiny(dataset, **changes), tmp_path, resume=False)
    assert len(lines(tmp_path)) == epochs


# ---- what is kept, and whether anything is learnt


def test_best_is_the_first_of_the_highest_validation_mean_iou(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, wrong = [], [30, 5, 20, 5]  # best in the epochs 2 and 4

    def staged(model: torch.nn.Module, *_args: object) -> tuple[Tensor, float]:
        weights.append({key: value.clone() for key, value in model.state_dict().items()})
        model.eval()  # as evaluate does
        matrix = torch.diag(torch.tensor([100] * 4))
        matrix[0, 1] = wrong[len(weights) - 1]
        return matrix, 1.0

    monkeypatch.setattr(script_module, "evaluate", staged)
    train(tiny(dataset, epochs=4), tmp_path, resume=False)
    best = load(tmp_path / "best.pt")
    means = [entry["validation"]["mean_iou"] for entry in lines(tmp_path)]
    assert (best["epoch"], best["validation"]["mean_iou"]) == (2, max(means))
    assert plain(best["model"]) == plain(weights[1])
    assert plain(load(tmp_path / "last.pt")["model"]) == plain(weights[3])


def test_it_learns(dataset: Path, tmp_path: Path) -> None:
    train(tiny(dataset, images_per_epoch=0, epochs=5), tmp_path, resume=False)
    first, *later, final = lines(tmp_path)
    assert final["images_seen"] == 5 * len(list((dataset / "training/image").glob("*.png")))
    assert final["training"]["loss"] < 0.4 * first["training"]["loss"]
    lowest = min(entry["validation"]["loss"] for entry in later)
    assert lowest < 0.8 * first["validation"]["loss"]
