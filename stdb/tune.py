"""Measure from which density on the dense form of a product is faster than events, on this CPU.

    python -m stdb.tune [--rounds 7] [--write]

A minute or two, on a machine that does nothing else. For each precision, kind of layer and size it
times the product and the gradient of its weights in both forms at rising densities, and finds where
they cross. ``--write`` puts that into stdb/kernels/densities.json, the row of this CPU's
instructions, which all networks take from then on: every result may then differ in its last bits.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from . import kernels
from .conversion import convert
from .encoding import DirectEncoder
from .kernels.densities import SIZES, TABLE, instruction_set
from .kernels.layout import to_matrix
from .network import SpikingNetwork
from .operators import dense
from .spikes import Spikes

DENSITIES = (0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6)
STEPS, IMAGES = 4, 32
# a layer of each size, and the shape of its input
LAYERS: dict[str, dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]] = {
    "convolution": {
        "small": (lambda: nn.Conv2d(32, 32, 3, padding=1), (32, 32, 32)),
        "medium": (lambda: nn.Conv2d(128, 128, 3, padding=1), (128, 16, 16)),
        "large": (lambda: nn.Conv2d(512, 512, 3, padding=1), (512, 4, 4)),
    },
    "linear": {
        "small": (lambda: nn.Linear(128, 128), (128,)),
        "medium": (lambda: nn.Linear(512, 512), (512,)),
        "large": (lambda: nn.Linear(4096, 4096), (4096,)),
    },
}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write where that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m stdb.tune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=7, help="of which the fastest counts")
    parser.add_argument(
        "--write", action="store_true", help="into densities.json, for all networks"
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; allowed: 1 or more")
    torch.set_num_threads(1)
    found = measured(options.rounds)
    if options.write:
        table = json.loads(TABLE.read_text(encoding="utf-8"))
        table[instruction_set()] = found
        TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        print(f"wrote the row of {instruction_set()} into {TABLE}")


def measured(rounds: int) -> dict[str, object]:
    """The row of this CPU's instructions, and on what it was measured."""
    densities: dict[str, dict[str, dict[str, float]]] = {}
    for precision in ("float32", "bfloat16"):
        densities[precision] = {kind: {} for kind in LAYERS}
        for kind, layers in LAYERS.items():
            for size in SIZES:
                limit = crossing(*layers[size], precision, rounds)
                densities[precision][kind][size] = limit
                print(f"{precision:9} {kind:12} {size:7} events below {limit:.3f}", flush=True)
    machine = {
        "processor": processor(),
        "torch": torch.__version__,
        "rounds": rounds,
    }
    return {"densities": densities, "measured": machine}


def crossing(
    make: Callable[[], nn.Module], shape: tuple[int, ...], precision: str, rounds: int
) -> float:
    """The density at which events and the dense form take the same time, between two measured."""
    lowered = torch.bfloat16 if precision == "bfloat16" else None
    torch.manual_seed(0)
    ann = nn.Sequential(make(), nn.ReLU())
    snn = convert(ann, DirectEncoder(), precision=lowered)
    before = (0.0, 0.0)  # density, log of events' time over the dense form's
    for density in DENSITIES:
        x = spikes(shape, density)
        ratio = math.log(seconds(snn, x, "always", rounds) / seconds(snn, x, "never", rounds))
        if ratio > 0:
            share = -before[1] / (ratio - before[1]) if before[0] else 0.0
            return round(before[0] + share * (density - before[0]), 3)
        before = density, ratio
    return DENSITIES[-1]


@torch.no_grad()
def seconds(snn: SpikingNetwork, x: Spikes, events: str, rounds: int) -> float:
    """The least time of the product and of the gradient of its weights, on one thread."""
    snn.events = events
    presentation = snn.present(torch.zeros(1, *x.shape[2:]))
    place = next(i for i, node in enumerate(snn.graph.nodes) if node.operator.product)
    site, operator = presentation.sites[place], snn.graph.nodes[place].operator
    times = []
    for _ in range(1 + rounds):
        fresh = Spikes(x.packed, x.shape, x.dtype)  # that nothing was made of yet
        start = time.perf_counter()
        product = dense(operator.forward(site, [fresh]))
        grad = site.lowered(torch.ones_like(product))
        operator.backward_weight(site, grad, fresh, None)
        times.append(time.perf_counter() - start)
    return min(times[1:])  # the first compiles


def spikes(shape: tuple[int, ...], density: float) -> Spikes:
    """(STEPS, IMAGES, …) drawn at random; with λ ≈ 0 a current of 3 fires at V = 1 and is gone."""
    generator = torch.Generator().manual_seed(0)
    current = 3.0 * (torch.rand(STEPS, IMAGES, *shape, generator=generator) < density)
    matrix = to_matrix(current)
    packed = kernels.fire(matrix, torch.zeros_like(matrix[0]), 1.0, 1e-30)
    return Spikes(packed, current.shape, torch.float32)


def processor() -> str:
    """Its name, as the system has it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
