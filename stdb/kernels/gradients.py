"""The backward pass of a layer's neurons on a CPU, in one pass over memory.

A strip of neurons is worked on while it is in the cache: first forward through the chunk's steps,
for membrane potentials or the ages of spikes, then back. Kernels work on a range of *blocks*, runs
of whole strips; sums over neurons are made for each block and added up in order, so they are the
same for any number of threads.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .compiled import compiled
from .layer import Layer, LayerGradient
from .layout import to_matrix
from .numbers import BITS_OF, by_channel, by_neuron, exponential, narrow, wide, words
from .parallel import run
from .pooled import PooledGradient

STRIP = 512  # neurons whose steps are worked on while they are in the cache
BLOCKS = 64
AGE, LINEAR, RECTANGLE, EXPONENTIAL = range(4)
FORMULAS = {"age": AGE, "linear": LINEAR, "rectangle": RECTANGLE, "exponential": EXPONENTIAL}


@compiled()
def _expand(bits, first, steps, fired):
    """Write to ``fired`` (T+1, STRIP), from its second row on, a strip's spikes."""
    for t in range(steps):
        row = bits[t, first : first + STRIP // 8]
        target = fired[t + 1].view(np.uint64)
        for byte in range(len(row)):
            target[byte] = BITS_OF[row[byte]]


@compiled(error_model="numpy")
def _membranes(strip, width, steps, current, bias, before, fired, threshold, leak, added, now, u):
    """Write to ``u`` (T+1, STRIP) membrane potentials from the step before the chunk on (Eq. 2)."""
    by_neuron(bias, strip, width, added)
    first = u[0]
    each = len(before) > 1  # or one for all
    for m in range(width):
        first[m] = now[m] = before[strip + m if each else 0]
        fired[0, m] = now[m] > threshold
    for t in range(steps):
        row = current[t if len(current) > 1 else 0, strip : strip + width]
        spiked, target = fired[t], u[t + 1]
        for m in range(width):
            now[m] = leak * now[m] - threshold * spiked[m] + (wide(row[m]) + added[m])
            target[m] = now[m]


@compiled(error_model="numpy")
def _ages(strip, width, steps, start, times, table, decay, fired, now, slopes):
    """Write to ``slopes`` (T+1, STRIP), from its second row on, α·exp(−β·Δt) of Eq. 11."""
    at_spike = table[0]
    for m in range(width):
        then = times[strip + m]
        now[m] = table[start - then] if then > 0 else 0.0
        fired[0, m] = then == start and start > 0
    for t in range(steps):
        spiked, target = fired[t + 1], slopes[t + 1]
        for m in range(width):
            now[m] = at_spike if spiked[m] else now[m] * decay
            target[m] = now[m]


@compiled(error_model="numpy")
def _slope(formula, width, u, center, scale, alpha, beta, slope):
    """Write to ``slope`` (STRIP,) ∂O/∂U of membrane potentials: Eq. 13, a rectangle, or Eq. 14.

    Over U/V ``scale`` is V, ``center`` 1, and α is divided by V already; else they are 1 and V.
    """
    zero = center - center  # numbers of the array's type, or lanes would be half as many
    one, half = zero + np.float32(1), zero + np.float32(0.5)
    if formula == LINEAR:
        for m in range(width):
            slope[m] = alpha * max(one - abs(u[m] / scale - center), zero)
    elif formula == RECTANGLE:
        for m in range(width):
            slope[m] = alpha if abs(u[m] / scale - center) < half else zero
    else:
        for m in range(width):
            slope[m] = alpha * exponential(-beta * abs(u[m] / scale - center))


@compiled(error_model="numpy")
def _find_pixels(strip, end, size, channel_count, width, starts, sources):
    """Where a strip's pixels begin, and what they are taken from below a pooling; how many."""
    pixels, m = 0, strip
    while m < end:
        p, c = divmod(m, channel_count)
        y, x = divmod(p, width)
        starts[pixels] = m - strip
        sources[pixels] = (y // size * (width // size) + x // size) * channel_count + c
        m += channel_count - c
        pixels += 1
    starts[pixels] = end - strip
    return pixels


@compiled(error_model="numpy")
def _spread(strip, pixels, starts, sources, above, share, mask, row):
    """Write to ``row`` (STRIP,) ∂L/∂O below an average pooling, and below a dropout's mask."""
    for p in range(pixels):
        source, target = above[sources[p] :], row[starts[p] : starts[p + 1]]
        if len(mask) > 0:
            part = mask[strip + starts[p] :]
            for m in range(len(target)):
                target[m] = share * wide(source[m]) * part[m]
        else:
            for m in range(len(target)):
                target[m] = share * wide(source[m])


@compiled()
def _leak(width, source, slope, passed, row, after, target):
    """∂L/∂O of a step → ∂L/∂O·∂O/∂U in ``row``, and ∂L/∂U in ``after`` and ``target``.

    ``source`` and ``target`` may be the same memory, so no loop has both.
    """
    for m in range(width):
        row[m] = wide(source[m]) * slope[m]
    for m in range(width):
        after[m] = row[m] + passed * after[m]
        target[m] = narrow(after[m], target)


@compiled()
def _add(width, values, factor, total):
    """Add to sums, maybe of twice the precision."""
    for m in range(width):
        total[m] += factor * values[m]


@compiled()
def _add_products(width, first, second, factor, total):
    """Add products of two vectors to sums."""
    for m in range(width):
        total[m] += factor * first[m] * second[m]


@compiled(error_model="numpy")
def _backpropagate(
    first, last, above, share, size, channel_count, pool_width, mask, grad, bits, formula, alpha,
    beta, times, start, table, decay, has_membrane, current, bias, before, threshold,
    over_threshold, leak, carry, has_carry, temporal, learns_threshold, learns_leak, sums,
    channel_sums, carry_out,
):  # fmt: skip
    """∂L/∂U_t = s_t·∂L/∂O_t + λ·∂L/∂U_{t+1} over a chunk; the gradients of V and λ beside it.

    ``grad`` (T, M) becomes ∂L/∂U. ∂L/∂O is ``above`` (T, M), maybe the same memory; or, for
    ``size`` > 0, ``above`` is (T, M/size²), of which every pixel of a window of size × size gets
    ``share``, in images of ``channel_count`` and ``pool_width`` that the windows fill, times
    ``mask`` (M,) unless that is empty. ``table[Δt]`` = α·exp(−β·Δt), ``decay`` = exp(−β).
    ``carry`` is ∂L/∂U of the step after the chunk, ``carry_out`` (M,), unless empty, becomes that
    of its first. ``sums`` (BLOCKS, 3) becomes the blocks' ∂L/∂V, ∂L/∂λ and Σ ∂L/∂U of the first
    step: ∂U_t/∂V = −O_{t−1}, ∂U_t/∂λ = U_{t−1}, ∂O/∂V = −s over U and −s·U/V over U/V, where s has
    the factor 1/V. ``channel_sums`` (BLOCKS, C), C maybe 0, becomes Σ ∂L/∂I of each channel.
    """
    steps, count = grad.shape
    u = np.zeros((steps + 1, STRIP), carry.dtype)
    slopes = np.zeros((steps + 1, STRIP), carry.dtype)
    fired = np.zeros((steps + 1, STRIP), np.uint8)
    # what goes from step to step is apart from what is kept of each: rows of one array, which the
    # compiler cannot tell apart, would not be made of a processor's lanes
    now, row, spread = (
        np.zeros(STRIP, carry.dtype), np.zeros(STRIP, carry.dtype), np.zeros(STRIP, carry.dtype)
    )  # fmt: skip
    after, added = np.zeros(STRIP, carry.dtype), np.zeros(STRIP, carry.dtype)
    of_threshold, of_leak = np.zeros(STRIP, carry.dtype), np.zeros(STRIP, carry.dtype)
    of_bias = np.zeros(STRIP, carry.dtype)
    sums_channels = channel_sums.shape[1] > 0
    starts = np.empty(STRIP + 1, np.int64)  # of the strip's pixels …
    sources = np.empty(STRIP, np.int64)  # … and what they are taken from
    zero = leak - leak
    passed = leak if temporal else zero
    one = zero + np.float32(1)
    center, scale = threshold, one
    if over_threshold:
        center, scale = one, threshold
    strips = (count + STRIP - 1) // STRIP
    totals = np.zeros((3, STRIP))  # a block's sums, by place in a strip
    for block in range(first, last):
        for number in range(block * strips // BLOCKS, (block + 1) * strips // BLOCKS):
            strip = number * STRIP
            width = min(STRIP, count - strip)
            pixels = 0
            if size > 0:
                pixels = _find_pixels(
                    strip, strip + width, size, channel_count, pool_width, starts, sources
                )
            _expand(bits, strip >> 3, steps, fired)
            if formula == AGE:
                _ages(strip, width, steps, start, times, table, decay, fired, now, slopes)
            if has_membrane:
                _membranes(
                    strip,
                    width,
                    steps,
                    current,
                    bias,
                    before,
                    fired,
                    threshold,
                    leak,
                    added,
                    now,
                    u,
                )
            for m in range(width):
                after[m] = carry[strip + m] if has_carry else zero
            for t in range(steps - 1, -1, -1):
                slope = slopes[t + 1]
                if formula != AGE:
                    _slope(formula, width, u[t + 1], center, scale, alpha, beta, slope)
                target = grad[t, strip : strip + width]
                if size > 0:
                    _spread(strip, pixels, starts, sources, above[t], share, mask, spread)
                    _leak(width, spread, slope, passed, row, after, target)
                else:
                    source = above[t, strip : strip + width]
                    _leak(width, source, slope, passed, row, after, target)
                if learns_threshold:
                    if over_threshold:
                        _add_products(width, row, u[t + 1], -one / threshold, of_threshold)
                    else:
                        _add(width, row, -one, of_threshold)
                    _add_products(width, after, fired[t], -one, of_threshold)
                if learns_leak:
                    _add_products(width, after, u[t], one, of_leak)
                if sums_channels:
                    _add(width, after, one, of_bias)
            if learns_threshold or learns_leak:
                _add(width, of_threshold, one, totals[0])
                _add(width, of_leak, one, totals[1])
                _add(width, after, one, totals[2])
                of_threshold[:] = zero
                of_leak[:] = zero
            if sums_channels:
                by_channel(of_bias, strip, width, channel_sums[block])
                of_bias[:] = zero
            if len(carry_out) > 0:
                for m in range(width):
                    carry_out[strip + m] = after[m]
        for k in range(3):
            sums[block, k] = totals[k].sum()
        totals[:] = 0


# -- the interface ---------------------------------------------------------------------------------

NO_TIMES = np.zeros(0, np.int16)


def backpropagate(above: Tensor | PooledGradient, layer: Layer) -> LayerGradient:
    """See :func:`stdb.kernels.backpropagate`; a pooled gradient is spread on the way."""
    table = _table(layer)
    size, channel_count, pool_width, mask = 0, 0, 0, table[:0]
    if isinstance(above, PooledGradient):
        size, channel_count, pool_width = above.size, above.shape[2], above.row
        source, shape = to_matrix(above.above), above.shape
        mask = mask if above.mask is None else to_matrix(above.mask[None])[0]
    else:
        source, shape = to_matrix(above), above.shape
    lowered = layer.lowered or table.dtype
    grad = source
    if size > 1 or source.dtype != lowered:
        grad = torch.empty(shape[0], shape[1:].numel(), dtype=lowered)
    carry_out = torch.empty(grad.shape[1] if layer.carries else 0, dtype=table.dtype)
    real = table.numpy().dtype.type
    surrogate = layer.surrogate
    before = layer.before
    if before is not None and before.stride(0) == 0:
        before = before[:1]  # one number, expanded
    sums, channel_sums = np.zeros((BLOCKS, 3)), np.zeros((BLOCKS, layer.channels))
    run(
        _backpropagate, BLOCKS, grad.numel(),
        words(source), real(1 / size**2 if size else 1), size, channel_count, pool_width,
        words(mask), words(grad), layer.packed.numpy(), FORMULAS[str(surrogate.formula)],
        real(surrogate.alpha / layer.scale), real(surrogate.beta),
        NO_TIMES if layer.last_spike is None else layer.last_spike.numpy(), layer.start,
        words(table), real(math.exp(-surrogate.beta)), layer.current is not None,
        words(table[None, :0] if layer.current is None else layer.current),
        _or_none(layer.bias, table), _or_none(before, table), real(layer.threshold),
        surrogate.over_threshold, real(layer.leak), _or_none(layer.carry, table),
        layer.carry is not None, layer.temporal, layer.learns_threshold, layer.learns_leak, sums,
        channel_sums, words(carry_out),
    )  # fmt: skip
    threshold, leak, first = sums.sum(0).tolist()
    channels = torch.from_numpy(channel_sums.sum(0)).to(table.dtype) if layer.channels else None
    return LayerGradient(
        grad, threshold, leak, carry_out if layer.carries else None, first, channels
    )


def _table(layer: Layer) -> Tensor:
    """α·exp(−β·Δt) by age, in the type of the layer's membranes."""
    ages = torch.arange(layer.start + 1 if layer.surrogate.needs_ages else 1, dtype=torch.float64)
    slopes = layer.surrogate.alpha / layer.scale * torch.exp(-layer.surrogate.beta * ages)
    return slopes.to(layer.real)


def _or_none(x: Tensor | None, like: Tensor) -> Any:
    """A vector for a kernel, or an empty one."""
    return words(like[:0] if x is None else x)
