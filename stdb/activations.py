r"""Activations with a learned bound, for an ANN that is to be converted and run for few steps.

.. math:: u = x/A, \qquad q = \lfloor \mathrm{clamp}(u, 0, 1)\,L + ½ \rfloor / L, \qquad y = A\,q

An IF neuron that starts at U_0 = V/2 with V = A gives the same y after T = L steps, as far as its
input is even in time (QCFS: Bu et al., ICLR 2022). ``Clip`` is y = A·clamp(u, 0, 1), the limit of
many levels. The bound A > 0 is one number a layer and learns. The floor is passed straight through:

=============  ==========  ==========  ==========
               u < 0       0 ≤ u ≤ 1   u > 1
=============  ==========  ==========  ==========
∂y/∂x          0           1           0
∂y/∂A          0           q − u       1
=============  ==========  ==========  ==========
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LEAST = 1e-4  # A where it would be less
USUAL = 3.0  # of values that a batch norm made, one in 700 is above


class _Bounded(torch.autograd.Function):
    """y of x and A, with as many levels, or None for a line without steps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: Tensor, levels: int | None) -> Tensor:
        ctx.save_for_backward(x, bound)
        ctx.levels = levels
        return bounded(x, bound, levels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, bound = ctx.saved_tensors
        u = _ratio(x, bound)
        inside = (u >= 0) & (u <= 1)
        grad_x = grad * inside if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        q = _levelled(u.clamp(0, 1), ctx.levels)
        slope = torch.where(inside, q - u, q)
        return grad_x, slope.mul_(grad).sum().to(bound.dtype), None


def bounded(x: Tensor, bound: Tensor, levels: int | None) -> Tensor:
    """A·⌊clamp(x/A, 0, 1)·L + ½⌋/L without a gradient; A·clamp(x/A, 0, 1) where there are no L."""
    return _levelled(_ratio(x, bound).clamp_(0, 1), levels).mul_(bound).to(x.dtype)


def _ratio(x: Tensor, bound: Tensor) -> Tensor:
    """x/A, in float32 or more: bfloat16 would round it to other levels."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) / bound


def _levelled(clamped: Tensor, levels: int | None) -> Tensor:
    """The nearest of L levels above 0, in place."""
    return clamped if levels is None else clamped.mul_(levels).add_(0.5).floor_().div_(levels)


class Clip(nn.Module):
    """y = clamp(x, 0, A): a ReLU whose bound A learns, one for the layer.

    It is a module for a network of your own; ``stdb.convert`` makes neurons of it that know A
    (``SpikingNeuron.bound``). Any shape; the values have the type of x.

    Args:
        bound: A at the start, above 0; :func:`start_bounds` finds one that fits the images.

    A training loop calls :meth:`constrain` after each step of its optimiser, and leaves A out of
    the weight decay.
    """

    bound: nn.Parameter
    levels: int | None = None

    def __init__(self, bound: float = USUAL) -> None:
        super().__init__()
        if not 0 < bound < float("inf"):
            raise ValueError(f"bound is {bound}; allowed: a number above 0")
        self.bound = nn.Parameter(torch.tensor(float(bound)))

    def forward(self, x: Tensor) -> Tensor:
        """Values between 0 and A."""
        y: Tensor = _Bounded.apply(x, self.bound, self.levels)
        return y

    @torch.no_grad()
    def constrain(self) -> None:
        """Keep A above 0."""
        self.bound.clamp_(min=LEAST)

    def extra_repr(self) -> str:
        """Show A in the module's repr."""
        return f"bound={self.bound.item():.4g}"


class QCFS(Clip):
    """y = A·⌊clamp(x/A, 0, 1)·L + ½⌋/L: a ReLU of L levels above 0, whose bound A learns.

    Few levels are for few steps: L = 4 for T of 1 to 4, L = 8 for T from 8 on.

    Args:
        levels: L, 1 or more.
        bound: as for :class:`Clip`.
    """

    levels: int

    def __init__(self, levels: int, bound: float = USUAL) -> None:
        super().__init__(bound)
        if not isinstance(levels, int) or isinstance(levels, bool) or levels < 1:
            raise ValueError(f"levels is {levels!r}; allowed: a whole number, 1 or more")
        self.levels = levels

    def extra_repr(self) -> str:
        """Show L and A in the module's repr."""
        return f"levels={self.levels}, {super().extra_repr()}"


ACTIVATIONS = ("relu", "clip", "qcfs")


def activation_of(name: str, levels: int | None = None) -> nn.Module:
    """A layer of an activation by its name.

    Args:
        name: of ``ACTIVATIONS``.
        levels: L of ``qcfs``; None for others.

    Raises:
        ValueError: there is no such activation, or it has no levels, or is not told how many.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}; allowed: {', '.join(ACTIVATIONS)}")
    if name == "qcfs":
        if levels is None:
            raise ValueError(
                "levels is None with activation qcfs; allowed: a whole number, 1 or more"
            )
        return QCFS(levels)
    if levels is not None:
        raise ValueError(f"levels is {levels} with activation {name}; allowed: None, or with qcfs")
    return nn.ReLU() if name == "relu" else Clip()


@torch.no_grad()
def start_bounds(
    network: nn.Module, batches: Iterable[Tensor], percentile: float = 99.9
) -> dict[str, float]:
    """Start every A of a network from its first images; returns layer name → A.

    A is the percentile of the layer's input, the mean over the batches, with the bounds below it
    in place. Batch norms normalise by each batch, as in training; their running statistics, and the
    mode of the network, stay as they are. Dropout is left out, so that nothing is random.

    Args:
        network: with ``Clip`` or ``QCFS`` layers; others stay as they are.
        batches: of images, as the network takes them.
        percentile: above 0, at most 100.

    Raises:
        ValueError: there are no images, or what arrives at a layer is no number; names the layer.
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile is {percentile}; allowed: above 0, at most 100")
    layers = {name: m for name, m in network.named_modules() if isinstance(m, Clip)}
    found: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers.values()}

    def look(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        values = inputs[0].float().flatten()
        place = math.ceil(len(values) * percentile / 100)
        value = values.kthvalue(place).values  # what is no number counts as the largest
        if not torch.isfinite(value):
            name = next(name for name, one in layers.items() if one is layer)
            raise ValueError(f"values that arrive at {name} are not finite; allowed: numbers")
        found[layer].append(value)
        layer.bound.copy_(torch.stack(found[layer]).mean().clamp(min=LEAST))  # type: ignore[operator]

    modes = {module: module.training for module in network.modules()}
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    hooks = [layer.register_forward_pre_hook(look) for layer in found]
    try:
        for module in network.modules():
            module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
        for images in batches:
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
        for name, buffer in network.named_buffers():
            buffer.copy_(buffers[name])
    if layers and not any(found.values()):
        raise ValueError("no batches of images; allowed: one or more")
    return {name: float(layer.bound) for name, layer in layers.items()}


def bound_of(activation: nn.Module) -> float | None:
    """The largest value that an activation can have: A, c of ReLU6 and Hardtanh, or None."""
    if isinstance(activation, Clip):
        return float(activation.bound.detach())
    return getattr(activation, "max_val", None)
