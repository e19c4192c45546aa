"""Spikes of a chunk, as bits and as events; what a CPU computes with instead of zeros and ones.

:class:`Spikes` is what a spiking layer gives: bits, from which the dense tensor is made where one
is wanted. :class:`Events` lists, for every image and pixel, the channels that carry something, and
what: it passes through dropout, average pooling and flattening, and convolutions and linear layers
are summed from it at a cost that is proportional to the number of events.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import kernels
from .kernels import events, products
from .kernels.layout import from_matrix
from .kernels.parallel import run
from .kernels.pooled import pooled_shape

ROWS_PER_TILE = 128  # of a linear layer's weights; with BLOCK vectors of columns they fit a cache


class Spikes:
    """A spiking layer's output (T, B, C, H, W) or (T, B, n) over a chunk.

    Args:
        packed: (T, ⌈M/8⌉) bits of (T, M), channels last.
        shape: of the dense form.
        dtype: of the dense form.
        dense: it, where it exists already, maybe of another type.
    """

    def __init__(
        self, packed: Tensor, shape: torch.Size, dtype: torch.dtype, dense: Tensor | None = None
    ) -> None:
        self.packed, self.shape, self.dtype = packed, shape, dtype
        self._dense = {} if dense is None else {dense.dtype: dense}

    @property
    def neurons(self) -> int:
        """M = B·C·H·W."""
        return self.shape[1:].numel()

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros and ones, of another type where one is given."""
        dtype = dtype or self.dtype
        if dtype not in self._dense:
            listed = kernels.works_on_bits(self.packed.device)
            whole = None if listed else next(iter(self._dense.values()), None)
            if whole is None:
                matrix = kernels.unpack(self.packed, self.neurons, dtype)
                self._dense[dtype] = from_matrix(matrix, self.shape)
            else:
                self._dense[dtype] = whole.to(dtype)
        return self._dense[dtype]

    def numbers(self) -> Tensor:
        """Zeros and ones, of the type that they have already, where they do."""
        return self.dense(next(iter(self._dense), None))

    def averaged(self, size: int) -> "Averages | None":
        """Averaged over windows of size × size that do not overlap; None where no kernel does."""
        if not kernels.averages_bits(self.packed.device) or self.dtype != torch.float32:
            return None
        whole = self.shape[2] % 8 == 0 and size**2 < 256  # bytes of a pixel; what a byte counts
        return Averages(self, size) if whole else None

    def counts(self) -> Tensor:
        """(B, …): spikes of each neuron in this chunk."""
        if not kernels.works_on_bits(self.packed.device):
            return self.numbers().sum(0, dtype=self.dtype)
        counts = kernels.count_spikes(self.packed, self.neurons, self.dtype)
        return from_matrix(counts[None], (1, *self.shape[1:]))[0]

    def map(self) -> Tensor:
        """(C, H, W) or (n,) float64: spikes of each neuron in this chunk, over all images."""
        neurons = self.shape[2:].numel()
        if not kernels.works_on_bits(self.packed.device) or neurons % 8:
            return self.counts().sum(0, dtype=torch.float64)
        packed = self.packed.view(-1, neurons // 8)  # an image and step in a row
        counts = kernels.count_spikes(packed, neurons, torch.float64)
        return from_matrix(counts[None], (1, 1, *self.shape[2:]))[0, 0]

    @cached_property
    def total(self) -> int:
        """All spikes of the chunk; on a CPU."""
        return int(self._image_counts.sum())

    @property
    def density(self) -> float:
        """Spikes per neuron and step, which decides for events; 1 where they have no kernels."""
        listed = kernels.works_on_bits(self.packed.device)
        return self.total / self.shape.numel() if listed else 1.0

    @cached_property
    def _image_counts(self) -> np.ndarray:
        counts = np.empty(self.shape[0] * self.shape[1], np.int64)
        arguments = (self.packed.numpy(), self.shape[1], self.shape[2:].numel(), counts)
        run(events.count_bits, len(counts), self.packed.numel(), *arguments)
        return counts

    @cached_property
    def events(self) -> "Events":
        """The spikes as events; made once."""
        counts = self._image_counts
        offsets = np.zeros(len(counts), np.int64)
        np.cumsum(counts[:-1], out=offsets[1:])
        pixels = self.shape[3:].numel()
        starts = np.empty((len(counts), pixels), np.int32)
        ends = np.empty_like(starts)
        channels = np.empty(self.total, np.int32)
        work = self.packed.numel() + 8 * self.total
        run(
            events.list_bits, len(counts), work, self.packed.numpy(), self.shape[1], pixels,
            self.shape[2], offsets, starts, ends, channels,
        )  # fmt: skip
        ones = np.ones(len(channels), _numpy(self.dtype))
        return Events(self.shape, starts, ends, channels, ones, offsets)


@dataclass(frozen=True)
class Averages:
    """Spikes averaged over windows that do not overlap, times a dropout's mask; not made yet.

    Attributes:
        spikes: (T, B, C, H, W), of a multiple of eight channels; any shape with a size of 1.
        size: of a window.
        mask: (B, C, H/size, W/size), or None.
    """

    spikes: Spikes
    size: int
    mask: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the dense form."""
        return pooled_shape(self.spikes.shape, self.size)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """As a tensor in channels-last order, of another type where one is given."""
        spikes, dtype = self.spikes, dtype or self.spikes.dtype
        matrix = kernels.average(spikes.packed, spikes.shape, self.size, self.mask, dtype)
        return from_matrix(matrix, self.shape)


@dataclass(frozen=True)
class Events:
    """Sparse values (T, B, C, H, W) or (T, B, n) over a chunk; N = T·B images of P = H·W pixels.

    Attributes:
        shape: of the dense form.
        starts: (N, P), where the events of a pixel begin in ``channels`` and ``values``.
        ends: (N, P), where they end.
        channels: each event's channel.
        values: each event's value.
        offsets: (N,), where the events of an image begin.
    """

    shape: torch.Size
    starts: np.ndarray
    ends: np.ndarray
    channels: np.ndarray
    values: np.ndarray
    offsets: np.ndarray

    @property
    def _lists(self) -> tuple[np.ndarray, ...]:
        return self.starts, self.ends, self.channels, self.values

    @property
    def _work(self) -> int:
        """Work of a pass over the lists, for :func:`.kernels.parallel.run`."""
        return self.starts.size + 8 * self.total

    @cached_property
    def total(self) -> int:
        """How many there are."""
        return int((self.ends - self.starts).sum(dtype=np.int64))

    @property
    def density(self) -> float:
        """Events per value."""
        return self.total / self.shape.numel()

    def dense(self) -> Tensor:
        """As a tensor in channels-last order."""
        images, pixels = self.starts.shape
        out = np.zeros((images, pixels, self.shape[2]), self.values.dtype)
        run(events.scatter_events, images, self._work, *self._lists, out)
        return from_matrix(torch.from_numpy(out).view(self.shape[0], -1), self.shape)

    def masked(self, mask: Tensor) -> "Events":
        """Times a dropout mask (B, …), the same at every step."""
        flat = mask.movedim(1, -1).reshape(mask.shape[0], -1, self.shape[2]).contiguous().numpy()
        ends, channels = np.empty_like(self.ends), np.empty_like(self.channels)
        values = np.empty_like(self.values)
        new = flat, ends, channels, values
        run(events.mask_events, len(ends), self._work, *self._lists, *new)
        return replace(self, ends=ends, channels=channels, values=values)

    def pooled(self, size: int) -> "Events":
        """Averaged over windows of size × size that do not overlap."""
        steps, batch, channel_count, height, width = self.shape
        shape = torch.Size((steps, batch, channel_count, height // size, width // size))
        starts = np.empty((len(self.starts), shape[3:].numel()), np.int32)
        ends = np.empty_like(starts)
        channels, values = np.empty_like(self.channels), np.empty_like(self.values)
        run(
            events.pool_events, len(starts), self._work, *self._lists, width, size, channel_count,
            values.dtype.type(1 / size**2), shape[4], starts, ends, channels, values,
        )  # fmt: skip
        return replace(
            self, shape=shape, starts=starts, ends=ends, channels=channels, values=values
        )

    def flattened(self) -> "Events":
        """(T, B, C·H·W), channels first as torch does."""
        if len(self.shape) == 3:
            return self
        images, pixels = self.starts.shape
        starts = np.empty((images, 1), np.int32)
        ends, channels = np.empty_like(starts), np.empty_like(self.channels)
        values = np.empty_like(self.values)
        run(
            events.flatten_events, images, self._work, *self._lists, pixels, starts, ends, channels,
            values,
        )  # fmt: skip
        shape = torch.Size((*self.shape[:2], self.shape[2:].numel()))
        return replace(
            self, shape=shape, starts=starts, ends=ends, channels=channels, values=values
        )

    # -- products ------------------------------------------------------------------------------

    def convolved(self, module: nn.Conv1d | nn.Conv2d, rows: Tensor) -> Tensor:
        """W ∗ O: (T, B, C', H', W'); ``rows`` is :func:`tap_rows` of the weights."""
        geometry = _geometry(module, self.shape)
        filters, new_shape = module.out_channels, geometry[-1]
        images = len(self.starts)
        out = np.empty((images, new_shape[0] * new_shape[1], filters), self.values.dtype)
        run(
            products.convolve, images * new_shape[0], self._work + self.total * filters,
            *self._lists, rows.numpy().reshape(-1), rows.shape[1], *geometry[:4], self.shape[2],
            *geometry[4:], out,
        )  # fmt: skip
        shape = (*self.shape[:2], filters, *new_shape[-len(module.kernel_size) :])
        return from_matrix(torch.from_numpy(out).view(self.shape[0], -1), shape)

    def convolved_weight(self, module: nn.Conv1d | nn.Conv2d, grad: Tensor) -> Tensor:
        """∂L/∂W (C', C, k, k) of a convolution, given ∂L/∂I (T, B, C', H', W')."""
        geometry = _geometry(module, self.shape)
        images, channel_count, filters = len(self.starts), self.shape[2], module.out_channels
        dtype = self.values.dtype
        lists = np.empty((images, channel_count + 1), np.int32)
        places = np.empty(len(self.channels), np.int32)
        values = np.empty_like(self.values)
        run(
            events.by_channel, images, self._work, *self._lists, channel_count, self.offsets, lists,
            places, values,
        )  # fmt: skip
        flat = grad.movedim(2, -1).reshape(-1, filters)
        wide = products.padded(filters, dtype)
        if wide != filters:
            flat = nn.functional.pad(flat, (0, wide - filters))
        taps = geometry[0]
        out = np.zeros((channel_count, *taps, wide), dtype)
        run(
            products.convolve_weight, channel_count, self.total * filters, lists, places, values,
            flat.contiguous().numpy().reshape(-1), wide, *geometry, images, out,
        )  # fmt: skip
        weight = torch.from_numpy(out)[..., :filters].permute(3, 0, 1, 2)
        return weight if len(module.kernel_size) == 2 else weight[:, :, 0]

    def multiplied(self, module: nn.Linear, blocks: Tensor) -> Tensor:
        """W·O: (T, B, m); ``blocks`` is :func:`column_blocks` of the weights."""
        images = len(self.starts)
        count, _, columns = blocks.shape
        edges = np.empty((images, -(-self.shape[2] // ROWS_PER_TILE) + 1), np.int32)
        channels, values = np.empty_like(self.channels), np.empty_like(self.values)
        new = edges, channels, values
        run(events.by_rows, images, self._work, *self._lists, ROWS_PER_TILE, *new)
        out = np.zeros((count, images, columns), self.values.dtype)
        run(
            products.multiply, count, self.total * columns * count, *new,
            blocks.numpy().reshape(-1), self.shape[2] * columns, columns, images, out.reshape(-1),
        )  # fmt: skip
        whole = torch.from_numpy(out).transpose(0, 1).reshape(images, -1)
        return whole[:, : module.out_features].reshape(*self.shape[:2], -1)


def tap_rows(weight: Tensor) -> Tensor:
    """(k·k·C, ≥ C'): the weights as one row for each tap and input channel, in whole vectors."""
    weight = weight.detach()
    rows = weight.movedim((1, 0), (-2, -1)).reshape(-1, weight.shape[0])
    extra = products.padded(weight.shape[0], rows[:0].numpy().dtype) - weight.shape[0]
    return nn.functional.pad(rows, (0, extra)).contiguous()


def column_blocks(weights: Tensor) -> Tensor:
    """(blocks, n, columns): the weights by input, in blocks of outputs that fit a cache."""
    weight = weights.detach().numpy()
    lanes = products.padded(1, weight.dtype)
    columns = min(products.BLOCK * lanes, -(-weight.shape[0] // lanes) * lanes)
    out = np.empty((-(-weight.shape[0] // columns), weight.shape[1], columns), weight.dtype)
    run(products.blocks_of_columns, len(out), weight.size, weight, columns, out)
    return torch.from_numpy(out)


def _geometry(module: nn.Conv1d | nn.Conv2d, shape: torch.Size) -> tuple[tuple[int, int], ...]:
    """Kernel, stride, padding, dilation, (H, W) before and after; a signal is an image of a row."""
    assert not isinstance(module.padding, str)  # conversion makes it numbers
    kernel, stride, padding, dilation, before = (
        (int((row, *sizes)[-2]), int(sizes[-1]))
        for row, sizes in (
            (1, module.kernel_size),
            (1, module.stride),
            (0, module.padding),
            (1, module.dilation),
            (1, shape[3:]),
        )
    )
    height, width = (
        (before[k] + 2 * padding[k] - dilation[k] * (kernel[k] - 1) - 1) // stride[k] + 1
        for k in (0, 1)
    )
    return kernel, stride, padding, dilation, before, (height, width)


def _numpy(dtype: torch.dtype) -> Any:
    return torch.empty(0, dtype=dtype).numpy().dtype
