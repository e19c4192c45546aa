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
from .fixed import by_windows

SETTINGS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


class MaxPool(Operator):
    """(T, B, C, H, W) → (T, B, C, h, w), or (T, B, C, L) → (T, B, C, l).

    It has a state, so the presentation runs it.
    """

    name = "max pooling"
    kinds: ClassVar = {nn.MaxPool2d: SETTINGS, nn.MaxPool1d: SETTINGS}
    owns = True
    accumulates = True

    def plain(self, module: Any, *inputs: Tensor) -> Tensor:
        """The module itself: the ANN's maximum."""
        y: Tensor = module(inputs[0])
        return y

    def forward(self, site: Any, inputs: Sequence[Value]) -> Value:
        """Not without what was summed before."""
        raise NotImplementedError("max-pooling needs the sums of the steps before: accumulate()")

    def accumulate(self, module: Any, x: Tensor, total: Tensor) -> Tensor:
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
        self, module: Any, grad: Tensor, x: Tensor, total: Tensor, after: "Carry | None"
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
            _images(change), _images(sums), *_settings(module), _images(places)
        )
        below = spread.view_as(sums).flip(0).cumsum(0).flip(0)
        if after is not None:
            below += after[1]
        return below, (grad[:1].clone(), below[:1].clone())

    def fan_out(self, module: Any, targets: Tensor, position: int, shape: torch.Size) -> Tensor:
        """A pixel drives what the windows that hold it drive."""
        return by_windows(module, targets, shape)


Carry = tuple[Tensor, Tensor]  # ∂L/∂P of the step after; ∂L/∂I of the step after, both (1, B, …)


def _sums(x: Tensor, total: Tensor) -> Tensor:
    return x.cumsum(0).add_(total)


def _maximum(module: Any, sums: Tensor) -> tuple[Tensor, Tensor]:
    values, places = torch.ops.aten.max_pool2d_with_indices(_images(sums), *_settings(module))
    return _steps(values, sums), _steps(places, sums)


def _images(x: Tensor) -> Tensor:
    """(N, C, H, W); a signal is an image of one row."""
    return x.flatten(0, 1) if x.dim() == 5 else x.flatten(0, 1).unsqueeze(-2)


def _steps(images: Tensor, like: Tensor) -> Tensor:
    """(T, B, C, …) of what ``_images`` made of a value like this."""
    return images.reshape(*like.shape[:3], *images.shape[7 - like.dim() :])


def _settings(module: Any) -> tuple[Any, ...]:
    """Those of torch's operation, of rows and columns."""
    if not isinstance(module, nn.MaxPool1d):
        sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
        return (*map(pair, sizes), module.ceil_mode)
    size, stride, padding, dilation = (
        pair(n)[0] for n in (module.kernel_size, module.stride, module.padding, module.dilation)
    )
    return (1, size), (1, stride), (0, padding), (1, dilation), module.ceil_mode
