"""Images: files to pixels, pixels to a size; what becomes of them before a network sees them."""

import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .normalisation import Normalisation, normalisation_of

Size = tuple[int, int]  # (H, W)

LONGEST = 65_536  # pixels of the longer side then
BACKGROUND = "white"  # is seen where an image is transparent
SHALLOW = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV")  # modes of 8 bits
SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")  # modes of 16 bits, without a sign
LONGEST_NAME = 400  # characters of a name in a message
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF, and a value of the second


class DataError(ValueError):
    """Images, or a data set of them, that cannot be used; the message names the file or class."""


@dataclass(frozen=True)
class Preparation:
    """What becomes of images before a network sees them, beside their size.

    Attributes:
        resize: pixels that the shorter side is brought to before the middle of the size is cut out;
            None: the middle is cut out as large as it can be, and brought to the size.
        normalisation: of the pixels.

    Raises:
        ValueError: no number of pixels.
    """

    LARGEST: ClassVar[int] = 8192  # pixels that a shorter side is brought to

    resize: int | None = None
    normalisation: Normalisation = field(default_factory=Normalisation)

    def __post_init__(self) -> None:
        """Checked."""
        size = self.resize
        if size is not None and (type(size) is not int or not 1 <= size <= self.LARGEST):
            raise ValueError(f"resize is {size!r}; allowed: 1 to {self.LARGEST}, or none")

    def settings(self) -> dict[str, Any]:
        """What a file keeps of it; empty for the default."""
        kept = {"resize": self.resize, "normalisation": self.normalisation.settings()}
        return {name: value for name, value in kept.items() if value}


def preparation_of(kept: Mapping[str, Any]) -> Preparation:
    """What :meth:`Preparation.settings` gave.

    Raises:
        ValueError: it is something else.
    """
    return Preparation(kept.get("resize"), normalisation_of(kept.get("normalisation")))


def printable(name: object, longest: int = LONGEST_NAME) -> str:
    """A name or message of any origin on one line: no line breaks, no bytes that are not UTF-8.

    Args:
        name: it, or what ``str`` makes one of.
        longest: characters that are shown; of more the middle is left out.
    """
    text = "".join(ascii(c)[1:-1] if _breaks(c) else c for c in str(name))
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} … {text[-half:]}"


def _breaks(character: str) -> bool:
    """Control characters, line breaks, and bytes of names that are not UTF-8."""
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def read_image(
    path: str | Path, channels: int, size: Size | None, resize: int | None = None
) -> np.ndarray:
    """An image file as (C, H, W) uint8; its middle, where a size is given (:func:`to_size`).

    It is seen as a viewer shows it: upright by its EXIF orientation, on white where it is
    transparent, 0 to 65,535 of 16 bits (4,095 of 12) and 0 to 1 of floats as black to white. Of
    several frames it is the first.

    Raises:
        DataError: it is no image, or one whose range of pixels is not known.
    """
    _need_pillow()
    from PIL import ImageOps

    try:
        with _opened(path) as opened:
            ImageOps.exif_transpose(opened, in_place=True)
            image = _eight_bits(opened).convert("L" if channels == 1 else "RGB")
        if size is not None:
            image = to_size(image, size, resize)
    except Exception as error:
        raise _unreadable(path, error) from error
    pixels = np.array(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def to_size(image: Any, size: Size, resize: int | None) -> Any:
    """The middle of a Pillow image in (H, W) pixels, bilinear with antialiasing.

    Without ``resize`` it is the largest part of that shape, brought to the size. With it the
    shorter side is first brought to so many pixels, as torchvision's published weights ask for.

    Raises:
        ValueError: it is so narrow that it would take all of the memory.
    """
    height, width = size
    wide, high = image.size
    if resize is not None:
        shorter, longer = min(wide, high), max(wide, high)
        if resize * longer // shorter > LONGEST:
            raise ValueError(
                f"it is {wide}×{high} pixels, and with a shorter side of {resize} the longer one "
                f"has more than {LONGEST:,}"
            )
        image = _resized(image, (resize * wide // shorter, resize * high // shorter))
        return _middle(image, (width, height), round)
    if wide * height >= high * width:
        wide = max(1, round(high * width / height))
    else:
        high = max(1, round(wide * height / width))
    return _resized(_middle(image, (wide, high), int), (width, height))


def _middle(image: Any, part: tuple[int, int], whole: Callable[[float], int]) -> Any:
    """So many pixels across and down; ``whole`` says where what is left over is odd."""
    left, top = (
        whole((there - wanted) / 2) for there, wanted in zip(image.size, part, strict=True)
    )
    return image.crop((left, top, left + part[0], top + part[1]))


def _resized(image: Any, wanted: tuple[int, int]) -> Any:
    from PIL import Image

    return image if image.size == wanted else image.resize(wanted, Image.Resampling.BILINEAR)


def check_image(path: str | Path) -> None:
    """Whether a file can be read as an image, by its head; in full where its range is in question.

    Raises:
        DataError: it cannot.
    """
    _need_pillow()
    try:
        with _opened(path) as opened:
            by_its_head = opened.mode in (*SHALLOW, *SIXTEEN)
    except Exception as error:
        raise _unreadable(path, error) from error
    if not by_its_head:
        read_image(path, 3, None)


def suffixes() -> set[str]:
    """Of the files that can be read, in small letters: ``.png``, ``.jpg`` and so on."""
    _need_pillow()
    from PIL import Image

    return {name for name, form in Image.registered_extensions().items() if form in Image.OPEN}


def _need_pillow() -> None:
    """Refuse to go on where Pillow is missing.

    Raises:
        DataError: it is; says how to get it.
    """
    if find_spec("PIL") is None:
        raise DataError("Pillow is missing, which reads images: pip install 'stdb[images]'")


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

    why = printable(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        why = "it is in no known format"
    return DataError(f"{printable(path)} cannot be read as an image ({why})")


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
