"""Fixed linear maps: torch's own operations without weights, whose gradients torch knows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.layout import channels_last
from . import Gradient, Operator, Site, Value, dense


class Fixed(Operator):
    """(T, B, C, …) → what the module makes of every step: here copies of values, or fewer of them.

    One whose values are not just copied counts its synapses otherwise.
    """

    owns = True

    def plain(self, module: Any, *inputs: Tensor) -> Tensor:
        """The module itself."""
        y: Tensor = module(inputs[0])
        return y

    def forward(self, site: Site, inputs: Sequence[Value]) -> Value:
        """The module, step by step, in memory of its own."""
        x = dense(inputs[0])
        images = channels_last(site.module(x.flatten(0, 1)))
        if images.untyped_storage()._cdata == x.untyped_storage()._cdata:
            images = images.clone()
        whole: Tensor = images.unflatten(0, x.shape[:2])
        return whole

    def backward_input(
        self, site: Site, grad: Gradient, position: int, shape: torch.Size
    ) -> Gradient:
        """The transposed map of the gradient."""
        grad = dense(grad)
        below = channels_last(transposed(site.module, grad.flatten(0, 1), shape))
        whole: Tensor = below.unflatten(0, grad.shape[:2])
        return whole

    def fan_out(self, module: Any, targets: Tensor, position: int, shape: torch.Size) -> Tensor:
        """A value drives what its copies drive."""
        return transposed(module, targets[None], shape)[0]


class Averaging(Fixed):
    """(T, B, C, …) → weighted means over windows of rows times windows of columns."""

    def fan_out(self, module: Any, targets: Tensor, position: int, shape: torch.Size) -> Tensor:
        """A pixel drives what the windows that hold it drive."""
        return by_windows(module, targets, shape)


def transposed(module: nn.Module, grad: Tensor, shape: torch.Size) -> Tensor:
    """(N, …) ∂L/∂ of a module's result → (N, …) ∂L/∂ of its input, each of this shape."""
    with torch.inference_mode(False), torch.enable_grad():
        x = grad.new_zeros(len(grad), *shape).requires_grad_()
        (below,) = torch.autograd.grad(module(x), x, grad)
    return below


def by_windows(module: nn.Module, targets: Tensor, shape: torch.Size) -> Tensor:
    """(C, …): the sum of the targets of all windows that hold a pixel."""
    for axis in range(1, len(shape)):
        held = _windows(module, shape, axis).to(targets)
        targets = torch.tensordot(targets, held, ([axis], [1])).movedim(-1, axis)
    return targets


def _windows(module: nn.Module, shape: torch.Size, axis: int) -> Tensor:
    """(n, m): which of an axis's n places each of the m windows holds."""
    size = shape[axis]
    spread = [size if k == axis else 1 for k in range(1, len(shape))]
    places = torch.eye(size).view(size, 1, *spread).expand(size, 1, *shape[1:])
    means = module(places)
    for k in reversed(range(1, len(shape))):
        if k != axis:
            means = means.select(k + 1, 0)
    held: Tensor = means[:, 0] > SMALLEST
    return held


SMALLEST = 1e-6  # a share of a mean below it is a rounding of none
