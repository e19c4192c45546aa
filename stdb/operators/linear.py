"""Fully connected layers: I = W·O, dense or of events."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..spikes import column_blocks
from . import Gradient, Operator, Site, Value, dense, few_events, operand, with_bias


class FullyConnected(Operator):
    """I = W·O, (T, B, n) → (T, B, m)."""

    name = "linear"
    lowered = True
    product = "linear"
    kinds: ClassVar = {nn.Linear: ("in_features", "out_features")}
    learns = True
    owns = True

    def plain(self, module: nn.Linear, *inputs: Tensor) -> Tensor:
        """The module itself."""
        y: Tensor = module(inputs[0])
        return y

    def forward(self, site: Site, inputs: Sequence[Value]) -> Value:
        """The product: of events where they are few, else dense."""
        module: nn.Linear = site.module
        few = few_events(site, inputs[0])
        if few is not None:
            return with_bias(site, few.multiplied(module, site.prepared(column_blocks)))
        x = operand(site, inputs[0])
        if x.dtype == site.weight.dtype:
            return F.linear(x, site.weight, site.bias)
        return with_bias(site, F.linear(x, site.weight.to(x.dtype)))

    def backward_input(
        self, site: Site, grad: Gradient, position: int, shape: torch.Size
    ) -> Gradient:
        """∂L/∂O, given ∂L/∂I."""
        grad, weight = dense(grad), site.weight
        below: Tensor = grad @ weight.to(grad.dtype)
        return below

    def backward_weight(self, site: Site, grad: Tensor, x: Value, total: Tensor | None) -> Tensor:
        """``total`` + ∂L/∂W."""
        rows, columns = grad.flatten(0, 1).t(), operand(site, x).flatten(0, 1).to(grad.dtype)
        if total is not None and total.dtype == grad.dtype:
            return total.addmm_(rows, columns)
        grad_weight = (rows @ columns).to(site.weight.dtype)
        return grad_weight if total is None else total.add_(grad_weight)

    def fan_out(self, module: Any, targets: Tensor, position: int, shape: torch.Size) -> Tensor:
        """Every input drives every output."""
        return targets.new_full(shape, float(module.out_features))
