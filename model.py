"""The U-Net of the lab and its variants: one class, driven by the config.

    python model.py --config configs/tuned.yaml [--set key=value ...]

prints the stages, their output sizes, the parameters and the GFLOP per image.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import add_arguments, load_config
from errors import run


def double_conv(in_channels: int, out_channels: int, kernel: int, dropout: float) -> nn.Sequential:
    """Twice (conv, batch norm, ReLU) at the same resolution, then channel dropout if asked for."""
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        layers += [
            nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        ]
    if dropout > 0:
        layers.append(nn.Dropout2d(dropout))
    return nn.Sequential(*layers)


def start_bilinear(up: nn.ConvTranspose2d) -> None:
    """Set a 3×3, stride 2 transposed conv to bilinear up-sampling of each channel by itself."""
    hat = torch.tensor([0.5, 1.0, 0.5])
    with torch.no_grad():
        up.weight.zero_()
        up.bias.zero_()
        for channel in range(up.in_channels):
            up.weight[channel, channel] = hat[:, None] * hat


class UNet(nn.Module):
    """Encoder stages that halve the resolution, decoder stages that double it, skips between.

    Args:
        in_channels: channels of an image (3 for RGB, 4 for RGBA, 1 for grey).
        num_classes: number of classes C, background included.
        encoder: (channels, kernel) of each encoder stage: double conv, then 3×3 max-pool, stride 2.
        decoder: (channels, kernel) of each decoder stage: double conv, then a transposed conv that
            doubles the resolution. The last up-sampling maps to the C classes. The word "classes"
            stands for C channels: as the lab had it in its last stage, where the features then
            squeeze through a ReLU only C channels wide and whole classes can die.
        skip: what a decoder stage sees of the encoder. "pooled" (the lab): the output after
            pooling, so nothing of the full resolution reaches the classes; one decoder stage per
            encoder stage. "full": the features before pooling, as in Ronneberger et al. 2015
            (arXiv:1505.04597); needs one more decoder stage, which works at full resolution and
            ends in a 1×1 conv.
        dropout: probability of dropping a channel after each double conv, in [0, 1).
        upsampling_init: how a transposed conv that maps n channels to n classes starts. "random":
            PyTorch's. "bilinear": as bilinear up-sampling, each channel wired to its own class
            (Long et al. 2015, arXiv:1411.4038); it keeps the classes of the lab's heads alive.
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
    ) -> None:
        super().__init__()
        widths = [num_classes if width == "classes" else int(width) for width, _ in decoder]
        self.skip = skip
        self.encoder = nn.ModuleList()
        channels = in_channels
        for width, kernel in encoder:
            self.encoder.append(double_conv(channels, width, kernel, dropout))
            channels = width
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

        # The first decoder stage works on the deepest pooled features alone; each later one also
        # on the skip of its own resolution, which for "pooled" starts one stage further out.
        skip_widths = [width for width, _ in encoder][::-1]
        skip_widths = [0, *(skip_widths if skip == "full" else skip_widths[1:])]
        self.decoder, self.up = nn.ModuleList(), nn.ModuleList()
        for i, (width, skip_width) in enumerate(zip(widths, skip_widths, strict=True)):
            last = i == len(widths) - 1
            self.decoder.append(double_conv(channels + skip_width, width, decoder[i][1], dropout))
            out = num_classes if last else width
            if last and skip == "full":
                self.up.append(nn.Conv2d(width, out, 1))
            else:
                self.up.append(
                    nn.ConvTranspose2d(width, out, 3, stride=2, padding=1, output_padding=1)
                )
            channels = width
        if upsampling_init == "bilinear" and widths[-1] == num_classes and skip == "pooled":
            start_bilinear(self.up[-1])

    def forward(self, images: Tensor) -> Tensor:
        """Logits for a batch of images of any size.

        Args:
            images: (N, in_channels, H, W) float in [0, 1].

        Returns:
            (N, C, H, W) logits, of the dtype that autocast chooses.
        """
        height, width = images.shape[-2:]
        multiple = 2 ** len(self.encoder)
        # Replicated borders look like the image going on; zeros would look like a black object.
        pad_h, pad_w = -height % multiple, -width % multiple
        x = images * 2 - 1  # centred, so that the zero padding of the convs is neither colour
        if pad_h or pad_w:
            x = F.pad(x, (0, pad_w, 0, pad_h), mode="replicate")

        skips = []
        for stage in self.encoder:
            features = stage(x)
            x = self.pool(features)
            skips.append(features if self.skip == "full" else x)
        if self.skip == "pooled":
            skips.pop()  # the deepest pooled features are the decoder's own input
        for i, (stage, up) in enumerate(zip(self.decoder, self.up, strict=True)):
            if i > 0:
                x = torch.cat([x, skips.pop()], dim=1)
            x = up(stage(x))
        return x[..., :height, :width]


def build_model(config: dict) -> UNet:
    """The model that a config describes, with fresh weights."""
    return UNet(
        in_channels=config["in_channels"],
        num_classes=len(config["classes"]),
        encoder=config["encoder"],
        decoder=config["decoder"],
        skip=config["skip"],
        dropout=config["dropout"],
        upsampling_init=config["upsampling_init"],
    )


def summarise(model: UNet, in_channels: int, size: int) -> str:
    """Stages with their output sizes, parameters, and GFLOP of one size×size image.

    A multiply-add counts as two operations; only convolutions count, as in
    torch.utils.flop_counter.
    """
    from torch.utils.flop_counter import FlopCounterMode  # slow to import, needed only here

    rows: list[tuple[str, str, int]] = []

    def note(name: str, module: nn.Module) -> None:
        parameters = sum(p.numel() for p in module.parameters())
        module.register_forward_hook(
            lambda _module, _inputs, out: rows.append(
                (name, "×".join(map(str, out.shape[1:])), parameters)
            )
        )

    for i, stage in enumerate(model.encoder):
        note(f"encoder {i + 1}", stage)
    for i, (stage, up) in enumerate(zip(model.decoder, model.up, strict=True)):
        note(f"decoder {i + 1}", stage)
        note(f"decoder {i + 1} up" if isinstance(up, nn.ConvTranspose2d) else "classes", up)
    with FlopCounterMode(display=False) as flops, torch.inference_mode():
        model.eval()(torch.zeros(1, in_channels, size, size))
    lines = [f"{'stage':<14}{'output':>14}{'parameters':>14}"]
    lines += [f"{name:<14}{shape:>14}{parameters:>14,}" for name, shape, parameters in rows]
    lines.append(f"{'total':<14}{'':>14}{count_parameters(model):>14,}")
    lines.append(f"{flops.get_total_flops() / 1e9:.3f} GFLOP per {size}×{size} image")
    return "\n".join(lines)


def count_parameters(model: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print a summary of the model of a config.")
    add_arguments(parser)
    parser.add_argument("--size", type=int, default=128, help="side of the image in pixels")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    print(summarise(build_model(config), config["in_channels"], args.size))


if __name__ == "__main__":
    run(main)
