"""Conversion: an ANN's module tree becomes a spiking network, weights where they are.

The tree is traced to the graph of its operators; each ReLU becomes a spiking neuron. What has no
spiking counterpart is refused with the layer's name and what to do about it.
"""

import copy
import operator
from collections import Counter

import torch
import torch.nn.functional as F
from torch import fx, nn

from .architectures import ResidualBlock
from .network import Encoder, SpikingNetwork
from .neuron import SpikingNeuron
from .surrogate import STDB, Surrogate
from .synapse import DROPOUT, INPUT, NEURON, OPERATORS, SUM, Graph, Node


class ConversionError(ValueError):
    """A network that cannot be converted; the message names the layer and the remedy."""


_KINDS: list[tuple[type[nn.Module], str]] = [
    (nn.Conv2d, "convolution"),
    (nn.Linear, "linear"),
    (nn.AvgPool2d, "pool"),
    (nn.Flatten, "flatten"),
    (nn.ReLU, NEURON),
    (nn.Dropout, DROPOUT),
]
_ALLOWED = "Conv2d, Linear, ReLU, AvgPool2d, Dropout, Flatten, Identity and sums of branches"
_NORM = "train without it (stdb.build gives networks that do), or fold it into the weights"
_POOL = "use nn.AvgPool2d and train again"
_NEURON = "use nn.ReLU: the firing rate of an IF neuron approximates that one"
_REMEDIES: list[tuple[type[nn.Module], str]] = [
    (nn.modules.batchnorm._BatchNorm, _NORM),
    (nn.LayerNorm, _NORM),
    (nn.GroupNorm, _NORM),
    (nn.MaxPool2d, _POOL),
    (nn.AdaptiveAvgPool2d, "use nn.AvgPool2d with the kernel size that your image size gives"),
    (nn.AdaptiveMaxPool2d, _POOL),
    (nn.LeakyReLU, _NEURON),
    (nn.GELU, _NEURON),
    (nn.SiLU, _NEURON),
    (nn.Sigmoid, _NEURON),
    (nn.Tanh, _NEURON),
    (nn.Softmax, "leave it out: the membrane potential of the output layer is the logit"),
    (nn.LogSoftmax, "leave it out: the membrane potential of the output layer is the logit"),
    (nn.Dropout2d, "use nn.Dropout"),
]
_FUNCTIONAL_RELU = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_FUNCTIONAL_MODULE = {
    F.max_pool2d: "use an nn.AvgPool2d module and train again",
    F.avg_pool2d: "make it an nn.AvgPool2d module",
    F.dropout: "make it an nn.Dropout module",
    F.adaptive_avg_pool2d: "make it an nn.AvgPool2d module",
    "view": "write torch.flatten(x, 1)",
    "reshape": "write torch.flatten(x, 1)",
    torch.reshape: "write torch.flatten(x, 1)",
}


def convert(
    ann: nn.Module,
    encoder: Encoder,
    surrogate: Surrogate = STDB(),  # noqa: B008 (frozen)
    leak: float = 1.0,
    *,
    temporal_gradient: bool = True,
    learn_thresholds: bool = False,
    learn_leaks: bool = False,
    chunk: int | None = None,
    dropout_seed: int = 0,
    precision: torch.dtype | None = None,
) -> SpikingNetwork:
    """Convert an ANN to a spiking network with all thresholds 1 (paper §2.3, Algorithm 1).

    Args:
        ann: any tree of Conv2d, Linear, ReLU, AvgPool2d, Dropout, Flatten and residual blocks,
            without biases. It is copied, not changed.
        encoder: gives each step's input; ``PoissonEncoder``, ``DirectEncoder``, ``SpikeTrain``.
        surrogate: ``STDB``, ``Linear`` or ``Exponential``.
        leak: λ in (0, 1]; 1 gives IF neurons.
        temporal_gradient: see ``SpikingNeuron``.
        learn_thresholds: V of every layer is a parameter that learns.
        learn_leaks: λ of every layer is a parameter that learns.
        chunk: time steps computed at once; None chooses.
        dropout_seed: chooses the dropout masks of training.
        precision: of dense products, see ``SpikingNetwork``.

    Raises:
        ConversionError: names the layer that has no spiking counterpart, and the remedy.
    """
    net = copy.deepcopy(ann)
    graph = Graph(_trace(net))
    for i in graph.neurons:
        neuron = SpikingNeuron(1.0, leak, surrogate, temporal_gradient)
        neuron.threshold.requires_grad_(learn_thresholds)
        neuron.leak.requires_grad_(learn_leaks)
        net.set_submodule(graph.nodes[i].name, neuron)
    parameter = next(ann.parameters())  # not of net: a neuron's V may come first there
    net.to(device=parameter.device, dtype=parameter.dtype)
    snn = SpikingNetwork(net, graph, encoder, chunk, dropout_seed, precision)
    snn.train(ann.training)
    return snn


