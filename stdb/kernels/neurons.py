"""A layer's neurons on a CPU, compiled by numba at first use and kept on disk.

A strip of neurons runs through all steps of a chunk while it is in the cache; spikes are written
as bits, eight neurons to a byte. Kernels work on a range [first, last) of bytes
(:func:`stdb.kernels.parallel.run`). The functions at the end are the backend's interface.
"""

import math

import numpy as np
import torch
from numba.cpython.unsafe.numbers import trailing_zeros
from torch import Tensor

from . import bits
from .compiled import compiled
from .layout import to_matrix
from .parallel import run
from .pooled import PooledGradient

# a byte's bits as the bytes of a word
BITS_OF = np.array([sum((v >> j & 1) << 8 * j for j in range(8)) for v in range(256)], np.uint64)
STRIP = 512  # neurons whose steps are worked on while they are in the cache


@compiled(error_model="numpy")
def _fire(first, last, current, membrane, threshold, leak, bits, times, note_times, start):
    """Eq. 2 over a chunk: membranes move on, spikes are written as bits. Ranges over 8 neurons.

    ``times`` (count,): brought to each neuron's latest spike, as :func:`_note_last_spikes` does, if
    ``note_times``; steps count from 1.
    """
    steps, count = current.shape
    for strip in range(first * 8, min(last * 8, count), STRIP):
        end = min(strip + STRIP, last * 8, count)
        fired = np.empty(STRIP, np.uint8)
        u = membrane[strip:end]
        for m in range(end - strip):
            fired[m] = u[m] > threshold
        fired[end - strip :] = 0
        for t in range(steps):
            row = current[t, strip:end]
            for m in range(end - strip):
                v = leak * u[m] - threshold * fired[m] + row[m]
                u[m] = v
                fired[m] = v > threshold
            if note_times:
                now = np.int16(start + t + 1)
                latest_times = times[strip:end]
                for m in range(end - strip):
                    latest_times[m] = now if fired[m] else latest_times[m]
            for byte in range((end - strip + 7) >> 3):
                value = np.uint8(0)
                for j in range(8):
                    value |= fired[byte * 8 + j] << np.uint8(j)
                bits[t, (strip >> 3) + byte] = value


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


