"""Read images and masks from files: the one reader of each.

Training, testing and predicting take every image from `read_image` and every mask from `read_mask`.
What Pillow would drop without a word (pages, bands, bits) is refused here. masks.py says which
class a pixel is.
"""

import io
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from common import UserError, reading
from masks import NO_CLASS, label, refuse_strays

Image.MAX_IMAGE_PIXELS = None  # Pillow refuses large images, to protect servers from strangers

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels → Pillow's name for such an image
READABLE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # at most 8 bits a channel
PAGED_FORMATS = ("TIFF", "GIF", "PNG", "WEBP")  # other formats hold previews as further pages

# What a PNG has in it if it says that it must be turned: as EXIF, as ImageMagick's EXIF, as XMP.
TURNING = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")

# Tags of EXIF and of TIFF files.
ORIENTATION = 0x0112
BITS_PER_SAMPLE = 258
SAMPLES_PER_PIXEL = 277
PLANAR_CONFIGURATION = 284


# ---- files


def open_image(path: Path) -> tuple[Image.Image, int]:
    """Open an image file, whose pixels are not decoded yet; also returns its bits a channel.

    UserError if it cannot be opened, has several pages, or bands that Pillow would drop or mix up.
    """
    bits = 8
    bands = 1
    is_planar = False
    with reading(path):
        # Pillow maps some files into memory if it knows their name, and then mixes up the width and
        # height of images that are to be turned. So it gets no name.
        content = path.read_bytes()
        image = identify(path, io.BytesIO(content))
        pages = getattr(image, "n_frames", 1)
        if image.format == "PNG":
            bits = content[24]  # Pillow shows 16-bit colours as 8 bits
        elif image.format == "TIFF":
            bits = max(image.tag_v2.get(BITS_PER_SAMPLE, (1,)))
            bands = image.tag_v2.get(SAMPLES_PER_PIXEL, 1)
            is_planar = image.tag_v2.get(PLANAR_CONFIGURATION, 1) == 2
        elif image.mode.startswith(("I", "F")):
            bits = 16 if "16" in image.mode else 32
    if pages > 1 and image.format in PAGED_FORMATS:
        advice = "save each as a file (docs/data.md shows how)"
        raise UserError(f"{path}: has {pages} pages, and one image a file is read; {advice}")
    if bands > len(image.getbands()):
        advice = "save 1 or 3 of them, or 4 as RGBA"
        raise UserError(f"{path}: has {bands} bands of {bits} bits; {advice}")
    if is_planar and bands > 1 and bits > 8:
        advice = "save them interleaved (planar configuration 1)"
        raise UserError(f"{path}: stores its bands of {bits} bits apart; {advice}")
    return image, bits


def identify(path: Path, file: BinaryIO) -> Image.Image:
    """Open the content of an image file; UserError if it is no image."""
    beginning = file.read(30)
    if beginning.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: stands for a file of Git LFS; fetch it: git lfs pull")
    file.seek(0)
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        text = "cannot be read (it is no image, or of an unknown kind)"
        raise UserError(f"{path}: {text}; save it as PNG, or remove it") from None


def turn_upright(path: Path, image: Image.Image) -> Image.Image:
    """Decode an image that was opened, and turn it upright as its EXIF data says."""
    with reading(path):
        image.load()
        return ImageOps.exif_transpose(image)


def is_turned(path: Path) -> bool:
    """Tell whether the EXIF data of an image file say that it must be turned or mirrored."""
    with reading(path):
        return Image.open(path).getexif().get(ORIENTATION, 1) in range(2, 9)


def turned_alone(image_path: Path, mask_path: Path) -> str:
    """Say which of a pair EXIF data turn upright: "image" or "mask" if one alone, else ""."""
    image_is_turned = is_turned(image_path)
    mask_is_turned = is_turned(mask_path)
    if image_is_turned == mask_is_turned:
        return ""
    return "image" if image_is_turned else "mask"


def read_size(path: Path) -> tuple[int, int]:
    """Read the height and width of an image, turned upright; decode it only if need be."""
    with reading(path), open(path, "rb") as file:
        image = identify(path, file)
        width, height = image.size
        # Data that turn a PNG may stand behind its pixels, and Pillow would decode it to see them.
        if image.format == "PNG":
            content = path.read_bytes()
            if not any(mark in content for mark in TURNING):
                return height, width
        if image.getexif().get(ORIENTATION, 1) in range(5, 9):  # turned by a quarter
            width, height = ImageOps.exif_transpose(image).size
    return height, width


