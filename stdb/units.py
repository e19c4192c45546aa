"""Units: what one spike of a layer stands for, held by the weights above it.

A spike is 0 or 1. In a network with biases it stands for A_l, the ANN's value at a rate of 1: the
threshold is V_l = A_l and the weights above carry A_l as a factor, so that currents, biases and the
logits are in the ANN's own units. Behind a concatenation each channel has its own. No kernel knows
of units. Networks without biases need none: there V alone says it (§2.3).
"""

import torch
from torch import Tensor, nn

from .graph import Graph
from .operators.cutting import Ordering, Padding, Slicing
from .operators.joining import Concat
from .weights import is_computed, make_plain

ONE = -1  # the origin of a channel whose unit is 1: no spikes


def channels(graph: Graph, net: nn.Module, i: int) -> int:
    """The number of a node's channels; of a flat value those before it was flat."""
    node = graph.nodes[i]
    if not node.inputs:
        raise ValueError("the channels of the input are the image's")
    module = None if node.path is None else net.get_submodule(node.path)
    if node.operator.learns:
        assert module is not None
        for name in ("out_channels", "out_features", "channels"):
            if hasattr(module, name):
                return int(getattr(module, name))
    return len(origins(graph, net, i)) if _moves(graph, i) else channels(graph, net, node.inputs[0])


def origins(graph: Graph, net: nn.Module, i: int) -> Tensor:
    """(C,) int64: the layer of neurons whose spikes each channel of a node carries, or ``ONE``.

    (1,) where it is the same for all channels of the image.
    """
    node = graph.nodes[i]
    if node.operator.fires:
        return torch.full((channels(graph, net, i),), i)
    if node.operator.learns or not node.inputs:
        return torch.tensor([ONE])
    below = [origins(graph, net, j) for j in node.inputs]
    module = None if node.path is None else net.get_submodule(node.path)
    if isinstance(node.operator, Concat):
        assert module is not None
        sizes = module.channels
        return torch.cat([o.expand(n) for o, n in zip(below, sizes, strict=True)])  # type: ignore[arg-type]
    if isinstance(node.operator, Slicing):
        assert module is not None
        return below[0][slice(*module.parts[0])] if len(below[0]) > 1 else below[0]  # type: ignore[index]
    if isinstance(node.operator, Ordering):
        assert module is not None
        return below[0][list(module.order)] if len(below[0]) > 1 else below[0]  # type: ignore[arg-type]
    if isinstance(node.operator, Padding):
        assert module is not None
        before, after = (*module.widths, 0, 0, 0, 0)[4:6]  # type: ignore[misc]
        ends = [torch.full((int(n),), ONE) for n in (before, after)]
        return torch.cat([ends[0], below[0], ends[1]])
    return below[0]


def _moves(graph: Graph, i: int) -> bool:
    return isinstance(graph.nodes[i].operator, Concat | Slicing | Padding | Ordering)


@torch.no_grad()
def change_unit(graph: Graph, net: nn.Module, neuron: int, ratio: float) -> None:
    """Multiply the weights above a layer of neurons by ``ratio``, as far as they see its spikes."""
    if ratio == 1:
        return
    done: set[int] = set()
    for node in graph.nodes:
        if not node.operator.learns or node.path is None:
            continue
        from_layer = origins(graph, net, node.inputs[0]) == neuron
        module = net.get_submodule(node.path)
        if from_layer.any() and id(module) not in done:
            done.add(id(module))
            _scale_columns(module, torch.where(from_layer, ratio, 1.0))


def _scale_columns(module: nn.Module, factors: Tensor) -> None:
    """Multiply a layer's weights by a factor for each input channel."""
    if is_computed(module) and not hasattr(module, "weight_orig"):
        make_plain(module)
    weight = getattr(module, "weight_orig", None)
    weight = module.weight if weight is None else weight
    assert isinstance(weight, Tensor)
    factors = factors.to(weight)
    if weight.dim() == 1:  # a diagonal
        weight.mul_(factors)
    elif isinstance(module, nn.Conv2d):
        groups = module.groups
        rows = factors.expand(module.in_channels).view(groups, -1)
        rows = rows.repeat_interleave(module.out_channels // groups, 0)
        weight.mul_(rows[:, :, None, None])
    else:
        weight.mul_(factors.repeat_interleave(weight.shape[1] // len(factors)))
