"""Layers without a module: convolutions, products and norms of parameters that forward calls."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..graph import Node
from ..operators.table import kind_of, operator_for
from ..traced import ConversionError, Rewriting, settings_of, where
from ..tracing import place
from .layers import fold_norm
from .products import in_front

CONVOLUTION = ("weight", "bias", "stride", "padding", "dilation", "groups")
TRANSPOSED = ("weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
NORM = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
NORM_OF_TORCH = ("weight", "bias", "running_mean", "running_var", *NORM[4:], "cudnn")


def convolve(rewriting: Rewriting, call: fx.Node) -> Node:
    """F.conv2d or F.conv1d of the network's own parameters: a layer that shares them."""
    kind = nn.Conv1d if call.meta["value"].dim() == 3 else nn.Conv2d
    return _convolution(rewriting, call, kind, settings_of(call, *CONVOLUTION))


def convolve_transposed(rewriting: Rewriting, call: fx.Node) -> Node:
    """F.conv_transpose2d or F.conv_transpose1d of the network's own parameters."""
    kind = nn.ConvTranspose1d if call.meta["value"].dim() == 3 else nn.ConvTranspose2d
    return _convolution(rewriting, call, kind, settings_of(call, *TRANSPOSED))


def _convolution(rewriting: Rewriting, call: fx.Node, kind: Any, settings: dict[str, Any]) -> Node:
    """A layer of this kind that shares the parameters of a call."""
    given, bias = (settings.pop(name, None) for name in ("weight", "bias"))
    weight, groups = _parameter(rewriting, call, given), settings.get("groups", 1)
    rows, columns, *kernel = weight.shape
    transposed = kind in (nn.ConvTranspose1d, nn.ConvTranspose2d)
    channels = (rows, columns * groups) if transposed else (columns * groups, rows)
    with torch.device("meta"):
        sizes = {name: _pair(value) for name, value in settings.items()}
        module = kind(*channels, tuple(kernel), bias=bias is not None, **sizes)
    return _layer(rewriting, call, module, given, bias)


def connect(rewriting: Rewriting, call: fx.Node) -> Node:
    """F.linear of the network's own parameters: a layer that shares them."""
    settings = settings_of(call, "weight", "bias")
    weight, bias = _parameter(rewriting, call, settings["weight"]), settings.get("bias")
    with torch.device("meta"):
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    return _layer(rewriting, call, module, settings["weight"], bias)


def normalise(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """F.batch_norm with running statistics: folded, or a scale and shift in its place."""
    of_torch = call.target is not F.batch_norm
    settings = settings_of(call, *(NORM_OF_TORCH if of_torch else NORM))
    if settings.get("training") or settings.get("running_mean") is None:
        raise ConversionError(
            f"{where(call)} normalises by the batch, which a spike does not know; allowed: running "
            "statistics"
        )
    names = ("running_mean", "running_var", "weight", "bias")
    given = [settings.get(name) for name in names]
    mean, var, weight, bias = (None if g is None else _parameter(rewriting, call, g) for g in given)
    assert mean is not None
    assert var is not None
    eps = settings.get("eps", 1e-5)
    diagonal = fold_norm(rewriting, call, mean, var, weight, bias, eps)
    if diagonal is None:
        return rewriting.source(call)
    return rewriting.put(call, diagonal, (rewriting.source(call),))


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _parameter(rewriting: Rewriting, call: fx.Node, given: Any) -> Tensor:
    """The network's own tensor that an operation takes."""
    if not isinstance(given, fx.Node) or given.op != "get_attr":
        raise ConversionError(
            f"{where(call)} computes its weights; allowed: parameters as they are, or computed by "
            "torch.nn.utils.parametrize"
        )
    owner, _, name = place(given).rpartition(".")
    tensor: Tensor = getattr(rewriting.net.get_submodule(owner), name)
    return tensor


def _layer(
    rewriting: Rewriting, call: fx.Node, module: nn.Module, weight: fx.Node, bias: Any
) -> Node:
    """The node of a layer whose weights are the network's: that of a module, if they are its."""
    module.register_parameter("weight", _as_parameter(_parameter(rewriting, call, weight)))
    if bias is not None:
        module.register_parameter("bias", _as_parameter(_parameter(rewriting, call, bias)))
    owner = place(weight).rpartition(".")[0]
    other = rewriting.net.get_submodule(owner)
    operator = operator_for(kind_of(other))
    if operator is not None and str(other) == str(module) and _same_tensors(other, module):
        return Node(owner, operator, (in_front(rewriting, call, other),), path=owner)
    return rewriting.put(call, module, (in_front(rewriting, call, module),))


def _same_tensors(one: Any, other: Any) -> bool:
    return one.weight is other.weight and one.bias is other.bias


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