def residual_layers(snn: SpikingNetwork) -> set[str]:
    """The spiking layers inside basic blocks, whose thresholds the paper leaves at 1 (§4.2)."""
    blocks = [n for n, module in snn.net.named_modules() if isinstance(module, ResidualBlock)]
    return {
        label
        for i, label in snn.graph.labels.items()
        if any(snn.graph.nodes[i].name.startswith(f"{block}.") for block in blocks)
    }


class _Tracer(fx.Tracer):
    """Traces into user modules; modules of torch.nn are leaves, and so is all that they do."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if isinstance(module, nn.Sequential | ResidualBlock):
            return False
        return module.__module__.startswith("torch.nn") or type(module) in [k for k, _ in _KINDS]


def _trace(net: nn.Module) -> list[Node]:
    """The graph of a module tree, checked; shapes and identities left out."""
    try:
        traced = _Tracer().trace(net)
    except Exception as error:
        raise ConversionError(
            f"the forward method of {type(net).__name__} cannot be traced ({error}); "
            "write it without control flow that depends on the data"
        ) from error
    modules = dict(net.named_modules())
    index: dict[fx.Node, int] = {}
    nodes: list[Node] = []
    result: fx.Node | None = None
    for node in traced.nodes:
        if node.op == "placeholder":
            if nodes:
                raise ConversionError(
                    f"the network has a second input, {node.target}; allowed: one"
                )
            index[node] = len(nodes)
            nodes.append(Node(INPUT, INPUT))
        elif node.op == "output":
            if not isinstance(node.args[0], fx.Node):
                raise ConversionError("the network returns several values; allowed: the logits")
            result = node.args[0]
        elif _is_shape(node):
            continue
        else:
            converted = _node(node, modules, index)
            if isinstance(converted, int):  # an identity
                index[node] = converted
            else:
                index[node] = len(nodes)
                nodes.append(converted)
    _check(nodes, index.get(result) if result is not None else None)
    return nodes


def _is_shape(node: object) -> bool:
    """x.size(0), x.shape and x.shape[0], which people write to flatten a batch."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_method":
        return node.target == "size"
    if node.target is getattr:
        return bool(node.args[1] == "shape")
    return node.target is operator.getitem and _is_shape(node.args[0])


def _is_batch_size(node: object) -> bool:
    """x.size(0), x.size()[0] and x.shape[0]."""
    return _is_shape(node) and node.args[1:] == (0,)  # type: ignore[attr-defined]


