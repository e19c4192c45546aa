"""Synapses: the linear operators that turn a layer's spikes into the next layer's current.

A network is a graph of nodes: the input, spiking neurons, and linear operators between them, which
are the same at every time step. A node's value has a leading time dimension: (T, B, C, H, W) or
(T, B, n), kept in channels-last order; T = 1 stands for a value that is constant over the chunk.
Each operator knows its product, the gradients of it, and its fan-out; most know the product of a
few events (:mod:`stdb.spikes`) too, for where most values are zero. A dense product is made in the
type of the values it is given, and its result has the type of the weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from .layout import to_layout
from .spikes import DENSITY_LIMITS, Events, Spikes, column_blocks, tap_rows

INPUT, NEURON, DROPOUT, SUM, FLATTEN = "input", "neuron", "dropout", "sum", "flatten"


@dataclass(frozen=True)
class Node:
    """One node: its place in the module tree (or a name of its own), its kind, its sources."""

    name: str
    kind: str
    inputs: tuple[int, ...] = ()


Value = Tensor | Spikes | Events


@dataclass(frozen=True)
class Windows:
    """∂L/∂O (T, B, C, H, W) below an average pooling, not yet spread over the windows; on a CPU.

    Attributes:
        above: ∂L/∂ of the pooled values, (T, B, C, H/size, W/size).
        size: of a window, which fill the image.
        mask: (B, C, H, W) of a dropout between, or None.
    """

    above: Tensor
    size: int
    mask: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the dense form."""
        *rest, height, width = self.above.shape
        return torch.Size((*rest, height * self.size, width * self.size))

    def dense(self) -> Tensor:
        """Spread: every pixel of a window gets 1/size² of its gradient."""
        images = F.interpolate(self.above.flatten(0, 1), scale_factor=self.size) / self.size**2
        grad = images.unflatten(0, self.above.shape[:2])
        return to_layout(grad if self.mask is None else grad * self.mask)


Gradient = Tensor | Windows


def dense(x: Value | Gradient) -> Tensor:
    """A value or gradient as a tensor."""
    return x if isinstance(x, Tensor) else x.dense()


def events(x: Value, purpose: str = "convolution") -> Events | None:
    """A value as events, where there are few enough for the purpose."""
    if isinstance(x, Tensor) or x.density >= DENSITY_LIMITS[purpose]:
        return None
    return x.events if isinstance(x, Spikes) else x


