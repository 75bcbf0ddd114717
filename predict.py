"""Predict the classes of any images, or write the model for use elsewhere.

    python predict.py [--checkpoint CHECKPOINT] IMAGE… --out DIR [--probabilities]
    python predict.py [--checkpoint CHECKPOINT] --export FILE.pt2
    python predict.py --checkpoint CHECKPOINT --slim FILE.pt

IMAGE is a file or a folder, searched with all folders in it, whose paths are kept below DIR. Writes
NAME_mask.png, a palette file whose indices are the classes and whose colours are those of the
masks, NAME_overlay.png, and contact_sheet.png. In Python:

    from predict import load_model, predict_mask
    model, config = load_model("weights/best.pt")
    mask = predict_mask(model, config, "photo.jpg")  # (H, W) uint8 class indices
"""

import argparse
import io
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from common import ROOT, UserError, run, write_atomically

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from data import evenly, read_image, resize
from evaluate import cost_of, predict_batches
from model import pick_device, pick_precision, read_checkpoint, restore_model, save_checkpoint
from pictures import contact_sheet, overlay, palette, png, thumbnail

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
TILE = 1024  # pixels a side of what is predicted at once: activations take no more memory than that
BATCH = 32  # images of one size that are predicted together
SHEET = 48  # images on the contact sheet at most


# ---- one image, or several of one size


def load_model(checkpoint: str | Path, device: str = "auto") -> tuple[nn.Module, dict]:
    """Load the model of a checkpoint, in evaluation mode, and its config.

    Raises:
        UserError: the checkpoint cannot be read; there is no such device.
    """
    model, content = restore_model(Path(checkpoint), pick_device(device))
    return model, content["config"]


def read_tensor(path: str | Path, config: dict) -> Tensor:
    """Read an image file as (channels, H, W) uint8; UserError if it cannot be read."""
    return torch.from_numpy(read_image(Path(path), config["in_channels"]).copy()).permute(2, 0, 1)


@torch.inference_mode()
def predict_logits(model: nn.Module, config: dict, images: Tensor) -> Tensor:
    """Compute logits of images of any size, tile by tile where they are large.

    Args:
        model, config: see `load_model`.
        images: (N, channels, H, W) uint8.

    Returns:
        (N, C, H, W) float32 on the CPU. Where the config resizes images, so are these; their
        logits are interpolated back to H×W.
    """
    dtype = pick_precision(next(model.parameters()).device, config["precision"])
    size, margin = images.shape[2:], model.receptive_radius  # what the model sees around a tile
    if config["resize"]:
        images = resize(images, config["resize"], smooth=True)
    rows = []
    for top in range(0, images.shape[2], TILE):
        row = []
        for left in range(0, images.shape[3], TILE):
            y, x = max(0, top - margin), max(0, left - margin)
            tile = images[:, :, y : top + TILE + margin, x : left + TILE + margin]
            logits = torch.cat(list(predict_batches(model, tile, dtype))).float().cpu()
            row.append(logits[..., top - y :, left - x :][..., :TILE, :TILE])
        rows.append(torch.cat(row, dim=3))
    logits = torch.cat(rows, dim=2)
    return F.interpolate(logits, size, mode="bilinear") if config["resize"] else logits


def predict_mask(model: nn.Module, config: dict, image: str | Path | Tensor) -> Tensor:
    """Predict (H, W) uint8 class indices of an image: a file, or (channels, H, W) uint8.

    Raises:
        UserError: the file cannot be read.
    """
    image = image if isinstance(image, Tensor) else read_tensor(image, config)
    return predict_logits(model, config, image[None])[0].argmax(dim=0).to(torch.uint8)


def predict_probabilities(model: nn.Module, config: dict, image: str | Path | Tensor) -> Tensor:
    """Predict (C, H, W) float32 probabilities in [0, 1]; `image` as in `predict_mask`."""
    image = image if isinstance(image, Tensor) else read_tensor(image, config)
    return predict_logits(model, config, image[None])[0].softmax(dim=0)


# ---- many files


class Job(NamedTuple):
    """An image file and where its results go: `target` with _mask.png and so on behind it."""

    path: Path
    target: Path
    on_sheet: bool


