"""Tests of train.py and runs.py: a run's files, that it repeats and resumes exactly, its ends."""

import io
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from common import ROOT, UserError, code_digest

import pytest
import torch
from conftest import tiny
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import runs
import train as script_module
from config import load_config
from data import load_split
from evaluate import main as evaluate
from metrics import confusion_matrices, scores
from model import build_model
from train import derive_seed, epoch_order, make_scheduler, train

CPU = torch.device("cpu")
RANDOM = {  # everything that draws random numbers
    **{"schedule": "one_cycle", "dropout": 0.3, "crop": 16, "crop_on_objects": 0.5},
    **{"horizontal_flip": 0.5, "vertical_flip": 0.5, "blur": 0.5, "jitter": 0.5},
    **{"name": "random", "epochs": 3, "images_per_epoch": 22, "precision": "float32"},
}
CLOCK = ("train_seconds", "images_per_s", "peak_memory_mib")


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def plain(value: object) -> object:
    """Make a value comparable bit for bit with ==, without what a clock says."""
    if isinstance(value, Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items() if key not in CLOCK}
    return [plain(v) for v in value] if isinstance(value, list) else value


def train_tiny(data: Path, run: Path, resume: bool = False, **values: object) -> None:
    with runs.locked(run):
        train(load_config([], tiny(data, **values)), run, CPU, resume, False)


# ---- order, schedule, random numbers


@pytest.mark.parametrize(("total", "per_epoch", "epochs"), [(7, 7, 3), (5, 12, 4), (20, 3, 15)])
def test_every_pass_shows_every_image_once(total: int, per_epoch: int, epochs: int) -> None:
    parts = [epoch_order(epoch, per_epoch, total, seed=3) for epoch in range(epochs)]
    assert all(part.shape == (per_epoch,) and part.dtype == torch.int64 for part in parts)
    walk = torch.cat(parts)
    assert torch.equal(walk, epoch_order(0, per_epoch * epochs, total, seed=3))
    for one_pass in walk.split(total):
        assert len(one_pass.unique()) == len(one_pass) and one_pass.max() < total
    assert len({tuple(part.tolist()) for part in walk.split(total)}) > 1


def test_every_step_of_every_seed_draws_other_numbers() -> None:
    seeds = {derive_seed(s, stream, i) for s in range(4) for stream in "ab" for i in range(99)}
    assert len(seeds) == 4 * 2 * 99 and all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 100])
def test_one_cycle_rises_to_the_peak_and_falls_to_nothing(steps: int) -> None:
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=0.01)
    scheduler, rates = make_scheduler(optimizer, "one_cycle", steps, 0.21), []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step(), scheduler.step()
    assert max(rates) <= 0.01 and scheduler.get_last_lr()[0] == pytest.approx(0.01 / 25 / 1e4)
    if steps == 100:
        assert rates[0] == pytest.approx(0.01 / 25) and max(rates) == pytest.approx(0.01, rel=1e-3)
        assert rates.index(max(rates)) in (20, 21)  # a fifth of the way


# ---- a run from the command line


