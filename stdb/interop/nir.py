"""A door out: a spiking network as a NIR graph, for simulators and neuromorphic hardware.

NIR: Pedersen et al., Nature Communications 2024.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..graph import Node
from ..network import SpikingNetwork
from ..operators import Operator, pair
from ..operators.boundary import Input, Neuron
from ..operators.convolution import Convolution
from ..operators.diagonal import Scale
from ..operators.linear import FullyConnected
from ..operators.pooling import AveragePool
from ..operators.shaping import Dropout, Flatten, Sum
from ..weights import bias_of, weight_of

if TYPE_CHECKING:
    import nir

OUTPUT = "logits"


def to_nir(
    snn: SpikingNetwork,
    image_shape: Sequence[int],
    *,
    integrator: bool = True,
    dt: float = 1e-4,
) -> "nir.NIRGraph":
    r"""The network as a NIR graph; ``nir.write(path, graph)`` makes it a file.

    ==========================  =================================================================
    here                        NIR
    ==========================  =================================================================
    convolution                 Conv2d, Conv1d; with a bias of zeros where it has none
    scale (and shift)           Scale; with a shift a 1×1 Conv2d or an Affine
    linear, flatten             Linear, Affine with a bias; Flatten, whose dimensions count from
                                the end, so that a reader may have a batch dimension or not
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
        image_shape: (C, H, W) of an image, (C, L) of a signal or (n,) of a vector.
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
        made = _nir_node(nir, node, snn.module(i), shape, dt)
        if made is None:
            sources.append(below)
        else:
            graph[names[i]] = made
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


Shape = tuple[int, ...]


def _nir_node(nir: Any, node: Node, module: Any, shape: Shape, dt: float) -> Any:
    """The NIR node of one of ours, None where edges say it all; ``shape`` is that of its input."""
    make = NODES.get(type(node.operator))
    if make is not None:
        return make(nir, node.name, module, shape, dt)
    raise ValueError(f"layer {node.name} is a {node.operator.name}, for which NIR has no node")


def _nothing(nir: Any, name: str, module: Any, shape: Shape, dt: float) -> None:
    return None


def _input(nir: Any, name: str, module: Any, shape: Shape, dt: float) -> Any:
    return nir.Input({"input": np.array(shape)})


def _flatten(nir: Any, name: str, module: Any, shape: Shape, dt: float) -> Any:
    if len(shape) == 1:
        return None
    return nir.Flatten({"input": np.array(shape)}, start_dim=-len(shape), end_dim=-1)


def _neuron(nir: Any, name: str, module: Any, shape: Shape, dt: float) -> Any:
    v, leak = module.threshold.item(), module.leak.item()
    like = np.ones(shape, _array(module.threshold).dtype)
    metadata: dict[str, Any] = {"reset": "subtract"}
    if module.initial_membrane:
        metadata["initial_membrane"] = module.initial_membrane  # U_0/V
    if leak == 1:
        return nir.IF(r=like, v_threshold=v * like, metadata=metadata)
    tau = dt / (1 - leak)
    return nir.LIF(
        tau=tau * like, r=tau / dt * like, v_leak=0 * like, v_threshold=v * like,
        metadata=metadata,
    )  # fmt: skip


def _average_pool(nir: Any, name: str, module: Any, shape: Shape, dt: float) -> Any:
    if module.ceil_mode or module.divisor_override or pair(module.padding) != (0, 0):
        raise ValueError(
            f"layer {name} is {module}; allowed in NIR: no padding, no ceil_mode and no "
            "divisor_override"
        )
    size, stride = pair(module.kernel_size), pair(module.stride)
    return nir.AvgPool2d(np.array(size), np.array(stride), np.array([0, 0]))


def _linear(nir: Any, name: str, module: Any, shape: Shape, dt: float) -> Any:
    bias = bias_of(module)
    if bias is None:
        return nir.Linear(weight=_array(weight_of(module)))
    return nir.Affine(weight=_array(weight_of(module)), bias=_array(bias))


def _convolution(nir: Any, name: str, module: Any, shape: Shape, dt: float) -> Any:
    if module.groups != 1 or len(set(module.kernel_size)) != 1:
        raise ValueError(  # nir 1.0 infers wrong shapes for both
            f"layer {name} is {module}; allowed in NIR: one group and square kernels"
        )
    bias, none = bias_of(module), np.zeros(module.out_channels, _array(weight_of(module)).dtype)
    if len(shape) == 2:  # a signal
        return nir.Conv1d(
            input_shape=shape[1], weight=_array(weight_of(module)), stride=module.stride[0],
            padding=module.padding[0], dilation=module.dilation[0], groups=1,
            bias=none if bias is None else _array(bias),
        )  # fmt: skip
    return nir.Conv2d(
        input_shape=shape[1:], weight=_array(weight_of(module)), stride=tuple(module.stride),
        padding=tuple(module.padding), dilation=tuple(module.dilation), groups=1,
        bias=none if bias is None else _array(bias),
    )  # fmt: skip


def _diagonal(nir: Any, name: str, module: Any, shape: Shape, dt: float) -> Any:
    scale, bias = _array(weight_of(module)), bias_of(module)
    if bias is None:
        by_channel = scale.reshape(-1, *[1] * (len(shape) - 1))
        return nir.Scale(scale=np.broadcast_to(by_channel, shape).copy())
    if len(shape) == 1:
        return nir.Affine(weight=np.diag(scale), bias=_array(bias))
    return nir.Conv2d(
        input_shape=shape[1:], weight=np.diag(scale)[:, :, None, None], stride=(1, 1),
        padding=(0, 0), dilation=(1, 1), groups=1, bias=_array(bias),
    )  # fmt: skip


NODES: dict[type[Operator], Callable[..., Any]] = {
    Input: _input,
    Neuron: _neuron,
    Convolution: _convolution,
    FullyConnected: _linear,
    AveragePool: _average_pool,
    Flatten: _flatten,
    Scale: _diagonal,
    Sum: _nothing,  # several edges into one node
    Dropout: _nothing,
}