def find_jobs(given: list[Path], out: Path) -> list[Job]:
    """List files and all images in folders, but for those in `out`.

    Raises:
        UserError: a path is not there, a folder holds no image, two images have one target, or a
            target is an image given.
    """
    targets: dict[Path, Path] = {}  # → the image; each is resolved once
    inputs, out_resolved = set(), out.resolve()
    for path in given:
        files = [path]
        if path.is_dir():
            found = (p for p in sorted(path.rglob("*")) if p.suffix.lower() in SUFFIXES)
            files = [p for p in found if p.is_file() and not p.name.startswith(".")]
            files = [p for p in files if out_resolved not in p.resolve().parents]
        if not files or not files[0].exists():
            raise UserError(f"{path}: no such file, or a folder without images")
        for file in files:
            inside = file.relative_to(path) if path.is_dir() else Path(file.name)
            target = out / inside.with_suffix("")
            if targets.setdefault(target, file) != file:
                raise UserError(f"{file}: and {targets[target]} have one name; predict them apart")
            inputs.add(file.resolve())
    for target, file in targets.items():
        for kind in ("mask", "overlay"):
            path = out_resolved / target.relative_to(out)
            if path.with_name(f"{path.name}_{kind}.png") in inputs:
                raise UserError(f"{file}: its {kind} would overwrite an image; use another --out")
    shown = {*evenly(len(targets), SHEET)}
    return [Job(file, target, i in shown) for i, (target, file) in enumerate(targets.items())]


def read_or_fail(job: Job, config: dict) -> Tensor | UserError:
    """Read the image of a job; returns the error if it cannot be read."""
    try:
        return read_tensor(job.path, config)
    except UserError as error:
        return error


def write_results(
    job: Job, image: Tensor, logits: Tensor, config: dict, probabilities: bool
) -> tuple[str, list[Tensor]]:
    """Write the files of one image.

    Returns:
        The line to print, and what the contact sheet shows: the image and its overlay.
    """
    classes, mask = config["classes"], logits.argmax(dim=0).to(torch.uint8)
    name, picture, file = job.target.name, Image.fromarray(mask.numpy(), mode="P"), io.BytesIO()
    picture.putpalette(palette(classes).flatten().tolist())
    picture.save(file, "PNG")
    pictures = [image[:3].expand(3, -1, -1), overlay(image, mask, classes)]
    write_atomically(job.target.with_name(f"{name}_mask.png"), file.getvalue())
    write_atomically(job.target.with_name(f"{name}_overlay.png"), png(pictures[1]))
    if probabilities:
        file = io.BytesIO()
        values = logits.softmax(dim=0).numpy()
        np.savez_compressed(file, probabilities=values, classes=list(classes))
        write_atomically(job.target.with_name(f"{name}_probabilities.npz"), file.getvalue())
    shares = torch.bincount(mask.flatten(), minlength=len(classes)) / mask.numel()
    texts = [f"{c} {share:.1%}" for c, share in zip(classes, shares.tolist(), strict=True)]
    line = f"{job.path}  {mask.shape[1]}×{mask.shape[0]}  {'  '.join(texts)}"
    return line, [thumbnail(picture) for picture in pictures if job.on_sheet]


