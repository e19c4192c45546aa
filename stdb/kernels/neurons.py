"""A layer's neurons on a CPU, compiled by numba at first use and kept on disk.

A strip of neurons runs through all steps of a chunk while it is in the cache; spikes are written
as bits, eight neurons to a byte. Kernels work on a range [first, last), of bytes or images
(:func:`stdb.kernels.parallel.run`). The functions at the end are the backend's interface.
"""

import math

import numpy as np
import torch
from numba.cpython.unsafe.numbers import trailing_zeros
from torch import Tensor

from . import bits
from .compiled import compiled
from .gradients import NO_TIMES, STRIP, backpropagate
from .layout import to_matrix
from .numbers import BITS_OF, by_neuron, narrow, wide, words
from .parallel import run
from .pooled import pooled_shape

__all__ = ["average", "backpropagate", "count_spikes", "fire", "note_last_spikes", "unpack"]

GATHER = np.uint64(sum(1 << (56 - 7 * k) for k in range(8)))  # see :mod:`.bits`


@compiled(error_model="numpy")
def _fire(
    first, last, current, bias, membrane, threshold, leak, bits, times, note_times, start
):  # fmt: skip
    """Eq. 2 over a chunk: membranes move on, spikes are written as bits. Ranges over 8 neurons.

    ``current`` (T, count) or, where it is constant, (1, count); ``bias`` of each channel, or
    empty, is added to it. ``times`` (count,): brought to each neuron's latest spike, as
    :func:`_note_last_spikes` does, if ``note_times``; steps count from 1.
    """
    steps, count = len(bits), len(membrane)
    fired, added = np.empty(STRIP, np.uint8), np.zeros(STRIP, membrane.dtype)
    for strip in range(first * 8, min(last * 8, count), STRIP):
        end = min(strip + STRIP, last * 8, count)
        by_neuron(bias, strip, end - strip, added)
        u = membrane[strip:end]
        for m in range(end - strip):
            fired[m] = u[m] > threshold
        fired[end - strip :] = 0
        for t in range(steps):
            row = current[t if len(current) > 1 else 0, strip:end]
            for m in range(end - strip):
                v = leak * u[m] - threshold * fired[m] + (wide(row[m]) + added[m])
                u[m] = v
                fired[m] = v > threshold
            if note_times:
                now = np.int16(start + t + 1)
                latest_times = times[strip:end]
                for m in range(end - strip):
                    latest_times[m] = now if fired[m] else latest_times[m]
            words_of_fired, packed = fired.view(np.uint64), bits[t, strip >> 3 :]
            for byte in range((end - strip + 7) >> 3):
                packed[byte] = (words_of_fired[byte] * GATHER) >> np.uint64(56)


