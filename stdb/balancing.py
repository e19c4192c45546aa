"""Threshold balancing: Algorithm 1 in one pass over the layers.

V_l is the largest weighted input W·O^{l−1}_t that layer l sees over the calibration images and all
t, with λ = 1, no dropout, and all lower layers already at their V. The spike trains of the layers
below are kept as bits, as far as memory allows, so every layer is computed twice (once for its
maximum, once for its spikes) and not once for every layer above it.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .architectures import ResidualBlock
from .evaluation import all_images
from .kernels.layout import to_matrix
from .network import SpikingNetwork, check_timesteps
from .operators import Value, dense
from .operators.maximum import MaxPool
from .presentation import Presentation
from .spikes import Spikes

NOT_FINITE = 0x7F800000  # infinity's bits; NaN's are above
DROPPED_BITS = 13  # of a float32's mantissa; the rest tells values 0.1 % apart from each other


@torch.no_grad()
def balance_thresholds(
    snn: SpikingNetwork,
    images: Tensor | Iterable[Any],
    timesteps: int,
    *,
    batch_size: int = 64,
    percentile: float = 100.0,
    memory: int = 1 << 30,
    residual_blocks: bool = False,
    sample_ids: Tensor | None = None,
    reduce: Callable[[Tensor, str], Tensor] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, float]:
    """Set every V of ``snn`` by Algorithm 1; returns layer name → V.

    Args:
        snn: a converted network; its thresholds are replaced.
        images: (N, C, H, W), calibration images from the training split, shuffled; or batches of
            them, as a DataLoader gives, all of which are taken.
        timesteps: T of the calibration.
        batch_size: images presented at once; does not change the result.
        percentile: V is this percentile of a layer's weighted inputs over images, neurons and time;
            100 is the paper's maximum. Others are found to 0.1 %, from a histogram.
        memory: bytes that spike trains may take. Those that find no room are made again when they
            are needed, so that any number of images and steps fits; it does not change the result.
        residual_blocks: balance the layers in basic blocks too; the paper leaves them at 1 (§4.2).
        sample_ids: (N,) int64, the images' random streams.
        reduce: ``(tensor, "max" or "sum")`` → the same over several workers that each hold a part
            of the images, which may be none.
        progress: called with (layer, V) as each is found.

    Raises:
        ValueError: a layer's largest weighted input is not above 0; the message names the layer.
    """
    check_timesteps(timesteps)
    images = all_images(images).to(next(snn.parameters()).device)
    if len(images) < 1 and reduce is None:
        raise ValueError("no calibration images")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile is {percentile}; allowed: above 0, at most 100 (the maximum)")
    keep_at_one = set() if residual_blocks else residual_layers(snn)
    training = snn.training
    snn.eval()
    try:
        batches = _present(snn, images, batch_size, sample_ids, _Room(memory))
        thresholds = {}
        labels = snn.graph.labels
        for position, i in enumerate(snn.graph.neurons):
            if labels[i] in keep_at_one:
                value = 1.0
            else:
                currents = (
                    to_matrix(batch.current(i, start, stop))
                    for batch in batches
                    for start, stop in batch.chunks(timesteps)
                )
                value = _percentile(currents, percentile, reduce, images)
                if not 0 < value < float("inf"):
                    which = (
                        "largest weighted input" if percentile == 100 else f"{percentile} % point"
                    )
                    raise ValueError(
                        f"layer {labels[i]} has a {which} of {value}, so no "
                        "threshold can be balanced; it is dead or has diverged: present more "
                        "steps, or look at the ANN's weights and the layers below it"
                    )
            bound = snn.module(i).bound
            value = value if bound is None else min(value, bound)
            thresholds[labels[i]] = value
            if snn.has_units:  # the weights above see spikes that stand for so much
                snn.set_thresholds(dict.fromkeys(snn.thresholds, 1.0) | thresholds, balanced=())
            last = position == len(snn.graph.neurons) - 1
            for batch in batches:
                batch.finish(i, value, timesteps, last)
            if progress is not None:
                progress(labels[i], value)
        snn.set_thresholds(thresholds, balanced=set(thresholds) - keep_at_one)
    finally:
        snn.train(training)
    return thresholds


def residual_layers(snn: SpikingNetwork) -> set[str]:
    """The spiking layers inside basic blocks, whose thresholds the paper leaves at 1 (§4.2)."""
    blocks = [n for n, module in snn.net.named_modules() if isinstance(module, ResidualBlock)]
    return {
        label
        for i, label in snn.graph.labels.items()
        if any(snn.graph.nodes[i].name.startswith(f"{block}.") for block in blocks)
    }


def _percentile(
    currents: Iterator[Tensor],
    percentile: float,
    reduce: Callable[[Tensor, str], Tensor] | None,
    like: Tensor,
) -> float:
    """A percentile of all values of some tensors; NaN if a value is and 100 is asked for.

    ``like`` gives device and dtype where there are none.
    """
    if percentile == 100:
        maxima = [current.max().to(like) for current in currents]
        largest = torch.stack(maxima).max() if maxima else like.new_full((), -math.inf)
        return float(largest if reduce is None else reduce(largest, "max"))
    # floats above 0 are in the order of their bits; the upper ones make a histogram
    counts = torch.zeros(1 << (31 - DROPPED_BITS), dtype=torch.int64, device=like.device)
    for current in currents:
        bins = current.float().clamp_(min=0).view(torch.int32).bitwise_right_shift_(DROPPED_BITS)
        counts += torch.bincount(bins.flatten(), minlength=len(counts))
    if reduce is not None:
        counts = reduce(counts, "sum")
    if int(counts[NOT_FINITE >> DROPPED_BITS :].sum()):
        return math.nan
    below = counts.cumsum(0)
    wanted = math.ceil(int(below[-1]) * percentile / 100)
    place = int(torch.searchsorted(below, torch.tensor(wanted, device=below.device)))
    if place == 0:
        return 0.0
    upper = torch.tensor((place + 1) << DROPPED_BITS, dtype=torch.int32)
    return float(upper.view(torch.float32))


def _present(
    snn: SpikingNetwork,
    images: Tensor,
    batch_size: int,
    sample_ids: Tensor | None,
    room: "_Room",
) -> list["_Calibration"]:
    """The calibration images in batches, each a presentation at t = 0."""
    if sample_ids is None:
        sample_ids = torch.arange(len(images), device=images.device)
    # V = 1 is a placeholder until a layer's own is known
    snn.set_thresholds(dict.fromkeys(snn.thresholds, 1.0), balanced=())
    return [
        _Calibration(snn.present(part, sample_ids=ids), room)
        for part, ids in zip(images.split(batch_size), sample_ids.split(batch_size), strict=True)
        if len(part)
    ]


class _Room:
    """Bytes that spike trains may still take."""

    def __init__(self, size: int) -> None:
        self.left = size

    def take(self, size: int) -> bool:
        """Whether there was room for ``size`` bytes, now taken."""
        if size > self.left:
            return False
        self.left -= size
        return True


class _Calibration:
    """The spike trains of one batch, as bits: node → one packed matrix a chunk.

    Where there is no room for a layer's train, it is run again in every pass; chunks come in order.
    """

    def __init__(self, presentation: Presentation, room: _Room) -> None:
        self.presentation, self.room = presentation, room
        self.graph = presentation.network.graph
        self.trains: dict[int, list[Tensor]] = {}
        self.thresholds: dict[int, float] = {}  # of the layers that are done
        self.shapes: dict[int, torch.Size] = {}
        self.membranes: dict[int, Tensor] = {}  # of layers that run, and their last chunk
        self.running: dict[int, tuple[int, Spikes]] = {}
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

    def finish(self, neuron: int, threshold: float, timesteps: int, last: bool) -> None:
        """A layer's V is known: keep its spikes, if there is room, and drop what is done with."""
        self.thresholds[neuron] = threshold
        if not last:
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
        while waiting:
            i = waiting.pop()
            if i not in seen:
                seen.add(i)
                if i not in self.trains:  # made again from what is below it
                    waiting.extend(self.graph.nodes[i].inputs)
        return seen
