"""A network that others wrote and trained, as it is: batch norm, option A, functional relu.

Weights, images and their licences are in ``strangers/``.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

import stdb

FOLDER = Path(__file__).parent / "strangers"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # that it was trained with


class OptionA(nn.Module):
    """A shortcut without weights (He et al., CVPR 2016, §4.2): every other pixel, zero channels."""

    def __init__(self, channels):
        super().__init__()
        self.more = channels // 4

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more, self.more), "constant", 0)


class Block(nn.Module):
    """A basic block."""

    def __init__(self, before, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential() if stride == 1 else OptionA(channels)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return F.relu(y)


class ResNet(nn.Module):
    """Of 6n + 2 layers, for CIFAR-10, with the names that the weights have."""

    def __init__(self, n):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(n)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), *(Block(32, 32, 1) for _ in range(n - 1)))
        self.layer3 = nn.Sequential(Block(32, 64, 2), *(Block(64, 64, 1) for _ in range(n - 1)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.avg_pool2d(x, x.size()[3])
        return self.linear(x.view(x.size(0), -1))


def trained() -> ResNet:
    """ResNet-20 with its weights, which a DataParallel saved."""
    saved = torch.load(FOLDER / "resnet20.th", map_location="cpu", weights_only=True)["state_dict"]
    net = ResNet(3)
    net.load_state_dict({k.removeprefix("module."): v for k, v in saved.items()})
    return net.eval()


def images() -> tuple[Tensor, Tensor]:
    """500 test images, normalised, and their labels; the classes in turn."""
    with Image.open(FOLDER / "cifar10.webp") as sheet:
        pixels = pil_to_tensor(sheet).float() / 255
    each = pixels.unflatten(2, (50, 32)).unflatten(1, (10, 32)).permute(3, 1, 0, 2, 4)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return ((each - mean) / std).flatten(0, 1).contiguous(), torch.arange(10).repeat(50)


@torch.no_grad()
def test_the_rewritten_networks_logits_are_the_strangers():
    """Checked layer by layer in float64; every norm folded; its 19 activations are neurons."""
    net, (pixels, labels) = trained(), images()
    snn = stdb.convert(net, stdb.DirectEncoder(), example=pixels[:8])
    assert len(snn.thresholds) == 19
    folded = [row for row in snn.rewrites if row.found == "BatchNorm2d"]
    assert len(folded) == 19
    assert all(row.became.startswith("folded into ") for row in folded)
    accuracy = (net(pixels).argmax(1) == labels).double().mean()
    assert accuracy == pytest.approx(0.914)


@pytest.mark.slow
def test_at_many_steps_it_is_as_accurate_as_its_ann():
    """Percentile 99, U_0 = V/2: within a point at T = 256; that at T = 32 is far from it."""
    net, (pixels, labels) = trained(), images()
    snn = stdb.convert(net, stdb.DirectEncoder(), example=pixels[:8])
    for neuron in snn.neurons.values():
        neuron.initial_membrane = 0.5
    stdb.balance_thresholds(snn, pixels[:100], 64, percentile=99.0)
    found = stdb.evaluate(snn, zip(pixels.split(250), labels.split(250), strict=True), 256)
    assert found[255] == pytest.approx(0.914, abs=0.01)
    assert found[31] < 0.9
