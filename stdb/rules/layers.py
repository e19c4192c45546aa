"""Batch norm, dropout, average pooling, concatenation, in every spelling."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..graph import Node
from ..operators import pair
from ..operators.diagonal import Diagonal
from ..operators.joining import Concatenation
from ..operators.shaping import Dropout, Flatten
from ..operators.table import operator_for
from ..traced import ConversionError, Rewriting, settings_of, shape_of, where
from ..tracing import place
from ..weights import fold


def batch_norm(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """A batch norm: folded into the layer below it, or a scale and shift in its place."""
    name = place(call)
    norm: Any = rewriting.net.get_submodule(name)
    if norm.running_mean is None:
        raise ConversionError(
            f"layer {name} keeps no running statistics; train it with track_running_stats=True"
        )
    if norm.running_var is None or not bool((norm.running_var >= 0).all()):
        raise ConversionError(f"{name}.running_var holds NaN, or less than 0; allowed: variances")
    diagonal = fold_norm(
        rewriting, call, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
    )
    if diagonal is None:
        return rewriting.source(call)
    rewriting.net.set_submodule(name, diagonal)
    operator = operator_for(Diagonal)
    assert operator is not None
    return Node(name, operator, (rewriting.source(call),), path=name)


@torch.no_grad()
def fold_norm(
    rewriting: Rewriting,
    call: fx.Node,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Diagonal | None:
    """Fold a norm into the layer below it, if nobody else reads that; None then.

    From the running statistics: g = γ/√(σ² + ε), W' = g·W, b' = β + g·(b − μ).

    Returns:
        The scale g and shift β − g·μ of each channel, of a norm that stays.
    """
    scale = (var.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -scale * mean.double()
    if bias is not None:
        shift = shift + bias.double()
    below = next(n for n in call.all_input_nodes if n.op != "get_attr")
    place_of = rewriting.index[below]
    node = rewriting.nodes[place_of]
    alone = [c for c, i in rewriting.index.items() if i == place_of] == [below]
    alone = alone and rewriting.readers(below) == [call] and rewriting.own(below)
    if not node.operator.learns or not alone:
        diagonal = Diagonal(len(scale)).to(mean.device, mean.dtype)
        diagonal.weight.copy_(scale)
        diagonal.bias.copy_(shift)  # type: ignore[union-attr]
        return diagonal
    assert node.path is not None
    fold(rewriting.net.get_submodule(node.path), scale, shift)
    return None


def dropout(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """F.dropout, with the rate that it has in training; F.dropout1d and F.dropout2d."""
    rate = settings_of(call, "p").get("p", 0.5)
    kinds: dict[Any, Any] = {F.dropout1d: nn.Dropout1d, F.dropout2d: nn.Dropout2d}
    kind = kinds.get(call.target, nn.Dropout)
    _check_dropout(call, kind, where(call))
    return rewriting.put(call, kind(float(rate)), (rewriting.source(call),))


def channel_dropout(rewriting: Rewriting, call: fx.Node) -> Node:
    """nn.Dropout1d and nn.Dropout2d."""
    name = place(call)
    module = rewriting.net.get_submodule(name)
    _check_dropout(call, type(module), f"layer {name}")
    return Node(name, Dropout(), (rewriting.source(call),), path=name)


def _check_dropout(call: fx.Node, kind: type[nn.Module], what: str) -> None:
    """Refuse one that takes the batch for channels."""
    value = call.all_input_nodes[0].meta["value"]
    if issubclass(kind, nn.Dropout1d) and value.dim() != 3:
        raise ConversionError(
            f"{what} drops whole vectors of {shape_of(value.shape)}; allowed: nn.Dropout"
        )


def average_pool(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """F.avg_pool2d, F.avg_pool1d."""
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
    settings = settings_of(call, *names)
    settings["stride"] = settings.get("stride") or None
    kind = nn.AvgPool1d if call.meta["value"].dim() == 3 else nn.AvgPool2d
    return rewriting.put(call, kind(**settings), (rewriting.source(call),))


def mean(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """x.mean((2, 3)): a global average, and flat where the dimensions go; x.mean(2) of a signal."""
    before, after = call.all_input_nodes[0].meta["value"].shape, call.meta["value"].shape
    if len(before) not in (3, 4) or after[:2] != before[:2] or after[2:].numel() != 1:
        raise ConversionError(
            f"{where(call)} makes {shape_of(after)} of {shape_of(before)}; allowed: the mean of "
            "height and width"
        )
    kind = nn.AdaptiveAvgPool1d if len(before) == 3 else nn.AdaptiveAvgPool2d
    node = rewriting.put(call, kind(1), (rewriting.source(call),))
    if len(after) == len(before):
        return node
    rewriting.nodes.append(node)
    return Node(f"{node.name}_flat", Flatten(), (len(rewriting.nodes) - 1,))


def adaptive_average(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """F.adaptive_avg_pool2d, F.adaptive_avg_pool1d."""
    size = settings_of(call, "output_size")["output_size"]
    if call.meta["value"].dim() == 3:
        return rewriting.put(call, nn.AdaptiveAvgPool1d(pair(size)[0]), (rewriting.source(call),))
    return rewriting.put(call, nn.AdaptiveAvgPool2d(pair(size)), (rewriting.source(call),))


def concatenate(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """torch.cat(branches, 1)."""
    branches = call.args[0] if call.args else call.kwargs["tensors"]
    dim = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else 0)
    values = [b.meta["value"] for b in branches]  # type: ignore[union-attr]
    if not isinstance(dim, int) or dim % values[0].dim() != 1:
        raise ConversionError(f"{where(call)} joins along dimension {dim}; allowed: the channels")
    sources = tuple(rewriting.index[b] for b in branches)  # type: ignore[union-attr,index]
    return rewriting.put(call, Concatenation([v.shape[1] for v in values]), sources)
