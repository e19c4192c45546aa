"""Average pooling: a spike arrives as 1/k² of one."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..kernels import PooledGradient
from ..spikes import Spikes
from . import Gradient, Site, Value, dense, few_events, pair, per_image
from .fixed import Averaging


class AveragePool(Averaging):
    """(T, B, C, H, W) → (T, B, C, H/k, W/k)."""

    name = "average pooling"
    lowered = True
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

    def forward(self, site: Site, inputs: Sequence[Value]) -> Value:
        """The average: of events where they are few, else dense."""
        x, size = inputs[0], pair(site.module.kernel_size)[0]
        if side_by_side(site.module):
            few = few_events(site, x)
            if few is not None:
                return few.pooled(size)
            averages = x.averaged(size) if isinstance(x, Spikes) else None
            if averages is not None:
                return averages
        return per_image(site.module, dense(x))

    def backward_input(
        self, site: Site, grad: Gradient, position: int, shape: torch.Size
    ) -> Gradient:
        """Spread the gradient evenly over the window; later, where someone does it on the way."""
        module, grad = site.module, dense(grad)
        size = pair(module.kernel_size)[0]
        if side_by_side(module) and shape[1] % size == 0 and shape[2] % size == 0:
            return PooledGradient(grad, size)
        images = grad.to(torch.promote_types(grad.dtype, torch.float32)).flatten(0, 1)
        images = images.contiguous(memory_format=torch.channels_last)
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


class AdaptiveAveragePool(Averaging):
    """(T, B, C, H, W) → (T, B, C, h, w): means of windows that cover the image, and may overlap."""

    name = "adaptive average pooling"
    kinds: ClassVar = {
        nn.AdaptiveAvgPool2d: ("output_size",),
        nn.AdaptiveAvgPool1d: ("output_size",),
    }


class SignalAveragePool(Averaging):
    """(T, B, C, L) → (T, B, C, l)."""

    name = "average pooling of a signal"
    kinds: ClassVar = {
        nn.AvgPool1d: ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
    }


def side_by_side(module: nn.AvgPool2d) -> bool:
    """Whether its windows are square, do not overlap and leave no gap."""
    size = pair(module.kernel_size)
    plain = size[0] == size[1] and pair(module.stride) == size and not module.ceil_mode
    return plain and pair(module.padding) == (0, 0) and module.divisor_override is None
