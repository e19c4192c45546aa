"""From files to a file: a CNN by its weights, its function and a folder of images, converted."""

import importlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .architectures import accepted
from .balancing import balance_thresholds
from .calibration import logit_scale, scaled_losses
from .conversion import convert
from .encoding import PoissonEncoder, encoder_of
from .images import DataError, Preparation, printable, read_image, suffixes
from .interop.saving import save
from .interop.weights import WeightsError, load_weights
from .network import SpikingNetwork
from .normalisation import NORMALISATIONS, Normalisation

HELD_OUT = 256  # images at most that the result is told on
BATCH = 64

Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What is asked of a conversion; the options of ``python -m stdb convert``.

    Attributes:
        checkpoint: weights of the CNN, as :func:`stdb.load_weights` reads them.
        network: ``module:function``, which builds it.
        images: a folder of image files, or of a folder for each class.
        timesteps: T.
        output: the file to write.
        classes: a file of names, a line each; None: the names of the folders.
        image_size: (H, W) that images are brought to; None: theirs, which has to be one.
        resize: the shorter side is brought to so many pixels first.
        grayscale: images have one channel.
        normalise: a name of ``NORMALISATIONS``, means and deviations, or None.
        count: images that calibrate.
        method: of :func:`stdb.balance_thresholds`.
        encoder: ``direct`` or ``poisson``.
        seed: chooses the images.
    """

    checkpoint: Path
    network: str
    images: Path
    timesteps: int
    output: Path
    classes: Path | None
    image_size: tuple[int, int] | None
    resize: int | None
    grayscale: bool
    normalise: str | None
    count: int
    method: str
    encoder: str
    seed: int


def convert_files(asked: Asked, say: Say) -> Iterator[str]:
    """Convert, calibrate, write; yields lines that tell what came of it.

    Args:
        asked: what to do.
        say: is told what is being done.

    Raises:
        DataError: images or names that cannot be used.
        ValueError: the network cannot be built, its weights not be loaded; no spiking form.
    """
    preparation = Preparation(asked.resize, normalisation_of(asked.normalise))
    if asked.resize is not None and (
        asked.image_size is None or asked.resize < max(asked.image_size)
    ):
        raise DataError(
            f"--resize is {asked.resize} with --image-size "
            f"{'x'.join(map(str, asked.image_size or ['not given']))}; allowed: an --image-size, "
            "of which no side is larger than --resize"
        )
    check_output(asked.output, asked.checkpoint)
    files, labels, names = find(asked)
    if not names:
        say("no names of classes: the images are not all in two or more folders")
    height, width = read(asked, files[:1], preparation).shape[2:]
    ann = built(asked, (height, width), len(names)).float().eval()
    try:
        load_weights(ann, asked.checkpoint)
    except WeightsError as error:
        if not names:
            raise
        raise WeightsError(
            f"{error}; the network was built for {len(names)} classes, "
            f"{printable(', '.join(names), 80)} (--classes FILE names others)"
        ) from error
    chosen = torch.randperm(len(files), generator=torch.Generator().manual_seed(asked.seed))
    most = max(1, min(asked.count, len(files) * 4 // 5))
    say(f"reading {min(len(files), most + HELD_OUT)} of {len(files)} images")
    pixels = read(asked, [files[k] for k in chosen[: most + HELD_OUT]], preparation)
    images, others = pixels[:most], pixels[most:]
    logits = called(ann, asked, pixels[:2])
    if names and len(names) != logits.shape[1]:
        raise DataError(
            f"{asked.network} gives {logits.shape[1]} logits, and there are {len(names)} classes "
            f"({printable(', '.join(names), 80)}); allowed: as many (--classes FILE names them)"
        )
    encoder, limits = encoder_of(asked.encoder, 0), preparation.normalisation.largest
    if isinstance(encoder, PoissonEncoder) and max(limits) > 1:
        encoder = replace(encoder, limits=limits)
    snn = convert(ann, encoder, example=pixels[:2]).eval()
    counts = Counter(found for _, found, _ in snn.rewrites)
    yield f"converted: {', '.join(f'{times} {found}' for found, times in counts.items())}"
    balance = balance_thresholds(
        snn,
        images,
        asked.timesteps,
        method=asked.method,
        batch_size=BATCH,
        progress=lambda layer, value: say(f"calibrated {layer}: a spike stands for {value:.3g}"),
    )
    yield f"{len(balance)} spiking layers, calibrated by {balance.method} on {len(images)} images"
    if len(others):
        right = labels[chosen[most : most + HELD_OUT]] if labels is not None else None
        yield from told(ann, snn, others, right, asked.timesteps, say)
    classes = names or [str(k) for k in range(logits.shape[1])]
    resize: dict[str, Any] = {} if asked.resize is None else {"resize": asked.resize}
    channels, *size = pixels.shape[1:]
    with written(asked.output) as temporary:
        save(
            snn,
            temporary,
            timesteps=asked.timesteps,
            classes=classes,
            normalisation=preparation.normalisation,
            network={"architecture": asked.network, "in_channels": channels, "image_size": size},
            **resize,
        )
    yield f"{asked.output} is written; python -m stdb predict {asked.output} IMAGE… classifies"


def check_output(path: Path, source: Path) -> None:
    """Refuse, before any work, a file that cannot be written, or that is read.

    Raises:
        DataError: says which, and what is allowed.
    """
    folder = path.parent
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder, where {path.name} would go")
    if path.is_dir() or not os.access(folder, os.W_OK):
        raise DataError(f"{path} cannot be written; allowed: a file in a folder of yours")
    if path.resolve() == source.resolve():
        raise DataError(
            f"{path} is the file that is read; allowed: another name for what is written"
        )


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A file beside it to write to, which takes its place when all is well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@torch.no_grad()
def called(ann: nn.Module, asked: Asked, images: Tensor) -> Tensor:
    """The CNN's logits of two images.

    Raises:
        DataError: it cannot be called with them, or gives something else.
    """
    shape = "×".join(map(str, images.shape[1:]))
    try:
        logits = ann(images)
    except Exception as error:
        raise DataError(
            f"{asked.network} cannot be called with images of {shape} (C, H, W): "
            f"{type(error).__name__}: {printable(error, 200)} (--image-size, --grayscale)"
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.isfinite().all():
        gives = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(
            f"{asked.network} gives {gives} for {len(images)} images of {shape}; allowed: finite "
            "logits, (images, classes)"
        )
    return logits


@torch.no_grad()
def told(
    ann: nn.Module,
    snn: SpikingNetwork,
    images: Tensor,
    labels: Tensor | None,
    timesteps: int,
    say: Say,
) -> Iterator[str]:
    """Fit the scale of the logits on images that did not calibrate; tell how it decides them.

    Decisions do not change with the scale; how sure softmax(U_t) is does. Without labels it is as
    sure as it agrees with the ANN.
    """
    theirs: list[Tensor] = []
    ours: list[Tensor] = []
    for part in images.split(BATCH):
        say(f"presenting {len(images)} images that did not calibrate: {BATCH * len(ours)}")
        theirs.append(ann(part).argmax(1))
        ours.append(snn(part, timesteps))
    of_ann, logits = torch.cat(theirs), torch.cat(ours)
    decided = logits.argmax(1)
    snn.scale_output(logit_scale(scaled_losses(logits, of_ann if labels is None else labels)))
    same = (decided == of_ann).double().mean()
    yield f"{same:.1%} of {len(images)} other images: decided as by the CNN, at T = {timesteps}"
    if labels is not None:
        accuracy = [(found == labels).double().mean() for found in (of_ann, decided)]
        yield f"on these, right: CNN {accuracy[0]:.1%}, spiking network {accuracy[1]:.1%}"


def find(asked: Asked) -> tuple[list[Path], Tensor | None, list[str]]:
    """Image files, (N,) labels where they lie in folders by class, and the names of the classes.

    Raises:
        DataError: there are too few, or names that are no names.
    """
    if not asked.images.is_dir():
        raise DataError(f"{asked.images} is no folder; allowed: a folder of image files")
    known = suffixes()
    files: list[Path] = []
    seen: set[str] = set()
    for folder, below, there in os.walk(asked.images, followlinks=True):
        seen.add(os.path.realpath(folder))
        inside = (name for name in sorted(below) if not name.startswith("."))
        below[:] = [n for n in inside if os.path.realpath(os.path.join(folder, n)) not in seen]
        images = (name for name in sorted(there) if not name.startswith("."))
        files += [Path(folder, name) for name in images if Path(name).suffix.lower() in known]
    if len(files) < 2:
        raise DataError(f"{asked.images} has {len(files)} image files; allowed: two or more")
    tops = [file.relative_to(asked.images).parts for file in files]
    folders = sorted({parts[0] for parts in tops if len(parts) > 1})
    by_class = len(folders) > 1 and all(len(parts) > 1 for parts in tops)
    names = folders if by_class else []
    if asked.classes is not None:
        try:
            names = asked.classes.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            raise DataError(f"{asked.classes} cannot be read as UTF-8 text: {error}") from error
        names = [name.strip() for name in names if name.strip()]
        if len(set(names)) < max(2, len(names)):
            raise DataError(
                f"{asked.classes} has {len(names)} names; allowed: two or more, once each"
            )
        by_class = by_class and set(folders) <= set(names)
    labels = torch.tensor([names.index(parts[0]) for parts in tops]) if by_class else None
    return files, labels, names


def built(asked: Asked, size: tuple[int, int], classes: int) -> nn.Module:
    """The CNN, of those arguments that its function takes.

    Raises:
        ValueError: there is no such function, or it gives no module.
    """
    module, colon, name = asked.network.partition(":")
    try:
        if not colon:
            raise ValueError("it has no colon")
        function = getattr(importlib.import_module(module), name)
        known: dict[str, Any] = {
            "in_channels": 1 if asked.grayscale else 3,
            "image_size": size[0] if size[0] == size[1] else size,
        }
        if classes:
            known["num_classes"] = classes
        network = function(**accepted(function, known, ["num_classes"]))
    except (Exception, SystemExit) as error:  # of a script that reads its own command line
        raise ValueError(
            f"--network {asked.network}: {type(error).__name__}: {error}; allowed: "
            "MODULE:FUNCTION, as models:resnet of a file models.py here, which only defines it, or "
            "torchvision.models:resnet18"
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"--network {asked.network} gives a {type(network).__name__}; allowed: an nn.Module"
        )
    return network


def read(asked: Asked, files: list[Path], preparation: Preparation) -> Tensor:
    """(N, C, H, W) float32.

    Raises:
        DataError: one that is no image, or images of several sizes.
    """
    channels = 1 if asked.grayscale else 3
    pixels = [read_image(path, channels, asked.image_size, asked.resize) for path in files]
    for path, image in zip(files, pixels, strict=True):
        if image.shape != pixels[0].shape:
            raise DataError(
                f"{printable(path)} has {image.shape[1]}×{image.shape[2]} pixels and "
                f"{printable(files[0])} {pixels[0].shape[1]}×{pixels[0].shape[2]}; "
                "--image-size N brings all to one size"
            )
    return preparation.normalisation(torch.from_numpy(np.stack(pixels)))


def normalisation_of(text: str | None) -> Normalisation:
    """A name, or means and deviations: ``0.5,0.5,0.5/0.2,0.2,0.2``.

    Raises:
        ValueError: it is neither.
    """
    if text is None or text in NORMALISATIONS:
        return NORMALISATIONS[text] if text else Normalisation()
    mean, _, std = text.partition("/")
    try:
        numbers = [tuple(map(float, part.split(","))) for part in (mean, std)]
    except ValueError as error:
        raise ValueError(
            f"--normalise is {text!r}; allowed: {', '.join(NORMALISATIONS)}, or a mean and a "
            "deviation for each channel, 0.5,0.5,0.5/0.2,0.2,0.2"
        ) from error
    return Normalisation(*numbers)
