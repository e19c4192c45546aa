"""What an image costs: the ANN and the spiking networks, by operations and with their memory.

    python -m pipeline.energy                         # all networks of models/
    python -m pipeline.energy --images 500 --plot energy.png

Prints a table of the networks, one of the layers of the last, and at how many spikes a neuron a
spiking network stops being cheaper than its ANN. Spikes are those of validation images. Two models:
operations alone (Horowitz, 2014) and operations with the memory that they need (after Lemaire et
al., 2022), with numbers of 32 and of 8 bits; docs/energy.md says what is in them.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import stdb
from pipeline.command import command, parser
from pipeline.data import Samples, load_split, subset
from pipeline.errors import StageError
from pipeline.files import ANN, DATA, SNN, SNNS, writing
from pipeline.learning.networks import build_ann
from pipeline.learning.weights import load_weights
from pipeline.params import load_params
from pipeline.reporting.tables import markdown_table

BATCH = 64
Model = Callable[[stdb.LayerCost], float]
MODELS: dict[str, Model] = {
    "operations, float32": stdb.LayerCost.operations_pj,
    "with memory, 32 bits": lambda cost: sum(cost.with_memory_pj(32).values()),
    "with memory, 8 bits": lambda cost: sum(cost.with_memory_pj(8).values()),
}


@dataclass(frozen=True)
class Spiking:
    """A spiking network, and what it did for an image.

    Attributes:
        timesteps: T.
        costs: of its layers.
        spikes: of a neuron, over T.
    """

    timesteps: int
    costs: list[stdb.LayerCost]
    spikes: float

    @property
    def name(self) -> str:
        """Of its row."""
        return f"SNN, T = {self.timesteps}"

    def pj(self, model: Model, spikes: float | None = None) -> float:
        """Picojoules; at another number of spikes a neuron where one is given.

        All spikes are then as many times more, in every layer.
        """
        measured = sum(map(model, self.costs))
        if spikes is None:
            return measured
        silent = sum(model(without_spikes(cost)) for cost in self.costs)
        return silent + (measured - silent) * (spikes / self.spikes if self.spikes else 0.0)

    def even(self, model: Model, other: float) -> float:
        """Spikes of a neuron at which it costs as much as ``other``; 0 where it always costs more.

        Infinite where nothing fires, which costs the same at any number.

        Args:
            model: of the cost.
            other: picojoules.
        """
        silent = self.pj(model, 0.0)
        if self.pj(model) == silent:
            return math.inf if silent < other else 0.0
        return max(0.0, (other - silent) / (self.pj(model) - silent) * self.spikes)


def without_spikes(cost: stdb.LayerCost) -> stdb.LayerCost:
    """What a layer does where nothing fires."""
    return stdb.LayerCost(
        cost.name, multiplies=cost.multiplies, updates=cost.updates, weights=cost.weights,
        inputs=cost.inputs, outputs=cost.outputs,
    )  # fmt: skip


@command
def main(arguments: Sequence[str]) -> None:
    """Present, count, print."""
    line = parser(__doc__, "energy")
    line.add_argument("--images", type=int, default=256, help="of the validation split (256)")
    line.add_argument("--plot", type=Path, help="a picture: energy over spikes a neuron")
    options = line.parse_args(arguments)
    if options.images < 1:
        raise StageError(f"--images is {options.images}; allowed: 1 or more")
    params, split = load_params(), load_split(DATA / "validation.safetensors")
    few = subset(split, options.images, params.data.seed)
    ann = build_ann(params.network, few)
    load_weights(ann, ANN)
    dense = stdb.ann_costs(ann.eval(), few.shape)
    networks = [measured(path, few) for path in network_files()]
    if not networks:
        raise StageError(f"{SNN} is missing; make repro makes it")
    networks.sort(key=lambda one: -one.timesteps)
    print(f"Nanojoules an image, {len(few)} validation images\n")
    print(of_networks(dense, networks))
    print("\nSpikes of a neuron, over all T, at which it costs as much as its ANN\n")
    print(of_spikes(dense, networks))
    print(f"\nEach layer at T = {networks[-1].timesteps}\n")
    print(of_layers(networks[-1].costs))
    if options.plot is not None:
        from pipeline.reporting import figures

        curves = {name: relative(dense, networks, model) for name, model in MODELS.items()}
        with writing(options.plot) as temporary:
            figures.energy(curves, eight_bits(dense)).savefig(temporary, format="png", dpi=130)
        print(f"\nsee {options.plot}")


def network_files() -> list[Path]:
    """Those of each T, or the one that there is."""
    each = sorted(SNNS.glob("t*.safetensors"))
    return each or [SNN] * SNN.exists()


@torch.no_grad()
def measured(path: Path, images: Samples) -> Spiking:
    """Present images to a saved network, and count."""
    try:
        snn, about = stdb.load(path)
    except ValueError as error:
        raise StageError(str(error)) from error
    timesteps = about["timesteps"]
    with stdb.record_spikes(snn.eval()) as statistics:
        for batch in images.stream(torch.arange(len(images)).split(BATCH), torch.device("cpu")):
            snn(batch.pixels(), timesteps, sample_ids=batch.ids)
    costs = statistics.costs()
    # not of updates: a max-pooling's sums have some, too
    neurons = sum(spikes.numel() for name, spikes in statistics.maps.items() if name != "input")
    return Spiking(timesteps, costs, sum(cost.leaves for cost in costs) / neurons)


def of_networks(dense: Sequence[stdb.LayerCost], networks: Sequence[Spiking]) -> str:
    """Energy of the ANN and of each T, in each model, and its share of the ANN's."""
    ann = {name: sum(map(model, dense)) for name, model in MODELS.items()}
    rows: list[list[str]] = [["ANN", "", *(f"{pj / 1000:,.1f}" for pj in ann.values())]]
    for one in networks:
        cells = [
            f"{one.pj(m) / 1000:,.1f} ({one.pj(m) / ann[name]:.0%})" for name, m in MODELS.items()
        ]
        rows.append([one.name, f"{one.spikes:.2f}", *cells])
    return markdown_table(["", "spikes a neuron", *MODELS], rows)


