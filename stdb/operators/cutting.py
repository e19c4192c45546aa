"""Parts of a value, and what is put around it: slices with steps, crops, padding."""

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from .fixed import Fixed


class Slice(nn.Module):
    """x[:, channels, rows, columns].

    Args:
        parts: (start, stop, step) of each dimension behind the batch, as Python has them, step ≥ 1;
            None for what is left to the image.
    """

    def __init__(self, parts: Sequence[Sequence[int | None]]) -> None:
        super().__init__()
        self.parts = tuple(tuple(part) for part in parts)

    def slices(self) -> tuple[slice, ...]:
        """One of each dimension."""
        return tuple(slice(*part) for part in self.parts)

    def forward(self, x: Tensor) -> Tensor:
        """The part."""
        return x[(slice(None), *self.slices())]

    def extra_repr(self) -> str:
        """Show it as one would write it."""
        return str(self.parts)


class Pad(nn.Module):
    """Zeros around a value, or copies of its own, as ``F.pad`` has them.

    Args:
        widths: before and after, of the last dimension first: columns, rows, channels.
        mode: ``constant``, which is zeros, ``reflect``, ``replicate`` or ``circular``.
    """

    def __init__(self, widths: Sequence[int], mode: str = "constant") -> None:
        super().__init__()
        self.widths, self.mode = tuple(widths), mode

    def forward(self, x: Tensor) -> Tensor:
        """With that around."""
        return F.pad(x, self.widths, self.mode)

    def extra_repr(self) -> str:
        """Show the widths and the mode."""
        return f"{self.widths}, {self.mode}"


class Channels(nn.Module):
    """Channels in another order, or some of them.

    Args:
        order: of each that there is afterwards, which it was.
    """

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        self.order = tuple(order)

    def forward(self, x: Tensor) -> Tensor:
        """In that order."""
        return x[:, list(self.order)]

    def extra_repr(self) -> str:
        """Show how many."""
        return f"{len(self.order)} channels"


class Ordering(Fixed):
    """(T, B, C, …) → channels in another order, or some of them."""

    name = "channel order"
    kinds: ClassVar = {Channels: ("order",)}


class Slicing(Fixed):
    """(T, B, C, …) → a part of it."""

    name = "slice"
    kinds: ClassVar = {Slice: ("parts",)}


class Padding(Fixed):
    """(T, B, C, …) → the same with something around."""

    name = "padding"
    kinds: ClassVar = {Pad: ("widths", "mode")}
