"""Diagnosis of a conversion: where, layer by layer, a spiking network stops following its ANN.

An IF neuron's firing rate approximates the ReLU that it stands for (§2.3). A conversion that
collapses does so in some layer, and all layers above it only pass that on: this finds it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .checking import activations
from .conversion import convert
from .encoding import in_units
from .evaluation import all_images
from .graph import INPUT
from .kernels.layout import from_matrix
from .network import SpikingNetwork
from .operators import Value, dense
from .presentation import Presentation
from .spikes import Spikes

NEARLY_EVERY = 0.9  # of the steps: a neuron that spikes so often cannot say "more"
SILENT = 1e-3  # spikes per neuron and step below which a layer has collapsed
MANY = 0.1  # share of saturated neurons that is too large
UNSAID = 1.0  # V of potential per neuron above which more was left than a rounding
UNLIKE = 0.5  # correlation below which rates say little about activations


@dataclass(frozen=True)
class LayerDiagnosis:
    """One spiking layer beside the ReLU that it stands for.

    Attributes:
        layer: its name.
        threshold: V.
        rate: spikes per neuron and step.
        correlation: Pearson's, of the ANN's activations with the spike counts, times A where each
            channel has its own, over images and neurons; 0 where either is constant.
        dead: share of the neurons that spiked for no image.
        saturated: share of (image, neuron) that spiked in nearly every step.
        residual: mean of max(U_T − V·O_T, 0) / V: spikes' worth of potential that T steps left
            unsaid.
    """

    layer: str
    threshold: float
    rate: float
    correlation: float
    dead: float
    saturated: float
    residual: float

    @property
    def hint(self) -> str:
        """What is wrong with the layer and what helps, in plain words; empty where it is well."""
        if self.rate < SILENT:
            return (
                f"{self.layer} fires {self.rate:.2%} of the steps: lower its threshold scale, or "
                "present more steps"
            )
        if self.saturated > MANY:
            return (
                f"{self.saturated:.0%} of {self.layer} spike in nearly every step and cannot say "
                "more: raise its threshold scale"
            )
        if self.residual > UNSAID:
            return (
                f"the neurons of {self.layer} are left with a potential of {self.residual:.3g} V "
                "on average, spikes that they had no steps for: its threshold is too small for its "
                "input; balance it, or raise its threshold scale"
            )
        if self.correlation < UNLIKE:
            return (
                f"the rates of {self.layer} say little about the ANN's activations (correlation "
                f"{self.correlation:.2f}): present more steps, or look at the layers below it"
            )
        return ""


class _Sums:
    """What has been seen of one layer: sums over images and neurons, in float64."""

    def __init__(self) -> None:
        self.count, self.sums = 0, torch.zeros(6, dtype=torch.float64)
        self.map: Tensor | None = None
        self.saturated, self.residual = 0, 0.0

    def add(
        self,
        activation: Tensor,
        counts: Tensor,
        potential: Tensor,
        steps: int,
        amplitude: Tensor | None,
    ) -> None:
        """A batch, each (B, C, …); ``potential`` is U_T / V − O_T, ``amplitude`` (C,) or None."""
        spikes = counts.double()
        x, y = activation.double(), spikes
        if amplitude is not None:
            y = spikes * amplitude.double().view(-1, *[1] * (spikes.dim() - 2))
        parts = (x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum(), spikes.sum())
        self.sums += torch.stack(parts).cpu()
        total = spikes.sum(0)
        self.map = total if self.map is None else self.map + total
        self.saturated += int((spikes >= NEARLY_EVERY * steps).sum())
        self.residual += float(potential.clamp(min=0).double().sum())
        self.count += x.numel()

    def row(self, layer: str, threshold: float, steps: int) -> LayerDiagnosis:
        """The layer's diagnosis."""
        assert self.map is not None
        n = self.count
        x, y, xx, yy, xy, spikes = self.sums.tolist()
        spread = (n * xx - x * x) * (n * yy - y * y)
        return LayerDiagnosis(
            layer,
            threshold,
            rate=spikes / n / steps,
            correlation=(n * xy - x * y) / spread**0.5 if spread > 0 else 0.0,
            dead=float((self.map == 0).double().mean()),
            saturated=self.saturated / n,
            residual=self.residual / n,
        )


@torch.no_grad()
def diagnose(
    ann: nn.Module,
    snn: SpikingNetwork,
    images: Tensor | Iterable[Any],
    timesteps: int,
    *,
    sample_ids: Tensor | None = None,
    batch_size: int = 32,
) -> list[LayerDiagnosis]:
    """Compare every spiking layer with the ReLU that it stands for.

    Args:
        ann: the network that ``snn`` was converted from, on the same device, or a converted one
            whose spikes stand for 1.
        snn: at the thresholds that are in question.
        images: (N, C, H, W), or batches of them, as a DataLoader gives.
        timesteps: T.
        sample_ids: as for ``SpikingNetwork.present``.
        batch_size: presented at once.

    Returns:
        A row a layer, in the order of a step.
    """
    images = all_images(images).to(next(snn.parameters()).device)
    graph, sums = snn.graph, {label: _Sums() for label in snn.graph.labels.values()}
    if sample_ids is None:
        sample_ids = torch.arange(len(images), device=images.device)
    counts: dict[str, Tensor] = {}

    def count(_: Presentation, name: str, spikes: Value) -> None:
        if name == INPUT:
            return
        spike_counts = spikes.counts() if isinstance(spikes, Spikes) else dense(spikes).sum(0)
        counts[name] = counts[name] + spike_counts if name in counts else spike_counts

    if isinstance(ann, SpikingNetwork):
        twin = ann
    else:  # the same graph, whose weights hold no units
        twin = convert(ann, snn.encoder, example=images[:1]).eval()
    names = twin.graph.labels
    if [*names.values()] != [*graph.labels.values()]:
        raise ValueError(
            f"the spiking network has the layers {', '.join(graph.labels.values())}, the ANN those "
            f"of {', '.join(names.values())}; allowed: the ANN that it was made from"
        )
    was_training = snn.training
    snn.eval()
    snn.observers.append(count)
    try:
        for batch, ids in zip(images.split(batch_size), sample_ids.split(batch_size), strict=True):
            counts.clear()
            pixels = in_units(batch, twin.encoder)
            passed = activations(twin.graph.nodes, twin.net, pixels)
            values = {names[i]: value for i, value in passed if i in names}
            presentation = snn.present(batch, sample_ids=ids)
            presentation.advance(timesteps)
            for i, label in graph.labels.items():
                shape = (1, *counts[label].shape)
                membrane = from_matrix(presentation.membrane[i][None], shape)[0]
                potential = membrane / presentation.threshold[i]
                potential = potential - (potential > 1).to(potential.dtype)
                amplitude = snn.neurons[label].amplitude
                sums[label].add(values[label], counts[label], potential, timesteps, amplitude)
    finally:
        snn.observers.remove(count)
        snn.train(was_training)
    thresholds = snn.thresholds
    return [
        layer_sums.row(label, thresholds[label], timesteps) for label, layer_sums in sums.items()
    ]