def of_spikes(dense: Sequence[stdb.LayerCost], networks: Sequence[Spiking]) -> str:
    """Where each T stops being cheaper than the ANN in the same model, and than one of 8 bits."""
    eight = sum(sum(cost.with_memory_pj(8).values()) for cost in dense)
    rows = []
    for one in networks:
        cells = [f"{one.even(model, sum(map(model, dense))):.2f}" for model in MODELS.values()]
        against = one.even(MODELS["with memory, 32 bits"], eight)
        rows.append([one.name, f"{one.spikes:.2f}", *cells, f"{against:.2f}"])
    return markdown_table(["", "it has", *MODELS, "32 bits, the ANN 8"], rows)


def of_layers(costs: Sequence[stdb.LayerCost]) -> str:
    """Operations and memory of each layer, in thousands and in nanojoules."""
    head = ["layer", "multiplies", "synaptic operations", "updates", "spikes out"]
    head += ["nJ, operations", "nJ, with memory", "of it weights", "potentials"]
    rows = []
    for cost in costs:
        parts = cost.with_memory_pj()
        counts = (cost.multiplies, cost.accumulates, cost.updates, cost.leaves)
        energies = (
            cost.operations_pj(),
            sum(parts.values()),
            parts["weights"],
            parts["potentials"],
        )
        cells = [*(f"{n / 1000:,.1f}k" for n in counts), *(f"{pj / 1000:,.1f}" for pj in energies)]
        rows.append([cost.name, *cells])
    return markdown_table(head, rows)


def eight_bits(dense: Sequence[stdb.LayerCost]) -> dict[str, float]:
    """Model → the share of the ANN's energy that it has in integers of 8 bits."""
    multiplied = sum(cost.multiplies for cost in dense)
    operations, memory, eight = (sum(map(model, dense)) for model in MODELS.values())
    names = list(MODELS)
    return {
        names[0]: multiplied * sum(stdb.INTEGER_PJ[8]) / operations,
        names[1]: eight / memory,
    }


def relative(
    dense: Sequence[stdb.LayerCost], networks: Sequence[Spiking], model: Model
) -> list[tuple[str, float, float, float]]:
    """Of each network: its name, spikes of a neuron, and its share of the ANN's energy.

    The last is the share where nothing fires: a line goes from there through the second.
    """
    ann = sum(map(model, dense))
    return [
        (one.name, one.spikes, one.pj(model) / ann, one.pj(model, 0.0) / ann) for one in networks
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
