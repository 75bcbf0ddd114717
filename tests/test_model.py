"""Tests of model.py: sizes, parameters, wiring, the bilinear start, and the command line."""

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
    pick_device,
    pick_precision,
    read_checkpoint,
    restore_model,
    save_checkpoint,
    summarise,
)

SIZES = [(1, 1), (127, 130), (37, 53), (16, 16), (3, 200)]


def small(skip: str = "pooled", **changes: object) -> UNet:
    """Two encoder stages of few channels; seeded, with batch norms that have seen other data."""
    torch.manual_seed(0)
    arguments = {
        "in_channels": 3,
        "num_classes": 4,
        "encoder": [[4, 3], [8, 5]],
        "decoder": [[6, 3], [5, 3]] + ([[7, 3]] if skip == "full" else []),
        "skip": skip,
        "dropout": 0.0,
        "upsampling_init": "random",
    }
    model = UNet(**(arguments | changes))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.2, 1.0)
    return model.eval()


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# ---- what the lab's report states


@pytest.mark.parametrize(
    ("name", "parameters"), [("initial", 540_316), ("modified", 2_091_036), ("tuned", 513_452)]
)
def test_parameters_of_the_labs_models(name: str, parameters: int) -> None:
    config = load_config([ROOT / f"configs/{name}.yaml"], ["in_channels=4"])
    assert len(config["classes"]) == 4
    assert count_parameters(build_model(config)) == parameters


def test_frozen_parameters_are_not_counted() -> None:
    model = nn.Conv2d(2, 3, 1)
    assert count_parameters(model) == 2 * 3 + 3
    model.bias.requires_grad_(False)
    assert count_parameters(model) == 2 * 3


# ---- sizes


