"""Tests of checkpoints.py: what comes back, what is refused, weights that are taken in part."""

import copy
import pickle
import traceback
from pathlib import Path

import pytest
import torch
from conftest import corruptions, tiny
from torch import Tensor, nn

from checkpoints import load_weights, read_checkpoint, restore_model, save_checkpoint
from common import ROOT, UserError
from config import load_config
from model import UNet, build_model, count_parameters
from predict import load_model, predict
from train import train

CPU = torch.device("cpu")


def write_small(path: Path, **changes: object) -> dict:
    """Save a checkpoint of a small model, some of its keys changed; returns what was saved."""
    stages = ["encoder=[[4, 3], [4, 3]]", "decoder=[[4, 3], [4, 3]]", "precision=float32"]
    config = load_config([], stages)
    content = {"config": config, "model": build_model(config).state_dict(), "data_digest": "a"}
    content.update(changes)
    save_checkpoint(path, content)
    return content


def test_checkpoint_comes_back_its_config_as_of_today(tmp_path: Path) -> None:
    saved = write_small(tmp_path / "a.pt")
    older = dict(saved["config"], device="auto")  # a key that is no more
    del older["jitter"]  # a key that was not yet
    save_checkpoint(tmp_path / "a.pt", dict(saved, config=older))
    model, content = restore_model(tmp_path / "a.pt", CPU)
    assert content["config"] == saved["config"] and content["data_digest"] == "a"
    assert not model.training
    torch.testing.assert_close(model.state_dict(), saved["model"], rtol=0, atol=0)


@pytest.mark.parametrize("change", [{"format": "another 1"}, {"model": 3}, {"config": 3}])
def test_checkpoint_of_another_project_is_named(tmp_path: Path, change: dict) -> None:
    write_small(tmp_path / "a.pt", **change)
    with pytest.raises(UserError, match=r"a.pt: cannot be read .*; give a \.pt file"):
        restore_model(tmp_path / "a.pt", CPU)


@pytest.mark.parametrize("value", ["much", None])
def test_value_of_another_type_in_the_config_is_named(tmp_path: Path, value: object) -> None:
    config = load_config([])
    config["dropout"] = value
    write_small(tmp_path / "a.pt", config=config)
    with pytest.raises(UserError, match=r"a.pt: cannot be read \(dropout is .*default.yaml, or tr"):
        restore_model(tmp_path / "a.pt", CPU)


def test_weights_of_another_model_are_one_line(tmp_path: Path) -> None:
    """The line names the file and the first misfit: other shapes, too few names, too many."""
    state = write_small(tmp_path / "a.pt")["model"]
    wider = dict(state)
    wider["encoder.0.0.weight"] = torch.zeros(5, 3, 3, 3)
    fewer = dict(state)
    del fewer["up.1.bias"]
    more = dict(state)
    more["head.weight"] = torch.zeros(4)
    misfits = (
        (wider, "encoder.0.0.weight is [5, 3, 3, 3] in the file, [4, 3, 3, 3] here"),
        (fewer, "the file has no up.1.bias"),
        (more, "the model has no head.weight"),
        ({}, "the file has no encoder.0.0.weight"),
    )
    for other, misfit in misfits:
        write_small(tmp_path / "a.pt", model=other)
        with pytest.raises(UserError) as caught:
            restore_model(tmp_path / "a.pt", CPU)
        advice = "undo the change of model.py, or train again"
        expected = f"{tmp_path}/a.pt: its weights do not fit the model ({misfit}); {advice}"
        assert str(caught.value) == expected


SWAPPED = "{square: [255, 0, 0], background: [0, 0, 0], triangle: [0, 255, 0], circle: [0, 0, 255]}"


