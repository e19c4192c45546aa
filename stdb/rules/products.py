"""Layers with weights: padding of every kind in front of them, and weights that are used twice."""

from typing import Any

from torch import fx, nn

from ..graph import Node
from ..operators.cutting import Pad
from ..operators.table import kind_of, operator_for
from ..traced import ConversionError, Rewriting, shape_of
from ..tracing import place
from .arithmetic import unit_one

MODES = {"zeros": "constant"}  # of a convolution → of F.pad, where they differ


def weights(rewriting: Rewriting, call: fx.Node) -> Node:
    """A convolution or a linear layer.

    Weights that several calls use see values in the units of the ANN, since the spikes of each
    call stand for something else: a diagonal in front of each holds what they do.
    """
    name = place(call)
    module: Any = rewriting.net.get_submodule(name)
    value = call.all_input_nodes[0].meta["value"]
    if isinstance(module, nn.Linear) and value.dim() != 2:
        raise ConversionError(
            f"layer {name} is a Linear that is given {shape_of(value.shape)}; allowed: a flat "
            "value, as torch.flatten(x, 1) makes it"
        )
    if len(call.args) + len(call.kwargs) > 1:
        raise ConversionError(
            f"layer {name} is called with more than a value; allowed: output_padding in the place "
            "of output_size"
        )
    source = in_front(rewriting, call, module)
    operator = operator_for(kind_of(module))
    assert operator is not None
    return Node(name, operator, (source,), path=name)


def in_front(rewriting: Rewriting, call: fx.Node, module: Any) -> int:
    """The source of a layer, with what has to stand between: a unit of 1, a padding."""
    source = rewriting.source(call)
    if not rewriting.own(call):
        value = next(n for n in call.all_input_nodes if n.op != "get_attr").meta["value"]
        source = unit_one(rewriting, call, source, value)
    pad = _padding(rewriting, module)
    if pad is not None:
        rewriting.nodes.append(rewriting.put(call, pad, (source,), "_padding"))
        source = len(rewriting.nodes) - 1
    return source


def _padding(rewriting: Rewriting, module: Any) -> Pad | None:
    """What stands in front of a convolution that then pads no more; None: it pads by itself."""
    if id(module) in rewriting.padded:
        return Pad(*rewriting.padded[id(module)])
    mode = getattr(module, "padding_mode", "zeros")
    padding = getattr(module, "padding", ())
    if mode == "zeros" and not isinstance(padding, str):
        return None
    if padding == "valid":
        padding = (0,) * len(module.kernel_size)
    if padding == "same":
        sizes = zip(module.kernel_size, module.dilation, strict=True)
        around = [d * (k - 1) for k, d in sizes]
        ends = [(n // 2, n - n // 2) for n in around]
    else:
        ends = [(n, n) for n in padding]
    if mode == "zeros" and all(before == after for before, after in ends):
        module.padding = tuple(before for before, _ in ends)
        return None
    module.padding, module.padding_mode = (0,) * len(ends), "zeros"
    widths = tuple(n for end in reversed(ends) for n in end)
    rewriting.padded[id(module)] = widths, MODES.get(mode, mode)
    return Pad(*rewriting.padded[id(module)])
