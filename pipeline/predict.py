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
from pathlib import Path
from typing import Any

import stdb
from pipeline.command import command, parser
from pipeline.errors import DataError
from pipeline.files import SNN, ZOO, root, writing
from pipeline.typed import MOST_STEPS

CONFIDENCE = 0.9  # at which a network of the zoo leaves


@command
def main(arguments: Sequence[str]) -> None:
    """Read, classify, print."""
    options = parse(arguments)
    if options.network is not None:
        options.model = of_zoo(options.network)
        options.confidence = options.confidence or CONFIDENCE
    if not options.model.exists():
        raise DataError(f"{options.model} is missing; make repro makes it")
    network = stdb.Classifier(options.model)
    steps: list[int] = []
    for files, decision in network.decisions(options.images, options.timesteps, options.confidence):
        for k, lines in enumerate(network.described(files, decision)):
            print(lines, flush=True)
            if options.plot is not None:
                number = len(steps) + k + 1
                drawn = draw(files[k], decision, k, network.classes, options.plot, number)
                print(f"  see {drawn}")
        steps += decision.steps.tolist()
    if options.confidence is not None:
        print(network.saved(steps, options.timesteps))


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


def draw(
    name: Path,
    decision: stdb.Decision,
    k: int,
    classes: Sequence[str],
    folder: Path,
    number: int,
) -> Path:
    """Probabilities by step as a picture; where it is."""
    from pipeline.reporting import figures

    steps = int(decision.steps[k])
    probabilities = decision.probabilities[:steps, k].cpu()
    title = f"{name.name}: {classes[int(decision.final[k].argmax())]}"
    figure = figures.over_time(probabilities, classes, int(decision.settled[k]), title)
    path = folder / f"{number}-{name.stem}.png"  # two folders may have files of the same name
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
