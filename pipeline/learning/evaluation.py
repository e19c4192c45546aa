"""Accuracy and spikes of a network over a split, shared among the workers with exact counts.

A worker gets whole batches, the same for any number of workers, so the counts are the same, too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import stdb
from pipeline.data import Samples
from pipeline.jobs.worker import Worker
from pipeline.params import EvaluateConvertedParams
from stdb import first_confident, logit_scale, scaled_losses

CONFIDENCES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)  # at which leaving early is looked at
DIAGNOSED = 64  # images of a diagnosis
EACH_LEVEL = 10  # levels of activations up to which each is looked at; then powers of two


@dataclass(frozen=True)
class Evaluation:
    """What one pass over a split gives.

    Attributes:
        accuracy: fraction of correct predictions after step t, for t = 1 … T.
        spikes: layer → spikes per neuron and image (Fig. 3).
        mean_spikes: the same of all layers' neurons together.
        energy: picojoules per image (45 nm CMOS).
        operations: synaptic operations per image.
        confusion: images by class and by the class decided for, after T steps.
        exits: leaving early: confidence → mean steps, and fraction of correct decisions.
    """

    accuracy: list[float]
    spikes: dict[str, float]
    mean_spikes: float
    energy: float
    operations: float
    confusion: list[list[int]]
    exits: dict[float, tuple[float, float]]

    def spiking(self) -> dict[str, Any]:
        """What a metrics file says of the spikes after T steps."""
        return {
            "spikes_per_neuron": self.spikes,
            "mean_spikes": self.mean_spikes,
            "synaptic_operations": self.operations,
            "energy_pj": self.energy,
            "energy_delay": self.energy * len(self.accuracy),
        }


def longest(timesteps: int) -> int:
    """How far the accuracy of a network for so many steps is shown: also beyond them."""
    return max(16, 2 * timesteps)


@torch.no_grad()
def evaluate_ann(worker: Worker, ann: nn.Module, split: Samples, batch_size: int) -> float:
    """Accuracy of an ANN."""
    device = next(ann.parameters()).device
    ann.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for batch in split.stream(worker.batches(len(split), batch_size), device):
        correct += (ann(batch.pixels()).argmax(1) == batch.labels).sum()
    return worker.all_reduce(correct).item() / len(split)


@torch.no_grad()
def evaluate_snn(
    worker: Worker, snn: stdb.SpikingNetwork, split: Samples, timesteps: int, batch_size: int
) -> Evaluation:
    """Accuracy after every step and spikes of every layer; one presentation gives them all."""
    device = next(snn.parameters()).device
    snn.eval()
    classes = len(split.classes)
    correct = torch.zeros(timesteps, dtype=torch.int64, device=device)
    confusion = torch.zeros(classes**2, dtype=torch.int64, device=device)
    exits = torch.zeros(len(CONFIDENCES), 2, dtype=torch.int64, device=device)
    positions = worker.batches(len(split), batch_size)
    with stdb.record_spikes(snn) as statistics:
        for number, batch in enumerate(split.stream(positions, device)):
            shown = number * batch_size * worker.world
            worker.progress(f"T = {timesteps}: {shown} of {len(split)} images presented")
            images = batch.pixels()
            logits = snn.logits_over_time(images, timesteps, sample_ids=batch.ids)
            decided = logits.argmax(2)  # (T, B)
            right = decided == batch.labels
            correct += right.sum(1)
            pairs = batch.labels * classes + decided[-1]
            confusion += torch.bincount(pairs, minlength=classes**2)
            exits += _exits(logits.softmax(2), right)
    _merge(worker, statistics, split.shape)
    accuracy = (worker.all_reduce(correct).double() / len(split)).tolist()
    operations = sum(statistics.synaptic_operations().values())
    means = (worker.all_reduce(exits).double() / len(split)).tolist()
    spikes = statistics.spikes_per_neuron()
    neurons = {name: statistics.maps[name].numel() for name in spikes}
    return Evaluation(
        accuracy,
        spikes,
        sum(spikes[name] * neurons[name] for name in spikes) / sum(neurons.values()),
        statistics.energy(),
        operations,
        worker.all_reduce(confusion).view(classes, classes).tolist(),
        {c: (steps, right) for c, (steps, right) in zip(CONFIDENCES, means, strict=True)},
    )


def levels_of(timesteps: Sequence[int], most: int) -> list[int]:
    """Numbers of levels to compare with: these T, powers of two, and all up to a small T.

    Args:
        timesteps: T, from the largest on.
        most: the largest number, which is among them.
    """
    powers = {2**k for k in range(most.bit_length())}
    few = set(range(1, min(timesteps[0], EACH_LEVEL) + 1))
    return sorted(n for n in powers | few | {*timesteps, most} if n <= most)


@torch.no_grad()
def evaluate_quantised(
    worker: Worker,
    snn: stdb.SpikingNetwork,
    split: Samples,
    levels: Sequence[int],
    batch_size: int,
) -> dict[int, float]:
    """Number of levels → accuracy of the ANN whose activations have so many."""
    device = next(snn.parameters()).device
    correct = torch.zeros(len(levels), dtype=torch.int64, device=device)
    for batch in split.stream(worker.batches(len(split), batch_size), device):
        images = batch.pixels()
        for k, count in enumerate(levels):
            logits = stdb.quantised_logits(snn, images, count, sample_ids=batch.ids)
            correct[k] += (logits.argmax(1) == batch.labels).sum()
    shares = (worker.all_reduce(correct).double() / len(split)).tolist()
    return dict(zip(levels, shares, strict=True))


@torch.no_grad()
def fitting_logit_scale(
    worker: Worker, snn: stdb.SpikingNetwork, split: Samples, timesteps: int, batch_size: int
) -> float:
    """The factor of U_T with which softmax(U_T) is as sure of a split as it is right."""
    device = next(snn.parameters()).device
    snn.eval()
    losses = torch.zeros_like(scaled_losses(torch.zeros(1, 2), torch.zeros(1).long()))
    losses = losses.to(device)
    for batch in split.stream(worker.batches(len(split), batch_size), device):
        logits = snn(batch.pixels(), timesteps, sample_ids=batch.ids)
        losses += scaled_losses(logits, batch.labels)
    return logit_scale(worker.all_reduce(losses))


@torch.no_grad()
def fitting_units(
    worker: Worker,
    ann: nn.Module,
    snn: stdb.SpikingNetwork,
    split: Samples,
    timesteps: int,
    batch_size: int,
) -> float:
    """The factor that brings U_T/T nearest to the ANN's logits: Σ u·z / Σ u², of six digits."""
    device = next(snn.parameters()).device
    ann.eval()
    snn.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in split.stream(worker.batches(len(split), batch_size), device):
        z = ann(batch.pixels()).double()
        u = snn(batch.pixels(), timesteps, sample_ids=batch.ids).double() / timesteps
        sums += torch.stack([(u * z).sum(), (u * u).sum()])
    product, square = worker.all_reduce(sums).tolist()
    return float(f"{product / square:.6g}") if product > 0 else 1.0


