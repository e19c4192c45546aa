"""Conversion: an ANN's module tree becomes a spiking network, weights where they are.

The tree is traced to the graph of its operators (:mod:`stdb.rewriting`); each ReLU becomes a
spiking neuron. What has no spiking counterpart is refused with the layer's name and what to do
about it.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from .activations import Clip, bound_of
from .checking import check_rewriting
from .encoding import Encoder, limits_of
from .graph import Graph, Node
from .network import SpikingNetwork
from .neuron import SpikingNeuron
from .rewriting import rewrite
from .surrogate import STDB, Surrogate
from .traced import ConversionError
from .tracing import inner, unwrapped
from .units import INPUT, change_unit
from .weights import inner_copies

__all__ = ["ConversionError", "convert"]


def convert(  # noqa: PLR0913 (each with a default, by keyword)
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
    example: Tensor | None = None,
) -> SpikingNetwork:
    """Convert an ANN to a spiking network with all thresholds 1 (paper §2.3, Algorithm 1).

    Args:
        ann: any network of images (B, C, H, W), signals (B, C, L) or vectors (B, n) whose
            operations have a spiking form (docs/networks.md): convolutions and linear layers with
            or without a bias, batch norm, ReLU, average and max-pooling, sums, concatenations, as
            modules or as functions. It is copied, not changed.
        encoder: gives each step's input; ``PoissonEncoder``, ``DirectEncoder``, ``SpikeTrain``. The
            first weights hold its limits, where it has some.
        surrogate: ``STDB``, ``Linear``, ``Exponential`` or ``Rectangle``.
        leak: λ in (0, 1]; 1 gives IF neurons.
        temporal_gradient: see ``SpikingNeuron``.
        learn_thresholds: V of every layer is a parameter that learns.
        learn_leaks: λ of every layer is a parameter that learns.
        chunk: time steps computed at once; None chooses.
        dropout_seed: chooses the dropout masks of training.
        precision: of dense products, see ``SpikingNetwork``.
        example: a batch of images as the network takes them. With it, what torch.fx cannot trace
            is traced by torch.export, and the result is compared with the ANN, layer by layer, in
            float64 (the first four images).

    Raises:
        ConversionError: names every layer that has no spiking counterpart, and the remedy; or the
            first whose value on the example is not the ANN's.
    """
    _check_parameters(ann)
    _check_settings(encoder, surrogate, example)
    ann = inner(ann)
    try:
        net = unwrapped(copy.deepcopy(ann, inner_copies(ann)))
    except Exception as error:
        raise ConversionError(f"the network cannot be copied: {error}") from error
    limits = limits_of(encoder)
    rewriting = rewrite(net, example, limited=limits is not None)
    graph = spiking_graph(rewriting.nodes, rewriting.result)
    parameter = next(ann.parameters())
    for i in graph.neurons:
        activation = net.get_submodule(graph.nodes[i].name)
        bound, levels = bound_of(activation), getattr(activation, "levels", None)
        neuron = SpikingNeuron(1.0, leak, surrogate, temporal_gradient, bound=bound, levels=levels)
        neuron.threshold.requires_grad_(learn_thresholds)
        neuron.leak.requires_grad_(learn_leaks)
        neuron.to(parameter.device, parameter.dtype if parameter.is_floating_point() else None)
        net.set_submodule(graph.nodes[i].name, neuron)
    for name, module in list(net.named_modules(remove_duplicate=False)):
        if isinstance(module, Clip):  # its neurons are elsewhere, and its bound learns no more
            net.set_submodule(name, nn.Identity())
    if limits is not None:
        change_unit(graph, net, INPUT, torch.tensor(limits, dtype=torch.float64))
    _freeze_unused(net, graph)
    snn = SpikingNetwork(net, graph, encoder, chunk, dropout_seed, precision)
    snn.rewrites = tuple(rewriting.rewrites)
    snn.train(ann.training)
    snn.check(values=True)
    if example is not None:
        check_rewriting(ann, example)
    return snn


def _check_parameters(ann: object) -> None:
    """Refuse what cannot be copied or computed with, whatever layer it is of."""
    if not isinstance(ann, nn.Module):
        hint = "; build the network and load the state dict" if isinstance(ann, Mapping) else ""
        raise ConversionError(f"ann is a {type(ann).__name__}; allowed: an nn.Module{hint}")
    for name, module in ann.named_modules():
        called = f"layer {name}" if name else "the network"
        if isinstance(module, torch.jit.ScriptModule):
            raise ConversionError(
                f"{called} is scripted by torch.jit; allowed: the nn.Module that it was made from"
            )
        if type(module) is nn.Module:
            raise ConversionError(
                f"{called} is a bare nn.Module, as those of an exported program are; allowed: the "
                "network that was exported"
            )
    for name, parameter in ann.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ConversionError(f"{name} is uninitialised; call the network on an image first")
        if parameter.is_meta:
            raise ConversionError(f"{name} is on the meta device; load the weights first")
        if parameter.layout != torch.strided:
            raise ConversionError(f"{name} is {parameter.layout}; allowed: dense, to_dense()")


def _check_settings(encoder: object, surrogate: object, example: object) -> None:
    """Refuse what would fail at the first images."""
    if isinstance(encoder, type) or not callable(encoder):
        raise ValueError(
            f"encoder is {encoder!r}; allowed: DirectEncoder(), PoissonEncoder(seed), "
            "SpikeTrain(), or a function of your own"
        )
    if not isinstance(surrogate, Surrogate):
        raise ValueError(
            f"surrogate is {surrogate!r}; allowed: STDB(), Linear(), Exponential(), Rectangle(), "
            "or surrogate_of(name, T)"
        )
    if example is not None and not (isinstance(example, Tensor) and example.dim() and len(example)):
        shape = f" of {tuple(example.shape)}" if isinstance(example, Tensor) else ""
        raise ConversionError(
            f"example is a {type(example).__name__}{shape}; allowed: images as one tensor, a batch"
        )


def _freeze_unused(net: nn.Module, graph: Graph) -> None:
    """What no node computes with learns nothing: norms that were folded, heads that are not read.

    Left to learn, it would keep DistributedDataParallel waiting for a gradient.
    """
    used = {
        id(parameter)
        for node in graph.nodes
        if node.path is not None
        for parameter in net.get_submodule(node.path).parameters()
    }
    for parameter in net.parameters():
        if id(parameter) not in used:
            parameter.requires_grad_(False)


def spiking_graph(nodes: list[Node], result: int | None) -> Graph:
    """The graph of these nodes, the last of which is returned; refused if it is none of an SNN."""
    if not any(node.operator.fires for node in nodes):
        raise ConversionError("the network has no nn.ReLU, so there is nothing to become a neuron")
    if result is None or result != len(nodes) - 1 or _is_end(nodes[result]):
        last = nodes[result].name if result is not None else "nothing"
        raise ConversionError(
            f"the network ends with {last}; allowed: a layer with weights and no ReLU behind it, "
            "since the output layer integrates and does not spike (Eq. 4)"
        )
    graph = Graph(nodes)
    if not any(nodes[i].operator.learns for i in graph.tail):
        raise ConversionError(
            f"the network ends with {nodes[-1].name}; allowed: nn.Linear or nn.Conv2d as output"
        )
    return graph


def _is_end(node: Node) -> bool:
    return node.operator.fires or not node.inputs
