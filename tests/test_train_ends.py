"""Tests of how train.py ends: interrupts, mistakes of users, several processes, learning."""

import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny
from PIL import Image
from test_train import lines, load, train_tiny
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import checkpoints
import common
import runs
import train as script_module
from common import ROOT, UserError
from config import is_finished
from data import limit, load_split
from metrics import confusion_matrices, scores
from model import UNet, build_model
from schedule import epoch_order


def test_only_one_process_trains_in_a_folder(dataset: Path, tmp_path: Path) -> None:
    with runs.locked(tmp_path / "run"), pytest.raises(UserError, match="another process"):
        train_tiny(dataset, tmp_path / "run")


def test_interrupt_is_one_word_and_frees_the_folder(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable
) -> None:
    evaluate, calls = script_module.evaluate, []

    def interrupted(*args: object) -> tuple:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C
        return evaluate(*args)

    monkeypatch.setattr(script_module, "evaluate", interrupted)
    run = tmp_path / "run"
    command = ("--config", ROOT / "configs/tuned.yaml", "--run-dir", run)
    # Tests that run in the background may have been started without a handler of Ctrl-C.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    code, _, errors = call(script_module.main, *command, "--set", *tiny(dataset, epochs=9))
    signal.signal(signal.SIGINT, handler)
    assert code == 130 and errors.splitlines()[-1] == "interrupted"
    with runs.locked(run):
        assert len(lines(run)) == len(load(run / "last.pt")["history"]) == 1


def test_fewer_epochs_end_a_run_that_was_stopped(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"schedule": "constant", "precision": "float32"}
    run = tmp_path / "run"
    train_tiny(dataset, run, epochs=1, **values)
    (run / "summary.json").unlink()  # as if stopped while more epochs were asked for
    text = (run / "config.yaml").read_text()
    assert "epochs: 1" in text
    (run / "config.yaml").write_text(text.replace("epochs: 1", "epochs: 9"))
    train_tiny(dataset, run, resume=True, epochs=1, **values)
    assert is_finished(run, checkpoints.read_checkpoint(run / "last.pt")["config"], None)


@pytest.mark.parametrize("killed_before", ["last.pt", "best.pt"])
def test_best_weights_are_of_an_epoch_in_the_history(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_before: str
) -> None:
    run = tmp_path / "run"
    write, killed = common.write_atomically, []

    def killed_in_the_second_epoch(path: Path, data: bytes) -> None:
        if path.name == killed_before and len(lines(run)) == 2:
            killed.append(path)
            raise KeyboardInterrupt
        write(path, data)

    def every_epoch_is_the_best(history: list[dict]) -> dict:
        return history[-1]

    values = {"schedule": "constant", "precision": "float32"}
    monkeypatch.setattr(runs, "best_of", every_epoch_is_the_best)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints, "write_atomically", killed_in_the_second_epoch)
        train_tiny(dataset, run, epochs=3, **values)
    assert killed
    done = len(load(run / "last.pt")["history"])
    assert load(run / "best.pt")["epoch"] <= done
    for _ in range(2):
        train_tiny(dataset, run, resume=True, epochs=done, **values)  # nothing is left to train
        best, last = load(run / "best.pt"), load(run / "last.pt")
        assert best["epoch"] == json.loads((run / "summary.json").read_text())["best_epoch"] == done
        assert all(torch.equal(best["model"][name], last["model"][name]) for name in last["model"])
        (run / "best.pt").write_bytes(b"damaged")  # for the second time


def test_loss_that_is_not_finite_stops_and_keeps_the_last_good_epoch(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = script_module.weighted_loss, []

    def exploding(*args: object) -> Tensor:
        calls.append(1)
        return original(*args) * (math.nan if len(calls) > 3 else 1)  # one call tries a batch

    monkeypatch.setattr(script_module, "weighted_loss", exploding)
    with pytest.raises(UserError, match=r"epoch 2/2: the loss is nan.*lower learning_rate"):
        train_tiny(dataset, tmp_path / "run")
    assert len(load(tmp_path / "run/last.pt")["history"]) == 1


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"loss": "{dice: 1}"}, "loss: there is no loss 'dice'; known: cross_entropy"),
        ({"loss": "{cross_entropy: much}"}, "cross_entropy: 'much' is no weight"),
        ({"loss": "{cross_entropy: .nan}"}, "cross_entropy: nan is no weight"),
        ({"loss": "{cross_entropy: true}"}, "cross_entropy: True is no weight"),
        ({"loss": "{}"}, "loss: names no loss"),
        ({"encoder": "[[8, 4]]"}, "encoder"),
        ({"blur": 0.1, "blur_kernel": 31, "crop": 8}, "blur_kernel: 31 is too large"),
        ({"batch_size": 1, "crop": 4}, "batch_size: a batch has one image"),
        ({"classes": "{a: [0, 0, 0], b: [1, 2, 300]}"}, "classes"),
    ],
)
def test_config_that_cannot_work_is_one_line_and_no_run(
    dataset: Path, tmp_path: Path, call: Callable, values: dict, says: str
) -> None:
    arguments = ("--config", ROOT / "configs/tuned.yaml", "--run-dir", tmp_path / "run")
    code, _, error = call(script_module.main, *arguments, "--set", *tiny(dataset, **values))
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert says in error and not (tmp_path / "run/config.yaml").exists()


