"""Tests of model.py: the architecture written out, its summary, checkpoints."""

import copy
import pickle
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import corruptions, tiny
from torch import Tensor, nn

from common import ROOT, UserError
from config import load_config
from model import (
    UNet,
    bilinear_start_applies,
    build_model,
    count_parameters,
    load_weights,
    main,
    read_checkpoint,
    restore_model,
    save_checkpoint,
)
from predict import load_model, predict
from runs import locked
from train import train

CPU = torch.device("cpu")
LAB_HEAD = [[6, 3], ["classes", 3]]
both_skips = pytest.mark.parametrize("skip", ["pooled", "full"])


def small(skip: str = "pooled", **changes: object) -> UNet:
    """Build two encoder stages of few channels; seeded, with batch norms of other statistics."""
    torch.manual_seed(0)
    arguments = {
        "in_channels": 3,
        "num_classes": 4,
        "encoder": [[4, 3], [8, 5]],
        "decoder": [[6, 3], [5, 3]],
        "skip": skip,
        "dropout": 0.0,
        "upsampling_init": "random",
        "background_bias": 0.0,
    }
    if skip == "full":
        arguments["decoder"] = [[6, 3], [5, 3], [7, 3]]
    arguments.update(changes)
    model = UNet(**arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.2, 1.0)
    return model.eval()


def random_images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


# ---- the architecture


@pytest.mark.parametrize(
    ("name", "parameters"), [("initial", 540_316), ("modified", 2_091_036), ("tuned", 513_452)]
)
def test_parameters_of_the_labs_models(name: str, parameters: int) -> None:
    config = load_config([ROOT / f"configs/{name}.yaml"], ["in_channels=4"])
    assert count_parameters(build_model(config)) == parameters


def by_hand(model: UNet, images: Tensor) -> Tensor:
    """The architecture of the lab written out for two stages of either kind of skip."""
    state = model.state_dict()
    pool = nn.MaxPool2d(3, 2, 1)

    def normalise(x: Tensor, name: str) -> Tensor:
        mean = state[f"{name}.running_mean"].view(1, -1, 1, 1)
        variance = state[f"{name}.running_var"].view(1, -1, 1, 1)
        gain = state[f"{name}.weight"].view(1, -1, 1, 1)
        bias = state[f"{name}.bias"].view(1, -1, 1, 1)
        return (x - mean) / (variance + 1e-5).sqrt() * gain + bias

    def double(x: Tensor, name: str) -> Tensor:
        for conv, norm in ((0, 1), (3, 4)):
            kernel = state[f"{name}.{conv}.weight"]
            padding = kernel.shape[-1] // 2
            x = F.conv2d(x, kernel, state[f"{name}.{conv}.bias"], padding=padding)
            x = normalise(x, f"{name}.{norm}").clamp(min=0)
        return x

    def up(x: Tensor, i: int) -> Tensor:
        weight = state[f"up.{i}.weight"]
        bias = state[f"up.{i}.bias"]
        if weight.shape[-1] == 1:
            return F.conv2d(x, weight, bias)
        return F.conv_transpose2d(x, weight, bias, stride=2, padding=1, output_padding=1)

    first = double(2 * images - 1, "encoder.0")
    second = double(pool(first), "encoder.1")
    x = up(double(pool(second), "decoder.0"), 0)
    if model.skip == "pooled":
        return up(double(torch.cat([x, pool(first)], 1), "decoder.1"), 1)
    x = up(double(torch.cat([x, second], 1), "decoder.1"), 1)
    return up(double(torch.cat([x, first], 1), "decoder.2"), 2)


