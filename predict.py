"""Predict the classes of any images, or write the model for use elsewhere.

    python predict.py [--checkpoint CHECKPOINT] IMAGE… --out DIR [--probabilities]
    python predict.py [--checkpoint CHECKPOINT] [--export FILE.pt2] [--slim FILE.pt]

IMAGE is a file, or a folder whose folders are searched too and kept below DIR. Writes NAME_mask.png
(a palette file of class indices in the colours of masks), NAME_overlay.png and contact_sheet.png.
"""

import argparse
import io
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import product, repeat
from pathlib import Path

from common import ROOT, UserError, run, write_atomically

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config

from data import evenly, read_image
from evaluate import cost_of, predict_batches
from figures import grid, overlay, save, thumbnail
from model import keep_memory, pick_device, pick_precision, restore_model, save_checkpoint

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
BATCH = 32  # images that are read at once; those of one size are predicted together,
SMALL = 2**18  # unless they hold more values than this,
TILE = 1024  # in tiles of so many pixels a side, so that memory does not grow with the images
SHEET = 48  # images on the contact sheet at most


def load_model(checkpoint: str | Path, device: str = "auto") -> tuple[nn.Module, dict]:
    """Load a model, in evaluation mode, and its config; UserError if that cannot be done."""
    model, content = restore_model(Path(checkpoint), pick_device(device))
    return model, content["config"]


@torch.inference_mode()
def predict(model: nn.Module, config: dict, images: Tensor) -> Tensor:
    """Predict probabilities (N, C, H, W) float32, on the CPU, of (N, channels, H, W) uint8."""
    dtype = pick_precision(next(model.parameters()).device, config["precision"])
    size, margin = images.shape[2:], model.receptive_radius  # what the model sees around a tile
    if config["resize"]:
        images = F.interpolate(images, config["resize"], mode="bilinear", antialias=True)
    logits = torch.empty(len(images), len(config["classes"]), *images.shape[2:])
    for top, left in product(*(range(0, side, TILE) for side in images.shape[2:])):
        y, x = max(0, top - margin), max(0, left - margin)
        tile = images[:, :, y : top + TILE + margin, x : left + TILE + margin]
        computed = torch.cat(list(predict_batches(model, tile, dtype)))[..., top - y :, left - x :]
        logits[..., top : top + TILE, left : left + TILE] = computed[..., :TILE, :TILE]
    return F.interpolate(logits, size, mode="bilinear").softmax(dim=1)


def predict_mask(model: nn.Module, config: dict, path: str | Path) -> Tensor:
    """Predict (H, W) uint8 class indices of an image file; UserError if it cannot be read."""
    image = torch.from_numpy(read_image(Path(path), config["in_channels"])).permute(2, 0, 1)
    return predict(model, config, image[None])[0].argmax(dim=0).to(torch.uint8)


def find_images(given: list[Path], out: Path) -> dict[Path, Path]:
    """Find images: path of the results, no ending → image; UserError if one overwrites another."""
    images: dict[Path, Path] = {}
    for path in given:
        files = [path]
        if path.is_dir():
            files = [f for f in sorted(path.rglob("[!.]*")) if f.suffix.lower() in SUFFIXES]
            files = [f for f in files if out.resolve() not in f.resolve().parents]  # old results
        if not files:
            raise UserError(f"{path}: holds no image; name images or a folder of them")
        for file in files:
            target = out / (file.relative_to(path) if path.is_dir() else file.name)
            if images.setdefault(target.with_suffix(""), file) != file:
                raise UserError(f"{file}: another image has its name; predict them apart")
    results = {f"{target}_{kind}.png" for target in images for kind in ("mask", "overlay")}
    results = {Path(result).resolve() for result in (*results, out / "contact_sheet.png")}
    if lost := results & {file.resolve() for file in images.values()}:
        raise UserError(f"{min(lost)}: an overlay or mask would overwrite it; use another --out")
    return images


def write_results(target: Path, image: Tensor, values: Tensor, classes: dict, keep: bool) -> tuple:
    """Write the results of an image; returns a text on them, and cells of the contact sheet."""
    mask, files = values.argmax(dim=0).to(torch.uint8), defaultdict(io.BytesIO)
    laid, picture = overlay(image, mask, classes), Image.fromarray(mask.numpy())
    picture.putpalette(np.array(list(classes.values()), np.uint8).tobytes())
    picture.save(files["mask.png"], "PNG")
    Image.fromarray(laid.permute(1, 2, 0).numpy()).save(files["overlay.png"], "PNG")
    if keep:
        np.savez_compressed(files["probabilities.npz"], probabilities=values, classes=list(classes))
    for name, file in files.items():
        write_atomically(Path(f"{target}_{name}"), file.getvalue())
    shares = [f"{name} {(mask == i).float().mean():.1%}" for i, name in enumerate(classes)]
    cells = [(target.name, thumbnail(image[:3].expand(3, -1, -1))), ("", thumbnail(laid))]
    return "  ".join([f"{mask.shape[1]}×{mask.shape[0]}", *shares]), cells


