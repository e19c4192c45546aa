"""What ImageNet costs on GPUs that are not here, computed from what was measured on one.

    python -m benchmarks.at_scale            # tables for docs/cluster.md

Of a measured training step (``benchmarks/measured.yaml``) its products' time is taken to grow with
the multiply-accumulates, and the rest with the neurons, both times T and images; at each T the
rates of the nearest measured T are taken. Workers wait for the gradients of the slowest link, a
ring's 2(n − 1)/n of their bytes, and nothing of it is hidden. A core decodes as fast as one did in
``benchmarks/results.json``. Memory is what ``stdb.training_memory`` says. Assumptions are constants
below; what they leave out (validation, checkpoints, stragglers) comes on top.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

import stdb

MEASURED, RESULTS = Path("benchmarks/measured.yaml"), Path("benchmarks/results.json")
IMAGES, CLASSES, SIZE = 1_281_167, 1000, 224  # of ImageNet's training split
BATCH = 32  # images of a GPU and step
COPIES = 6  # weights, gradients, those that are sent, and three moments of Adam with amsgrad
A_NODE = 8  # GPUs
LINKS = {"25 Gbit/s": 25e9 / 8, "100 Gbit/s": 100e9 / 8, "400 Gbit/s": 400e9 / 8}  # between nodes
WITHIN = 200e9  # bytes a second between the GPUs of a node
NETWORKS, GPUS = ("vgg16", "resnet34"), (1, 8, 64)
STEPS = {250: "poisson", 8: "direct", 4: "direct"}  # T → encoder


@dataclass(frozen=True)
class Work:
    """What an image-step of a network is.

    Attributes:
        products: multiply-accumulates of its forward pass.
        neurons: number of spiking neurons.
        gradients: bytes of all gradients.
        snn: the network on no CPU, and without values.
    """

    products: float
    neurons: int
    gradients: int
    snn: stdb.SpikingNetwork


@dataclass(frozen=True)
class Rates:
    """Of a training step, forward and backward, on the card that was measured.

    Attributes:
        product: seconds per multiply-accumulate of the forward pass.
        neuron: seconds per neuron-step.
    """

    product: float
    neuron: float


@cache
def work(name: str, size: int, classes: int) -> Work:
    """Count what a network does, without doing it.

    Args:
        name: of ``stdb.ARCHITECTURES``.
        size: pixels of a side.
        classes: number of classes.
    """
    ann = stdb.build(name, in_channels=3, image_size=size, num_classes=classes).eval()
    snn = stdb.convert(ann, stdb.PoissonEncoder())
    gradients = sum(p.numel() * p.element_size() for p in ann.parameters())
    with FlopCounterMode(display=False) as counter:
        ann.to("meta")(torch.zeros(1, 3, size, size, device="meta"))
    shapes = snn.shapes((3, size, size))
    neurons = sum(math.prod(shapes[i]) for i in snn.graph.neurons)
    return Work(counter.get_total_flops() / 2, neurons, gradients, snn.to("meta"))


def rates(measured: dict[str, Any], timesteps: int) -> Rates:
    """Those of the run whose T is nearest, as a ratio.

    Args:
        measured: what ``benchmarks/measured.yaml`` says.
        timesteps: T.
    """
    run = min(measured["runs"], key=lambda run: abs(math.log(run["timesteps"] / timesteps)))
    one = work(measured["network"], measured["image_size"], 10)
    image_steps = run["batch"] * run["timesteps"]
    rest = run["seconds"] - run["products"]
    return Rates(run["products"] / (image_steps * one.products), rest / (image_steps * one.neurons))


def seconds_per_image(of: Work, at: Rates, timesteps: int) -> float:
    """Of a training step on one GPU that waits for nobody."""
    return timesteps * (of.products * at.product + of.neurons * at.neuron)


def waiting(gradients: int, gpus: int, link: float) -> float:
    """Seconds that a step's gradients take to be averaged by a ring of GPUs.

    Args:
        gradients: bytes.
        gpus: number of GPUs.
        link: bytes a second between nodes.
    """
    slowest = WITHIN if gpus <= A_NODE else link
    return 2 * (gpus - 1) / gpus * gradients / slowest


def decoding() -> float:
    """Seconds that a core takes to read, decode and bring to size an image of ImageNet's size."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    wanted = {"workload": "vgg5 T=10 224×224", "phase": "input", "contender": "files"}
    (row,) = (row for row in rows if wanted.items() <= row.items())
    return float(row["seconds"])


def costs(measured: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each network and T: hours of an epoch by number of GPUs, memory, cores, waits."""
    decode = decoding()
    for name in NETWORKS:
        for steps, encoder in STEPS.items():
            of = work(name, SIZE, CLASSES)
            surrogate = stdb.surrogate_of("auto", steps)
            stdb.configure(of.snn, stdb.encoder_of(encoder, 0), surrogate)
            of.snn.precision = torch.bfloat16
            image = seconds_per_image(of, rates(measured, steps), steps)
            computing = BATCH * image
            memory = stdb.training_memory(of.snn, (3, SIZE, SIZE), steps, BATCH)
            hours = {}
            for gpus in GPUS:
                step = computing + waiting(of.gradients, gpus, LINKS["100 Gbit/s"])
                hours[gpus] = IMAGES / (BATCH * gpus) * step / 3600
            yield {
                "network": name,
                "T": steps,
                "hours": hours,
                "gib": (memory + COPIES * of.gradients) / 2**30,
                "cores": decode / image,
                "shares": {
                    link: waiting(of.gradients, GPUS[-1], speed) / computing
                    for link, speed in LINKS.items()
                },
            }


def shown(hours: float) -> str:
    """Two digits."""
    return f"{hours:.0f}" if hours >= 10 else f"{hours:.2g}"


def table(measured: dict[str, Any]) -> str:
    """The rows as Markdown."""
    heads = [
        *("network", "T", *(f"{n} GPU{'s' * (n > 1)}, hours an epoch" for n in GPUS)),
        *(f"GiB a GPU, {BATCH} images", "decoding cores a GPU"),
        *(f"waits at {link}, {GPUS[-1]} GPUs" for link in LINKS),
    ]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    for row in costs(measured):
        cells = [
            *(row["network"], str(row["T"]), *map(shown, row["hours"].values())),
            *(f"{row['gib']:.1f}", f"{row['cores']:.2f}"),
            *(f"{share:.0%}" for share in row["shares"].values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(yaml.safe_load(MEASURED.read_text(encoding="utf-8"))))
