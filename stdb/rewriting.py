"""What becomes of each operation of a traced ANN: an operator of the graph, nothing, or a refusal.

Modules are looked up in the table of operators, calls in ``CALLS``; what neither has is refused
with the layer's name and the remedy of ``REMEDIES`` or ``CALL_REMEDIES``.
"""

import operator as python
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from .graph import INPUT, Node, Tracer
from .operators import Operator
from .operators.boundary import Input
from .operators.shaping import Flatten, Sum
from .operators.table import kinds, operator_for


class ConversionError(ValueError):
    """A network that cannot be converted; the message names the layer and the remedy."""


_NORM = "train without it (stdb.build gives networks that do), or fold it into the weights"
_POOL = "use nn.AvgPool2d and train again"
_NEURON = "use nn.ReLU: the firing rate of an IF neuron approximates that one"
_OUTPUT = "leave it out: the membrane potential of the output layer is the logit"
REMEDIES: dict[type[nn.Module], str] = {
    nn.modules.batchnorm._BatchNorm: _NORM,
    nn.LayerNorm: _NORM,
    nn.GroupNorm: _NORM,
    nn.MaxPool2d: _POOL,
    nn.AdaptiveAvgPool2d: "use nn.AvgPool2d with the kernel size that your image size gives",
    nn.AdaptiveMaxPool2d: _POOL,
    nn.LeakyReLU: _NEURON,
    nn.GELU: _NEURON,
    nn.SiLU: _NEURON,
    nn.Sigmoid: _NEURON,
    nn.Tanh: _NEURON,
    nn.Softmax: _OUTPUT,
    nn.LogSoftmax: _OUTPUT,
    nn.Dropout2d: "use nn.Dropout",
}
_FLATTEN = "write torch.flatten(x, 1)"
CALL_REMEDIES: dict[Any, str] = {
    F.max_pool2d: "use an nn.AvgPool2d module and train again",
    F.avg_pool2d: "make it an nn.AvgPool2d module",
    F.dropout: "make it an nn.Dropout module",
    F.adaptive_avg_pool2d: "make it an nn.AvgPool2d module",
    "view": _FLATTEN,
    "reshape": _FLATTEN,
    torch.reshape: _FLATTEN,
}


@dataclass
class Rewriting:
    """A traced network on its way to a graph.

    Attributes:
        modules: the network's, by name.
        nodes: those that there are so far, in the order of a step.
        index: traced operation → its node, or the one that it passes on.
    """

    modules: Mapping[str, nn.Module]
    nodes: list[Node] = field(default_factory=list)
    index: dict[fx.Node, int] = field(default_factory=dict)

    def sources(self, call: fx.Node) -> tuple[int, ...]:
        """The nodes whose values an operation takes."""
        arguments = [*call.args, *call.kwargs.values()]
        return tuple(self.index[a] for a in arguments if isinstance(a, fx.Node) and a in self.index)

    def add(self, call: fx.Node, node: Node | int) -> None:
        """A new node for an operation, or the node that it passes on."""
        if isinstance(node, int):
            self.index[call] = node
        else:
            self.index[call] = len(self.nodes)
            self.nodes.append(node)


Rule = Callable[[Rewriting, fx.Node], Node | int]


def rewrite(net: nn.Module) -> tuple[list[Node], int | None]:
    """The nodes of a module tree, shapes and identities left out, and which of them is returned.

    Raises:
        ConversionError: names an operation that has no spiking form, and the remedy.
    """
    try:
        traced = Tracer(kinds()).trace(net)
    except Exception as error:
        raise ConversionError(
            f"the forward method of {type(net).__name__} cannot be traced ({error}); "
            "write it without control flow that depends on the data"
        ) from error
    rewriting = Rewriting(dict(net.named_modules()))
    result: fx.Node | None = None
    for call in traced.nodes:
        if call.op == "placeholder":
            if rewriting.nodes:
                raise ConversionError(
                    f"the network has a second input, {call.target}; allowed: one"
                )
            rewriting.add(call, Node(INPUT, Input()))
        elif call.op == "output":
            if not isinstance(call.args[0], fx.Node):
                raise ConversionError("the network returns several values; allowed: the logits")
            result = call.args[0]
        elif not _is_shape(call):
            rewriting.add(call, _rewrite_call(rewriting, call))
    return rewriting.nodes, None if result is None else rewriting.index.get(result)


def _allowed() -> str:
    """What there is a rule for, in a message's words."""
    return f"{', '.join(kind.__name__ for kind in kinds())}, Identity and sums of branches"


