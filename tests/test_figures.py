"""Tests of figures.py: colours and sizes of pictures."""

import importlib.util
import sys

import pytest
import torch

from common import ROOT
from figures import (
    GREY,
    class_colours,
    colourise,
    grid,
    legend_of,
    lowest_shown,
    overlay,
    thumbnail,
)

CLASSES = {"background": [0, 0, 0], "square": [255, 0, 0], "circle": [0, 0, 255]}


def test_masks_have_the_colours_of_their_classes() -> None:
    picture = colourise(torch.tensor([[0, 1], [2, 255]]), CLASSES)
    assert picture.dtype == torch.uint8
    assert picture.permute(1, 2, 0).tolist() == [[[0, 0, 0], [255, 0, 0]], [[0, 0, 255], GREY]]
    assert legend_of({"classes": CLASSES, "ignore": []}) == CLASSES
    assert legend_of({"classes": CLASSES, "ignore": [9]})["ignored"] == GREY


def test_classes_that_look_alike_get_other_colours() -> None:
    greys = {"road": [0, 0, 0], "car": [[7, 7, 7], [8, 8, 8]], "sky": [26, 26, 26]}
    colours = class_colours({"classes": greys})
    assert list(colours) == list(greys)
    assert list(colours.values()) == [[0, 0, 0], [255, 0, 0], [0, 74, 255]]  # hue 0.618
    assert class_colours({"classes": CLASSES}) == CLASSES

    numbers = {f"class_{i}": [i, i, i] for i in range(30)}
    many = list(class_colours({"classes": numbers}).values())
    assert len({tuple(colour) for colour in many}) == 30


@pytest.mark.parametrize("names", [["person", "background", "motorcycle", "vegetation"], "abc"])
@pytest.mark.parametrize("columns", [1, 2, 8])
def test_a_legend_fits_its_figure(names: list[str], columns: int) -> None:
    picture = torch.zeros(3, 40, 80, dtype=torch.uint8)
    legend = {f"{name} {i}": GREY for i in range(5) for name in names}
    figure = grid([[("a.png", picture)] * columns], legend, ("training",))
    figure.canvas.draw()
    outside = figure.legends[0].get_window_extent()
    assert outside.x0 >= 0 and outside.x1 <= figure.bbox.x1
    assert outside.y0 >= figure.axes[0].texts[0].get_window_extent().y1  # above the captions
    image = torch.randint(0, 256, (3, 60, 70), dtype=torch.uint8)
    mask = torch.zeros(60, 70, dtype=torch.uint8)
    mask[10:40, 10:40] = 1
    mask[30:60, 30:60] = 2
    picture = overlay(image, mask, CLASSES)
    is_grey = (picture[0] == picture[1]) & (picture[1] == picture[2])
    colours = {tuple(pixel) for pixel in picture.permute(1, 2, 0)[~is_grey].tolist()}
    assert colours == {(255, 0, 0), (0, 0, 255)}
    assert is_grey[mask == 0].all()  # the background is left as it is
    assert picture[:, 10, 10].tolist() == [255, 0, 0]  # a contour
    assert is_grey[20, 20]  # within a shape


def test_overlay_takes_grey_images_and_images_with_alpha() -> None:
    mask = torch.ones(8, 8, dtype=torch.uint8)
    for channels in (1, 3, 4):
        image = torch.full((channels, 8, 8), 7, dtype=torch.uint8)
        assert (overlay(image, mask, CLASSES) == 7).all()  # one class alone has no contour


def test_thumbnails_keep_the_shape_of_their_picture() -> None:
    assert thumbnail(torch.zeros(3, 320, 640, dtype=torch.uint8)).shape == (3, 80, 160)
    assert thumbnail(torch.zeros(3, 20, 30, dtype=torch.uint8)).shape == (3, 20, 30)


def test_pictures_do_not_need_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # whoever imports it fails
    spec = importlib.util.spec_from_file_location("figures_alone", ROOT / "figures.py")
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    assert alone.colourise(torch.tensor([[1]]), CLASSES).flatten().tolist() == [255, 0, 0]
    with pytest.raises(ImportError):
        alone.new_figure(1, 1)


def test_scores_far_below_the_others_are_not_drawn_at_their_place() -> None:
    scores = [0.98, 0.97, 0.96, 0.95, 0.2]
    assert lowest_shown(scores) == pytest.approx(0.96 - 10 * 0.02)
    assert lowest_shown([0.9, 0.9, 0.9, 0.89]) == pytest.approx(0.9 - 10 * 0.001)
