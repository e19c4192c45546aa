"""Units: what one spike of a layer stands for, held by the weights above it.

A spike is 0 or 1. In a network with biases it stands for A_l, the ANN's value at a rate of 1: the
threshold is V_l = A_l and the weights above carry A_l as a factor, so that currents, biases and the
logits are in the ANN's own units. Behind a concatenation each channel has its own. An input that is
encoded as x/u has the unit u of each channel. No kernel knows of units. Networks without biases
need none: there V alone says it (§2.3).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .graph import Graph
from .operators.cutting import Ordering, Padding, Slicing
from .operators.joining import Concat
from .operators.resizing import PixelShuffle, PixelUnshuffle
from .weights import leaf_of

INPUT, ONE = 0, -1  # origins: the first node; no spikes, so that the unit is 1


def origins(graph: Graph, net: nn.Module, i: int) -> Tensor:
    """(C,) int64: the layer of neurons whose spikes each channel of a node carries.

    ``INPUT`` and ``ONE`` where it carries none; (1,) where it is the same for all channels.
    """

    def begins(j: int) -> Tensor:
        return torch.tensor([ONE if graph.nodes[j].operator.learns else j])

    return _carried(graph, net, i, begins)


def _carried(graph: Graph, net: nn.Module, i: int, begins: Callable[[int], Tensor]) -> Tensor:
    """(C,) or (1,): what each channel of a node has from the neurons, weights or input below it."""
    node = graph.nodes[i]
    if node.operator.fires or node.operator.learns or not node.inputs:
        return begins(i)
    module = None if node.path is None else net.get_submodule(node.path)
    first = _carried(graph, net, node.inputs[0], begins)  # the branches of a sum are alike
    if isinstance(node.operator, Concat):
        sizes = module.channels  # type: ignore[union-attr]
        below = [first, *(_carried(graph, net, j, begins) for j in node.inputs[1:])]
        parts = zip(below, sizes, strict=True)  # type: ignore[arg-type]
        return torch.cat([o.repeat_interleave(n // len(o)) for o, n in parts])
    if len(first) == 1:
        return first
    if isinstance(node.operator, Slicing):
        return first[slice(*module.parts[0])]  # type: ignore[union-attr,index]
    if isinstance(node.operator, Ordering):
        return first[list(module.order)]  # type: ignore[union-attr,arg-type]
    if isinstance(node.operator, Padding):  # zeros have any unit
        before, after = (*module.widths, 0, 0, 0, 0)[4:6]  # type: ignore[union-attr,misc]
        return torch.cat([first[:1].expand(before), first, first[:1].expand(after)])
    if isinstance(node.operator, PixelShuffle):  # of r² channels of one origin each
        return first[:: int(module.upscale_factor) ** 2]  # type: ignore[union-attr,arg-type]
    if isinstance(node.operator, PixelUnshuffle):
        return first.repeat_interleave(int(module.downscale_factor) ** 2)  # type: ignore[union-attr,arg-type]
    return first


@torch.no_grad()
def change_unit(graph: Graph, net: nn.Module, source: int, ratio: Tensor) -> None:
    """Multiply the weights above neurons, or the input, as far as they see what comes from there.

    Args:
        graph: of the network.
        net: its modules.
        source: the node.
        ratio: (C,) of each channel, or (1,).
    """
    done: set[int] = set()
    one = ratio.new_ones(1)
    for node in graph.nodes:
        if not node.operator.learns or node.path is None:
            continue
        factors = _carried(graph, net, node.inputs[0], lambda j: ratio if j == source else one)
        module = net.get_submodule(node.path)
        if (factors != 1).any() and id(module) not in done:
            done.add(id(module))
            _scale_columns(module, factors)


def _scale_columns(module: nn.Module, factors: Tensor) -> None:
    """Multiply a layer's weights by a factor for each input channel."""
    weight = leaf_of(module)
    factors = factors.to(weight)
    ends = [1] * (weight.dim() - 2)
    if weight.dim() == 1:  # a diagonal
        weight.mul_(factors.repeat_interleave(len(weight) // len(factors)))
    elif isinstance(module, nn.Conv1d | nn.Conv2d):
        rows = factors.expand(module.in_channels).view(module.groups, -1)
        rows = rows.repeat_interleave(module.out_channels // module.groups, 0)
        weight.mul_(rows.view(*rows.shape, *ends))
    elif isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d):
        weight.mul_(factors.expand(module.in_channels).view(-1, 1, *ends))
    else:
        weight.mul_(factors.repeat_interleave(weight.shape[1] // len(factors)))