@pytest.mark.parametrize(
    ("target", "name"), [("augment", "flip"), ("losses", "_probabilities_and_target")]
)
def test_mistake_in_a_transform_or_loss_is_not_taken_for_one_of_the_config(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable, target, name
) -> None:
    def edited(*args: object) -> None:
        return torch.ones(3) + torch.ones(4)

    monkeypatch.setattr(f"{target}.{name}", edited)
    command = ("--config", ROOT / "configs/tuned.yaml", "--run-dir", tmp_path / "run", "--set")
    with pytest.raises(RuntimeError, match="must match"):
        call(script_module.main, *command, *tiny(dataset))


def test_mistake_in_a_loss_or_model_shows_before_the_old_run_goes(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train_tiny(dataset, run, epochs=1)
    before = (run / "best.pt").read_bytes()

    def without_mean(logits: Tensor, mask: Tensor, _weights: dict) -> Tensor:
        return cross_entropy(logits, mask.long(), reduction="none")

    with monkeypatch.context() as patch:
        patch.setattr(script_module, "weighted_loss", without_mean)
        with pytest.raises(ValueError, match=r"the loss has shape \(2, 32, 32\), not \(\)"):
            train_tiny(dataset, run, resume=True, seed=1)

    def with_five_classes(config: dict) -> nn.Module:
        return build_model(dict(config, classes=[0, 1, 2, 3, 4]))

    with monkeypatch.context() as patch:
        patch.setattr(script_module, "build_model", with_five_classes)
        with pytest.raises(ValueError, match=r"logits of shape \(2, 5, 32, 32\), not \(2, 4, 32"):
            train_tiny(dataset, run, resume=True, seed=1)

    with monkeypatch.context() as patch:
        patch.setattr(script_module, "weighted_loss", lambda logits, *_: logits.mean().view(1))
        with pytest.raises(ValueError, match=r"the loss has shape \(1,\), not \(\)"):
            train_tiny(dataset, run, resume=True, seed=1)
        patch.setattr(script_module, "weighted_loss", lambda *_: 1.5)
        with pytest.raises(ValueError, match=r"the loss is 1\.5, not a tensor"):
            train_tiny(dataset, run, resume=True, seed=1)
        patch.setattr(script_module, "weighted_loss", lambda logits, *_: logits.mean() * math.nan)
        with pytest.raises(ValueError, match="the loss of a first batch is nan"):
            train_tiny(dataset, run, resume=True, seed=1)

    forward = UNet.forward

    def fails_in_autocast(model: UNet, images: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("not in bfloat16")
        return forward(model, images)

    with monkeypatch.context() as patch:
        patch.setattr(UNet, "forward", fails_in_autocast)
        with pytest.raises(RuntimeError, match="not in bfloat16"):
            train_tiny(dataset, run, resume=True, seed=1, precision="bfloat16")
    assert (run / "best.pt").read_bytes() == before


def test_run_of_another_model_does_not_go_on(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train_tiny(dataset, run, epochs=1)
    before = (run / "last.pt").read_bytes()

    def edited(config: dict) -> nn.Module:
        return build_model(dict(config, encoder=[[4, 3], [6, 3]]))

    monkeypatch.setattr(script_module, "build_model", edited)
    with pytest.raises(UserError, match=r"last\.pt: its weights do not fit .* OVERWRITE=1"):
        train_tiny(dataset, run, resume=True, epochs=2)
    assert (run / "last.pt").read_bytes() == before


@pytest.mark.parametrize("killed_at", ["summary.json", "metrics.jsonl", "last.pt", "config.yaml"])
def test_run_killed_while_it_is_discarded_is_still_one(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    run = tmp_path / "run"
    train_tiny(dataset, run, epochs=2)
    unlink = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.name == killed_at:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            train_tiny(dataset, run, resume=True, epochs=1, seed=1)
    for values in ({"epochs": 2}, {"epochs": 1, "seed": 1}):  # the old run again, or the new one
        again = shutil.copytree(run, tmp_path / f"again{len(values)}")
        train_tiny(dataset, again, resume=True, **values)
        assert len(lines(again)) == values["epochs"]
        assert (again / "best.pt").exists() and (again / "summary.json").exists()


def test_classes_never_predicted_are_named_with_advice(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    build = script_module.build_model

    def mute(config: dict) -> torch.nn.Module:
        model = build(config)
        model.up[-1].bias.data[2] = -1000.0  # triangle never wins
        return model

    monkeypatch.setattr(script_module, "build_model", mute)
    train_tiny(dataset, tmp_path / "run", epochs=1)
    out = capsys.readouterr().out
    assert "never predicted: triangle" in out and "brings a class back" in out


def test_bilinear_start_of_another_head_is_noted(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train_tiny(dataset, tmp_path / "run", epochs=1, upsampling_init="bilinear")  # 8 wide
    assert "note: upsampling_init: bilinear needs skip: pooled" in capsys.readouterr().out


def test_epoch_without_a_labelled_pixel_in_training_is_logged(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = shutil.copytree(dataset, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    for mask in sorted((data / "training/gt_image").iterdir())[1:]:
        Image.new("RGB", Image.open(mask).size, (9, 9, 9)).save(mask)
    values = {"ignore": "[9, 9, 9]", "images_per_epoch": 1, "batch_size": 2, "epochs": 3}
    values["limit_images"] = 1000  # all; with a limit, classes may be absent
    train_tiny(data, tmp_path / "run", **values)
    assert None in [entry["training"]["mean_iou"] for entry in lines(tmp_path / "run")]
    assert "mean IoU – / 0." in capsys.readouterr().out


def test_two_processes_train_one_model_on_hosts_of_which_one_has_the_files(
    script: Callable, dataset: Path, tmp_path: Path
) -> None:
    # One batch of 8 images an epoch: 13 make one, and no uneven last batch.
    values = {"schedule": "constant", "precision": "float32", "images_per_epoch": 13}
    values["loss"] = "{cross_entropy: 1}"
    values["limit_validation"] = 4  # few, so that the shares of the processes differ
    host = tmp_path / "host0"
    train_tiny(dataset, host, epochs=1, **values)
    first = load(host / "last.pt")
    program = tmp_path / "host.py"  # what a user starts, with a folder for each process
    program.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import train\n"
        f"sys.argv += ['--run-dir', {str(tmp_path)!r} + '/host' + os.environ['RANK']]\n"
        "train.main()\n"
    )
    command = ["--nproc_per_node=2", "--standalone", str(program), "--resume"]
    command += ["--config", str(ROOT / "configs/default.yaml"), "--set"]
    # In a process of its own: torchrun catches SIGTERM, and so would the workers of later tests.
    done = script("-m", "torch.distributed.run", *command, *tiny(dataset, epochs=2, **values))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2/2") == 1  # rank 0 alone speaks and writes
    assert not (tmp_path / "host1").exists()
    assert [entry["images_seen"] for entry in lines(host)] == [8, 16]
    assert json.loads((host / "environment.json").read_text())["processes"] == 2

    # Each trains on half of the batch; batch norm and the loss see this half alone.
    config = first["config"]
    classes = list(config["classes"])
    split = load_split(config, "training")
    order = epoch_order(1, 8, len(split.images), config["seed"])
    losses = []
    matrix = torch.zeros(4, 4, dtype=torch.int64)
    for rank in (0, 1):
        half = order[rank::2]
        images, masks = split.images[half] / 255, split.masks[half]
        logits = load_model(first).train()(images)
        losses.append(cross_entropy(logits, masks.long()).item())
        matrix += confusion_matrices(logits.argmax(dim=1), masks, 4).sum(dim=0)
    together = lines(host)[-1]["training"]
    assert together["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert together["mean_iou"] == pytest.approx(scores(matrix, classes)["mean_iou"], abs=1e-4)

    # Both validate a share, and together what one process validates alone.
    split = limit(load_split(config, "validation"), images=4)
    logits = load_model(load(host / "last.pt")).eval()(split.images / 255)
    loss = cross_entropy(logits, split.masks.long()).item()
    matrix = confusion_matrices(logits.argmax(dim=1), split.masks, 4).sum(dim=0)
    together = lines(host)[-1]["validation"]
    assert together["loss"] == pytest.approx(loss, rel=1e-5)
    assert together["mean_iou"] == pytest.approx(scores(matrix, classes)["mean_iou"], abs=1e-4)


def load_model(checkpoint: dict) -> nn.Module:
    """Build the model of a last.pt and give it its weights."""
    model = build_model(checkpoint["config"])
    model.load_state_dict(checkpoint["model"])
    return model


@pytest.mark.parametrize("values", [{"batch_size": 7}, {"last_batch": "keep"}])
def test_batch_that_processes_cannot_share_evenly_is_refused(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict
) -> None:
    monkeypatch.setattr("processes.place", lambda: (0, 2))
    with pytest.raises(UserError, match="2 processes share"):
        train_tiny(dataset, tmp_path / "run", **values)


def test_validation_split_of_fewer_images_than_processes_is_refused(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("processes.place", lambda: (0, 2))
    with pytest.raises(UserError, match="validation split: 1, too few for 2 processes"):
        train_tiny(dataset, tmp_path / "run", limit_validation=1)


def test_it_learns(dataset: Path, tmp_path: Path) -> None:
    values = {"images_per_epoch": 160, "epochs": 4, "learning_rate": 0.02, "skip": "full"}
    values |= {"encoder": "[[8, 3]]", "decoder": "[[8, 3], [8, 3]]", "schedule": "one_cycle"}
    train_tiny(dataset, tmp_path / "run", **values, limit_images=8, precision="float32")
    first, *_, last = [entry["training"]["mean_iou"] for entry in lines(tmp_path / "run")]
    assert last > 0.8 > first
