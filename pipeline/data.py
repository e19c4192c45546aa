"""Data sets: read, split, kept as uint8 tensors; batches normalised to [−1, 1] on the device.

A split is one safetensors file of images (N, C, H, W) uint8, labels (N,) and sample ids (N,), which
name the random streams of a sample. Reading it back needs nothing but the file.
"""

import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.params import DataParams
from stdb.encoding import derive, sample_keys, uniform

CROP_STREAM, FLIP_STREAM = 0xC0, 0xF1


class DataError(ValueError):
    """A data set that cannot be used; the message says which file or class, and what to do."""


@dataclass(frozen=True)
class Split:
    """One split of a data set, in memory."""

    images: Tensor  # (N, C, H, W) uint8
    labels: Tensor  # (N,) int64
    ids: Tensor  # (N,) int64
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        c, h, w = self.images.shape[1:]
        return c, h, w

    def take(self, index: Tensor) -> "Split":
        """The samples with these positions."""
        return Split(self.images[index], self.labels[index], self.ids[index], self.classes)

    def share(self, rank: int, world: int) -> "Split":
        """What one of ``world`` workers gets; the shares are disjoint and complete."""
        return self.take(torch.arange(rank, len(self), world))

    def to(self, device: torch.device) -> "Split":
        """The split on a device."""
        return Split(
            self.images.to(device), self.labels.to(device), self.ids.to(device), self.classes
        )

    def batches(self, size: int) -> Iterator["Split"]:
        """Consecutive parts of at most ``size`` samples."""
        for index in torch.arange(len(self), device=self.labels.device).split(size):
            yield self.take(index)


def normalise(images: Tensor) -> Tensor:
    """Uint8 pixels → float32 in [−1, 1], which the ANN sees and the SNN's encoder fires at."""
    return images.float().div_(127.5).sub_(1.0)


def augment(images: Tensor, ids: Tensor, seed: int, epoch: int) -> Tensor:
    """Random crop after padding by 4, and horizontal flip: a function of (seed, epoch, sample)."""
    keys = derive(sample_keys(ids, epoch), seed)
    padded = F.pad(images, (4, 4, 4, 4))
    size = images.shape[-1]
    offset = (uniform(derive(keys, CROP_STREAM), 2) * 9).long()  # (N, 2) of 0 … 8
    pixel = torch.arange(size, device=images.device)
    rows = (offset[:, 0, None] + pixel)[:, None, :, None]  # (N, 1, H, 1)
    columns = (offset[:, 1, None] + pixel)[:, None, None, :]  # (N, 1, 1, W)
    sample = torch.arange(len(images), device=images.device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    cropped = padded[sample, channel, rows, columns]
    flip = uniform(derive(keys, FLIP_STREAM), 1) < 0.5
    return torch.where(flip[:, :, None, None], cropped.flip(-1), cropped)


# -- files ---------------------------------------------------------------------------------------


def save_split(split: Split, path: Path) -> None:
    """Write a split."""
    tensors = {"images": split.images, "labels": split.labels, "ids": split.ids}
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        path,
        metadata={"classes": "\n".join(split.classes)},
    )


def load_split(path: Path) -> Split:
    """Read a split that :func:`save_split` wrote."""
    try:
        with safe_open(path, framework="pt") as file:
            classes = file.metadata()["classes"].split("\n")
            images, labels, ids = (file.get_tensor(n) for n in ("images", "labels", "ids"))
            return Split(images, labels, ids, classes)
    except Exception as error:
        raise DataError(f"{path} is no split of a data set ({error}); run prepare_data") from error


def load_splits(folder: Path, device: torch.device, *names: str) -> list[Split]:
    """The splits of these names that prepare_data wrote to a folder, on a device."""
    return [load_split(folder / f"{name}.safetensors").to(device) for name in names]


# -- sources -------------------------------------------------------------------------------------

Arrays = tuple[np.ndarray, np.ndarray]  # images (N, C, H, W) uint8, labels (N,)


def read_source(params: DataParams) -> tuple[Arrays, Arrays | None, list[str]]:
    """The source's training images, its test images if it has any, and the names of the classes."""
    if params.source == "digits":
        return _digits()
    if params.source == "folder":
        assert params.path is not None
        return _folder(Path(params.path), params)
    return _torchvision(params)


