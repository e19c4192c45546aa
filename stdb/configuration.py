"""What is chosen anew for a spiking network that is there: how it is driven, and how it learns."""

import torch

from .encoding import Encoder, limits_of
from .network import SpikingNetwork
from .surrogate import STDB, Surrogate
from .units import INPUT, change_unit


@torch.no_grad()
def configure(
    snn: SpikingNetwork,
    encoder: Encoder,
    surrogate: Surrogate = STDB(),  # noqa: B008 (frozen)
    leak: float = 1.0,
    *,
    temporal_gradient: bool = True,
    learn_thresholds: bool = False,
    learn_leaks: bool = False,
) -> None:
    """Set what ``convert`` takes beside the ANN, of a network that a file gave, say.

    Weights, biases, V, U_0 and units stay, but that the first weights hold the encoder's limits.

    Args:
        snn: the network.
        encoder: gives each step's input.
        surrogate: stands in for ∂O/∂U.
        leak: λ of every layer, in (0, 1]; 1 gives IF neurons.
        temporal_gradient: see ``SpikingNeuron``.
        learn_thresholds: V of every layer is a parameter that learns.
        learn_leaks: λ of every layer is a parameter that learns.

    Raises:
        ValueError: a leak that is none.
    """
    if not 0 < leak <= 1:
        raise ValueError(f"leak is {leak}; allowed: above 0, at most 1 (1 is the IF neuron)")
    before = torch.tensor(snn.limits or (1.0,), dtype=torch.float64)
    limits = torch.tensor(limits_of(encoder) or (1.0,), dtype=torch.float64)
    if before.tolist() != limits.tolist():
        change_unit(snn.graph, snn.net, INPUT, limits / before)
        snn.untouched = {}  # they hold the limits of before
    snn.encoder, snn.limits = encoder, limits_of(encoder)
    for neuron in snn.neurons.values():
        neuron.surrogate, neuron.temporal_gradient = surrogate, temporal_gradient
        neuron.leak.fill_(leak)
        neuron.threshold.requires_grad_(learn_thresholds)
        neuron.leak.requires_grad_(learn_leaks)
