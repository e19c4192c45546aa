"""Data sets: where they come from, their splits, images and augmentation."""

from pipeline.data.augmentation import augment, cut_out, trivial_augment
from pipeline.data.splits import (
    Files,
    Samples,
    Split,
    load_split,
    save_split,
    subset,
    worker_batches,
)
from pipeline.errors import DataError

__all__ = [
    "DataError",
    "Files",
    "Samples",
    "Split",
    "augment",
    "cut_out",
    "load_split",
    "save_split",
    "subset",
    "trivial_augment",
    "worker_batches",
]
