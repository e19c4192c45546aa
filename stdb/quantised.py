r"""The ANN with as many levels as there are steps: what T steps can say of its activations.

.. math:: y = A\,\mathrm{clamp}(\lfloor a\,T/A + f \rfloor, 0, T)/T

a is the ANN's activation, A what a spike of the layer stands for at a rate of 1, f = U_0/V. It is
what neurons say whose current is the same at every step, so that only the rounding to T levels and
the largest A are lost, and nothing by when spikes come. An ANN of QCFS with L = T is that already.
"""

import torch
from torch import Tensor

from .checking import activations
from .encoding import check_timesteps, mean_input
from .network import SpikingNetwork
from .randomness import sample_keys


@torch.no_grad()
def quantised_logits(
    snn: SpikingNetwork, images: Tensor, levels: int, *, sample_ids: Tensor | None = None
) -> Tensor:
    """(B, classes): logits of the ANN whose activations have so many levels above 0.

    It runs in rates on the weights of the spiking network, whose V, units and A of each channel say
    A: a layer's rate is clamp(⌊I·T/V + f⌋, 0, T)/T of its current I. So a network without units is
    compared as it is, also where its branches have different A, and its logits are in units of the
    last layers' A. What bias correction has added is left out. A leak is not in it.

    Args:
        snn: the converted network, at the thresholds that are in question.
        images: (B, C, H, W), (B, C, L) or (B, n); its Poisson spikes are replaced by their mean.
        levels: T, 1 or more.
        sample_ids: (B,) of the images, for an encoder of your own, whose mean over T is taken.
    """
    check_timesteps(levels)
    neurons = snn.neurons
    labels = snn.graph.labels

    def rate(i: int, current: Tensor) -> Tensor:
        neuron = neurons[labels[i]]
        if neuron.correction is not None:
            current = current - _by_channel(neuron.correction, current)
        counts = (current / neuron.threshold * levels + neuron.initial_membrane).floor_()
        return counts.clamp_(0, levels).div_(levels)

    if sample_ids is None:
        sample_ids = torch.arange(len(images), device=images.device)
    was_training = snn.training
    snn.eval()
    try:
        pixels = mean_input(images, snn.encoder, levels, sample_keys(sample_ids, 0))
        *_, (_, logits) = activations(snn.graph.nodes, snn.net, pixels, rate)
    finally:
        snn.train(was_training)
    if snn.output_correction is not None:
        logits = logits - _by_channel(snn.output_correction, logits)
    return logits


def _by_channel(values: Tensor, like: Tensor) -> Tensor:
    """(C,) → (C, 1, …), to go with (B, C, …)."""
    return values.view(-1, *[1] * (like.dim() - 2))