@pytest.mark.parametrize("skip", ["pooled", "full"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_output_has_the_size_of_the_input(skip: str, height: int, width: int) -> None:
    images = pictures(2, 3, height, width)
    with torch.no_grad():
        logits = small(skip)(images)
    assert logits.shape == (2, 4, height, width)
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


@pytest.mark.parametrize("skip", ["pooled", "full"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_any_size_is_the_padded_image_cropped(skip: str, height: int, width: int) -> None:
    model, images = small(skip), pictures(1, 3, height, width)
    down, right = (4 - height % 4) % 4, (4 - width % 4) % 4  # to a multiple of 2²
    padding = ((0, 0), (0, 0), (0, down), (0, right))
    padded = torch.from_numpy(np.pad(images.numpy(), padding, mode="edge"))
    with torch.no_grad():
        torch.testing.assert_close(model(images), model(padded)[..., :height, :width])


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("skip", ["pooled", "full"])
def test_channels_of_the_image(channels: int, skip: str) -> None:
    model = small(skip, in_channels=channels)
    images = pictures(1, channels, 8, 8)
    with torch.no_grad():
        before = model(images)
        assert before.shape == (1, 4, 8, 8)
        for channel in range(channels):  # each is looked at
            changed = images.clone()
            changed[:, channel] = 1 - changed[:, channel]
            assert not torch.equal(model(changed), before)


@pytest.mark.parametrize("classes", [2, 7])
def test_the_word_classes_in_the_decoder_stands_for_their_number(classes: int) -> None:
    model = small(num_classes=classes, decoder=[[6, 3], ["classes", 3]])
    assert model.decoder[-1][0].out_channels == classes
    assert model(pictures(1, 3, 8, 8)).shape[1] == classes


def test_decoder_of_another_length_is_refused() -> None:
    for skip, decoder in (("pooled", [[6, 3]] * 3), ("full", [[6, 3]] * 2)):
        with pytest.raises(UserError, match="decoder: with skip"):
            small(skip, decoder=decoder)


@pytest.mark.parametrize("stage", [[4, 2], [0, 3], [4], "ab", ["classes", 3], [4.5, 3], None])
def test_what_is_no_stage_is_named(stage: object) -> None:
    with pytest.raises(UserError, match=r"encoder: .*\[channels, odd kernel\]"):
        small(encoder=[[4, 3], stage])


# ---- wiring


def by_hand(model: UNet, images: Tensor) -> Tensor:
    """The architecture of the lab written out for two stages of either kind of skip."""
    state = model.state_dict()

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

    def pool(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, 1)

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


@pytest.mark.parametrize("skip", ["pooled", "full"])
def test_forward_is_the_architecture_written_out(skip: str) -> None:
    model, images = small(skip), pictures(2, 3, 16, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(images), by_hand(model, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("skip", ["pooled", "full"])
def test_every_parameter_gets_a_gradient(skip: str) -> None:
    model = small(skip).train()
    model(pictures(2, 3, 16, 16)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if not name.endswith(".bias"):  # a bias before a batch norm has none by nature
            assert parameter.grad.abs().max() > 0, name


# ---- bilinear start


def bilinear(x: Tensor) -> Tensor:
    """2× up-sampling, sample i at position 2i, written as a loop; zero beyond the border."""
    channels, height, width = x.shape
    padded = torch.zeros(channels, height + 1, width + 1)
    padded[:, :height, :width] = x
    out = torch.zeros(channels, 2 * height, 2 * width)
    for y in range(2 * height):
        for z in range(2 * width):
            rows, columns = (y // 2, (y + 1) // 2), (z // 2, (z + 1) // 2)
            out[:, y, z] = sum(padded[:, r, c] for r in rows for c in columns) / 4
    return out


def test_bilinear_start_upsamples_each_channel_by_itself() -> None:
    up = small(decoder=[[6, 3], ["classes", 3]], upsampling_init="bilinear").up[-1]
    x = pictures(4, 5, 7)
    with torch.no_grad():
        out = up(x[None])[0]
    torch.testing.assert_close(out, bilinear(x))
    torch.testing.assert_close(out[:, ::2, ::2], x)
    # The same but for the last row and column, which look beyond the border.
    expected = F.interpolate(x[None], size=(9, 13), mode="bilinear", align_corners=True)[0]
    torch.testing.assert_close(out[:, :9, :13], expected)


def test_bilinear_start_impulse_response() -> None:
    up = small(decoder=[[6, 3], ["classes", 3]], upsampling_init="bilinear").up[-1]
    impulse = torch.zeros(1, 4, 3, 3)
    impulse[0, 2, 1, 1] = 1
    expected = torch.zeros(1, 4, 6, 6)
    expected[0, 2, 1:4, 1:4] = torch.tensor([[0.25, 0.5, 0.25], [0.5, 1.0, 0.5], [0.25, 0.5, 0.25]])
    with torch.no_grad():
        assert torch.equal(up(impulse), expected)


def test_bilinear_start_is_only_for_heads_of_as_many_channels_as_classes() -> None:
    def last_weight(**changes: object) -> Tensor:
        return small(**changes).up[-1].weight

    heads = {"decoder": [[6, 3], ["classes", 3]]}
    assert not torch.equal(last_weight(**heads, upsampling_init="bilinear"), last_weight(**heads))
    for changes in ({}, {"skip": "full"}, {"skip": "full", "decoder": [[6, 3], [5, 3], [4, 3]]}):
        wider = last_weight(**changes, upsampling_init="bilinear")
        assert torch.equal(wider, last_weight(**changes))


# ---- dropout


def test_dropout_works_in_training_only() -> None:
    images = pictures(2, 3, 8, 8)
    without, with_it = small(), small(dropout=0.5)
    with_it.load_state_dict(without.state_dict())  # dropout has no state of its own
    with torch.no_grad():
        assert torch.equal(with_it(images), with_it(images))
        assert torch.equal(with_it(images), without(images))
        without.train(), with_it.train()
        assert torch.equal(without(images), without(images))
        assert not torch.equal(with_it(images), with_it(images))


def test_dropout_drops_whole_channels_after_each_double_conv() -> None:
    model = small("full", dropout=0.5).train()
    seen: list[tuple[Tensor, Tensor]] = []
    stages = [*model.encoder, *model.decoder]
    for stage in stages:
        assert isinstance(stage[-1], nn.Dropout2d)
        stage[-1].register_forward_hook(lambda _m, inputs, out: seen.append((inputs[0], out)))
    with torch.no_grad():
        model(pictures(4, 3, 16, 16))
    assert len(seen) == len(stages) == 5
    dropped = kept = 0
    for before, after in seen:
        zero = (after == 0).all(dim=(2, 3))
        dropped, kept = dropped + int(zero.sum()), kept + int((~zero).sum())
        torch.testing.assert_close(after[~zero], 2 * before[~zero])  # scaled by 1 / (1 - 0.5)
    assert dropped > 20 and kept > 20


# ---- command line


def test_flop_count_by_hand() -> None:
    model = small(encoder=[[4, 3], [8, 3]], decoder=[[4, 3], ["classes", 3]])
    multiply_adds = (
        512**2 * 9 * (3 * 4 + 4 * 4)  # encoder 1
        + 256**2 * 9 * (4 * 8 + 8 * 8)  # encoder 2
        + 128**2 * 9 * (8 * 4 + 4 * 4)  # decoder 1
        + 128**2 * 9 * 4 * 4  # its up-sampling: each input value meets each kernel value once
        + 256**2 * 9 * (8 * 4 + 4 * 4)  # decoder 2, on 4 channels and a skip of 4
        + 256**2 * 9 * 4 * 4  # its up-sampling to the 4 classes
    )
    last = summarise(model, in_channels=3, size=512).splitlines()[-1]
    assert last == f"{2 * multiply_adds / 1e9:.3f} GFLOP per 512×512 image"


def test_command_line_prints_stages_total_and_flop(script) -> None:
    done = script("model.py", "--config", "configs/tuned.yaml", "--set", "in_channels=4")
    assert done.returncode == 0, done.stderr
    header, *lines, flop = done.stdout.splitlines()
    assert header.split() == ["stage", "output", "parameters"]
    *stages, total = (line.replace(",", "").split() for line in lines)
    assert total == ["total", "513452"]
    assert sum(int(stage[-1]) for stage in stages) == 513_452
    # conv: in·out·9 weights and a bias a channel; batch norm: two values a channel.
    expected = [(4, 16, 128), (16, 32, 64), (32, 64, 32), (64, 128, 16)]
    for number, (stage, (before, after, side)) in enumerate(
        zip(stages[:4], expected, strict=True), start=1
    ):
        count = 9 * (before + after) * after + 6 * after
        assert stage == ["encoder", str(number), f"{after}×{side}×{side}", str(count)]
    assert stages[4] == ["decoder", "1", "64×8×8", str(9 * (128 + 64) * 64 + 6 * 64)]
    assert stages[-1] == ["decoder", "4", "up", "4×128×128", str(9 * 4 * 4 + 4)]
    assert flop.endswith(" GFLOP per 128×128 image") and float(flop.split()[0]) > 0.1


# ---- checkpoints, device, precision

CPU = torch.device("cpu")


def checkpoint(path: Path) -> dict:
    """Save a checkpoint of a small model; returns what was saved."""
    names = ["encoder=[[4, 3], [4, 3]]", "decoder=[[4, 3], [4, 3]]", "precision=float32"]
    config = load_config([], names)
    content = {"config": config, "model": build_model(config).state_dict(), "data_digest": "a"}
    save_checkpoint(path, content)
    return content


def test_checkpoint_comes_back(tmp_path: Path) -> None:
    saved = checkpoint(tmp_path / "a.pt")
    model, content = restore_model(tmp_path / "a.pt", CPU)
    assert not model.training and content["config"] == saved["config"]
    for key, value in model.state_dict().items():
        assert torch.equal(value, saved["model"][key])


def test_config_of_an_older_checkpoint_is_completed(tmp_path: Path) -> None:
    saved = checkpoint(tmp_path / "a.pt")
    older = {k: v for k, v in saved["config"].items() if k != "jitter"} | {"device": "auto"}
    save_checkpoint(tmp_path / "b.pt", saved | {"config": older})
    assert read_checkpoint(tmp_path / "b.pt", CPU)["config"] == saved["config"]


def test_shipped_weights_load(capfd: pytest.CaptureFixture) -> None:
    model, content = restore_model(ROOT / "weights/best.pt", CPU)
    pick_precision(pick_device("cpu"), content["config"]["precision"])
    assert list(content["config"]["classes"]) == ["background", "square", "triangle", "circle"]
    assert count_parameters(model) == 1_035_908
    assert capfd.readouterr() == ("", "")  # loading a model prints nothing


class Hostile:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("owned"),))


def test_hostile_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "flying-objects-segmentation 1", "model": Hostile()}, "a.pt")
    Path("b.pt").write_bytes(pickle.dumps(Hostile()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(UserError, match=name):
            read_checkpoint(Path(name), CPU)
    assert not Path("owned").exists()


def test_damaged_checkpoint_is_one_line(tmp_path: Path) -> None:
    checkpoint(tmp_path / "a.pt")
    path = tmp_path / "b.pt"
    for data in corruptions((tmp_path / "a.pt").read_bytes()):
        path.write_bytes(data)
        try:
            model, _ = restore_model(path, CPU)
            assert model(pictures(1, 3, 8, 8)).shape == (1, 4, 8, 8)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_device_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"device tpu: PyTorch finds .*cpu"):
        pick_device("tpu")
    assert pick_device("cpu") == CPU


def test_receptive_radius_is_as_far_as_a_change_is_seen() -> None:
    for skip in ("pooled", "full"):
        model, side = small(skip), 96
        images = pictures(1, 3, side, side)
        changed = images.clone()
        changed[..., side // 2, side // 2] += 1
        with torch.no_grad():
            seen = (model(changed) != model(images)).any(dim=1)[0].nonzero() - side // 2
        assert seen.abs().max() <= model.receptive_radius <= 2 * seen.abs().max()
        assert model.receptive_radius % model.stride == 0 and model.stride == 4
