"""A saved network as one uses it: image files in, classes and how they were decided out."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .decision import Decision, decide
from .images import DataError, Preparation, printable, read_image
from .interop.saving import load
from .network import SpikingNetwork

BATCH = 32  # images that are read and presented at once
LARGEST = 4096  # pixels of an image's side
BARS = " ▁▂▃▄▅▆▇█"
WIDTH = 60  # of the line of bars


class Classifier:
    """The spiking network of a file of :func:`stdb.save`, and what images have to become for it.

    Args:
        path: the file. What it says of ``network`` has to tell ``in_channels`` and ``image_size``.
        device: where to compute; a GPU where there is one, by default.

    Attributes:
        snn: the network, in evaluation mode.
        about: what the file says of it.
        timesteps: T that it is meant for.
        classes: their names, in the order of the logits.
        shape: (C, H, W) of an image.
        preparation: what becomes of an image's pixels.

    Raises:
        DataError: the file is no network's, or does not say what images it is for.
    """

    def __init__(self, path: str | Path, device: torch.device | str | None = None) -> None:
        try:
            snn, about = load(path)
        except ValueError as error:
            raise DataError(str(error)) from error
        self.path, self.about = Path(path), about
        self.shape, self.preparation = _images(path, about)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.snn = snn.to(self.device)
        self.timesteps: int = about["timesteps"]
        self.classes: list[str] = about["classes"]
        _check_output(path, snn, self.shape, self.classes)

    def read(self, files: Sequence[str | Path]) -> Tensor:
        """(N, C, H, W) float32: image files as the network was trained on them.

        Raises:
            DataError: one that is no image; names it.
        """
        channels, height, width = self.shape
        size, resize = (height, width), self.preparation.resize
        pixels = np.stack([read_image(path, channels, size, resize) for path in files])
        return self.preparation.normalisation(torch.from_numpy(pixels))

    def decide(
        self, images: Tensor, timesteps: int | None = None, confidence: float | None = None
    ) -> Decision:
        """:func:`stdb.decide`; every image draws the same random stream, whatever its neighbours.

        Args:
            images: (N, C, H, W), as :meth:`read` gives them.
            timesteps: T, the most steps; None: that of the file.
            confidence: leave an image when its largest probability reaches this; None: after T.
        """
        ids = torch.zeros(len(images), dtype=torch.int64, device=self.device)
        return decide(
            self.snn,
            images.to(self.device),
            timesteps or self.timesteps,
            confidence,
            sample_ids=ids,
        )

    def decisions(
        self,
        files: Sequence[Path],
        timesteps: int | None = None,
        confidence: float | None = None,
    ) -> Iterator[tuple[Sequence[Path], Decision]]:
        """Image files and what they are decided for, ``BATCH`` at a time."""
        for start in range(0, len(files), BATCH):
            part = files[start : start + BATCH]
            yield part, self.decide(self.read(part), timesteps, confidence)

    def described(self, files: Sequence[str | Path], decision: Decision) -> Iterator[str]:
        """Two lines on each image: class, probability and step; the probability over time."""
        for k, name in enumerate(files):
            final, steps = decision.final[k], int(decision.steps[k])
            best = int(final.argmax())
            over_time = decision.probabilities[:steps, k, best].tolist()
            shown = over_time[:: -(-len(over_time) // WIDTH)]
            bars = "".join(BARS[round(p * (len(BARS) - 1))] for p in shown)
            yield (
                f"{name}: {self.classes[best]} ({final[best]:.1%}), settled at step "
                f"{int(decision.settled[k])} of {steps}\n  t = 1 |{bars}| {steps}"
            )

    def saved(self, steps: Sequence[int], timesteps: int | None = None) -> str:
        """A line on how many steps leaving early has saved; ``steps`` are those of each image."""
        whole, mean = timesteps or self.timesteps, sum(steps) / len(steps)
        return f"{mean:.1f} of {whole} steps on average, {1 - mean / whole:.0%} saved"


def _check_output(
    path: str | Path, snn: SpikingNetwork, shape: tuple[int, int, int], classes: Any
) -> None:
    """A name for each logit, of images of the shape that the file says."""
    try:
        logits = int(snn.shapes(shape)[-1].numel())
    except Exception as error:
        raise DataError(
            f"{path} says that it is for images of {'×'.join(map(str, shape))}, which its weights "
            f"do not take: {printable(error, 200)}"
        ) from error
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not named or len(classes) != logits:
        raise DataError(
            f"{path} names {printable(classes, 80)} as classes and gives {logits} logits; allowed: "
            "a name, as text, for each"
        )


def _images(path: str | Path, about: dict[str, Any]) -> tuple[tuple[int, int, int], Preparation]:
    """(C, H, W) of the images that a saved network is for, and what becomes of them."""
    network = about.get("network")
    said = network if isinstance(network, dict) else {}
    channels, size = said.get("in_channels"), said.get("image_size")
    sides: list[Any] = size if isinstance(size, list) else [size, size]
    fits = len(sides) == 2 and all(type(n) is int and 1 <= n <= LARGEST for n in sides)
    if channels not in (1, 3) or not fits:
        raise DataError(
            f"{path} does not say what images it is for: in_channels is {channels}, image_size "
            f"{size}; allowed: 1 or 3, and 1 to {LARGEST} or two of that "
            "(stdb.save(..., network={'in_channels': 3, 'image_size': 32}))"
        )
    try:
        preparation = Preparation(about.get("resize"), about["normalisation"])
        preparation.normalisation.check_channels(channels, "its images have")
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    if (preparation.resize or LARGEST) < max(sides):
        raise DataError(
            f"{path}: resize is {preparation.resize}; allowed: {max(sides)} or more, or none"
        )
    return (channels, sides[0], sides[1]), preparation
