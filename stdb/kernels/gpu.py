"""A layer's neurons on a GPU, in Triton: they run through all steps of a chunk in one launch.

The same scans as in :mod:`.neurons`, eight neurons to a byte of spikes. Where Triton, or
the compiler that it needs, is missing, :func:`available` says so once. Triton's interpreter
(TRITON_INTERPRET=1) runs the kernels on a CPU, where they are tested; it takes more than the
compiler does, so a test compiles them ahead of time, too.
"""

import functools
import math
import warnings
from typing import Any

import torch
from torch import Tensor

from . import bits
from .layer import Layer, LayerGradient
from .layout import to_matrix
from .pooled import PooledGradient
from .reference import count_spikes, unpack, whole

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["available", "backpropagate", "count_spikes", "fire", "note_last_spikes", "unpack"]

BYTES_PER_PROGRAM = 64  # 512 neurons

if triton is not None:

    @triton.jit
    def _fire(
        current, membrane, packed, spikes, count, row_bytes, steps, threshold, leak,
        has_spikes: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        byte = tl.program_id(0) * block + tl.arange(0, block)
        neuron = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
        inside = neuron < count
        weight = (1 << tl.arange(0, 8))[None, :]
        u = tl.load(membrane + neuron, mask=inside, other=0.0)
        fired = u > threshold
        for t in range(steps):
            place = tl.cast(t, tl.int64) * count + neuron
            u = leak * u - tl.where(fired, threshold, 0.0)
            u += tl.load(current + place, mask=inside, other=0.0)
            fired = u > threshold
            if has_spikes:
                tl.store(spikes + place, fired.to(u.dtype), mask=inside)
            value = tl.sum(tl.where(fired & inside, weight, 0), axis=1)
            row = packed + tl.cast(t, tl.int64) * row_bytes
            tl.store(row + byte, value.to(tl.uint8), mask=byte < row_bytes)
        tl.store(membrane + neuron, u, mask=inside)

    @triton.jit
    def _note_last_spikes(packed, times, count, row_bytes, steps, start, block: tl.constexpr):
        byte = tl.program_id(0) * block + tl.arange(0, block)
        neuron = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
        shift = tl.arange(0, 8)[None, :]
        last = tl.load(times + neuron, mask=neuron < count, other=0).to(tl.int32)
        for t in range(steps):
            row = packed + tl.cast(t, tl.int64) * row_bytes
            value = tl.load(row + byte, mask=byte < row_bytes, other=0).to(tl.int32)
            last = tl.where(((value[:, None] >> shift) & 1) > 0, start + t + 1, last)
        tl.store(times + neuron, last.to(tl.int16), mask=neuron < count)

    @triton.jit
    def _backpropagate(
        grad, packed, times, current, before, membranes, carry, sums, count, row_bytes, steps,
        start, alpha, beta, decay, threshold, leak, formula: tl.constexpr,
        over_threshold: tl.constexpr, has_membrane: tl.constexpr, constant: tl.constexpr,
        has_carry: tl.constexpr, temporal: tl.constexpr, learns_threshold: tl.constexpr,
        learns_leak: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        byte = tl.program_id(0) * block + tl.arange(0, block)
        neuron = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
        inside = neuron < count
        shift = tl.arange(0, 8)[None, :]
        zero = tl.zeros([block, 8], dtype=grad.dtype.element_ty)
        if formula == "age":
            last = tl.load(times + neuron, mask=inside, other=0)
            fired_before = (last == start) & (last > 0)
            age = (start - last).to(tl.float32)
            slope = tl.where(last > 0, alpha * tl.exp(-beta * age), 0.0)
        if has_membrane:
            u_before = tl.load(before + neuron, mask=inside, other=0.0)
            fired_before = u_before > threshold
            u, fired = u_before, fired_before
        for t in range(steps):
            row = packed + tl.cast(t, tl.int64) * row_bytes
            value = tl.load(row + byte, mask=byte < row_bytes, other=0).to(tl.int32)
            spiked = ((value[:, None] >> shift) & 1) > 0
            place = tl.cast(t, tl.int64) * count + neuron
            if has_membrane:
                u = leak * u - tl.where(fired, threshold, 0.0)
                u += tl.load(current + (neuron if constant else place), mask=inside, other=0.0)
                fired = spiked
                tl.store(membranes + place, u, mask=inside)
            if formula == "age":
                slope = tl.where(spiked, alpha, slope * decay)
                g = tl.load(grad + place, mask=inside, other=0.0)
                tl.store(grad + place, (g * slope).to(g.dtype), mask=inside)
        after, of_threshold, of_leak = zero, zero, zero
        if has_carry:
            after = tl.load(carry + neuron, mask=inside, other=0.0)
        for step in range(steps):
            # a name of its own: a loop's variable keeps its type, and t is an int32 above
            back = tl.cast(steps - 1 - step, tl.int64)
            place = back * count + neuron
            g = tl.load(grad + place, mask=inside, other=0.0)
            if has_membrane:
                now = tl.load(membranes + place, mask=inside, other=0.0)
            if formula != "age":
                if not over_threshold:
                    distance = tl.abs(now - threshold)
                elif now.dtype == tl.float32:  # rounded as a processor's division is
                    distance = tl.abs(tl.div_rn(now, threshold + tl.zeros_like(now)) - 1.0)
                else:
                    distance = tl.abs(now / threshold - 1.0)
                if formula == "linear":
                    g = g * (alpha * tl.maximum(1.0 - distance, 0.0))
                elif formula == "rectangle":
                    g = g * tl.where(distance < 0.5, alpha, 0.0)
                else:
                    g = g * (alpha * tl.exp(-beta * distance))
            g = g.to(zero.dtype)
            if learns_threshold:
                if over_threshold:
                    of_threshold -= (g * now / threshold).to(zero.dtype)
                else:
                    of_threshold -= g
            if temporal:
                g = (g + leak * after).to(zero.dtype)
            after = g
            tl.store(grad + place, g, mask=inside)
            if learns_threshold:
                row = packed + (back - 1) * row_bytes
                earlier = (byte < row_bytes) & (back > 0)
                value = tl.load(row + byte, mask=earlier, other=0).to(tl.int32)
                spiked = ((value[:, None] >> shift) & 1) > 0
                spiked = tl.where(back > 0, spiked, fired_before)
                of_threshold -= tl.where(spiked, g, 0.0).to(zero.dtype)
            if learns_leak:
                below = tl.load(membranes + place - count, mask=inside & (back > 0), other=0.0)
                of_leak += g * tl.where(back > 0, below, u_before)
        if learns_threshold or learns_leak:
            # neurons beyond the last have no gradient
            own = sums + tl.program_id(0) * 2
            tl.store(own, tl.sum(of_threshold))
            tl.store(own + 1, tl.sum(of_leak))


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the kernels run on a device; tried once, and said once where they do not."""
    if triton is None or device.type != "cuda":
        return False
    try:
        grad = torch.zeros(1, 8, device=device)
        times = torch.zeros(8, device=device, dtype=torch.int16)
        fire(grad, grad[0].clone(), 1.0, 1.0, last_spike=times, spikes=grad.clone())
    except Exception as error:  # Triton's own, the compiler's, the driver's
        warnings.warn(f"no fused kernels, running step after step: {error}", stacklevel=2)
        return False
    return True


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
) -> Tensor:
    """Eq. 2 over a chunk; see :func:`stdb.kernels.fire`."""
    current = whole(current, bias, steps or len(current), membrane.dtype)
    steps, count = current.shape
    row_bytes = bits.row_bytes(count)
    packed = torch.empty(steps, row_bytes, dtype=torch.uint8, device=current.device)
    _launch(
        _fire, row_bytes, current, membrane, packed, current if spikes is None else spikes, count,
        row_bytes, steps, threshold, leak, has_spikes=spikes is not None,
    )  # fmt: skip
    if last_spike is not None:
        note_last_spikes(packed, last_spike, start)
    return packed


def note_last_spikes(packed: Tensor, last_spike: Tensor, start: int) -> None:
    """See :func:`stdb.kernels.note_last_spikes`."""
    steps, row_bytes = packed.shape
    _launch(
        _note_last_spikes, row_bytes, packed, last_spike, len(last_spike), row_bytes, steps, start
    )


def backpropagate(above: Tensor | PooledGradient, layer: Layer) -> LayerGradient:
    """In one launch; see :func:`stdb.kernels.backpropagate`."""
    grad = to_matrix(above if isinstance(above, Tensor) else above.dense()).to(layer.real)
    steps, count = grad.shape
    row_bytes = layer.packed.shape[1]
    surrogate, current = layer.surrogate, layer.current
    if current is not None and (layer.bias is not None or current.dtype != layer.real):
        current = whole(current, layer.bias, len(current), layer.real)
    membranes = grad if current is None else torch.empty_like(grad)
    sums = grad.new_empty(triton.cdiv(row_bytes, BYTES_PER_PROGRAM), 2)
    _launch(
        _backpropagate, row_bytes, grad, layer.packed, _or(layer.last_spike, layer.packed),
        _or(current, grad), _or(layer.before, grad), membranes, _or(layer.carry, grad), sums, count,
        row_bytes, steps, layer.start, surrogate.alpha / layer.scale, surrogate.beta,
        math.exp(-surrogate.beta), layer.threshold, layer.leak, formula=surrogate.formula,
        over_threshold=surrogate.over_threshold, has_membrane=current is not None,
        constant=current is not None and len(current) < steps, has_carry=layer.carry is not None,
        temporal=layer.temporal, learns_threshold=layer.learns_threshold,
        learns_leak=layer.learns_leak,
    )  # fmt: skip
    threshold: Tensor | float = 0.0
    leak, first = threshold, threshold
    if layer.learns_threshold or layer.learns_leak:
        threshold, leak = sums.sum(0, dtype=torch.float64)
        first = grad[0].sum()
    channels = grad.unflatten(1, (-1, layer.channels)).sum((0, 1)) if layer.channels else None
    carry = grad[0].clone() if layer.carries else None
    lowered = grad if layer.lowered is None else grad.to(layer.lowered)
    return LayerGradient(lowered, threshold, leak, carry, first, channels)


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """What a kernel is given where there is nothing, and does not look at."""
    return other if x is None else x


def _launch(kernel: Any, row_bytes: int, *arguments: Any, **constants: Any) -> None:
    grid = (triton.cdiv(row_bytes, BYTES_PER_PROGRAM),)
    kernel[grid](*arguments, **constants, block=BYTES_PER_PROGRAM)