@pytest.mark.parametrize(
    ("change", "fresh"),
    [
        ([], []),
        (["classes={background: [0, 0, 0], disc: [1, 1, 1]}"], ["up.1"]),
        (["classes={square: [1, 1, 1], a: [0, 0, 0], b: [2, 2, 2], c: [3, 3, 3]}"], ["up.1"]),
        ([f"classes={SWAPPED}"], ["up.1"]),
        (["in_channels=1"], ["encoder.0.0"]),
        (["decoder=[[4, 3], [9, 3]]"], [*(f"decoder.1.{i}" for i in (0, 1, 3, 4)), "up.1"]),
    ],
)
def test_layers_that_fit_start_from_other_weights(
    tmp_path: Path, change: list[str], fresh: list[str]
) -> None:
    """Classes of other names, or in another order, need a last layer of their own."""
    saved = write_small(tmp_path / "a.pt")["model"]
    stages = ["encoder=[[4, 3], [4, 3]]", "decoder=[[4, 3], [4, 3]]"]
    config = load_config([], stages + change)
    model = build_model(config)
    before = copy.deepcopy(model.state_dict())
    line = load_weights(model, tmp_path / "a.pt", list(config["classes"]))
    expected_end = f", fresh are {', '.join(fresh)}" if fresh else ""
    assert line == f"init: {18 - len(fresh)} of 18 layers start from {tmp_path}/a.pt{expected_end}"
    for name, value in model.state_dict().items():
        layer = name.rpartition(".")[0]
        assert torch.equal(value, before[name] if layer in fresh else saved[name]), name


def test_weights_of_no_layer_are_refused(tmp_path: Path) -> None:
    write_small(tmp_path / "a.pt")
    plain = nn.Sequential(nn.Conv2d(3, 2, 1))
    with pytest.raises(UserError, match=r"a\.pt: init: no layer of it fits the model; set"):
        load_weights(plain, tmp_path / "a.pt", [])
    (tmp_path / "b.pt").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"b\.pt: cannot be read .*; give a \.pt file"):
        load_weights(plain, tmp_path / "b.pt", [])


def test_training_starts_from_other_weights_once(dataset: Path, tmp_path: Path) -> None:
    init = tmp_path / "a.pt"
    saved = write_small(init)["model"]
    stages = {"encoder": "[[4, 3], [4, 3]]", "decoder": "[[4, 3], [4, 3]]", "skip": "pooled"}
    changes = {"init": init, "epochs": 1, "learning_rate": 1e-12, **stages}
    config = load_config([], tiny(dataset, **changes))
    (tmp_path / "run").mkdir()
    train(config, tmp_path / "run", CPU, resume=False, overwrite=False)
    model, _ = restore_model(tmp_path / "run/best.pt", CPU)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, saved[name], rtol=0, atol=1e-6)
    init.unlink()  # a run that goes on does not need it
    config = dict(config, epochs=2)
    train(config, tmp_path / "run", CPU, resume=True, overwrite=False)
    assert len(read_checkpoint(tmp_path / "run/last.pt")["history"]) == 2


def fail_as_edited(*_arguments: object) -> None:
    torch.zeros(2) + torch.zeros(3)


@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_mistake_in_an_edited_model_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    write_small(tmp_path / "a.pt")

    def edited(self: UNet, *_images: Tensor, **_arguments: object) -> None:
        fail_as_edited()

    monkeypatch.setattr(UNet, method, edited)
    with pytest.raises(RuntimeError, match="must match the size") as caught:
        model, config = load_model(tmp_path / "a.pt", "cpu")
        predict(model, config, torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    lines = [frame.name for frame in traceback.extract_tb(caught.tb)]
    assert lines[-2:] == ["edited", "fail_as_edited"]


def test_shipped_weights_load(capfd: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", None)  # loading must not change how memory is kept
    model, config = load_model(ROOT / "weights/best.pt", "cpu")
    assert list(config["classes"]) == ["background", "square", "triangle", "circle"]
    assert count_parameters(model) == 1_035_908
    assert capfd.readouterr() == ("", "")  # loading a model prints nothing


class Hostile:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("owned"),))


def test_hostile_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "flying-objects-segmentation 1", "model": Hostile()}, "a.pt")
    Path("b.pt").write_bytes(pickle.dumps(Hostile(), protocol=2))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(UserError, match=name):
            read_checkpoint(Path(name))
    assert not Path("owned").exists()


def test_damaged_checkpoint_is_one_line(tmp_path: Path) -> None:
    saved = write_small(tmp_path / "a.pt")["model"]
    path = tmp_path / "b.pt"
    refused = 0
    for data in corruptions((tmp_path / "a.pt").read_bytes(), 40):
        path.write_bytes(data)
        try:
            model, _ = restore_model(path, CPU)
            for name, value in model.state_dict().items():
                assert torch.equal(value, saved[name])
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 20
