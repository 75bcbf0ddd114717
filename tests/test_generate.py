"""Tests of tools/generate.py: what is drawn, how it moves, and how it reaches the disk."""

from itertools import pairwise
from pathlib import Path

from common import ROOT, SPLITS, UserError

import numpy as np
import pytest
from PIL import Image

from config import load_config
from data import find_pairs
from tools import generate as g

PALETTE = [(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)]


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.png")}


def colours_in(image: np.ndarray) -> set[tuple[int, ...]]:
    return set(map(tuple, np.unique(image.reshape(-1, 3), axis=0).tolist()))


def frames_of(*args: object) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw all frames of a sequence as (image, mask)."""
    return [(image, mask) for _, image, mask in g.draw_sequence(*args, frames=0)]


def polygon(shape: str, x: float, y: float, diameter: float) -> list[tuple[float, float]]:
    """Corners of a marker, anticlockwise on paper: another account of what `covered` computes."""
    if shape == "square":
        half, x, y = int(0.4 * diameter - 0.4) + 0.375, round(x), round(y)
        signs = ((-1, -1), (-1, 1), (1, 1), (1, -1))
        return [(x + half * sx, y + half * sy) for sx, sy in signs]
    if shape == "triangle":
        angles, radius = 2 * np.pi / 3 * np.arange(3), 2 / 3 * (diameter + 1 / 6)
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


@pytest.mark.parametrize("shape", g.SHAPES)
@pytest.mark.parametrize("points", [21, 26, 28, 35])
def test_coverage_and_mask_agree_with_finely_supersampled_polygons(shape, points):
    place, diameter, size = (31.3, 29.8), points * g.PIXELS_PER_POINT, 64
    xs = np.arange(size)[None, None, :] + g.SAMPLES[:, 0, None, None]
    ys = np.arange(size)[None, :, None] + g.SAMPLES[:, 1, None, None]
    drawn = g.covered(shape, place, diameter, xs, ys)
    share = area_coverage(polygon(shape, *place, diameter), size)
    assert np.abs(drawn.mean(axis=0) - share).max() < 0.2  # eight samples against 256
    assert abs(drawn.mean() - share.mean()) < 3e-3

    colours = np.array([(255, 255, 255)] + 4 * [(0, 0, 255)], np.uint16)
    classes = np.array([(0, 0, 0)] + 4 * [(0, 255, 0)], np.uint16)
    image, mask = g.resolve(drawn.astype(np.uint8), colours, classes)
    assert (mask[share == 1] == (0, 255, 0)).all()
    assert (mask[share < 7 / 8] == 0).all()
    assert ((mask[..., 1] == 255) == (image[..., 0] == 0)).all()  # whole in one, whole in the other


def test_pixel_shared_by_one_class_keeps_it_and_by_two_loses_it():
    # Columns: white, target, half target half mover, half mover half first, half first half white.
    top = np.array([0, 1, 1, 2, 3], np.uint8)
    bottom = np.array([0, 1, 2, 3, 0], np.uint8)
    labels = np.stack(4 * [top] + 4 * [bottom])[:, None, :]
    red, green = (255, 0, 0), (0, 255, 0)
    colours = np.array([(255, 255, 255), (0, 0, 0), red, green, (0, 0, 255)], np.uint16)
    classes = np.array([(0, 0, 0), red, red, green, (0, 0, 255)], np.uint16)
    image, mask = g.resolve(labels, colours, classes)
    assert mask[0].tolist() == [[0, 0, 0], [255, 0, 0], [255, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert image[0, 2:].tolist() == [[128, 0, 0], [128, 128, 0], [128, 255, 128]]


@pytest.mark.parametrize("shape", g.SHAPES)
def test_frames_have_the_colours_and_edge_levels_of_the_real_data(shape, monkeypatch):
    monkeypatch.setattr(g, "PRESENCE", 1.0)
    levels = {0, 32, 64, 96, 128, 159, 191, 223, 255}
    for image, mask in frames_of(shape, "red", 128, np.random.default_rng(1))[::5]:
        assert (image.shape, image.dtype) == (mask.shape, mask.dtype) == ((128, 128, 3), np.uint8)
        assert set(np.unique(image).tolist()) <= levels
        assert colours_in(mask) <= set(PALETTE)
        assert (mask[(image == 255).all(axis=2)] == 0).all()
        # What stands still is of the two other shapes and of the next two colours.
        for step, colour in enumerate(("red", "green", "blue")):
            shown = mask[(image == g.COLOURS[colour]).all(axis=2)]
            assert (shown == PALETTE[1 + (g.SHAPES.index(shape) + step) % 3]).all()
        assert (255, 255, 0) not in colours_in(image)


@pytest.mark.parametrize("shape", g.SHAPES)
def test_one_object_moves_towards_the_black_target_of_its_shape(shape, monkeypatch):
    monkeypatch.setattr(g, "PRESENCE", 0.0)
    class_colour = PALETTE[g.SHAPES.index(shape) + 1]
    frames = frames_of(shape, "yellow", 128, np.random.default_rng(0))
    visible, places = [], []
    for image, mask in frames:
        yellow, black = ((image == colour).all(axis=2) for colour in ((255, 255, 0), (0, 0, 0)))
        assert colours_in(mask) <= {(0, 0, 0), class_colour}
        assert (mask[yellow | black] == class_colour).all()
        visible.append(black.sum())
        places.append([axis.mean() for axis in np.nonzero(yellow)])
    assert 6 <= len(frames) <= 45
    # The target ends up hidden but for its boundary, and steps grow shorter and shorter.
    assert visible[-1] < 0.2 * max(visible[0], 200)
    steps = [np.hypot(*np.subtract(b, a)) for a, b in pairwise(places)]
    assert max(steps[-5:]) < 2.5 and sum(steps[:5]) > sum(steps[-5:])


def test_layout_names_and_formats(data):
    for split in SPLITS:
        images, masks = (sorted((data / split / f).iterdir()) for f in ("image", "gt_image"))
        assert ["gt_" + image.name for image in images] == [mask.name for mask in masks]
    names = sorted(p.name for p in (data / "training" / "image").iterdir())
    kinds = sorted({name[:-11] for name in names})
    assert [kind[7:] for kind in kinds] == [f"{s}_{c}" for s in g.SHAPES for c in g.COLOURS]
    with Image.open(data / "training/gt_image/gt_000001_square_red_000001.png") as image:
        assert (image.mode, image.size, image.format) == ("RGB", (32, 32), "PNG")


def test_same_seed_same_bytes_whatever_the_other_splits(tmp_path, data):
    g.generate(tmp_path / "a", {"training": 12, "validation": 4}, size=32, seed=3)
    first, again = (content(root / "training") for root in (data, tmp_path / "a"))
    assert first == again
    g.generate(tmp_path / "b", {"training": 1, "validation": 1}, size=32, seed=4)
    assert not {*first.values()} & {*content(tmp_path / "b").values()}


def test_existing_files_are_left_alone_and_a_leftover_is_replaced(tmp_path):
    out, leftover = tmp_path / "data", tmp_path / "data.partial"
    for folder in (out, leftover):
        folder.mkdir()
        (folder / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="data: is there already; remove it"):
        g.generate(out, {"training": 1}, size=16, seed=0)
    assert (out / "mine.txt").read_text() == "keep"
    (out / "mine.txt").unlink()
    g.generate(out, {"training": 1}, size=16, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert not list(tmp_path.rglob("mine.txt"))


def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(done, *args, **kwargs):
        assert next(iter(done)) > 0  # files are being written
        raise KeyboardInterrupt

    monkeypatch.setattr(g, "tqdm", interrupt)
    with pytest.raises(KeyboardInterrupt):
        g.generate(tmp_path / "data", {"training": 200}, size=16, seed=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", ["--size 15", "--seed -1", "--frames -1", "--sequences 3 0 3"])
def test_bad_values_are_user_errors(tmp_path, call, wrong):
    code, _, error = call(g.main, "--out", tmp_path / "data", *wrong.split())
    assert code == 2 and wrong.split()[0] in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_random_frames_of_each_sequence_are_the_same_files(tmp_path, data):
    sequences = {"training": 12, "validation": 2, "testing": 1}
    images = g.generate(tmp_path / "few", sequences, size=32, seed=3, frames=3)
    few, whole = content(tmp_path / "few"), content(data)
    assert images == 3 * 15 and len(few) == 2 * images
    assert few.items() < whole.items()
    assert len({name[-10:-4] for name in few}) > 10  # not the first ones of each


def test_another_data_set_is_linked_in(tmp_path, call, data):
    out, sizes = tmp_path / "both", ("--sequences", 1, 1, 1, "--size", 32, "--frames", 2)
    assert call(g.main, "--out", out, *sizes, "--with", data)[0] == 0
    linked = {name: file for name, file in content(out).items() if "data_" in name}
    renamed = {name.replace("data_", ""): file for name, file in linked.items()}
    assert renamed == content(data) and len(content(out)) == len(linked) + 2 * 3 * 2
    config = load_config([ROOT / "configs/scenes/both-11100.yaml"], [f"data={out}"])
    pairs, problems = find_pairs(config, "training")
    groups = {pair.group for pair in pairs}
    assert problems == [] and len(groups) == 13 and {"data_000001", "000001"} < groups
    code, _, error = call(g.main, "--out", tmp_path / "c", *sizes, "--with", tmp_path / "none")
    assert code == 2 and "none: holds no training/image" in error and not (tmp_path / "c").exists()
