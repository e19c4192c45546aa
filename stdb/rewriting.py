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
from torch import Tensor, fx, nn

from .graph import INPUT, Node
from .operators import Operator
from .operators.boundary import Input
from .operators.shaping import Flatten, Sum
from .operators.table import kind_of, kinds, operator_for
from .tracing import BATCH, TracingError, place, trace


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
    **dict.fromkeys(
        (
            nn.LeakyReLU,
            nn.PReLU,
            nn.RReLU,
            nn.ELU,
            nn.CELU,
            nn.SELU,
            nn.GELU,
            nn.SiLU,
            nn.Mish,
            nn.Hardswish,
            nn.Hardsigmoid,
            nn.Hardtanh,
            nn.ReLU6,
            nn.Softplus,
            nn.Softsign,
            nn.Softshrink,
            nn.Hardshrink,
            nn.Tanhshrink,
            nn.Threshold,
            nn.LogSigmoid,
            nn.Sigmoid,
            nn.Tanh,
        ),
        _NEURON,
    ),
    nn.Softmax: _OUTPUT,
    nn.LogSoftmax: _OUTPUT,
    nn.Dropout2d: "use nn.Dropout",
}
_FLATTEN = "allowed: all but the batch flat, as torch.flatten(x, 1)"
CALL_REMEDIES: dict[Any, str] = {
    F.max_pool2d: "use an nn.AvgPool2d module and train again",
    F.avg_pool2d: "make it an nn.AvgPool2d module",
    F.dropout: "make it an nn.Dropout module",
    F.adaptive_avg_pool2d: "make it an nn.AvgPool2d module",
}


