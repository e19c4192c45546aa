"""The paper's architectures as tables, and one builder. ANN and SNN are the same module tree.

Every convolution is 3×3 with padding 1; no layer has a bias. An integer in a table is a convolution
of that many channels followed by ReLU and dropout; ``A`` is 2×2 average pooling in the place of the
dropout before it (paper §4.1, §4.2), ``R`` a basic block of as many channels as there are. Batch
norm behind every convolution, max-pooling in the place of the average and activations with a bound
that learns are options, which the paper does without.
"""

import importlib
import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from .activations import activation_of

A, R = "A", "R"
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
RESIDUAL: dict[str, list[int | str]] = {  # convolutions, blocks, a global average, a linear layer
    "resnet9": [64, 128, A, R, 256, A, 512, A, R],
    "resnet11": [64, 128, A, R, 256, A, R, 512, A, R],
}
CIFAR: dict[str, list[int]] = {  # He et al.'s first layer for small images, a global average
    "resnet18": [2, 2, 2, 2],
}
ARCHITECTURES = [*VGG, *RESNET, *CIFAR, *RESIDUAL]
NORMALISATIONS = ("none", "batch")
GIVEN = ("in_channels", "image_size", "num_classes")  # to functions of someone's own
POOLINGS: dict[str, type[nn.Module]] = {"average": nn.AvgPool2d, "max": nn.MaxPool2d}


