"""Tests of model.py: the architecture written out, its summary, checkpoints, device."""

import pickle
from pathlib import Path

from common import ROOT, UserError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import corruptions
from torch import Tensor, nn

from config import load_config
from model import (
    UNet,
    build_model,
    count_parameters,
    main,
    pick_device,
    pick_precision,
    read_checkpoint,
    restore_model,
    save_checkpoint,
)
from predict import load_model

CPU = torch.device("cpu")
LAB_HEAD = [[6, 3], ["classes", 3]]
both_skips = pytest.mark.parametrize("skip", ["pooled", "full"])


def small(skip: str = "pooled", **changes: object) -> UNet:
    """Build two encoder stages of few channels; seeded, with batch norms of other statistics."""
    torch.manual_seed(0)
    decoder = [[6, 3], [5, 3]] + [[7, 3]] * (skip == "full")
    stages = {"encoder": [[4, 3], [8, 5]], "decoder": decoder, "skip": skip}
    others = {"in_channels": 3, "num_classes": 4, "dropout": 0.0, "upsampling_init": "random"}
    model = UNet(**(stages | others | changes))
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
    state, pool = model.state_dict(), nn.MaxPool2d(3, 2, 1)

    def double(x: Tensor, name: str) -> Tensor:
        for conv, norm in ((0, 1), (3, 4)):
            kernel = state[f"{name}.{conv}.weight"]
            x = F.conv2d(x, kernel, state[f"{name}.{conv}.bias"], padding=kernel.shape[-1] // 2)
            mean, var, gain, bias = (
                state[f"{name}.{norm}.{key}"].view(1, -1, 1, 1)
                for key in ("running_mean", "running_var", "weight", "bias")
            )
            x = ((x - mean) / (var + 1e-5).sqrt() * gain + bias).clamp(min=0)
        return x

    def up(x: Tensor, i: int) -> Tensor:
        weight, bias = state[f"up.{i}.weight"], state[f"up.{i}.bias"]
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


def test_bilinear_init_is_only_for_heads_of_as_many_channels_as_classes() -> None:
    full = {"skip": "full", "decoder": [[6, 3], [5, 3], [4, 3]]}
    for changes, expected in (({"decoder": LAB_HEAD}, True), ({}, False), (full, False)):
        models = (small(**changes, upsampling_init=init) for init in ("bilinear", "random"))
        bilinear, random = (model.up[-1].weight for model in models)
        assert torch.equal(bilinear, random) != expected


def test_dropout_drops_whole_channels_after_each_double_conv_in_training_only() -> None:
    model, images = small("full", dropout=0.5), random_images(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(images), small("full")(images))
        assert not torch.equal(model.train()(images), model(images))
    drops = [stage[-1] for stage in (*model.encoder, *model.decoder)]
    assert all(isinstance(drop, nn.Dropout2d) and drop.p == 0.5 for drop in drops)


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


# ---- checkpoints, device


def checkpoint(path: Path) -> dict:
    """Save a checkpoint of a small model; returns what was saved."""
    names = ["encoder=[[4, 3], [4, 3]]", "decoder=[[4, 3], [4, 3]]", "precision=float32"]
    config = load_config([], names)
    content = {"config": config, "model": build_model(config).state_dict(), "data_digest": "a"}
    save_checkpoint(path, content)
    return content


def test_checkpoint_comes_back_its_config_as_of_today(tmp_path: Path) -> None:
    saved = checkpoint(tmp_path / "a.pt")
    older = {k: v for k, v in saved["config"].items() if k != "jitter"} | {"device": "auto"}
    save_checkpoint(tmp_path / "a.pt", saved | {"config": older})
    model, content = restore_model(tmp_path / "a.pt", CPU)
    assert content["config"] == saved["config"] and content["data_digest"] == "a"
    assert not model.training
    torch.testing.assert_close(model.state_dict(), saved["model"], rtol=0, atol=0)


@pytest.mark.parametrize("change", [{"format": "another 1"}, {"model": {}}, {"config": 3}])
def test_checkpoint_of_another_project_is_named(tmp_path: Path, change: dict) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, checkpoint(path) | change)
    with pytest.raises(UserError, match=r"a.pt: cannot be read .*; give a \.pt file"):
        restore_model(path, CPU)


def test_shipped_weights_load(capfd: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", None)  # by which malloc would be changed
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
    saved = checkpoint(tmp_path / "a.pt")["model"]
    path, refused = tmp_path / "b.pt", 0
    for data in corruptions((tmp_path / "a.pt").read_bytes()):
        path.write_bytes(data)
        try:
            model, _ = restore_model(path, CPU)
            assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 100


def test_device_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"device tpu: PyTorch finds .*cpu"):
        pick_device("tpu")
    assert pick_device("cpu") == CPU
    assert pick_precision(CPU, "bfloat16") == torch.bfloat16
