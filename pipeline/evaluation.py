"""Accuracy and spikes of a network over a split, shared among the workers with exact counts.

A worker gets whole batches, the same for any number of workers, so the counts are the same, too.
"""

from dataclasses import dataclass

import torch
from torch import nn

import stdb
from pipeline.data import Samples, normalise, shares
from pipeline.distributed import total


@dataclass(frozen=True)
class Evaluation:
    """What one pass over a split gives.

    Attributes:
        accuracy: fraction of correct predictions after step t, for t = 1 … T.
        spikes: layer → spikes per neuron and image (Fig. 3).
        energy: picojoules per image (45 nm CMOS).
        operations: synaptic operations per image.
    """

    accuracy: list[float]
    spikes: dict[str, float]
    energy: float
    operations: float


@torch.no_grad()
def evaluate_ann(ann: nn.Module, split: Samples, batch_size: int, rank: int, world: int) -> float:
    """Accuracy of an ANN."""
    device = next(ann.parameters()).device
    ann.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for batch in split.stream(shares(len(split), batch_size, rank, world), device):
        correct += (ann(normalise(batch.images)).argmax(1) == batch.labels).sum()
    return total(correct).item() / len(split)


@torch.no_grad()
def evaluate_snn(
    snn: stdb.SpikingNetwork,
    split: Samples,
    timesteps: int,
    batch_size: int,
    rank: int,
    world: int,
) -> Evaluation:
    """Accuracy after every step and spikes of every layer; one presentation gives them all."""
    device = next(snn.parameters()).device
    snn.eval()
    correct = torch.zeros(timesteps, dtype=torch.int64, device=device)
    with stdb.record_spikes(snn) as statistics:
        for batch in split.stream(shares(len(split), batch_size, rank, world), device):
            images = normalise(batch.images)
            logits = snn.logits_over_time(images, timesteps, sample_ids=batch.ids)
            correct += (logits.argmax(2) == batch.labels).sum(1)  # (T, B) → (T,)
    _merge(statistics, snn, split.shape, device)
    accuracy = (total(correct).double() / len(split)).tolist()
    operations = sum(statistics.synaptic_operations().values())
    return Evaluation(accuracy, statistics.spikes_per_neuron(), statistics.energy(), operations)


def _merge(
    statistics: stdb.SpikeStatistics,
    snn: stdb.SpikingNetwork,
    shape: tuple[int, int, int],
    device: torch.device,
) -> None:
    """Sum the workers' spike counts; one that had no batch counts nothing."""
    statistics.images = int(total(torch.tensor(statistics.images, device=device)))
    shapes = snn.shapes(shape)
    for i, name in {0: "input", **snn.graph.labels}.items():
        nothing = torch.zeros(shapes[i], dtype=torch.float64, device=device)
        statistics.maps[name] = total(statistics.maps.get(name, nothing))


def spike_metrics(spikes: dict[str, float]) -> dict[str, float]:
    """As metrics of their own group."""
    return {f"spikes/{name}": value for name, value in spikes.items()}


def ann_energy(ann: nn.Module, shape: tuple[int, int, int]) -> float:
    """Picojoules per image of the ANN: a multiply-accumulate at every synapse."""
    snn = stdb.convert(ann, stdb.DirectEncoder())
    synapses = stdb.fan_out(snn, shape)
    return stdb.statistics.MULTIPLY_ACCUMULATE_PJ * sum(float(s.sum()) for s in synapses.values())
