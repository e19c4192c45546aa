"""A scale and a shift for each channel: what becomes of a batch norm that folds into nothing."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..spikes import Spikes
from . import Gradient, Operator, Site, Value, add_bias, dense


class Diagonal(nn.Module):
    """w[c]·x + b[c], for (B, C, …).

    Args:
        channels: C.
        bias: whether there is a shift b.
    """

    def __init__(self, channels: int, bias: bool = True) -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift."""
        y = x * _by_channel(self.weight, x.dim() - 2)
        return y if self.bias is None else y + _by_channel(self.bias, x.dim() - 2)

    def extra_repr(self) -> str:
        """Show C, and whether there is a shift."""
        return f"{self.channels}, bias={self.bias is not None}"


class Scale(Operator):
    """I = w[c]·O[c] + b[c], (T, B, C, …) → the same."""

    name = "diagonal"
    kinds: ClassVar = {Diagonal: ("channels",)}
    learns = True
    owns = True

    def plain(self, module: Diagonal, *inputs: Tensor) -> Tensor:
        """The module itself."""
        y: Tensor = module(inputs[0])
        return y

    def forward(self, site: Site, inputs: Sequence[Value]) -> Value:
        """Scale, and add what is added at every step."""
        x = _exact(inputs[0])
        return add_bias(x * _by_channel(site.weight, x.dim() - 3), site.bias)

    def backward_input(
        self, site: Site, grad: Gradient, position: int, shape: torch.Size
    ) -> Gradient:
        """Scale the gradient."""
        grad = dense(grad)
        below: Tensor = grad * _by_channel(site.weight, grad.dim() - 3)
        return below.to(site.weight.dtype)

    def backward_weight(self, site: Site, grad: Tensor, x: Value, total: Tensor | None) -> Tensor:
        """``total`` + Σ ∂L/∂I·O of each channel."""
        product = grad.to(site.weight.dtype) * _exact(x)
        own = product.sum([d for d in range(product.dim()) if d != 2])
        return own if total is None else total.add_(own)

    def fan_out(self, module: Any, targets: Tensor, position: int, shape: torch.Size) -> Tensor:
        """The same connections."""
        return targets


def _exact(x: Value) -> Tensor:
    """A value as a tensor of any type that has it exactly; a product with w is of w's type."""
    return x.numbers() if isinstance(x, Spikes) else dense(x)


def _by_channel(values: Tensor, after: int) -> Tensor:
    """(C,) as (C, 1, …), for ``after`` dimensions behind the channels."""
    return values.view(-1, *[1] * after)
