r"""Energy, told twice: by operations alone, and with the memory that they need.

*By operations* (Horowitz, ISSCC 2014, 45 nm, float32): a multiply-accumulate 4.6 pJ, an accumulate
0.9 pJ; it is what most papers on spiking networks report, and what
:meth:`stdb.SpikeStatistics.energy` says. *With memory*, after Lemaire et al. (ICONIP 2022): every
operand is read from an SRAM of the layer's own, and results are written there.

==================  ==============================  ==========================================
for each            operations                      memory
==================  ==============================  ==========================================
multiply-accumulate  one                            reads of an input and a weight
synaptic operation  two additions: the              reads of a weight and a potential, a
                    accumulate, an address          write of the potential
spike that arrives  two multiply-accumulates, for   a read of the event
                    its address
neuron and step     one addition                    a read and a write of the potential
spike that leaves   one addition, the reset         a write of the event
value of an ANN                                     a read of the bias, a write
==================  ==============================  ==========================================

A number is never used twice once it is read: an accelerator that keeps weights or inputs in
registers spends less on an ANN than this (Dampfhoffer et al., IEEE TETCI 2023).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .conversion import convert
from .encoding import DirectEncoder
from .graph import INPUT, OF_UNIT
from .network import SpikingNetwork
from .operators.shaping import Sum
from .weights import bias_of

ACCUMULATE_PJ = 0.9  # float32
MULTIPLY_ACCUMULATE_PJ = 4.6
#: bits of integers → picojoules of an addition and of a multiplication, 45 nm
INTEGER_PJ = {8: (0.03, 0.2), 32: (0.1, 3.1)}
#: kilobytes of an SRAM, and picojoules of an access to 64 bits of it, 45 nm
SRAM_PJ = ((8, 10.0), (32, 20.0), (1024, 100.0))


def access_pj(numbers: float, bits: int = 32) -> float:
    """Picojoules of a read or write in an SRAM that holds so many numbers of so many bits.

    Between Horowitz' sizes, and above, along a line; 8 kB is the smallest. In proportion to bits.
    """
    kilobytes = max(numbers * bits / 8 / 1024, SRAM_PJ[0][0])
    (small, low), (large, high) = SRAM_PJ[:2] if kilobytes < SRAM_PJ[1][0] else SRAM_PJ[1:]
    return (low + (kilobytes - small) / (large - small) * (high - low)) * bits / 64


@dataclass(frozen=True)
class LayerCost:
    """What a layer does for an image, on average.

    Attributes:
        name: of the layer.
        multiplies: multiply-accumulates, of inputs that are no spikes.
        accumulates: synaptic operations: a spike and a synapse that it reaches.
        arrives: spikes that arrive.
        updates: neurons × time steps.
        leaves: spikes that its neurons fire.
        weights: how many it has.
        inputs: numbers that it is given at a step.
        outputs: its neurons, or the values of an ANN's layer.
        spiking: whether it is a spiking network's.
    """

    name: str
    multiplies: float = 0.0
    accumulates: float = 0.0
    arrives: float = 0.0
    updates: float = 0.0
    leaves: float = 0.0
    weights: int = 0
    inputs: int = 0
    outputs: int = 0
    spiking: bool = True

    def operations_pj(self) -> float:
        """By operations alone, float32: 4.6 pJ a multiply-accumulate, 0.9 pJ an accumulate.

        Biases are not in it; :meth:`stdb.SpikeStatistics.energy` adds them.
        """
        return MULTIPLY_ACCUMULATE_PJ * self.multiplies + ACCUMULATE_PJ * self.accumulates

    def with_memory_pj(self, bits: int = 32) -> dict[str, float]:
        """With memory: its parts, ``operations``, ``weights``, ``potentials`` and ``values``.

        Args:
            bits: of integers, 8 or 32; weights, potentials and values have as many.

        Raises:
            ValueError: other bits.
        """
        if bits not in INTEGER_PJ:
            raise ValueError(f"bits is {bits}; allowed: {', '.join(map(str, INTEGER_PJ))}")
        add, multiply = INTEGER_PJ[bits]
        weight = access_pj(self.weights, bits) if self.weights else 0.0
        value = access_pj(self.inputs, bits)
        result, event = access_pj(self.outputs, bits), access_pj(0, bits)
        adds = 2 * self.accumulates + self.updates + self.leaves
        parts = {
            "operations": (self.multiplies + 2 * self.arrives) * (multiply + add) + adds * add,
            "weights": (self.multiplies + self.accumulates) * weight,
            "potentials": 2 * (self.accumulates + self.updates) * result,
            "values": self.multiplies * value + (self.arrives + self.leaves) * event,
        }
        if not self.spiking:
            parts["values"] += self.outputs * (result + event)
        return parts


@torch.no_grad()
def layer_costs(
    snn: SpikingNetwork, maps: dict[str, Tensor], images: int, timesteps: int
) -> list[LayerCost]:
    """What each layer of a spiking network did, given its spikes; in the order of a step.

    Neurons are counted with the weights in front of them, and so are shortcuts that meet those in a
    sum. Where a max-pooling is between them, potentials are the sums that it keeps.

    Args:
        snn: the network.
        maps: layer (``input`` first) → spikes of every neuron, summed over time and images.
        images: how many were presented.
        timesteps: T.
    """
    graph, shapes = snn.graph, snn.shapes(maps[INPUT].shape)
    names = {0: INPUT, **graph.labels}
    analogue, constant = (
        bool(getattr(snn.encoder, name, False)) for name in ("analogue", "constant")
    )
    spikes = are_spikes(snn, of_input=not analogue)
    found: dict[str, LayerCost] = {}
    last = len(graph.nodes) - 1
    for i, node in enumerate(graph.nodes[1:], start=1):
        operator = node.operator
        passes = spikes[i] and not operator.fires and i != last
        if passes:
            continue
        reached = reach(snn, shapes, spikes, {i})
        into = [(maps[names[j]], reached[j]) for j in names if j in reached and spikes[j]]
        cost: dict[str, float] = {
            "accumulates": sum(float((one * ways).sum()) for one, ways in into) / images,
            "arrives": sum(float(one[ways > 0].sum()) for one, ways in into) / images,
        }
        name = node.name if operator.learns else names.get(_neuron_above(snn, i), node.name)
        if operator.learns:
            cost |= {
                "weights": snn.module(i).weight.numel(),
                "inputs": shapes[node.inputs[0]].numel(),
                "outputs": shapes[i].numel(),
            }
            if not spikes[node.inputs[0]]:
                once = i in graph.tail or (constant and graph.of_input[i])
                cost["multiplies"] = synapses(snn, i, shapes) * (1 if once else timesteps)
        elif operator.accumulates:  # it reads and writes its sums at every step
            held = shapes[node.inputs[0]].numel()
            cost |= {"outputs": held, "updates": timesteps * held}
        elif operator.fires:
            cost |= {
                "outputs": shapes[i].numel(),
                "updates": timesteps * shapes[i].numel(),
                "leaves": float(maps[name].sum()) / images,
            }
        if any(cost.values()):
            found[name] = _together(found.get(name), LayerCost(name, **cost))  # type: ignore[arg-type]
    return list(found.values())


def _together(first: LayerCost | None, second: LayerCost) -> LayerCost:
    """Weights and their neurons."""
    if first is None:
        return second
    summed = ("multiplies", "accumulates", "arrives", "updates", "leaves")
    counts = {name: getattr(first, name) + getattr(second, name) for name in summed}
    outputs = max(first.outputs, second.outputs)
    return LayerCost(
        first.name, **counts, weights=first.weights, inputs=first.inputs, outputs=outputs
    )


@torch.no_grad()
def ann_costs(ann: nn.Module, image_shape: Sequence[int]) -> list[LayerCost]:
    """What each layer of an ANN does for an image (C, H, W), in its order.

    A shortcut that is added without weights counts as a multiply-accumulate of each value.
    """
    snn = convert(ann, DirectEncoder(), example=torch.zeros(1, *image_shape))
    graph, shapes, spikes = snn.graph, snn.shapes(image_shape), are_spikes(snn)
    found = []
    for i, node in enumerate(graph.nodes[1:], start=1):
        name, size = node.name, shapes[i].numel()
        if node.operator.learns and not node.name.endswith(OF_UNIT):
            found.append(LayerCost(
                name, multiplies=synapses(snn, i, shapes), weights=snn.module(i).weight.numel(),
                inputs=shapes[node.inputs[0]].numel(), outputs=size, spiking=False,
            ))  # fmt: skip
        elif isinstance(node.operator, Sum):
            added = [j for j in node.inputs if spikes[j] or graph.nodes[j].name.endswith(OF_UNIT)]
            if added and len(added) < len(node.inputs):
                multiplies = float(size * len(added))
                found.append(LayerCost(name, multiplies=multiplies, inputs=size, spiking=False))
    return found


def _neuron_above(snn: SpikingNetwork, i: int) -> int:
    """The neurons that a node without weights leads to, the node itself where it is one."""
    graph = snn.graph
    while i not in graph.neurons:
        above = [k for k, node in enumerate(graph.nodes) if i in node.inputs]
        if len(above) != 1 or graph.nodes[above[0]].operator.learns:
            break
        i = above[0]
    return i


def ann_energy(ann: nn.Module, image_shape: Sequence[int]) -> float:
    """Picojoules per image of an ANN: a multiply-accumulate at every synapse."""
    return sum(cost.operations_pj() for cost in ann_costs(ann, image_shape))


# -- synapses --------------------------------------------------------------------------------------


@torch.no_grad()
def fan_out(snn: SpikingNetwork, image_shape: Sequence[int]) -> dict[str, Tensor]:
    """How many synapses each neuron drives: layer (``input`` first) → float64 (C, H, W) or (n,).

    Counted by walking back from every place where spikes end: a layer with weights, a neuron, a sum
    with what is no spikes. The dropout and pooling in between belong to the synapse.
    """
    shapes, spikes = snn.shapes(image_shape), are_spikes(snn)
    everywhere = range(len(shapes))
    driven = reach(snn, shapes, spikes, everywhere)
    like = next(snn.parameters())
    return {
        name: driven.get(i, like.new_zeros(shapes[i], dtype=torch.float64))
        for i, name in {0: INPUT, **snn.graph.labels}.items()
    }


def reach(
    snn: SpikingNetwork, shapes: Sequence[torch.Size], spikes: Sequence[bool], ends: Collection[int]
) -> dict[int, Tensor]:
    """Node → how often each of its values arrives at one of ``ends`` where spikes end there.

    Args:
        snn: the network.
        shapes: of the nodes' values.
        spikes: whether they are spikes.
        ends: nodes.
    """
    graph, like = snn.graph, next(snn.parameters())
    driven: dict[int, Tensor] = {}
    last = len(graph.nodes) - 1
    if last in ends:  # what is added to the output drives it
        driven[last] = like.new_ones(shapes[last], dtype=torch.float64)
    for i in reversed(range(1, len(graph.nodes))):
        node = graph.nodes[i]
        passes = spikes[i] and not node.operator.fires
        if (passes and i not in driven) or (not passes and i not in ends):
            continue
        targets = driven[i] if passes else like.new_ones(shapes[i], dtype=torch.float64)
        for position, j in enumerate(node.inputs):
            ways = node.operator.fan_out(snn.module(i), targets, position, shapes[j])
            driven[j] = driven[j] + ways if j in driven else ways
    return driven


def are_spikes(snn: SpikingNetwork, of_input: bool = True) -> list[bool]:
    """Whether the value of each node is spikes, of neurons or of the input, maybe pooled."""
    spikes = [of_input]
    for node in snn.graph.nodes[1:]:
        passed = not node.operator.learns and all(spikes[j] for j in node.inputs)
        spikes.append(node.operator.fires or passed)
    return spikes


def synapses(snn: SpikingNetwork, i: int, shapes: Sequence[torch.Size]) -> float:
    """Multiply-accumulates of a layer with weights, at one step."""
    node, device = snn.graph.nodes[i], next(snn.parameters()).device
    ones = torch.ones(shapes[i], dtype=torch.float64, device=device)
    return float(node.operator.fan_out(snn.module(i), ones, 0, shapes[node.inputs[0]]).sum())


@dataclass(frozen=True)
class Standing:
    """What a node of the graph costs without a spike: per step, or once for all of them."""

    multiplies: float = 0.0
    adds: int = 0
    once: bool = False


@torch.no_grad()
def standing_costs(snn: SpikingNetwork, image_shape: Sequence[int]) -> list[Standing]:
    """What costs without a spike, in the order of a step.

    A layer whose input is no spikes multiplies. What is added at every step, a bias or a current
    that is the same at each, is added where it ends: at neurons, however many branches have one, at
    a max-pooling, or below another layer.
    """
    graph, shapes, body = snn.graph, snn.shapes(image_shape), set(snn.graph.body)
    analogue, constant = (
        bool(getattr(snn.encoder, name, False)) for name in ("analogue", "constant")
    )
    spikes = are_spikes(snn, of_input=not analogue)
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
            found.append(Standing(adds=shapes[node.inputs[0]].numel()))
        if not operator.learns:
            adds.append(given and not ends)
            continue
        has_bias = bias_of(snn.module(i)) is not None
        if not spikes[node.inputs[0]]:
            found.append(Standing(multiplies=synapses(snn, i, shapes), once=once[i]))
        if i in body:
            adds.append(has_bias or once[i])
        else:
            adds.append(False)
            found.append(Standing(adds=has_bias * shapes[i].numel(), once=True))
    return found