@both_skips
@pytest.mark.parametrize(
    ("channels", "height", "width"), [(3, 16, 12), (1, 1, 1), (4, 37, 53), (3, 3, 200), (3, 46, 45)]
)
def test_forward_is_the_architecture(skip: str, channels: int, height: int, width: int) -> None:
    """Images of any size are padded by their borders to a multiple of 2², the logits cropped."""
    model, images = small(skip, in_channels=channels), random_images(2, channels, height, width)
    padding = ((0, 0), (0, 0), (0, -height % 4), (0, -width % 4))
    padded = torch.from_numpy(np.pad(images.numpy(), padding, mode="edge"))
    with torch.no_grad():
        logits, expected = model(images), by_hand(model, padded)[..., :height, :width]
    assert logits.shape == (2, 4, height, width) and logits.std() > 0
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@both_skips
def test_receptive_radius_is_as_far_as_a_change_is_seen(skip: str) -> None:
    model, side = small(skip), 96
    images = random_images(1, 3, side, side)
    changed = images.clone()
    changed[..., side // 2, side // 2] += 1
    with torch.no_grad():
        seen = (model(changed) != model(images)).any(dim=1)[0].nonzero() - side // 2
    assert seen.abs().max() <= model.receptive_radius <= 2 * seen.abs().max()
    assert model.receptive_radius % model.stride == 0 and model.stride == 4


@both_skips
def test_decoder_of_another_length_is_refused(skip: str) -> None:
    with pytest.raises(UserError, match="decoder: with skip"):
        small(skip, decoder=[[6, 3]] * (3 if skip == "pooled" else 2))


@pytest.mark.parametrize("stage", [[4, 2], [0, 3], [4], "ab", ["classes", 3], [4.5, 3], None])
def test_what_is_no_stage_is_named(stage: object) -> None:
    with pytest.raises(UserError, match=r"encoder.*: .*\[channels, odd kernel\]"):
        small(encoder=[[4, 3], stage])


def test_bilinear_init_upsamples_each_channel_by_itself() -> None:
    up = small(decoder=LAB_HEAD, upsampling_init="bilinear").up[-1]
    x = random_images(1, 4, 5, 7)
    with torch.no_grad():
        out = up(x)
    # Sample i goes to position 2i; beyond the last one there are zeros.
    padded = F.pad(x, (0, 1, 0, 1))
    expected = F.interpolate(padded, size=(11, 15), mode="bilinear", align_corners=True)
    torch.testing.assert_close(out, expected[..., :10, :14])


FULL_HEAD = [[6, 3], [5, 3], [4, 3]]


@pytest.mark.parametrize(
    ("skip", "decoder", "applies"),
    [("pooled", LAB_HEAD, True), ("pooled", [[6, 3], [5, 3]], False), ("full", FULL_HEAD, False)],
)
def test_bilinear_init_is_only_for_heads_of_as_many_channels_as_classes(
    skip: str, decoder: list, applies: bool
) -> None:
    bilinear = small(skip, decoder=decoder, upsampling_init="bilinear")
    random = small(skip, decoder=decoder, upsampling_init="random")
    assert torch.equal(bilinear.up[-1].weight, random.up[-1].weight) != applies
    assert bilinear_start_applies(bilinear) == applies  # train.py prints a note if it does not


@both_skips
def test_background_bias_raises_the_first_class_alone(skip: str) -> None:
    images = random_images(2, 3, 16, 16)
    with torch.no_grad():
        difference = small(skip, background_bias=1.5)(images) - small(skip)(images)
    expected = torch.tensor([1.5, 0, 0, 0])[:, None, None].expand_as(difference)
    torch.testing.assert_close(difference, expected)


def test_dropout_drops_whole_channels_after_each_double_conv_in_training_only() -> None:
    model, images = small("full", dropout=0.5), random_images(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(images), small("full")(images))
        assert not torch.equal(model.train()(images), model(images))
    for stage in list(model.encoder) + list(model.decoder):
        assert isinstance(stage[-1], nn.Dropout2d) and stage[-1].p == 0.5


# ---- the summary


def test_flop_count_by_hand(call) -> None:
    stages = ("encoder=[[4, 3], [8, 3]]", "decoder=[[4, 3], [classes, 3]]")
    multiply_adds = (
        512**2 * 9 * (3 * 4 + 4 * 4)  # encoder 1
        + 256**2 * 9 * (4 * 8 + 8 * 8)  # encoder 2
        + 128**2 * 9 * (8 * 4 + 4 * 4)  # decoder 1
        + 128**2 * 9 * 4 * 4  # its up-sampling: each input value meets each kernel value once
        + 256**2 * 9 * (8 * 4 + 4 * 4)  # decoder 2, on 4 channels and a skip of 4
        + 256**2 * 9 * 4 * 4  # its up-sampling to the 4 classes
    )
    options = ("--config", ROOT / "configs/tuned.yaml", "--size", 512, "--set", *stages)
    last = call(main, *options)[1].splitlines()[-1]
    assert last.startswith(f"{2 * multiply_adds / 1e9:.3f} GFLOP")


def test_command_line_prints_stages_and_total(call) -> None:
    tuned = ("--config", ROOT / "configs/tuned.yaml", "--set", "in_channels=4")
    code, printed, _ = call(main, *tuned)
    header, *lines, _ = printed.splitlines()
    assert code == 0 and header.split() == ["stage", "output", "parameters"]
    *stages, total = (line.replace(",", "").split() for line in lines)
    assert total == ["total", "513452"] and sum(int(stage[-1]) for stage in stages) == 513_452
    # conv: in·out·9 weights and a bias a channel; batch norm: two values a channel.
    count = 9 * (16 + 32) * 32 + 6 * 32
    assert stages[1] == ["encoder", "2", "32×64×64", str(count)]
    assert stages[4] == ["decoder", "1", "64×8×8", str(9 * (128 + 64) * 64 + 6 * 64)]
    assert stages[-1] == ["decoder", "4", "up", "4×128×128", str(9 * 4 * 4 + 4)]


# ---- an architecture that is no U-Net


class Plain(nn.Module):
    """Two convs at full resolution, the last of them in a list."""

    stride = 1
    receptive_radius = 2

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 8, 3, padding=1)
        self.rest = nn.ModuleList([nn.Conv2d(8, num_classes, 3, padding=1)])

    def forward(self, images: Tensor) -> Tensor:
        return self.rest[0](self.first(images).relu())