def best_scale(
    worker: Worker,
    snn: stdb.SpikingNetwork,
    validation: Samples,
    timesteps: int,
    params: EvaluateConvertedParams,
) -> float:
    """The threshold scale at which the converted network is most accurate after so many steps."""
    accuracies: dict[float, float] = {}
    for scale in params.scales:
        snn.scale_thresholds(scale)
        evaluation = evaluate_snn(worker, snn, validation, timesteps, params.batch_size)
        accuracies[scale] = evaluation.accuracy[-1]
        worker.say(
            f"scale {scale:<5} T = {timesteps}: validation {accuracies[scale]:.1%}",
        )
    return max(accuracies, key=lambda scale: accuracies[scale])


def _exits(probabilities: Tensor, right: Tensor) -> Tensor:
    """(confidences, 2): steps until confidence, and right decisions then, summed over images.

    Args:
        probabilities: (T, B, classes).
        right: (T, B), whether the decision after a step is right.
    """
    rows = []
    for confidence in CONFIDENCES:
        steps = first_confident(probabilities, confidence, len(probabilities))
        rows.append(torch.stack([steps.sum(), right.gather(0, steps[None] - 1).sum()]))
    return torch.stack(rows)


def diagnose(
    ann: nn.Module, snn: stdb.SpikingNetwork, split: Samples, timesteps: int
) -> list[dict[str, float | str]]:
    """``stdb.diagnose`` on a few of the images, as rows."""
    device = next(snn.parameters()).device
    few = split.take(torch.arange(min(DIAGNOSED, len(split)), device=split.labels.device))
    few = few.to(device)
    layers = stdb.diagnose(ann.to(device), snn, few.pixels(), timesteps, sample_ids=few.ids)
    return [vars(row) | {"hint": row.hint} for row in layers]


def chance(classes: int, images: int) -> float:
    """The accuracy that guessing does not exceed in 39 of 40 times."""
    guess = 1 / classes
    return guess + 2 * math.sqrt(guess * (1 - guess) / images)


def collapse(accuracy: float, classes: int, images: int, rows: Sequence[dict[str, Any]]) -> str:
    """The diagnosis as text, where an accuracy is at chance level; else empty."""
    if accuracy > chance(classes, images):
        return ""
    lines = [
        f"test accuracy {accuracy:.1%} is at chance level for {classes} classes; layer by layer:",
        f"  {'layer':24} {'V':>8} {'rate':>7} {'dead':>6} {'full':>6} {'corr.':>6} {'U/V':>6}",
    ]
    lines += [
        f"  {row['layer']:24} {row['threshold']:8.4g} {row['rate']:7.2%} {row['dead']:6.0%} "
        f"{row['saturated']:6.0%} {row['correlation']:6.2f} {row['residual']:6.2f}"
        for row in rows
    ]
    first = next((str(row["hint"]) for row in rows if row["hint"]), "")
    return "\n".join([*lines, *([f"  the first layer that is ill: {first}"] if first else [])])


def _merge(worker: Worker, statistics: stdb.SpikeStatistics, shape: tuple[int, int, int]) -> None:
    """Sum the workers' spike counts; one that had no batch counts nothing."""
    snn = statistics.network
    device = next(snn.parameters()).device
    images = torch.tensor(statistics.images, device=device)
    statistics.images = int(worker.all_reduce(images))
    shapes = snn.shapes(shape)
    for i, name in {0: "input", **snn.graph.labels}.items():
        nothing = torch.zeros(shapes[i], dtype=torch.float64, device=device)
        statistics.maps[name] = worker.all_reduce(statistics.maps.get(name, nothing))


def spike_metrics(spikes: dict[str, float]) -> dict[str, float]:
    """As metrics of their own group."""
    return {f"spikes/{name}": value for name, value in spikes.items()}
