"""Parts of a value, and zeros around it: slices with steps, crops, padding."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Gradient, Operator, Site, Value, dense


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
    """Zeros around a value, as ``F.pad`` has them.

    Args:
        widths: before and after, of the last dimension first: columns, rows, channels.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = tuple(widths)

    def forward(self, x: Tensor) -> Tensor:
        """With zeros around."""
        return F.pad(x, self.widths)

    def extra_repr(self) -> str:
        """Show the widths."""
        return str(self.widths)


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


class Ordering(Operator):
    """(T, B, C, …) → channels in another order, or some of them."""

    name = "channel order"
    kinds: ClassVar = {Channels: ("order",)}
    owns = True

    def plain(self, module: Channels, *inputs: Tensor) -> Tensor:
        """The module itself."""
        y: Tensor = module(inputs[0])
        return y

    def forward(self, site: Site, inputs: Sequence[Value]) -> Value:
        """In that order, in memory of its own."""
        return _laid_out(dense(inputs[0])[:, :, list(site.module.order)])

    def backward_input(
        self, site: Site, grad: Gradient, position: int, shape: torch.Size
    ) -> Gradient:
        """Each channel gets the gradients of its copies."""
        grad = dense(grad)
        order = torch.tensor(site.module.order, device=grad.device)
        whole = grad.new_zeros(*grad.shape[:2], *shape)
        return _laid_out(whole.index_add_(2, order, grad.contiguous()))

    def fan_out(self, module: Any, targets: Tensor, position: int, shape: torch.Size) -> Tensor:
        """A channel drives what its copies drive."""
        order = torch.tensor(module.order, device=targets.device)
        return targets.new_zeros(shape).index_add_(0, order, targets)


class Slicing(Operator):
    """(T, B, C, H, W) → a part of it."""

    name = "slice"
    kinds: ClassVar = {Slice: ("parts",)}
    owns = True

    def plain(self, module: Slice, *inputs: Tensor) -> Tensor:
        """The module itself."""
        y: Tensor = module(inputs[0])
        return y

    def forward(self, site: Site, inputs: Sequence[Value]) -> Value:
        """The part, in memory of its own."""
        return _laid_out(dense(inputs[0])[(slice(None), slice(None), *site.module.slices())])

    def backward_input(
        self, site: Site, grad: Gradient, position: int, shape: torch.Size
    ) -> Gradient:
        """The gradient in the part's place, zero beside it."""
        grad = dense(grad)
        whole = _laid_out(grad.new_zeros(*grad.shape[:2], *shape))
        whole[(slice(None), slice(None), *site.module.slices())] = grad
        return whole

    def fan_out(self, module: Any, targets: Tensor, position: int, shape: torch.Size) -> Tensor:
        """What is beside the part drives nothing."""
        driven = targets.new_zeros(shape)
        driven[module.slices()] = targets
        return driven


class Padding(Operator):
    """(T, B, C, H, W) → the same with zeros around."""

    name = "padding"
    kinds: ClassVar = {Pad: ("widths",)}
    owns = True

    def plain(self, module: Pad, *inputs: Tensor) -> Tensor:
        """The module itself."""
        y: Tensor = module(inputs[0])
        return y

    def forward(self, site: Site, inputs: Sequence[Value]) -> Value:
        """With zeros around."""
        return _laid_out(F.pad(dense(inputs[0]), site.module.widths))

    def backward_input(
        self, site: Site, grad: Gradient, position: int, shape: torch.Size
    ) -> Gradient:
        """Cut off what was added."""
        return _laid_out(F.pad(dense(grad), [-w for w in site.module.widths]))

    def fan_out(self, module: Any, targets: Tensor, position: int, shape: torch.Size) -> Tensor:
        """A pixel drives what its copy drives."""
        return F.pad(targets, [-w for w in module.widths])


def _laid_out(x: Tensor) -> Tensor:
    """Channels last, in memory of its own."""
    if x.dim() != 5:
        return x.clone(memory_format=torch.contiguous_format)
    flat = x.flatten(0, 1)
    if flat.data_ptr() == x.data_ptr():
        flat = flat.clone(memory_format=torch.contiguous_format)
    whole: Tensor = flat.contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
    return whole
