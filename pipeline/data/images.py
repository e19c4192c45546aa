"""Images: files to pixels, and pixels to what a network sees."""

from pathlib import Path

import numpy as np
from torch import Tensor

from pipeline.errors import DataError


def normalise(images: Tensor) -> Tensor:
    """Uint8 pixels → float32 in [−1, 1], which the ANN sees and the SNN's encoder fires at."""
    return images.float().div_(127.5).sub_(1.0)


def read_image(path: str | Path, channels: int, size: int | None) -> np.ndarray:
    """An image file as (C, H, W) uint8; the largest square in its middle, where a size is given.

    Raises:
        DataError: it is no image.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = opened.convert("L" if channels == 1 else "RGB")
    except Exception as error:
        raise DataError(f"{path} cannot be read as an image ({error})") from error
    if size is not None and image.size != (size, size):
        side = min(image.size)
        left, top = (image.size[0] - side) // 2, (image.size[1] - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.array(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
