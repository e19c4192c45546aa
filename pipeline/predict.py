"""Classify image files with the trained spiking network; how the decision came about over time.

    python -m pipeline.predict IMAGE…                        # by the network of make repro
    python -m pipeline.predict --network cifar10 cat.jpg     # by one that comes with this project
    python -m pipeline.predict --confidence 0.9 cat.jpg      # leave as soon as it is clear
    python -m pipeline.predict --model snn.safetensors --plot decisions cat.jpg dog.jpg

A network of models/zoo leaves an image at a probability of 0.9, if nobody says otherwise.

Prints for each image the class, its probability, the step at which the decision settled, and the
probability of the class after every step. Images are brought to what the network was trained on,
size and normalisation, as its file says.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import stdb
from pipeline.command import command, parser
from pipeline.data import DataError, Preparation, Size, read_image
from pipeline.files import SNN, ZOO, root, writing
from pipeline.typed import MOST_STEPS

BARS = " ▁▂▃▄▅▆▇█"
WIDTH = 60  # of the line of bars
CONFIDENCE = 0.9  # at which a network of the zoo leaves
LARGEST = 4096  # pixels of an image's side, as params.yaml allows


@dataclass(frozen=True)
class Seen:
    """Images as a network sees them: channels, (H, W), and what becomes of the pixels."""

    channels: int
    size: Size
    preparation: Preparation


@command
def main(arguments: Sequence[str]) -> None:
    """Read, classify, print."""
    options = parse(arguments)
    if options.network is not None:
        options.model = of_zoo(options.network)
        options.confidence = options.confidence or CONFIDENCE
    if not options.model.exists():
        raise DataError(f"{options.model} is missing; make repro makes it")
    try:
        snn, about = stdb.load(options.model)
    except ValueError as error:
        raise DataError(str(error)) from error
    timesteps = options.timesteps or about["timesteps"]
    pixels = read(options.images, seen_by(options.model, about))
    decision = classify(snn, pixels, timesteps, options.confidence)
    classes = about["classes"]
    for k, name in enumerate(options.images):
        print(describe(name, decision, k, classes))
        if options.plot is not None:
            print(f"  see {draw(name, decision, k, classes, options.plot)}")
    if options.confidence is not None:
        steps = decision.steps.double().mean().item()
        saved = 1 - steps / timesteps
        print(f"{steps:.1f} of {timesteps} steps on average, {saved:.0%} saved")


def parse(arguments: Sequence[str]) -> Any:
    """The command line."""
    line = parser(__doc__, "predict")
    line.add_argument("images", nargs="+", type=Path, help="image files")
    which = line.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, default=SNN, help=f"of stdb.save ({SNN})")
    which.add_argument("--network", help=f"of {ZOO}, such as cifar10")
    line.add_argument("--timesteps", type=_count, help="T; that of the training by default")
    line.add_argument(
        "--confidence", type=_share, help="leave when the largest probability reaches this"
    )
    line.add_argument("--plot", type=Path, help="a folder for pictures of probabilities by step")
    return line.parse_args(arguments)


def of_zoo(name: str) -> Path:
    """The file of a network that comes with the repository."""
    folder = root() / ZOO
    found = {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
    if name not in found:
        raise DataError(f"there is no network {name!r} in {ZOO}; allowed: {', '.join(found)}")
    return found[name]


def read(images: Sequence[Path], seen: Seen) -> Tensor:
    """(N, C, H, W) float32: image files as the network was trained on them."""
    resize, normalisation = seen.preparation.resize, seen.preparation.normalisation
    pixels = np.stack([read_image(path, seen.channels, seen.size, resize) for path in images])
    return normalisation(torch.from_numpy(pixels))


def seen_by(path: Path, about: dict[str, Any]) -> Seen:
    """The images that a saved network is for."""
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
    return Seen(channels, (sides[0], sides[1]), preparation)


def classify(
    snn: stdb.SpikingNetwork, pixels: Tensor, timesteps: int, confidence: float | None
) -> stdb.Decision:
    """Decide; every image draws the same random stream, so its neighbours do not matter."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ids = torch.zeros(len(pixels), dtype=torch.int64, device=device)
    return stdb.decide(snn.to(device), pixels.to(device), timesteps, confidence, sample_ids=ids)


def describe(name: Path, decision: stdb.Decision, k: int, classes: Sequence[str]) -> str:
    """Two lines on image ``k``."""
    final, steps = decision.final[k], int(decision.steps[k])
    best = int(final.argmax())
    over_time = decision.probabilities[:steps, k, best].tolist()
    shown = over_time[:: -(-len(over_time) // WIDTH)]
    bars = "".join(BARS[round(p * (len(BARS) - 1))] for p in shown)
    return (
        f"{name}: {classes[best]} ({final[best]:.1%}), settled at step "
        f"{int(decision.settled[k])} of {steps}\n  t = 1 |{bars}| {steps}"
    )


def draw(name: Path, decision: stdb.Decision, k: int, classes: Sequence[str], folder: Path) -> Path:
    """Probabilities by step as a picture; where it is."""
    from pipeline.reporting import figures

    steps = int(decision.steps[k])
    probabilities = decision.probabilities[:steps, k].cpu()
    title = f"{name.name}: {classes[int(decision.final[k].argmax())]}"
    figure = figures.over_time(probabilities, classes, int(decision.settled[k]), title)
    path = folder / f"{k + 1}-{name.stem}.png"  # two folders may have files of the same name
    with writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    return path


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= MOST_STEPS:
        raise argparse.ArgumentTypeError(f"{text}; allowed: 1 to {MOST_STEPS}")
    return int(text)


def _share(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}; allowed: above 0, at most 1")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