def predict_files(
    model: nn.Module, config: dict, jobs: list[Job], out: Path, probabilities: bool
) -> None:
    """Predict images and write what the module's docstring lists.

    In batches of neighbours of one size, which threads read and write.

    Raises:
        UserError: an image cannot be read, after all others have been predicted.
    """
    cells, problems = [], []
    progress = tqdm(total=len(jobs), desc="predicting", disable=None)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(jobs), BATCH):
            window = jobs[start : start + BATCH]
            by_shape: dict[torch.Size, list[tuple[Job, Tensor]]] = {}
            for job, image in zip(
                window, pool.map(read_or_fail, window, repeat(config)), strict=True
            ):
                if isinstance(image, UserError):
                    problems.append(str(image))
                else:
                    by_shape.setdefault(image.shape, []).append((job, image))
            for shape, group in by_shape.items():
                size = max(1, BATCH * 128**2 // shape[1:].numel())  # few, if they are large
                for i in range(0, len(group), size):
                    batch_jobs, images = zip(*group[i : i + size], strict=True)
                    logits = predict_logits(model, config, torch.stack(images))
                    more = repeat(config), repeat(probabilities)
                    written = pool.map(write_results, batch_jobs, images, logits, *more)
                    for job, (line, pictures) in zip(batch_jobs, written, strict=True):
                        progress.write(line)
                        cells += [(job.target.name, pictures)] if job.on_sheet else []
            progress.update(len(window))
    progress.close()
    if cells:
        rows = [cells[i : i + 8] for i in range(0, len(cells), 8)]
        write_atomically(out / "contact_sheet.png", png(contact_sheet(rows, config["classes"])))
        print(
            f"{len(jobs) - len(problems)} images: masks and overlays in {out}/, contact_sheet.png"
        )
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        raise UserError(f"{len(problems)} of {len(jobs)} images could not be read, listed above")


# ---- the model for use elsewhere


class Exportable(nn.Module):
    """A model with its normalisation: (N, channels, H, W) uint8 to (N, C, H, W) float32 logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        # Padded here and without a condition, as the model pads, since an exported program has no
        # branches: the model then finds nothing left to pad.
        (height, width), stride = images.shape[-2:], self.model.stride
        full_h, full_w = (-(-side // stride) * stride for side in (height, width))
        pad = (0, full_w - width, 0, full_h - height)
        padded = F.pad(images.float() / 255, pad, mode="replicate")
        return self.model(padded)[..., :height, :width]


def export(model: nn.Module, channels: int, path: Path) -> None:
    """Write a `torch.export` program of any batch size, height and width, in float32.

    It takes uint8 images and needs torch alone: `torch.export.load(path).module()(images)`.
    """
    from torch.fx.experimental import _config  # private, but there is no public name for this yet

    exportable = Exportable(model.to("cpu", memory_format=torch.contiguous_format)).eval()
    example = torch.zeros(2, channels, 50, 70, dtype=torch.uint8)
    any_size = torch.export.Dim.DYNAMIC
    shapes = {"images": {0: any_size, 2: any_size, 3: any_size}}
    # Without this, a size of one (at the deepest stage) would be taken for a special case.
    with _config.patch(backed_size_oblivious=True), torch.no_grad():
        program = torch.export.export(exportable, (example,), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    write_atomically(path, file.getvalue())
    print(f"{path}: torch.export.load('{path}').module()(images), uint8 (N, {channels}, H, W)")


def slim(checkpoint: Path, path: Path) -> None:
    """Write what a checkpoint needs to predict and be evaluated, its weights in float16."""
    content = read_checkpoint(checkpoint, torch.device("cpu"))
    kept = {k: content[k] for k in ("config", "data_digest", "code", "epoch") if k in content}
    state = {k: v.half() if v.is_floating_point() else v for k, v in content["model"].items()}
    save_checkpoint(path, kept | {"model": state, "cost": cost_of(checkpoint, content)})
    print(f"{path}: {path.stat().st_size / 2**20:.2f} MiB; next: python evaluate.py {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    weights = ROOT / "weights" / "best.pt"
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="files or folders")
    parser.add_argument("--checkpoint", type=Path, default=weights, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("predictions"), metavar="DIR")
    parser.add_argument("--probabilities", action="store_true", help="also NAME_probabilities.npz")
    parser.add_argument("--export", type=Path, metavar="FILE.pt2", help="a torch.export program")
    parser.add_argument("--slim", type=Path, metavar="FILE.pt", help="weights alone, in float16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps …")
    args = parser.parse_args()
    if not (args.images or args.export or args.slim):
        raise UserError('name images or folders: make predict IMAGES="photo.jpg folder/"')
    model, config = load_model(args.checkpoint, args.device)
    if args.images:
        jobs = find_jobs(args.images, args.out)
        predict_files(model, config, jobs, args.out, args.probabilities)
    if args.slim:
        slim(args.checkpoint, args.slim)
    if args.export:
        if config["resize"]:
            print(
                "note: the program does not resize; give it images of {1}×{0}".format(
                    *config["resize"]
                )
            )
        export(model, config["in_channels"], args.export)


if __name__ == "__main__":
    run(main)