@dataclass
class Rewriting:
    """A traced network on its way to a graph.

    Attributes:
        modules: the network's, by name.
        nodes: those that there are so far, in the order of a step.
        index: traced operation → its node, or the one that it passes on.
        problems: what has no spiking form, a line each.
    """

    modules: Mapping[str, nn.Module]
    nodes: list[Node] = field(default_factory=list)
    index: dict[fx.Node, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

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

    def refuse(self) -> None:
        """Say all problems at once, where there are any."""
        if len(self.problems) > 1:
            places = "\n".join(f"- {problem}" for problem in self.problems)
            raise ConversionError(f"{len(self.problems)} places have no spiking form:\n{places}")
        if self.problems:
            raise ConversionError(self.problems[0])


Rule = Callable[[Rewriting, fx.Node], Node | int]


def rewrite(net: nn.Module, example: Tensor | None = None) -> tuple[list[Node], int | None]:
    """The nodes of a module tree, shapes and identities left out, and which of them is returned.

    Raises:
        ConversionError: names every operation that has no spiking form, and the remedy.
    """
    rewriting = Rewriting(dict(net.named_modules()))
    try:
        calls = trace(net, example)
    except TracingError as error:
        rewriting.problems = [*_refused_modules(net), str(error)]
        rewriting.refuse()
        raise
    result: fx.Node | None = None
    for call in calls:
        if call.op == "placeholder":
            rewriting.add(call, Node(INPUT, Input()))
        elif call.op == "output":
            if not isinstance(call.args[0], fx.Node):
                rewriting.problems.append("the network returns several values; allowed: the logits")
            else:
                result = call.args[0]
        else:
            try:
                rewriting.add(call, _rewrite_call(rewriting, call))
            except ConversionError as error:
                if str(error) not in rewriting.problems:
                    rewriting.problems.append(str(error))
                rewriting.add(call, next(iter(rewriting.sources(call)), 0))
    rewriting.refuse()
    return rewriting.nodes, None if result is None else rewriting.index.get(result)


def _allowed() -> str:
    """What there is a rule for, in a message's words."""
    return f"{', '.join(kind.__name__ for kind in kinds())}, Identity and sums of branches"


def _rewrite_call(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """One traced operation as a node, or the node that it passes on."""
    if call.op == "call_module":
        return _rewrite_module(rewriting, call)
    if call.op == "get_attr":
        raise ConversionError(
            f"{place(call)} is a parameter used outside a layer; allowed: {_allowed()}"
        )
    if call.target in CALLS:
        return CALLS[call.target](rewriting, call)
    name = getattr(call.target, "__name__", str(call.target))
    raise ConversionError(
        f"{_where(call)} calls {name}, which has no spiking form; "
        f"{CALL_REMEDIES.get(call.target, f'allowed: {_allowed()}')}"
    )


def _where(call: fx.Node) -> str:
    """The operation's name, and whose forward method has it."""
    stack = call.meta.get("nn_module_stack") or {}
    path, kind = next(reversed(stack.values()), ("", None))
    path = str(path).removeprefix("net").removeprefix(".")
    return f"{call.name} (in forward{f' of {path}' if path and kind else ''})"


# -- modules ---------------------------------------------------------------------------------------


def _refused_modules(net: nn.Module) -> list[str]:
    """What can be said of a network that cannot be traced: its layers of torch without a rule."""
    problems = []
    for name, module in net.named_modules():
        kind = kind_of(module)
        of_torch = kind.__module__.partition(".")[0] == "torch"
        if of_torch and not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            try:
                _operator_of(name, module)
            except ConversionError as error:
                problems.append(str(error))
    return problems


def _rewrite_module(rewriting: Rewriting, call: fx.Node) -> Node | int:
    name = place(call)
    operator = _operator_of(name, rewriting.modules[name])
    if operator is None:
        return rewriting.sources(call)[0]
    return Node(name, operator, rewriting.sources(call), path=name)


def _operator_of(name: str, module: nn.Module) -> Operator | None:
    """What a module becomes; None where it does nothing."""
    kind = kind_of(module)
    if kind is nn.Identity:
        return None
    operator = operator_for(kind)
    if operator is not None:
        check_module(name, module, operator)
        return operator
    remedy = next(
        (r for t, r in REMEDIES.items() if isinstance(module, t)), f"allowed: {_allowed()}"
    )
    if kind.__module__.startswith("torch.ao."):
        remedy = "convert the network as it was before quantisation"
    of_torch = kind.__module__.startswith("torch.nn.")
    named = kind.__name__ if of_torch else f"{kind.__module__}.{kind.__name__}"
    raise ConversionError(f"layer {name} is a {named}, which has no spiking form; {remedy}")


def check_module(name: str, module: nn.Module, operator: Operator) -> None:
    """Refuse a module that is not the operator's, or holds what a spike cannot carry.

    Raises:
        ConversionError: names the module, and what is allowed.
    """
    if kind_of(module) not in operator.kinds:
        allowed = ", ".join(kind.__name__ for kind in operator.kinds)
        raise ConversionError(
            f"layer {name} is a {type(module).__name__}; allowed in its place: {allowed}"
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
    where, sources = _where(call), rewriting.sources(call)
    if call.kwargs.get("alpha", 1) != 1:
        raise ConversionError(f"{where} adds with alpha; allowed: a plain sum of branches")
    if len(sources) != 2:
        raise ConversionError(f"{where} adds a constant, which is a bias; train without it")
    return Node(call.name, Sum(), sources)


def _reshape(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """Another shape, in any spelling: nothing where it is the same, or all but the batch flat."""
    source = call.all_input_nodes[0]
    before, after = source.meta["value"].shape, call.meta["value"].shape
    if before == after:
        return rewriting.index[source]
    if after == (BATCH, before[1:].numel()):
        return Node(call.name, Flatten(), (rewriting.index[source],))
    raise ConversionError(f"{_where(call)} makes {_images(after)} of {_images(before)}; {_FLATTEN}")


def _images(shape: torch.Size) -> str:
    """A batch's shape, for a message."""
    return f"({', '.join('B' if n == BATCH else str(n) for n in shape)})"


def _relu(_: Rewriting, call: fx.Node) -> Node:
    raise ConversionError(
        f"{_where(call)} is a functional relu, which cannot carry a spiking neuron's "
        "state; make it an nn.ReLU module of its own"
    )


CALLS: dict[Any, Rule] = {
    **dict.fromkeys((python.add, python.iadd, torch.add, "add", "add_"), _add),
    **dict.fromkeys((torch.flatten, "flatten", "view", "reshape", torch.reshape), _reshape),
    **dict.fromkeys((torch.squeeze, "squeeze", "contiguous", "clone"), _reshape),
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), _relu),
}
