"""Branches side by side: a concatenation along the channels."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kernels.layout import to_layout
from . import Gradient, Operator, Site, Value, dense


class Concatenation(nn.Module):
    """The channels of several values behind each other.

    Args:
        channels: of each.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = tuple(channels)

    def forward(self, *values: Tensor) -> Tensor:
        """(B, C₁, …), (B, C₂, …) → (B, C₁ + C₂, …)."""
        return torch.cat(values, 1)

    def extra_repr(self) -> str:
        """Show the channels."""
        return " + ".join(map(str, self.channels))


class Concat(Operator):
    """(T, B, C₁, …), (T, B, C₂, …) → (T, B, C₁ + C₂, …)."""

    name = "concatenation"
    kinds: ClassVar = {Concatenation: ("channels",)}
    owns = True

    def plain(self, module: Concatenation, *inputs: Tensor) -> Tensor:
        """The module itself."""
        y: Tensor = module(*inputs)
        return y

    def forward(self, site: Site, inputs: Sequence[Value]) -> Value:
        """Side by side; a constant beside what is not counts for every step."""
        values = [dense(value) for value in inputs]
        steps = max(len(value) for value in values)
        whole = [value.expand(steps, *value.shape[1:]) for value in values]
        return to_layout(torch.cat(whole, 2))

    def backward_input(
        self, site: Site, grad: Gradient, position: int, shape: torch.Size
    ) -> Gradient:
        """Each branch gets its channels, in memory of its own."""
        first = sum(site.module.channels[:position])
        part = dense(grad).narrow(2, first, site.module.channels[position])
        return to_layout(part)

    def fan_out(self, module: Any, targets: Tensor, position: int, shape: torch.Size) -> Tensor:
        """The same connections, of the branch's channels."""
        first = sum(module.channels[:position])
        return targets.narrow(0, first, module.channels[position])