def _node(node: fx.Node, modules: dict[str, nn.Module], index: dict[fx.Node, int]) -> Node | int:
    """One traced operation as a Node, or the index of its input if it does nothing."""
    arguments = [*node.args, *node.kwargs.values()]
    sources = tuple(index[a] for a in arguments if isinstance(a, fx.Node) and a in index)
    where = f"{node.target}" if node.op == "call_module" else f"{node.name} (in forward)"
    if node.op == "call_module":
        module = modules[str(node.target)]
        if type(module) is nn.Identity:
            return sources[0]
        for kind_type, kind in _KINDS:
            if type(module) is kind_type:
                _check_module(where, module)
                return Node(str(node.target), kind, sources)
        remedy = next((r for t, r in _REMEDIES if isinstance(module, t)), f"allowed: {_ALLOWED}")
        raise ConversionError(
            f"layer {where} is a {type(module).__name__}, which has no spiking form; {remedy}"
        )
    if node.op == "get_attr":
        raise ConversionError(
            f"layer {where} is a parameter used outside a layer; allowed: {_ALLOWED}"
        )
    if node.target in (operator.add, operator.iadd, torch.add, "add", "add_"):
        if node.kwargs.get("alpha", 1) != 1:
            raise ConversionError(f"{where} adds with alpha; allowed: a plain sum of branches")
        if len(sources) == 2:
            return Node(node.name, SUM, sources)
        raise ConversionError(f"{where} adds a constant, which is a bias; train without it")
    if node.target in (torch.flatten, "flatten"):
        start = node.kwargs.get("start_dim", node.args[1] if len(node.args) > 1 else 0)
        end = node.kwargs.get("end_dim", node.args[2] if len(node.args) > 2 else -1)
        if (start, end) == (1, -1):
            return Node(node.name, "flatten", sources)
        raise ConversionError(
            f"{where} flattens dimensions {start} to {end}; allowed: torch.flatten(x, 1)"
        )
    if (
        node.target in ("view", "reshape")
        and node.args[2:] == (-1,)
        and _is_batch_size(node.args[1])
    ):
        return Node(node.name, "flatten", sources)
    if node.target in _FUNCTIONAL_RELU:
        raise ConversionError(
            f"{where} is a functional relu, which cannot carry a spiking neuron's state; "
            "make it an nn.ReLU module of its own"
        )
    name = getattr(node.target, "__name__", str(node.target))
    remedy = _FUNCTIONAL_MODULE.get(node.target, f"allowed: {_ALLOWED}")  # type: ignore[arg-type]
    raise ConversionError(f"{where} calls {name}, which has no spiking form; {remedy}")


def _check_module(where: str, module: nn.Module) -> None:
    if getattr(module, "bias", None) is not None:
        raise ConversionError(
            f"layer {where} has a bias, which a spike cannot carry; build it with bias=False "
            "and train again"
        )
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros":
            raise ConversionError(
                f"layer {where} pads with {module.padding_mode!r}; allowed: padding_mode='zeros'"
            )
        if isinstance(module.padding, str):
            raise ConversionError(
                f"layer {where} has padding={module.padding!r}; give it as a number of pixels"
            )
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1):
        raise ConversionError(f"layer {where} flattens only some dimensions; allowed: nn.Flatten()")


def _check(nodes: list[Node], result: int | None) -> None:
    repeated = [n for n, c in Counter(x.name for x in nodes if x.kind == NEURON).items() if c > 1]
    if repeated:
        raise ConversionError(
            f"layer {repeated[0]} is called more than once; every ReLU becomes a layer of neurons "
            "with a state of its own: give each place its own nn.ReLU"
        )
    if not any(node.kind == NEURON for node in nodes):
        raise ConversionError("the network has no nn.ReLU, so there is nothing to become a neuron")
    if result is None or result != len(nodes) - 1 or nodes[result].kind in (NEURON, INPUT):
        last = nodes[result].name if result is not None else "nothing"
        raise ConversionError(
            f"the network ends with {last}; allowed: a layer with weights and no ReLU behind it, "
            "since the output layer integrates and does not spike (Eq. 4)"
        )
    graph = Graph(nodes)
    if not any(nodes[i].kind in OPERATORS and OPERATORS[nodes[i].kind].learns for i in graph.tail):
        raise ConversionError(
            f"the network ends with {nodes[-1].name}; allowed: nn.Linear or nn.Conv2d as output"
        )
