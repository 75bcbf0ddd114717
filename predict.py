"""Predict the classes of any images, or write the model for use elsewhere.

    python predict.py [--checkpoint CHECKPOINT] IMAGE… [--out DIR] [--probabilities]
    python predict.py [--checkpoint CHECKPOINT] [--export FILE.pt2] [--slim FILE.pt]

IMAGE is a file or a folder. A folder is searched with its subfolders, which are kept below DIR.
Writes NAME_mask.png (class indices, with a palette of colours; with mask_format: indices the same
numbers as in the training masks), NAME_overlay.png and contact_sheet.png. In Python:

    from predict import load_model, predict_mask
    model, config = load_model("weights/best.pt")
    mask = predict_mask(model, config, "photo.png")
"""

import argparse
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Before torch: see machine.py.
from machine import keep_memory, pick_device, pick_precision

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from checkpoints import restore_model
from common import ROOT, UserError, reading, run, user_path, write_atomically
from data import evenly
from evaluate import predict_batches
from export import export, slim
from figures import class_colours, grid, overlay, save, thumbnail, write_image, write_png
from images import describe_cut_off, read_image, share_cut_off
from masks import file_values
from pairs import find_unread
from patterns import ENDINGS, check_name, find_files

TILE = 1024  # pixels along one side of the parts that a larger image is predicted in
SHEET = 48  # images on the contact sheet at most
SHEET_COLUMNS = 8  # pictures in a row of it, two for each image


# ---- images in memory


def load_model(checkpoint: str | Path, device: str = "auto") -> tuple[nn.Module, dict]:
    """Load a model, in evaluation mode, and its config; UserError if that cannot be done."""
    model, content = restore_model(Path(checkpoint), pick_device(device))
    return model, content["config"]


@torch.inference_mode()
def predict(model: nn.Module, config: dict, images: Tensor) -> Tensor:
    """Predict probabilities (N, C, H, W) float32, on the CPU, of (N, channels, H, W) uint8 images.

    With `resize` in the config the model sees the resized images; the result has the size of the
    images that were given.
    """
    logits = predict_logits(model, config, images)
    if config["resize"]:
        logits = F.interpolate(logits, images.shape[2:], mode="bilinear")
    return logits.softmax(dim=1)


@torch.inference_mode()
def predict_classes(model: nn.Module, config: dict, images: Tensor) -> Tensor:
    """Predict classes (N, H, W) uint8, on the CPU, of (N, channels, H, W) uint8 images.

    They are the most probable classes of `predict`. But here the numbers of all classes are in
    memory for a tile only, so that large images fit (with `resize`, for the resized image).
    """
    if config["resize"]:
        return highest_class(predict_logits(model, config, images), images.shape[2:])
    classes = torch.empty(len(images), *images.shape[2:], dtype=torch.uint8)
    for rows, columns, logits in predict_tiles(model, config, images):
        classes[:, rows, columns] = logits.argmax(dim=1)
    return classes


def predict_mask(model: nn.Module, config: dict, path: str | Path) -> Tensor:
    """Predict (H, W) uint8 class indices of an image file; UserError if it cannot be read.

    0 is the first class, whatever number it has in mask files.
    """
    pixels = read(Path(path), config)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    return predict_classes(model, config, image[None])[0]


def predict_logits(model: nn.Module, config: dict, images: Tensor) -> Tensor:
    """Compute the logits (N, C, H, W) of (N, channels, H, W) images, of resized ones if set so."""
    if config["resize"]:
        images = F.interpolate(images, config["resize"], mode="bilinear", antialias=True)
    whole = torch.empty(len(images), len(config["classes"]), *images.shape[2:])
    for rows, columns, logits in predict_tiles(model, config, images):
        whole[:, :, rows, columns] = logits
    return whole