class ResidualBlock(nn.Module):
    """Basic block: conv–ReLU–dropout–conv, plus the shortcut, then ReLU (paper Fig. 2c).

    The shortcut is the identity, or a 1×1 projection where the shape changes. With ``normalised`` a
    batch norm follows every convolution; ``activation`` makes what stands for ReLU.
    (N, in, H, W) → (N, planes, H/stride, W/stride).
    """

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        dropout: float = 0.2,
        normalised: bool = False,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ):
        super().__init__()
        self.normalised = normalised
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride, 1, bias=False)
        self.relu1 = activation()
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        same_shape = in_channels == planes and stride == 1
        self.shortcut: nn.Module = (
            nn.Identity()
            if same_shape
            else nn.Conv2d(in_channels, planes, 1, stride, 0, bias=False)
        )
        self.relu2 = activation()
        if normalised:
            self.norm1, self.norm2 = nn.BatchNorm2d(planes), nn.BatchNorm2d(planes)
            if not same_shape:
                self.shortcut = nn.Sequential(self.shortcut, nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        """Add the shortcut to the second convolution's output, before the nonlinearity."""
        if self.normalised:
            inner = self.norm2(self.conv2(self.dropout(self.relu1(self.norm1(self.conv1(x))))))
        else:
            inner = self.conv2(self.dropout(self.relu1(self.conv1(x))))
        y: Tensor = self.relu2(inner + self.shortcut(x))
        return y


def build(  # noqa: PLR0913 (each with a default, by keyword)
    name: str,
    in_channels: int = 3,
    image_size: int | tuple[int, int] = 32,
    num_classes: int = 10,
    *,
    width: float = 1.0,
    hidden: int = 4096,
    dropout: float = 0.2,
    classifier_dropout: float = 0.5,
    normalisation: str = "none",
    pooling: str = "average",
    activation: str = "relu",
    levels: int | None = None,
) -> nn.Sequential:
    """Build an ANN that can be converted: (N, in_channels, image_size, image_size) → (N, classes).

    Args:
        name: one of ``ARCHITECTURES``.
        in_channels: 1 for grey, 3 for colour images.
        image_size: height and width in pixels, a pair where they differ. From 128 on, VGG16 has
            ImageNet's fifth pooling and a ResNet ends in global average pooling.
        num_classes: number of logits.
        width: multiplies the channels of every convolution.
        hidden: size of a VGG's two hidden linear layers.
        dropout: probability after convolutions.
        classifier_dropout: probability after a VGG's hidden linear layers.
        normalisation: ``none``, the paper's, or ``batch``: a batch norm behind every convolution.
        pooling: ``average``, the paper's, or ``max``; a global pooling is always an average.
        activation: ``relu``, the paper's; ``clip`` or ``qcfs``, which are for few steps
            (:class:`stdb.Clip`, :class:`stdb.QCFS`).
        levels: L of ``qcfs``; None for others.

    Weights are drawn from torch's global generator: convolutions N(0, √(2/(k²·out))), linear
    layers N(0, 0.01) in the paper's size. A narrower linear layer gets the larger of 0.01 and
    √(1/in), since 0.01 would silence it.
    """
    _check(in_channels=in_channels, num_classes=num_classes, hidden=hidden)
    if not width > 0:
        raise ValueError(f"width is {width}; allowed: a number above 0")
    _check_name("normalisation", normalisation, NORMALISATIONS)
    _check_name("pooling", pooling, tuple(POOLINGS))
    normalised = normalisation == "batch"
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    activation_of(activation, levels)  # refuses what there is not
    neurons = partial(activation_of, activation, levels)
    body = _Body(in_channels, size, width, dropout, normalised, POOLINGS[pooling], neurons)
    layers = body.layers
    if name in VGG:
        body.add(VGG[name] + ([A] if name == "vgg16" and min(size) >= 128 else []))
        layers["flatten"], features = nn.Flatten(), body.features
        for index in (1, 2):
            layers[f"fc{index}"] = nn.Linear(features, hidden, bias=False)
            layers[f"fc{index}_relu"] = neurons()
            layers[f"fc{index}_drop"] = nn.Dropout(classifier_dropout)
            features = hidden
    elif name in RESNET or name in CIFAR or name in RESIDUAL:
        if name in RESIDUAL:
            body.add(RESIDUAL[name])
        else:
            body.add([64, 64, 64, A] if name in RESNET else [64])
            body.add_groups((RESNET | CIFAR)[name])
        if min(size) >= 128 or name not in RESNET:
            layers["pool"], body.size = nn.AvgPool2d(_side(body.size)), (1, 1)
        layers["flatten"], features = nn.Flatten(), body.features
    else:
        raise ValueError(f"unknown architecture {name!r}; allowed: {', '.join(ARCHITECTURES)}")
    layers["output"] = nn.Linear(features, num_classes, bias=False)
    network = nn.Sequential(layers)
    initialise(network)
    return network


def _check(**numbers: int) -> None:
    for key, value in numbers.items():
        if value < 1:
            raise ValueError(f"{key} is {value}; allowed: 1 or more")


def _check_name(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{key} is {value!r}; allowed: {', '.join(allowed)}")


def build_network(architecture: str, **arguments: Any) -> nn.Module:
    """``stdb.build``, or a function of your own, ``module:function``.

    That is given those of ``in_channels``, ``image_size`` and ``num_classes`` that it takes.

    Raises:
        ValueError: there is no such module or function.
    """
    if ":" not in architecture:
        return build(architecture, **arguments)
    module, _, function = architecture.partition(":")
    try:
        own = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"architecture is {architecture!r}: {error}") from error
    known = {name: arguments[name] for name in GIVEN}
    network: nn.Module = own(**accepted(own, known, GIVEN))
    return network


def accepted(
    function: Callable[..., Any], known: Mapping[str, Any], by_any_name: Sequence[str]
) -> dict[str, Any]:
    """Those of the arguments that are known which a function takes.

    Args:
        function: of someone's own.
        known: name → value.
        by_any_name: of which names, where it takes any, ``**options``.
    """
    takes = inspect.signature(function).parameters
    any_name = any(str(parameter).startswith("**") for parameter in takes.values())
    return {n: v for n, v in known.items() if n in takes or (any_name and n in by_any_name)}


def initialise(network: nn.Module) -> None:
    """Draw the weights as :func:`build` says; those without memory have no numbers."""
    for module in network.modules():
        if not isinstance(module, nn.Conv2d | nn.Linear) or module.weight.is_meta:
            continue  # for a meta tensor torch would load its compiler, for seconds
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        else:
            nn.init.normal_(module.weight, 0, max(0.01, math.sqrt(1 / module.in_features)))


def _halve(size: tuple[int, int]) -> tuple[int, int]:
    if min(size) < 2:
        raise ValueError("image_size is too small: nothing is left for one of the poolings")
    return size[0] // 2, size[1] // 2


def _side(size: tuple[int, int]) -> int | tuple[int, int]:
    """One number where both are the same, as files of squares have it."""
    return size[0] if size[0] == size[1] else size


@dataclass
class _Body:
    """The layers below the classifier, as they are put on each other.

    Attributes:
        channels: that the last of them has.
        size: height and width there, in pixels.
        width: multiplies the channels of the tables.
        dropout: probability after convolutions.
        normalised: whether a batch norm follows every convolution.
        pool: the kind of pooling.
        neurons: makes what stands for ReLU.
        layers: by name.
        convolutions: how many there are, outside of blocks.
        blocks: how many ``R`` of a table there are.
    """

    channels: int
    size: tuple[int, int]
    width: float
    dropout: float
    normalised: bool
    pool: type[nn.Module]
    neurons: Callable[[], nn.Module]
    layers: OrderedDict[str, nn.Module] = field(default_factory=OrderedDict)
    convolutions: int = 0
    blocks: int = 0

    @property
    def features(self) -> int:
        """Number of values of an image that the classifier gets."""
        return self.channels * self.size[0] * self.size[1]

    def add(self, table: list[int | str]) -> None:
        """Convolutions, poolings and blocks of a table."""
        for entry in table:
            if entry == A:
                self.layers.pop(f"conv{self.convolutions}_drop", None)
                self.layers[f"conv{self.convolutions}_pool"] = self.pool(2)
                self.size = _halve(self.size)
            elif entry == R:
                self.blocks += 1
                self._add_block(f"block{self.blocks}", self.channels, 1)
            else:
                self._add_convolution(self._planes(int(entry)))

    def add_groups(self, blocks: list[int]) -> None:
        """A ResNet's groups of 64, 128, 256 and 512 planes, of so many basic blocks each."""
        planes = [self._planes(p) for p in (64, 128, 256, 512)]
        for group, (count, out) in enumerate(zip(blocks, planes, strict=True), start=1):
            for block in range(count):
                stride = 2 if group > 1 and block == 0 else 1
                self._add_block(f"group{group}_block{block + 1}", out, stride)

    def _planes(self, planes: int) -> int:
        return max(1, round(planes * self.width))

    def _add_convolution(self, planes: int) -> None:
        self.convolutions += 1
        name = f"conv{self.convolutions}"
        self.layers[name] = nn.Conv2d(self.channels, planes, 3, 1, 1, bias=False)
        if self.normalised:
            self.layers[f"{name}_norm"] = nn.BatchNorm2d(planes)
        self.layers[f"{name}_relu"] = self.neurons()
        self.layers[f"{name}_drop"] = nn.Dropout(self.dropout)
        self.channels = planes

    def _add_block(self, name: str, planes: int, stride: int) -> None:
        block = ResidualBlock(
            self.channels, planes, stride, self.dropout, self.normalised, self.neurons
        )
        self.layers[name] = block
        height, width = self.size
        self.channels, self.size = planes, (-(-height // stride), -(-width // stride))