@compiled()
def _unpack(first, last, bits, one, zero, out):
    """Write spikes as numbers, ``one`` and ``zero``, to ``out`` (T, count). Ranges over 8."""
    steps, count = out.shape
    spread = np.empty(STRIP // 8, np.uint64)
    fired = spread.view(np.uint8)
    for strip in range(first * 8, min(last * 8, count), STRIP):
        end = min(strip + STRIP, last * 8, count)
        for t in range(steps):
            row, target = bits[t, strip >> 3 : (end + 7) >> 3], out[t, strip:end]
            for byte in range(len(row)):
                spread[byte] = BITS_OF[row[byte]]
            for m in range(end - strip):
                target[m] = one if fired[m] else zero


@compiled(error_model="numpy")
def _average(first, last, bits, size, channels, width, mask, out):
    """Write averages of spikes over windows, times ``mask`` (B, …) unless empty, to ``out``.

    Images have rows of ``width`` pixels of ``channels``, a multiple of 8; ``out`` is (T·B, h, w,
    channels). Ranges over these images.
    """
    batch = len(mask)
    spread = np.empty(channels // 8, np.uint64)
    counts = spread.view(np.uint8)
    pixel = channels // 8  # its bytes
    share = np.float32(size * size)
    for n in range(first, last):
        for y in range(out.shape[1]):
            for x in range(out.shape[2]):
                spread[:] = 0
                for k in range(size * size):
                    place = (y * size + k // size) * width + x * size + k % size
                    row = bits[n, place * pixel : (place + 1) * pixel]
                    for byte in range(pixel):
                        spread[byte] += BITS_OF[row[byte]]
                target = out[n, y, x]
                if batch > 0:
                    part = mask[n % batch, y, x]
                    for c in range(channels):
                        target[c] = narrow(np.float32(counts[c]) / share * part[c], target)
                else:
                    for c in range(channels):
                        target[c] = narrow(np.float32(counts[c]) / share, target)


@compiled()
def _note_last_spikes(first, last, bits, start, times):
    """times[m] = the last step of a spike of m; steps count from 1. Ranges over 8 neurons."""
    steps = bits.shape[0]
    for byte in range(first, last):
        for t in range(steps):
            value = np.uint64(bits[t, byte])
            while value != 0:
                m = (byte << 3) + np.int64(trailing_zeros(value))
                value &= value - np.uint64(1)
                if m < times.shape[0]:
                    times[m] = start + t + 1


@compiled()
def _count_spikes(first, last, bits, counts):
    """counts[m] += spikes of neuron m. Ranges over 8 neurons: bytes that are counted at once."""
    steps = bits.shape[0]
    sums = np.empty(STRIP, np.uint64)
    for strip in range(first, last, STRIP):
        width = min(STRIP, last - strip)
        for begin in range(0, steps, 255):  # as far as a byte counts
            sums[:] = 0
            for t in range(begin, min(begin + 255, steps)):
                row = bits[t, strip : strip + width]
                for byte in range(width):
                    sums[byte] += BITS_OF[row[byte]]
            for byte in range(width):
                for j in range(8):
                    place = (strip + byte) * 8 + j
                    counts[place] += (sums[byte] >> np.uint64(8 * j)) & np.uint64(255)


# -- the interface ---------------------------------------------------------------------------------


def fire(
    current: Tensor,
    membrane: Tensor,
    threshold: float,
    leak: float,
    *,
    last_spike: Tensor | None = None,
    start: int = 0,
    spikes: Tensor | None = None,
    bias: Tensor | None = None,
    steps: int | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """Eq. 2 over a chunk; see :func:`stdb.kernels.fire`."""
    count = len(membrane)
    if before is not None:
        membrane.copy_(before)
    packed = torch.empty(steps or len(current), bits.row_bytes(count), dtype=torch.uint8)
    real = membrane[:0].numpy().dtype.type
    run(
        _fire, packed.shape[1], len(packed) * count, words(current),
        words(membrane[:0] if bias is None else bias), membrane.numpy(),
        real(threshold), real(leak), packed.numpy(),
        NO_TIMES if last_spike is None else last_spike.numpy(), last_spike is not None, start,
    )  # fmt: skip
    if spikes is not None:
        spikes.copy_(bits.unpack(packed, count, spikes.dtype))
    return packed


def unpack(packed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """See :func:`stdb.kernels.unpack`."""
    out = torch.empty(len(packed), count, dtype=dtype)
    one, zero = words(torch.tensor([1, 0], dtype=dtype))
    run(_unpack, packed.shape[1], out.numel(), packed.numpy(), one, zero, words(out))
    return out


def note_last_spikes(packed: Tensor, last_spike: Tensor, start: int) -> None:
    """See :func:`stdb.kernels.note_last_spikes`."""
    arguments = (packed.numpy(), start, last_spike.numpy())
    run(_note_last_spikes, packed.shape[1], packed.numel(), *arguments)


def count_spikes(packed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """See :func:`stdb.kernels.count_spikes`."""
    counts = torch.zeros(packed.shape[1] * 8, dtype=dtype)
    run(_count_spikes, packed.shape[1], packed.numel(), packed.numpy(), counts.numpy())
    return counts[:count]


def average(
    packed: Tensor, shape: torch.Size, size: int, mask: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See :func:`stdb.kernels.average`."""
    pooled = pooled_shape(shape, size)
    out = torch.empty(pooled[0], pooled[1:].numel(), dtype=dtype)
    steps, batch, channels, *sides = pooled
    height, width = (1, math.prod(sides)) if size == 1 else sides  # a row of all pixels
    row = width if size == 1 else shape[-1]  # windows may leave a rest
    images = words(out).reshape(steps * batch, height, width, channels)
    masks = torch.empty(0, 0, 0, 0)
    if mask is not None:
        masks = to_matrix(mask[None]).view(batch, *images.shape[1:])
    run(
        _average, len(images), shape.numel() // 8, packed.numpy().reshape(len(images), -1), size,
        channels, row, words(masks), images,
    )  # fmt: skip
    return out
