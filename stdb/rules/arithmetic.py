"""Sums and differences of branches, and constants; each in the units of :mod:`stdb.units`."""

import operator as python
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..graph import OF_UNIT, Graph, Node
from ..operators.diagonal import Diagonal
from ..operators.shaping import Sum
from ..traced import ConversionError, Rewriting, shape_of, where
from ..units import INPUT, origins


def add(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """A sum of branches, or a constant shift."""
    if call.kwargs.get("alpha", 1) != 1:
        raise ConversionError(f"{where(call)} adds with alpha; allowed: a plain sum of branches")
    return _sum(rewriting, call, 1.0)


def subtract(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """A difference of branches, or a constant shift."""
    if call.kwargs.get("alpha", 1) != 1:
        raise ConversionError(f"{where(call)} subtracts with alpha; allowed: a plain difference")
    return _sum(rewriting, call, -1.0)


def multiply(rewriting: Rewriting, call: fx.Node) -> Node:
    """Times a constant."""
    one, other = call.args[:2]
    constant = other if isinstance(one, fx.Node) else one
    if not isinstance(constant, int | float):
        raise ConversionError(
            f"{where(call)} multiplies values with each other; allowed: a sum, or a constant factor"
        )
    divides = call.target in (python.truediv, python.itruediv, torch.div, "div", "div_")
    if divides and not isinstance(one, fx.Node):
        raise ConversionError(f"{where(call)} divides by a value; allowed: a constant factor")
    factor = 1 / constant if divides else float(constant)
    return _diagonal(rewriting, call, call.all_input_nodes[0], factor, 0.0)


def _sum(rewriting: Rewriting, call: fx.Node, sign: float) -> Node:
    one, other = [*call.args, *call.kwargs.values()][:2]
    if isinstance(one, fx.Node) and isinstance(other, fx.Node):
        if not all(rewriting.is_image(n) for n in (one, other)):
            raise ConversionError(
                f"{where(call)} adds a parameter or a constant of many values; allowed: a sum of "
                "branches, a number, a bias of a layer"
            )
        first, second = one, other
        shapes = [n.meta["value"].shape for n in (first, second)]
        if shapes[0] != shapes[1]:
            raise ConversionError(
                f"{where(call)} adds {shape_of(shapes[0])} and {shape_of(shapes[1])}; allowed: "
                "branches of one shape"
            )
        sources = [in_unit_one(rewriting, call, first), in_unit_one(rewriting, call, second)]
        if sign < 0:
            node = _diagonal(rewriting, call, second, -1.0, None, "_negative")
            rewriting.nodes.append(node)
            sources[1] = len(rewriting.nodes) - 1
        return Node(call.name, Sum(), tuple(sources))
    image, constant = (one, other) if isinstance(one, fx.Node) else (other, one)
    if not isinstance(image, fx.Node) or not isinstance(constant, int | float):
        raise ConversionError(f"{where(call)} adds {constant!r}; allowed: branches and numbers")
    flipped = sign < 0 and image is other  # c − x
    shift = float(constant) if flipped else sign * constant
    return _diagonal(rewriting, call, image, -1.0 if flipped else 1.0, shift)


def _diagonal(
    rewriting: Rewriting,
    call: fx.Node,
    image: fx.Node,
    factor: float,
    shift: float | None,
    suffix: str = "",
) -> Node:
    """factor·x + shift, the same for all channels."""
    value = image.meta["value"]
    diagonal = like_weights(rewriting, Diagonal(value.shape[1], bias=bool(shift)))
    nn.init.constant_(diagonal.weight, factor)
    if diagonal.bias is not None:
        nn.init.constant_(diagonal.bias, shift or 0.0)
    return rewriting.put(call, diagonal, (rewriting.index[image],), suffix)


def in_unit_one(rewriting: Rewriting, call: fx.Node, image: fx.Node) -> int:
    """A branch; spikes, as of an identity shortcut, behind a diagonal that holds their unit."""
    return unit_one(rewriting, call, rewriting.index[image], image.meta["value"])


def unit_one(rewriting: Rewriting, call: fx.Node, source: int, value: Tensor) -> int:
    """The same of a node, with a value of its shape."""
    of = origins(Graph(rewriting.nodes), rewriting.net, source)
    spikes = rewriting.has_units and bool((of > INPUT).any())
    if not spikes and not (rewriting.limited and bool((of == INPUT).any())):
        return source
    diagonal = like_weights(rewriting, Diagonal(value.shape[1], bias=False))
    rewriting.nodes.append(rewriting.put(call, diagonal, (source,), OF_UNIT))
    return len(rewriting.nodes) - 1


def like_weights(rewriting: Rewriting, module: Any) -> Any:
    """A module on the device and of the type of the network's weights."""
    like = next(p for p in rewriting.net.parameters() if p.is_floating_point())
    return module.to(like.device, like.dtype)
