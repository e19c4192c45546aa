"""Stage prepare_data: read the data set, split it, keep each split as one file of uint8 images.

    python -m pipeline.prepare_data

Out: data/prepared/{train,validation,test}.safetensors and metrics/data.json. The splits are
stratified by class and drawn by ``data.seed``; a source's own test split is kept as it is. Of a
data set that is too large for the memory the names of its files are kept.
"""

from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split

from pipeline.data import DataError, Files, Samples, Split, save_split
from pipeline.data.sources import read_source
from pipeline.files import DATA, METRICS, digest, write_json, writing
from pipeline.params import DataParams
from pipeline.stage import Stage, stage_command


def main(stage: Stage) -> None:
    """Read, split, write."""
    params = stage.params.data
    train, test, classes = read_source(params)
    stage.say(f"{params.source}: {len(train[1])} images of {len(classes)} classes")
    splits = split(params, train, test, classes)
    summary: dict[str, Any] = {"classes": classes, "shape": list(splits["train"].shape)}
    for name, part in splits.items():
        path = DATA / f"{name}.safetensors"
        with writing(path) as temporary:
            save_split(part, temporary)
        summary[name] = {"images": len(part), "sha256": digest(path)}
        where = "" if isinstance(part, Split) else ", read from their files as they are needed"
        stage.say(f"{name:10} {len(part):6} images of {'×'.join(map(str, part.shape))}{where}")
    write_json(METRICS / "data.json", summary)
    stage.log({f"images/{name}": len(part) for name, part in splits.items()})


def split(
    params: DataParams,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray] | None,
    classes: list[str],
) -> dict[str, Samples]:
    """Train, validation and test; a sample's id is its position in the source."""
    images, labels = train
    ids = np.arange(len(labels))
    parts: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    try:
        if test is None:
            ids, held_out = _draw(ids, labels, params.test_fraction, params.seed)
            parts["test"] = images[held_out], labels[held_out], held_out
        else:
            parts["test"] = *test, np.arange(len(test[1])) + len(labels)
        if params.train_limit is not None and params.train_limit < len(ids):
            ids, _ = _draw(ids, labels, len(ids) - params.train_limit, params.seed)
        ids, validation = _draw(ids, labels, params.validation_fraction, params.seed)
    except ValueError as error:
        raise DataError(
            f"the {len(ids)} training images of {len(classes)} classes cannot be split ({error}); "
            "every split needs an image of every class"
        ) from error
    parts["validation"] = images[validation], labels[validation], validation
    parts["train"] = images[ids], labels[ids], ids
    return {name: _split(params, *parts[name], classes) for name in ("train", "validation", "test")}


def _split(
    params: DataParams, images: np.ndarray, labels: np.ndarray, ids: np.ndarray, classes: list[str]
) -> Samples:
    own = torch.from_numpy(labels).long(), torch.from_numpy(ids), classes
    if images.ndim == 4:
        _check_room(images, params.image_size)
        return Split(_resize(torch.from_numpy(images), params.image_size), *own)
    assert params.image_size is not None
    size = params.image_size
    return Files(images, *own, (1 if params.grayscale else 3, size, size))


def _draw(
    ids: np.ndarray, labels: np.ndarray, size: float | int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split ids into the rest and ``size`` of them, equal by class."""
    rest, drawn = train_test_split(
        ids, test_size=size, stratify=labels[ids], random_state=seed, shuffle=True
    )
    return np.asarray(rest), np.asarray(drawn)


def _check_room(images: np.ndarray, size: int | None) -> None:
    """Images of ``size`` pixels square take so much memory; float32 while they are resized."""
    needed = 5 * images.shape[0] * images.shape[1] * (size or 0) ** 2
    there = psutil.virtual_memory().available
    if needed > there:
        raise DataError(
            f"{len(images)} images at data.image_size {size} need {needed / 2**30:,.3g} GiB; there "
            f"are {there / 2**30:,.3g} GiB free; allowed: a smaller image_size, or train_limit"
        )


def _resize(images: torch.Tensor, size: int | None) -> torch.Tensor:
    """To ``size`` pixels square, bilinear with antialiasing."""
    if size is None or images.shape[-1] == size == images.shape[-2]:
        return images
    resized = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


if __name__ == "__main__":
    stage_command("prepare_data", main, __doc__)
