"""A traced network on its way to a graph: what the rules of :mod:`stdb.rewriting` work on."""

import operator as python
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from .graph import Node
from .operators.table import kind_of, operator_for
from .tracing import BATCH, place

SHIFTS = (
    *(python.add, python.iadd, torch.add, "add", "add_"),
    *(python.sub, python.isub, torch.sub, "sub", "sub_"),
)


class ConversionError(ValueError):
    """A network that cannot be converted; the message names the layer and the remedy."""


class Rewrite(NamedTuple):
    """What became of one operation of the ANN: a row of ``SpikingNetwork.rewrites``.

    Attributes:
        layer: its place in the module tree, or the operation and whose forward method has it.
        found: what it was, such as ``BatchNorm2d`` or ``relu``.
        became: the nodes of the graph that stand for it.
    """

    layer: str
    found: str
    became: str


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
        places: the same → from where in that its values are.
        limited: whether the input is encoded as x/u, in units of an encoder's limits.
        padded: id of a convolution → widths and mode of the padding that stands in front of it.
        left_out: a softmax at the end.
        uses: id of a tensor or module → how many operations use it; filled when it is asked for.
        result: the node that is returned.
        rewrites: what became of each operation.
    """

    net: nn.Module
    calls: Sequence[fx.Node]
    nodes: list[Node] = field(default_factory=list)
    index: dict[fx.Node, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    waiting: dict[fx.Node, fx.Node] = field(default_factory=dict)
    places: dict[fx.Node, Any] = field(default_factory=dict)
    limited: bool = False
    padded: dict[int, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    uses: Counter[int] = field(default_factory=Counter)
    left_out: list[fx.Node] = field(default_factory=list)
    result: int | None = None
    rewrites: list[Rewrite] = field(default_factory=list)

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
        return self.index[next(n for n in call.all_input_nodes if n.op != "get_attr")]

    def is_image(self, call: fx.Node) -> bool:
        """Whether a value comes from the image, and is none of the network's own."""
        return call in self.index and call.op != "get_attr"

    @property
    def has_units(self) -> bool:
        """Whether a layer that is called has a bias, or is a batch norm: no network of §2.3's.

        Adding a number is a bias, too.
        """
        called = {place(c) for c in self.calls if c.op == "call_module"}
        modules = [self.net.get_submodule(path) for path in called]
        return (
            any(getattr(module, "bias", None) is not None for module in modules)
            or any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules)
            or any(c.op == "get_attr" and c.meta["value"].dim() == 1 for c in self.calls)
            or any(c.target in SHIFTS and _adds_number(c) for c in self.calls)
        )

    def readers(self, call: fx.Node) -> list[fx.Node]:
        """The operations that take its value, as far as the result depends on them."""
        return [other for other in self.calls if call in other.all_input_nodes]

    def removed(self, kept: Mapping[int, int]) -> None:
        """Keep these nodes alone, each at its new place."""
        nodes = [
            replace(self.nodes[i], inputs=tuple(kept[j] for j in self.nodes[i].inputs))
            for i in kept
        ]
        self.nodes = nodes
        self.index = {call: kept[i] for call, i in self.index.items() if i in kept}

    def own(self, call: fx.Node) -> bool:
        """Whether an operation's weights and bias are used by it alone."""
        if not self.uses:
            for other in self.calls:
                self.uses.update(self._tensors(other))
        return all(self.uses[key] <= 1 for key in self._tensors(call))

    def _tensors(self, call: fx.Node) -> set[int]:
        """The ids of what an operation computes with besides its input."""
        if call.op == "call_module":
            module = self.net.get_submodule(place(call))
            return {id(module), *map(id, module.parameters())}
        given = [node for node in call.all_input_nodes if node.op == "get_attr"]
        paths = [place(node).rpartition(".") for node in given]
        found = (getattr(self.net.get_submodule(path), name, None) for path, _, name in paths)
        return {
            id(tensor) for tensor in found
        }  # the network has none that its forward method makes

    def put(
        self, call: fx.Node, module: nn.Module, inputs: tuple[int, ...], suffix: str = ""
    ) -> Node:
        """A module of our own for an operation, in the tree, under a name that is free."""
        name = call.name.removeprefix("net_") + suffix
        known = dict(self.net.named_modules())
        while name in known or hasattr(self.net, name):
            name += "_"
        self.net.add_module(name, module)
        operator = operator_for(kind_of(module))
        assert operator is not None
        return Node(name, operator, inputs, path=name)

    def note(self, problem: ConversionError) -> None:
        """What has no spiking form, once."""
        if str(problem) not in self.problems:
            self.problems.append(str(problem))

    def refuse(self) -> None:
        """Say all problems at once, where there are any."""
        if len(self.problems) > 1:
            places = "\n".join(f"- {problem}" for problem in self.problems)
            raise ConversionError(f"{len(self.problems)} places have no spiking form:\n{places}")
        if self.problems:
            raise ConversionError(self.problems[0])


def settings_of(call: fx.Node, *names: str) -> dict[str, Any]:
    """What a call is given besides its value, by name: ``names``, in the function's order."""
    settings = dict(zip(names, call.args[1:], strict=False)) | dict(call.kwargs)
    settings.pop("input", None)
    return settings


def where(call: fx.Node) -> str:
    """The operation's name, and whose forward method has it."""
    stack = call.meta.get("nn_module_stack") or {}
    path, kind = next(reversed(stack.values()), ("", None))
    path = str(path).removeprefix("net").removeprefix(".")
    return f"{call.name} (in forward{f' of {path}' if path and kind else ''})"


def shape_of(shape: torch.Size) -> str:
    """A batch's shape, for a message."""
    return f"({', '.join('B' if n == BATCH else str(n) for n in shape)})"


def _adds_number(call: fx.Node) -> bool:
    """Whether an operation has a number other than 0 among what it takes."""
    given = (*call.args[:2], *(v for name, v in call.kwargs.items() if name != "alpha"))
    return any(isinstance(value, int | float) and value != 0 for value in given)