def per_image(operator: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply an operator of (N, …) to (T, B, …); images come out channels-last."""
    y = operator(x.flatten(0, 1))
    if y.dim() == 4:
        y = y.contiguous(memory_format=torch.channels_last)
    return y.unflatten(0, x.shape[:2])


class Convolution:
    """I = W ∗ O."""

    learns = True

    @staticmethod
    def forward(module: nn.Conv2d, x: Tensor) -> Tensor:
        """(T, B, C, H, W) → (T, B, C', H', W')."""
        return per_image(
            lambda n: F.conv2d(
                n.contiguous(memory_format=torch.channels_last),
                module.weight.to(n.dtype),
                None,
                module.stride,
                module.padding,
                module.dilation,
                module.groups,
            ).to(module.weight.dtype),
            x,
        )

    @staticmethod
    def events(module: nn.Conv2d, x: Value) -> Events | None:
        """The input as events, where that is worth it; groups have no kernel."""
        return events(x) if module.groups == 1 else None

    prepare = staticmethod(tap_rows)

    @staticmethod
    def of_events(module: nn.Conv2d, x: Events, prepared: Tensor) -> Tensor:
        """The product, from events; ``prepared`` is what :func:`prepare` made of the weights."""
        return x.convolved(module, prepared)

    @staticmethod
    def backward_input(module: nn.Conv2d, grad: Tensor, shape: torch.Size) -> Tensor:
        """∂L/∂O, given ∂L/∂I; ``shape`` is O's (C, H, W) or (n,)."""
        images = grad.flatten(0, 1)
        x = images.new_empty(1).expand(len(images), *shape)  # only its shape is looked at
        weight = module.weight.to(grad.dtype, memory_format=torch.channels_last)
        grad_x, _ = _convolution_backward(module, images, x, weight, (True, False))
        return grad_x.to(module.weight.dtype).unflatten(0, grad.shape[:2])

    @staticmethod
    def backward_weight(module: nn.Conv2d, grad: Tensor, x: Value, total: Tensor | None) -> Tensor:
        """``total`` (None: nothing yet) + ∂L/∂W summed over time and batch, given ∂L/∂I."""
        few = Convolution.events(module, x)
        if few is not None:
            grad_weight = few.convolved_weight(module, grad.to(module.weight.dtype))
        else:
            images = dense(x).flatten(0, 1).to(grad.dtype, memory_format=torch.channels_last)
            weight = module.weight.to(grad.dtype)
            _, grad_weight = _convolution_backward(
                module, grad.flatten(0, 1), images, weight, (False, True)
            )
            grad_weight = grad_weight.to(module.weight.dtype)
        return grad_weight if total is None else total.add_(grad_weight)

    @staticmethod
    def fan_out(module: nn.Conv2d, targets: Tensor, shape: torch.Size) -> Tensor:
        """How many outputs each input drives: borders and strides make them differ."""
        groups = module.groups  # within one, all inputs drive all outputs
        return conv2d_input(
            (1, groups, *shape[1:]),
            targets.new_ones(groups, 1, *module.kernel_size),
            targets.new_full((1, groups, *targets.shape[1:]), module.out_channels // groups),
            module.stride,
            module.padding,
            module.dilation,
            groups,
        )[0].repeat_interleave(shape[0] // groups, 0)


def _convolution_backward(
    module: nn.Conv2d, grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Those of ∂L/∂O and ∂L/∂W that are wanted, of images (N, …)."""
    return torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        module.stride,
        module.padding,
        module.dilation,
        False,
        [0, 0],
        module.groups,
        [*wanted, False],
    )[:2]


class Dense:
    """I = W·O."""

    learns = True

    @staticmethod
    def forward(module: nn.Linear, x: Tensor) -> Tensor:
        """(T, B, n) → (T, B, m)."""
        return F.linear(x, module.weight.to(x.dtype)).to(module.weight.dtype)

    @staticmethod
    def events(module: nn.Linear, x: Value) -> Events | None:
        """The input as events, where that is worth it."""
        return events(x, "linear")

    prepare = staticmethod(column_blocks)

    @staticmethod
    def of_events(module: nn.Linear, x: Events, prepared: Tensor) -> Tensor:
        """The product, from events; ``prepared`` is what :func:`prepare` made of the weights."""
        return x.multiplied(module, prepared)

    @staticmethod
    def backward_input(module: nn.Linear, grad: Tensor, shape: torch.Size) -> Tensor:
        """∂L/∂O, given ∂L/∂I; ``shape`` is O's (C, H, W) or (n,)."""
        return (grad @ module.weight.to(grad.dtype)).to(module.weight.dtype)

    @staticmethod
    def backward_weight(module: nn.Linear, grad: Tensor, x: Value, total: Tensor | None) -> Tensor:
        """``total`` (None: nothing yet) + ∂L/∂W summed over time and batch, given ∂L/∂I."""
        rows, columns = grad.flatten(0, 1).t(), dense(x).flatten(0, 1).to(grad.dtype)
        if total is not None and total.dtype == grad.dtype:
            return total.addmm_(rows, columns)
        grad_weight = (rows @ columns).to(module.weight.dtype)
        return grad_weight if total is None else total.add_(grad_weight)

    @staticmethod
    def fan_out(module: nn.Linear, targets: Tensor, shape: torch.Size) -> Tensor:
        """Every input drives every output."""
        return targets.new_full(shape, float(module.out_features))


class AveragePool:
    """Average pooling: a spike arrives as 1/k² of one."""

    learns = False

    @staticmethod
    def forward(module: nn.AvgPool2d, x: Tensor) -> Tensor:
        """(T, B, C, H, W) → (T, B, C, H/k, W/k)."""
        return per_image(module, x)

    @staticmethod
    def plain(module: nn.AvgPool2d) -> bool:
        """Square windows side by side."""
        size = _pair(module.kernel_size)
        plain = size[0] == size[1] and _pair(module.stride) == size and not module.ceil_mode
        return plain and _pair(module.padding) == [0, 0] and module.divisor_override is None

    @staticmethod
    def events(module: nn.AvgPool2d, x: Value) -> Events | None:
        """The input as events, where that is worth it."""
        return events(x) if AveragePool.plain(module) else None

    @staticmethod
    def of_events(module: nn.AvgPool2d, x: Events, prepared: None) -> Events:
        """The average, from events."""
        return x.pooled(_pair(module.kernel_size)[0])

    @staticmethod
    def backward_input(module: nn.AvgPool2d, grad: Tensor, shape: torch.Size) -> Gradient:
        """Spread the gradient evenly over the window; later, where someone can do it on the way."""
        size = _pair(module.kernel_size)[0]
        whole = AveragePool.plain(module) and shape[1] % size == 0 and shape[2] % size == 0
        if grad.device.type == "cpu" and whole:
            return Windows(grad, size)
        images = grad.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        blank = torch.empty_like(images[:, :, :1, :1]).expand(len(images), *shape)
        grad_x = torch.ops.aten.avg_pool2d_backward(
            images,
            blank,  # only its shape and layout are looked at
            _pair(module.kernel_size),
            _pair(module.stride),
            _pair(module.padding),
            module.ceil_mode,
            module.count_include_pad,
            module.divisor_override,
        )
        return grad_x.unflatten(0, grad.shape[:2])

    @staticmethod
    def fan_out(module: nn.AvgPool2d, targets: Tensor, shape: torch.Size) -> Tensor:
        """A pixel drives what its window drives; one outside all windows drives nothing."""
        return torch.ops.aten.avg_pool2d_backward(
            targets[None],
            targets.new_zeros(1, *shape),
            _pair(module.kernel_size),
            _pair(module.stride),
            _pair(module.padding),
            module.ceil_mode,
            True,
            1,  # the divisor: sum over the windows, undivided
        )[0]


class Flatten:
    """(T, B, C, H, W) ↔ (T, B, C·H·W)."""

    learns = False

    @staticmethod
    def forward(module: nn.Module | None, x: Tensor) -> Tensor:
        """Flatten all but time and batch, channels first as torch does."""
        return x.flatten(2)

    @staticmethod
    def events(module: nn.Module | None, x: Value) -> Events | None:
        """The input as events, where that is worth it: a linear layer follows."""
        return events(x, "linear")

    @staticmethod
    def of_events(module: nn.Module | None, x: Events, prepared: None) -> Events:
        """The same events under other names."""
        return x.flattened()

    @staticmethod
    def backward_input(module: nn.Module | None, grad: Tensor, shape: torch.Size) -> Tensor:
        """Restore the shape."""
        return grad.reshape(*grad.shape[:2], *shape)

    @staticmethod
    def fan_out(module: nn.Module | None, targets: Tensor, shape: torch.Size) -> Tensor:
        """The same connections, in the shape before."""
        return targets.reshape(shape)


OPERATORS: dict[str, Any] = {
    "convolution": Convolution,
    "linear": Dense,
    "pool": AveragePool,
    FLATTEN: Flatten,
}


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


class Graph:
    """The nodes in the order of a step, and what follows from it.

    The *body* reaches up to the last neurons; the *tail* is the output layer: operators that no
    neuron follows. They are linear and the output only accumulates (Eq. 4), so the tail is applied
    once, to the summed values of its ``entries``.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = list(nodes)
        count = len(self.nodes)
        self.neurons = [i for i, node in enumerate(self.nodes) if node.kind == NEURON]
        self.dropouts = [i for i, node in enumerate(self.nodes) if node.kind == DROPOUT]
        before_neuron = [False] * count
        for i in reversed(range(count)):
            if self.nodes[i].kind == NEURON or before_neuron[i]:
                before_neuron[i] = True
                for j in self.nodes[i].inputs:
                    before_neuron[j] = True
        self.body = [i for i in range(count) if before_neuron[i]]
        self.tail = [i for i in range(count) if not before_neuron[i]]
        in_body = set(self.body)
        self.entries = sorted({j for i in self.tail for j in self.nodes[i].inputs} & in_body)
        self.consumers = [0] * count  # within the body, an entry counting as one more
        self.last_use = list(range(count))
        for i in self.body:
            for j in self.nodes[i].inputs:
                self.consumers[j] += 1
                self.last_use[j] = i
        for i in self.entries:
            self.consumers[i] += 1
        # whether anything learns at or below the node, so that a gradient has to reach it
        self.reaches_weights = [False] * count
        for i, node in enumerate(self.nodes):
            operator = OPERATORS.get(node.kind)
            learns = node.kind == NEURON or (operator is not None and operator.learns)
            self.reaches_weights[i] = learns or any(self.reaches_weights[j] for j in node.inputs)

    def shared(self, i: int) -> bool:
        """Whether someone else reads the memory of a node's value, so that none may write to it."""
        owned = self.nodes[i].kind in (SUM, "convolution", "linear", "pool")
        return not owned or self.consumers[i] > 1

    def label(self, neuron: int) -> str:
        """A spiking layer goes by the name of the weights that drive it, such as ``conv1``."""
        node = self.nodes[neuron]
        while node.inputs:
            node = self.nodes[node.inputs[0]]
            if node.kind in ("convolution", "linear"):
                return node.name
            if node.kind == NEURON:
                break
        return self.nodes[neuron].name

    @property
    def labels(self) -> dict[int, str]:
        """The label of every neuron node, in order."""
        labels = {i: self.label(i) for i in self.neurons}
        unique = len({INPUT, *labels.values()}) == 1 + len(labels)
        return labels if unique else {i: self.nodes[i].name for i in self.neurons}
