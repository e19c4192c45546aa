"""Stage prepare_data: read the data set, split it, keep each split as one file of uint8 images.

    python -m pipeline.prepare_data

Out: data/prepared/{train,validation,test}.safetensors and metrics/data.json. The splits are
stratified by class and drawn by ``data.seed``; a source's own test and validation splits are kept
as they are. Of a data set that is too large for the memory the names of its files are kept.
"""

from typing import Any

import numpy as np
import torch

from pipeline.data import DataError, Files, Samples, Split, save_split
from pipeline.data.checks import (
    check_channels,
    check_classes,
    check_counts,
    check_memory,
    check_samples,
)
from pipeline.data.images import array_to_size
from pipeline.data.sources import Arrays, Held, read_source
from pipeline.files import DATA, METRICS, digest, write_json, writing
from pipeline.params import DataParams
from pipeline.stage import Stage, stage_command
from stdb import printable as shown

Part = tuple[np.ndarray, np.ndarray, np.ndarray]  # images or names of files, labels, ids


def main(stage: Stage) -> None:
    """Read, split, write."""
    params = stage.params.data
    train, test, classes = read_source(params)
    splits = split(params, train, test, classes)
    listed = ", ".join(classes[:10]) + ", …" * (len(classes) > 10)
    stage.say(f"{params.source}: {len(train[1])} images of {len(classes)} classes ({listed})")
    own = {"validation": isinstance(test, Held), "test": test is not None}
    summary: dict[str, Any] = {"classes": classes, "shape": list(splits["train"].shape)}
    for name, part in splits.items():
        path = DATA / f"{name}.safetensors"
        with writing(path) as temporary:
            save_split(part, temporary)
        summary[name] = {"images": len(part), "sha256": digest(path)}
        summary[name] |= {"own": True} if own.get(name) else {}
        where = "" if isinstance(part, Split) else ", read from their files as they are needed"
        whose = ", the source's own" if own.get(name) else ""
        stage.say(
            f"{name:10} {len(part):6} images of {'×'.join(map(str, part.shape))}{whose}{where}"
        )
    write_json(METRICS / "data.json", summary)
    stage.log({f"images/{name}": len(part) for name, part in splits.items()})


def split(
    params: DataParams, train: Arrays, test: Arrays | Held | None, classes: list[str]
) -> dict[str, Samples]:
    """Train, validation and test; a sample's id is its position in the source.

    Args:
        params: which shares are drawn, and by which seed.
        train: images (N, C, H, W) uint8 or names of files (N,), and labels (N,).
        test: what the source holds out itself.
        classes: their names.

    Raises:
        DataError: images, labels and classes do not fit each other, or cannot be split.
    """
    parts = _own(train, test)
    _check(params, parts, classes)
    images, labels, ids = parts["train"]
    try:
        if "test" not in parts:
            ids, drawn = _draw(ids, labels, params.test_fraction, params.seed)
            parts["test"] = images[drawn], labels[drawn], drawn
        if params.train_limit is not None and params.train_limit < len(ids):
            ids = _limited(ids, labels, params.train_limit, params.seed)
        if "validation" not in parts:
            ids, drawn = _draw(ids, labels, params.validation_fraction, params.seed)
            parts["validation"] = images[drawn], labels[drawn], drawn
    except ValueError as error:
        raise DataError(
            f"the {len(ids)} training images of {len(classes)} classes cannot be split ({error}); "
            "every split needs an image of every class"
        ) from error
    check_counts(labels[ids], classes, 1, "the training images that are left")
    parts["train"] = images[ids], labels[ids], ids
    return {name: _split(params, *parts[name], classes) for name in ("train", "validation", "test")}


def _own(train: Arrays, test: Arrays | Held | None) -> dict[str, Part]:
    """The splits that the source has itself."""
    given = {"train": train}
    if test is not None:
        given["test"] = test[0], test[1]
    if isinstance(test, Held):
        given["validation"] = test.validation
    parts, start = dict[str, Part](), 0
    for name, (images, labels) in given.items():
        parts[name] = images, labels, np.arange(start, start + len(labels))
        start += len(labels)
    return parts


