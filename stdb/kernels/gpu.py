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
from .layout import to_matrix
from .pooled import PooledGradient
from .reference import count_spikes

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["available", "backpropagate_stdb", "count_spikes", "fire", "note_last_spikes"]

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
    def _backpropagate_stdb(
        grad, packed, times, carry, count, row_bytes, steps, start, alpha, beta, decay, leak,
        has_carry: tl.constexpr, temporal: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        byte = tl.program_id(0) * block + tl.arange(0, block)
        neuron = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
        inside = neuron < count
        shift = tl.arange(0, 8)[None, :]
        last = tl.load(times + neuron, mask=inside, other=0)
        age = (start - last).to(tl.float32)
        slope = tl.where(last > 0, alpha * tl.exp(-beta * age), 0.0)
        for t in range(steps):
            row = packed + tl.cast(t, tl.int64) * row_bytes
            value = tl.load(row + byte, mask=byte < row_bytes, other=0).to(tl.int32)
            spiked = ((value[:, None] >> shift) & 1) > 0
            slope = tl.where(spiked, alpha, slope * decay)
            place = grad + tl.cast(t, tl.int64) * count + neuron
            g = tl.load(place, mask=inside, other=0.0)
            tl.store(place, (g * slope).to(g.dtype), mask=inside)
        if temporal:
            after = tl.zeros([block, 8], dtype=grad.dtype.element_ty)
            if has_carry:
                after = tl.load(carry + neuron, mask=inside, other=0.0)
            for step in range(steps):
                # a name of its own: a loop's variable keeps its type, and t is an int32 above
                back = tl.cast(steps - 1 - step, tl.int64)
                place = grad + back * count + neuron
                after = tl.load(place, mask=inside, other=0.0) + leak * after
                tl.store(place, after, mask=inside)


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the kernels run on a device; tried once, and said once where they do not."""
    if triton is None or device.type != "cuda":
        return False
    try:
        grad = torch.zeros(1, 8, device=device)
        times = torch.zeros(8, device=device, dtype=torch.int16)
        packed = fire(grad, grad[0].clone(), 1.0, 1.0, last_spike=times, spikes=grad.clone())
        backpropagate_stdb(grad, packed, times, 0, 1.0, 1.0, None, 1.0, True)
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
) -> Tensor:
    """Eq. 2 over a chunk; see :func:`stdb.kernels.fire`."""
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
    """Eq. 11 and the leak path in one launch; see :func:`stdb.kernels.backpropagate_stdb`."""
    grad = to_matrix(above if isinstance(above, Tensor) else above.dense())
    steps, count = grad.shape
    row_bytes = packed.shape[1]
    _launch(
        _backpropagate_stdb, row_bytes, grad, packed, last_spike, grad if carry is None else carry,
        count, row_bytes, steps, start, alpha, beta, math.exp(-beta), leak,
        has_carry=carry is not None, temporal=temporal,
    )  # fmt: skip
    return grad


def _launch(kernel: Any, row_bytes: int, *arguments: Any, **constants: Any) -> None:
    grid = (triton.cdiv(row_bytes, BYTES_PER_PROGRAM),)
    kernel[grid](*arguments, **constants, block=BYTES_PER_PROGRAM)
