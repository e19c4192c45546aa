"""Doors out: a spiking network as a NIR graph, or as one program of plain torch operators.

Neither carries the engine with it: :func:`to_nir` describes the network for simulators and
neuromorphic hardware (NIR: Pedersen et al., Nature Communications 2024), :func:`export_program`
unrolls a fixed T for ``torch.export``, and so for ``torch.compile``, AOTInductor or ONNX.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .encoding import DirectEncoder, PoissonEncoder, SpikeTrain, sample_keys
from .network import SpikingNetwork
from .synapse import DROPOUT, FLATTEN, INPUT, NEURON, SUM, Node

if TYPE_CHECKING:
    import nir

OUTPUT = "logits"


def to_nir(
    snn: SpikingNetwork,
    image_shape: tuple[int, int, int],
    *,
    integrator: bool = True,
    dt: float = 1e-4,
) -> "nir.NIRGraph":
    r"""The network as a NIR graph; ``nir.write(path, graph)`` makes it a file.

    ==========================  =================================================================
    here                        NIR
    ==========================  =================================================================
    convolution                 Conv2d with a bias of zeros
    linear, flatten             Linear; Flatten, whose dimensions count from the end, so that a
                                reader may have a batch dimension or not
    average pooling             AvgPool2d
    neuron with λ = 1           IF, r = 1, v_threshold = V
    neuron with λ < 1           LIF, τ = dt/(1 − λ), r = τ/dt, v_leak = 0: with forward Euler at
                                this ``dt``, v ← λ·v + I, to the rounding of 1 − dt/τ
    sum of branches             several edges into one node
    output layer (Eq. 4)        I, r = 1, behind the last weights
    dropout, encoder            none: dropout is off, and the input is the spike train, one
                                (C, H, W) for each time step
    ==========================  =================================================================

    NIR's neuron differs from Eq. 2 in these points:

    * **Reset.** NIR sets v to ``v_reset`` at a spike. Ours subtracts V, and NIR has no field for
      that: every neuron's metadata say ``reset: subtract``. A reader that resets to zero runs
      another network.
    * **Order.** NIR's equations leave open when a reset happens. Ours comes with the next step and
      after the leak: U_t = λ·U_{t−1} + I_t − V·O_{t−1}. For λ = 1 a
      subtraction at once is the same.
    * **Time.** NIR's is continuous. Here dt·r·I of an IF or I is I: one step adds the weighted
      input once. A spike crosses all layers in the step it was fired in.

    The spike is the same, v > V strictly.

    Args:
        snn: the network, with any encoder.
        image_shape: (C, H, W) of an image.
        integrator: end with I, whose v is U_t, the logits. False ends with the last weights, for
            readers that have no I: the sum of the output over the time steps is U_T.
        dt: time step in seconds that a reader of LIF neurons takes: snnTorch 1e-4, Norse 1e-3.

    Raises:
        ImportError: the package nir is not there.
        ValueError: names the layer that NIR cannot express.
    """
    try:
        import nir
    except ImportError as error:
        raise ImportError("stdb.to_nir needs the package nir: pip install nir") from error
    nodes, shapes = snn.graph.nodes, snn.shapes(image_shape)
    names = _unique_names(nodes)
    graph: dict[str, Any] = {}
    edges: list[tuple[str, str]] = []
    sources: list[list[str]] = []  # of each node: the NIR nodes whose sum its value is
    for i, node in enumerate(nodes):
        below = [name for j in node.inputs for name in sources[j]]
        shape = tuple(shapes[node.inputs[0]]) if node.inputs else tuple(image_shape)
        if node.kind in (SUM, DROPOUT) or (node.kind == FLATTEN and len(shape) == 1):
            sources.append(below)
        else:
            graph[names[i]] = _nir_node(nir, snn, node, shape, dt)
            edges += _edges(below, names[i])
            sources.append([names[i]])
    classes = np.array(shapes[-1])
    if integrator:
        r = np.ones(tuple(shapes[-1]), _array(next(snn.net.parameters())).dtype)
        graph["membrane"] = nir.I(r=r)
        edges += _edges(sources[-1], "membrane")
        sources[-1] = ["membrane"]
    graph[OUTPUT] = nir.Output({"output": classes})
    edges += _edges(sources[-1], OUTPUT)
    return nir.NIRGraph(graph, edges, metadata={"reset": "subtract", "made_by": "stdb"})


def _unique_names(nodes: list[Node]) -> list[str]:
    """Those of the module tree; a layer that is called twice is two nodes."""
    taken = {"membrane", OUTPUT}
    names = []
    for node in nodes:
        name, count = node.name, 1
        while name in taken:
            count += 1
            name = f"{node.name}_{count}"
        taken.add(name)
        names.append(name)
    return names


def _edges(below: list[str], name: str) -> list[tuple[str, str]]:
    if len(set(below)) < len(below):
        raise ValueError(f"{name} adds a value to itself; NIR has one edge from a node to another")
    return [(source, name) for source in below]


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor if tensor.dtype == torch.float64 else tensor.float()).numpy()


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _nir_node(nir: Any, snn: SpikingNetwork, node: Node, shape: tuple[int, ...], dt: float) -> Any:
    """One node; ``shape`` is that of its input."""
    if node.kind == INPUT:
        return nir.Input({"input": np.array(shape)})
    if node.kind == FLATTEN:
        return nir.Flatten({"input": np.array(shape)}, start_dim=-len(shape), end_dim=-1)
    module: Any = snn.net.get_submodule(node.name)
    if node.kind == NEURON:
        v, leak = module.threshold.item(), module.leak.item()
        like = np.ones(shape, _array(module.threshold).dtype)
        metadata = {"reset": "subtract"}
        if leak == 1:
            return nir.IF(r=like, v_threshold=v * like, metadata=metadata)
        tau = dt / (1 - leak)
        return nir.LIF(
            tau=tau * like, r=tau / dt * like, v_leak=0 * like, v_threshold=v * like,
            metadata=metadata,
        )  # fmt: skip
    if node.kind == "pool":
        if module.ceil_mode or module.divisor_override or _pair(module.padding) != (0, 0):
            raise ValueError(
                f"layer {node.name} is {module}; allowed in NIR: no padding, no ceil_mode and no "
                "divisor_override"
            )
        size, stride = _pair(module.kernel_size), _pair(module.stride)
        return nir.AvgPool2d(np.array(size), np.array(stride), np.array([0, 0]))
    if node.kind == "linear":
        if len(shape) != 1:
            raise ValueError(f"layer {node.name} is given {shape}; allowed in NIR: a flat input")
        return nir.Linear(weight=_array(module.weight))
    if module.groups != 1 or module.kernel_size[0] != module.kernel_size[1]:
        raise ValueError(  # nir 1.0 infers wrong shapes for both
            f"layer {node.name} is {module}; allowed in NIR: one group and square kernels"
        )
    return nir.Conv2d(
        input_shape=shape[1:], weight=_array(module.weight), stride=tuple(module.stride),
        padding=tuple(module.padding), dilation=tuple(module.dilation), groups=1,
        bias=np.zeros(module.out_channels, _array(module.weight).dtype),
    )  # fmt: skip


def export_program(
    snn: SpikingNetwork,
    timesteps: int,
    image_shape: tuple[int, int, int],
    *,
    spikes: bool = False,
) -> ExportedProgram:
    """The network at a fixed T as plain torch operators; ``torch.export.save`` makes it a file.

    The loops over time and layers are unrolled. Weights keep their names, V and λ are constants.
    What it takes follows from the network's encoder; the batch size is free everywhere:

    ===================  ===========================================================
    encoder              call, each gives U_T (B, classes)
    ===================  ===========================================================
    ``PoissonEncoder``   ``program.module()(images, sample_ids)``: the generator is in the graph,
                         integer arithmetic, so the spike trains are those of the engine
    ``DirectEncoder``    ``program.module()(images)``
    any, ``spikes``      ``program.module()(train)``, train (T, B, C, H, W)
    ``SpikeTrain``       the same
    ===================  ===========================================================

    Images (B, C, H, W) have to be in [−1, 1], which nothing checks there; sample_ids (B,) int64 are
    those of ``SpikingNetwork.present`` (epoch 0).

    Args:
        snn: the network; dropout is left out, products are in the type of the weights.
        timesteps: T.
        image_shape: (C, H, W) of an image.
        spikes: the program takes a spike train, whatever the encoder.

    Raises:
        ValueError: T below 1, or an encoder of your own without ``spikes``.
    """
    if timesteps < 1:
        raise ValueError(f"timesteps is {timesteps}; allowed: 1 or more")
    weight = next(p for p in snn.net.parameters() if p.dim())
    images = weight.new_zeros(2, *image_shape)  # of a batch of 1 it would take a batch of 1
    batch = Dim("batch")
    arguments: tuple[Tensor, ...] = (images,)
    dynamic: dict[str, Any] = {"x": {0: batch}}
    if spikes or isinstance(snn.encoder, SpikeTrain):
        arguments = (images.expand(timesteps, *images.shape).clone(),)
        dynamic, spikes = {"x": {1: batch}}, True
    elif isinstance(snn.encoder, PoissonEncoder):
        arguments = (images, torch.arange(2, device=images.device))
        dynamic["sample_ids"] = {0: batch}
    elif not isinstance(snn.encoder, DirectEncoder):
        raise ValueError(
            f"the encoder is a {type(snn.encoder).__name__}; allowed: PoissonEncoder, "
            "DirectEncoder, SpikeTrain, or spikes=True"
        )
    program = _Program(snn, timesteps, spikes)
    with torch.no_grad():
        return torch.export.export(program, arguments, dynamic_shapes=dynamic)


class _Program(nn.Module):
    """Algorithm 3 step by step: what the engine computes, for a tracer to read."""

    def __init__(self, snn: SpikingNetwork, timesteps: int, spikes: bool) -> None:
        super().__init__()
        self.net, self.graph = snn.net, snn.graph
        self.timesteps = timesteps
        self.encoder: Any = None if spikes else snn.encoder
        neurons = zip(snn.graph.neurons, snn.neurons.values(), strict=True)
        self.constants = {i: (neuron.threshold.item(), neuron.leak.item()) for i, neuron in neurons}

    def forward(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        """U_T (B, classes) of images (B, C, H, W) or a spike train (T, B, C, H, W)."""
        membrane: dict[int, Tensor] = {}
        fired: dict[int, Tensor] = {}
        values: dict[int, Tensor] = {}
        counts: dict[int, Tensor] = {}
        keys = x if sample_ids is None else sample_keys(sample_ids, 0)
        for t in range(self.timesteps):
            if self.encoder is None:
                values = {0: x[t]}
            elif t == 0 or not isinstance(self.encoder, DirectEncoder):
                values = {0: self.encoder(x, t, t + 1, keys)[0]}
            else:  # what the input alone decides stays as it was
                values = {i: v for i, v in values.items() if not self._depends_on_neurons(i)}
            for i in self.graph.body:
                if i in values:
                    continue
                node = self.graph.nodes[i]
                if node.kind == NEURON:
                    threshold, leak = self.constants[i]
                    u = current = values[node.inputs[0]]
                    if i in membrane:  # in the engine's order, which rounding depends on
                        u = membrane[i] if leak == 1 else membrane[i] * leak
                        u = torch.sub(u, fired[i], alpha=threshold) + current
                    membrane[i], fired[i] = u, (u > threshold).to(u.dtype)
                    values[i] = fired[i]
                else:
                    values[i] = self._operate(node, values)
            for i in self.graph.entries:
                counts[i] = counts[i] + values[i] if i in counts else values[i]
        for i in self.graph.tail:  # linear, so once, of the sum over time (Eq. 4)
            counts[i] = self._operate(self.graph.nodes[i], counts)
        return counts[self.graph.tail[-1]]

    def _depends_on_neurons(self, i: int) -> bool:
        node = self.graph.nodes[i]
        return node.kind == NEURON or any(self._depends_on_neurons(j) for j in node.inputs)

    def _operate(self, node: Node, values: dict[int, Tensor]) -> Tensor:
        """The value of a linear operator's node."""
        first, *others = (values[j] for j in node.inputs)
        if node.kind == SUM:
            return sum(others, first)
        if node.kind == DROPOUT:
            return first
        if node.kind == FLATTEN:
            return first.flatten(1)
        module: Callable[[Tensor], Tensor] = self.net.get_submodule(node.name)
        return module(first)