def _digits() -> tuple[Arrays, None, list[str]]:
    """scikit-learn's 1,797 handwritten digits, 8×8 pixels of 17 grey levels; no download."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    return (images, digits.target), None, [str(name) for name in digits.target_names]


def _torchvision(params: DataParams) -> tuple[Arrays, Arrays, list[str]]:
    from torchvision import datasets

    dataset = {
        "mnist": datasets.MNIST,
        "fashion_mnist": datasets.FashionMNIST,
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
    }[params.source]
    root = Path(params.path or "data/downloads")
    parts = []
    for train in (True, False):
        try:
            part = dataset(str(root), train=train, download=True)
        except Exception as error:
            raise DataError(
                f"{params.source} is not in {root} and could not be downloaded ({error}); "
                f"put torchvision's files for {dataset.__name__} into {root}, or set data.source "
                "to folder and data.path to a folder of class folders"
            ) from error
        images = np.asarray(part.data)
        images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        parts.append((images, np.asarray(part.targets)))
    return parts[0], parts[1], [str(name) for name in part.classes]


def _folder(path: Path, params: DataParams) -> tuple[Arrays, Arrays | None, list[str]]:
    """Class folders, or ``train`` and ``test`` with class folders each; folder or archive."""
    if not path.exists():
        raise DataError(f"data.path is {path}, which does not exist")
    if path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            _unpack(path, Path(folder))
            return _folder(_root(Path(folder)), params)
    train = next((path / n for n in ("train", "training") if (path / n).is_dir()), None)
    test = next((path / n for n in ("test", "val") if (path / n).is_dir()), None)
    if train is None or test is None:
        images, labels, classes = _class_folders(path, params)
        return (images, labels), None, classes
    images, labels, classes = _class_folders(train, params)
    test_images, test_labels, test_classes = _class_folders(test, params)
    if classes != test_classes:
        raise DataError(
            f"{train} and {test} have different classes: "
            f"{', '.join(sorted(set(classes) ^ set(test_classes)))} in only one of them"
        )
    return (images, labels), (test_images, test_labels), classes


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


def _root(folder: Path) -> Path:
    """Skip a single folder around everything."""
    inside = [entry for entry in folder.iterdir() if not _ignored(entry)]
    return _root(inside[0]) if len(inside) == 1 and inside[0].is_dir() else folder


def _class_folders(root: Path, params: DataParams) -> tuple[np.ndarray, np.ndarray, list[str]]:
    from PIL import Image

    folders = sorted(p for p in root.iterdir() if p.is_dir() and not _ignored(p))
    if len(folders) < 2:
        raise DataError(
            f"{root} has {len(folders)} class folders; allowed: one folder per class, two or more"
        )
    mode = "L" if params.grayscale else "RGB"
    images, labels = [], []
    size = (params.image_size, params.image_size) if params.image_size else None
    for label, folder in enumerate(folders):
        files = sorted(p for p in folder.rglob("*") if p.is_file() and not _ignored(p))
        if not files:
            raise DataError(f"class folder {folder} is empty; fill it or delete it")
        for file in files:
            try:
                with Image.open(file) as opened:
                    image = opened.convert(mode)
            except Exception as error:
                raise DataError(f"{file} cannot be read as an image ({error})") from error
            if size is None:
                size = image.size
            if image.size != size:
                if params.image_size is None:
                    raise DataError(
                        f"{file} is {image.size[0]}×{image.size[1]} pixels and the images before "
                        f"it {size[0]}×{size[1]}; set data.image_size to bring them to one size"
                    )
                image = _crop_square(image).resize(size, Image.Resampling.BILINEAR)
            images.append(np.asarray(image))
            labels.append(label)
    stacked = np.stack(images)
    stacked = stacked[:, None] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2)
    if stacked.shape[2] != stacked.shape[3]:
        raise DataError(
            f"the images in {root} are {stacked.shape[3]}×{stacked.shape[2]} pixels; "
            "set data.image_size to make them square"
        )
    return stacked, np.asarray(labels), [folder.name for folder in folders]


def _crop_square(image):
    """The largest square in the middle of an image."""
    side = min(image.size)
    left, top = (image.size[0] - side) // 2, (image.size[1] - side) // 2
    return image.crop((left, top, left + side, top + side))
