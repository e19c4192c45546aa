"""Convert the trained ANN: what each place of it became, and the spiking network as a file.

    python -m pipeline.convert                         # models/ann.safetensors: only the table
    python -m pipeline.convert -o snn.safetensors      # and the network, for stdb.load
    python -m pipeline.convert --weights resnet18.pth -o snn.safetensors

The network is the one of params.yaml, network.*, for the images of data/prepared, which
python -m pipeline.prepare_data makes. Its thresholds are 1: stdb.balance_thresholds(snn, images, T)
finds them. What has no spiking form is refused, all places in one message with what to do.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.command import command, parser
from pipeline.data import load_split
from pipeline.errors import StageError
from pipeline.files import ANN, DATA, writing
from pipeline.learning.network_file import write_network
from pipeline.learning.networks import build_ann, build_snn, load_given
from pipeline.params import load_params

Row = tuple[str, str, str]  # the layer, what was found there, and what it became


@command
def main(arguments: Sequence[str]) -> None:
    """Build, load, convert; print and write."""
    options = parse(arguments)
    params = load_params()
    images = DATA / "train.safetensors"
    if not images.exists():
        raise StageError(f"{images} is missing; python -m pipeline.prepare_data makes it")
    if not options.weights.exists():
        made = "; python -m pipeline.train_ann makes it" if options.weights == ANN else ""
        raise StageError(f"{options.weights} is missing{made}")
    train = load_split(images)
    ann = build_ann(params.network, train)
    if (classes := load_given(ann, params.network, options.weights)) is not None:
        raise StageError(
            f"{options.weights} is for {classes} classes, the images have {len(train.classes)}; "
            "train_ann.weights trains a new output layer from it"
        )
    snn = build_snn(ann, params.stdb, params.stdb.seed, train).eval()
    print(table([("layer", "found", "became"), *snn.rewrites]))
    if options.output is not None:
        with writing(options.output) as temporary:
            write_network(snn, params, train, temporary, params.stdb.first_timesteps)
        print(
            f"{options.output}: {len(snn.neurons)} spiking layers, thresholds 1; stdb.load reads it"
        )


def parse(arguments: Sequence[str]) -> Any:
    """The command line."""
    line = parser(__doc__, "convert")
    line.add_argument("--weights", type=Path, default=ANN, help=f"of the ANN ({ANN})")
    line.add_argument("-o", "--output", type=Path, help="the file to write (none)")
    return line.parse_args(arguments)


def table(lines: Iterable[Row]) -> str:
    """Rows in columns."""
    listed = list(lines)
    widths = [max(len(row[k]) for row in listed) for k in range(3)]
    shown = (
        "  ".join(part.ljust(n) for part, n in zip(row, widths, strict=True)) for row in listed
    )
    return "\n".join(line.rstrip() for line in shown)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
