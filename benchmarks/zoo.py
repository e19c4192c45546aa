"""A trained network that comes with this repository: models/zoo/NAME.safetensors, and its card.

    python -m benchmarks.zoo NAME [--network models/snn/t2.safetensors] [--timesteps 4]

Where make repro has ended: keeps the network's weights in float16, reads the test split with what
was kept, and writes the card, models/zoo/NAME.md: what it is of, accuracy after every step and
with leaving early, commit, machine.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stdb
from pipeline.command import command, parser
from pipeline.data import Samples, load_split
from pipeline.errors import StageError
from pipeline.files import DATA, SNN, ZOO, write_text, writing
from pipeline.params import load_params
from pipeline.predict import CONFIDENCE
from pipeline.reporting.page import machine
from pipeline.reporting.results import read_results
from pipeline.reporting.tables import markdown_table
from pipeline.tracking.origin import provenance

LARGEST = 4 * 2**20  # bytes of a file
BATCH = 250
LICENCES = {
    "cifar10": "CIFAR-10 (Krizhevsky, 2009), 50,000 training images from the 80 million tiny "
    "images; its authors ask to be cited and name no licence.",
}


@command
def main(arguments: Sequence[str]) -> None:
    """Keep a network, and write its card."""
    line = parser(__doc__, "zoo")
    line.prog = "python -m benchmarks.zoo"
    line.add_argument("name", metavar="NAME")
    line.add_argument("--network", type=Path, default=SNN, help=f"of finetune_stdb ({SNN})")
    line.add_argument("--timesteps", type=int, help="the most steps; those of its training (None)")
    given = line.parse_args(arguments)
    path = ZOO / f"{given.name}.safetensors"
    snn, about = stdb.load(given.network)
    with writing(path) as temporary:
        keep(snn, about | ({"timesteps": given.timesteps} if given.timesteps else {}), temporary)
        if (size := temporary.stat().st_size) > LARGEST:
            raise StageError(f"{path} would have {size:,} bytes; allowed: {LARGEST:,}")
    write_text(ZOO / f"{given.name}.md", card(given.name, path, snn, about["timesteps"]))
    print(f"{path} and its card are written; python -m pipeline.predict --network {given.name}")


def keep(snn: stdb.SpikingNetwork, about: dict[str, Any], path: Path) -> None:
    """The network with its weights in half the bytes, and all that its file said of it."""
    named = ("timesteps", "classes", "normalisation", "network", "stdb", "resize")
    said = {name: about[name] for name in named if name in about}
    stdb.save(snn, path, **said, storage=torch.float16)


def card(name: str, path: Path, whole: stdb.SpikingNetwork, trained: int) -> str:
    """What it is, how it was made, what it can do."""
    params, results, tags = load_params(), read_results(), provenance()
    snn, about = stdb.load(path)
    last, source = about["timesteps"], params.data.source
    test = load_split(DATA / "test.safetensors")
    before, _ = shares(probabilities(whole, test, last), test.labels)
    stored = probabilities(snn, test, last)
    after, early = shares(stored, test.labels)
    steps = stdb.first_confident(stored, CONFIDENCE, last).double().mean()
    leaving = f"early exit at a probability of {CONFIDENCE:g}, {steps:.2f} time steps on average"
    rows = [[f"T = {t}", f"{share:.2%}"] for t, share in enumerate(after, 1)]
    rows += [[leaving, f"{early:.2%}"], ["its ANN", f"{results.ann.accuracy.test:.2%}"]]
    gain = after[-1] - before[-1]
    changed = ", with changes" if tags["git.dirty"] == "true" else ""
    weights = sum(p.numel() for p in snn.net.parameters() if p.dim() > 1)
    return f"""# {name}

A spiking network for images of {len(about["classes"])} classes: {", ".join(about["classes"])}.

    python -m pipeline.predict --network {name} photo.jpg

| | {len(test):,} test images |
| --- | ---: |
{chr(10).join(markdown_table(["", ""], rows).splitlines()[2:])}

- {params.network.architecture} at width {params.network.width:g}, {weights:,} weights; analogue \
input, IF neurons; fine-tuned at T = {trained}, run for at most {last} time \
step{"s" * (last > 1)}. Weights stored in float16: {100 * gain:+.2f} points at T = {last}.
- Made by `make repro` with `params.yaml` of a preset (`make preset`), seeds {params.data.seed}, \
{params.train_ann.seed}, {params.stdb.seed}, at commit {tags["git.commit"][:7]}{changed}; \
{results.data.train.images:,} training images, {results.data.validation.images:,} validation \
images; the test split was not used for any choice.
- {machine()}.
- Data: {LICENCES.get(name, source)}
- An image of anything else is also assigned to one of the classes. Photographs are cropped to \
their central square and resized to {about["network"]["image_size"]} pixels.
"""


@torch.no_grad()
def probabilities(snn: stdb.SpikingNetwork, images: Samples, timesteps: int) -> Tensor:
    """Of the classes after each step, (T, N, classes)."""
    parts = [images.take(part) for part in torch.arange(len(images)).split(BATCH)]
    decisions = (
        stdb.decide(snn.eval(), part.pixels(), timesteps, sample_ids=part.ids) for part in parts
    )
    return torch.cat([decision.probabilities for decision in decisions], 1)


def shares(after_steps: Tensor, labels: Tensor) -> tuple[list[float], float]:
    """Accuracy after each step, and where images leave early, from (T, N, classes)."""
    right = (after_steps.argmax(2) == labels).double()  # (T, N)
    left = stdb.first_confident(after_steps, CONFIDENCE, len(after_steps))
    early = right.gather(0, left[None] - 1)
    return right.mean(1).tolist(), early.mean().item()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
