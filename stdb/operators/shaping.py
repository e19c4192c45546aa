"""Operators without weights that keep or rearrange values: flatten, sum, dropout."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kernels import PooledGradient
from ..spikes import Averages, Spikes
from . import Gradient, Operator, Product, Site, Value, bias_apart, dense, few_events


class Flatten(Operator):
    """(T, B, C, H, W) ↔ (T, B, C·H·W)."""

    name = "flatten"
    lowered = True
    kinds: ClassVar = {nn.Flatten: ("start_dim", "end_dim")}

    def plain(self, module: Any, *inputs: Tensor) -> Tensor:
        """Flatten all but the batch, channels first as torch does."""
        return inputs[0].flatten(1)

    def forward(self, site: Site, inputs: Sequence[Value]) -> Value:
        """Flatten all but time and batch; events get other channels."""
        few = few_events(site, inputs[0])
        return few.flattened() if few is not None else dense(inputs[0]).flatten(2)

    def backward_input(
        self, site: Site, grad: Gradient, position: int, shape: torch.Size
    ) -> Gradient:
        """Restore the shape."""
        grad = dense(grad)
        return grad.reshape(*grad.shape[:2], *shape)

    def fan_out(self, module: Any, targets: Tensor, position: int, shape: torch.Size) -> Tensor:
        """The same connections, in the shape before."""
        return targets.reshape(shape)


class Sum(Operator):
    """The sum of branches, such as a block and its shortcut."""

    name = "sum"
    owns = True
    lowered = True

    def plain(self, module: Any, *inputs: Tensor) -> Tensor:
        """Add them up."""
        first, *others = inputs
        return sum(others, first)

    def forward(self, site: Site, inputs: Sequence[Value]) -> Value:
        """Add them up; biases are added by the neurons."""
        products = [x for x in inputs if isinstance(x, Product)]
        if not products:
            return self.plain(None, *map(dense, inputs))
        biases = [x.bias for x in products if x.bias is not None]
        real = products[0].real
        # what is constant comes first, so that the sum is as long as the longest
        first, *others = sorted((bias_apart(x)[0] for x in inputs), key=len)
        total = first if others[0].dtype == real else first.to(real)
        for other in others:
            total = total + other
        return Product(total, self.plain(None, *biases) if biases else None, real)

    def backward_input(
        self, site: Site, grad: Gradient, position: int, shape: torch.Size
    ) -> Gradient:
        """Each branch gets the gradient, in memory of its own."""
        grad = dense(grad)
        return grad if position == 0 else grad.clone()


class Dropout(Operator):
    """One mask per sample and layer, drawn once per presentation and kept for all t (§2.2).

    Those of ``Dropout1d`` and ``Dropout2d`` are the same for all pixels of a channel.
    """

    name = "dropout"
    lowered = True
    kinds: ClassVar = {nn.Dropout: ("p",), nn.Dropout1d: ("p",), nn.Dropout2d: ("p",)}

    def forward(self, site: Site, inputs: Sequence[Value]) -> Value:
        """Times the mask."""
        x = inputs[0]
        if site.mask is None:
            return x
        few = few_events(site, x)
        if few is not None:
            return few.masked(site.mask)
        if isinstance(x, Spikes):
            x = x.averaged(1) or x
        if isinstance(x, Averages) and x.mask is None:
            return replace(x, mask=site.mask)
        return dense(x) * site.mask

    def backward_input(
        self, site: Site, grad: Gradient, position: int, shape: torch.Size
    ) -> Gradient:
        """Times the mask; a pooled gradient takes it along."""
        if site.mask is None:
            return grad
        if isinstance(grad, Tensor):
            return PooledGradient(grad, 1, site.mask)
        if grad.mask is None:
            return replace(grad, mask=site.mask)
        return grad.dense().mul_(site.mask)
