"""Tests of tools/generate.py: what is drawn, how it moves, and how it reaches the disk."""

import subprocess
import sys
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data as data_script
from common import ROOT, SPLITS, UserError
from tools import generate as g

PALETTE = [(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)]


def content(root: Path) -> dict[str, bytes]:
    """Read all PNGs below a folder: relative path → bytes."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.png")}


def colours_in(image: np.ndarray) -> set[tuple[int, ...]]:
    colours = np.unique(image.reshape(-1, 3), axis=0)
    return {tuple(colour) for colour in colours.tolist()}


def frames_of(*args: object) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw all frames of a flight as (image, mask)."""
    return [(image, mask) for _, image, mask in g.draw_sequence(*args, frames=0)]


def polygon(shape: str, x: float, y: float, diameter: float) -> list[tuple[float, float]]:
    """List the corners of a marker, anticlockwise on paper: `covered` computes it another way."""
    if shape == "square":
        half = int(0.4 * diameter - 0.4) + 0.375
        left, right = round(x) - half, round(x) + half
        top, bottom = round(y) - half, round(y) + half
        return [(left, top), (left, bottom), (right, bottom), (right, top)]
    if shape == "triangle":
        sides = 3
        radius = 2 / 3 * (diameter + 1 / 6)
    else:
        radius = (diameter + 1) / 2
        sides = 24 if radius < 16 else 28 if radius < 21.5 else 32
    angles = 2 * np.pi / sides * np.arange(sides)
    return [(x + radius * np.cos(a), y - radius * np.sin(a)) for a in angles]


