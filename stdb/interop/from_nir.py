"""A door in: a NIR graph that others wrote, as a spiking network.

NIR: Pedersen et al., Nature Communications 2024.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..conversion import spiking_graph
from ..encoding import DirectEncoder, Encoder
from ..graph import INPUT, Node
from ..network import SpikingNetwork
from ..neuron import SpikingNeuron
from ..operators.boundary import Input, Neuron
from ..operators.diagonal import Diagonal
from ..operators.shaping import Flatten, Sum
from ..operators.table import kind_of, operator_for
from ..surrogate import STDB, Surrogate

if TYPE_CHECKING:
    import nir

SAME = 1e-6  # relative; what differs by less is one value


class _NodeError(ValueError):
    """What is wrong with a node; its name is put in front."""


def from_nir(
    graph: "nir.NIRGraph",
    encoder: Encoder = DirectEncoder(),  # noqa: B008 (frozen)
    surrogate: Surrogate = STDB(),  # noqa: B008 (frozen)
    *,
    reset: str | None = None,
    dt: float = 1e-4,
) -> SpikingNetwork:
    r"""The network of a NIR graph, as ``nir.read(path)`` gives one; in evaluation mode.

    It takes Conv2d, Linear, Affine, Scale, AvgPool2d, SumPool2d, Flatten, IF, LIF, graphs in
    graphs, and several edges into one node. An I, or nothing, behind the last weights gives the
    membrane of Eq. 4 as logits; a spiking output layer gives its counts.

    NIR's IF is v ← v + r·I: V = v_threshold/r here. Its LIF at this ``dt``, by forward Euler, is
    v ← (1 − dt/τ)·v + (dt·r/τ)·I: λ = 1 − dt/τ, V = v_threshold·τ/(dt·r). Where V differs from
    channel to channel a scale in front of the neurons makes it one.

    Args:
        graph: the graph.
        encoder: gives each step's input.
        surrogate: for fine-tuning.
        reset: ``"subtract"``: the writer's neurons subtract V at a spike, as ours do. NIR has no
            field for that; files of ``stdb.to_nir`` say it in the neurons' metadata.
        dt: time step in seconds that the writer took for LIF neurons: snnTorch 1e-4, Norse 1e-3.

    Raises:
        ImportError: the package nir is not there.
        ValueError: names the node that there is no neuron or operator for, or that is recurrent; or
            the reset is not known.
    """
    try:
        import nir
    except ImportError as error:
        raise ImportError("stdb.from_nir needs the package nir: pip install nir") from error
    if reset not in (None, "subtract"):
        raise ValueError(f"reset is {reset!r}; allowed: 'subtract', the reset that there is here")
    reader = _Reader(nir, surrogate, reset is not None, dt)
    nodes, edges = dict(_flat(nir, graph, "")), list(_flat_edges(nir, graph, ""))
    below: dict[str, list[str]] = {name: [] for name in nodes}
    for source, target in edges:
        below[target].append(source)
    for name in _in_order(below):
        try:
            reader.add(name, nodes[name], below[name])
        except _NodeError as problem:
            kind = type(nodes[name]).__name__
            raise ValueError(f"node {name} is a {kind}: {problem}") from None
    snn = SpikingNetwork(reader.net, spiking_graph(reader.nodes, reader.end()), encoder)
    snn.has_units = False  # V is what the file says; no weights hold it
    snn.check(values=True)
    return snn.eval()


# -- the graph, without graphs in it ---------------------------------------------------------------


def _flat(nir: Any, graph: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, node in graph.nodes.items():
        if isinstance(node, nir.NIRGraph):
            yield from _flat(nir, node, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", node


def _flat_edges(nir: Any, graph: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for source, target in dict.fromkeys(graph.edges):
        yield (
            f"{prefix}{_end(nir, graph, source, nir.Output)}",
            f"{prefix}{_end(nir, graph, target, nir.Input)}",
        )
    for name, node in graph.nodes.items():
        if isinstance(node, nir.NIRGraph):
            yield from _flat_edges(nir, node, f"{prefix}{name}.")


def _end(nir: Any, graph: Any, name: str, kind: type) -> str:
    """The node that an edge to a graph in the graph leads to."""
    node = graph.nodes[name]
    if not isinstance(node, nir.NIRGraph):
        return name
    inner = next(n for n, other in node.nodes.items() if isinstance(other, kind))
    return f"{name}.{_end(nir, node, inner, kind)}"


def _in_order(below: dict[str, list[str]]) -> list[str]:
    """Each node behind those that it takes."""
    done: dict[str, None] = {}
    while len(done) < len(below):
        ready = [n for n in below if n not in done and all(b in done for b in below[n])]
        if not ready:
            left = ", ".join(n for n in below if n not in done)
            raise ValueError(f"the nodes {left} are recurrent; allowed: a graph without cycles")
        done |= dict.fromkeys(ready)
    return list(done)


# -- node by node ----------------------------------------------------------------------------------


class _Reader:
    """The nodes so far, and the module tree."""

    def __init__(self, nir: Any, surrogate: Surrogate, subtracts: bool, dt: float) -> None:
        self.nir, self.surrogate, self.subtracts, self.dt = nir, surrogate, subtracts, dt
        self.net = nn.Module()
        self.nodes: list[Node] = []
        self.index: dict[str, int] = {}
        self.integrators: set[str] = set()
        self.widths: dict[int, int] = {}  # channels of a neuron's spikes
        self.rules: dict[type, Callable[[str, Any, int], int]] = {
            nir.Output: self.passed,
            nir.Input: self.passed,
            nir.Conv2d: self.convolution,
            nir.Linear: self.linear,
            nir.Affine: self.linear,
            nir.Scale: self.scale,
            nir.AvgPool2d: self.pool,
            nir.SumPool2d: self.pool,
            nir.Flatten: self.flatten,
            nir.IF: self.neuron,
            nir.LIF: self.neuron,
            nir.I: self.integrator,
        }

    def add(self, name: str, node: Any, below: list[str]) -> None:
        """One node of the graph."""
        if not below:
            if not isinstance(node, self.nir.Input) or self.nodes:
                raise _NodeError("nothing leads to it; allowed: one Input, and what it leads to")
            self.nodes.append(Node(INPUT, Input()))
            self.index[name] = 0
            return
        if self.integrators & set(below) and not isinstance(node, self.nir.Output):
            raise _NodeError("an I leads to it; allowed: an I in front of the output alone")
        rule = self.rules.get(type(node))
        if rule is None:
            known = ", ".join(kind.__name__ for kind in self.rules)
            raise _NodeError(f"there is nothing for it here; allowed: {known}")
        sources = tuple(self.index[other] for other in below)
        source = sources[0]
        if len(sources) > 1:
            source = self.put(Node(f"{_own(name)}_sum", Sum(), sources))
        self.index[name] = rule(name, node, source)

    def end(self) -> int:
        """The output; of spiking neurons their counts, through a scale of 1."""
        outputs = [i for i, node in enumerate(self.nodes) if not self._read(i)]
        if len(outputs) != 1:
            raise ValueError(f"the graph has {len(outputs)} outputs; allowed: one")
        (last,) = outputs
        if self.nodes[last].operator.fires:  # their counts are the logits
            scale = Diagonal(self.widths[last], bias=False)
            like = next(self.net.parameters())
            last = self.layer("counts", scale.to(like.device, like.dtype), last)
        return last

    def _read(self, i: int) -> bool:
        return any(i in node.inputs for node in self.nodes)

    def put(self, node: Node) -> int:
        """A node of ours."""
        self.nodes.append(node)
        return len(self.nodes) - 1

    def layer(self, name: str, module: nn.Module, source: int) -> int:
        """A node with a module."""
        own = _own(name)
        self.net.add_module(own, module)
        operator = Neuron() if isinstance(module, SpikingNeuron) else operator_for(kind_of(module))
        assert operator is not None
        return self.put(Node(own, operator, (source,), own))

    def passed(self, _name: str, _node: Any, source: int) -> int:
        """The end of a graph, or of one in it."""
        return source

    def convolution(self, name: str, node: Any, source: int) -> int:
        """Conv2d, a bias of zeros left out."""
        weight = _tensor(node.weight)
        padding = {"valid": 0}.get(node.padding) if isinstance(node.padding, str) else node.padding
        if padding is None:
            raise _NodeError(f"its padding is {node.padding!r}; allowed: numbers")
        module = nn.Conv2d(
            weight.shape[1] * int(node.groups), weight.shape[0], tuple(weight.shape[2:]),  # type: ignore[arg-type]
            _pair(node.stride), _pair(padding), _pair(node.dilation), int(node.groups),
        )  # fmt: skip
        return self.layer(name, _filled(module, weight, node.bias), source)

    def linear(self, name: str, node: Any, source: int) -> int:
        """Linear, or Affine, which has a bias."""
        weight = _tensor(node.weight)
        module = nn.Linear(weight.shape[1], weight.shape[0])
        return self.layer(name, _filled(module, weight, getattr(node, "bias", None)), source)

    def scale(self, name: str, node: Any, source: int) -> int:
        """Scale, by channel."""
        factors = _by_channel(_tensor(node.scale))
        module = Diagonal(len(factors), bias=False)
        module.weight = nn.Parameter(factors)
        return self.layer(name, module, source)

    def pool(self, name: str, node: Any, source: int) -> int:
        """An average, or a sum."""
        total = 1 if isinstance(node, self.nir.SumPool2d) else None
        sizes = _pair(node.kernel_size), _pair(node.stride), _pair(node.padding)
        return self.layer(name, nn.AvgPool2d(*sizes, divisor_override=total), source)

    def flatten(self, name: str, node: Any, source: int) -> int:
        """All but the batch flat."""
        rank = len(next(iter(node.input_type.values())))
        first, last = int(node.start_dim), int(node.end_dim)
        if first not in (0, 1, -rank) or last not in (-1, rank - 1, rank):
            raise _NodeError(f"it flattens dimensions {first} to {last}; allowed: all of an image")
        return self.put(Node(_own(name), Flatten(), (source,)))

    def neuron(self, name: str, node: Any, source: int) -> int:
        """IF or LIF, V by channel made one."""
        metadata = node.metadata or {}
        if metadata.get("reset") != "subtract" and not self.subtracts:
            raise _NodeError(
                "NIR resets it to v_reset, ours subtracts V; allowed: reset='subtract', where the "
                "writer's neurons subtract, too"
            )
        if np.any(np.asarray(getattr(node, "v_leak", 0)) != 0):
            raise _NodeError("it has a v_leak; allowed: 0")
        if np.any(np.asarray(getattr(node, "v_reset", 0)) != 0):
            raise _NodeError("it has a v_reset; allowed: 0")
        gain, leak = _tensor(node.r), 1.0
        if isinstance(node, self.nir.LIF):
            share = self.dt / _tensor(node.tau)
            gain, leak = gain * share, 1 - _one(share, "tau")
        thresholds = _by_channel(_tensor(node.v_threshold) / gain)
        if not 0 < leak <= 1 or not bool((thresholds > 0).all()):
            least = float(thresholds.min())
            raise _NodeError(
                f"λ is {leak:.4g}, V from {least:.4g}; allowed: λ in (0, 1], V above 0; is dt the "
                "writer's?"
            )
        value = float(thresholds[0])
        if float((thresholds - value).abs().max()) > SAME * value:
            module = Diagonal(len(thresholds), bias=False)
            module.weight = nn.Parameter(value / thresholds)
            source = self.layer(f"{name}_scale", module, source)
        neuron = SpikingNeuron(value, leak, self.surrogate).to(dtype=thresholds.dtype)
        neuron.initial_membrane = float(metadata.get("initial_membrane", 0.0))
        place = self.layer(name, neuron, source)
        self.widths[place] = len(_by_channel(_tensor(node.v_threshold)))
        return place

    def integrator(self, name: str, node: Any, source: int) -> int:
        """I, which is the output layer itself."""
        if abs(_one(_tensor(node.r), "r") - 1) > SAME:
            raise _NodeError("its r is not 1; allowed: 1, as the logits' sum has")
        self.integrators.add(name)
        return source


def _own(name: str) -> str:
    """A node's name as that of a module."""
    return name.replace(".", "_")


