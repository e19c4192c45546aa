"""Layer after layer: calibration images presented so that a layer runs when those below are done.

The spike trains of the layers below are kept as bits, as far as memory allows, so that a layer is
computed as often as it is looked at, and not once for every layer above it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import kernels
from .kernels.layout import to_matrix
from .network import SpikingNetwork
from .operators import Value, dense
from .operators.maximum import MaxPool
from .presentation import Presentation, total
from .spikes import Spikes


class Room:
    """Bytes that spike trains may still take."""

    def __init__(self, size: int) -> None:
        self.left = size

    def take(self, size: int) -> bool:
        """Whether there was room for ``size`` bytes, now taken."""
        if size > self.left:
            return False
        self.left -= size
        return True


class LayerwiseRun:
    """The spike trains of one batch, as bits: node → one packed matrix a chunk.

    Where there is no room for a layer's train, it is run again in every pass; chunks come in order.
    """

    def __init__(self, presentation: Presentation, room: Room) -> None:
        self.presentation, self.room = presentation, room
        self.graph = presentation.network.graph
        self.trains: dict[int, list[Tensor]] = {}
        self.thresholds: dict[int, float] = {}  # of the layers that are done
        self.shapes: dict[int, torch.Size] = {}
        self.membranes: dict[int, Tensor] = {}  # of layers that run, and their last chunk
        self.running: dict[int, tuple[int, Spikes]] = {}
        self.to_output = False  # whether the output is wanted too
        self.sums: dict[int, Tensor] = {}  # of max-poolings, and their last chunk
        self.pooled: dict[int, tuple[int, Tensor]] = {}

    def chunks(self, timesteps: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of every chunk."""
        size = self.presentation.chunk
        for start in range(0, timesteps, size):
            yield start, min(start + size, timesteps)

    def value(self, i: int, start: int, stop: int) -> Value:
        """A node's value in a chunk."""
        presentation = self.presentation
        node = self.graph.nodes[i]
        if not node.inputs:
            return presentation.network.encoder(presentation.images, start, stop, presentation.keys)
        if isinstance(node.operator, MaxPool):
            return self._pool(i, node.operator, start, stop)
        if not node.operator.fires:
            return presentation.apply(i, [self.value(j, start, stop) for j in node.inputs])
        if i in self.trains:
            packed = self.trains[i][start // presentation.chunk]
            shape = torch.Size((stop - start, *self.shapes[i]))
            return Spikes(packed, shape, presentation.real)
        if i not in self.running or self.running[i][0] != start:
            self.running[i] = start, self._run(i, start, stop)
        return self.running[i][1]

    def _pool(self, i: int, pool: MaxPool, start: int, stop: int) -> Tensor:
        """What max-pooling passes on in a chunk; chunks come in order, each maybe twice."""
        if i not in self.pooled or self.pooled[i][0] != start:
            x = dense(self.value(self.graph.nodes[i].inputs[0], start, stop))
            x = x.expand(stop - start, *x.shape[1:])
            if start == 0:
                self.sums[i] = torch.zeros_like(x[0])
            module = self.presentation.sites[i].module
            self.pooled[i] = start, pool.accumulate(module, x, self.sums[i])
        return self.pooled[i][1]

    def _run(self, i: int, start: int, stop: int) -> Spikes:
        """Run a layer at its threshold with λ = 1 through a chunk."""
        current = self.current(i, start, stop)
        self.shapes[i] = current.shape[1:]
        matrix = to_matrix(current)
        if start == 0:
            share = self.presentation.sites[i].module.initial_membrane
            self.membranes[i] = torch.full_like(matrix[0], share * self.thresholds[i])
        packed = kernels.fire(matrix, self.membranes[i], self.thresholds[i], 1.0)
        return Spikes(packed, current.shape, current.dtype)

    def current(self, neuron: int, start: int, stop: int) -> Tensor:
        """The weighted input of a spiking layer in a chunk."""
        return dense(self.value(self.graph.nodes[neuron].inputs[0], start, stop))

    def count(self, neuron: int, threshold: float, timesteps: int) -> Tensor:
        """(C,) int64: the spikes of each channel of a layer at its V."""
        self.thresholds[neuron] = threshold
        counts = []
        for start, stop in self.chunks(timesteps):
            spikes = self._run(neuron, start, stop).map()  # (C, …)
            counts.append(spikes.view(len(spikes), -1).sum(1).long())
        self.membranes.clear()
        self.running.clear()
        self.pooled.clear()
        return torch.stack(counts).sum(0)

    def logits(self, timesteps: int) -> Tensor:
        """(B, classes): U_T, when all layers are done."""
        counts: dict[int, Tensor] = {}
        for start, stop in self.chunks(timesteps):
            for i in self.graph.entries:
                own = total(self.value(i, start, stop), stop - start)
                counts[i] = counts[i] + own if i in counts else own
        return self.presentation.integrate([counts[i] for i in self.graph.entries], timesteps)

    def finish(self, neuron: int, threshold: float, timesteps: int, last: bool) -> None:
        """A layer's V is known: keep its spikes, if there is room, and drop what is done with."""
        self.thresholds[neuron] = threshold
        if self.to_output or not last:
            train: list[Tensor] = []
            for start, stop in self.chunks(timesteps):
                packed = self._run(neuron, start, stop).packed
                if not train and not self.room.take(timesteps * packed.shape[1]):
                    break
                train.append(packed)
            if train:
                self.trains[neuron] = train
        self.running.clear()
        self.membranes.clear()
        needed = self._needed(neuron)
        for i in [i for i in self.trains if i not in needed]:
            self.room.left += sum(packed.numel() for packed in self.trains.pop(i))

    def _needed(self, neuron: int) -> set[int]:
        """The nodes that the layers above are computed from, down to those whose spikes are kept.

        Each is looked at once: a deep ResNet has more paths than can be walked.
        """
        seen: set[int] = set()
        waiting = [self.graph.nodes[i].inputs[0] for i in self.graph.neurons if i > neuron]
        waiting += self.graph.entries if self.to_output else []
        while waiting:
            i = waiting.pop()
            if i not in seen:
                seen.add(i)
                if i not in self.trains:  # made again from what is below it
                    waiting.extend(self.graph.nodes[i].inputs)
        return seen


def present_layerwise(
    snn: SpikingNetwork,
    images: Tensor,
    batch_size: int,
    sample_ids: Tensor | None,
    room: Room,
) -> list[LayerwiseRun]:
    """The calibration images in batches, each a presentation at t = 0."""
    if sample_ids is None:
        sample_ids = torch.arange(len(images), device=images.device)
    return [
        LayerwiseRun(snn.present(part, sample_ids=ids), room)
        for part, ids in zip(images.split(batch_size), sample_ids.split(batch_size), strict=True)
        if len(part)
    ]