def _rewrite_call(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """One traced operation as a node, or the node that it passes on."""
    if call.op == "call_module":
        return _rewrite_module(rewriting, call)
    where = f"{call.name} (in forward)"
    if call.op == "get_attr":
        raise ConversionError(
            f"layer {where} is a parameter used outside a layer; allowed: {_allowed()}"
        )
    if call.target in CALLS:
        return CALLS[call.target](rewriting, call)
    name = getattr(call.target, "__name__", str(call.target))
    raise ConversionError(
        f"{where} calls {name}, which has no spiking form; "
        f"{CALL_REMEDIES.get(call.target, f'allowed: {_allowed()}')}"
    )


# -- modules ---------------------------------------------------------------------------------------


def _rewrite_module(rewriting: Rewriting, call: fx.Node) -> Node | int:
    name = str(call.target)
    module = rewriting.modules[name]
    kind = type_before_parametrizations(module)
    if kind is nn.Identity:
        return rewriting.sources(call)[0]
    operator = operator_for(kind)
    if operator is not None:
        check_module(name, module, operator)
        return Node(name, operator, rewriting.sources(call), path=name)
    remedy = next(
        (r for t, r in REMEDIES.items() if isinstance(module, t)), f"allowed: {_allowed()}"
    )
    if kind.__module__.startswith("torch.ao."):
        remedy = "convert the network as it was before quantisation"
    named = (
        kind.__name__
        if kind.__module__.startswith("torch.nn.")
        else f"{kind.__module__}.{kind.__name__}"
    )
    raise ConversionError(f"layer {name} is a {named}, which has no spiking form; {remedy}")


def check_module(name: str, module: nn.Module, operator: Operator) -> None:
    """Refuse a module that is not the operator's, or holds what a spike cannot carry.

    Raises:
        ConversionError: names the module, and what is allowed.
    """
    if type_before_parametrizations(module) not in operator.kinds:
        allowed = ", ".join(kind.__name__ for kind in operator.kinds)
        raise ConversionError(
            f"layer {name} is a {type(module).__name__}; allowed in its place: {allowed}"
        )
    if getattr(module, "bias", None) is not None:
        raise ConversionError(
            f"layer {name} has a bias, which a spike cannot carry; build it with bias=False "
            "and train again"
        )
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros":
            raise ConversionError(
                f"layer {name} pads with {module.padding_mode!r}; allowed: padding_mode='zeros'"
            )
        if isinstance(module.padding, str):
            raise ConversionError(
                f"layer {name} has padding={module.padding!r}; give it as a number of pixels"
            )
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1):
        raise ConversionError(f"layer {name} flattens only some dimensions; allowed: nn.Flatten()")


# -- calls -----------------------------------------------------------------------------------------


def _add(rewriting: Rewriting, call: fx.Node) -> Node:
    """A sum of branches."""
    where, sources = f"{call.name} (in forward)", rewriting.sources(call)
    if call.kwargs.get("alpha", 1) != 1:
        raise ConversionError(f"{where} adds with alpha; allowed: a plain sum of branches")
    if len(sources) != 2:
        raise ConversionError(f"{where} adds a constant, which is a bias; train without it")
    return Node(call.name, Sum(), sources)


def _flatten(rewriting: Rewriting, call: fx.Node) -> Node:
    """torch.flatten(x, 1)."""
    start = call.kwargs.get("start_dim", call.args[1] if len(call.args) > 1 else 0)
    end = call.kwargs.get("end_dim", call.args[2] if len(call.args) > 2 else -1)
    if (start, end) != (1, -1):
        raise ConversionError(
            f"{call.name} (in forward) flattens dimensions {start} to {end}; "
            "allowed: torch.flatten(x, 1)"
        )
    return Node(call.name, Flatten(), rewriting.sources(call))


def _view(rewriting: Rewriting, call: fx.Node) -> Node:
    """x.view(x.size(0), -1), which flattens."""
    if call.args[2:] != (-1,) or not _is_batch_size(call.args[1]):
        raise ConversionError(
            f"{call.name} (in forward) calls {call.target}, which has no spiking form; "
            f"{CALL_REMEDIES[call.target]}"
        )
    return Node(call.name, Flatten(), rewriting.sources(call))


def _relu(_: Rewriting, call: fx.Node) -> Node:
    raise ConversionError(
        f"{call.name} (in forward) is a functional relu, which cannot carry a spiking neuron's "
        "state; make it an nn.ReLU module of its own"
    )


CALLS: dict[Any, Rule] = {
    **dict.fromkeys((python.add, python.iadd, torch.add, "add", "add_"), _add),
    **dict.fromkeys((torch.flatten, "flatten"), _flatten),
    **dict.fromkeys(("view", "reshape"), _view),
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), _relu),
}


def _is_shape(node: object) -> bool:
    """x.size(0), x.shape and x.shape[0], which people write to flatten a batch."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_method":
        return node.target == "size"
    if node.target is getattr:
        return bool(node.args[1] == "shape")
    return node.target is python.getitem and _is_shape(node.args[0])


def _is_batch_size(node: object) -> bool:
    """x.size(0), x.size()[0] and x.shape[0]."""
    return isinstance(node, fx.Node) and _is_shape(node) and node.args[1:] == (0,)
