"""Where data sets come from: scikit-learn's digits, torchvision, and anyone's class folders.

A source gives its images as (N, C, H, W) uint8, or, where they are too many for the memory, as the
(N,) names of their files.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.data.archives import unpacked
from pipeline.data.checks import Faults, check_channels, check_memory
from pipeline.data.folders import Found, find_images
from pipeline.errors import DataError
from pipeline.files import root
from stdb import check_image, read_image
from stdb import printable as shown

if TYPE_CHECKING:
    from pipeline.params import DataParams

Arrays = tuple[np.ndarray, np.ndarray]  # images or names of files, labels (N,)

IN_MEMORY = 4 << 30  # bytes of pixels; with ``data.stream: auto`` larger data sets stay in files


class Held(NamedTuple):
    """Test images of a source that has a validation split as well."""

    images: np.ndarray
    labels: np.ndarray
    validation: Arrays


Read = tuple[Arrays, Arrays | Held | None, list[str]]


def read_source(params: "DataParams") -> Read:
    """The source's training images, what it holds out itself, and the names of the classes."""
    if params.path is None and params.source in NEEDS_PATH:
        raise DataError(f"data.{path_is_missing(params.source)}")
    return SOURCES[params.source](params)


def path_is_missing(source: str) -> str:
    """What to say where this source has no path."""
    return f"path is null; allowed with source: {source}: {NEEDS_PATH[source]}"


