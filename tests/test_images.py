"""Tests of images.py and masks.py: images of any kind, masks of both formats, damaged files."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import config_for, corruptions
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import images
from common import UserError
from images import count_near, read_image, read_mask, read_pair, read_size, share_cut_off
from masks import check_mask_keys
from metrics import IGNORE
from pairs import find_pairs


def save(path: Path, pixels: list | np.ndarray, mode: str | None = None) -> Path:
    Image.fromarray(np.array(pixels, np.uint8), mode).save(path)
    return path


def write_png16(path: Path, pixels: np.ndarray) -> Path:
    """Write (H, W, 2 to 4) uint16 as a PNG, which Pillow cannot."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    kind = {2: 4, 3: 2, 4: 6}[channels]  # grey with alpha, RGB, RGBA
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for tag, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        check = struct.pack(">I", zlib.crc32(tag + data))
        content += struct.pack(">I", len(data)) + tag + data + check
    path.write_bytes(content)
    return path


def write_tiff(path: Path, pixels: np.ndarray, compression: int = 1, planar: int = 1) -> Path:
    """Write (H, W, bands) uint8 or uint16 as a TIFF: plain, or compression 8 (zlib).

    With `planar` 2 it says that bands are stored one after the other.
    """
    height, width, bands = pixels.shape
    data = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    if compression == 8:
        data = zlib.compress(data)
    bits = struct.pack(f"<{bands}H", *[8 * pixels.itemsize] * bands)
    directory = 8 + len(data)
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, bands, directory + 2 + 12 * 11 + 4)]
    tags += [(259, 3, 1, compression), (262, 3, 1, 2), (273, 4, 1, 8), (277, 3, 1, bands)]
    tags += [(278, 4, 1, height), (279, 4, 1, len(data)), (284, 3, 1, planar)]
    # What more bands than three are, or that the numbers have no sign.
    tags.append((338, 3, bands - 3, 0) if bands > 3 else (339, 3, 1, 1))
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    header = b"II*\0" + struct.pack("<I", directory)
    path.write_bytes(header + data + struct.pack("<H", len(tags)) + entries + bytes(4) + bits)
    return path


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", [[[255, 0, 0, 255], [0, 0, 0, 0]]], "RGBA")
    assert read_image(path, 3).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    assert read_image(path, 4)[0, 1].tolist() == [0, 0, 0, 0]
    assert read_image(path, 1)[0, 1].tolist() == [255]


def test_images_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (4, 2)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg", 3).shape == (4, 2, 3)


def test_image_without_a_visible_pixel_keeps_its_colours(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", [[[9, 8, 7, 0], [1, 2, 3, 0]]], "RGBA")
    assert read_image(path, 3).tolist() == [[[9, 8, 7], [1, 2, 3]]]


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (2, 1), (0, 255, 255, 0)).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif", 3).tolist() == [[[255, 0, 0], [255, 0, 0]]]


@pytest.mark.parametrize("kind", ["grey.png", "grey.tif", "rgb.png", "rgb.tif", "zip.tif"])
def test_range_of_16_bits_becomes_8(tmp_path: Path, kind: str) -> None:
    values = np.array([[0, 100, 2040], [4080, 4095, 65535]], np.uint16)
    path = tmp_path / kind
    if kind.startswith("grey"):
        Image.fromarray(values).save(path)
    else:
        colours = np.dstack([values, values, np.zeros_like(values)])
        if kind == "rgb.png":
            write_png16(path, colours)
        else:
            write_tiff(path, colours, 8 if kind == "zip.tif" else 1)
    with pytest.raises(UserError, match=r"16 bits .* up to 65535; set value_range: \[0, 65535\]"):
        read_image(path, 3)
    pixels = read_image(path, 3, [100, 4080])
    assert pixels.dtype == np.uint8
    expected = np.round((values.astype(float) - 100) / 3980 * 255).clip(0, 255)
    assert pixels[..., 0].tolist() == pixels[..., 1].tolist() == expected.tolist()
    assert (pixels[..., 2] == 0).all() == (not kind.startswith("grey"))


def test_bands_that_are_stored_apart_are_refused_beyond_8_bits(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint16).reshape(2, 4, 3) * 100
    path = write_tiff(tmp_path / "a.tif", values, planar=2)
    with pytest.raises(UserError, match=r"a\.tif: stores its bands of 16 bits apart; save them"):
        read_image(path, 3, [0, 4095])


def test_share_of_values_that_a_range_cuts_off(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 100, 200, 300]], np.uint16)).save(path)
    assert share_cut_off(path, [100, 200]) == 0.5 and share_cut_off(path, [0, 300]) == 0
    save(path, [[[0, 100, 200]]], "RGB")
    assert share_cut_off(path, [100, 200]) == 0  # 8 bits are not scaled


