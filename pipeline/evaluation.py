"""Accuracy and spikes of a network over a split, shared among the workers with exact counts."""

from dataclasses import dataclass

import torch
from torch import nn

import stdb
from pipeline.data import Split, normalise
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
def evaluate_ann(ann: nn.Module, split: Split, batch_size: int, rank: int, world: int) -> float:
    """Accuracy of an ANN."""
    device = next(ann.parameters()).device
    ann.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for batch in split.share(rank, world).batches(batch_size):
        logits = ann(normalise(batch.images.to(device)))
        correct += (logits.argmax(1) == batch.labels.to(device)).sum()
    return total(correct).item() / len(split)


@torch.no_grad()
def evaluate_snn(
    snn: stdb.SpikingNetwork,
    split: Split,
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
        for batch in split.share(rank, world).batches(batch_size):
            images = normalise(batch.images.to(device))
            logits = snn.logits_over_time(images, timesteps, sample_ids=batch.ids.to(device))
            correct += (logits.argmax(2) == batch.labels.to(device)).sum(1)  # (T, B) → (T,)
    _merge(statistics, device)
    accuracy = (total(correct).double() / len(split)).tolist()
    operations = sum(statistics.synaptic_operations().values())
    return Evaluation(accuracy, statistics.spikes_per_neuron(), statistics.energy(), operations)


def _merge(statistics: stdb.SpikeStatistics, device: torch.device) -> None:
    """Sum the workers' spike counts."""
    statistics.images = int(total(torch.tensor(statistics.images, device=device)))
    for name, counts in statistics.maps.items():
        statistics.maps[name] = total(counts)


def spike_metrics(spikes: dict[str, float]) -> dict[str, float]:
    """As metrics of their own group."""
    return {f"spikes/{name}": value for name, value in spikes.items()}


def ann_energy(ann: nn.Module, shape: tuple[int, int, int]) -> float:
    """Picojoules per image of the ANN: a multiply-accumulate at every synapse."""
    snn = stdb.convert(ann, stdb.DirectEncoder())
    synapses = stdb.fan_out(snn, shape)
    return stdb.statistics.MULTIPLY_ACCUMULATE_PJ * sum(float(s.sum()) for s in synapses.values())
