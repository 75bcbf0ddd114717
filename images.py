"""Single images and masks: reading them, colouring them, putting them on one sheet."""

import io
import struct
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode

from errors import UserError

IGNORE = 255  # mask value of a pixel that counts neither in losses nor in metrics
GREY = 128  # its colour in pictures
SIDE = 160  # pixels of a picture on a contact sheet
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name of a colour space, by channels


def _open(path: Path) -> Image.Image:
    """A decoded image of 8 bits a channel, the right way up."""
    try:
        image = Image.open(path)
        deep = any(";16" in str(tile[3]) for tile in image.tile)
        file_format = image.format
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # cameras store turned pictures with a note
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; was it moved?") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path}: has, or claims, too many pixels (178 million at most)") from None
    except (
        OSError,
        SyntaxError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:  # what Pillow raises on damaged files
        reason = getattr(error, "strerror", None) or "damaged, or not an image"
        raise UserError(f"{path}: cannot be read ({reason}); replace it") from None
    if deep:  # Pillow would drop half of the bits of a 16-bit RGB file without a word
        raise UserError(f"{path}: has 16 bits a channel; save it with 8")
    if path.suffix.lower() == ".png" and file_format != "PNG":
        raise UserError(f"{path}: is a {file_format} file named .png; convert it to PNG")
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        raise UserError(
            f"{path}: has pixels of mode {image.mode} (16 bits or not RGB); save it as 8-bit RGB"
        )
    return image


def read_image(path: Path, channels: int) -> np.ndarray:
    """Read an image as (H, W, channels) uint8, converting grey, palette, RGB and RGBA.

    A picture that a camera noted to be turned (EXIF orientation) is turned upright. Where alpha is
    not among the channels, what is transparent is shown on white.

    Raises:
        UserError: the file is missing, damaged, of too many pixels, or has 16 bits.
    """
    image = _open(path)
    if channels < 4 and image.has_transparency_data:  # below may lie any colour, often black
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return _pixels(image, channels)


def _pixels(image: Image.Image, channels: int) -> np.ndarray:
    # Through RGBA: the one mode to which Pillow converts all the others without loss.
    image = image if image.mode == MODES[channels] else image.convert("RGBA")
    return np.asarray(image.convert(MODES[channels])).reshape(image.height, image.width, channels)


def read_colours(path: Path) -> np.ndarray:
    """Read a mask as (H, W, 3) uint8, the colours in the file, transparent or not.

    Raises:
        UserError: as `read_image`.
    """
    return _pixels(_open(path), 3)


def read_mask(path: Path, config: dict) -> np.ndarray:
    """Read a mask as (H, W) uint8 class indices, `IGNORE` where the config's `ignore` says so.

    Args:
        path: the file.
        config: for `classes`, `mask_format` and `ignore`.

    Raises:
        UserError: the file cannot be read, or has a value that is of no class; the first such
            pixel is named, and what to set if it looks like another kind of mask.
    """
    if config["mask_format"] == "indices":
        return _read_indices(path, config)
    classes = config["classes"]
    rgb = read_colours(path).astype(np.uint32)
    colour = rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
    mask = np.full(colour.shape, len(classes), np.uint8)
    for index, (r, g, b) in enumerate(classes.values()):
        mask[colour == (r << 16 | g << 8 | b)] = index
    stray = mask == len(classes)
    if config["ignore"]:
        r, g, b = config["ignore"]
        ignored = colour == (r << 16 | g << 8 | b)
        mask[ignored], stray = IGNORE, stray & ~ignored
    if stray.any():
        y, x = np.argwhere(stray)[0]
        values = np.unique(colour[stray]).tolist()
        found = {(value >> 16, value >> 8 & 255, value & 255) for value in values}
        hint = ""
        if all(r == g == b and (r < len(classes) or r == IGNORE) for r, g, b in found):
            hint = "; it looks like a mask of class indices: set mask_format: indices"
        elif found <= {tuple(reversed(c)) for c in classes.values()}:
            hint = "; with red and blue exchanged they are: the mask was written as BGR"
        elif len(found) > 64:
            hint = "; so many colours are no mask: was it saved as JPEG, or resized smoothly?"
        raise UserError(
            f"{path}: {stray.sum()} pixels of colours that are no class, first "
            f"({', '.join(map(str, rgb[y, x]))}) at x={x}, y={y}; classes are "
            + ", ".join(f"{name} {tuple(c)}" for name, c in classes.items())
            + hint
        )
    return mask


def _read_indices(path: Path, config: dict) -> np.ndarray:
    image = _open(path)
    if image.mode in ("LA", "RGB", "RGBA"):  # grey, written as colours: the three are the same
        rgb = np.asarray(image.convert("RGB"))
        if (rgb == rgb[..., :1]).all():
            image = Image.fromarray(rgb[..., 0])
    if image.mode not in ("1", "L", "P"):
        raise UserError(
            f"{path}: is a {image.mode} file, not one of class indices; set mask_format: colours, "
            "and under classes the colours in it"
        )
    mask = np.array(image, np.uint8)  # of a palette file the indices, not the colours
    number = len(config["classes"])
    stray = mask >= number
    if config["ignore"]:
        ignored = mask == config["ignore"][0]
        mask[ignored], stray = IGNORE, stray & ~ignored
    if stray.any():
        y, x = np.argwhere(stray)[0]
        found = set(np.unique(mask[stray]).tolist())
        hint = ""
        if found == {255}:
            hint = "; if 255 marks pixels that count nowhere, set ignore: [255]"
            if number == 2 and not (mask == 1).any():
                hint = (
                    "; if 255 is the second class, set mask_format: colours and give it the "
                    "colour [255, 255, 255]" + hint
                )
        raise UserError(
            f"{path}: {stray.sum()} pixels of values that are no class, first {mask[y, x]} at "
            f"x={x}, y={y}; {number} classes have the indices 0 to {number - 1}{hint}"
        )
    return mask


def resize(pixels: Tensor, size: list[int], smooth: bool) -> Tensor:
    """(..., H, W) uint8 to (..., *size): bilinear with antialiasing for images, else nearest."""
    mode = InterpolationMode.BILINEAR if smooth else InterpolationMode.NEAREST_EXACT
    return F.resize(pixels, size, mode, antialias=smooth)


def read_pair(image_path: Path, mask_path: Path, config: dict) -> tuple[np.ndarray, np.ndarray]:
    """Read an image and its mask, both resized to the config's `resize` if that is set.

    Returns:
        (H, W, channels) uint8 image and (H, W) uint8 class indices.

    Raises:
        UserError: as `read_image` and `read_mask`, or the two differ in size.
    """
    image, mask = read_image(image_path, config["in_channels"]), read_mask(mask_path, config)
    if image.shape[:2] != mask.shape:
        raise UserError(
            f"{mask_path}: is {mask.shape[1]}×{mask.shape[0]} but its image is "
            f"{image.shape[1]}×{image.shape[0]}; they must be of one size"
            + ("; was the photograph turned?" if image.shape[1::-1] == mask.shape else "")
        )
    if config["resize"] and list(mask.shape) != config["resize"]:
        channels_first = torch.from_numpy(image.transpose(2, 0, 1).copy())
        resized = resize(channels_first, config["resize"], smooth=True)
        image = resized.permute(1, 2, 0).numpy()
        mask = resize(torch.from_numpy(mask)[None], config["resize"], smooth=False)[0].numpy()
    return image, mask


def palette(classes: dict[str, list[int]]) -> Tensor:
    """(256, 3) uint8: the colour of each mask value; grey for `IGNORE` and values of no class."""
    colours = torch.full((256, 3), GREY, dtype=torch.uint8)
    colours[: len(classes)] = torch.tensor(list(classes.values()), dtype=torch.uint8)
    return colours


def colourise(mask: Tensor, classes: dict[str, list[int]]) -> Tensor:
    """(H, W) class indices to a (3, H, W) uint8 picture in the colours of the masks."""
    return palette(classes)[mask.long()].permute(2, 0, 1)


def overlay(image: Tensor, mask: Tensor, classes: dict[str, list[int]]) -> Tensor:
    """An image with its mask laid over it, half transparent; the first class is left clear.

    Args:
        image: (channels, H, W) uint8; mask: (H, W) class indices, any integer type.

    Returns:
        (3, H, W) uint8.
    """
    rgb = image[:3].expand(3, -1, -1)
    mixed = (rgb.int() + colourise(mask, classes).int()) // 2
    return torch.where(mask > 0, mixed, rgb.int()).to(torch.uint8)


def legend(config: dict) -> dict[str, list[int]]:
    """Name → colour of all that a picture of masks may show: the classes, and pixels ignored."""
    return config["classes"] | ({"ignored": [GREY] * 3} if config["ignore"] else {})


def contact_sheet(
    rows: list[list[tuple[str, list[Tensor]]]], colours: dict[str, list[int]]
) -> Tensor:
    """Pictures of any size in rows, under a legend.

    Args:
        rows: of cells: a caption and the (3, H, W) uint8 pictures below it, see `thumbnails`; each
            is fitted into a square of `SIDE`.
        colours: name → colour, for the legend.

    Returns:
        (3, height, width) uint8.
    """
    gap, line = 6, 14  # pixels between pictures, and of a line of text
    columns = max(3, *(len(row) for row in rows))
    row_height = line + gap + (SIDE + 3) * max(len(cell[1]) for row in rows for cell in row)
    width = gap + columns * (SIDE + gap)
    x, y, places = gap, gap, {}  # of the names in the legend, in as many lines as they need
    for name in colours:
        length = 14 + int(ImageFont.load_default().getlength(" ".join(name.split()))) + 3 * gap
        if x > gap and x + length > width:
            x, y = gap, y + line + gap
        places[name] = (x, y)
        x += length
    first = y + 2 * line - gap  # where the rows begin
    sheet = Image.new("RGB", (width, first + len(rows) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    for name, (x, y) in places.items():
        draw.rectangle((x, y, x + 10, y + 10), fill=tuple(colours[name]), outline="black")
        draw.text((x + 14, y - 1), " ".join(name.split()), fill="black")
    for r, row in enumerate(rows):
        for c, (caption, pictures) in enumerate(row):
            left, top = gap + c * (SIDE + gap), first + r * row_height
            caption = " ".join(caption.split())  # a line break cannot be drawn
            while draw.textlength(caption) > SIDE:  # the end of a name tells more than its start
                caption = "…" + caption[2:]
            draw.text((left, top), caption, fill="black")
            top += line
            for tensor in pictures:
                picture = Image.fromarray(tensor.permute(1, 2, 0).numpy())
                picture = ImageOps.contain(picture, (SIDE, SIDE))
                sheet.paste(picture, (left, top))
                right, bottom = left + picture.width - 1, top + picture.height - 1
                draw.rectangle((left, top, right, bottom), outline="grey")
                top = bottom + 3
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1)


def thumbnails(image: Tensor, mask: Tensor, classes: dict[str, list[int]]) -> list[Tensor]:
    """An image and the same with its mask laid over, no larger than a contact sheet shows them.

    Args:
        image: (channels, H, W) uint8; mask: (H, W) uint8.

    Returns:
        Two (3, h, w) uint8 pictures.
    """
    scale = SIDE / max(mask.shape)
    if scale < 1:
        size = [max(1, round(side * scale)) for side in mask.shape]
        image, mask = resize(image, size, smooth=True), resize(mask[None], size, smooth=False)[0]
    return [overlay(image, torch.zeros_like(mask), classes), overlay(image, mask, classes)]


def png(picture: Tensor) -> bytes:
    """A (3, H, W) uint8 picture as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()
