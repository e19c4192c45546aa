"""The splits of a data set, and how batches of them get to a device.

A split is one safetensors file of labels (N,), sample ids (N,), which name the random streams of a
sample, and images: (N, C, H, W) uint8 that live in memory (:class:`Split`), or, of a large data
set, the names of files that are read as they are needed (:class:`Files`). Its metadata have one
key, since nothing orders several: ``classes``, names by line, or ``about``, a JSON object.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.data.checks import check_samples
from pipeline.errors import DataError
from stdb import Preparation, preparation_of, read_image
from stdb import printable as shown


@dataclass(frozen=True)
class Split:
    """One split of a data set, or a batch of it, in memory."""

    images: Tensor  # (N, C, H, W) uint8
    labels: Tensor  # (N,) int64
    ids: Tensor  # (N,) int64
    classes: list[str]
    preparation: Preparation = field(default_factory=Preparation)

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self) -> Tensor:
        """(N, C, H, W) float32, as ANN and SNN see them."""
        return self.preparation.normalisation(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        c, h, w = self.images.shape[1:]
        return c, h, w

    def take(self, index: Tensor) -> "Split":
        """The samples with these positions."""
        return replace(
            self, images=self.images[index], labels=self.labels[index], ids=self.ids[index]
        )

    def to(self, device: torch.device) -> "Split":
        """The split on a device; does not wait for it where the memory is pinned."""
        images, labels, ids = (
            part.to(device, non_blocking=True) for part in (self.images, self.labels, self.ids)
        )
        return replace(self, images=images, labels=labels, ids=ids)

    def stream(self, batches: Sequence[Tensor], device: torch.device) -> Iterator["Split"]:
        """These batches of positions, one after the other, on a device."""
        for index in batches:
            yield self.take(index.to(self.labels.device)).to(device)


@dataclass(frozen=True)
class Files(Dataset[Tensor]):
    """A split that stays in its image files, which processes of their own read ahead of need.

    Attributes:
        names: paths, one an image.
        labels: (N,) int64.
        ids: (N,) int64.
        classes: names of the classes.
        shape: (C, H, W) that images are brought to.
        readers: processes that read; 0 reads in this one.
        preparation: what becomes of the images.
    """

    names: np.ndarray
    labels: Tensor
    ids: Tensor
    classes: list[str]
    shape: tuple[int, int, int]
    readers: int = 0
    preparation: Preparation = field(default_factory=Preparation)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> Tensor:
        channels, *size = self.shape
        name, resize = self.names[position], self.preparation.resize
        return torch.from_numpy(read_image(name, channels, (size[0], size[1]), resize))

    def take(self, index: Tensor) -> Split:
        """The samples with these positions, read now."""
        images = torch.empty((len(index), *self.shape), dtype=torch.uint8)
        for image, k in zip(images, index.tolist(), strict=True):
            image[:] = self[k]
        return self._batch(images, index)

    def to(self, _: torch.device) -> "Files":
        """Itself: batches go to a device, the split does not."""
        return self

    def stream(self, batches: Sequence[Tensor], device: torch.device) -> Iterator[Split]:
        """These batches of positions, in their order, on a device."""
        loader = DataLoader(
            self,
            batch_sampler=[index.tolist() for index in batches],
            num_workers=min(self.readers, len(batches)),
            pin_memory=device.type == "cuda",
        )
        for index, images in zip(batches, loader, strict=True):
            yield self._batch(images, index).to(device)

    def _batch(self, images: Tensor, index: Tensor) -> Split:
        labels, ids = self.labels[index], self.ids[index]
        return Split(images, labels, ids, self.classes, self.preparation)


Samples = Split | Files  # what stages get


def subset(split: Samples, count: int | None, seed: int) -> Samples:
    """A few of the samples, drawn by seed; all where ``count`` is None."""
    if count is None or count >= len(split):
        return split
    generator = torch.Generator().manual_seed(seed)
    return split.take(torch.randperm(len(split), generator=generator)[:count])


def worker_batches(count: int, size: int, rank: int, world: int) -> list[Tensor]:
    """The positions of a worker's batches of an evaluation.

    Whole batches go to a worker, so that they are made of the same images, and products round
    alike, whatever the number of workers.
    """
    return list(torch.arange(count).split(size)[rank::world])


def save_split(split: Samples, path: Path) -> None:
    """Write a split."""
    tensors = {"labels": split.labels, "ids": split.ids}
    about: dict[str, Any] = split.preparation.settings()
    if isinstance(split, Split):
        tensors["images"] = split.images
    else:
        joined = b"\0".join(map(os.fsencode, split.names))  # no name of a file has a byte 0
        tensors["names"] = torch.frombuffer(bytearray(joined), dtype=torch.uint8)
        about["shape"] = split.shape
    metadata = {"classes": "\n".join(split.classes)}
    if about:
        metadata = {"about": json.dumps({"classes": split.classes} | about)}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)


def load_split(path: Path, readers: int = 0) -> Samples:
    """Read a split that :func:`save_split` wrote.

    Args:
        path: of the file, <repository>/data/prepared/<split>.safetensors; names of image files
            are relative to the repository, also from the copy of a queued DVC experiment.
        readers: processes that read image files.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = _about(file.metadata())
            classes, shape = about["classes"], about.get("shape")
            labels, ids = file.get_tensor("labels"), file.get_tensor("ids")
            kept = file.get_tensor("images" if shape is None else "names")
        preparation = preparation_of(about)
        if shape is None:
            _check(kept.numpy(), labels, ids, classes)
            preparation.normalisation.check_channels(kept.shape[1], "its images have")
            return Split(kept, labels, ids, classes, preparation)
        c, h, w = map(int, shape)
        if c not in (1, 3) or h < 1 or w < 1:
            raise DataError(f"its images are {c}×{h}×{w}; allowed: 1 or 3 channels")
        preparation.normalisation.check_channels(c, "its images have")
        root = Path(os.environ.get("DVC_ROOT") or path.absolute().parents[2])
        names = np.array([str(root / os.fsdecode(n)) for n in kept.numpy().tobytes().split(b"\0")])
        _check(names, labels, ids, classes)
        return Files(names, labels, ids, classes, (c, h, w), readers, preparation)
    except Exception as error:
        why = shown(error) or type(error).__name__
        raise DataError(f"{path} is no split of a data set ({why}); run prepare_data") from error


def _about(metadata: dict[str, str]) -> dict[str, Any]:
    """What the metadata of a file say."""
    if "about" not in metadata:
        return {"classes": metadata["classes"].split("\n")}
    about = json.loads(metadata["about"])
    if not isinstance(about, dict):
        raise DataError("its metadata are no JSON object")
    return about


def _check(images: np.ndarray, labels: Tensor, ids: Tensor, classes: list[str]) -> None:
    check_samples(images, labels.numpy(), classes, "it")
    if ids.shape != labels.shape or ids.dtype != torch.int64 or labels.dtype != torch.int64:
        raise DataError("its labels and ids are not as many, or no int64")
