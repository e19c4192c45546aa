"""Where data sets come from: scikit-learn's digits, torchvision, and anyone's class folders.

A source gives its images as (N, C, H, W) uint8, or, where they are too many for the memory, as the
(N,) names of their files.
"""

import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.images import read_image
from pipeline.errors import DataError
from pipeline.files import root

if TYPE_CHECKING:
    from pipeline.params import DataParams

Arrays = tuple[np.ndarray, np.ndarray]  # images or names of files, labels (N,)

IN_MEMORY = 4 << 30  # bytes of pixels; with ``data.stream: auto`` larger data sets stay in files
UNPACKED = Path("data/unpacked")


def read_source(params: "DataParams") -> tuple[Arrays, Arrays | None, list[str]]:
    """The source's training images, its test images if it has any, and the names of the classes."""
    return SOURCES[params.source](params)


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
            raise DataError(
                f"{params.source} is not in {folder} and could not be downloaded ({error}); "
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


def _folder_or_archive(params: "DataParams") -> tuple[Arrays, Arrays | None, list[str]]:
    """What ``data.path`` names."""
    assert params.path is not None
    return _folder(root() / params.path, params)


def _folder(path: Path, params: "DataParams") -> tuple[Arrays, Arrays | None, list[str]]:
    """Class folders, or ``train`` and ``test`` with class folders each; folder or archive."""
    if not path.exists():
        raise DataError(f"data.path is {path}, which does not exist")
    if path.is_file():
        return _archive(path, params)
    train = next((path / n for n in ("train", "training") if (path / n).is_dir()), None)
    test = next((path / n for n in ("test", "val") if (path / n).is_dir()), None)
    if train is None or test is None:
        names, labels, classes = _class_folders(path)
        return (_read(names, path, params), labels), None, classes
    names, labels, classes = _class_folders(train)
    test_names, test_labels, test_classes = _class_folders(test)
    if classes != test_classes:
        raise DataError(
            f"{train} and {test} have different classes: "
            f"{', '.join(sorted(set(classes) ^ set(test_classes)))} in only one of them"
        )
    both = _read([*names, *test_names], path, params)
    images, test_images = both[: len(names)], both[len(names) :]
    return (images, labels), (test_images, test_labels), classes


def _class_folders(place: Path) -> tuple[list[Path], np.ndarray, list[str]]:
    """Files, their labels, and the names of the classes."""
    folders = sorted(p for p in place.iterdir() if p.is_dir() and not _ignored(p))
    if len(folders) < 2:
        raise DataError(
            f"{place} has {len(folders)} class folders; allowed: one folder per class, two or more"
        )
    names: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        files = sorted(p for p in folder.rglob("*") if p.is_file() and not _ignored(p))
        if not files:
            raise DataError(f"class folder {folder} is empty; fill it or delete it")
        names += files
        labels += [label] * len(files)
    return names, np.asarray(labels), [folder.name for folder in folders]


def _read(names: list[Path], place: Path, params: "DataParams") -> np.ndarray:
    """The images of these files, (N, C, H, W) uint8; their names where they are to be streamed."""
    channels = 1 if params.grayscale else 3
    first = read_image(names[0], channels, params.image_size)
    if params.stream is True or (params.stream == "auto" and len(names) * first.size > IN_MEMORY):
        _check(names, params)
        here = root()
        return np.array([str(n.relative_to(here) if n.is_relative_to(here) else n) for n in names])
    if first.shape[1] != first.shape[2]:
        raise DataError(
            f"the images in {place} are {first.shape[2]}×{first.shape[1]} pixels; "
            "set data.image_size to make them square"
        )
    images = np.empty((len(names), *first.shape), np.uint8)
    for position, name in enumerate(names):
        image = read_image(name, channels, params.image_size)
        if image.shape != first.shape:
            raise DataError(
                f"{name} is {image.shape[2]}×{image.shape[1]} pixels and {names[0]} "
                f"{first.shape[2]}×{first.shape[1]}; set data.image_size to bring them to one size"
            )
        images[position] = image
        if position and position % 50_000 == 0:
            print(f"[prepare_data] {position} of {len(names)} images read", flush=True)
    return images


def _check(names: list[Path], params: "DataParams") -> None:
    """Find out before a training, not in it, that a file is no image; reads their heads."""
    from PIL import Image

    if params.image_size is None:
        raise DataError(
            f"data.image_size is null; allowed for the {len(names)} images of {params.path}, "
            "which are read from their files as they are needed: a number of pixels"
        )
    for position, name in enumerate(names):
        try:
            Image.open(name).close()
        except Exception as error:
            raise DataError(f"{name} cannot be read as an image ({error})") from error
        if position and position % 50_000 == 0:
            print(f"[prepare_data] {position} of {len(names)} files looked at", flush=True)


# -- archives --------------------------------------------------------------------------------------


def _archive(path: Path, params: "DataParams") -> tuple[Arrays, Arrays | None, list[str]]:
    """What is in an archive; it stays unpacked where its images are too many for the memory."""
    state = path.stat()
    unpacked = root() / UNPACKED
    folder = unpacked / f"{path.name}-{state.st_size}-{state.st_mtime_ns}"
    if not folder.exists():
        unpacked.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=unpacked) as temporary:
            inside = Path(temporary) / "all"
            _unpack(path, inside)
            contents = _folder(_inside(inside), params)
            if contents[0][0].ndim == 4:
                return contents
            inside.rename(folder)
    return _folder(_inside(folder), params)


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack; members that would land outside ``folder`` are refused."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                file.extractall(folder)
        else:
            with tarfile.open(archive) as file:
                file.extractall(folder, filter="data")
                rest: Any = file.fileobj
                rest.seek(file.offset)  # tarfile takes a cut-off end for the end
                if not rest.read().startswith(bytes(tarfile.BLOCKSIZE)):
                    raise tarfile.ReadError("it ends before its end mark")
    except Exception as error:  # every compression has errors of its own for a broken file
        raise DataError(
            f"{archive} cannot be unpacked ({error}); allowed: tar, tar.gz, zip"
        ) from error


def _ignored(path: Path) -> bool:
    """Hidden files, and what macOS adds to archives."""
    return path.name.startswith(".") or path.name == "__MACOSX"


def _inside(folder: Path) -> Path:
    """Skip a single folder around everything."""
    inside = [entry for entry in folder.iterdir() if not _ignored(entry)]
    return _inside(inside[0]) if len(inside) == 1 and inside[0].is_dir() else folder


Source = Callable[["DataParams"], tuple[Arrays, Arrays | None, list[str]]]
SOURCES: dict[str, Source] = {
    "digits": _digits,
    **dict.fromkeys(("mnist", "fashion_mnist", "cifar10", "cifar100"), _torchvision),
    "folder": _folder_or_archive,
}
