"""What is asked of every data set before it is used; the messages name the file or the class."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from pipeline.errors import DataError
from stdb import Normalisation
from stdb import printable as shown

LISTED = 10  # of the faults that a message tells


class Faults:
    """Faults of a data set, to tell of all of them at once: the first ten, and how many."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, text: str) -> None:
        """One more."""
        self.count += 1
        if self.count <= LISTED:
            self.first.append(text)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """What is refused in here is one more, and the work goes on."""
        try:
            yield
        except DataError as error:
            self.add(str(error))

    def refuse(self, where: str) -> None:
        """End here where there are faults.

        Raises:
            DataError: a line for each of the first ten.
        """
        if self.count == 1:
            raise DataError(self.first[0])
        if self.count:
            more = [f"… and {self.count - LISTED} more"] if self.count > LISTED else []
            lines = "\n  ".join([*self.first, *more])
            raise DataError(f"{self.count} faults in {where}:\n  {lines}")


def check_classes(classes: list[str], where: str) -> None:
    """Names of classes go into files and pages, a line each.

    Raises:
        DataError: fewer than two, one twice, or a name that cannot be written.
    """
    faults = Faults()
    for name in classes:
        if not isinstance(name, str) or not name or shown(name, len(name)) != name:
            faults.add(
                f"class '{shown(name)}' in {where} has a name that cannot be written; "
                "allowed: UTF-8 without line breaks and other control characters"
            )
    faults.refuse(where)
    if len(set(classes)) < max(2, len(classes)):
        names = ", ".join(map(shown, classes[:LISTED]))
        raise DataError(
            f"{where} has {len(classes)} classes ({names}); allowed: two or more, each once"
        )


def check_samples(images: np.ndarray, labels: np.ndarray, classes: list[str], where: str) -> None:
    """Images and labels belong together, and every label has a class.

    Raises:
        DataError: other shapes or types, more of the one than of the other, a label out of range.
    """
    pixels = images.ndim == 4 and images.dtype == np.uint8 and images[0:1].size > 0
    names = images.ndim == 1 and images.dtype.kind in "UO" and len(images) > 0
    if not (pixels or names):
        raise DataError(
            f"{where} has images of shape {images.shape} and type {images.dtype}; allowed: "
            "(N, C, H, W) uint8, or (N,) names of files, one or more"
        )
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{where} has labels of shape {labels.shape} and type {labels.dtype}; allowed: "
            "integers (N,)"
        )
    if len(images) != len(labels):
        raise DataError(
            f"{where} has {len(images)} images and {len(labels)} labels; allowed: a label an image"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(wrong):
        raise DataError(
            f"{where} has labels out of range, {len(wrong)} of {len(labels)}; the first is "
            f"{labels[wrong[0]]}, of image {wrong[0]}; allowed: 0 to {len(classes) - 1}, a "
            "class each"
        )


def check_counts(labels: np.ndarray, classes: list[str], needed: int, where: str) -> None:
    """Every class has enough images for the splits that are drawn from it.

    Raises:
        DataError: names the classes that have not.
    """
    faults = Faults()
    counts = np.bincount(labels.astype(np.int64), minlength=len(classes))
    for name, count in zip(classes, counts.tolist(), strict=True):
        if count < needed:
            faults.add(
                f"class {shown(name)} of {where} has {count} image{'s' * (count != 1)} and cannot "
                f"be split; allowed: {needed} or more, one for each split that is drawn"
            )
    faults.refuse(where)


def check_channels(normalisation: Normalisation, channels: int, where: str) -> None:
    """There is a mean and a deviation for each channel.

    Raises:
        DataError: there is not.
    """
    try:
        normalisation.check_channels(channels, f"data.normalise: the images of {where} have")
    except ValueError as error:
        raise DataError(str(error)) from error


def check_memory(count: int, shape: tuple[int, ...], remedy: str) -> None:
    """The pixels of all images fit into the memory of this machine.

    Args:
        count: of images.
        shape: (C, H, W) of one.
        remedy: what to set instead.

    Raises:
        DataError: they do not.
    """
    needed = count * int(np.prod(shape, dtype=object))
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise DataError(
            f"{count} images of {'×'.join(map(str, shape))} take {needed / 2**30:.1f} GiB of "
            f"memory, and this machine has {there / 2**30:.1f}; allowed: {remedy}"
        )