@pytest.fixture(scope="module")
def run(dataset: Path, script: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train three epochs as a user does, with everything random on. Read-only: copy it."""
    folder = tmp_path_factory.mktemp("train") / "deep" / "run"
    arguments = ("--config", "configs/tuned.yaml", "--data", dataset, "--run-dir", folder)
    done = script("train.py", *arguments, "--set", *tiny(dataset, **RANDOM))
    assert done.returncode == 0, done.stderr
    assert all(f"random epoch {epoch}/3  loss " in done.stdout for epoch in (1, 2, 3))
    return folder


def test_run_leaves_its_files(run: Path, dataset: Path) -> None:
    names = {"config.yaml", "environment.json", "metrics.jsonl", "summary.json", "predictions.png"}
    assert names | {"best.pt", "last.pt"} <= {path.name for path in run.iterdir()}
    assert load_config([run / "config.yaml"]) == load_config([], tiny(dataset, **RANDOM))
    environment = json.loads((run / "environment.json").read_text())
    assert {"commit", "python", "torch", "device", "precision"} <= set(environment)
    history, summary = lines(run), json.loads((run / "summary.json").read_text())
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    assert [entry["images_seen"] for entry in history] == [22, 44, 66]
    seconds = [entry["train_seconds"] for entry in history]
    assert 0 < seconds[0] < seconds[1] < seconds[2] == summary["train_seconds"]  # adds up
    for part in (entry[split] for entry in history for split in ("training", "validation")):
        assert math.isfinite(part["loss"]) and 0 <= part["mean_iou"] <= 1
        assert list(part["per_class_iou"]) == ["background", "square", "triangle", "circle"]
    best = max(history, key=lambda entry: entry["validation"]["mean_iou"])
    assert (summary["best_epoch"], summary["validation"]) == (best["epoch"], best["validation"])


def test_best_checkpoint_describes_itself_and_scores_what_it_says(run: Path) -> None:
    best, last = load(run / "best.pt"), load(run / "last.pt")
    config = load_config([run / "config.yaml"])
    assert best["config"] == last["config"] == config
    assert plain(last["history"]) == plain(lines(run))
    model = build_model(config).eval()
    model.load_state_dict(best["model"])
    split = load_split(config, "validation")
    matrices = confusion_matrices(model(split.images / 255).argmax(dim=1), split.masks, 4)
    again = scores(matrices.sum(dim=0), list(config["classes"]))
    said = json.loads((run / "summary.json").read_text())["validation"]["mean_iou"]
    assert again["mean_iou"] == pytest.approx(said, abs=1e-4)


def test_tensorboard_shows_both_splits_and_pictures(run: Path) -> None:
    board = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0}).Reload()
    history = lines(run)
    for key in ("loss", "mean_iou"):
        for split in ("training", "validation"):
            scalars = board.Scalars(f"{key}/{split}")
            assert [scalar.step for scalar in scalars] == [1, 2, 3]
            expected = [entry[split][key] for entry in history]
            assert [scalar.value for scalar in scalars] == pytest.approx(expected, rel=1e-5)
    [tag] = board.Tags()["images"]
    shown = Image.open(io.BytesIO(board.Images(tag)[0].encoded_image_string)).convert("RGB")
    colours = {colour for _, colour in shown.getcolors(2**24)}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255)} <= colours  # of the truth


def test_run_that_is_there_is_not_lost(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable
) -> None:
    default = Path("runs/set/full/random/seed0")  # that of train.py and of make
    shutil.copytree(run, tmp_path / default)
    monkeypatch.chdir(tmp_path)
    before = {path.name: path.read_bytes() for path in default.iterdir()}
    for more, says in (
        ((), "--resume goes on with"),
        (("--resume", "--set", "batch_size=4", "dropout=0.1"), "another dropout, batch_size"),
    ):
        code, _, error = call(script_module.main, "--config", run / "config.yaml", *more)
        assert code == 2 and error.startswith(f"error: {default}: there is a run")
        assert says in error and error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in default.iterdir()} == before


def test_new_run_starts_in_an_empty_folder(run: Path, dataset: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "testing.json").write_text("[]")
    events = {path.name for path in copy.glob("*tfevents*")}
    with runs.locked(copy):
        train(load_config([], tiny(dataset, epochs=1)), copy, CPU, resume=True, overwrite=True)
    assert len(lines(copy)) == 1 and not (copy / "testing.json").exists()
    assert not events & {path.name for path in copy.iterdir()}
    (tmp_path / "photos").mkdir()
    for name, says in (("me.png", "other files than a run"), ("config.yaml", "without last.pt")):
        (tmp_path / "photos" / name).write_bytes(b"dear")
        with pytest.raises(UserError, match=says):
            train_tiny(dataset, tmp_path / "photos")
    assert (tmp_path / "photos/me.png").exists()
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed/config.yaml.partial").touch()  # killed before its first file was whole
    train_tiny(dataset, tmp_path / "killed", epochs=1)


@pytest.mark.parametrize("file", ["best.pt", "summary.json"])
def test_run_of_other_code_is_marked(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable, file: str
) -> None:
    for name in (names := ("train.py", "model.py", "losses.py", "augment.py", "data.py")):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr("common.ROOT", tmp_path)
    digests = {code_digest()}
    assert re.search("^random ", call(evaluate, run / file)[1], re.M)
    for name in names:
        (tmp_path / name).write_text("edited")
        digests.add(code_digest())
    assert len(digests) == 6 and re.search(r"^random\* ", call(evaluate, run / file)[1], re.M)


# ---- the same again


def test_seed_decides_the_weights(dataset: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        torch.manual_seed(ord(name))  # the state before does not matter
        train_tiny(dataset, tmp_path / name, **RANDOM | {"epochs": 2, "seed": seed})
    a, b, c = (plain(load(tmp_path / name / "last.pt")) for name in "abc")
    assert a == b
    assert a["model"] != c["model"]


@pytest.mark.parametrize(
    ("name", "call", "kept"),  # let this call of a function crash; so many epochs are kept
    [("evaluate", 1, 0), ("weighted_loss", 6, 1), ("evaluate", 3, 2), ("write_summary", 1, 3)],
)
def test_resumed_run_is_the_uninterrupted_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int, kept: int
) -> None:
    owner = runs if name == "write_summary" else script_module
    original, calls = getattr(owner, name), []

    def crashing(*args: object) -> object:
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args)

    config, copy = load_config([run / "config.yaml"]), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, crashing)
        with runs.locked(copy):
            train(config, copy, CPU, resume=False, overwrite=False)
    assert not (copy / "summary.json").exists()
    assert (len(lines(copy)) if kept else 0) == kept
    torch.manual_seed(99)
    with runs.locked(copy):
        train(config, copy, CPU, resume=True, overwrite=False)
    for file in ("last.pt", "best.pt"):
        assert plain(load(copy / file)) == plain(load(run / file)), file
    assert plain(lines(copy)) == plain(lines(run))


# ---- how it ends


def test_only_one_process_trains_in_a_folder(dataset: Path, tmp_path: Path) -> None:
    with runs.locked(tmp_path / "run"), pytest.raises(UserError, match="another process"):
        train_tiny(dataset, tmp_path / "run")


def test_interrupt_is_one_word_and_frees_the_folder(dataset: Path, tmp_path: Path) -> None:
    command = [sys.executable, "train.py", "--config", "configs/tuned.yaml", "--run-dir"]
    command += [str(tmp_path / "run"), "--set", *tiny(dataset, epochs=500)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipe["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # where nohup runs us
    with subprocess.Popen(command, cwd=ROOT, **pipe) as process:
        while not (tmp_path / "run/last.pt").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.splitlines()[-1] == "interrupted"
    epochs = len(load(tmp_path / "run/last.pt")["history"])
    train_tiny(dataset, tmp_path / "other", epochs=1)
    with runs.locked(tmp_path / "run"):
        assert 1 <= epochs <= len(lines(tmp_path / "run")) <= epochs + 1


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
        ({"loss": "{dice: 1}"}, "loss: dice: 1"),
        ({"loss": "{cross_entropy: much}"}, "cross_entropy, dice_pooled"),
        ({"encoder": "[[8, 4]]"}, "encoder: cannot"),
        ({"blur": 0.1, "blur_kernel": 31, "crop": 8}, "Padding size"),
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


def test_dead_classes_are_named_with_their_fix(
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
    assert "dead: triangle" in out and "revives a dead class" in out


def test_epoch_without_a_labelled_pixel_in_training_is_logged(
    dataset: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(dataset, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    for mask in sorted((data / "training/gt_image").iterdir())[1:]:
        Image.new("RGB", Image.open(mask).size, (9, 9, 9)).save(mask)
    values = {"ignore": "[9, 9, 9]", "images_per_epoch": 1, "batch_size": 2, "epochs": 3}
    train_tiny(data, tmp_path / "run", **values)
    assert None in [entry["training"]["mean_iou"] for entry in lines(tmp_path / "run")]


def test_two_processes_train_one_model_and_one_goes_on(
    dataset: Path, tmp_path: Path, script: Callable, call: Callable
) -> None:
    run = tmp_path / "run"
    launch = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train.py")
    command = ("--config", "configs/tuned.yaml", "--run-dir", run, "--set")
    values = tiny(dataset, precision="float32", crop=16, images_per_epoch=21)
    done = script(*launch, *command, *values)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/2") == 1  # rank 0 alone speaks and writes
    assert len(lines(run)) == 2 and len(list(run.glob("*tfevents*"))) == 2  # one for HParams
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    two = lines(run)[0]["training"]["pixel_accuracy"]
    train_tiny(dataset, tmp_path / "one", precision="float32", crop=16, images_per_epoch=21)
    assert two == pytest.approx(lines(tmp_path / "one")[0]["training"]["pixel_accuracy"], abs=0.3)
    (run / "summary.json").unlink()
    history = plain(lines(run))
    code, _, error = call(script_module.main, *command, *values, "--resume")
    assert code == 0 and plain(lines(run)) == history, error
    bad = script(*launch, *command, *values, "loss={dice: 1}")
    assert bad.returncode != 0
    assert [line for line in bad.stderr.splitlines() if line.startswith("error: ")] == [
        "error: loss: dice: 1 is no loss with its weight; known: "
        "cross_entropy, dice_pooled, dice_per_class"
    ]


def test_it_learns(dataset: Path, tmp_path: Path) -> None:
    values = {"images_per_epoch": 320, "epochs": 4, "learning_rate": 0.02, "skip": "full"}
    values |= {"encoder": "[[8, 3]]", "decoder": "[[8, 3], [8, 3]]", "schedule": "one_cycle"}
    train_tiny(dataset, tmp_path / "run", **values, limit_images=8, precision="float32")
    first, *_, last = [entry["training"]["mean_iou"] for entry in lines(tmp_path / "run")]
    assert last > 0.8 > first
