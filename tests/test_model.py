"""Tests of model.py: the architecture written out, its summary, an architecture of another kind."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from torch import Tensor, nn

from common import ROOT, UserError
from config import load_config
from model import (
    UNet,
    bilinear_start_applies,
    build_model,
    count_parameters,
    main,
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
    both = small(decoder=LAB_HEAD, upsampling_init="bilinear", background_bias=1.5)
    assert both.up[-1].bias.tolist() == [1.5, 0, 0, 0]


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
    monkeypatch.setattr("checkpoints.build_model", build_plain)
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
