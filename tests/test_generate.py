"""Tests of generate.py: what is drawn, how it moves, and how it reaches the disk."""

import hashlib
from itertools import pairwise
from pathlib import Path

from common import SPLITS, UserError

import numpy as np
import pytest
from PIL import Image

from tools import generate as g

PALETTE = [(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)]


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def colours_in(image: np.ndarray) -> set[tuple[int, ...]]:
    packed = image.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    return {(c >> 16, c >> 8 & 255, c & 255) for c in np.unique(packed).tolist()}


def frames_of(*args: object) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw all frames of a sequence as (image, mask)."""
    return [(image, mask) for _, image, mask in g.draw_sequence(*args, frames=0)]


def sample_grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    xs = np.arange(size)[None, None, :] + g.SAMPLES[:, 0, None, None]
    ys = np.arange(size)[None, :, None] + g.SAMPLES[:, 1, None, None]
    return xs, ys


def polygon(shape: str, x: float, y: float, diameter: float) -> list[tuple[float, float]]:
    """Corners of a marker, anticlockwise on paper: another account of what `covered` computes."""
    if shape == "square":
        half, x, y = int(0.4 * diameter - 0.4) + 0.375, round(x), round(y)
        return [
            (x - half, y - half),
            (x - half, y + half),
            (x + half, y + half),
            (x + half, y - half),
        ]
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
    g.generate(out, {"training": 12, "validation": 2, "testing": 1}, size=32, seed=3, workers=1)
    return out


@pytest.mark.parametrize("shape", g.SHAPES)
@pytest.mark.parametrize("points", [21, 26, 28, 35])
def test_coverage_and_mask_agree_with_finely_supersampled_polygons(shape, points):
    place, diameter, size = (31.3, 29.8), points * g.PIXELS_PER_POINT, 64
    drawn = g.covered(shape, place, diameter, *sample_grid(size))
    share = area_coverage(polygon(shape, *place, diameter), size)
    assert np.abs(drawn.mean(axis=0) - share).max() < 0.2  # eight samples against 256
    assert abs(drawn.mean() - share.mean()) < 3e-3

    colours = np.array([(255, 255, 255)] + 4 * [(0, 0, 255)], np.uint16)
    classes = np.array([(0, 0, 0)] + 4 * [(0, 255, 0)], np.uint16)
    image, mask = g.resolve(drawn.astype(np.uint8), colours, classes)
    assert (mask[share == 1] == (0, 255, 0)).all()
    assert (mask[share < 7 / 8] == 0).all()
    assert ((mask[..., 1] == 255) == (image[..., 0] == 0)).all()  # whole in one, whole in the other


def test_square_rim_has_the_levels_of_the_real_data():
    """The corner of a real square: one sample of eight short at each edge, two at most corners."""
    drawn = g.covered("square", (20.2, 20.4), 25 * g.PIXELS_PER_POINT, *sample_grid(41)).sum(axis=0)
    rows, columns = np.nonzero(drawn)
    square = drawn[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert square.shape == (25, 25)
    assert square[0].tolist() == [6, *[7] * 23, 7]
    assert square[-1].tolist() == [6, *[7] * 23, 6]
    assert (square[1:-1, [0, -1]] == 7).all() and (square[1:-1, 1:-1] == 8).all()


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
    assert image[0, 2].tolist() == [128, 0, 0]
    assert image[0, 3].tolist() == [128, 128, 0]
    assert image[0, 4].tolist() == [128, 255, 128]


@pytest.mark.parametrize("shape", g.SHAPES)
def test_frames_have_the_colours_and_edge_levels_of_the_real_data(shape):
    levels = {0, 32, 64, 96, 128, 159, 191, 223, 255}
    for seed in range(4):
        frames = frames_of(shape, "yellow", 128, np.random.default_rng(seed))
        for image, mask in frames[::10]:
            assert image.shape == mask.shape == (128, 128, 3)
            assert image.dtype == mask.dtype == np.uint8
            assert set(np.unique(image).tolist()) <= levels
            assert colours_in(mask) <= set(PALETTE)
            assert (mask[(image == 255).all(axis=2)] == 0).all()


@pytest.mark.parametrize("shape", g.SHAPES)
def test_one_object_moves_towards_the_black_target_of_its_shape(shape, monkeypatch):
    monkeypatch.setattr(g, "PRESENCE", 0.0)
    class_colour = PALETTE[g.SHAPES.index(shape) + 1]
    for seed in range(3):
        frames = frames_of(shape, "yellow", 128, np.random.default_rng(seed))
        visible, places = [], []
        for image, mask in frames:
            yellow = (image == (255, 255, 0)).all(axis=2)
            black = (image == 0).all(axis=2)
            assert colours_in(mask) <= {(0, 0, 0), class_colour}
            assert (mask[yellow | black] == class_colour).all()
            visible.append(black.sum())
            places.append([axis.mean() for axis in np.nonzero(yellow)])
        assert 6 <= len(frames) <= 45
        # The target ends up hidden but for a rim, and steps grow shorter and shorter.
        assert visible[-1] < 0.2 * max(visible[0], 200)
        steps = [np.hypot(*np.subtract(b, a)) for a, b in pairwise(places)]
        assert max(steps[-5:]) < 2.5
        assert sum(steps[:5]) > sum(steps[-5:])


def test_what_stands_still_is_of_the_other_shapes_and_next_colours(monkeypatch):
    monkeypatch.setattr(g, "PRESENCE", 1.0)
    rng = np.random.default_rng(5)
    for image, mask in frames_of("triangle", "red", 128, rng):
        assert (mask[(image == (0, 255, 0)).all(axis=2)] == (0, 0, 255)).all()  # green circle
        assert (mask[(image == (0, 0, 255)).all(axis=2)] == (255, 0, 0)).all()  # blue square
        assert not (image == (255, 255, 0)).all(axis=2).any()


def test_class_shares_are_those_of_the_real_data():
    masks = []
    for number in range(90):
        rng = np.random.default_rng([0, 0, number])
        frames = frames_of(g.SHAPES[number % 3], "red", 128, rng)
        masks += [frames[len(frames) // 4][1], frames[-1][1]]
    shares = (np.stack(masks) == 255).mean(axis=(0, 1, 2))
    assert shares == pytest.approx([0.041, 0.041, 0.055], abs=0.01)


def test_layout_names_and_pairs(data):
    assert sorted(p.name for p in data.iterdir()) == ["testing", "training", "validation"]
    for split in SPLITS:
        images = sorted((data / split / "image").iterdir())
        masks = sorted((data / split / "gt_image").iterdir())
        assert ["gt_" + image.name for image in images] == [mask.name for mask in masks]
    names = sorted(p.name for p in (data / "training" / "image").iterdir())
    assert names[0] == "000001_square_red_000001.png"
    assert names[-1].startswith("000012_circular_yellow_0000")
    kinds = sorted({name[:-11] for name in names})
    expected = [f"{s}_{c}" for s in g.SHAPES for c in g.COLOURS]
    assert [kind[7:] for kind in kinds] == expected
    for kind in kinds:  # frames are numbered from 1 without gaps
        frames = [int(name[-10:-4]) for name in names if name.startswith(kind)]
        assert frames == list(range(1, len(frames) + 1))


def test_files_are_rgb_with_palette_masks(data):
    for path in sorted(data.rglob("*.png"))[::7]:
        with Image.open(path) as image:
            assert (image.mode, image.size, image.format) == ("RGB", (32, 32), "PNG")
            if path.parent.name == "gt_image":
                assert colours_in(np.asarray(image)) <= set(PALETTE)


def test_returns_number_of_frames(tmp_path):
    frames = g.generate(tmp_path / "d", {"training": 2}, size=16, seed=0, workers=1)
    assert frames == len(list((tmp_path / "d/training/image").iterdir()))


def test_same_seed_same_bytes_whatever_the_workers_and_other_splits(tmp_path, data):
    g.generate(tmp_path / "a", {"training": 12, "validation": 4}, size=32, seed=3, workers=2)
    first, second = digests(data), digests(tmp_path / "a")
    training = {name for name in first if name.startswith("training")}
    assert training == {name for name in second if name.startswith("training")}
    assert all(first[name] == second[name] for name in training)
    # Sequence 1 is square_red however many follow, and then the same.
    begins = {
        n
        for n in first
        if n.startswith(("validation/image/000001", "validation/gt_image/gt_000001"))
    }
    assert begins and all(first[name] == second[name] for name in begins)


def test_other_seeds_and_other_splits_differ(tmp_path, data):
    g.generate(tmp_path / "a", {"training": 1, "testing": 1}, size=32, seed=4, workers=1)
    splits = [
        set(digests(root / split / "image").values())
        for root in (data, tmp_path / "a")
        for split in ("training", "testing")
    ]
    assert len(set.union(*splits)) == sum(map(len, splits))


def test_existing_folder_is_refused_and_left_alone(tmp_path):
    out = tmp_path / "data"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match=r"data: is there already; remove it") as caught:
        g.generate(out, {"training": 1}, size=16, seed=0, workers=1)
    assert "\n" not in str(caught.value)
    assert digests(tmp_path).keys() == {"data/mine.txt"}


def test_empty_folder_and_leftover_partial_are_replaced(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data.partial" / "training").mkdir(parents=True)
    (tmp_path / "data.partial" / "training" / "old.png").write_bytes(b"")
    g.generate(tmp_path / "data", {"training": 1}, size=16, seed=0, workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
    assert not list(tmp_path.rglob("old.png"))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch, error):
    save, saved = Image.Image.save, []

    def fail_later(*args, **kwargs):
        if len(saved) == 5:
            raise error
        saved.append(save(*args, **kwargs))

    monkeypatch.setattr(Image.Image, "save", fail_later)
    with pytest.raises(error):
        g.generate(tmp_path / "data", {"training": 2}, size=16, seed=0, workers=1)
    assert len(saved) == 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 15}, "--size: must be 16"),
        ({"seed": -1}, "--seed and --frames 0"),
        ({"sequences": {"training": 0}}, "--sequences"),
        ({"sequences": {"training": 3, "testing": -2}}, "--sequences"),
    ],
)
def test_bad_values_are_user_errors(tmp_path, change, message):
    arguments = {"sequences": {"training": 1}, "size": 16, "seed": 0, "workers": 1} | change
    with pytest.raises(UserError, match=message) as caught:
        g.generate(tmp_path / "data", **arguments)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_random_frames_of_each_sequence_are_the_same_files(tmp_path, data):
    """K frames of a scene are K files of the whole sequence, byte for byte."""
    sequences = {"training": 12, "validation": 2, "testing": 1}
    images = g.generate(tmp_path / "few", sequences, size=32, seed=3, frames=3, workers=1)
    few, whole = digests(tmp_path / "few"), digests(data)
    assert images == 3 * 15 and len(few) == 2 * images
    assert few.items() < whole.items()
    numbers = {name[-10:-4] for name in few}
    assert len(numbers) > 10  # not the first ones of each
    assert g.generate(tmp_path / "all", {"testing": 1}, 32, 3, 999, 1) == len(
        list((data / "testing/image").iterdir())
    )