def _tensor(values: Any) -> Tensor:
    made = torch.as_tensor(np.asarray(values)).clone()
    return made if made.is_floating_point() else made.float()


def _pair(values: Any) -> tuple[int, int]:
    both = np.broadcast_to(np.asarray(values), 2)
    return int(both[0]), int(both[1])


def _one(values: Tensor, what: str) -> float:
    """A value that is the same everywhere."""
    first = float(values.flatten()[0])
    if float((values - first).abs().max()) > SAME * abs(first):
        raise _NodeError(f"its {what} differs from neuron to neuron; allowed: one for the layer")
    return first


def _by_channel(values: Tensor) -> Tensor:
    """(C,) of (C, H, W), (C,) or a number, which has to be the same in each channel."""
    if values.dim() <= 1:
        return values.reshape(-1)
    flat = values.flatten(1)
    if float((flat - flat[:, :1]).abs().max()) > SAME * float(flat.abs().max()):
        raise _NodeError("its values differ from pixel to pixel; allowed: one for each channel")
    return flat[:, 0].clone()


@torch.no_grad()
def _filled(module: Any, weight: Tensor, bias: Any) -> nn.Module:
    """A layer with these weights; without a bias where there is none but zeros."""
    module.weight = nn.Parameter(weight)
    given = None if bias is None else _tensor(bias)
    module.bias = None if given is None or not bool(given.any()) else nn.Parameter(given)
    made: nn.Module = module
    return made
