"""A small data set, checkpoint and archive to spoil, with the command lines that meet them."""

import io
import itertools
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from checkpoint import save_checkpoint
from config import load_config
from generate import SPLITS
from model import build_model

ROOT = Path(__file__).parent.parent
TINY = [
    *("encoder=[[2, 3]]", "decoder=[[4, 3]]", "epochs=1", "batch_size=2"),
    *("device=cpu", "precision=float32", "name=tiny"),
]
CLASSES = {
    "background": [0, 0, 0],
    "square": [255, 0, 0],
    "triangle": [0, 255, 0],
    "circle": [0, 0, 255],
}
PALETTE = np.array(list(CLASSES.values()), np.uint8)


def save(path: Path, pixels: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)
    return path


class Box:
    """A folder of a test with a data set `set` of two 8×8 pairs per split, and a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.set, self.run = folder, folder / "set", folder / "run"
        rng = np.random.default_rng(0)
        for split, name in itertools.product(SPLITS, ("a.png", "b.png")):
            save(self.set / split / "image" / name, rng.integers(0, 256, (8, 8, 3)))
            save(self.set / split / "gt_image" / f"gt_{name}", PALETTE[rng.integers(0, 4, (8, 8))])
        self.image = self.set / "training" / "image" / "b.png"
        self.mask = self.set / "training" / "gt_image" / "gt_b.png"

    def train(self, *overrides: str, config: object = "configs/default.yaml") -> list[object]:
        """The command line of a training run that would take a moment."""
        where = ("--data", self.set, "--run-dir", self.run)
        return ["train.py", "--config", config, *where, "--set", *TINY, *overrides]

    def config(self, text: str) -> list[object]:
        (self.folder / "mine.yaml").write_bytes(text.encode("latin-1"))
        return ["config.py", "--config", self.folder / "mine.yaml"]

    def checkpoint(self, name: str = "good.pt", **more: object) -> Path:
        config = load_config([ROOT / "configs/default.yaml"], [*TINY, f"data={self.set}"])
        path = self.folder / name
        save_checkpoint(path, {"config": config, "model": build_model(config).state_dict(), **more})
        return path

    def evaluate(self, path: object, *more: object) -> list[object]:
        return ["evaluate.py", path, "--device", "cpu", "--json", self.folder / "out.json", *more]

    def archive(self, *members: tuple[object, bytes], digest: str = "0" * 64) -> list[object]:
        """`data.py download` of a zip of the data set and other members."""
        path = self.folder / "archive.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
            for png in sorted(self.set.rglob("*.png")):
                opened.write(png, f"data/{png.relative_to(self.set)}")
            for name, content in members:
                opened.writestr(name, content)
        return self.download(digest)

    def download(self, digest: str = "0" * 64) -> list[object]:
        archive = ("--archive", self.folder / "archive.zip")
        return ["data.py", "download", *archive, "--out", self.folder / "out", "--digest", digest]

    def generate(self, *more: object, out: str = "out") -> list[object]:
        counts = ("--sequences", 1, 1, 1, "--size", 16)
        return ["data.py", "generate", *counts, "--out", self.folder / out, *more]


def bomb(side: int = 60_000) -> bytes:
    """A PNG of a few bytes that says it is very large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        size, check = struct.pack(">I", len(content)), zlib.crc32(kind + content)
        return size + kind + content + struct.pack(">I", check)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def encoded(pixels: np.ndarray, form: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def link(target: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(target)
    info.external_attr = 0o120777 << 16
    return info


class Code:
    """Unpickled naively, it makes a folder."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.made),)
