"""Predict the classes of any images, or write the model for use elsewhere.

    python predict.py [--checkpoint CHECKPOINT] IMAGE… --out DIR [--probabilities]
    python predict.py [--checkpoint CHECKPOINT] --export FILE.pt2
    python predict.py --checkpoint CHECKPOINT --slim FILE.pt

IMAGE is a file or a folder, searched with all folders in it. Writes NAME_mask.png, a palette file
whose indices are the classes and whose colours are those of the masks, NAME_overlay.png, and
contact_sheet.png of all. In Python:

    from predict import load_model, predict_mask
    model, config = load_model("weights/best.pt")
    mask = predict_mask(model, config, "photo.jpg")  # (H, W) uint8 class indices
"""

import argparse
import io
import itertools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from augment import to_float
from checkpoint import load_checkpoint, restore_model, save_checkpoint
from device import autocast, pick_device, pick_precision
from errors import UserError, run
from files import write_atomically
from images import contact_sheet, overlay, palette, png, read_image, resize, thumbnails

WEIGHTS = Path(__file__).parent / "weights" / "best.pt"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
TILE = 1024  # pixels a side of what is predicted at once: activations take no more memory than that
SHEET = 48  # images on the contact sheet at most, evenly chosen


def load_model(checkpoint: str | Path, device: str = "auto") -> tuple[nn.Module, dict]:
    """The model of a checkpoint, in evaluation mode, and its config.

    Raises:
        UserError: the checkpoint cannot be read; there is no such device.
    """
    where = pick_device(device)
    content = load_checkpoint(Path(checkpoint), where)
    return restore_model(content, Path(checkpoint), where), content["config"]


