"""What is measured: networks, time steps and batches, the same for every contender."""

from dataclasses import dataclass

import torch
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

    @property
    def name(self) -> str:
        """Such as ``vgg5 T=20``."""
        size = "" if self.width == 1 else f" ×{self.width:g}"
        dense = f" at {self.density:.0%}" if self.density != 0.05 else ""
        return f"{self.architecture}{size} T={self.timesteps}{dense}"


WORKLOADS = [
    Workload("vgg5", 20, 32, 32),
    Workload("vgg5", 20, 32, 32, density=0.25),
    Workload("vgg5", 75, 32, 32, phases=("train", "infer", "record")),
    Workload("vgg9", 50, 16, 8),
    Workload("vgg16", 50, 16, 4),
    Workload("vgg16", 100, 32, 4, ann=True),
    Workload("vgg16", 250, 8, 8, phases=("balance",)),
]
QUICK = [
    Workload("vgg5", 6, 4, 4, width=0.25, hidden=64, phases=("train", "infer", "record"), ann=True),
    Workload("vgg5", 6, 4, 4, width=0.25, hidden=64, phases=("balance",)),
]


def plain(workload: Workload) -> nn.Module:
    """The ANN."""
    torch.manual_seed(0)
    return stdb.build(
        workload.architecture, 3, 32, 10, width=workload.width, hidden=workload.hidden
    )


def network(workload: Workload) -> stdb.SpikingNetwork:
    """The network that it is converted to, its thresholds such that all layers are as dense.

    A trained network spikes like that (:mod:`benchmarks.trained`). At random weights' maxima
    (Algorithm 1) layer after layer passes on less, and the highest ones would be silent.
    """
    snn = stdb.convert(plain(workload), stdb.PoissonEncoder(0), stdb.STDB(0.3, 0.01)).eval()
    x, steps = images(2), min(100, workload.timesteps)
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
        snn(images(1), 1)
    neurons = sum(m.numel() for name, m in statistics.maps.items() if name != "input")
    return neurons * workload.timesteps * batch
