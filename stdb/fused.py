"""GPU kernels, in Triton: a layer's neurons run through all steps of a chunk in one launch.

The same scans as in :mod:`stdb.kernels`, eight neurons to a byte of spikes. Where Triton, or the
compiler that it needs, is missing, :func:`available` says so once and :mod:`stdb.neuron` runs step
after step. Triton's interpreter (TRITON_INTERPRET=1) runs them on a CPU, where they are tested.
"""

import functools
import math
import warnings

import torch
from torch import Tensor

from . import bits

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BYTES_PER_PROGRAM = 64  # 512 neurons

if triton is not None:

    @triton.jit
    def _fire(
        current, membrane, packed, count, row_bytes, steps, threshold, leak, block: tl.constexpr
    ):
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
            tl.store(current + place, fired.to(u.dtype), mask=inside)
            value = tl.sum(tl.where(fired & inside, weight, 0), axis=1)
            row = packed + tl.cast(t, tl.int64) * row_bytes
            tl.store(row + byte, value.to(tl.uint8), mask=byte < row_bytes)
        tl.store(membrane + neuron, u, mask=inside)

    @triton.jit
    def _latest(packed, times, count, row_bytes, steps, start, block: tl.constexpr):
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
            after = tl.zeros_like(slope)
            if has_carry:
                after = tl.load(carry + neuron, mask=inside, other=0.0)
            for step in range(steps):
                t = tl.cast(steps - 1 - step, tl.int64)
                place = grad + t * count + neuron
                after = tl.load(place, mask=inside, other=0.0) + leak * after
                tl.store(place, after, mask=inside)


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the kernels run on a device; tried once."""
    if triton is None or device.type != "cuda":
        return False
    try:
        fire(torch.zeros(1, 8, device=device), torch.zeros(8, device=device), 1.0, 1.0)
    except Exception as error:  # Triton's own, the compiler's, the driver's
        warnings.warn(f"no fused kernels, running step after step: {error}", stacklevel=2)
        return False
    return True


def fire(current: Tensor, membrane: Tensor, threshold: float, leak: float) -> Tensor:
    """As :func:`stdb.neuron.fire`; ``current`` becomes the spikes."""
    steps, count = current.shape
    row_bytes = bits.row_bytes(count)
    packed = torch.empty(steps, row_bytes, dtype=torch.uint8, device=current.device)
    _fire[_grid(row_bytes)](
        current, membrane, packed, count, row_bytes, steps, threshold, leak,
        block=BYTES_PER_PROGRAM,
    )  # fmt: skip
    return packed


def latest(packed: Tensor, last_spike: Tensor, start: int) -> None:
    """As :func:`stdb.neuron.latest`."""
    steps, row_bytes = packed.shape
    _latest[_grid(row_bytes)](
        packed, last_spike, len(last_spike), row_bytes, steps, start, block=BYTES_PER_PROGRAM
    )


def backpropagate_stdb(
    grad: Tensor, packed: Tensor, last_spike: Tensor, start: int, alpha: float, beta: float,
    carry: Tensor | None, leak: float, temporal: bool,
) -> Tensor:  # fmt: skip
    """As :func:`stdb.neuron.backpropagate_stdb`, with α divided by V where it is over U/V."""
    steps, count = grad.shape
    row_bytes = packed.shape[1]
    _backpropagate[_grid(row_bytes)](
        grad, packed, last_spike, grad if carry is None else carry, count, row_bytes, steps, start,
        alpha, beta, math.exp(-beta), leak, has_carry=carry is not None, temporal=temporal,
        block=BYTES_PER_PROGRAM,
    )  # fmt: skip
    return grad


def _grid(row_bytes: int) -> tuple[int]:
    return (triton.cdiv(row_bytes, BYTES_PER_PROGRAM),)
