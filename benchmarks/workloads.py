"""What is measured: networks, time steps and batches, the same for every contender."""

from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn

import stdb


@dataclass(frozen=True)
class Workload:
    """One network on CIFAR-sized images.

    Attributes:
        architecture: of ``stdb.build``.
        timesteps: T.
        batch: images of a step.
        peer_batch: images of a step for contenders that keep everything, so that they fit 20 GB.
        width: of the network.
        hidden: of the network.
        density: share of the neurons that spike in a step, in every layer.
        phases: train, infer, balance; record: inference with spike statistics beside one without.
        ann: measure the ANN, too.
        few: of few steps: batch norms folded into biases, analogue input, U_0 = V/2, a rectangle
            over U/V as surrogate, V learning; else of the paper's kind.
        precision: of the products, float32 or bfloat16; the others' by autocast.
    """

    architecture: str
    timesteps: int
    batch: int
    peer_batch: int
    width: float = 1.0
    hidden: int = 4096
    density: float = 0.05
    phases: tuple[str, ...] = ("train", "infer")
    ann: bool = False
    few: bool = False
    precision: str = "float32"

    @property
    def name(self) -> str:
        """Such as ``vgg5 T=20``."""
        size = "" if self.width == 1 else f" ×{self.width:g}"
        dense = f" at {self.density:.0%}" if self.density != 0.05 else ""
        kind = (" few steps" if self.few else "") + (" bf16" if self.lowered else "")
        return f"{self.architecture}{size} T={self.timesteps}{dense}{kind}"

    @property
    def lowered(self) -> torch.dtype | None:
        """What products are made in where it is not float32."""
        return torch.bfloat16 if self.precision == "bfloat16" else None


WORKLOADS = [
    Workload("vgg5", 20, 32, 32),
    Workload("vgg5", 20, 32, 32, density=0.25),
    Workload("vgg5", 75, 32, 32, phases=("train", "infer", "record")),
    Workload("vgg9", 50, 16, 8),
    Workload("vgg16", 50, 16, 4),
    Workload("vgg16", 100, 32, 4, ann=True),
    Workload("vgg16", 250, 8, 8, phases=("balance",)),
    *(
        Workload("resnet9", t, 128, 128, width=0.5, density=0.15, few=True, precision=precision)
        for t in (1, 2, 4)
        for precision in ("float32", "bfloat16")
    ),
    *(
        Workload("vgg9", t, 32, 32, hidden=512, density=density, few=True, precision=precision)
        for t, density in ((4, 0.15), (4, 0.4), (8, 0.15))
        for precision in ("float32", "bfloat16")
    ),
]
QUICK = [
    Workload("vgg5", 4, 4, 4, width=0.25, hidden=64, density=0.2, few=True, precision="bfloat16"),
    Workload("vgg5", 6, 4, 4, width=0.25, hidden=64, phases=("train", "infer", "record"), ann=True),
    Workload("vgg5", 6, 4, 4, width=0.25, hidden=64, phases=("balance",)),
]


def plain(workload: Workload) -> nn.Module:
    """The ANN."""
    torch.manual_seed(0)
    if workload.architecture == "resnet18":
        ann = resnet18()
    else:
        ann = stdb.build(
            workload.architecture, 3, 32, 10, width=workload.width, hidden=workload.hidden,
            dropout=0.0 if workload.few else 0.2, normalisation="batch" if workload.few else "none",
        )  # fmt: skip
    for module in ann.modules():
        if isinstance(module, nn.BatchNorm2d):  # a bias to be folded
            nn.init.uniform_(module.bias, -0.1, 0.1)
    return ann.eval()


def resnet18() -> nn.Module:
    """torchvision's, as it is usual for images of 32 pixels: a stem of 3×3, no pooling in it."""
    ann = torchvision.models.resnet18(num_classes=10)
    ann.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    ann.maxpool = nn.Identity()
    return ann


def network(workload: Workload, device: torch.device | str = "cpu") -> stdb.SpikingNetwork:
    """The network that it is converted to, its thresholds such that all layers are as dense.

    A trained network spikes like that (:mod:`benchmarks.trained`). At random weights' maxima
    (Algorithm 1) layer after layer passes on less, and the highest ones would be silent.
    """
    snn = stdb.convert(
        plain(workload),
        stdb.DirectEncoder() if workload.few else stdb.PoissonEncoder(0),
        stdb.Rectangle(1.0, 1.0, True) if workload.few else stdb.STDB(0.3, 0.01),
        learn_thresholds=workload.few,
        precision=workload.lowered,
    ).to(device).eval()  # fmt: skip
    for neuron in snn.neurons.values():
        neuron.initial_membrane = 0.5 if workload.few else 0.0
    x, steps = images(2).to(device), min(100, workload.timesteps)
    stdb.balance_thresholds(snn, x, min(20, steps), percentile=95)
    for _ in range(20):  # each layer's V moves with its density, those below settle first
        with torch.no_grad(), stdb.record_spikes(snn) as statistics:
            snn(x, steps)
        share = {name: s / steps for name, s in statistics.spikes_per_neuron().items()}
        snn.set_thresholds(
            {
                name: v * min(2.0, max(0.5, (share[name] / workload.density) ** 0.7))
                for name, v in snn.thresholds.items()
            }
        )
    return snn


def images(count: int) -> Tensor:
    """Smooth pictures (count, 3, 32, 32) in [−1, 1]: about half of the pixels fire in a step."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1
    return nn.functional.interpolate(coarse, size=32, mode="bilinear").clamp(-1, 1)


def labels(count: int) -> Tensor:
    """(count,) of ten classes."""
    return torch.arange(count) % 10


def neuron_steps(snn: stdb.SpikingNetwork, workload: Workload, batch: int) -> int:
    """Spiking neurons × time steps × images."""
    with torch.no_grad(), stdb.record_spikes(snn) as statistics:
        snn(images(1).to(next(snn.parameters()).device), 1)
    neurons = sum(m.numel() for name, m in statistics.maps.items() if name != "input")
    return neurons * workload.timesteps * batch