def _digits(_: "DataParams") -> tuple[Arrays, None, list[str]]:
    """scikit-learn's 1,797 handwritten digits, 8×8 pixels of 17 grey levels; no download."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    return (images, digits.target), None, [str(name) for name in digits.target_names]


def _torchvision(params: "DataParams") -> tuple[Arrays, Arrays, list[str]]:
    from torchvision import datasets

    dataset = {
        "mnist": datasets.MNIST,
        "fashion_mnist": datasets.FashionMNIST,
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
    }[params.source]
    folder = root() / (params.path or "data/downloads")
    parts = []
    for train in (True, False):
        try:  # torchvision compares what it downloads with digests of its own
            part = dataset(str(folder), train=train, download=True)
        except Exception as error:
            why = shown(error) or type(error).__name__
            raise DataError(
                f"{params.source}, {'train' if train else 'test'}, in {shown(folder)} cannot be "
                f"read or downloaded ({why}); "
                f"{_by_hand(dataset, folder)}, or set data.source to folder and data.path to a "
                "folder or archive of class folders"
            ) from error
        images = np.asarray(part.data)
        images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        parts.append((images, np.asarray(part.targets)))
    return parts[0], parts[1], [str(name) for name in part.classes]


def _by_hand(dataset: Any, folder: Path) -> str:
    """Where a person without a network puts what torchvision would download."""
    if resources := getattr(dataset, "resources", None):  # MNIST and its like: a file a part
        names = [name for name, _ in resources]
        return (
            f"fetch {', '.join(names)} from {dataset.mirrors[0]} elsewhere and put them into "
            f"{folder / dataset.__name__ / 'raw'}"
        )
    return f"fetch {dataset.url} elsewhere and put {dataset.filename} into {folder}"


# -- class folders ---------------------------------------------------------------------------------


def _folder_or_archive(params: "DataParams") -> Read:
    """What ``data.path`` names."""
    assert params.path is not None
    path = root() / params.path
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError) as error:  # no name of a file: too long, a byte 0
        raise DataError(f"data.path is {shown(path)}, no path ({shown(error)})") from error
    if not (is_file or is_folder):
        what = "neither a folder nor a file" if path.exists() else "which does not exist"
        raise DataError(f"data.path is {shown(path)}, {what}; allowed: a folder or an archive")
    if is_folder:
        found = find_images(path)
        return _arrays(found, _pixels(found, path, params))
    with unpacked(path) as archive:
        found = find_images(archive.folder)
        pixels = _pixels(found, path, params)
        if pixels is None:  # the files are needed on
            found = find_images(archive.keep())
        return _arrays(found, pixels)


def _arrays(found: Found, pixels: np.ndarray | None) -> Read:
    """Images and labels by split; names of files where there are no pixels."""
    everything = _names(found.every_file) if pixels is None else pixels
    parts: dict[str, Arrays] = {}
    start = 0
    for name, labels in found.labels.items():
        parts[name] = everything[start : start + len(labels)], labels
        start += len(labels)
    test, validation = parts.get("test"), parts.get("validation")
    held = Held(*test, validation) if test is not None and validation is not None else test
    return parts["train"], held, found.classes


def _names(files: list[Path]) -> np.ndarray:
    """Relative to the repository where they are in it."""
    here = root()
    return np.array([str(f.relative_to(here) if f.is_relative_to(here) else f) for f in files])


def _pixels(found: Found, place: Path, params: "DataParams") -> np.ndarray | None:
    """All images, (N, C, H, W) uint8; None where they are to be streamed, and can be.

    Raises:
        DataError: names the first ten files that cannot be used.
    """
    for note in found.notes:
        print(f"[prepare_data] {shown(place)}: {note}", flush=True)
    files = found.every_file
    first, shape = _first(files, place, params)
    if params.stream is True or (
        params.stream == "auto" and len(files) * math.prod(shape) > IN_MEMORY
    ):
        _check(files, place, params)
        return None
    check_memory(len(files), shape, "data.stream: true, or a smaller data.image_size")
    images, faults = np.empty((len(files), *shape), np.uint8), Faults()
    for position, file in enumerate(files):
        with faults.noted():
            image = read_image(file, shape[0], params.size, params.resize)
            if image.shape != shape:
                raise DataError(
                    f"{shown(file)} is {_pixels_of(image.shape)} and {shown(first)} "
                    f"{_pixels_of(shape)}; set data.image_size to bring them to one size"
                )
            images[position] = image
        if position and position % 50_000 == 0:
            print(f"[prepare_data] {position} of {len(files)} images read", flush=True)
    faults.refuse(shown(place))
    return images


def _first(files: list[Path], place: Path, params: "DataParams") -> tuple[Path, tuple[int, ...]]:
    """The first file that is an image, and the (C, H, W) that it gives all of them."""
    channels, size = 1 if params.grayscale else 3, params.size
    check_channels(params.normalisation, channels, shown(place))
    if size is not None:
        return files[0], (channels, *size)
    faults = Faults()
    for file in files:
        with faults.noted():
            shape = read_image(file, channels, None).shape
            if shape[1] != shape[2]:
                break
            return file, shape
    else:
        faults.refuse(shown(place))
    raise DataError(
        f"{shown(file)} is {_pixels_of(shape)}; set data.image_size: pixels of a side for square "
        f"images, or [{shape[1]}, {shape[2]}]"
    )


def _pixels_of(shape: tuple[int, ...]) -> str:
    return f"{shape[2]}×{shape[1]} pixels"


def _check(files: list[Path], place: Path, params: "DataParams") -> None:
    """Find out before a training, not in it, that a file is no image; reads their heads."""
    if params.image_size is None:
        raise DataError(
            f"data.image_size is null; allowed for the {len(files)} images of {shown(place)}, "
            "which are read from their files as they are needed: pixels of a side, or [height, "
            "width]"
        )
    faults = Faults()
    for position, file in enumerate(files):
        with faults.noted():
            check_image(file)
        if position and position % 50_000 == 0:
            print(f"[prepare_data] {position} of {len(files)} files looked at", flush=True)
    faults.refuse(shown(place))


Source = Callable[["DataParams"], Read]
SOURCES: dict[str, Source] = {
    "digits": _digits,
    **dict.fromkeys(("mnist", "fashion_mnist", "cifar10", "cifar100"), _torchvision),
    "folder": _folder_or_archive,
}
NEEDS_PATH = {"folder": "a folder or an archive"}  # source → what its ``data.path`` names
