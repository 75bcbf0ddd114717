"""Tests of train.py and runs.py: a run's files, that it repeats and resumes exactly, its ends."""

import io
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import checkpoints
import common
import runs
import train as script_module
from common import ROOT, UserError, code_digest
from config import load_config
from data import load_split
from evaluate import main as evaluate
from metrics import confusion_matrices, scores
from model import build_model
from train import train

CPU = torch.device("cpu")
RANDOM = {  # everything that draws random numbers
    "name": "random",
    "group": "'^.{1,6}'",
    "epochs": 3,
    "images_per_epoch": 22,
    "last_batch": "keep",
    "schedule": "one_cycle",
    "adam_beta2": 0.9,
    "precision": "float32",
    "dropout": 0.3,
    "crop": 16,
    "crop_on_objects": 0.5,
    "horizontal_flip": 0.5,
    "vertical_flip": 0.5,
    "blur": 0.5,
    "jitter": 0.5,
}
CLOCK = ("train_seconds", "images_per_s")


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


# ---- a run from the command line


@pytest.fixture(scope="module")
def run(dataset: Path, script: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train three epochs as a user does, with everything random on. Read-only: copy it."""
    folder = tmp_path_factory.mktemp("train") / "deep" / "run"
    arguments = ("--config", "configs/tuned.yaml", "--data", dataset, "--run-dir", folder)
    listed = {"PYTHONPROFILEIMPORTTIME": "1"}  # Python lists what is imported
    done = script("train.py", *arguments, "--set", *tiny(dataset, **RANDOM), **listed)
    assert done.returncode == 0, done.stderr
    for slow in ("matplotlib", "torchvision"):  # each takes a second to import
        assert f" {slow}\n" not in done.stderr
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
    assert last["optimizer"]["param_groups"][0]["betas"][1] == 0.9
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
    code, _, error = call(script_module.main, "--config", run / "config.yaml")
    assert code == 2 and error.startswith(f"error: {default}: there is a run; --resume goes on")
    assert error.count("\n") == 1
    # Another config: a short run is replaced, minutes of training are not.
    monkeypatch.setattr(runs, "LONG", 0)
    other = ("--config", run / "config.yaml", "--resume", "--set", "batch_size=4", "dropout=0.1")
    code, _, error = call(script_module.main, *other)
    assert code == 2 and "with another dropout, batch_size" in error and "OVERWRITE=1" in error
    assert {path.name: path.read_bytes() for path in default.iterdir()} == before


def test_new_run_removes_the_files_of_the_old_one(run: Path, dataset: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "testing.json").write_text("[]")
    events = {path.name for path in copy.glob("*tfevents*")}
    train_tiny(dataset, copy, resume=True, epochs=1)  # of another config, and short
    assert len(lines(copy)) == 1 and not (copy / "testing.json").exists()
    assert not events & {path.name for path in copy.iterdir()}


def test_other_files_are_never_taken_for_a_run(dataset: Path, run: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    names = ("me.png", "config.yaml", "my.partial", "my tfevents.txt")
    for name in names:
        (photos / name).write_bytes(b"dear")
        with pytest.raises(UserError, match="holds other files than a run's"):
            train_tiny(dataset, photos)
    for name in names:
        (photos / name).unlink()
    (photos / ".DS_Store").write_bytes(b"macOS")  # is no reason to refuse
    (photos / ".git").mkdir()
    (photos / ".git/mine").write_bytes(b"dear")
    train_tiny(dataset, photos, epochs=1)
    with runs.locked(photos):
        train(load_config([], tiny(dataset, epochs=1)), photos, CPU, resume=False, overwrite=True)
    for name in (".DS_Store", ".git/mine"):
        assert (photos / name).exists()
    slim = shutil.copytree(run, tmp_path / "slim")
    (slim / "last.pt").unlink()  # somebody saved space
    for name in ("testing.json", "testing.npz", "summary.json"):
        (slim / name).unlink(missing_ok=True)
        with pytest.raises(UserError, match=r"without last.pt"):
            train_tiny(dataset, slim, resume=True, **RANDOM)


@pytest.mark.parametrize("killed_before", ["config.yaml", "metrics.jsonl", "last.pt"])
def test_run_killed_in_its_first_epoch_starts_over(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_before: str
) -> None:
    folder = tmp_path / "run"
    write = common.write_atomically

    def killed(path: Path, data: bytes) -> None:
        if path.name == killed_before:
            path.with_name(path.name + ".partial").write_bytes(data[:9])
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for module in (runs, checkpoints):
            patch.setattr(module, "write_atomically", killed)
        train_tiny(dataset, folder, resume=True, epochs=1)
    train_tiny(dataset, folder, resume=True, epochs=1)
    assert (folder / "summary.json").exists()


# ---- going on


def test_more_epochs_of_a_constant_rate_continue(dataset: Path, tmp_path: Path) -> None:
    values = {"schedule": "constant", "precision": "float32"}
    train_tiny(dataset, tmp_path / "two", epochs=2, **values)
    two = lines(tmp_path / "two")
    train_tiny(dataset, tmp_path / "two", resume=True, epochs=3, **values)
    assert plain(lines(tmp_path / "two")[:2]) == plain(two)
    train_tiny(dataset, tmp_path / "three", epochs=3, **values)
    assert plain(lines(tmp_path / "two")) == plain(lines(tmp_path / "three"))


def test_run_of_other_images_does_not_go_on(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shutil.copytree(dataset, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    values = {"schedule": "constant", "precision": "float32"}
    train_tiny(data, tmp_path / "run", epochs=1, **values)
    image = min((data / "training/image").iterdir())
    Image.new("RGB", Image.open(image).size).save(image)
    monkeypatch.setattr(runs, "LONG", 0)  # else so short a run would be replaced
    with pytest.raises(UserError, match="with another files of the data"):
        train_tiny(data, tmp_path / "run", resume=True, epochs=2, **values)


def test_partial_files_of_any_process_are_known() -> None:
    assert runs.is_partial("best.pt.partial") and runs.is_partial("best.pt.41.partial")
    assert not runs.is_partial("my.41.partial") and not runs.is_partial("best.pt")


def test_run_that_goes_on_is_unfinished_until_its_end(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"schedule": "constant", "precision": "float32"}
    run = tmp_path / "run"
    train_tiny(dataset, run, epochs=1, **values)
    assert (run / "summary.json").exists()
    tests = ("testing.json", "testing.npz", "on-afo.json", "on-scenes.json")
    for name in tests:
        (run / name).write_text("{}")  # of the weights so far

    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script_module, "get_batch", interrupt)
        patch.setattr(script_module, "try_batch", lambda *arguments: None)
        train_tiny(dataset, run, resume=True, epochs=2, **values)
    assert len(lines(run)) == 1 and not (run / "summary.json").exists()
    assert not any((run / name).exists() for name in tests)


def test_provenance_is_of_the_code_that_trained(
    run: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = shutil.copytree(run, tmp_path / "finished")
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    monkeypatch.setattr(script_module, "code_digest", lambda: "today")
    train_tiny(dataset, finished, resume=True, **RANDOM)
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before

    (finished / "summary.json").unlink()  # as if killed before it was written
    train_tiny(dataset, finished, resume=True, **RANDOM)
    code = load(run / "last.pt")["code"]
    assert json.loads((finished / "summary.json").read_text())["code"] == code

    values = {"schedule": "constant", "precision": "float32"}
    monkeypatch.setattr(script_module, "code_digest", lambda: "yesterday")
    train_tiny(dataset, tmp_path / "midway", epochs=1, **values)
    monkeypatch.setattr(script_module, "code_digest", lambda: "today")
    train_tiny(dataset, tmp_path / "midway", resume=True, epochs=2, **values)
    assert load(tmp_path / "midway/last.pt")["code"] == "mixed"
    assert json.loads((tmp_path / "midway/summary.json").read_text())["code"] == "mixed"
    commit = json.loads((tmp_path / "midway/environment.json").read_text())["commit"]
    assert commit.endswith("begun by other code")


def test_run_of_other_code_is_marked(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable
) -> None:
    for name in common.CODE_OF_SCORES:
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr("common.ROOT", tmp_path)
    monkeypatch.setattr("table.code_digest", code_digest)
    today = code_digest()
    for name in common.CODE_OF_SCORES:  # comments and docstrings do not count
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text("# a comment" + "\n\n" + text.replace('"""', '"""More. ', 1))
    assert code_digest() == today
    assert re.search("^random ", call(evaluate, run / "best.pt")[1], re.M)
    for name in ("metrics.py", "train.py"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text + "edited = True\n")
        assert code_digest() != today
        assert re.search(r"^random\* ", call(evaluate, run / "summary.json")[1], re.M)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("table.code_digest", lambda: "other")
    assert re.search(r"^random\* ", call(evaluate, run / "best.pt")[1], re.M)


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
