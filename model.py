"""The U-Net of the lab and its variants; its checkpoints; where and how precisely it computes.

    python model.py --config configs/tuned.yaml [--set key=value ...]

prints the stages, their output sizes, the parameters and the GFLOP per image.
"""

import argparse
import contextlib
import ctypes
import io
import zipfile
from pathlib import Path

from common import UserError, reading, run, write_atomically

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from config import add_arguments, load_config

FORMAT = "flying-objects-segmentation 1"  # of checkpoints


def double_conv(in_channels: int, out_channels: int, kernel: int, dropout: float) -> nn.Sequential:
    """Twice (conv, batch norm, ReLU) at the same resolution, then channel dropout if asked for."""
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        conv = nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2)
        layers += [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *[nn.Dropout2d(dropout)] * (dropout > 0))


class UNet(nn.Module):
    """Encoder stages that halve the resolution, decoder stages that double it, skips between.

    Args:
        in_channels, num_classes: channels of an image; number of classes C, background included.
        encoder: [channels, kernel] of each encoder stage: double conv, then 3×3 max-pool, stride 2.
        decoder: the same of each decoder stage: double conv, then a transposed conv that doubles
            the resolution; the last one maps to the C classes. "classes" stands for C channels: the
            lab's last stage, a bottleneck behind a ReLU in which whole classes can die.
        skip: what a decoder stage sees of the encoder: "pooled" (the lab), the output after
            pooling; or "full", the features before it (Ronneberger et al. 2015, arXiv:1505.04597),
            with one more decoder stage, at full resolution, which ends in a 1×1 conv.
        dropout: probability of dropping a channel after each double conv, in [0, 1).
        upsampling_init: how a transposed conv from C channels to C classes starts: "random"
            (PyTorch's), or "bilinear", each channel wired to its own class (Long et al. 2015,
            arXiv:1411.4038), which keeps the classes of the lab's heads alive.

    UserError if a stage is not [channels, odd kernel], or the numbers of stages do not fit.
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
        for key, stages in (("encoder", encoder), ("decoder", decoder)):
            advice = "give [channels, odd kernel] for each stage, as in [[16, 3], [32, 3]]"
            with reading(key, advice):
                for width, kernel in stages:
                    sizes = {kernel, 1 if (key, width) == ("decoder", "classes") else width}
                    if any(type(n) is not int or n < 1 for n in sizes) or kernel % 2 == 0:
                        raise ValueError(f"[{width}, {kernel}] is no stage")
        decoder = [(num_classes if w == "classes" else w, kernel) for w, kernel in decoder]
        if not encoder or len(decoder) != len(encoder) + (skip == "full"):
            wanted = "one stage more than" if skip == "full" else "as many stages as"
            raise UserError(f"decoder: with skip: {skip} it needs {wanted} the encoder")
        self.skip, channels, skip_widths = skip, in_channels, []
        self.encoder, self.decoder, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        for width, kernel in encoder:
            self.encoder.append(double_conv(channels, width, kernel, dropout))
            skip_widths.append(width if skip == "full" else channels)
            channels = width
        for i, (width, kernel) in enumerate(decoder):
            if i > 0:  # the first works on the deepest pooled features alone
                channels += skip_widths.pop()
            self.decoder.append(double_conv(channels, width, kernel, dropout))
            if i == len(encoder):  # with skip: full, at full resolution
                self.up.append(nn.Conv2d(width, num_classes, 1))
            else:
                out = num_classes if i == len(decoder) - 1 else width
                self.up.append(nn.ConvTranspose2d(width, out, 3, 2, padding=1, output_padding=1))
            channels = width
        if upsampling_init == "bilinear" and channels == num_classes and skip == "pooled":
            hat = torch.tensor([0.5, 1.0, 0.5])  # up-samples each channel by itself, bilinearly
            self.up[-1].weight.data = torch.eye(channels)[:, :, None, None] * hat[:, None] * hat
            nn.init.zeros_(self.up[-1].bias)

        self.stride = 2 ** len(encoder)  # pixels of the input under one of the deepest features
        # Pixels that a logit sees on each side: two convs (kernel // 2 each) and a pooling or
        # up-sampling (1) make a kernel at the scale of each stage; rounded up to the stride.
        depth, stages = len(encoder), enumerate((*encoder, *decoder))
        reach = sum(2 ** (depth - abs(depth - i)) * kernel for i, (_, kernel) in stages)
        self.receptive_radius = -(-reach // self.stride) * self.stride

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (N, C, H, W) of images (N, in_channels, H, W) in [0, 1], of any size."""
        height, width = images.shape[-2:]
        # Replicated borders look like the image going on; zeros would look like a black object.
        pad_h, pad_w = -height % self.stride, -width % self.stride
        x = images * 2 - 1  # centred, so that the zero padding of the convs is neither colour
        if torch.compiler.is_exporting() or pad_h or pad_w:  # a program has no branches
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


