"""What a refusal advises, by the layer, or the call, that has no spiking form."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_NEURON = "use nn.ReLU and train again: the firing rate of an IF neuron approximates that one"
_NORM = (
    "use nn.BatchNorm2d, or nn.BatchNorm1d, and train again: their running statistics are "
    "folded into the weights"
)
_POOL = "use nn.MaxPool2d, the same where the sizes divide, or nn.AdaptiveAvgPool2d and train again"
_SIGNAL_POOL = _POOL.replace("2d", "1d")
_POWER_POOL = "use nn.MaxPool2d, or nn.AvgPool2d, and train again"
_DROPOUT = "use nn.Dropout, whose mask is constant in time, and train again"
_CHANNEL_DROPOUT = "use nn.Dropout2d, which drops channels of an image"
_OUTPUT = "leave it out: the membrane potential of the output layer is the logit"


def _of_volumes(kind: type[nn.Module]) -> str:
    return (
        f"use nn.{kind.__name__.replace('3d', '2d')}, of images: networks of images (B, C, H, W), "
        "signals (B, C, L) and vectors (B, n) convert, of volumes none"
    )


_VOLUMES: tuple[type[nn.Module], ...] = (
    *(nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d),
    *(nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.MaxPool3d),
)
_ACTIVATIONS: tuple[type[nn.Module], ...] = (
    *(nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardshrink, nn.Softplus, nn.Softsign, nn.Softshrink),
    *(nn.Tanhshrink, nn.Threshold, nn.LogSigmoid, nn.Sigmoid, nn.Tanh),
)
REMEDIES: dict[type[nn.Module], str] = {
    **{kind: _of_volumes(kind) for kind in _VOLUMES},
    **dict.fromkeys(_ACTIVATIONS, _NEURON),
    **dict.fromkeys((nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm), _NORM),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d), _NORM),
    nn.AdaptiveMaxPool2d: _POOL,
    nn.AdaptiveMaxPool1d: _SIGNAL_POOL,
    **dict.fromkeys((nn.FractionalMaxPool2d, nn.LPPool2d), _POWER_POOL),
    **dict.fromkeys((nn.AlphaDropout, nn.FeatureAlphaDropout), _DROPOUT),
    nn.Dropout3d: _CHANNEL_DROPOUT,
    **dict.fromkeys((nn.Softmin, nn.Softmax2d), _OUTPUT),
}
CALL_REMEDIES: dict[Any, str] = {
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_, F.prelu, F.rrelu, F.elu, F.elu_), _NEURON),
    **dict.fromkeys((F.celu, F.selu, F.gelu, F.silu, F.mish, F.hardswish), _NEURON),
    **dict.fromkeys((F.hardsigmoid, F.softplus, F.softsign, F.logsigmoid), _NEURON),
    **dict.fromkeys((torch.sigmoid, torch.tanh, "sigmoid", "tanh"), _NEURON),
    **dict.fromkeys((F.layer_norm, F.group_norm, F.instance_norm, F.rms_norm), _NORM),
    **dict.fromkeys((F.alpha_dropout, F.feature_alpha_dropout), _DROPOUT),
    F.dropout3d: _CHANNEL_DROPOUT,
}
