"""The paper's architectures as tables, and one builder. ANN and SNN are the same module tree.

Every convolution is 3×3 with padding 1; no layer has a bias. An integer in a table is a convolution
of that many channels followed by ReLU and dropout; ``A`` is 2×2 average pooling in the place of the
dropout before it (paper §4.1, §4.2).
"""

import importlib
import math
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

A = "A"
VGG: dict[str, list[int | str]] = {
    "vgg5": [64, A, 128, 128, A],
    "vgg9": [64, A, 128, 256, A, 256, 512, A, 512, A, 512],
    "vgg11": [64, A, 128, 256, 256, A, 512, 512, 512, A, 512, 512],
    "vgg11_ann": [64, A, 128, 256, A, 512, 512, A, 512, A, 512, 512],  # of the authors' ANN
    "vgg13": [64, 64, A, 128, 128, A, 256, 256, A, 512, 512, 512, A, 512],
    "vgg16": [64, 64, A, 128, 128, A, 256, 256, 256, A, 512, 512, 512, A, 512, 512, 512],
    "vgg19": [64, 64, A, 128, 128, A, *[256] * 4, A, *[512] * 4, A, *[512] * 4],
}
RESNET: dict[str, list[int]] = {  # basic blocks in the groups of 64, 128, 256 and 512 planes
    "resnet8": [1, 1, 0, 0],
    "resnet12": [1, 1, 1, 1],
    "resnet20": [2, 2, 2, 2],
    "resnet34": [3, 4, 5, 3],
    "resnet34_snn": [3, 4, 6, 3],  # of the authors' SNN
}
ARCHITECTURES = [*VGG, *RESNET]


class ResidualBlock(nn.Module):
    """Basic block: conv–ReLU–dropout–conv, plus the shortcut, then ReLU (paper Fig. 2c).

    The shortcut is the identity, or a 1×1 projection where the shape changes. (N, in, H, W) →
    (N, planes, H/stride, W/stride).
    """

    def __init__(self, in_channels: int, planes: int, stride: int = 1, dropout: float = 0.2):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride, 1, bias=False)
        self.relu1 = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        same_shape = in_channels == planes and stride == 1
        self.shortcut = (
            nn.Identity()
            if same_shape
            else nn.Conv2d(in_channels, planes, 1, stride, 0, bias=False)
        )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Add the shortcut to the second convolution's output, before the nonlinearity."""
        inner = self.conv2(self.dropout(self.relu1(self.conv1(x))))
        y: Tensor = self.relu2(inner + self.shortcut(x))
        return y


def build(
    name: str,
    in_channels: int = 3,
    image_size: int = 32,
    num_classes: int = 10,
    *,
    width: float = 1.0,
    hidden: int = 4096,
    dropout: float = 0.2,
    classifier_dropout: float = 0.5,
) -> nn.Sequential:
    """Build an ANN that can be converted: (N, in_channels, image_size, image_size) → (N, classes).

    Args:
        name: one of ``ARCHITECTURES``.
        in_channels: 1 for grey, 3 for colour images.
        image_size: height and width in pixels. From 128 on, VGG16 has ImageNet's fifth pooling and
            a ResNet ends in global average pooling.
        num_classes: number of logits.
        width: multiplies the channels of every convolution.
        hidden: size of a VGG's two hidden linear layers.
        dropout: probability after convolutions.
        classifier_dropout: probability after a VGG's hidden linear layers.

    Weights are drawn from torch's global generator: convolutions N(0, √(2/(k²·out))), linear
    layers N(0, 0.01) in the paper's size. A narrower linear layer gets the larger of 0.01 and
    √(1/in), since 0.01 would silence it.
    """
    for key, value in {
        "in_channels": in_channels,
        "num_classes": num_classes,
        "hidden": hidden,
    }.items():
        if value < 1:
            raise ValueError(f"{key} is {value}; allowed: 1 or more")
    if not width > 0:
        raise ValueError(f"width is {width}; allowed: a number above 0")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if name in VGG:
        table = VGG[name] + ([A] if name == "vgg16" and image_size >= 128 else [])
        channels, size = _vgg_features(layers, table, in_channels, image_size, width, dropout)
        features = channels * size * size
        layers["flatten"] = nn.Flatten()
        for index in (1, 2):
            layers[f"fc{index}"] = nn.Linear(features, hidden, bias=False)
            layers[f"fc{index}_relu"] = nn.ReLU()
            layers[f"fc{index}_drop"] = nn.Dropout(classifier_dropout)
            features = hidden
    elif name in RESNET:
        channels, size = _resnet_features(layers, name, in_channels, image_size, width, dropout)
        if image_size >= 128:
            layers["pool"], size = nn.AvgPool2d(size), 1
        layers["flatten"] = nn.Flatten()
        features = channels * size * size
    else:
        raise ValueError(f"unknown architecture {name!r}; allowed: {', '.join(ARCHITECTURES)}")
    layers["output"] = nn.Linear(features, num_classes, bias=False)
    network = nn.Sequential(layers)
    initialise(network)
    return network


