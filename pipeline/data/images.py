"""What a data set asks of its images beside what :mod:`stdb.images` does with each."""

from typing import Any

import numpy as np
from pydantic_core import PydanticCustomError

from stdb import NORMALISATIONS, Normalisation, to_size


def array_to_size(pixels: np.ndarray, size: tuple[int, int], resize: int | None) -> np.ndarray:
    """:func:`stdb.to_size` of (C, H, W) uint8."""
    from PIL import Image

    return np.stack([np.asarray(to_size(Image.fromarray(c), size, resize)) for c in pixels])


def known_pixels(value: Any) -> Any:
    """A pydantic validator: a name of ``stdb.NORMALISATIONS``, mean and std by channel, or None."""
    name = isinstance(value, str) and value in NORMALISATIONS
    numbers = isinstance(value, dict) and set(value) == {"mean", "std"} and value["mean"]
    if not (value is None or name or numbers):
        names = ", ".join(NORMALISATIONS)
        raise PydanticCustomError(
            "normalise", "null, {names}, or {mean: …, std: …} with a list each", {"names": names}
        )
    if numbers:
        Normalisation(**value)  # refuses numbers that no channel has
    return value
