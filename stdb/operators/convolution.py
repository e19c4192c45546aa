"""Convolutions: I = W ∗ O, dense or of events."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from ..spikes import Events, tap_rows
from . import Gradient, Operator, Site, Value, add_bias, dense, few_events, per_image


class Convolution(Operator):
    """I = W ∗ O, (T, B, C, H, W) → (T, B, C', H', W').

    A dense product is made in the type of the values that it is given; its result has the type of
    the weights.
    """

    name = "convolution"
    kinds: ClassVar = {
        nn.Conv2d: (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
        )
    }
    learns = True
    owns = True

    def plain(self, module: nn.Conv2d, *inputs: Tensor) -> Tensor:
        """The module itself."""
        y: Tensor = module(inputs[0])
        return y

    def forward(self, site: Site, inputs: Sequence[Value]) -> Value:
        """The product: of events where they are few, else dense."""
        module: nn.Conv2d = site.module
        few = self._events(module, inputs[0])
        if few is not None:
            return add_bias(few.convolved(module, site.prepared(tap_rows)), site.bias)
        x = site.lowered(dense(inputs[0]))
        inside = site.bias if x.dtype == site.weight.dtype else None
        product = per_image(
            lambda n: F.conv2d(
                n.contiguous(memory_format=torch.channels_last),
                site.weight.to(n.dtype),
                inside,
                module.stride,
                module.padding,
                module.dilation,
                module.groups,
            ).to(site.weight.dtype),
            x,
        )
        return product if inside is site.bias else add_bias(product, site.bias)

    def backward_input(
        self, site: Site, grad: Gradient, position: int, shape: torch.Size
    ) -> Gradient:
        """∂L/∂O, given ∂L/∂I."""
        module: nn.Conv2d = site.module
        grad = dense(grad)
        images = grad.flatten(0, 1)
        x = images.new_empty(1).expand(len(images), *shape)  # only its shape is looked at
        weight = site.weight.to(grad.dtype, memory_format=torch.channels_last)
        grad_x, _ = _convolution_backward(module, images, x, weight, (True, False))
        below: Tensor = grad_x.to(site.weight.dtype).unflatten(0, grad.shape[:2])
        return below

    def backward_weight(self, site: Site, grad: Tensor, x: Value, total: Tensor | None) -> Tensor:
        """``total`` + ∂L/∂W: of events where they are few, else dense."""
        module: nn.Conv2d = site.module
        few = self._events(module, x)
        if few is not None:
            grad_weight = few.convolved_weight(module, grad.to(site.weight.dtype))
        else:
            images = dense(x).flatten(0, 1).to(grad.dtype, memory_format=torch.channels_last)
            weight = site.weight.to(grad.dtype)
            _, grad_weight = _convolution_backward(
                module, grad.flatten(0, 1), images, weight, (False, True)
            )
            grad_weight = grad_weight.to(site.weight.dtype)
        return grad_weight if total is None else total.add_(grad_weight)

    def fan_out(self, module: Any, targets: Tensor, position: int, shape: torch.Size) -> Tensor:
        """How many outputs each input drives: borders and strides make them differ."""
        groups = module.groups  # within one, all inputs drive all outputs
        driven: Tensor = conv2d_input(
            (1, groups, *shape[1:]),
            targets.new_ones(groups, 1, *module.kernel_size),
            targets.new_full((1, groups, *targets.shape[1:]), module.out_channels // groups),
            module.stride,
            module.padding,
            module.dilation,
            groups,
        )[0].repeat_interleave(shape[0] // groups, 0)
        return driven

    @staticmethod
    def _events(module: nn.Conv2d, x: Value) -> Events | None:
        """The input as events, where that is worth it; groups have no kernel."""
        return few_events(x) if module.groups == 1 else None


def _convolution_backward(
    module: nn.Conv2d, grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Those of ∂L/∂O and ∂L/∂W that are wanted, of images (N, …)."""
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        module.stride,
        module.padding,
        module.dilation,
        False,
        [0, 0],
        module.groups,
        [*wanted, False],
    )
    return grad_x, grad_weight