def predict_tiles(
    model: nn.Module, config: dict, images: Tensor
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield rows, columns and logits (N, C, rows, columns) of each tile of (N, channels, H, W).

    So the memory that the model needs does not grow with the images. Each tile is computed with all
    pixels around it that have an influence, so that no seam can be seen.
    """
    dtype = pick_precision(next(model.parameters()).device, config["precision"])
    height, width = images.shape[2:]
    margin = model.receptive_radius
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            y = max(0, top - margin)
            x = max(0, left - margin)
            surrounded = images[:, :, y : top + TILE + margin, x : left + TILE + margin]
            computed = torch.cat(list(predict_batches(model, surrounded, dtype)))
            tile = computed[:, :, top - y :, left - x :]  # without the margin above and left of it
            rows = slice(top, min(top + TILE, height))
            columns = slice(left, min(left + TILE, width))
            yield rows, columns, tile[:, :, :TILE, :TILE]


def highest_class(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale logits (N, C, h, w) to a size and find the highest at each pixel: (N, H, W) uint8.

    One class after the other, since the scaled logits of all may not fit in memory.
    """
    highest = torch.full((len(logits), *size), -torch.inf)
    classes = torch.zeros(len(logits), *size, dtype=torch.uint8)
    for index in range(logits.shape[1]):
        scaled = F.interpolate(logits[:, index : index + 1], size, mode="bilinear")[:, 0]
        classes[scaled > highest] = index
        torch.maximum(highest, scaled, out=highest)
    return classes


# ---- files and folders


def find_images(given: list[Path], out: Path) -> dict[Path, Path]:
    """Find images in files and folders: path of the results without an ending → image.

    UserError if a folder has no image, or if a result would overwrite an image or another result.
    """
    out_resolved = out.resolve()
    images: dict[Path, Path] = {}
    for path in given:
        with reading(path, "several names need several pairs of quotes"):  # a name that is too long
            is_folder = path.is_dir()
        if is_folder:
            folder = path
            files = find_in_folder(path, out_resolved)
            for note in find_unread(path, ("**/*",)):
                print(f"note: {note}")
        else:
            folder = path.parent
            files = [path]
        if not files:
            if path.resolve().is_relative_to(out_resolved):
                text = f"is inside {out}, where results go, so its files are taken for results"
                raise UserError(f"{path}: {text}; give another OUT (--out)")
            kinds = ", ".join(ENDINGS)
            raise UserError(f"{path}: holds no image; name images or a folder of them ({kinds})")
        for file in files:
            target = (out / file.relative_to(folder)).with_suffix("")
            if images.get(target, file) != file:
                text = f"{images[target].name} has its name, up to the ending"
                raise UserError(f"{file}: {text}; predict them apart, each with an OUT of its own")
            images[target] = file

    results = {out_resolved / "contact_sheet.png"}
    for target in images:
        results.add(Path(f"{target}_mask.png").resolve())
        results.add(Path(f"{target}_overlay.png").resolve())
    for file in images.values():
        if file.resolve() in results:
            raise UserError(f"{file}: an overlay or mask would overwrite it; use another --out")
    return images


def find_in_folder(folder: Path, out_resolved: Path) -> list[Path]:
    """List the images in a folder and its subfolders, sorted, without those in the folder out."""
    files = []
    for file in find_files(folder, "**/*"):
        is_result = out_resolved in file.path.resolve().parents  # of an earlier call
        if not is_result:
            files.append(file.path)
    return sorted(files)


def read(path: Path, config: dict) -> np.ndarray:
    """Read an image as (H, W, channels) uint8, as in training; UserError if that cannot be done."""
    check_name(path)
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: cannot be read, it is a link that leads nowhere; remove it")
    if not path.exists():
        advice = 'put a name with spaces in quotes: python predict.py "my photo (1).jpg"'
        raise UserError(f"{path}: cannot be read, there is no such file; {advice}")
    return read_image(path, config["in_channels"], config["value_range"])


class Result(NamedTuple):
    """Hold what is printed and shown of an image that was predicted."""

    text: str  # its size and the share of each class
    image: Tensor  # (3, h, w) uint8, small
    overlay: Tensor  # (3, h, w) uint8, small


def draw_mask(mask: Tensor, config: dict) -> Image.Image:
    """Draw a mask (H, W) of class indices as a palette image, each class in its colour.

    Where the training masks held indices the pixels get the same numbers: with ignore: [0] the
    first class is 1 in both.
    """
    numbers = np.array(file_values(config), np.uint8)
    palette = np.zeros((256, 3), np.uint8)
    palette[numbers] = list(class_colours(config).values())
    picture = Image.fromarray(numbers[mask.numpy()])
    picture.putpalette(palette[: numbers.max() + 1].tobytes())
    return picture


def write_results(
    target: Path, image: Tensor, mask: Tensor, probabilities: Tensor | None, config: dict
) -> Result:
    """Write mask (H, W), overlay and, unless None, probabilities (C, H, W) of an image.

    `image` is (channels, H, W) uint8.
    """
    colours = class_colours(config)
    write_image(Path(f"{target}_mask.png"), draw_mask(mask, config))

    laid_over = overlay(image, mask, colours)
    write_png(Path(f"{target}_overlay.png"), laid_over)

    if probabilities is not None:
        file = io.BytesIO()
        np.savez_compressed(file, probabilities=probabilities, classes=list(colours))
        write_atomically(Path(f"{target}_probabilities.npz"), file.getvalue())
    rgb = image[:3].expand(3, -1, -1)
    return Result(describe_mask(mask, list(colours)), thumbnail(rgb), thumbnail(laid_over))


def describe_mask(mask: Tensor, classes: list[str]) -> str:
    """Describe a mask in a line: its size and the share of each class."""
    parts = [f"{mask.shape[1]}×{mask.shape[0]}"]
    for i, name in enumerate(classes):
        share = (mask == i).sum().item() / mask.numel()
        parts.append(f"{name} {share:.1%}")
    return "  ".join(parts)


def draw_sheet(path: Path, results: dict[Path, Result], colours: dict[str, list[int]]) -> None:
    """Draw images and their overlays side by side, under a legend."""
    cells = []  # caption and picture
    for target, result in results.items():
        cells.append((target.name, result.image))
        cells.append(("", result.overlay))
    starts = range(0, len(cells), SHEET_COLUMNS)
    rows = [cells[start : start + SHEET_COLUMNS] for start in starts]
    names = list(colours)[1:]  # the background has no contour
    legend = {name: colours[name] for name in names}
    save(grid(rows, legend), path)


def predict_files(
    model: nn.Module, config: dict, given: list[Path], out: Path, with_probabilities: bool
) -> None:
    """Predict files and folders one after the other.

    UserError if any cannot be read, after all the others.
    """
    images = find_images(given, out)
    colours = class_colours(config)
    targets = list(images)
    on_sheet = {targets[i] for i in evenly(len(targets), SHEET)}
    shown = {}
    cut_off = {}  # path → the share of its values that value_range cuts off
    failed = 0
    for target, path in images.items():
        try:
            image = torch.from_numpy(read(path, config)).permute(2, 0, 1)
        except UserError as error:
            print(f"problem: {error}")
            failed += 1
            continue
        if config["value_range"]:
            share = share_cut_off(path, config["value_range"])
            if share > 0:
                cut_off[path] = share
        if with_probabilities:
            probabilities = predict(model, config, image[None])[0]
            mask = probabilities.argmax(dim=0).to(torch.uint8)
        else:
            probabilities = None
            mask = predict_classes(model, config, image[None])[0]
        result = write_results(target, image, mask, probabilities, config)
        print(f"{path}  {result.text}")
        if target in on_sheet:
            shown[target] = result
    if shown:
        draw_sheet(out / "contact_sheet.png", shown, colours)
        print(f"masks, overlays and contact_sheet.png in {out}/")
    if cut_off:
        value_range = config["value_range"]
        print(f"note: value_range {value_range} of the model {describe_cut_off(cut_off)}")
    if failed:
        raise UserError(f"{failed} of {len(images)} images could not be read, listed above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="files or folders")
    weights = ROOT / "weights/best.pt"
    parser.add_argument("--checkpoint", type=user_path, default=weights, metavar="FILE")
    parser.add_argument("--out", type=user_path, default=Path("predictions"), metavar="DIR")
    parser.add_argument("--probabilities", action="store_true", help="also NAME_probabilities.npz")
    parser.add_argument("--export", type=Path, metavar="FILE.pt2", help="a torch.export program")
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