def build_model(config: dict) -> UNet:
    """Build the model that a config describes, with fresh weights."""
    keys = ("in_channels", "encoder", "decoder", "skip", "dropout", "upsampling_init")
    return UNet(num_classes=len(config["classes"]), **{key: config[key] for key in keys})


def count_parameters(model: nn.Module) -> int:
    """Count the values that training changes."""
    return sum(p.numel() for p in model.parameters())


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write `config`, `model` (a state dict) and whatever else, plain data and tensors."""
    file = io.BytesIO()  # in memory first: on a full disk torch.save's own error is unreadable
    torch.save({"format": FORMAT, **checkpoint}, file)
    write_atomically(path, file.getvalue())


def read_checkpoint(path: Path, device: torch.device) -> dict:
    """Read what `save_checkpoint` was given; UserError if damaged. Nothing in it is executed."""
    with reading(path, "give a .pt file that train.py wrote, or remove it"):
        if damaged := zipfile.ZipFile(path).testzip():  # torch.load does not look
            raise ValueError(f"{damaged} in it is damaged")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        if checkpoint["format"] != FORMAT:
            raise ValueError(f"its format is {checkpoint['format']}, not {FORMAT}")
        stored, default = checkpoint["config"], load_config([])
        checkpoint["config"] = {key: stored.get(key, default[key]) for key in default}
    return checkpoint


def restore_model(path: Path, device: torch.device) -> tuple[UNet, dict]:
    """Restore the model of a checkpoint, in evaluation mode; returns it and the checkpoint."""
    checkpoint = read_checkpoint(path, device)
    with reading(path, "give a .pt file that this version of the project wrote"):
        model = build_model(checkpoint["config"])
        model.load_state_dict(checkpoint["model"])
        model.to(device, memory_format=torch.channels_last)
    return model.eval(), checkpoint


def pick_device(name: str) -> torch.device:
    """Pick "cpu", "cuda", "mps" …, for "auto" what PyTorch finds; UserError if it is not there."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    there = {"cpu"} | ({found.type} if found else set())
    if name not in there | {"auto"}:
        raise UserError(f"device {name}: PyTorch finds {', '.join(sorted(there))}; use DEVICE=cpu")
    return torch.device((found.type if found else "cpu") if name == "auto" else name)


def pick_precision(device: torch.device, name: str) -> torch.dtype:
    """Pick the autocast dtype: "auto" takes bfloat16 where it is native; emulated, it is slow."""
    if name != "auto":
        return getattr(torch, name)
    has = {"bf16": device.type == "cuda" and torch.cuda.is_bf16_supported(False)}
    if device.type == "cpu":
        has = getattr(torch.cpu, "get_capabilities", dict)()  # not in older releases
    native = any(has.get(key) for key in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
    return torch.bfloat16 if native else torch.float32


def keep_memory(keep: bool = True) -> None:
    """Keep the memory that a step frees for the next one, or not, where the C library is glibc."""
    # By default glibc gives every large block back to the system, which zeroes it before it hands
    # it out again: a tenth of a step of the wide models, more in float32.
    with contextlib.suppress(OSError, AttributeError):  # another library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0 if keep else 1 << 16)  # M_MMAP_MAX: blocks that are mapped by themselves
        mallopt(-1, -1 if keep else 1 << 17)  # M_TRIM_THRESHOLD: the heap shrinks from so much on


def main() -> None:
    parser = argparse.ArgumentParser(description="Print a summary of the model of a config.")
    add_arguments(parser)
    parser.add_argument("--size", type=int, default=128, help="side of the image in pixels")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    model, shapes = build_model(config).eval(), {}  # of the stages, in the order of their use
    kinds = {"encoder {}": model.encoder, "decoder {}": model.decoder, "decoder {} up": model.up}
    names = {stage: kind.format(i) for kind, of in kinds.items() for i, stage in enumerate(of, 1)}
    for stage in names:
        stage.register_forward_hook(lambda key, _, output: shapes.update({key: output.shape[1:]}))
    with FlopCounterMode(display=False) as flops, torch.inference_mode():
        model(torch.zeros(1, config["in_channels"], args.size, args.size))
    line = "{:<14}{:>14}{:>14}"
    print(line.format("stage", "output", "parameters"))
    for stage, shape in shapes.items():
        print(line.format(names[stage], "×".join(map(str, shape)), f"{count_parameters(stage):,}"))
    print(line.format("total", "", f"{count_parameters(model):,}"))
    print(f"{flops.get_total_flops() / 1e9:.3f} GFLOP per {args.size}×{args.size} image (convs)")


if __name__ == "__main__":
    run(main)