def build_network(architecture: str, **arguments: Any) -> nn.Module:
    """``stdb.build``, or a function of your own, ``module:function``, of the same first arguments.

    Args:
        architecture: its name.
        arguments: ``image_size`` may be (H, W), of images that are not square, for yours.

    Raises:
        ValueError: there is no such module or function, or it is for squares.
    """
    if ":" not in architecture:
        if not isinstance(size := arguments.get("image_size", 0), int):
            raise ValueError(
                f"{architecture} is for square images; image_size is {'×'.join(map(str, size))}; "
                "allowed: one number of pixels, or a network of your own"
            )
        return build(architecture, **arguments)
    module, _, function = architecture.partition(":")
    try:
        own = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"architecture is {architecture!r}: {error}") from error
    names = ("in_channels", "image_size", "num_classes")
    network: nn.Module = own(**{name: arguments[name] for name in names})
    return network


def initialise(network: nn.Module) -> None:
    """Draw the weights as :func:`build` says."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, max(0.01, math.sqrt(1 / module.in_features)))


def _halve(size: int) -> int:
    if size < 2:
        raise ValueError("image_size is too small: nothing is left for one of the poolings")
    return size // 2


def _vgg_features(
    layers: OrderedDict[str, nn.Module],
    table: list[int | str],
    channels: int,
    size: int,
    width: float,
    dropout: float,
) -> tuple[int, int]:
    """Append a VGG's convolutions; returns the channels and the size that they end with."""
    index = 0
    for entry in table:
        if entry == A:
            layers.pop(f"conv{index}_drop", None)
            layers[f"conv{index}_pool"] = nn.AvgPool2d(2)
            size = _halve(size)
        else:
            index += 1
            planes = max(1, round(int(entry) * width))
            layers[f"conv{index}"] = nn.Conv2d(channels, planes, 3, 1, 1, bias=False)
            layers[f"conv{index}_relu"] = nn.ReLU()
            layers[f"conv{index}_drop"] = nn.Dropout(dropout)
            channels = planes
    return channels, size


def _resnet_features(
    layers: OrderedDict[str, nn.Module],
    name: str,
    channels: int,
    size: int,
    width: float,
    dropout: float,
) -> tuple[int, int]:
    """Append pre-processing and groups; returns the channels and the size that they end with."""
    planes = [max(1, round(p * width)) for p in (64, 128, 256, 512)]
    channels, size = _vgg_features(layers, [64, 64, 64, A], channels, size, width, dropout)
    for group, (blocks, out) in enumerate(zip(RESNET[name], planes, strict=True), start=1):
        for block in range(blocks):
            stride = 2 if group > 1 and block == 0 else 1
            layers[f"group{group}_block{block + 1}"] = ResidualBlock(channels, out, stride, dropout)
            channels, size = out, -(-size // stride)
    return channels, size
