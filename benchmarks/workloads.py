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
        phases: train, infer, balance.
    """

    architecture: str
    timesteps: int
    batch: int
    peer_batch: int
    width: float = 1.0
    hidden: int = 4096
    phases: tuple[str, ...] = ("train", "infer")

    @property
    def name(self) -> str:
        """Such as ``vgg5 T=20``."""
        size = "" if self.width == 1 else f" ×{self.width:g}"
        return f"{self.architecture}{size} T={self.timesteps}"


WORKLOADS = [
    Workload("vgg5", 20, 32, 32),
    Workload("vgg5", 75, 32, 32),
    Workload("vgg9", 50, 16, 8),
    Workload("vgg16", 50, 16, 4),
    Workload("vgg16", 100, 32, 4),
    Workload("vgg16", 1000, 16, 16, phases=("balance",)),
]
QUICK = [
    Workload("vgg5", 6, 4, 4, width=0.25, hidden=64),
    Workload("vgg5", 6, 4, 4, width=0.25, hidden=64, phases=("balance",)),
]


def plain(workload: Workload) -> nn.Module:
    """The ANN."""
    torch.manual_seed(0)
    return stdb.build(
        workload.architecture, 3, 32, 10, width=workload.width, hidden=workload.hidden
    )


def network(workload: Workload) -> stdb.SpikingNetwork:
    """The network that it is converted to, with spikes as dense as in real use."""
    snn = stdb.convert(plain(workload), stdb.PoissonEncoder(0), stdb.STDB(0.3, 0.01))
    # random weights carry less and less upwards; at the maximum the highest layers would be silent
    stdb.balance_thresholds(snn, images(4), min(50, workload.timesteps), percentile=98)
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
