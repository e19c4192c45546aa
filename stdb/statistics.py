"""Spike statistics (paper §7): spikes per neuron, synaptic operations, energy, energy-delay.

Energies are those of 45 nm CMOS (Horowitz, ISSCC 2014): an accumulate 0.9 pJ, a multiply-accumulate
4.6 pJ. A spike causes one accumulate at every place of the first layer with weights that it
reaches: the real fan-out, so borders, pooling and shortcuts count. A layer whose input is no spikes
multiplies: the first behind an analogue input, one behind another without neurons between them; at
every step, but once where the input is the same at every step, and once in the output layer, on
sums. A neuron with a bias, or a constant current, has an accumulate more at every step. Whether an
input is spikes, and the same at every step, is what the encoder says of itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .energy import (
    ACCUMULATE_PJ,
    MULTIPLY_ACCUMULATE_PJ,
    LayerCost,
    fan_out,
    layer_costs,
    standing_costs,
)
from .graph import INPUT
from .network import SpikingNetwork
from .operators import Value, dense
from .presentation import Presentation
from .spikes import Spikes


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
        trains: layer → spikes (T, B, …) uint8, if they were asked for.
    """

    network: SpikingNetwork
    maps: dict[str, Tensor] = field(default_factory=dict)
    images: int = 0
    timesteps: int = 0
    trains: dict[str, list[Tensor]] | None = None

    def observe(self, presentation: Presentation, name: str, spikes: Value) -> None:
        """Take in a chunk of one layer's spikes, (T, B, …)."""
        if name == INPUT:
            if presentation.t == 0:
                self.images += spikes.shape[1]
            self.timesteps = max(self.timesteps, presentation.t + spikes.shape[0])
        if isinstance(spikes, Spikes):
            total = spikes.map()
        else:
            total = torch.count_nonzero(dense(spikes), (0, 1)).double()
        self.maps[name] = self.maps[name] + total if name in self.maps else total
        if self.trains is not None:
            self.trains.setdefault(name, []).append(dense(spikes).clone())

    def spikes_per_neuron(self) -> dict[str, float]:
        """Spikes of a layer summed over T ÷ neurons of the layer, averaged over images (Fig. 3)."""
        return {
            name: float(spikes.sum()) / spikes.numel() / self.images
            for name, spikes in self.maps.items()
            if name != INPUT
        }

    def synaptic_operations(self) -> dict[str, float]:
        """Operations per image that each layer's spikes cause: Σ spikes × fan-out, by source."""
        reach = fan_out(self.network, self.maps[INPUT].shape)
        return {n: float((m * reach[n]).sum()) / self.images for n, m in self.maps.items()}

    def costs(self) -> list[LayerCost]:
        """What each layer does for an image: operations, and what they read and write."""
        return layer_costs(self.network, self.maps, self.images, self.timesteps)

    def energy(self) -> float:
        """Picojoules per image, by operations alone; :meth:`costs` has what memory takes, too."""
        operations, multiplied, added = self.synaptic_operations(), 0.0, 0.0
        if getattr(self.network.encoder, "analogue", False):
            del operations[INPUT]
        for cost in standing_costs(self.network, self.maps[INPUT].shape):
            steps = 1 if cost.once else self.timesteps
            multiplied += steps * cost.multiplies
            added += steps * cost.adds
        added += sum(operations.values())
        return MULTIPLY_ACCUMULATE_PJ * multiplied + ACCUMULATE_PJ * added

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