def test_a_mistake_in_the_code_keeps_its_traceback(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 100]], np.uint16)).save(path)
    monkeypatch.setattr(images, "scale_to_8_bits", lambda *args: undefined)  # noqa: F821
    with pytest.raises(NameError):
        read_image(path, 3, [0, 100])

    def fail(content: object) -> None:
        raise MemoryError

    monkeypatch.setattr(images.Image, "open", fail)
    with pytest.raises(UserError, match=r"a\.png: cannot be read \(not enough memory: it is too"):
        read_image(path, 3)


def test_what_pillow_would_drop_is_refused(tmp_path: Path) -> None:
    bands = write_tiff(tmp_path / "five.tif", np.zeros((2, 3, 5), np.uint8))
    with pytest.raises(UserError, match=r"five\.tif: has 5 bands of 8 bits"):
        read_image(bands, 3)
    pages = [Image.new("L", (2, 2), value) for value in range(3)]
    for name in ("a.tif", "a.gif"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        with pytest.raises(UserError, match=rf"{name}: has 3 pages"):
            read_image(tmp_path / name, 3)
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(UserError, match="floating-point numbers of 32 bits"):
        read_image(tmp_path / "f.tif", 3, [0, 4095])


@pytest.mark.parametrize("name", ["la.png", "rgba.png", "rgba.tif"])
def test_alpha_of_16_bits_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    pixels = np.full((2, 3, 2 if name == "la.png" else 4), 300, np.uint16)
    if name.endswith("png"):
        write_png16(path, pixels)
    else:
        write_tiff(path, pixels)
    for channels in (1, 3, 4):
        with pytest.raises(UserError, match=f"{name}: has .* of 16 bits"):
            read_image(path, channels, [0, 65535])
    with pytest.raises(UserError, match=f"{name}: h.* of 16 bits"):
        read_mask(path, config_for(tmp_path))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_size_is_that_of_the_upright_image(tmp_path: Path, name: str) -> None:
    for orientation in (None, 1, 3, 6):
        exif = Image.Exif()
        if orientation is not None:
            exif[0x0112] = orientation
        Image.new("RGB", (4, 2)).save(tmp_path / name, exif=exif)
        assert read_size(tmp_path / name) == read_image(tmp_path / name, 3).shape[:2]


@pytest.mark.parametrize("key", ["Raw profile type exif", "XML:com.adobe.xmp"])
def test_size_of_a_png_that_says_in_a_text_how_it_is_turned(tmp_path: Path, key: str) -> None:
    """As ImageMagick and others write it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    hexadecimal = exif.tobytes().hex()
    text = f"\nexif\n    {len(hexadecimal) // 2}\n{hexadecimal}\n"
    if key.startswith("XML"):
        text = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    info = PngInfo()
    info.add_itxt(key, text)
    Image.new("RGB", (4, 2)).save(tmp_path / "a.png", pnginfo=info)
    assert read_image(tmp_path / "a.png", 3).shape[:2] == (4, 2)
    assert read_size(tmp_path / "a.png") == (4, 2)


def test_values_below_0_are_scaled(tmp_path: Path) -> None:
    """As Hounsfield units of computed tomography, in TIFFs of signed integers."""
    Image.fromarray(np.array([[-1000, -300, 400]], np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"set value_range: \[-1000, 400\]"):
        read_image(tmp_path / "a.tif", 1)
    pixels = read_image(tmp_path / "a.tif", 1, [-1000, 400])
    assert pixels[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_turned_grey_tiff_is_not_scrambled(tmp_path: Path, dtype: type) -> None:
    stored = np.zeros((4, 6), dtype)
    stored[0, 1:3] = 200  # a bar at the top, which a quarter turn moves to the right
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.tif"
    Image.fromarray(stored).save(path, exif=exif)
    expected = np.rot90(stored, -1)
    assert read_size(path) == (6, 4)
    assert read_image(path, 1, [0, 255])[..., 0].tolist() == expected.tolist()
    indices = config_for(tmp_path, classes=TWO, mask_format="indices", other_values="disc")
    assert (read_mask(path, indices) == (expected > 0)).all()


def test_masks_of_one_bit(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(tmp_path / "m.tif")
    assert read_mask(tmp_path / "m.tif", config_for(tmp_path, classes=TWO)).tolist() == [[0, 1]]
    indices = config_for(tmp_path, classes=TWO, mask_format="indices")
    assert read_mask(tmp_path / "m.tif", indices).tolist() == [[0, 1]]


INDICES = [[0, 1, 2], [3, 255, 0]]


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "P"])
def test_masks_of_indices(tmp_path: Path, mode: str) -> None:
    if mode == "P":
        image = Image.fromarray(np.array(INDICES, np.uint8), "P")
        image.putpalette(list(range(255, -1, -1)) * 3)  # the colours of a palette do not matter
    else:
        image = Image.fromarray(np.array(INDICES, np.uint8)).convert(mode)
    image.save(tmp_path / "a.png")
    config = config_for(tmp_path, mask_format="indices", ignore=[255])
    assert read_mask(tmp_path / "a.png", config).tolist() == [[0, 1, 2], [3, IGNORE, 0]]


def test_masks_of_colours(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", [[[9, 9, 9, 255], [255, 0, 0, 0]]], "RGBA")
    assert read_mask(path, config_for(tmp_path, ignore=[9, 9, 9])).tolist() == [[IGNORE, 1]]


def test_several_values_of_a_class_and_of_ignore(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", [[0, 26, 27, 7, 8]])
    classes = {"road": [0, 0, 0], "car": [[26, 26, 26], [27, 27, 27]]}
    config = config_for(tmp_path, classes=classes, ignore=[[7, 7, 7], [8, 8, 8]])
    assert read_mask(path, config).tolist() == [[0, 1, 1, IGNORE, IGNORE]]
    indices = config_for(tmp_path, classes=classes, mask_format="indices", ignore=[0, 2])
    path = save(tmp_path / "i.png", [[0, 1, 2, 3]])  # the classes are 1 and 3
    assert read_mask(path, indices).tolist() == [[IGNORE, 0, IGNORE, 1]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_other_values_take_numbers_of_objects(tmp_path: Path, dtype: type) -> None:
    numbers = [[0, 1, 9, 200]] if dtype == np.uint8 else [[0, 1, 1009, 2003]]
    Image.fromarray(np.array(numbers, dtype)).save(tmp_path / "m.tif")
    classes = {"ground": [0, 0, 0], "cell": [255, 255, 255]}
    config = config_for(tmp_path, classes=classes, mask_format="indices")
    with pytest.raises(UserError, match=r"no class.* set other_values: cell"):
        read_mask(tmp_path / "m.tif", config)
    config["other_values"] = "cell"
    assert read_mask(tmp_path / "m.tif", config).tolist() == [[0, 1, 1, 1]]


def test_fractions_are_no_indices(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0.5]], np.float32)).save(tmp_path / "m.tif")
    with pytest.raises(UserError, match=r"m\.tif: holds fractions"):
        read_mask(tmp_path / "m.tif", config_for(tmp_path, mask_format="indices"))


def test_ignored_indices_move_the_classes_up(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", np.array([[0, 1, 2, 3]]))
    config = config_for(tmp_path, classes=TWO, mask_format="indices", ignore=[0, 1])
    assert read_mask(path, config).tolist() == [[IGNORE, IGNORE, 0, 1]]
    config["ignore"] = [256]
    config["classes"] = {f"class {i}": [i, 0, 0] for i in range(254)}
    check_mask_keys(config)
    config["ignore"] = list(range(10))  # the last class would be 263
    with pytest.raises(UserError, match="have numbers above 255, which no predicted mask can hold"):
        check_mask_keys(config)


def test_the_nearest_class_comes_before_other_values(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", np.array([[0, 250, 100]]))
    config = config_for(tmp_path, classes=TWO, mask_tolerance=9, other_values="ground")
    assert read_mask(path, config).tolist() == [[0, 1, 0]]


def test_tolerance_takes_the_nearest_class(tmp_path: Path) -> None:
    """Classes are black, red, green and blue."""
    colours = [[[0, 0, 0], [60, 9, 9], [200, 0, 30], [120, 135, 0], [255, 128, 0]]]
    path = save(tmp_path / "m.png", colours)
    config = config_for(tmp_path, mask_tolerance=128)
    assert read_mask(path, config).tolist() == [[0, 0, 1, 2, 1]]
    assert count_near(path, config) == 4
    config["mask_tolerance"] = 60
    with pytest.raises(UserError, match=r"has 2 pixels .* the first is \[120, 135, 0\]"):
        read_mask(path, config)


def draw_disc(scale: int) -> Image.Image:
    """Draw a white disc; an enlarged drawing that is shrunk has smoothed edges."""
    y, x = np.mgrid[: 64 * scale, : 64 * scale] / scale
    disc = ((y - 30) ** 2 + (x - 30) ** 2 < 400).astype(np.uint8) * 255
    return Image.fromarray(disc).resize((64, 64), Image.Resampling.BOX)


@pytest.mark.parametrize(("name", "says"), [("m.png", "smoothed"), ("m.jpg", "JPEG changes")])
def test_smoothed_masks_are_told_so(tmp_path: Path, name: str, says: str) -> None:
    draw_disc(1 if name == "m.jpg" else 4).save(tmp_path / name)
    config = config_for(tmp_path, classes={"ground": [0, 0, 0], "disc": [255, 255, 255]})
    with pytest.raises(UserError, match=f"{says}.* set mask_tolerance: 128"):
        read_mask(tmp_path / name, config)
    config["mask_tolerance"] = 128
    expected = np.asarray(draw_disc(1)) > 0
    assert (read_mask(tmp_path / name, config) == expected).mean() > 0.97


TWO = {"ground": [0, 0, 0], "disc": [255, 255, 255]}
COLOURS = [[[0, 0, 0], [9, 8, 7]], [[0, 0, 0], [0, 0, 9]]]


@pytest.mark.parametrize(
    ("pixels", "keys", "says"),
    [
        (
            COLOURS,
            {},
            r"2 pixels with a colour that is no class, the first is \[9, 8, 7\] at x=1, y=0",
        ),
        ([[0, 1, 2]], {}, "these are indices: set mask_format: indices"),
        ([[0, 255]], {}, "list the colour in `classes`"),
        ([[[255, 0, 0]]], {"mask_format": "indices"}, "set mask_format: colours"),
        (
            [[0, 255]],
            {"mask_format": "indices", "classes": TWO},
            "0 and 255 are colours, black and white: remove mask_format: indices,",
        ),
        ([[0, 1, 255]], {"mask_format": "indices"}, r"without a label, set ignore: \[255\]$"),
        (
            [[0, 7, 26]],
            {"mask_format": "indices"},
            r"holds 0, 7, 26\); .* \(7 is \[7, 7, 7",
        ),
    ],
)
def test_unfit_mask_says_what_to_set(tmp_path: Path, pixels: list, keys: dict, says: str) -> None:
    path = save(tmp_path / "m.png", pixels)
    with pytest.raises(UserError, match=f"{path}: .*{says}"):
        read_mask(path, config_for(tmp_path, **keys))


def test_turned_image_is_named_where_sizes_differ(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(tmp_path / "a.jpg", exif=exif)
    mask = save(tmp_path / "m.png", np.zeros((2, 4)))
    with pytest.raises(UserError, match=r"is 4×2 pixels but its image is 2×4, turned .* EXIF"):
        read_pair(tmp_path / "a.jpg", mask, config_for(tmp_path))


def test_resizing_averages_images_and_picks_classes(tmp_path: Path) -> None:
    image = save(tmp_path / "i.png", np.tile([[0], [100]], (8, 16)))  # rows in turn
    mask = save(tmp_path / "m.png", np.tile([[0, 3]], (16, 8)))  # columns in turn
    config = config_for(tmp_path, mask_format="indices", resize=[8, 8])
    small, small_mask = read_pair(image, mask, config)
    assert small.shape == (3, 8, 8) and small_mask.shape == (8, 8)
    middle = small[:, 1:-1]
    assert ((middle > 40) & (middle < 60)).all()
    assert set(small_mask.unique().tolist()) <= {0, 3}
    third_of_image = save(tmp_path / "i3.png", np.tile([[0], [120], [0]], (8, 24)))
    third_of_mask = save(tmp_path / "m3.png", np.tile([[0, 3, 0]], (24, 8)))
    small, small_mask = read_pair(third_of_image, third_of_mask, config)
    middle = small[:, 1:-1]
    assert ((middle > 30) & (middle < 50)).all()  # the mean of 0, 120 and 0
    assert (small_mask == 3).all()  # the middle one of three pixels
    larger = save(tmp_path / "l.png", np.zeros((16, 17)))
    with pytest.raises(UserError, match=r"l\.png: is 17×16 pixels but its image is 16×16"):
        read_pair(image, larger, config)


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_damaged_image_or_mask_is_one_line(dataset: Path, tmp_path: Path, kind: str) -> None:
    config = config_for(dataset)
    pair = find_pairs(config, "testing")[0][0]
    original = pair.image if kind == "image" else pair.mask
    path = tmp_path / "bad.png"
    for content in corruptions(original.read_bytes()):
        path.write_bytes(content)
        try:
            if kind == "image":
                pixels = read_image(path, 3)
                assert pixels.dtype == np.uint8 and pixels.ndim == 3
            else:
                mask = read_mask(path, config)
                assert mask.dtype == np.uint8 and mask.ndim == 2
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
