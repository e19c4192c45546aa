"""Spike statistics (paper §7): spikes per neuron, synaptic operations, energy, energy-delay.

Energies are those of 45 nm CMOS (Horowitz, ISSCC 2014): an accumulate 0.9 pJ, a multiply-accumulate
4.6 pJ. A spike causes one accumulate at every place of the first layer with weights that it
reaches: the real fan-out, so borders, pooling and shortcuts count. A layer whose input is no spikes
multiplies: the first behind an analogue input, one behind another without neurons between them; at
every step, but once where the input is the same at every step, and once in the output layer, on
sums. A neuron with a bias, or a constant current, has an accumulate more at every step. Whether an
input is spikes, and the same at every step, is what the encoder says of itself.
"""

from collections.abc import Iterator, Sequence
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
from .weights import bias_of

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

    def energy(self) -> float:
        """Picojoules per image."""
        operations, multiplied, added = self.synaptic_operations(), 0.0, 0.0
        if getattr(self.network.encoder, "analogue", False):
            del operations[INPUT]
        for cost in _costs(self.network, self.maps[INPUT].shape):
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


@torch.no_grad()
def fan_out(snn: SpikingNetwork, image_shape: Sequence[int]) -> dict[str, Tensor]:
    """How many synapses each neuron drives: layer (``input`` first) → float64 (C, H, W) or (n,).

    Counted by walking back from every place where spikes end: a layer with weights, a neuron, a sum
    with what is no spikes. The dropout and pooling in between belong to the synapse.
    """
    graph = snn.graph
    like, shapes = next(snn.parameters()), dict(enumerate(snn.shapes(image_shape)))
    driven = {i: like.new_zeros(shape, dtype=torch.float64) for i, shape in shapes.items()}
    driven[len(graph.nodes) - 1] += 1  # what is added to the output drives it
    spikes = _are_spikes(snn)
    for i in reversed(range(1, len(graph.nodes))):
        node = graph.nodes[i]
        passes = spikes[i] and not node.operator.fires
        targets = driven[i] if passes else torch.ones_like(driven[i])
        for position, j in enumerate(node.inputs):
            driven[j] += node.operator.fan_out(snn.module(i), targets, position, shapes[j])
    return {name: driven[i] for i, name in {0: INPUT, **graph.labels}.items()}


def _are_spikes(snn: SpikingNetwork, of_input: bool = True) -> list[bool]:
    """Whether the value of each node is spikes, of neurons or of the input, maybe pooled."""
    spikes = [of_input]
    for node in snn.graph.nodes[1:]:
        passed = not node.operator.learns and all(spikes[j] for j in node.inputs)
        spikes.append(node.operator.fires or passed)
    return spikes


@dataclass(frozen=True)
class _Cost:
    """What a node of the graph costs without a spike: per step, or once for all of them."""

    multiplies: float = 0.0
    adds: int = 0
    once: bool = False


@torch.no_grad()
def _costs(snn: SpikingNetwork, image_shape: Sequence[int]) -> list[_Cost]:
    """What costs without a spike, in the order of a step.

    A layer whose input is no spikes multiplies. What is added at every step, a bias or a current
    that is the same at each, is added where it ends: at neurons, however many branches have one, at
    a max-pooling, or below another layer.
    """
    graph, shapes, body = snn.graph, snn.shapes(image_shape), set(snn.graph.body)
    analogue, constant = (
        bool(getattr(snn.encoder, name, False)) for name in ("analogue", "constant")
    )
    spikes = _are_spikes(snn, of_input=not analogue)
    once = [i not in body or (constant and graph.of_input[i]) for i in range(len(shapes))]
    # by node, whether its value is pixels, or has a part that is added at every step
    pixels, adds, found = [analogue], [False], []
    for i, node in enumerate(graph.nodes[1:], start=1):
        operator = node.operator
        remembers = operator.fires or operator.accumulates
        ends = remembers or operator.learns
        of_pixels, given = (any(each[j] for j in node.inputs) for each in (pixels, adds))
        given = given or (of_pixels and remembers)
        pixels.append(of_pixels and not ends)
        if given and ends and not once[i]:
            found.append(_Cost(adds=shapes[node.inputs[0]].numel()))
        if not operator.learns:
            adds.append(given and not ends)
            continue
        has_bias = bias_of(snn.module(i)) is not None
        if not spikes[node.inputs[0]]:
            found.append(_Cost(multiplies=_synapses(snn, i, shapes), once=once[i]))
        if i in body:
            adds.append(has_bias or once[i])
        else:
            adds.append(False)
            found.append(_Cost(adds=has_bias * shapes[i].numel(), once=True))
    return found


def _synapses(snn: SpikingNetwork, i: int, shapes: Sequence[torch.Size]) -> float:
    """Multiply-accumulates of a layer with weights, at one step."""
    node, device = snn.graph.nodes[i], next(snn.parameters()).device
    ones = torch.ones(shapes[i], dtype=torch.float64, device=device)
    return float(node.operator.fan_out(snn.module(i), ones, 0, shapes[node.inputs[0]]).sum())


@torch.no_grad()
def ann_energy(ann: nn.Module, image_shape: Sequence[int]) -> float:
    """Picojoules per image of an ANN: a multiply-accumulate at every synapse."""
    snn = convert(ann, DirectEncoder(), example=torch.zeros(1, *image_shape))
    synapses = sum(float(reached.sum()) for reached in fan_out(snn, image_shape).values())
    shapes, spikes = snn.shapes(image_shape), _are_spikes(snn)
    synapses += sum(
        _synapses(snn, i, shapes)
        for i, node in enumerate(snn.graph.nodes)
        if node.operator.learns and not spikes[node.inputs[0]]
    )
    return MULTIPLY_ACCUMULATE_PJ * synapses
