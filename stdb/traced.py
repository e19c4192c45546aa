"""A traced network on its way to a graph: what the rules of :mod:`stdb.rewriting` work on."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from .graph import Node
from .operators.table import operator_for
from .tracing import BATCH, place


class ConversionError(ValueError):
    """A network that cannot be converted; the message names the layer and the remedy."""


@dataclass
class Rewriting:
    """A traced network on its way to a graph.

    Attributes:
        net: the network; a rule may put modules into it.
        calls: its operations, in order.
        nodes: those that there are so far, in the order of a step.
        index: traced operation → its node, or the one that it passes on.
        problems: what has no spiking form, a line each.
        waiting: a shape between two others, such as within a channel shuffle → what it is of.
        limited: whether the input is encoded as x/u, in units of an encoder's limits.
        padded: id of a convolution → widths and mode of the padding that stands in front of it.
    """

    net: nn.Module
    calls: Sequence[fx.Node]
    nodes: list[Node] = field(default_factory=list)
    index: dict[fx.Node, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    waiting: dict[fx.Node, fx.Node] = field(default_factory=dict)
    limited: bool = False
    padded: dict[int, tuple[tuple[int, ...], str]] = field(default_factory=dict)

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

    def source(self, call: fx.Node) -> int:
        """The node of the one value that an operation takes."""
        return self.index[call.all_input_nodes[0]]

    def is_image(self, call: fx.Node) -> bool:
        """Whether a value comes from the image, and is none of the network's own."""
        return call in self.index and call.op != "get_attr"

    @property
    def has_units(self) -> bool:
        """Whether a layer that is called has a bias, or is a batch norm: no network of §2.3's."""
        called = {place(c) for c in self.calls if c.op == "call_module"}
        modules = [self.net.get_submodule(path) for path in called]
        return any(getattr(module, "bias", None) is not None for module in modules) or any(
            isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules
        )

    def readers(self, call: fx.Node) -> list[fx.Node]:
        """The operations that take its value, as far as the result depends on them."""
        return [other for other in self.calls if call in other.all_input_nodes]

    def sharing(self, call: fx.Node) -> int:
        """How many calls use the weights of a module's call, its own among them."""
        modules = [self.net.get_submodule(place(c)) for c in self.calls if c.op == "call_module"]
        own = self.net.get_submodule(place(call))
        weight = own._parameters.get("weight")
        return sum(
            m is own or (weight is not None and m._parameters.get("weight") is weight)
            for m in modules
        )

    def put(
        self, call: fx.Node, module: nn.Module, inputs: tuple[int, ...], suffix: str = ""
    ) -> Node:
        """A module of our own for an operation, in the tree, under a name that is free."""
        name = call.name.removeprefix("net_") + suffix
        known = dict(self.net.named_modules())
        while name in known or hasattr(self.net, name):
            name += "_"
        self.net.add_module(name, module)
        operator = operator_for(type(module))
        assert operator is not None
        return Node(name, operator, inputs, path=name)

    def refuse(self) -> None:
        """Say all problems at once, where there are any."""
        if len(self.problems) > 1:
            places = "\n".join(f"- {problem}" for problem in self.problems)
            raise ConversionError(f"{len(self.problems)} places have no spiking form:\n{places}")
        if self.problems:
            raise ConversionError(self.problems[0])


def where(call: fx.Node) -> str:
    """The operation's name, and whose forward method has it."""
    stack = call.meta.get("nn_module_stack") or {}
    path, kind = next(reversed(stack.values()), ("", None))
    path = str(path).removeprefix("net").removeprefix(".")
    return f"{call.name} (in forward{f' of {path}' if path and kind else ''})"


def shape_of(shape: torch.Size) -> str:
    """A batch's shape, for a message."""
    return f"({', '.join('B' if n == BATCH else str(n) for n in shape)})"
