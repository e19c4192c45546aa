"""Average pooling: a spike arrives as 1/k² of one."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kernels import PooledGradient
from . import Gradient, Operator, Site, Value, dense, few_events, pair, per_image


class AveragePool(Operator):
    """(T, B, C, H, W) → (T, B, C, H/k, W/k)."""

    name = "average pooling"
    kinds: ClassVar = {
        nn.AvgPool2d: (
            "kernel_size",
            "stride",
            "padding",
            "ceil_mode",
            "count_include_pad",
            "divisor_override",
        )
    }
    owns = True

    def plain(self, module: nn.AvgPool2d, *inputs: Tensor) -> Tensor:
        """The module itself."""
        y: Tensor = module(inputs[0])
        return y

    def forward(self, site: Site, inputs: Sequence[Value]) -> Value:
        """The average: of events where they are few, else dense."""
        few = few_events(inputs[0]) if side_by_side(site.module) else None
        if few is not None:
            return few.pooled(pair(site.module.kernel_size)[0])
        return per_image(site.module, dense(inputs[0]))

    def backward_input(
        self, site: Site, grad: Gradient, position: int, shape: torch.Size
    ) -> Gradient:
        """Spread the gradient evenly over the window; later, where someone does it on the way."""
        module, grad = site.module, dense(grad)
        size = pair(module.kernel_size)[0]
        if side_by_side(module) and shape[1] % size == 0 and shape[2] % size == 0:
            return PooledGradient(grad, size)
        images = grad.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        blank = torch.empty_like(images[:, :, :1, :1]).expand(len(images), *shape)
        grad_x = torch.ops.aten.avg_pool2d_backward(
            images,
            blank,  # only its shape and layout are looked at
            pair(module.kernel_size),
            pair(module.stride),
            pair(module.padding),
            module.ceil_mode,
            module.count_include_pad,
            module.divisor_override,
        )
        spread: Tensor = grad_x.unflatten(0, grad.shape[:2])
        return spread

    def fan_out(self, module: Any, targets: Tensor, position: int, shape: torch.Size) -> Tensor:
        """A pixel drives what its window drives; one outside all windows drives nothing."""
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


class AdaptiveAveragePool(Operator):
    """(T, B, C, H, W) → (T, B, C, h, w): means of windows that cover the image, and may overlap."""

    name = "adaptive average pooling"
    kinds: ClassVar = {nn.AdaptiveAvgPool2d: ("output_size",)}
    owns = True

    def plain(self, module: nn.AdaptiveAvgPool2d, *inputs: Tensor) -> Tensor:
        """The module itself."""
        y: Tensor = module(inputs[0])
        return y

    def forward(self, site: Site, inputs: Sequence[Value]) -> Value:
        """The means."""
        return per_image(site.module, dense(inputs[0]))

    def backward_input(
        self, site: Site, grad: Gradient, position: int, shape: torch.Size
    ) -> Gradient:
        """Spread each mean's gradient evenly over its window."""
        grad = dense(grad)
        images = grad.flatten(0, 1)
        blank = images.new_empty(1).expand(len(images), *shape)  # only its shape is looked at
        spread = torch.ops.aten._adaptive_avg_pool2d_backward(images, blank)
        spread = spread.contiguous(memory_format=torch.channels_last)
        whole: Tensor = spread.unflatten(0, grad.shape[:2])
        return whole

    def fan_out(self, module: Any, targets: Tensor, position: int, shape: torch.Size) -> Tensor:
        """A pixel drives what the windows that hold it drive."""
        rows, columns = (_windows(shape[k], targets.shape[k]).to(targets) for k in (1, 2))
        driven: Tensor = rows.T @ targets @ columns
        return driven


def _windows(size: int, count: int) -> Tensor:
    """(count, size): whether window k of adaptive pooling holds a pixel."""
    pixel = torch.arange(size)
    first = torch.tensor([k * size // count for k in range(count)])
    last = torch.tensor([-(-(k + 1) * size // count) for k in range(count)])
    return (pixel >= first[:, None]) & (pixel < last[:, None])


def side_by_side(module: nn.AvgPool2d) -> bool:
    """Whether its windows are square, do not overlap and leave no gap."""
    size = pair(module.kernel_size)
    plain = size[0] == size[1] and pair(module.stride) == size and not module.ceil_mode
    return plain and pair(module.padding) == (0, 0) and module.divisor_override is None
