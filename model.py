"""The U-Net of the lab and its variants.

    python model.py --config configs/tuned.yaml [--set key=value ...]

prints the stages, their output sizes, the parameters and the GFLOP per image.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import UserError, run
from config import add_arguments, load_config

# ---- the model


def double_conv(in_channels: int, out_channels: int, kernel: int, dropout: float) -> nn.Sequential:
    """Make two rounds of conv, batch norm and ReLU that keep the resolution.

    With `dropout` > 0 whole channels of the result are dropped with that probability.
    """
    layers = []
    for channels in (in_channels, out_channels):
        layers.append(nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2))
        layers.append(nn.BatchNorm2d(out_channels))
        layers.append(nn.ReLU(inplace=True))
    if dropout > 0:
        layers.append(nn.Dropout2d(dropout))
    return nn.Sequential(*layers)


def double_resolution(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    """Make the transposed conv that turns (N, in, H, W) into (N, out, 2H, 2W)."""
    return nn.ConvTranspose2d(
        in_channels, out_channels, kernel_size=3, stride=2, padding=1, output_padding=1
    )


class UNet(nn.Module):
    """Encoder stages that halve the resolution, decoder stages that double it, skips between.

    Args:
        in_channels: channels of an image.
        num_classes: number of classes C, background included.
        encoder: [channels, kernel] of each encoder stage: double conv, then 3×3 max-pool, stride 2.
        decoder: [channels, kernel] of each decoder stage: double conv, then a transposed conv that
            doubles the resolution. The last transposed conv has C output channels, one for each
            class. "classes" stands for C channels. The lab's last stage has C. All classes
            must then pass a ReLU on one channel each, and some end up never predicted.
        skip: what a decoder stage sees of the encoder. "pooled" (the lab): the features after
            pooling. "full": the features before pooling (Ronneberger et al. 2015,
            arXiv:1505.04597), with one more decoder stage, at full resolution, and a 1×1 conv at
            its end.
        dropout: probability of dropping a channel after each double conv, in [0, 1).
        upsampling_init: how the last transposed conv starts. "random": as PyTorch does. "bilinear":
            each channel is up-sampled into its own class (Long et al. 2015, arXiv:1411.4038), which
            keeps the lab's models predicting all classes. See `bilinear_start_applies`.
        background_bias: added to the bias of the first class in the last layer. Most pixels are
            background. A model that expects it from the start need not learn to push the other
            classes down, which is how narrow last stages lose them (the idea: Lin et al. 2017,
            arXiv:1708.02002, section 4.1).

    UserError if a stage is not [channels, odd kernel], or if there are too many or too few.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        encoder: list[tuple[int, int]],
        decoder: list[tuple[int | str, int]],
        skip: str,
        dropout: float,
        upsampling_init: str,
        background_bias: float,
    ) -> None:
        super().__init__()
        check_stages(encoder, decoder, skip)
        self.skip = skip
        self.encoder = nn.ModuleList()
        self.decoder = nn.ModuleList()
        self.up = nn.ModuleList()
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

        # The encoder. Each stage also leaves a skip for the decoder.
        channels = in_channels
        skip_channels = []
        for width, kernel in encoder:
            self.encoder.append(double_conv(channels, width, kernel, dropout))
            if skip == "full":
                skip_channels.append(width)  # its features
            else:
                skip_channels.append(channels)  # its input, pooled by the stage before
            channels = width

        # The decoder. Its first stage sees only the deepest features, the others a skip as well.
        for i, (width, kernel) in enumerate(decoder):
            if width == "classes":
                width = num_classes
            if i > 0:
                channels += skip_channels.pop()
            self.decoder.append(double_conv(channels, width, kernel, dropout))
            is_last = i == len(decoder) - 1
            out_channels = num_classes if is_last else width
            if i == len(encoder):  # the extra stage of skip: full
                self.up.append(nn.Conv2d(width, out_channels, kernel_size=1))
            else:
                self.up.append(double_resolution(width, out_channels))
            channels = width

        if upsampling_init == "bilinear" and bilinear_start_applies(self):
            start_bilinear(self.up[-1])
        with torch.no_grad():
            self.up[-1].bias[0] += background_bias

        # Pixels of the input along one side of a deepest feature.
        self.stride = 2 ** len(encoder)
        # Pixels that a logit sees on each side, rounded up to a multiple of the stride.
        reach = receptive_reach(encoder, decoder)
        self.receptive_radius = math.ceil(reach / self.stride) * self.stride

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (N, C, H, W) of images (N, in_channels, H, W) in [0, 1], of any size."""
        height, width = images.shape[-2:]
        # Replicated borders look like the image going on; zeros would look like a black object.
        pad_h, pad_w = -height % self.stride, -width % self.stride
        x = images * 2 - 1  # from −1 to 1: the convs pad with 0, which is neither black nor white
        if torch.compiler.is_exporting() or pad_h or pad_w:  # an exported program always pads
            x = F.pad(x, (0, pad_w, 0, pad_h), mode="replicate")

        skips = []
        for stage in self.encoder:
            features = stage(x)
            skips.append(features if self.skip == "full" else x)  # x: pooled by the stage before
            x = self.pool(features)
        for i, (stage, up) in enumerate(zip(self.decoder, self.up, strict=True)):
            if i > 0:
                x = torch.cat([x, skips.pop()], dim=1)
            x = up(stage(x))
        return x[..., :height, :width]


def check_stages(encoder: list, decoder: list, skip: str) -> None:
    """Check the stages of a config; UserError names the key and what is wrong."""
    for key, stages in (("encoder", encoder), ("decoder", decoder)):
        for stage in stages:
            if not is_stage(stage, may_name_classes=key == "decoder"):
                advice = "give [channels, odd kernel] for each stage, as in [[16, 3], [32, 3]]"
                raise UserError(f"{key}: {stage!r} is not a stage; {advice}")
    if not encoder:
        raise UserError("encoder: has no stage; give at least one, as in [[16, 3]]")
    if skip == "full" and len(decoder) != len(encoder) + 1:
        raise UserError("decoder: with skip: full it needs one stage more than the encoder")
    if skip == "pooled" and len(decoder) != len(encoder):
        raise UserError("decoder: with skip: pooled it needs as many stages as the encoder")


def is_stage(stage: object, may_name_classes: bool) -> bool:
    """Tell whether a stage is [channels, odd kernel], or ["classes", odd kernel] if allowed."""
    if not isinstance(stage, (list, tuple)) or len(stage) != 2:
        return False
    width, kernel = stage
    if type(kernel) is not int or kernel < 1 or kernel % 2 == 0:
        return False
    if width == "classes":
        return may_name_classes
    return type(width) is int and width >= 1


def bilinear_start_applies(model: nn.Module) -> bool:
    """Tell whether `upsampling_init: bilinear` has an effect on a model.

    It has one where the last layer of a U-Net is a transposed conv from C channels to C classes:
    with skip: pooled and a last decoder stage of `classes` channels. Other models start as usual.
    """
    if not isinstance(model, UNet):
        return False
    last = model.up[-1]
    return isinstance(last, nn.ConvTranspose2d) and last.in_channels == last.out_channels


def start_bilinear(layer: nn.ConvTranspose2d) -> None:
    """Set the weights of a transposed conv, C to C channels, so that it interpolates bilinearly."""
    hat = torch.tensor([0.5, 1.0, 0.5])
    kernel = hat[:, None] * hat  # (3, 3)
    own_channel_only = torch.eye(layer.in_channels)[:, :, None, None]  # (C, C, 1, 1)
    with torch.no_grad():
        layer.weight.copy_(own_channel_only * kernel)
        layer.bias.zero_()


def receptive_reach(encoder: list, decoder: list) -> int:
    """Add up how many pixels of the input a logit sees on each side of its own.

    Each stage sees `kernel` pixels of its own resolution: `kernel // 2` for each of its two convs,
    and one more for the pooling or the up-sampling.
    """
    reach = 0
    scale = 1  # pixels of the input along one side of a pixel of the stage
    for _, kernel in encoder:
        reach += scale * kernel
        scale *= 2
    for _, kernel in decoder:
        reach += scale * kernel
        scale //= 2
    return reach


def build_model(config: dict) -> nn.Module:
    """Build the model that a config describes, with fresh weights from torch's generator.

    To add an architecture, write its class, give it a name for the key `model`, and add an `if`
    here that returns it. Settings of its own are keys in configs/default.yaml. It need not be a
    U-Net. Every script then trains, scores and uses it, if it is an nn.Module that has

        forward(images): images (N, in_channels, H, W) in [0, 1] → logits (N, C, H, W), of the same
            height and width, for the C classes of the config
        stride: pixels along one side of the image that one of its deepest features stands for, a
            power of two; 1 if nothing is pooled. Rather too large than too small
        receptive_radius: how many pixels a logit sees on each side of its own, rounded up to a
            multiple of the stride. predict.py adds this margin around each tile of a large image;
            too small a margin leaves seams.

    If training starts from other weights (`init`), the last layer that the class makes must be the
    one that gives the logits.

    UserError if `model` is no name that is known here.
    """
    if config["model"] == "unet":
        return UNet(
            in_channels=config["in_channels"],
            num_classes=len(config["classes"]),
            encoder=config["encoder"],
            decoder=config["decoder"],
            skip=config["skip"],
            dropout=config["dropout"],
            upsampling_init=config["upsampling_init"],
            background_bias=config["background_bias"],
        )
    raise UserError(f"model: is {config['model']}; name one that build_model in model.py returns")


def count_parameters(model: nn.Module) -> int:
    """Count the values of all parameters, also of those that you froze."""
    return sum(parameter.numel() for parameter in model.parameters())


# ---- the summary


def list_stages(model: nn.Module) -> dict[str, nn.Module]:
    """List the parts of a model by the names that the summary shows: of a U-Net in order of use."""
    if not isinstance(model, UNet):
        return dict(model.named_children())
    stages = {}
    for i, stage in enumerate(model.encoder, start=1):
        stages[f"encoder {i}"] = stage
    for i, (stage, up) in enumerate(zip(model.decoder, model.up, strict=True), start=1):
        stages[f"decoder {i}"] = stage
        stages[f"decoder {i} up"] = up
    return stages


def record_shapes(model: nn.Module, stages: dict[str, nn.Module], images: Tensor) -> dict[str, str]:
    """Run a model once and record the output of each stage: its name → "channels×height×width".

    A stage that is not called, such as a list of layers, or gives no tensor has no shape.
    """
    shapes = dict.fromkeys(stages.values(), "–")

    def record(stage: nn.Module, _inputs: tuple, output: object) -> None:
        if isinstance(output, Tensor):
            shapes[stage] = "×".join(str(size) for size in output.shape[1:])

    for stage in stages.values():
        stage.register_forward_hook(record)
    with torch.inference_mode():
        model(images)
    return {name: shapes[stage] for name, stage in stages.items()}


def main() -> None:
    # Imported here, since loading it takes time that other scripts need not spend.
    from torch.utils.flop_counter import FlopCounterMode

    parser = argparse.ArgumentParser(description="Print a summary of the model of a config.")
    add_arguments(parser)
    parser.add_argument("--size", type=int, default=128, help="side of the image in pixels")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    model = build_model(config).eval()

    stages = list_stages(model)
    images = torch.zeros(1, config["in_channels"], args.size, args.size)
    with FlopCounterMode(display=False) as counter:
        shapes = record_shapes(model, stages, images)

    print(f"{'stage':<14}{'output':>14}{'parameters':>14}")
    for name, stage in stages.items():
        print(f"{name:<14}{shapes[name]:>14}{count_parameters(stage):>14,}")
    print(f"{'total':<14}{'':>14}{count_parameters(model):>14,}")
    gflop = counter.get_total_flops() / 1e9
    print(f"{gflop:.3f} GFLOP per {args.size}×{args.size} image (convs)")


if __name__ == "__main__":
    run(main)