def area_coverage(corners: list[tuple[float, float]], size: int, grid: int = 16) -> np.ndarray:
    """Share of each pixel inside a convex polygon, from grid×grid samples; float (size, size)."""
    steps = (np.arange(size * grid) + 0.5) / grid - 0.5
    px, py = np.meshgrid(steps, steps)
    inside = np.ones_like(px, bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        inside &= (x1 - x0) * (py - y0) - (y1 - y0) * (px - x0) <= 0
    return inside.reshape(size, grid, size, grid).mean(axis=(1, 3))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("generated") / "data"
    g.generate(out, {"training": 12, "validation": 2, "testing": 1}, size=32, seed=3)
    return out


# ---- what is drawn


@pytest.mark.parametrize("shape", g.SHAPES)
@pytest.mark.parametrize("points", [21, 26, 28, 35])
def test_coverage_and_mask_agree_with_finely_supersampled_polygons(shape, points):
    centre = (31.3, 29.8)
    diameter = points * g.PIXELS_PER_POINT
    size = 64
    xs = np.arange(size)[None, None, :] + g.SAMPLES[:, 0, None, None]
    ys = np.arange(size)[None, :, None] + g.SAMPLES[:, 1, None, None]
    drawn = g.covered(shape, centre, diameter, xs, ys)
    share = area_coverage(polygon(shape, *centre, diameter), size)
    assert np.abs(drawn.mean(axis=0) - share).max() < 0.2  # eight samples against 256
    assert abs(drawn.mean() - share.mean()) < 3e-3

    colours = np.array([(255, 255, 255)] + 4 * [(0, 0, 255)])
    classes = np.array([(0, 0, 0)] + 4 * [(0, 255, 0)])
    image, mask = g.resolve(drawn.astype(np.uint8), colours, classes)
    assert (mask[share == 1] == (0, 255, 0)).all()
    assert (mask[share < 7 / 8] == 0).all()
    assert ((mask[..., 1] == 255) == (image[..., 0] == 0)).all()  # whole in one, whole in the other


def test_pixel_shared_by_one_class_keeps_it_and_by_two_loses_it():
    # Columns: white, target, half target half mover, half mover half first, half first half white.
    top = np.array([0, 1, 1, 2, 3], np.uint8)
    bottom = np.array([0, 1, 2, 3, 0], np.uint8)
    labels = np.stack(4 * [top] + 4 * [bottom])[:, None, :]
    black, red, green, blue = PALETTE
    colours = np.array([(255, 255, 255), black, red, green, blue])
    classes = np.array([black, red, red, green, blue])
    image, mask = g.resolve(labels, colours, classes)
    assert mask[0].tolist() == [[0, 0, 0], [255, 0, 0], [255, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert image[0, 2:].tolist() == [[128, 0, 0], [128, 128, 0], [128, 255, 128]]


@pytest.mark.parametrize("shape", g.SHAPES)
def test_frames_have_the_colours_and_edge_levels_of_the_real_data(shape, monkeypatch):
    monkeypatch.setattr(g, "PRESENCE", 1.0)
    levels = {0, 32, 64, 96, 128, 159, 191, 223, 255}
    for image, mask in frames_of(shape, "red", 128, np.random.default_rng(1))[::5]:
        assert image.shape == mask.shape == (128, 128, 3)
        assert image.dtype == mask.dtype == np.uint8
        assert set(np.unique(image).tolist()) <= levels
        assert colours_in(mask) <= set(PALETTE)
        assert (mask[(image == 255).all(axis=2)] == 0).all()
        # What stands still has the two other shapes and the next two colours.
        for step, colour in enumerate(("red", "green", "blue")):
            shown = mask[(image == g.COLOURS[colour]).all(axis=2)]
            assert (shown == PALETTE[1 + (g.SHAPES.index(shape) + step) % 3]).all()
        assert g.COLOURS["yellow"] not in colours_in(image)


@pytest.mark.parametrize("shape", g.SHAPES)
def test_one_object_moves_towards_the_black_target_of_its_shape(shape, monkeypatch):
    monkeypatch.setattr(g, "PRESENCE", 0.0)
    class_colour = PALETTE[g.SHAPES.index(shape) + 1]
    frames = frames_of(shape, "yellow", 128, np.random.default_rng(0))
    visible = []  # pixels of the target
    places = []  # of the moving shape
    for image, mask in frames:
        yellow = (image == (255, 255, 0)).all(axis=2)
        black = (image == (0, 0, 0)).all(axis=2)
        assert colours_in(mask) <= {(0, 0, 0), class_colour}
        assert (mask[yellow | black] == class_colour).all()
        visible.append(black.sum())
        places.append([axis.mean() for axis in np.nonzero(yellow)])
    assert 6 <= len(frames) <= 45
    # In the end only the boundary of the target is seen, and steps grow shorter and shorter.
    assert visible[-1] < 0.2 * max(visible[0], 200)
    steps = [np.hypot(*np.subtract(b, a)) for a, b in pairwise(places)]
    assert max(steps[-5:]) < 2.5 and sum(steps[:5]) > sum(steps[-5:])


# ---- what is written


def test_layout_names_and_formats(data):
    for split in SPLITS:
        images = sorted(path.name for path in (data / split / "image").iterdir())
        masks = sorted(path.name for path in (data / split / "gt_image").iterdir())
        assert masks == ["gt_" + name for name in images]
    names = sorted(path.name for path in (data / "training/image").iterdir())
    flights = sorted({name[:-11] for name in names})
    expected = [f"{shape}_{colour}" for shape in g.SHAPES for colour in g.COLOURS]
    assert [flight[7:] for flight in flights] == expected
    with Image.open(data / "training/gt_image/gt_000001_square_red_000001.png") as image:
        assert (image.mode, image.size, image.format) == ("RGB", (32, 32), "PNG")


def test_same_seed_same_bytes_whatever_the_other_splits(tmp_path, data):
    g.generate(tmp_path / "a", {"training": 12, "validation": 4}, size=32, seed=3)
    first = content(data / "training")
    assert content(tmp_path / "a/training") == first
    g.generate(tmp_path / "b", {"training": 1, "validation": 1}, size=32, seed=4)
    assert not set(first.values()) & set(content(tmp_path / "b").values())


def test_pictures_of_a_seed_never_change(data):
    """The shipped weights and the results were made from them."""
    pixels = sha256()
    for path in sorted((data / "training").rglob("*.png")):
        pixels.update(np.asarray(Image.open(path)).tobytes())
    assert pixels.hexdigest() == "e6eede966b346d62461a3ef3eb41d01da52def59e566d84be104f3196ebfbe60"


def test_random_frames_of_each_flight_are_the_same_files(tmp_path, data):
    sequences = {"training": 12, "validation": 2, "testing": 1}
    images = g.generate(tmp_path / "few", sequences, size=32, seed=3, frames=3)
    few = content(tmp_path / "few")
    assert images == 3 * 15 and len(few) == 2 * images
    assert few.items() < content(data).items()
    assert len({name[-10:-4] for name in few}) > 10  # not the first ones of each


def test_existing_files_are_left_alone_and_a_leftover_is_replaced(tmp_path):
    out = tmp_path / "data"
    leftover = tmp_path / ".data.partial"
    own = tmp_path / "data.partial"  # of the user
    for folder in (out, leftover, own):
        folder.mkdir()
        (folder / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="data: is there already; remove it"):
        g.generate(out, {"training": 1}, size=16, seed=0)
    assert (out / "mine.txt").read_text() == "keep"
    (out / "mine.txt").unlink()
    g.generate(out, {"training": 1}, size=16, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "data.partial"]
    assert list(tmp_path.rglob("mine.txt")) == [own / "mine.txt"]


def test_folder_that_cannot_be_made_is_one_line(tmp_path, call):
    (tmp_path / "file").write_text("keep")
    code, _, error = call(data_script.main, "generate", "--out", tmp_path / "file/data")
    assert code == 2 and "cannot be made" in error and error.count("\n") == 1
    (tmp_path / ".data.partial").write_text("keep")
    with pytest.raises(UserError, match="data: cannot be made"):
        g.generate(tmp_path / "data", {"training": 1}, size=16, seed=0)
    assert (tmp_path / ".data.partial").read_text() == "keep"


def test_two_processes_do_not_draw_into_one_folder(tmp_path):
    out = tmp_path / "data"
    command = [sys.executable, ROOT / "data.py", "generate", "--out", out]
    command += ["--sequences", "4", "1", "1", "--size", "16"]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2]
    assert "data: is there already" in "".join(errors) and "Traceback" not in "".join(errors)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert len({path.name[:6] for path in out.glob("training/image/*.png")}) == 4


def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(counts, *args, **kwargs):
        assert next(iter(counts)) > 0  # files are being written
        raise KeyboardInterrupt

    monkeypatch.setattr(g, "tqdm", interrupt)
    with pytest.raises(KeyboardInterrupt):
        g.generate(tmp_path / "data", {"training": 200}, size=16, seed=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", ["--size 15", "--seed -1", "--frames -1", "--sequences 3 0 3"])
def test_bad_values_are_user_errors(tmp_path, call, wrong):
    out = tmp_path / "data"
    code, _, error = call(data_script.main, "generate", "--out", out, *wrong.split())
    assert code == 2 and wrong.split()[0] in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
