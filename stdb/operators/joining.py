"""Branches side by side: a concatenation along the channels."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

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
        return _channels_last(torch.cat(whole, 2))

    def backward_input(
        self, site: Site, grad: Gradient, position: int, shape: torch.Size
    ) -> Gradient:
        """Each branch gets its channels, in memory of its own."""
        first = sum(site.module.channels[:position])
        part = dense(grad).narrow(2, first, site.module.channels[position])
        return _channels_last(part.clone(memory_format=torch.contiguous_format))

    def fan_out(self, module: Any, targets: Tensor, position: int, shape: torch.Size) -> Tensor:
        """The same connections, of the branch's channels."""
        first = sum(module.channels[:position])
        return targets.narrow(0, first, module.channels[position])


def _channels_last(x: Tensor) -> Tensor:
    if x.dim() != 5:
        return x
    flat = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    whole: Tensor = flat.unflatten(0, x.shape[:2])
    return whole