def build_plain(config: dict) -> nn.Module:
    """Stand for a `build_model` that knows this architecture."""
    return Plain(config["in_channels"], len(config["classes"]))


def test_another_architecture_is_trained_restored_and_predicts(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.build_model", build_plain)
    monkeypatch.setattr("model.build_model", build_plain)
    settings = tiny(dataset, epochs=1, upsampling_init="bilinear", precision="float32")
    config = load_config([], settings)
    config["model"] = "plain"
    with locked(tmp_path / "run"):
        train(config, tmp_path / "run", CPU, resume=False, overwrite=False)
    model, config = load_model(tmp_path / "run/best.pt", "cpu")
    assert isinstance(model, Plain) and not bilinear_start_applies(model)
    monkeypatch.setattr("predict.TILE", 16)
    images = torch.arange(3 * 40 * 50).view(1, 3, 40, 50).to(torch.uint8)
    with torch.no_grad():
        expected = model(images / 255).softmax(dim=1)
    torch.testing.assert_close(predict(model, config, images), expected)


def test_summary_of_another_architecture(call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.build_model", build_plain)
    code, printed, _ = call(main, "--config", ROOT / "configs/tuned.yaml", "--size", 32)
    assert code == 0
    lines = [line.split() for line in printed.splitlines()]
    assert lines[1] == ["first", "8×32×32", str(8 * 3 * 9 + 8)]
    assert lines[2] == ["rest", "–", str(4 * 8 * 9 + 4)]


def test_unknown_architecture_is_named() -> None:
    config = load_config([])
    config["model"] = "transformer"
    with pytest.raises(UserError, match=r"model: is transformer; .*build_model"):
        build_model(config)


# ---- checkpoints


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
    with pytest.raises(UserError, match=r"a.pt: cannot be read \(dropout is "):
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


@pytest.mark.parametrize(
    ("change", "fresh"),
    [
        ([], []),
        (["classes={background: [0, 0, 0], disc: [1, 1, 1]}"], ["up.1"]),
        (["classes={square: [1, 1, 1], a: [0, 0, 0], b: [2, 2, 2], c: [3, 3, 3]}"], ["up.1"]),
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
    plain = build_plain(load_config([]))
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
    assert len(read_checkpoint(tmp_path / "run/last.pt", CPU)["history"]) == 2


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
            read_checkpoint(Path(name), CPU)
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
