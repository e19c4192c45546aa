"""Images: files to pixels, and pixels to what a network sees."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.data.checks import shown
from pipeline.errors import DataError

BACKGROUND = "white"  # is seen where an image is transparent
SHALLOW = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV")  # modes of 8 bits
SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")  # modes of 16 bits, without a sign
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF, and a value of the second


def normalise(images: Tensor) -> Tensor:
    """Uint8 pixels → float32 in [−1, 1], which the ANN sees and the SNN's encoder fires at."""
    return images.float().div_(127.5).sub_(1.0)


def read_image(path: str | Path, channels: int, size: int | None) -> np.ndarray:
    """An image file as (C, H, W) uint8; the largest square in its middle, where a size is given.

    It is seen as a viewer shows it: upright by its EXIF orientation, on white where it is
    transparent, 0 to 65,535 of 16 bits (4,095 of 12) and 0 to 1 of floats as black to white. Of
    several frames it is the first.

    Raises:
        DataError: it is no image, or one whose range of pixels is not known.
    """
    from PIL import Image, ImageOps

    try:
        with _opened(path) as opened:
            ImageOps.exif_transpose(opened, in_place=True)
            image = _eight_bits(opened).convert("L" if channels == 1 else "RGB")
    except Exception as error:
        raise _unreadable(path, error) from error
    if size is not None and image.size != (size, size):
        side = min(image.size)
        left, top = (image.size[0] - side) // 2, (image.size[1] - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.array(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def check_image(path: str | Path) -> None:
    """Whether a file can be read as an image, by its head; in full where its range is in question.

    Raises:
        DataError: it cannot.
    """
    try:
        with _opened(path) as opened:
            by_its_head = opened.mode in (*SHALLOW, *SIXTEEN)
    except Exception as error:
        raise _unreadable(path, error) from error
    if not by_its_head:
        read_image(path, 3, None)


def _opened(path: str | Path) -> Any:
    """The head of an image file."""
    from PIL import Image

    image = Image.open(path)
    if image.format == "EPS":  # Pillow would have another program run it
        image.close()
        raise ValueError("it is a PostScript program; allowed: pixels")
    return image


def _unreadable(path: str | Path, error: Exception) -> DataError:
    from PIL import UnidentifiedImageError

    why = shown(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        why = "it is in no known format"
    return DataError(f"{shown(path)} cannot be read as an image ({why})")


def _eight_bits(image: Any) -> Any:
    """The same picture with 8 bits a channel, and nothing transparent."""
    from PIL import Image

    if image.mode in ("I", "F", *SIXTEEN):
        return Image.fromarray(_grey_levels(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    return image


def _grey_levels(image: Any) -> np.ndarray:
    """(H, W) uint8 of grey pixels with 16 bits, or floats."""
    pixels: np.ndarray = np.asarray(image)
    levels: np.ndarray
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F":
        low, high = pixels.min(), pixels.max()
        if not (low >= 0 and high <= 1):  # nor where one is NaN
            raise ValueError(f"its pixels are floats of {low:g} to {high:g}; allowed: 0 to 1")
        levels = 255.0 * pixels
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):  # 16 bits in some of Pillow
        raise ValueError(
            "its pixels are integers of 32 bits or with a sign, whose range is not known; "
            "allowed: 8 bits, 16 bits without a sign, floats of 0 to 1"
        )
    else:
        levels = pixels / ((2 ** tags.get(BITS, (16,))[0] - 1) / 255)
    levels = np.rint(levels).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # which Pillow leaves as it is
        levels = 255 - levels
    if (transparent := image.info.get("transparency")) is not None:
        levels[pixels == transparent] = 255  # the background
    return levels