def read_deep(path: Path, image: Image.Image, bits: int) -> np.ndarray:
    """Read the integers of an image with more than 8 bits, (H, W) or (H, W, 3).

    UserError unless it is grey, or RGB of 16 bits.
    """
    if image.mode.startswith("I"):
        with reading(path):
            return np.asarray(image)
    if image.mode == "RGB" and bits == 16:
        # Pillow keeps the high byte of a number. It keeps the low one if it is told that the two
        # bytes stand in the other order. (Files that store bands apart ignore that: see above.)
        swapped, _ = open_image(path)
        swapped.tile = [swap_bytes(tile) for tile in swapped.tile]
        with reading(path):
            high = np.array(image, np.uint16)
            low = np.asarray(swapped)
        return high * 256 + low
    kind = f"{len(image.getbands())} bands"
    if image.mode == "F":
        kind = "floating-point numbers"
    elif image.mode in ("LA", "RGBA"):  # Pillow shows grey with alpha as RGBA
        kind = "an alpha channel and numbers"
    raise UserError(f"{path}: has {kind} of {bits} bits; save 8 bits, or 16 as grey or RGB")


def swap_bytes(tile: tuple) -> tuple:
    """Swap the order of bytes, B (high first), L or N (this machine's), in a tile of an image."""
    codec, extents, offset, args = tile
    is_text = isinstance(args, str)
    mode = args if is_text else args[0]  # as in "RGB;16B"
    order = mode[-1]
    if order == "N":
        order = "L" if sys.byteorder == "little" else "B"
    swapped = mode[:-1] + ("L" if order == "B" else "B")
    parts = (codec, extents, offset, swapped if is_text else (swapped, *args[1:]))
    return parts if type(tile) is tuple else type(tile)(*parts)  # Pillow 11 named its fields


# ---- images


def read_image(path: Path, channels: int, value_range: list[int] | None = None) -> np.ndarray:
    """Read an image as (H, W, channels) uint8 in 0…255, turned upright as its EXIF data says.

    Transparent pixels become white unless `channels` is 4, which keeps the alpha channel.
    `value_range`, [low, high], is what becomes 0 and 255 in files of 16 bits.

    UserError if the file cannot be read, or has more than 8 bits and there is no `value_range`.
    """
    image, bits = open_image(path)
    if bits > 8:
        image = scale_to_8_bits(path, image, bits, value_range)
    image = turn_upright(path, image)
    if image.mode == "CMYK":
        image = image.convert("RGB")
    if image.mode not in READABLE_MODES:
        raise UserError(f"{path}: has pixels of mode {image.mode}; save it as 8-bit RGB")
    if channels in (1, 3) and image.has_transparency_data:
        # Programs leave any colour where nothing is visible.
        image = image.convert("RGBA")
        if image.getextrema()[3][1] > 0:  # broken programs write images without a visible pixel
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
    if image.mode != MODES[channels]:
        # Pillow converts every readable mode to RGBA without loss.
        image = image.convert("RGBA").convert(MODES[channels])
    return np.atleast_3d(np.array(image, np.uint8))


def likely_range(lowest: int, highest: int) -> list[int]:
    """Guess the range of values by the lowest and the highest in some images.

    Cameras have 8, 10, 12 … 16 bits. Values below 0, as of computed tomography, are no camera's.
    """
    if lowest < 0:
        return [lowest, max(highest, lowest + 1)]
    bits = max(8, highest.bit_length() + highest.bit_length() % 2)
    return [0, min(2**bits - 1, 2**31)]  # the largest that pairs.check_data_keys takes


def scale_to_8_bits(
    path: Path, image: Image.Image, bits: int, value_range: list[int] | None
) -> Image.Image:
    """Scale an image so that a range of its values becomes 0…255, rounded; the rest is cut off."""
    values = read_deep(path, image, bits)
    if not value_range:
        lowest, highest = int(values.min()), int(values.max())
        text = f"has {bits} bits a channel and values up to {highest}"
        advice = f"set value_range: {likely_range(lowest, highest)} to train, or save 8 bits"
        raise UserError(f"{path}: {text}; {advice} (other images may need a wider range)")
    low, high = value_range
    scaled = (values.astype(np.float32) - low) * (255 / (high - low))
    result = Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))
    with reading(path):
        result.getexif()[ORIENTATION] = image.getexif().get(ORIENTATION, 1)
    return result


def share_cut_off(path: Path, value_range: list[int]) -> float:
    """Compute the share of the values of an image that `value_range` cuts off.

    It is 0 for up to 8 bits, where the range does not count.
    """
    image, bits = open_image(path)
    if bits <= 8:
        return 0.0
    values = read_deep(path, image, bits)
    low, high = value_range
    return float(((values < low) | (values > high)).mean())


