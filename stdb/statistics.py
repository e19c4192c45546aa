"""Spike statistics (paper §7): spikes per neuron, synaptic operations, energy, energy-delay.

Energies are those of 45 nm CMOS (Horowitz, ISSCC 2014): an accumulate 0.9 pJ, a multiply-accumulate
4.6 pJ. A spike causes one accumulate at every neuron that it reaches: the real fan-out, so borders,
pooling and shortcuts count. An analogue input causes multiply-accumulates instead.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .conversion import convert
from .encoding import DirectEncoder
from .graph import INPUT
from .network import SpikingNetwork
from .operators import Value, dense
from .presentation import Presentation
from .spikes import Spikes

ACCUMULATE_PJ = 0.9
MULTIPLY_ACCUMULATE_PJ = 4.6


@dataclass
class SpikeStatistics:
    """What was recorded while a network ran.

    Attributes:
        network: the network that was presented.
        maps: layer (``input`` first) → spikes of every neuron, summed over time and images,
            (C, H, W) or (n,), float64, on the network's device. A signed input spike counts as one;
            so does a nonzero pixel of an analogue input, at every step.
        images: number of images presented.
        timesteps: steps of a presentation.
        analogue: whether the input was no spike train, as a tensor, so that nobody waits for it.
        trains: layer → spikes (T, B, …) uint8, if they were asked for.
    """

    network: SpikingNetwork
    maps: dict[str, Tensor] = field(default_factory=dict)
    images: int = 0
    timesteps: int = 0
    analogue: Tensor | None = None
    trains: dict[str, list[Tensor]] | None = None

    def observe(self, presentation: Presentation, name: str, spikes: Value) -> None:
        """Take in a chunk of one layer's spikes, (T, B, …)."""
        if name == INPUT:
            if presentation.t == 0:
                self.images += spikes.shape[1]
            self.timesteps = max(self.timesteps, presentation.t + spikes.shape[0])
            analogue = (dense(spikes).frac() != 0).any()
            self.analogue = analogue if self.analogue is None else self.analogue | analogue
        if isinstance(spikes, Spikes):
            total = spikes.map()
        else:
            total = torch.count_nonzero(dense(spikes), (0, 1)).double()
        self.maps[name] = self.maps[name] + total if name in self.maps else total
        if self.trains is not None:
            self.trains.setdefault(name, []).append(dense(spikes).clone())

    @property
    def analogue_input(self) -> bool:
        """The input was no spike train."""
        return self.analogue is not None and bool(self.analogue)

    def spikes_per_neuron(self) -> dict[str, float]:
        """Spikes of a layer summed over T ÷ neurons of the layer, averaged over images (Fig. 3)."""
        return {
            name: float(spikes.sum()) / spikes.numel() / self.images
            for name, spikes in self.maps.items()
            if name != INPUT
        }

    def synaptic_operations(self) -> dict[str, float]:
        """Operations per image that each layer's spikes cause: Σ spikes × fan-out, by source."""
        c, h, w = self.maps[INPUT].shape
        reach = fan_out(self.network, (c, h, w))
        return {n: float((m * reach[n]).sum()) / self.images for n, m in self.maps.items()}

    def energy(self) -> float:
        """Picojoules per image."""
        operations = self.synaptic_operations()
        analogue = operations.pop(INPUT) if self.analogue_input else 0.0
        return MULTIPLY_ACCUMULATE_PJ * analogue + ACCUMULATE_PJ * sum(operations.values())

    def energy_delay(self) -> float:
        """Energy–delay product per image: picojoules × time steps."""
        return self.energy() * self.timesteps

    def train(self, name: str) -> Tensor:
        """The whole spike train of a layer (T, B, …), if trains were asked for."""
        if self.trains is None:
            raise ValueError("spike trains were not recorded; use record_spikes(snn, trains=True)")
        return torch.cat(self.trains[name])


@contextmanager
def record_spikes(snn: SpikingNetwork, trains: bool = False) -> Iterator[SpikeStatistics]:
    """Record the spikes of all presentations inside the ``with`` block.

    Args:
        snn: the network.
        trains: keep the whole spike trains of a presentation too, not only their sums.

    The presentations in a block should have the same number of steps.
    """
    statistics = SpikeStatistics(snn, trains={} if trains else None)
    snn.observers.append(statistics.observe)
    try:
        yield statistics
    finally:
        snn.observers.remove(statistics.observe)


@torch.no_grad()
def fan_out(snn: SpikingNetwork, image_shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """How many synapses each neuron drives: layer (``input`` first) → float64 (C, H, W) or (n,).

    Counted by walking back from what every layer drives; the dropout and pooling in between
    belong to the synapse.
    """
    graph = snn.graph
    like, shapes = next(snn.parameters()), dict(enumerate(snn.shapes(image_shape)))
    driven = {i: like.new_zeros(shape, dtype=torch.float64) for i, shape in shapes.items()}
    driven[len(graph.nodes) - 1] += 1  # what is added to the output drives it
    for i in reversed(range(1, len(graph.nodes))):
        node = graph.nodes[i]
        for position, j in enumerate(node.inputs):
            driven[j] += node.operator.fan_out(snn.module(i), driven[i], position, shapes[j])
    return {name: driven[i] for i, name in {0: INPUT, **graph.labels}.items()}


def ann_energy(ann: nn.Module, image_shape: tuple[int, int, int]) -> float:
    """Picojoules per image of an ANN: a multiply-accumulate at every synapse."""
    example = torch.zeros(1, *image_shape)
    synapses = fan_out(convert(ann, DirectEncoder(), example=example), image_shape)
    return MULTIPLY_ACCUMULATE_PJ * sum(float(s.sum()) for s in synapses.values())
