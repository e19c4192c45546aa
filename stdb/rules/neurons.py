"""Where neurons go: relus of every kind, and the max-poolings in front of which they stood."""

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..activations import QCFS, Clip
from ..graph import Node
from ..operators.joining import Concat
from ..operators.shaping import Dropout
from ..operators.table import kind_of, operator_for
from ..traced import ConversionError, Rewriting, settings_of, where
from ..tracing import place
from .arithmetic import unit_one

RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")


def relu(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """A relu: a layer of neurons for each call; nothing on what cannot be negative."""
    source = rewriting.source(call)
    if call.op == "call_module":
        name = place(call)
        module = rewriting.net.get_submodule(name)
        first = next(c for c in rewriting.calls if c.op == "call_module" and place(c) == name)
        return _neurons(rewriting, call, copy.deepcopy(module), source, first is call)
    return _neurons(rewriting, call, nn.ReLU(), source, False)


def clamp(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """A relu with a bound: clamp, hardtanh, relu6, with 0 as the lower one."""
    names = ("min", "max")
    if call.target in (F.hardtanh, F.hardtanh_):
        names = ("min_val", "max_val")
    settings = settings_of(call, *names)
    low, high = (settings.get(name) for name in names)
    if call.target in (F.relu6,):
        low, high = 0, 6
    module = nn.ReLU() if high is None else nn.Hardtanh(float(low or 0), float(high))
    if low is None or low != 0:
        raise ConversionError(f"{where(call)} has the lower bound {low}; allowed: 0, as a rate has")
    return _neurons(rewriting, call, module, rewriting.source(call), False)


def _neurons(
    rewriting: Rewriting, call: fx.Node, module: nn.Module, source: int, in_place: bool
) -> Node | int:
    """A layer of neurons, in the module's place or in one of its own."""
    if isinstance(module, nn.Hardtanh) and (module.min_val != 0 or module.max_val <= 0):
        raise ConversionError(
            f"{where(call)} clips to {module.min_val} and {module.max_val}; allowed: 0 and a "
            "positive number, as a rate has"
        )
    if isinstance(module, Clip) and not 0 < module.bound.item() < float("inf"):
        raise ConversionError(
            f"{where(call)} has the bound {module.bound.item():.4g}; allowed: a number above 0, "
            "which constrain() keeps in training"
        )
    if _is_positive(rewriting, source) and type(module) is nn.ReLU:
        return source
    source = unit_one(rewriting, call, source, call.all_input_nodes[0].meta["value"])
    if in_place:
        operator = operator_for(kind_of(module))
        assert operator is not None
        return Node(place(call), operator, (source,), path=place(call))
    return rewriting.put(call, module, (source,))


def _is_positive(rewriting: Rewriting, i: int) -> bool:
    """Whether a value is never negative: spikes, and their averages, side by side or summed."""
    waiting, seen = [i], set()
    while waiting:
        j = waiting.pop()
        node = rewriting.nodes[j]
        if j in seen or node.operator.fires:
            continue
        if node.operator.learns or not node.inputs:
            return False
        seen.add(j)
        waiting += node.inputs
    return True


def max_pool(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """Max-pooling: of the currents of the relus below it, whose neurons come after it.

    relu(max x) is max relu(x), so it moves up through concat, max-pooling and dropout to every
    relu; on another value that cannot be negative it gets neurons of its own.
    """
    module, source = _pooling(rewriting, call), rewriting.source(call)
    readers = rewriting.readers(call)
    if readers and all(_is_relu(rewriting, reader) for reader in readers):
        return rewriting.put(call, module, (source,))
    if not _is_positive(rewriting, source):
        raise ConversionError(
            f"{where(call)} takes the maximum of what can be negative; allowed: of a ReLU's "
            "values, or with a ReLU behind it"
        )
    return _pooled(rewriting, call, module, source)


def _pooled(rewriting: Rewriting, call: fx.Node, module: nn.Module, source: int) -> int:
    """The node of max-pooled spikes: neurons behind the pooling of a source's currents."""
    node = rewriting.nodes[source]

    def append(new: Node) -> int:
        rewriting.nodes.append(new)
        return len(rewriting.nodes) - 1

    if isinstance(node.operator, Dropout | Concat):
        below = tuple(_pooled(rewriting, call, module, j) for j in node.inputs)
        return append(replace(node, name=f"{call.name}_{len(rewriting.nodes)}", inputs=below))
    neuron: nn.Module = nn.ReLU()
    if node.operator.fires:
        current = node.inputs[0]
        assert node.path is not None
        neuron = copy.deepcopy(rewriting.net.get_submodule(node.path))
    else:
        current = unit_one(rewriting, call, source, call.all_input_nodes[0].meta["value"])
    pool = append(rewriting.put(call, copy.deepcopy(module), (current,)))
    return append(rewriting.put(call, neuron, (pool,), "_relu"))


def _pooling(rewriting: Rewriting, call: fx.Node) -> nn.MaxPool1d | nn.MaxPool2d:
    """The pooling of a module, or of F.max_pool2d or F.max_pool1d."""
    kind = nn.MaxPool1d if call.meta["value"].dim() == 3 else nn.MaxPool2d
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    if call.op == "call_module":
        module: Any = rewriting.net.get_submodule(place(call))
        return kind(**{name: getattr(module, name) for name in names})
    settings = settings_of(call, *names)
    settings.pop("return_indices", None)
    settings["stride"] = settings.get("stride") or None
    return kind(**settings)


def _is_relu(rewriting: Rewriting, call: fx.Node) -> bool:
    if call.op == "call_module":
        kinds = (nn.ReLU, nn.ReLU6, nn.Hardtanh, Clip, QCFS)
        return kind_of(rewriting.net.get_submodule(place(call))) in kinds
    return call.target in RELUS


def softmax(rewriting: Rewriting, call: fx.Node) -> int:
    """Left out at the end: what it is of is what is compared."""
    if any(reader.op != "output" for reader in rewriting.readers(call)):
        raise ConversionError(
            f"{where(call)} is a softmax inside; leave it out: the membrane potential of the "
            "output layer is the logit"
        )
    if call.op == "call_module":
        dim = getattr(rewriting.net.get_submodule(place(call)), "dim", None)
    else:
        dim = settings_of(call, "dim").get("dim")
    if dim is not None and dim % call.meta["value"].dim() == 0:
        raise ConversionError(f"{where(call)} is a softmax over the batch; allowed: dim=1, or none")
    rewriting.left_out.append(call)
    return rewriting.source(call)