def _check(params: DataParams, parts: dict[str, Part], classes: list[str]) -> None:
    """What any source gives can be used."""
    source = params.source if params.path is None else f"{params.source} {shown(params.path)}"
    check_classes(classes, source)
    for name, (images, labels, _) in parts.items():
        check_samples(images, labels, classes, f"{source}, {name},")
    size = params.size
    shapes = {images.shape[1:] for images, _, _ in parts.values()}  # (C, H, W), of files ()
    if size is None and any(len(shape) != 3 or shape[1] != shape[2] for shape in shapes):
        raise DataError(
            f"data.image_size is null; allowed for {source}, whose images are not square or stay "
            "in their files: pixels of a side, or [height, width]"
        )
    if len({shape if size is None else shape[:1] for shape in shapes}) > 1:
        said = " and ".join("×".join(map(str, shape)) or "files" for shape in sorted(shapes))
        raise DataError(f"{source} has images of {said}; allowed: one shape in all splits")
    if shape := shapes.pop():
        check_channels(params.normalisation, shape[0], source)
        count = sum(len(labels) for _, labels, _ in parts.values())
        check_memory(count, (shape[0], *(size or shape[1:])), "a smaller data.image_size")
    check_counts(parts["train"][1], classes, 4 - len(parts), source)


def _split(
    params: DataParams, images: np.ndarray, labels: np.ndarray, ids: np.ndarray, classes: list[str]
) -> Samples:
    own = torch.from_numpy(labels.astype(np.int64)), torch.from_numpy(ids), classes
    if images.ndim == 4:
        pixels = torch.from_numpy(_to_size(images, params))
        return Split(pixels, *own, params.preparation)
    assert params.size is not None
    shape = (1 if params.grayscale else 3, *params.size)
    return Files(images, *own, shape, preparation=params.preparation)


def _draw(
    ids: np.ndarray, labels: np.ndarray, size: float | int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split ids into the rest and ``size`` of them, equal by class.

    A rare class, of which that would be no image, gives one beyond ``size`` where it has another.
    """
    rest, drawn = _by_class(ids, labels, size, seed)
    for rare in np.setdiff1d(labels[rest], labels[drawn]):
        one, *others = np.flatnonzero(labels[rest] == rare)
        if others:
            rest, drawn = np.delete(rest, one), np.append(drawn, rest[one])
    return rest, drawn


def _limited(ids: np.ndarray, labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """So many of the ids, equal by class."""
    classes = len(np.unique(labels[ids]))
    if len(ids) - count < classes:  # not one of each class goes: too few to be drawn by class
        return np.random.default_rng(seed).permutation(ids)[:count]
    return _by_class(ids, labels, len(ids) - count, seed)[0]


def _by_class(
    ids: np.ndarray, labels: np.ndarray, size: float | int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split ids into the rest and ``size`` of them, with a class's share in both."""
    from sklearn.model_selection import train_test_split

    rest, drawn = train_test_split(
        ids, test_size=size, stratify=labels[ids], random_state=seed, shuffle=True
    )
    return np.asarray(rest), np.asarray(drawn)


def _to_size(images: np.ndarray, params: DataParams) -> np.ndarray:
    """(N, C, H, W) as the parameters say, with the pixels that files of these images would have."""
    read = params.source == "folder"  # each file in this size
    fits = params.resize is None and images.shape[2:] == params.size
    if params.size is None or read or fits:
        return np.ascontiguousarray(images)
    sized = np.empty((*images.shape[:2], *params.size), np.uint8)
    for place, image in zip(sized, images, strict=True):
        place[:] = array_to_size(image, params.size, params.resize)
    return sized


if __name__ == "__main__":
    stage_command("prepare_data", main, __doc__)