def predict_files(model: nn.Module, config: dict, given: list[Path], out: Path, keep: bool) -> None:
    """Predict files and folders; UserError if any cannot be read, after all the others."""
    images, cells, failed = find_images(given, out), [], 0
    targets = list(images)
    shown = {targets[i] for i in evenly(len(targets), SHEET)}
    same = repeat(config["classes"]), repeat(keep)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(targets), BATCH):
            window, channels = targets[start : start + BATCH], config["in_channels"]
            reading = {t: pool.submit(read_image, images[t], channels) for t in window}
            groups: dict[object, dict[Path, np.ndarray]] = defaultdict(dict)
            for target, future in reading.items():
                try:
                    image = future.result()
                    groups[image.shape if image.size <= SMALL else target][target] = image
                except UserError as error:
                    print(f"problem: {error}")
                    failed += 1
            for group in groups.values():
                batch = torch.from_numpy(np.stack(list(group.values()))).permute(0, 3, 1, 2)
                done = pool.map(write_results, group, batch, predict(model, config, batch), *same)
                for target, (text, pictures) in zip(group, done, strict=True):
                    print(f"{images[target]}  {text}")
                    cells += pictures if target in shown else []
    if cells:
        rows = [cells[i : i + 8] for i in range(0, len(cells), 8)]
        save(grid(rows, config["classes"]), out / "contact_sheet.png")
        print(f"masks, overlays and contact_sheet.png in {out}/")
    if failed:
        raise UserError(f"{failed} of {len(images)} images could not be read, listed above")


def export(model: nn.Module, config: dict, path: Path) -> None:
    """Write a `torch.export` program for images of any number, height and width."""
    from torchvision.transforms.v2 import ToDtype  # takes a second, which others can do without

    model = model.to("cpu", memory_format=torch.contiguous_format)
    program = nn.Sequential(ToDtype(torch.float32, scale=True), model)
    example = torch.zeros(2, config["in_channels"], 50, 70, dtype=torch.uint8)
    dynamic = [dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)]
    # Without this, a size of one (at the deepest stage) would be taken for a special case.
    with fx_config.patch(backed_size_oblivious=True), torch.no_grad():
        program = torch.export.export(program, (example,), dynamic_shapes=dynamic)
    file = io.BytesIO()
    torch.export.save(program, file)
    write_atomically(path, file.getvalue())
    print(f"{path}: torch.export.load('{path}').module()(images), uint8 (N, channels, H, W)")


def slim(checkpoint: Path, path: Path) -> None:
    """Write what a checkpoint needs to predict and be evaluated, its weights in float16."""
    _, content = restore_model(checkpoint, torch.device("cpu"))
    kept = {k: content[k] for k in ("config", "data_digest", "epoch") if k in content}
    state = {k: v.half() if v.is_floating_point() else v for k, v in content["model"].items()}
    save_checkpoint(path, kept | {"model": state, "cost": cost_of(checkpoint, content)})
    print(f"{path}: {path.stat().st_size / 2**20:.2f} MiB; next: python evaluate.py {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="files or folders")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "weights/best.pt", metavar="FILE")
    parser.add_argument("--out", type=Path, default=Path("predictions"), metavar="DIR")
    parser.add_argument("--probabilities", action="store_true", help="also NAME_probabilities.npz")
    parser.add_argument("--export", type=Path, metavar="FILE.pt2", help="program, no resizing")
    parser.add_argument("--slim", type=Path, metavar="FILE.pt", help="weights alone, in float16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps …")
    args = parser.parse_args()
    if not (args.images or args.export or args.slim):
        raise UserError('name images or folders: make predict IMAGES="photo.jpg folder/"')
    keep_memory()
    model, config = load_model(args.checkpoint, args.device)
    if args.images:
        predict_files(model, config, args.images, args.out, args.probabilities)
    if args.slim:
        slim(args.checkpoint, args.slim)
    if args.export:
        export(model, config, args.export)


if __name__ == "__main__":
    run(main)
