"""Masks as people see them: in colours, over their image, many on one contact sheet."""

import io

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torchvision.utils import draw_segmentation_masks, make_grid

GREY = 128  # colour of pixels that are ignored
SIDE = 160  # pixels of a picture on a contact sheet
LINE = 14  # pixels of a line of text


def palette(classes: dict[str, list[int]]) -> Tensor:
    """Return the colour of each mask value, (256, 3) uint8; grey where it is of no class."""
    colours = torch.full((256, 3), GREY, dtype=torch.uint8)
    colours[: len(classes)] = torch.tensor(list(classes.values()), dtype=torch.uint8)
    return colours


def legend(config: dict) -> dict[str, list[int]]:
    """Name all that a picture of masks may show → its colour."""
    return config["classes"] | ({"ignored": [GREY] * 3} if config["ignore"] else {})


def colourise(mask: Tensor, classes: dict[str, list[int]]) -> Tensor:
    """Colour (H, W) class indices: (3, H, W) uint8 in the colours of the masks."""
    return palette(classes)[mask.long()].permute(2, 0, 1)


def overlay(image: Tensor, mask: Tensor, classes: dict[str, list[int]]) -> Tensor:
    """Lay a mask over its image, half transparent; the first class is left clear.

    Args:
        image: (channels, H, W) uint8; mask: (H, W) class indices, any integer type.

    Returns:
        (3, H, W) uint8.
    """
    rgb = image[:3].expand(3, -1, -1)
    values = [value for value in mask.unique().tolist() if value > 0]
    if not values:
        return rgb
    colours = [tuple(palette(classes)[value].tolist()) for value in values]
    layers = mask == torch.tensor(values)[:, None, None]
    return draw_segmentation_masks(rgb, layers, alpha=0.5, colors=colours)


def thumbnail(picture: Tensor) -> Tensor:
    """Shrink a (3, H, W) uint8 picture to fit a contact sheet; smaller ones stay as they are."""
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    image.thumbnail((SIDE, SIDE))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def contact_sheet(
    rows: list[list[tuple[str, list[Tensor]]]], colours: dict[str, list[int]]
) -> Tensor:
    """Arrange pictures in rows, under a legend.

    Args:
        rows: of cells: a caption and the (3, H, W) uint8 pictures below it, of any size.
        colours: name → colour, for the legend.

    Returns:
        (3, height, width) uint8.
    """
    columns, high = max(map(len, rows)), max(len(cell[1]) for row in rows for cell in row)
    cells = []
    for row in rows:
        for caption, pictures in [*row, *[("", [])] * (columns - len(row))]:
            cell = Image.new("RGB", (SIDE, LINE + high * (SIDE + 2)), "white")
            draw = ImageDraw.Draw(cell)
            while draw.textlength(caption) > SIDE:  # the end of a name tells more than its start
                caption = "…" + caption[2:]
            draw.text((0, 0), caption, fill="black")
            for i, picture in enumerate(pictures):
                image = Image.fromarray(picture.permute(1, 2, 0).numpy())
                image = ImageOps.contain(image, (SIDE - 2, SIDE - 2))
                cell.paste(ImageOps.expand(image, 1, "grey"), (0, LINE + i * (SIDE + 2)))
            cells.append(torch.from_numpy(np.array(cell)).permute(2, 0, 1))
    grid = make_grid(cells, columns, padding=6, pad_value=255)
    names = Image.new("RGB", (grid.shape[2], LINE * (len(colours) // (4 * columns) + 2)), "white")
    draw, x, y = ImageDraw.Draw(names), 6, 4
    for name, colour in colours.items():
        length = 14 + draw.textlength(name) + 18
        if x > 6 and x + length > grid.shape[2]:
            x, y = 6, y + LINE
        draw.rectangle((x, y, x + 10, y + 10), fill=tuple(colour), outline="black")
        draw.text((x + 14, y - 1), name, fill="black")
        x += length
    return torch.cat([torch.from_numpy(np.array(names)).permute(2, 0, 1), grid], dim=1)


def png(picture: Tensor) -> bytes:
    """Encode a (3, H, W) uint8 picture as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()