def describe_cut_off(shares: dict[Path, float]) -> str:
    """Say what `value_range` cuts off, from the shares that `share_cut_off` found."""
    worst = max(shares, key=shares.get)
    return f"cuts off values of {len(shares)} images, most in {worst} ({shares[worst]:.2%})"


# ---- masks


def read_values(path: Path, mask_format: str) -> np.ndarray:
    """Read what the pixels of a mask hold: (H, W, 3) integers for colours, else (H, W, 1).

    UserError if the file cannot be read, holds fractions, or holds colours in place of indices.
    """
    image, bits = open_image(path)
    is_deep = image.mode.startswith(("I", "F"))
    if bits > 8 and not is_deep:
        raise UserError(f"{path}: holds colours of {bits} bits; save masks with 8 bits")
    image = turn_upright(path, image)
    if is_deep:
        values = np.array(image)
    elif mask_format == "colours":
        # The colour counts, however transparent it is.
        values = np.array(image.convert("RGB" if image.mode == "CMYK" else "RGBA"))[..., :3]
    else:
        values = np.array(image, np.uint8)
    values = np.atleast_3d(values)
    if values.dtype.kind == "f":
        if not (np.isfinite(values) & (values == values.round())).all():
            text = "holds fractions, as probabilities or smoothed masks do"
            raise UserError(f"{path}: {text}; save class indices as whole numbers")
        values = values.astype(np.int64)
    if values.min() < 0:
        text = f"holds numbers below 0, the lowest is {values.min()}"
        advice = "save 0 and more; where there is no label 255, and set ignore: [255]"
        raise UserError(f"{path}: {text}; {advice}")
    if mask_format == "colours":
        return np.broadcast_to(values, (*values.shape[:2], 3))
    # Grey may be written as three equal channels.
    if values.shape[2] >= 3 and (values[..., :3] != values[..., :1]).any():
        raise UserError(f"{path}: holds colours; set mask_format: colours, and `classes`")
    return values[..., :1]


def read_palette(path: Path) -> dict[int, list[int]]:
    """Read the colour of each number in a palette file: number → [r, g, b]; {} for other files."""
    with reading(path):
        image = Image.open(path)
        if image.mode != "P":
            return {}
        palette = np.array(image.getpalette("RGB")).reshape(-1, 3)
        numbers = np.unique(np.array(image)).tolist()
    return {number: palette[number].tolist() for number in numbers if number < len(palette)}


def read_mask(path: Path, config: dict) -> np.ndarray:
    """Read a mask as (H, W) uint8 class indices, IGNORE where the pixel counts nowhere.

    UserError if the file cannot be read or a pixel holds a value that is no class.
    """
    values = read_values(path, config["mask_format"])
    mask, _ = label(values, config)
    strays = mask == NO_CLASS
    if strays.any():
        refuse_strays(path, values, strays, config)
    return mask


def count_near(path: Path, config: dict) -> int:
    """Count the pixels of a mask that have a class through `mask_tolerance` alone."""
    _, n_near = label(read_values(path, config["mask_format"]), config)
    return n_near


# ---- pairs


def read_pair(image_path: Path, mask_path: Path, config: dict) -> tuple[Tensor, Tensor]:
    """Read an image (channels, H, W) and its mask (H, W), both uint8, resized if `resize` is set.

    UserError if a file cannot be read or the two differ in size.
    """
    pixels = read_image(image_path, config["in_channels"], config["value_range"])
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    mask = torch.from_numpy(read_mask(mask_path, config))
    if image.shape[1:] != mask.shape:
        mask_size = f"{mask.shape[1]}×{mask.shape[0]}"
        image_size = f"{image.shape[2]}×{image.shape[1]}"
        text = f"is {mask_size} pixels but its image is {image_size}"
        advice = "give both the same size"
        turned = turned_alone(image_path, mask_path)
        if turned == "image":
            text += ", turned upright by its EXIF data"
            advice = "turn the mask upright too, or save the image without EXIF data"
        elif turned == "mask":
            text += f"; {mask_path.name} is turned upright by its EXIF data"
            advice = "save the mask without EXIF data"
        raise UserError(f"{mask_path}: {text}; {advice}")
    if config["resize"]:
        size = config["resize"]
        image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        # The mean of two classes is no class, so the mask takes the nearest pixel.
        mask = F.interpolate(mask[None, None], size, mode="nearest-exact")[0, 0]
    return image, mask
