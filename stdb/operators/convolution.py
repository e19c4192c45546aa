"""Convolutions: I = W ∗ O, dense or of events; of images and of signals, transposed ones, too."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kernels.layout import channels_last
from ..spikes import Events, tap_rows
from . import Gradient, Operator, Site, Value, dense, few_events, operand, per_image, with_bias

SETTINGS = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
)


class Convolution(Operator):
    """I = W ∗ O, (T, B, C, H, W) → (T, B, C', H', W'), or (T, B, C, L) → (T, B, C', L').

    A dense product is made in the precision of the network's products, and its result and the
    gradient of its input stay in that until someone computes with them.
    """

    name = "convolution"
    lowered = True
    product = "convolution"
    kinds: ClassVar = {nn.Conv2d: SETTINGS, nn.Conv1d: SETTINGS}
    learns = True
    owns = True

    def plain(self, module: Any, *inputs: Tensor) -> Tensor:
        """The module itself."""
        y: Tensor = module(inputs[0])
        return y

    def forward(self, site: Site, inputs: Sequence[Value]) -> Value:
        """The product: of events where they are few, else dense."""
        module = site.module
        few = _events(site, inputs[0])
        if few is not None:
            return with_bias(site, few.convolved(module, site.prepared(tap_rows)))
        x = operand(site, inputs[0])
        whole = x.dtype == site.weight.dtype
        inside = site.bias if whole else None
        product = per_image(
            lambda n: torch.convolution(
                channels_last(n), site.weight.to(n.dtype), inside, *_settings(module)
            ),
            x,
        )
        return product if whole else with_bias(site, product)

    def backward_input(
        self, site: Site, grad: Gradient, position: int, shape: torch.Size
    ) -> Gradient:
        """∂L/∂O, given ∂L/∂I."""
        grad = dense(grad)
        images = grad.flatten(0, 1)
        x = images.new_empty(1).expand(len(images), *shape)  # only its shape is looked at
        weight = channels_last(site.weight.to(grad.dtype))
        grad_x, _ = _convolution_backward(site.module, images, x, weight, (True, False))
        below: Tensor = grad_x.unflatten(0, grad.shape[:2])
        return below

    def backward_weight(self, site: Site, grad: Tensor, x: Value, total: Tensor | None) -> Tensor:
        """``total`` + ∂L/∂W: of events where they are few, else dense."""
        module = site.module
        few = _events(site, x)
        if few is not None:
            grad_weight = few.convolved_weight(module, grad.to(site.weight.dtype))
        else:
            images = channels_last(operand(site, x).flatten(0, 1).to(grad.dtype))
            weight = grad.new_empty(1).expand(site.weight.shape)  # only its shape is looked at
            _, grad_weight = _convolution_backward(
                module, grad.flatten(0, 1), images, weight, (False, True)
            )
            grad_weight = grad_weight.to(site.weight.dtype)
        return grad_weight if total is None else total.add_(grad_weight)

    def fan_out(self, module: Any, targets: Tensor, position: int, shape: torch.Size) -> Tensor:
        """How many outputs each input drives: borders and strides make them differ."""
        groups = module.groups  # within one, all inputs drive all outputs
        driven, _ = _convolution_backward(
            module,
            targets.new_full((1, groups, *targets.shape[1:]), module.out_channels // groups),
            targets.new_empty(1).expand(1, groups, *shape[1:]),
            targets.new_ones(groups, 1, *module.kernel_size),
            (True, False),
        )
        return driven[0].repeat_interleave(shape[0] // groups, 0)


class TransposedConvolution(Convolution):
    """I = Wᵀ ∗ O: what an output of the convolution W gives back to its inputs.

    Its weights are (C, C'/groups, …).
    """

    name = "transposed convolution"
    kinds: ClassVar = {
        nn.ConvTranspose2d: (*SETTINGS, "output_padding"),
        nn.ConvTranspose1d: (*SETTINGS, "output_padding"),
    }


def _events(site: Site, x: Value) -> Events | None:
    """The input as events, where that is worth it; groups and transposed ones have no kernel."""
    module = site.module
    return few_events(site, x) if module.groups == 1 and not module.transposed else None


def _settings(module: Any) -> tuple[Any, ...]:
    """Those of ``torch.convolution``, in its order."""
    return (
        module.stride,
        module.padding,
        module.dilation,
        module.transposed,
        module.output_padding,
        module.groups,
    )


def _convolution_backward(
    module: Any, grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Those of ∂L/∂O and ∂L/∂W that are wanted, of images (N, …)."""
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *_settings(module), [*wanted, False]
    )
    return grad_x, grad_weight
