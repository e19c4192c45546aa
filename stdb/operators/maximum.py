"""Max-pooling of what neurons have been given so far: the only operator that remembers.

Spikes must not be max-pooled: any neuron that fires at all would win each step. Pooled are the
currents summed over time, S_t = Σ_{s≤t} I_s, and what goes on is the change of the maximum:

    P_t = max_window S_t − max_window S_{t−1}

so that Σ_t P_t is the maximum of the whole sums, as the ANN has it.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import Operator, Value, pair


class MaxPool(Operator):
    """(T, B, C, H, W) → (T, B, C, h, w). It has a state, so the presentation runs it."""

    name = "max pooling"
    kinds: ClassVar = {nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode")}
    owns = True
    accumulates = True

    def plain(self, module: nn.MaxPool2d, *inputs: Tensor) -> Tensor:
        """The module itself: the ANN's maximum."""
        y: Tensor = module(inputs[0])
        return y

    def forward(self, site: Any, inputs: Sequence[Value]) -> Value:
        """Not without what was summed before."""
        raise NotImplementedError("max-pooling needs the sums of the steps before: accumulate()")

    def accumulate(self, module: nn.MaxPool2d, x: Tensor, total: Tensor) -> Tensor:
        """P_t over a chunk.

        Args:
            module: the pooling.
            x: I_t, (T, B, C, H, W).
            total: S before the chunk, (B, C, H, W); becomes S at its end.
        """
        sums = _sums(x, total)
        before, _ = _maximum(module, total[None])
        maxima, _ = _maximum(module, sums)
        total.copy_(sums[-1])
        return torch.cat([maxima[:1] - before, maxima[1:] - maxima[:-1]])

    def backpropagate(
        self, module: nn.MaxPool2d, grad: Tensor, x: Tensor, total: Tensor, after: "Carry | None"
    ) -> tuple[Tensor, "Carry"]:
        """∂L/∂I_s = Σ_{t≥s} h_t, h_t = ∂L/∂P_t − ∂L/∂P_{t+1} at the place of S_t's maximum.

        Args:
            module: the pooling.
            grad: ∂L/∂P_t of the chunk, (T, B, C, h, w).
            x: I_t of the chunk.
            total: S before the chunk.
            after: what the chunk after it gave; None at the end of what is differentiated.

        Returns:
            The gradient, and what the chunk before it needs.
        """
        _, places = _maximum(module, sums := _sums(x, total))
        following = torch.zeros_like(grad[:1]) if after is None else after[0]
        change = grad - torch.cat([grad[1:], following])
        spread = torch.ops.aten.max_pool2d_with_indices_backward(
            change.flatten(0, 1), sums.flatten(0, 1), *_settings(module), places.flatten(0, 1)
        ).unflatten(0, grad.shape[:2])
        below = spread.flip(0).cumsum(0).flip(0)
        if after is not None:
            below += after[1]
        return below, (grad[:1].clone(), below[:1].clone())

    def fan_out(self, module: Any, targets: Tensor, position: int, shape: torch.Size) -> Tensor:
        """A pixel drives what the windows that hold it drive."""
        driven: Tensor = torch.ops.aten.avg_pool2d_backward(
            targets[None],
            targets.new_zeros(1, *shape),
            pair(module.kernel_size),
            pair(module.stride),
            pair(module.padding),
            module.ceil_mode,
            True,
            1,  # the divisor: sum over the windows, undivided
        )[0]
        return driven


Carry = tuple[Tensor, Tensor]  # ∂L/∂P of the step after; ∂L/∂I of the step after, both (1, B, …)


def _sums(x: Tensor, total: Tensor) -> Tensor:
    return x.cumsum(0).add_(total)


def _maximum(module: nn.MaxPool2d, sums: Tensor) -> tuple[Tensor, Tensor]:
    values, places = torch.ops.aten.max_pool2d_with_indices(sums.flatten(0, 1), *_settings(module))
    return values.unflatten(0, sums.shape[:2]), places.unflatten(0, sums.shape[:2])


def _settings(module: nn.MaxPool2d) -> tuple[Any, ...]:
    size = (pair(module.kernel_size), pair(module.stride), pair(module.padding))
    return (*size, pair(module.dilation), module.ceil_mode)
