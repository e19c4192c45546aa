"""Image files: every kind of pixel is seen as a viewer shows it, or refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from stdb import DataError, check_image, read_image

SHADES = np.arange(64, dtype=np.float64).reshape(8, 8) / 63
EIGHT = np.rint(SHADES * 255).astype(np.uint8)
SIXTEEN = np.rint(SHADES * 65535).astype(np.uint16)
COLOURS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def kept(tmp_path, image: Image.Image, name: str, channels=1, **options) -> np.ndarray:
    """The image as it is read from its file."""
    image.save(tmp_path / name, **options)
    check_image(tmp_path / name)
    return read_image(tmp_path / name, channels, None)


def refusal(path) -> str:
    said = []
    for read in (check_image, lambda p: read_image(p, 3, (8, 8))):
        with pytest.raises(DataError) as caught:
            read(path)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "\n" not in said[0]
    return said[0]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("pixels", "name"),
    [
        *((SIXTEEN, f"grey.{kind}") for kind in ("png", "tif", "pgm")),
        (SIXTEEN.astype(">u2"), "other.tif"),
        (SHADES.astype(np.float32), "float.tif"),
        (EIGHT, "eight.png"),
    ],
)
def test_64_shades_stay_64_shades(tmp_path, pixels, name, channels):
    """16 bits and floats of 0 to 1 are brought to 8 bits, not cut off at 255."""
    found = kept(tmp_path, Image.fromarray(pixels), name, channels)
    assert found.shape == (channels, 8, 8)
    assert np.array_equal(found, np.stack([EIGHT] * channels))


def test_sixteen_bits_where_white_is_zero(tmp_path):
    """As X-rays in TIFF may have it."""
    found = kept(tmp_path, Image.fromarray(SIXTEEN), "inverse.tif", tiffinfo={262: 0})
    assert np.array_equal(found[0], 255 - EIGHT)


def test_twelve_bits_fill_the_range_too(tmp_path):
    """A TIFF of microscopes, written by hand: 4,095, 0, 2,048 and 273 in six bytes."""
    tags = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 6}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    content = bytes.fromhex("fff000800111") + bytes(2)
    head = b"II*\0" + struct.pack("<I", 16)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    (tmp_path / "a.tif").write_bytes(head + content + directory)
    check_image(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif", 1, None).tolist() == [[[255, 0, 128, 17]]]


@pytest.mark.parametrize("high", [1.5, 255.0, np.nan, np.inf, -0.1])
def test_floats_of_another_range_are_refused(tmp_path, high):
    """What is white in them is not known."""
    pixels = SHADES.astype(np.float32)
    pixels[3, 3] = high
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    assert "its pixels are floats of" in (said := refusal(tmp_path / "a.tif"))
    assert "allowed: 0 to 1" in said


def test_integers_of_an_unknown_range_are_refused(tmp_path):
    """32 bits; 16 bits with a sign are read as such."""
    Image.fromarray(SIXTEEN.astype(np.int32)).save(tmp_path / "a.tif")
    assert "whose range is not known; allowed: 8 bits, 16 bits without a sign" in (
        refusal(tmp_path / "a.tif")
    )


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB", "L", "I;16"])
def test_what_is_transparent_is_white(tmp_path, kind):
    """An alpha channel, a transparent entry of a palette, a transparent colour."""
    options = {}
    if kind in ("RGBA", "LA"):
        image = Image.new(kind, (2, 1), (0,) * len(kind))  # black, transparent
        image.putpixel((1, 0), (*(100,) * (len(kind) - 1), 255))
    elif kind == "P":
        image = Image.new("P", (2, 1), 0)
        image.putpalette([0, 0, 0, 100, 100, 100])
        image.putpixel((1, 0), 1)
        options = {"transparency": 0}
    else:
        image = Image.new(kind, (2, 1), 0)
        hundred = {"RGB": (100, 100, 100), "L": 100, "I;16": 25700}[kind]
        image.putpixel((1, 0), hundred)
        options = {"transparency": (0, 0, 0) if kind == "RGB" else 0}
    for channels in (1, 3):
        found = kept(tmp_path, image, "a.png", channels, **options)
        assert found[:, 0].tolist() == [[255, 100]] * channels


def test_half_transparent_is_between(tmp_path):
    """Half black on white is grey; opaque stays exactly what it is."""
    found = kept(tmp_path, Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "half.png", 3)
    assert set(found.flatten().tolist()) <= {127, 128}
    opaque = Image.fromarray(COLOURS).convert("RGBA")
    assert np.array_equal(kept(tmp_path, opaque, "a.png", 3).transpose(1, 2, 0), COLOURS)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_photographs_are_upright(tmp_path, orientation, name):
    """EXIF says how the camera was held, for each of its eight ways."""
    pixels = COLOURS[:, :5]  # 8 rows of 5
    turned = {
        **{1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1]},
        **{5: pixels.transpose(1, 0, 2), 6: np.rot90(pixels), 8: np.rot90(pixels, 3)},
        7: np.rot90(pixels, 2).transpose(1, 0, 2),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(turned))
    options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
    found = kept(tmp_path, image, name, 3, exif=exif, **options)
    assert np.array_equal(found.transpose(1, 2, 0), pixels)


def test_sixteen_bits_can_be_turned_too(tmp_path):
    """The order of the two does not matter."""
    exif = Image.Exif()
    exif[0x0112] = 3
    found = kept(tmp_path, Image.fromarray(SIXTEEN), "a.png", exif=exif)
    assert np.array_equal(found[0], EIGHT[::-1, ::-1])


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "1", "P", "HSV"])
def test_other_colours_are_what_they_show(tmp_path, mode):
    """As Pillow converts them."""
    image = Image.fromarray(COLOURS).convert("RGB" if mode == "HSV" else mode)
    found = kept(tmp_path, image, "a.png" if mode in ("1", "P", "HSV") else "a.tif", 3)
    shown = Image.open(tmp_path / ("a.png" if mode in ("1", "P", "HSV") else "a.tif"))
    assert np.array_equal(found.transpose(1, 2, 0), np.asarray(shown.convert("RGB")))


def test_a_program_is_not_run(tmp_path):
    """PostScript needs one that runs it."""
    Image.fromarray(COLOURS).save(tmp_path / "a.eps")
    assert "it is a PostScript program; allowed: pixels" in refusal(tmp_path / "a.eps")


def test_an_image_that_unfolds_to_gigabytes_is_refused(tmp_path):
    """A few bytes that say they are 10^5 × 10^5 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 10**5, 10**5, 8, 2, 0, 0, 0))
    content = chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + content)
    assert "bomb.png cannot be read as an image" in refusal(tmp_path / "bomb.png")


def test_a_file_that_is_no_image_or_not_all_of_one_is_refused(tmp_path):
    """In one line that names it, whatever its name is."""
    path = tmp_path / "two\nlines.png"
    path.write_bytes(b"no image")
    assert f"{tmp_path}/two\\nlines.png cannot be read as an image" in refusal(path)
    whole = io.BytesIO()
    Image.fromarray(COLOURS).resize((64, 64)).save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:-2000])
    with pytest.raises(DataError, match=r"cut\.png cannot be read as an image"):
        read_image(tmp_path / "cut.png", 3, (8, 8))