def margin_of(config: dict) -> int:
    """Pixels by which the input of a pixel's logits can be away from it, rounded up to the stages.

    Twice a kernel's reach at each stage of encoder and decoder, and one for pooling or up-sampling.
    """
    stages = len(config["encoder"])
    reach = sum(2**i * (2 * (kernel // 2) + 1) for i, (_, kernel) in enumerate(config["encoder"]))
    for i, (_, kernel) in enumerate(config["decoder"]):
        reach += 2 ** (stages - i) * (2 * (kernel // 2) + 1)
    return -(-reach // 2**stages) * 2**stages


@torch.inference_mode()
def infer(model: nn.Module, config: dict, image: Tensor, reduce: Callable) -> Tensor:
    """Run a model over one image of any size, tile by tile.

    Args:
        model, config: see `load_model`.
        image: (channels, H, W) uint8.
        reduce: maps float32 logits (1, C, h, w) to what is kept of them, (1, k, h, w).

    Returns:
        (k, H, W), of the type that `reduce` gives, on the CPU. Where the config resizes images, so
        is this one; its logits are interpolated back to H×W.
    """
    device = next(model.parameters()).device
    dtype = pick_precision(device, config["precision"])
    height, width = image.shape[1:]
    # What the model sees around a tile: as far as its receptive field reaches, see `margin_of`.
    margin = margin_of(config)
    if config["resize"]:
        image = resize(image, config["resize"], smooth=True)
    rows = []
    for top in range(0, image.shape[1], TILE):
        row = []
        for left in range(0, image.shape[2], TILE):
            y, x = max(0, top - margin), max(0, left - margin)
            tile = image[None, :, y : top + TILE + margin, x : left + TILE + margin]
            with autocast(device, dtype):
                logits = model(to_float(tile.to(device))).float()
            inner = logits[..., top - y :, left - x :][..., :TILE, :TILE]
            row.append(inner if config["resize"] else reduce(inner).cpu())
        rows.append(torch.cat(row, dim=3))
    result = torch.cat(rows, dim=2)
    if config["resize"]:
        result = reduce(F.interpolate(result, (height, width), mode="bilinear")).cpu()
    return result[0]


def as_tensor(path: str | Path, config: dict) -> Tensor:
    """An image file as (channels, H, W) uint8; UserError if it cannot be read."""
    pixels = read_image(Path(path), config["in_channels"])
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def predict_mask(model: nn.Module, config: dict, image: str | Path | Tensor) -> Tensor:
    """(H, W) uint8 class indices of an image: a file, or (channels, H, W) uint8.

    Raises:
        UserError: the file cannot be read.
    """
    image = image if isinstance(image, Tensor) else as_tensor(image, config)
    return infer(model, config, image, lambda z: z.argmax(1, keepdim=True).to(torch.uint8))[0]


def predict_probabilities(model: nn.Module, config: dict, image: str | Path | Tensor) -> Tensor:
    """(C, H, W) float32 probabilities of the classes, in [0, 1]; `image` as in `predict_mask`."""
    image = image if isinstance(image, Tensor) else as_tensor(image, config)
    return infer(model, config, image, lambda logits: logits.softmax(dim=1))


class Exportable(nn.Module):
    """A model with its normalisation: (N, channels, H, W) uint8 to (N, C, H, W) float32 logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.multiple = 2 ** len(model.encoder)

    def forward(self, images: Tensor) -> Tensor:
        # Padded here and without a condition, as the model pads, since an exported program has no
        # branches: the model then finds nothing left to pad.
        height, width = images.shape[-2:]
        full_h, full_w = (-(-side // self.multiple) * self.multiple for side in (height, width))
        pad = (0, full_w - width, 0, full_h - height)
        padded = F.pad(images.float() / 255, pad, mode="replicate")
        return self.model(padded)[..., :height, :width]


def export(model: nn.Module, channels: int, path: Path) -> None:
    """Write a `torch.export` program of any batch size, height and width, in float32.

    It takes uint8 images and needs torch alone: `torch.export.load(path).module()(images)`.

    Raises:
        UserError: the file cannot be written, or the program does not do what the model does.
    """
    from torch.fx.experimental import _config  # private, but there is no public name for this yet

    exportable = Exportable(model.to("cpu", memory_format=torch.contiguous_format)).eval()
    example = torch.zeros(2, channels, 50, 70, dtype=torch.uint8)
    any_size = torch.export.Dim.DYNAMIC
    # Without this, a size of one (at the deepest stage) would be taken for a special case.
    with _config.patch(backed_size_oblivious=True), torch.no_grad():
        program = torch.export.export(
            exportable,
            (example,),
            dynamic_shapes={"images": {0: any_size, 2: any_size, 3: any_size}},
        )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(4):
        n, height, width = torch.randint(1, 150, (3,), generator=generator).tolist()
        shape = (n % 3 + 1, channels, height, width)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        with torch.no_grad():
            worst = max(worst, float((loaded(images) - model(to_float(images))).abs().max()))
    if not worst < 1e-3:
        raise UserError(f"{path}: not written: the exported program's logits are {worst} off")
    write_atomically(path, file.getvalue())
    print(
        f"{path}: {len(file.getvalue()) / 2**20:.1f} MiB; checked on four random sizes: logits at "
        f"most {worst:.1e} off\nuse it with torch alone: "
        f"torch.export.load('{path}').module()(images), images (N, {channels}, H, W) uint8"
    )


def slim(checkpoint: Path, path: Path) -> None:
    """Write what a checkpoint needs to predict and be evaluated, its floats in half the bytes."""
    content = load_checkpoint(checkpoint, torch.device("cpu"))
    kept = {k: content[k] for k in ("config", "data_digest", "epoch", "cost") if k in content}
    state = {k: v.half() if v.is_floating_point() else v for k, v in content["model"].items()}
    save_checkpoint(path, kept | {"model": state})
    print(f"{path}: {path.stat().st_size / 2**20:.2f} MiB; next: python evaluate.py {path}")


def find_images(given: list[Path], out: Path) -> dict[str, Path]:
    """Output name → image, for files and all images in folders (but those in `out`).

    The name is that of the file without its suffix; files that would share one get their folders
    and suffix into it.

    Raises:
        UserError: a path is not there, or a folder holds no image.
    """
    paths: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in SUFFIXES]
            inside = [
                p
                for p in inside
                if p.is_file() and p.name[0] != "." and p.resolve().parent != out.resolve()
            ]
            if not inside:
                raise UserError(
                    f"{path}: holds no image ({', '.join(SUFFIXES)}) but what is in {out}"
                )
            paths += inside
        elif path.exists():
            paths.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    paths = list({path.resolve(): path for path in paths}.values())  # given twice: predicted once
    # In lower case, since some file systems do not tell cases apart.
    stems = Counter(path.stem.lower() for path in paths)
    taken = {stem for stem, number in stems.items() if number == 1}
    shared = Path(os.path.commonpath([path.resolve().parent for path in paths]))
    names: dict[str, Path] = {}
    for path in paths:
        name = path.stem
        if stems[name.lower()] > 1:
            folders = path.resolve().parent.relative_to(shared).parts
            base = name = "_".join((*folders, path.stem, path.suffix[1:]))
            for number in itertools.count(2):
                if name.lower() not in taken:
                    break
                name = f"{base}_{number}"
            taken.add(name.lower())
        names[name] = path
    targets = {out / f"{name}_{kind}.png" for name in names for kind in ("mask", "overlay")}
    for target in {out / "contact_sheet.png", *targets}:
        if target.resolve() in {path.resolve() for path in paths}:
            raise UserError(f"{target}: would overwrite an image given; use another --out")
    return names


def write_mask(path: Path, mask: Tensor, classes: dict[str, list[int]]) -> None:
    """Write (H, W) class indices as a palette PNG in the colours of the classes."""
    picture = Image.fromarray(mask.numpy(), mode="P")
    picture.putpalette(palette(classes).flatten().tolist())
    file = io.BytesIO()
    picture.save(file, "PNG")
    write_atomically(path, file.getvalue())


def predict_files(
    model: nn.Module, config: dict, names: dict[str, Path], out: Path, probabilities: bool
) -> None:
    """Predict images one by one and write what the module's docstring lists.

    Raises:
        UserError: an image cannot be read, after all others have been predicted.
    """
    classes = config["classes"]
    on_sheet = {list(names)[i] for i in np.linspace(0, len(names) - 1, SHEET).astype(int)}
    tiles, problems = [], []
    for name, path in (progress := tqdm(names.items(), "predicting", disable=None)):
        try:
            image = as_tensor(path, config)
        except UserError as error:
            problems.append(str(error))
            continue
        if probabilities:
            p = predict_probabilities(model, config, image)
            mask = p.argmax(dim=0).to(torch.uint8)
            file = io.BytesIO()
            np.savez_compressed(file, probabilities=p.numpy(), classes=list(classes))
            write_atomically(out / f"{name}_probabilities.npz", file.getvalue())
        else:
            mask = predict_mask(model, config, image)
        write_mask(out / f"{name}_mask.png", mask, classes)
        write_atomically(out / f"{name}_overlay.png", png(overlay(image, mask, classes)))
        if name in on_sheet:
            tiles.append((name, thumbnails(image, mask, classes)))
        shares = torch.bincount(mask.flatten().int(), minlength=len(classes)) / mask.numel()
        texts = [f"{c} {share:.1%}" for c, share in zip(classes, shares.tolist(), strict=True)]
        progress.write(f"{path}  {mask.shape[1]}×{mask.shape[0]}  {'  '.join(texts)}")
    if tiles:
        rows = [tiles[i : i + 8] for i in range(0, len(tiles), 8)]
        write_atomically(out / "contact_sheet.png", png(contact_sheet(rows, classes)))
        print(f"{len(names) - len(problems)} images; masks and overlays in {out}/, all at a glance")
        print(
            f"in {out / 'contact_sheet.png'}" + f" ({len(tiles)} shown)" * (len(tiles) < len(names))
        )
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        raise UserError(f"{len(problems)} of {len(names)} images could not be read, listed above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="files or folders")
    parser.add_argument("--checkpoint", type=Path, default=WEIGHTS, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("predictions"), metavar="DIR")
    parser.add_argument("--probabilities", action="store_true", help="also NAME_probabilities.npz")
    parser.add_argument("--export", type=Path, metavar="FILE.pt2", help="a torch.export program")
    parser.add_argument("--slim", type=Path, metavar="FILE.pt", help="weights alone, in float16")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    if not (args.images or args.export or args.slim):
        raise UserError("give images or a folder of images: python predict.py photo.jpg --out DIR")
    model, config = load_model(args.checkpoint, args.device)
    if args.export and config["resize"]:
        height, width = config["resize"]
        print(f"note: the program does not resize; give it images of {width}×{height}")
    if args.images:
        names = find_images(args.images, args.out)
        predict_files(model, config, names, args.out, args.probabilities)
    if args.export:
        export(model, config["in_channels"], args.export)
    if args.slim:
        slim(args.checkpoint, args.slim)


if __name__ == "__main__":
    run(main)
