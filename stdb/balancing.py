"""Threshold balancing: Algorithm 1 in one pass over the layers.

V_l is the largest weighted input W·O^{l−1}_t that layer l sees over the calibration images and all
t, with λ = 1, no dropout, and all lower layers already at their V. The spike trains of the layers
below are kept as bits, so every layer is computed twice (once for its maximum, once for its spikes)
and not once for every layer above it.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .conversion import residual_layers
from .layout import to_matrix
from .network import Presentation, SpikingNetwork
from .neuron import fire
from .spikes import Spikes
from .synapse import INPUT, NEURON, Value, dense


@torch.no_grad()
def balance_thresholds(
    snn: SpikingNetwork,
    images: Tensor,
    timesteps: int,
    *,
    batch_size: int = 64,
    residual_blocks: bool = False,
    sample_ids: Tensor | None = None,
    reduce_max: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, float]:
    """Set every V of ``snn`` by Algorithm 1; returns layer name → V.

    Args:
        snn: a converted network; its thresholds are replaced.
        images: (N, C, H, W), calibration images from the training split, shuffled.
        timesteps: T of the calibration.
        batch_size: images presented at once; does not change the result.
        residual_blocks: balance the layers in basic blocks too; the paper leaves them at 1 (§4.2).
        sample_ids: (N,) int64, the images' random streams.
        reduce_max: maximum over several workers that each hold a part of the images; given and
            returning a 0-d tensor.
        progress: called with (layer, V) as each is found.

    Raises:
        ValueError: a layer's largest weighted input is not above 0; the message names the layer.
    """
    if timesteps < 1:
        raise ValueError(f"timesteps is {timesteps}; allowed: 1 or more")
    if len(images) < 1:
        raise ValueError("no calibration images")
    keep_at_one = set() if residual_blocks else residual_layers(snn)
    training = snn.training
    snn.eval()
    try:
        batches = _present(snn, images, batch_size, sample_ids)
        found = {}
        labels = snn.graph.labels
        for position, i in enumerate(snn.graph.neurons):
            if labels[i] in keep_at_one:
                value = 1.0
            else:
                maxima = [
                    to_matrix(batch.current(i, start, stop)).max()
                    for batch in batches
                    for start, stop in batch.chunks(timesteps)
                ]
                largest = torch.stack(maxima).max()  # NaN if any is
                if reduce_max is not None:
                    largest = reduce_max(largest)
                value = float(largest)
                if not 0 < value < float("inf"):
                    raise ValueError(
                        f"layer {labels[i]} has a largest weighted input of {value}, so no "
                        "threshold can be balanced; it is dead or has diverged: present more "
                        "steps, or look at the ANN's weights and the layers below it"
                    )
            found[labels[i]] = value
            last = position == len(snn.graph.neurons) - 1
            for batch in batches:
                if not last:
                    batch.keep_spikes(i, value, timesteps)
                batch.forget(i)
            if progress is not None:
                progress(labels[i], value)
        snn.set_thresholds(found, balanced=set(found) - keep_at_one)
    finally:
        snn.train(training)
    return found


def _present(
    snn: SpikingNetwork, images: Tensor, batch_size: int, sample_ids: Tensor | None
) -> list["_Calibration"]:
    """The calibration images in batches, each a presentation at t = 0."""
    if sample_ids is None:
        sample_ids = torch.arange(len(images), device=images.device)
    # V = 1 is a placeholder until a layer's own is known
    snn.set_thresholds(dict.fromkeys(snn.thresholds, 1.0), balanced=())
    return [
        _Calibration(snn.present(part, sample_ids=ids))
        for part, ids in zip(images.split(batch_size), sample_ids.split(batch_size), strict=True)
    ]


class _Calibration:
    """The spike trains of one batch, as bits: node → one packed matrix a chunk."""

    def __init__(self, presentation: Presentation) -> None:
        self.presentation = presentation
        self.trains: dict[int, list[Tensor]] = {}
        self.shapes: dict[int, tuple[int, ...]] = {}

    def chunks(self, timesteps: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of every chunk."""
        size = self.presentation.network._chunk_size(self.presentation)
        for start in range(0, timesteps, size):
            yield start, min(start + size, timesteps)

    def value(self, i: int, start: int, stop: int) -> Value:
        """A node's value in a chunk, from the spike trains below it."""
        presentation = self.presentation
        node = presentation.network.graph.nodes[i]
        if node.kind == INPUT:
            return presentation.network.encoder(presentation.images, start, stop, presentation.keys)
        if node.kind == NEURON:
            size = presentation.network._chunk_size(presentation)
            packed = self.trains[i][start // size]
            shape = torch.Size((stop - start, *self.shapes[i]))
            return Spikes(packed, shape, presentation.images.dtype)
        return presentation.apply(i, [self.value(j, start, stop) for j in node.inputs])

    def current(self, neuron: int, start: int, stop: int) -> Tensor:
        """The weighted input of a spiking layer in a chunk."""
        source = self.presentation.network.graph.nodes[neuron].inputs[0]
        return dense(self.value(source, start, stop))

    def keep_spikes(self, neuron: int, threshold: float, timesteps: int) -> None:
        """Run a layer at its threshold with λ = 1, and keep its spikes."""
        membrane: Tensor | None = None
        self.trains[neuron] = []
        for start, stop in self.chunks(timesteps):
            current = self.current(neuron, start, stop)
            self.shapes[neuron] = tuple(current.shape[1:])
            matrix = to_matrix(current, copy=True)
            membrane = torch.zeros_like(matrix[0]) if membrane is None else membrane
            self.trains[neuron].append(fire(matrix, membrane, threshold, 1.0))

    def forget(self, done: int) -> None:
        """Drop the spike trains that no layer above ``done`` reads."""
        nodes = self.presentation.network.graph.nodes
        needed: set[int] = set()
        frontier = [nodes[i].inputs[0] for i in self.presentation.network.graph.neurons if i > done]
        while frontier:
            i = frontier.pop()
            if nodes[i].kind == NEURON:
                needed.add(i)
            else:
                frontier.extend(nodes[i].inputs)
        for i in [i for i in self.trains if i not in needed]:
            del self.trains[i]
