"""What stands in front of neurons: the weights that make a layer's current, and may hold 1/A.

In the form per channel every neuron has V = 1, and channel c of a layer is driven by x[c]/A[c]
where x is the ANN's value: the weights that make it are divided by A, those above multiplied
(:mod:`stdb.units`), so that W''[o,i] = W[o,i]·A_in[i]/A_out[o] and b'' = b/A_out. Where weights
have other readers too, are used twice, or where there are none, a diagonal in front of the neurons
holds it. A bias that a calibration adds goes to the same place.
"""

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .graph import IN_FRONT, Graph, Node
from .network import SpikingNetwork
from .operators.cutting import Ordering, Padding, Slicing
from .operators.diagonal import Diagonal, Scale
from .operators.maximum import MaxPool
from .operators.pooling import AdaptiveAveragePool, AveragePool, SignalAveragePool
from .operators.resizing import PixelShuffle
from .operators.shaping import Dropout, Flatten, Sum
from .units import INPUT, change_unit, origins
from .weights import bias_of, is_computed, is_pruned, make_plain, scale_rows, weight_of

# Through these a factor above 0 of each channel, and a constant, pass unchanged.
PASSED = (Sum, MaxPool, Dropout, AveragePool, AdaptiveAveragePool, SignalAveragePool)
SAME = 1e-5  # of a number: what scaling to and fro may have changed in it


def hold_units(snn: SpikingNetwork, image_shape: torch.Size) -> None:
    """Let the weights hold what a spike stands for, also in a network without biases.

    What takes spikes without weights of its own, such as the sum at an identity shortcut, is given
    a diagonal that has some; so are weights that are used twice, whose spikes differ.

    Args:
        snn: the network.
        image_shape: of its images, (C, H, W), (C, L) or (n,).
    """
    if snn.has_units:
        return
    shared, shapes = _shared(snn), snn.shapes(image_shape)
    reader = 0
    while reader < len(snn.graph.nodes):
        node = snn.graph.nodes[reader]
        wants_one = isinstance(node.operator, Sum | MaxPool) or node.operator.fires
        if wants_one or (node.operator.learns and node.path in shared):
            for place in range(len(node.inputs)):
                source = snn.graph.nodes[reader].inputs[place]
                if bool((origins(snn.graph, snn.net, source) > INPUT).any()):
                    _insert(snn, reader, place, shapes[source][0])
                    shapes.insert(reader, shapes[source])
                    reader += 1
        reader += 1
    snn.has_units = True


def _shared(snn: SpikingNetwork) -> set[str | None]:
    """The places of modules whose weights more than one node computes with."""
    nodes = snn.graph.nodes
    learned = [i for i, node in enumerate(nodes) if node.operator.learns]
    used = Counter(id(p) for i in learned for p in snn.module(i).parameters())
    return {
        nodes[i].path for i in learned if any(used[id(p)] > 1 for p in snn.module(i).parameters())
    }


def _insert(snn: SpikingNetwork, reader: int, place: int, channels: int) -> int:
    """A diagonal of ones between a node and its input at ``place``; the diagonal's node."""
    nodes = snn.graph.nodes
    diagonal = _diagonal(snn, nodes[reader].name, nodes[reader].inputs[place], channels)
    above = [
        replace(node, inputs=tuple(j + (j >= reader) for j in node.inputs))
        for node in nodes[reader:]
    ]
    inputs = list(above[0].inputs)
    inputs[place] = reader
    above[0] = replace(above[0], inputs=tuple(inputs))
    snn.graph = Graph([*nodes[:reader], diagonal, *above])
    return reader


def _diagonal(snn: SpikingNetwork, name: str, source: int, channels: int) -> Node:
    """A node for a diagonal of ones, in the tree under a name that is free."""
    name = name.replace(".", "_") + IN_FRONT
    while hasattr(snn.net, name):
        name = f"_{name}"
    like = next(snn.net.parameters())
    snn.net.add_module(name, Diagonal(channels, bias=False).to(like.device, like.dtype))
    return Node(name, Scale(), (source,), name)


def front(snn: SpikingNetwork, end: int) -> list[int]:
    """The nodes with weights whose sum, pooled maybe, is a value and nothing else; or none.

    Args:
        snn: the network.
        end: a layer of neurons, whose current is meant, or the last node.
    """
    nodes = snn.graph.nodes
    readers = Counter(j for node in nodes for j in node.inputs)
    shared = _shared(snn)
    waiting = [nodes[end].inputs[0] if nodes[end].operator.fires else end]
    found: list[int] = []
    while waiting:
        i = waiting.pop(0)
        node = nodes[i]
        if readers[i] > 1:
            return []
        if node.operator.learns:
            if node.path in shared:
                return []
            found.append(i)
        elif isinstance(node.operator, PASSED) and _keeps_constants(snn.module(i)):
            waiting += node.inputs
        else:
            return []
    return found


def _keeps_constants(module: Any) -> bool:
    """Whether a pooling makes c of what is c everywhere."""
    padding = getattr(module, "padding", 0)
    padded = any(padding) if isinstance(padding, tuple) else bool(padding)
    if getattr(module, "divisor_override", None) is not None:
        return False
    return not padded or hasattr(module, "return_indices")  # a maximum's padding never wins


def prepare_front(snn: SpikingNetwork, label: str, channels: int, bias: bool) -> str | None:
    """See to it that a layer's current can be scaled, and shifted, without changing another.

    Args:
        snn: the network.
        label: of the layer; ``""`` for the output.
        channels: of its current.
        bias: whether it will be shifted.

    Returns:
        The place of a module that was given a bias of 0 for it; None where it has one.
    """
    found = front(snn, place_of(snn, label))
    if not found and label:
        found = [_insert(snn, place_of(snn, label), 0, channels)]
    if not found:
        found = [_append(snn, channels)]
    if not bias:
        return None
    module = snn.module(found[0])
    if is_computed(module, "bias"):
        make_plain(module)
    if module.bias is not None:
        return None
    module.bias = nn.Parameter(weight_of(module).new_zeros(channels))
    return snn.graph.nodes[found[0]].path


