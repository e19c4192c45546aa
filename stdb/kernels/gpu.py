"""A layer's neurons on a GPU, in Triton: they run through all steps of a chunk in one launch.

The same scans as in :mod:`.neurons`, eight neurons to a byte of spikes. Where Triton, or
the compiler that it needs, is missing, :func:`available` says so once. Triton's interpreter
(TRITON_INTERPRET=1) runs the kernels on a CPU, where they are tested; it takes more than the
compiler does, so a test compiles them ahead of time, too.
"""

import functools
import warnings

import torch
from torch import Tensor

from . import bits
from .gpu_gradients import backpropagate
from .launch import are_alike, launch, triton
from .layout import to_matrix
from .pooled import pooled_shape
from .reference import count_spikes

if triton is not None:
    import triton.language as tl

    from .launch import membranes_before, spikes_at, store_bits

__all__ = [
    "available",
    "average",
    "backpropagate",
    "count_spikes",
    "fire",
    "note_last_spikes",
    "unpack",
]

if triton is not None:

    @triton.jit(do_not_specialize=["steps", "start"])
    def _fire(
        current, bias, before, membrane, packed, spikes, times, count, steps, start, channels,
        threshold: tl.float64, leak: tl.float64, alike: tl.constexpr, constant: tl.constexpr,
        has_bias: tl.constexpr, has_spikes: tl.constexpr, notes: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        byte = tl.program_id(0) * block + tl.arange(0, block)
        neuron = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
        inside = neuron < count
        row_bytes = (count + 7) // 8
        u = membranes_before(before, neuron, inside, alike)
        v, passed = tl.full([], threshold, u.dtype), tl.full([], leak, u.dtype)
        fired = u > v
        if has_bias:
            added = tl.load(bias + neuron % channels, mask=inside, other=0.0).to(u.dtype)
        if constant:
            given = tl.load(current + neuron, mask=inside, other=0.0).to(u.dtype)
            if has_bias:
                given += added
        if notes:
            last = tl.load(times + neuron, mask=inside, other=0).to(tl.int32)
        for t in range(steps):
            place = tl.cast(t, tl.int64) * count + neuron
            if not constant:
                given = tl.load(current + place, mask=inside, other=0.0).to(u.dtype)
                if has_bias:
                    given += added
            u = passed * u - tl.where(fired, v, 0.0) + given
            fired = u > v
            store_bits(packed, t, row_bytes, byte, fired & inside)
            if has_spikes:
                tl.store(spikes + place, tl.where(fired, 1.0, 0.0), mask=inside)
            if notes:
                last = tl.where(fired, start + t + 1, last)
        tl.store(membrane + neuron, u, mask=inside)
        if notes:
            tl.store(times + neuron, last.to(tl.int16), mask=inside)

    @triton.jit(do_not_specialize=["steps"])
    def _unpack(packed, spikes, count, steps, block: tl.constexpr):
        byte = tl.program_id(0) * block + tl.arange(0, block)
        neuron = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
        row_bytes = (count + 7) // 8
        for t in range(steps):
            spiked = spikes_at(packed, t, row_bytes, byte, byte < row_bytes)
            place = tl.cast(t, tl.int64) * count + neuron
            tl.store(spikes + place, tl.where(spiked, 1.0, 0.0), mask=neuron < count)

    @triton.jit(do_not_specialize=["steps", "start"])
    def _note_last_spikes(packed, times, count, steps, start, block: tl.constexpr):
        byte = tl.program_id(0) * block + tl.arange(0, block)
        neuron = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
        row_bytes = (count + 7) // 8
        last = tl.load(times + neuron, mask=neuron < count, other=0).to(tl.int32)
        for t in range(steps):
            spiked = spikes_at(packed, t, row_bytes, byte, byte < row_bytes)
            last = tl.where(spiked, start + t + 1, last)
        tl.store(times + neuron, last.to(tl.int16), mask=neuron < count)

    @triton.jit(do_not_specialize=["steps", "height", "width", "row", "column"])
    def _average(
        packed, mask, averages, count, in_bytes, steps, channel_bytes, height, width, row, column,
        size: tl.constexpr, has_mask: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        # bytes of a pooled pixel's channels; they are summed over the pixels of its window
        byte = tl.program_id(0) * block + tl.arange(0, block)
        neuron = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
        inside = neuron < count
        source = byte
        if size > 1:
            pixel = byte // channel_bytes
            image, y = pixel // width // height, pixel // width % height
            first = (image * column + y * size) * row + pixel % width * size
            source = first * channel_bytes + byte % channel_bytes
        if has_mask:
            part = tl.load(mask + neuron, mask=inside, other=0.0).to(tl.float32)
        for t in range(steps):
            total = tl.zeros([block, 8], dtype=tl.int32)
            for k in tl.static_range(size * size):
                place = source + (k // size * row + k % size) * channel_bytes
                total += spikes_at(packed, t, in_bytes, place, byte * 8 < count).to(tl.int32)
            value = total.to(tl.float32)
            if size > 1:
                value = tl.div_rn(value, tl.zeros_like(value) + size * size)
            if has_mask:
                value *= part
            place = tl.cast(t, tl.int64) * count + neuron
            tl.store(averages + place, value.to(averages.dtype.element_ty), mask=inside)


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the kernels run on a device; tried once, and said once where they do not."""
    if triton is None or device.type != "cuda":
        return False
    try:
        current = torch.zeros(1, 8, device=device)
        times = torch.zeros(8, device=device, dtype=torch.int16)
        fire(current, current[0].clone(), 1.0, 1.0, last_spike=times, spikes=current.clone())
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
    before: Tensor | None = None,
) -> Tensor:
    """Eq. 2 over a chunk, in one launch; see :func:`stdb.kernels.fire`."""
    count, steps = len(membrane), steps or len(current)
    row_bytes = bits.row_bytes(count)
    packed = torch.empty(steps, row_bytes, dtype=torch.uint8, device=current.device)
    launch(
        _fire, row_bytes, current, membrane if bias is None else bias,
        membrane if before is None else before, membrane, packed,
        packed if spikes is None else spikes, packed if last_spike is None else last_spike, count,
        steps, start, 1 if bias is None else len(bias), threshold, leak,
        alike=are_alike(before), constant=len(current) < steps, has_bias=bias is not None,
        has_spikes=spikes is not None, notes=last_spike is not None,
    )  # fmt: skip
    return packed


def unpack(packed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """See :func:`stdb.kernels.unpack`."""
    spikes = torch.empty(len(packed), count, dtype=dtype, device=packed.device)
    launch(_unpack, packed.shape[1], packed, spikes, count, len(packed))
    return spikes


def note_last_spikes(packed: Tensor, last_spike: Tensor, start: int) -> None:
    """See :func:`stdb.kernels.note_last_spikes`."""
    steps, row_bytes = packed.shape
    launch(_note_last_spikes, row_bytes, packed, last_spike, len(last_spike), steps, start)


def average(
    packed: Tensor, shape: torch.Size, size: int, mask: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See :func:`stdb.kernels.average`."""
    pooled = pooled_shape(shape, size)
    out = torch.empty(len(packed), pooled[1:].numel(), dtype=dtype, device=packed.device)
    sides = (*pooled[3:], *shape[3:]) if size > 1 else (1, 1, 1, 1)
    height, width, column, row = sides
    launch(
        _average, bits.row_bytes(out.shape[1]), packed,
        out if mask is None else to_matrix(mask[None]), out, out.shape[1], packed.shape[1],
        len(packed), shape[2] // 8, height, width, row, column, size=size,
        has_mask=mask is not None,
    )  # fmt: skip
    return out
