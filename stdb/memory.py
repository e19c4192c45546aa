"""How much memory a training step will take, before it takes it.

What stays until the backward pass grows with T: spikes as bits and a snapshot of spike times now
and then, 1/8 + 2/16 byte a neuron-step; for a surrogate of membrane potentials whose steps are one
chunk, currents, too; and of an analogue input the current that is the same at every step. What is
only there while a chunk is worked on grows with the chunk: inputs and outputs of the largest layer
and their gradients, in the products' precision. Where all steps are one chunk, as at few steps, no
output of a chunk before is there, and no gradient of membranes goes on to one; and a layer's
current is kept while layers above it are worked on, so that the peak lies at one of the layers. So
a smaller chunk, or fewer images at once, makes room for a longer presentation.
"""

from collections.abc import Sequence

import torch

from .network import SpikingNetwork
from .neuron import SpikingNeuron
from .operators.maximum import MaxPool
from .operators.resizing import Upsampling
from .operators.shaping import Dropout
from .presentation import STEPS_PER_SNAPSHOT, default_chunk

OVERHEAD = 64 << 20  # what allocators and libraries keep beside, measured


def training_memory(
    snn: SpikingNetwork,
    image_shape: Sequence[int],
    timesteps: int,
    batch_size: int,
    chunk: int | None = None,
    *,
    continued: bool = False,
) -> int:
    """Peak bytes of a training step over model, gradients and optimiser state, to about a fifth.

    Args:
        snn: the network.
        image_shape: (C, H, W), (C, L) or (n,).
        timesteps: T; with truncated BPTT the steps between two backward passes.
        batch_size: images presented at once.
        chunk: time steps computed at once; by default what the network would choose.
        continued: steps went before these, as with truncated BPTT.
    """
    graph, sizes = snn.graph, [shape.numel() for shape in snn.shapes(image_shape)]
    real, device = next(snn.parameters()).element_size(), next(snn.parameters()).device
    chunk = chunk or snn.chunk or default_chunk(batch_size, image_shape, device)
    chunk = min(chunk, timesteps)
    alone = chunk == timesteps
    earlier = continued or not alone  # steps before a chunk: its gradient and membranes are kept
    carry = real if earlier else 0
    moved = 2 if snn.precision == torch.bfloat16 else real
    constant = bool(getattr(snn.encoder, "constant", False))
    per_image = 0.0
    of_currents = dict.fromkeys(graph.body, 0)  # that are kept: neuron node → bytes
    for i, neuron in zip(graph.neurons, snn.neurons.values(), strict=True):
        (source,) = graph.nodes[i].inputs
        product = graph.nodes[source].operator
        kept = real if snn.precision is None or not (product.learns and product.lowered) else 2
        per_image += sizes[i] * (carry + _of_neuron(neuron, timesteps, chunk, real, continued))
        if alone and neuron.needs_membrane and not (constant and graph.of_input[source]):
            of_currents[i] = sizes[i] * timesteps * kept  # of an input, one for all steps
    for i, node in enumerate(graph.nodes):
        if isinstance(node.operator, MaxPool):  # sums, and those before each chunk
            per_image += sizes[node.inputs[0]] * real * (1 + timesteps / chunk)
        if constant and graph.of_input[i] and node.inputs:
            per_image += sizes[i] * real
        if isinstance(node.operator, Dropout) and snn.module(i).p > 0:
            per_image += sizes[i] * real
    largest, below, weights = 0, 0, 0
    for i in graph.body:
        node = graph.nodes[i]
        around = 0
        if node.operator.learns or isinstance(node.operator, Upsampling):
            # of one chunk, an input in the weights' type is there as events, too
            around = (3 if alone and moved == real else 2) * sizes[node.inputs[0]]
            around += (1 if alone and moved < real else 2) * sizes[i]
            around *= chunk * (moved if node.operator.lowered else real)
        below += of_currents[i]
        largest = max(largest, below + around)
        if node.operator.learns:
            weights += snn.module(i).weight.numel() * real
    return int(batch_size * (per_image + largest) + weights + OVERHEAD)


def _of_neuron(
    neuron: SpikingNeuron, timesteps: int, chunk: int, real: int, continued: bool
) -> float:
    """Bytes that stay for a neuron until the backward pass, without a current."""
    taken = real + timesteps / 8  # membrane; bits
    if neuron.surrogate.needs_ages:
        taken += 2 + timesteps * 2 / max(chunk, STEPS_PER_SNAPSHOT)
    if neuron.needs_membrane:
        taken += real * (timesteps / chunk - (not continued))  # those before a chunk; U_0 is one
    return taken


def largest_chunk(
    snn: SpikingNetwork,
    image_shape: Sequence[int],
    timesteps: int,
    batch_size: int,
    available: int,
    *,
    continued: bool = False,
) -> int | None:
    """The largest chunk, up to the default, with which a step fits ``available`` bytes; or None."""
    device = next(snn.parameters()).device
    chunk = min(default_chunk(batch_size, image_shape, device), timesteps)
    settings = (snn, image_shape, timesteps, batch_size)
    while training_memory(*settings, chunk, continued=continued) > available:
        if chunk == 1:
            return None
        chunk //= 2
    return chunk