@compiled(error_model="numpy")
def _backpropagate_stdb(
    first, last, above, share, size, channel_count, width, mask, grad, bits, times, start,
    table, decay, carry, has_carry, leak, temporal,
):  # fmt: skip
    """∂L/∂U_t = s_t·∂L/∂O_t + λ·∂L/∂U_{t+1} over a chunk, s of STDB from the spikes.

    ``grad`` (T, M) becomes ∂L/∂U. ∂L/∂O is what it holds; or, for ``size`` > 0, it comes from
    ``above`` (T, M/size²), of which every pixel of a window of size × size gets ``share``, in
    images of ``channel_count`` and ``width`` that the windows fill, times ``mask`` (M,) unless that
    is empty. ``times``: last spike before the chunk, 0 for never; ``table[Δt]`` =
    α·exp(−β·Δt), ``decay`` = exp(−β); ``carry`` is ∂L/∂U of the step after the chunk. Ranges over
    8 neurons.
    """
    steps, count = grad.shape
    slope = np.empty(STRIP, grad.dtype)
    starts = np.empty(STRIP + 1, np.int64)  # of the strip's pixels …
    sources = np.empty(STRIP, np.int64)  # … and what they are taken from
    for strip in range(first * 8, min(last * 8, count), STRIP):
        end = min(strip + STRIP, last * 8, count)
        pixels = 0
        if size > 0:
            m = strip
            while m < end:
                p, c = divmod(m, channel_count)
                y, x = divmod(p, width)
                starts[pixels] = m - strip
                sources[pixels] = (y // size * (width // size) + x // size) * channel_count + c
                m += channel_count - c
                pixels += 1
            starts[pixels] = end - strip
        for m in range(end - strip):
            then = times[strip + m]
            slope[m] = table[start - then] if then > 0 else 0.0
        for t in range(steps):
            row = grad[t, strip:end]
            for p in range(pixels):
                source = above[t, sources[p] :]
                target = row[starts[p] : starts[p + 1]]
                if len(mask) > 0:
                    part = mask[strip + starts[p] :]
                    for m in range(len(target)):
                        target[m] = share * source[m] * part[m]
                else:
                    for m in range(len(target)):
                        target[m] = share * source[m]
            for byte in range((end - strip + 7) >> 3):
                value = bits[t, (strip >> 3) + byte]
                for j in range(min(8, end - strip - byte * 8)):
                    m = byte * 8 + j
                    spiked = (value >> j) & 1
                    slope[m] = table[0] if spiked else slope[m] * decay
            for m in range(end - strip):
                row[m] *= slope[m]
        if not temporal:
            continue
        if has_carry:
            for m in range(strip, end):
                grad[steps - 1, m] += leak * carry[m]
        for t in range(steps - 2, -1, -1):
            row, following = grad[t, strip:end], grad[t + 1, strip:end]
            for m in range(end - strip):
                row[m] += leak * following[m]


# -- the interface ---------------------------------------------------------------------------------

NO_TIMES = np.zeros(0, np.int16)


def fire(
    current: Tensor,
    membrane: Tensor,
    threshold: float,
    leak: float,
    *,
    last_spike: Tensor | None = None,
    start: int = 0,
    spikes: Tensor | None = None,
) -> Tensor:
    """Eq. 2 over a chunk; see :func:`stdb.kernels.fire`."""
    steps, count = current.shape
    packed = torch.empty(steps, bits.row_bytes(count), dtype=torch.uint8)
    real = current[:0].numpy().dtype.type
    run(
        _fire, packed.shape[1], current.numel(), current.numpy(), membrane.numpy(),
        real(threshold), real(leak), packed.numpy(),
        NO_TIMES if last_spike is None else last_spike.numpy(), last_spike is not None, start,
    )  # fmt: skip
    if spikes is not None:
        spikes.copy_(bits.unpack(packed, count, spikes.dtype))
    return packed


def note_last_spikes(packed: Tensor, last_spike: Tensor, start: int) -> None:
    """See :func:`stdb.kernels.note_last_spikes`."""
    arguments = (packed.numpy(), start, last_spike.numpy())
    run(_note_last_spikes, packed.shape[1], packed.numel(), *arguments)


def count_spikes(packed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """See :func:`stdb.kernels.count_spikes`."""
    counts = torch.zeros(packed.shape[1] * 8, dtype=dtype)
    run(_count_spikes, packed.shape[1], packed.numel(), packed.numpy(), counts.numpy())
    return counts[:count]


def backpropagate_stdb(
    above: Tensor | PooledGradient,
    packed: Tensor,
    last_spike: Tensor,
    start: int,
    alpha: float,
    beta: float,
    carry: Tensor | None,
    leak: float,
    temporal: bool,
) -> Tensor:
    """Eq. 11 and the leak path in one pass, from bits; see :func:`stdb.kernels.backpropagate_stdb`.

    A pooled gradient is spread on the way.
    """
    pooled, size, channel_count, width = None, 0, 0, 0
    if isinstance(above, PooledGradient):
        grad = above.above.new_empty(above.shape[0], above.shape[1:].numel())
        pooled, size = to_matrix(above.above), above.size
        channel_count, width = above.shape[2], above.shape[4]
    else:
        grad = to_matrix(above)
    none = grad[:1, :0]
    mask = none[0]
    if isinstance(above, PooledGradient) and above.mask is not None:
        mask = to_matrix(above.mask[None])[0]
    ages = torch.arange(start + 1, dtype=torch.float64)
    table = alpha * torch.exp(-beta * ages)
    real = grad[:0].numpy().dtype.type
    run(
        _backpropagate_stdb, packed.shape[1], grad.numel(),
        (none if pooled is None else pooled).numpy(), real(1 / size**2 if size else 1), size,
        channel_count, width, mask.numpy(), grad.numpy(), packed.numpy(), last_spike.numpy(), start,
        table.to(grad.dtype).numpy(), real(math.exp(-beta)),
        (none[0] if carry is None else carry).numpy(), carry is not None, real(leak), temporal,
    )  # fmt: skip
    return grad
