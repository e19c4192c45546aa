"""Bias correction: a layer's mean rates, channel by channel, brought to the ANN's mean activations.

Layer after layer, on the spikes of the calibrated and corrected layers below: with r the mean rate
of a channel over images, pixels and T steps, and ā the ANN's mean activation there,

    b ← b + ā − r·A        (of neurons with V = 1:  b ← b + ā/A − r)

and the layer is run again before the next one. Last the output: b ← b + mean(z_ANN − U_T/T). It is
kept only where more calibration images are decided as the ANN decides them: at T = 1 it can harm.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .amplitudes import Activations, Ann, agreement, rows_of
from .fronts import bias_in_front, place_of
from .layerwise import LayerwiseRun
from .network import SpikingNetwork
from .workers import Workers

Present = Callable[[], list[LayerwiseRun]]


@torch.no_grad()
def correct_biases(
    snn: SpikingNetwork, ann: Ann, found: Activations, workers: Workers, present: Present
) -> tuple[bool, tuple[float, float]]:
    """Correct the biases of all layers, and take it back where it does not help.

    Args:
        snn: at its thresholds, its fronts prepared for a bias.
        ann: for T and the layers' channels.
        found: the ANN's mean activations and decisions.
        workers: that share the images.
        present: starts presentations of this worker's batches.

    Returns:
        Whether it was kept; the share of images decided like the ANN without it, and with it.
    """
    before = {label: bias_in_front(snn, label).clone() for label in ann.channels}
    plain = logits_of(snn, ann, present)
    images = workers.total(sum(len(z) for z in plain))
    agreed = agreement(found.decisions, plain, workers)
    moved, shift = correct_all(snn, ann, found, workers, present)
    now = agreement([d.flatten() for d in found.decisions], moved, workers)
    if now > agreed:
        snn.output_correction = shift
    else:
        for label, values in before.items():
            bias_in_front(snn, label).copy_(values)
        for neuron in snn.neurons.values():
            if neuron.correction is not None:
                neuron.correction.zero_()
    decisions = images * ann.pixels[""]
    return now > agreed, (agreed / decisions, now / decisions)


def logits_of(snn: SpikingNetwork, ann: Ann, present: Present) -> list[Tensor]:
    """U_T of every batch, as the biases are."""
    return _logits(snn, present(), ann.steps, lambda *_: None)


@torch.no_grad()
def correct_all(
    snn: SpikingNetwork, ann: Ann, found: Activations, workers: Workers, present: Present
) -> tuple[list[Tensor], Tensor]:
    """Correct the biases of all layers and of the output.

    Returns:
        U_T of every batch then, (decisions, classes), and what the output's bias was given.
    """

    def correct(label: str, runs: list[LayerwiseRun]) -> None:
        neuron, i = snn.neurons[label], place_of(snn, label)
        counts = torch.zeros(ann.channels[label], dtype=torch.int64, device=workers.device)
        threshold = float(neuron.threshold)
        for run in runs:
            counts += run.count(i, threshold, ann.steps)
        images = workers.total(sum(len(run.presentation.images) for run in runs))
        rate = workers.sum(counts).double() / (images * ann.pixels[label] * ann.steps)
        assert neuron.amplitude is not None
        assert neuron.correction is not None
        missing = found.mean[label] / neuron.amplitude.double() - rate * threshold
        neuron.correction.copy_(missing)
        bias_in_front(snn, label).add_(neuron.correction)

    corrected = _logits(snn, present(), ann.steps, correct)
    sums = [rows_of(z.double() / ann.steps).sum(1) for z in corrected]
    decisions = workers.total(sum(len(z) for z in corrected)) * ann.pixels[""]
    missing = found.mean[""] - workers.in_order(sums, found.mean[""]) / decisions
    bias = bias_in_front(snn, "")
    shift = missing.to(bias)
    bias.add_(shift)
    return [rows_of(z).t() + shift * ann.steps for z in corrected], shift


def _logits(
    snn: SpikingNetwork,
    runs: list[LayerwiseRun],
    timesteps: int,
    correct: Callable[[str, list[LayerwiseRun]], None],
) -> list[Tensor]:
    """U_T of every batch, each layer corrected before it is run for those above."""
    for i, label in snn.graph.labels.items():
        correct(label, runs)
        for run in runs:
            run.to_output = True
            run.finish(i, float(snn.neurons[label].threshold), timesteps, False)
    return [run.logits(timesteps) for run in runs]