def _append(snn: SpikingNetwork, channels: int) -> int:
    """A diagonal of ones behind the output."""
    nodes = snn.graph.nodes
    snn.graph = Graph([*nodes, _diagonal(snn, nodes[-1].name, len(nodes) - 1, channels)])
    return len(nodes)


def place_of(snn: SpikingNetwork, label: str) -> int:
    """The node of a layer of neurons; the last for ``""``."""
    if not label:
        return len(snn.graph.nodes) - 1
    return next(i for i, name in snn.graph.labels.items() if name == label)


def bias_in_front(snn: SpikingNetwork, label: str) -> Tensor:
    """The bias of a layer's current, or the output's; see :func:`prepare_front`."""
    bias = snn.module(front(snn, place_of(snn, label))[0]).bias
    assert isinstance(bias, Tensor)
    return bias


def takes_channels(graph: Graph, neuron: int) -> bool:
    """Whether the operators above a layer can tell its channels apart.

    They cannot where channels become pixels, or are cut out of what was flattened.
    """
    waiting, seen = [(neuron, False)], set()
    while waiting:
        i, flat = waiting.pop()
        if (i, flat) in seen:
            continue
        seen.add((i, flat))
        for node_index, node in enumerate(graph.nodes):
            if i not in node.inputs or node.operator.learns or node.operator.fires:
                continue
            cuts = isinstance(node.operator, Slicing | Ordering | Padding)
            if isinstance(node.operator, PixelShuffle) or (flat and cuts):
                return False
            waiting.append((node_index, flat or isinstance(node.operator, Flatten)))
    return True


@torch.no_grad()
def set_amplitude(snn: SpikingNetwork, label: str, amplitude: Tensor) -> None:
    """Give a layer, at V = 1 and in units of 1, A of each channel (C,)."""
    i = place_of(snn, label)
    neuron = snn.module(i)
    neuron.keep(len(amplitude))
    neuron.amplitude.copy_(amplitude)
    _apply(snn, i, neuron.amplitude.double())


def _apply(snn: SpikingNetwork, i: int, amplitude: Tensor) -> None:
    """The weights in front ÷ A, those above × A."""
    for j in front(snn, i):
        scale_rows(snn.module(j), 1 / amplitude)
    alike = bool((amplitude == amplitude[0]).all())
    change_unit(snn.graph, snn.net, i, amplitude[:1] if alike else amplitude)


# -- back to the ANN's own weights -----------------------------------------------------------------


@torch.no_grad()
def release(snn: SpikingNetwork) -> None:
    """Bring a network with units back to the ANN's own values: V = A = 1, no correction.

    Weights that are what they were, to the rounding of that, become exactly what they were, so that
    a second calibration gives what the first gave. What has been trained since stays.
    """
    drift: dict[str, float] = {}  # of biases, which a correction may have dwarfed
    snn.set_thresholds(dict.fromkeys(snn.thresholds, 1.0), balanced=())
    for label, neuron in snn.neurons.items():
        if neuron.amplitude is None or neuron.correction is None:
            continue
        i = place_of(snn, label)
        if neuron.correction.any():
            bias_in_front(snn, label).sub_(neuron.correction)
            path = snn.graph.nodes[front(snn, i)[0]].path
            drift[f"{path}.bias"] = float((neuron.correction * neuron.amplitude).abs().max())
        if (neuron.amplitude != 1).any():
            _apply(snn, i, 1 / neuron.amplitude.double())
        neuron.keep(0)
    if snn.output_correction is not None:
        bias_in_front(snn, "").sub_(snn.output_correction)
        path = snn.graph.nodes[front(snn, place_of(snn, ""))[0]].path
        drift[f"{path}.bias"] = float(snn.output_correction.abs().max())
        snn.output_correction = None
    for name, leaf in _weights(snn).items():
        before = snn.untouched.get(name)
        if before is not None and before.shape == leaf.shape:
            before = before.to(leaf)
            if torch.allclose(leaf, before, rtol=SAME, atol=SAME * drift.get(name, 0.0)):
                leaf.copy_(before)


@torch.no_grad()
def uncorrected(snn: SpikingNetwork) -> SpikingNetwork:
    """A copy without what a calibration has added to biases; A, V and U_0 stay."""
    twin = copy.deepcopy(snn)
    for label, neuron in twin.neurons.items():
        if neuron.correction is not None and neuron.correction.any():
            bias_in_front(twin, label).sub_(neuron.correction)
            neuron.correction.zero_()
    if twin.output_correction is not None:
        bias_in_front(twin, "").sub_(twin.output_correction)
        twin.output_correction = None
    return twin


@torch.no_grad()
def remember(snn: SpikingNetwork) -> None:
    """Keep the weights as they are now, in the ANN's own values, for :func:`release`."""
    snn.untouched = {name: weight.detach().clone() for name, weight in _weights(snn).items()}


def _weights(snn: SpikingNetwork) -> dict[str, Tensor]:
    """Weights, of what is pruned the leaf, and biases of all layers, by name."""
    found: dict[str, Tensor] = {}
    for i, node in enumerate(snn.graph.nodes):
        if node.operator.learns:
            module = snn.module(i)
            pruned = is_pruned(module)
            found[f"{node.path}.weight"] = module.weight_orig if pruned else weight_of(module)
            bias = bias_of(module)
            if bias is not None:
                found[f"{node.path}.bias"] = bias
    return found
