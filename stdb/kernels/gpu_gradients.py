"""The backward pass of a layer's neurons on a GPU, in Triton: one launch a chunk.

A program goes forward through the chunk's steps, for membrane potentials or the ages of spikes, and
then back. On the way it leaves what ∂O/∂U is found from again: a byte of a spike's age, a bit of a
rectangle, or the membrane itself. Sums over neurons are made for each program and added up in
order, so they are the same every time.
"""

import torch
from torch import Tensor

from .launch import BYTES_PER_PROGRAM, are_alike, launch, triton
from .layer import Layer, LayerGradient
from .layout import to_matrix
from .pooled import PooledGradient

if triton is not None:
    import triton.language as tl

    from .launch import membranes_before, spikes_at, store_bits

LONGEST_OF_BYTES = 255  # steps of a chunk in which an age fits a byte, beside that of no spike

if triton is not None:

    @triton.jit
    def _slope_of_age(since, t, last, start, alpha, beta, never: tl.constexpr):
        """α·exp(−β·Δt) of Eq. 11; ``since``: steps since the chunk's latest spike, or never."""
        age = tl.where(since < never, since, start + t + 1 - last)
        slope = alpha * tl.exp(-beta * age.to(alpha.dtype))
        return tl.where((since < never) | (last > 0), slope, 0.0)

    @triton.jit
    def _slope_of_membrane(
        u, threshold, alpha, beta, formula: tl.constexpr, over_threshold: tl.constexpr
    ):
        """Eq. 13, a rectangle, or Eq. 14."""
        if not over_threshold:
            distance = tl.abs(u - threshold)
        elif u.dtype == tl.float32:  # rounded as a processor's division is
            distance = tl.abs(tl.div_rn(u, threshold + tl.zeros_like(u)) - 1.0)
        else:
            distance = tl.abs(u / threshold - 1.0)
        if formula == "linear":
            slope = alpha * tl.maximum(1.0 - distance, 0.0)
        elif formula == "rectangle":
            slope = tl.where(distance < 0.5, alpha, 0.0)
        else:
            slope = alpha * tl.exp(-beta * distance)
        return slope

    @triton.jit(do_not_specialize=["steps", "start", "width"])
    def _backpropagate(
        above, mask, target, packed, times, kept, current, bias, before, membranes, carry, passed,
        totals, sums, count, source_count, steps, start, channels, width, alpha: tl.float64,
        beta: tl.float64, threshold: tl.float64, leak: tl.float64, formula: tl.constexpr,
        over_threshold: tl.constexpr, size: tl.constexpr, has_mask: tl.constexpr,
        has_membrane: tl.constexpr, alike: tl.constexpr, keeps_membrane: tl.constexpr,
        constant: tl.constexpr, has_bias: tl.constexpr, has_carry: tl.constexpr,
        carries: tl.constexpr, temporal: tl.constexpr, sums_channels: tl.constexpr,
        learns_threshold: tl.constexpr, learns_leak: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        real: tl.constexpr = sums.dtype.element_ty
        never: tl.constexpr = 255 if kept.dtype.element_ty == tl.uint8 else 32767
        alpha, beta = tl.full([], alpha, real), tl.full([], beta, real)
        threshold, leak = tl.full([], threshold, real), tl.full([], leak, real)
        byte = tl.program_id(0) * block + tl.arange(0, block)
        neuron = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
        inside = neuron < count
        row_bytes = (count + 7) // 8
        whole = byte < row_bytes
        zero = tl.zeros([block, 8], dtype=real)
        source = neuron
        if size > 1:  # windows fill the images, so rows of all images may be counted through
            pixel = neuron // channels
            window = pixel // width // size * (width // size) + pixel % width // size
            source = window * channels + neuron % channels
        share = zero + 1.0 / (size * size)
        if has_mask:
            share *= tl.load(mask + neuron, mask=inside, other=0.0).to(real)
        if formula == "age":
            last = tl.load(times + neuron, mask=inside, other=0).to(tl.int32)
            fired_before = (last == start) & (last > 0)
            since = tl.zeros([block, 8], dtype=tl.int32) + never
        if has_membrane:
            u_before = membranes_before(before, neuron, inside, alike)
            fired_before = u_before > threshold
            u, fired = u_before, fired_before
            if has_bias:
                added = tl.load(bias + neuron % channels, mask=inside, other=0.0).to(real)
            if constant:
                given = tl.load(current + neuron, mask=inside, other=0.0).to(real)
                if has_bias:
                    given += added
        of_threshold, of_leak, total = zero, zero, zero
        for t in range(steps):
            spiked = spikes_at(packed, t, row_bytes, byte, whole)
            place = tl.cast(t, tl.int64) * count + neuron
            if formula == "age":
                since = tl.where(spiked, 0, tl.minimum(since + 1, never))
                tl.store(kept + place, since.to(kept.dtype.element_ty), mask=inside)
            if has_membrane:
                if not constant:
                    given = tl.load(current + place, mask=inside, other=0.0).to(real)
                    if has_bias:
                        given += added
                u = leak * u - tl.where(fired, threshold, 0.0) + given
                fired = spiked
                if keeps_membrane:
                    tl.store(membranes + place, u, mask=inside)
                if formula == "age":
                    slope = _slope_of_age(since, t, last, start, alpha, beta, never)
                else:
                    slope = _slope_of_membrane(u, threshold, alpha, beta, formula, over_threshold)
                if formula == "rectangle":
                    store_bits(kept, t, row_bytes, byte, (slope > 0.0) & inside)
                if learns_threshold and over_threshold:
                    from_above = above + tl.cast(t, tl.int64) * source_count + source
                    g = tl.load(from_above, mask=inside, other=0.0).to(real) * share
                    of_threshold -= g * slope * u / threshold
        tl.debug_barrier()  # what was kept is read by other threads
        after = zero
        if has_carry:
            after = tl.load(carry + neuron, mask=inside, other=0.0)
        for step in range(steps):
            back = steps - 1 - step
            place = tl.cast(back, tl.int64) * count + neuron
            if formula == "age":
                age = tl.load(kept + place, mask=inside, other=0).to(tl.int32)
                slope = _slope_of_age(age, back, last, start, alpha, beta, never)
            elif formula == "rectangle":
                slope = tl.where(spikes_at(kept, back, row_bytes, byte, whole), alpha, 0.0)
            else:
                now = tl.load(membranes + place, mask=inside, other=0.0)
                slope = _slope_of_membrane(now, threshold, alpha, beta, formula, over_threshold)
            from_above = above + tl.cast(back, tl.int64) * source_count + source
            g = tl.load(from_above, mask=inside, other=0.0).to(real) * share * slope
            if learns_threshold and not over_threshold:
                of_threshold -= g
            if temporal:
                g += leak * after
            after = g
            tl.store(target + place, after.to(target.dtype.element_ty), mask=inside)
            if sums_channels:
                total += after
            if learns_threshold:
                earlier = spikes_at(packed, back - 1, row_bytes, byte, whole & (back > 0))
                earlier = tl.where(back > 0, earlier, fired_before)
                of_threshold -= tl.where(earlier, after, 0.0)
            if learns_leak:
                below = tl.load(membranes + place - count, mask=inside & (back > 0), other=0.0)
                of_leak += after * tl.where(back > 0, below, u_before)
        if carries:
            tl.store(passed + neuron, after, mask=inside)
        if sums_channels:
            tl.store(totals + neuron, total, mask=inside)
        if learns_threshold or learns_leak:
            # neurons beyond the last have no gradient
            own = sums + tl.program_id(0) * 3
            tl.store(own, tl.sum(of_threshold))
            tl.store(own + 1, tl.sum(of_leak))
            tl.store(own + 2, tl.sum(after))


def backpropagate(above: Tensor | PooledGradient, layer: Layer) -> LayerGradient:
    """See :func:`stdb.kernels.backpropagate`; a pooled gradient is spread on the way."""
    size, mask, width = 1, None, 1
    channels = 1 if layer.bias is None else len(layer.bias)
    source, count = above, above.shape[1:].numel()
    if isinstance(above, PooledGradient):
        source, size, mask = above.above, above.size, above.mask
        if size > 1:
            channels, width = above.shape[2], above.row
    assert isinstance(source, Tensor)
    source = to_matrix(source)
    steps, row_bytes = layer.packed.shape
    target, surrogate, formula = source, layer.surrogate, layer.surrogate.formula
    lowered = layer.lowered or layer.real
    if size > 1 or source.dtype != lowered:
        target = source.new_empty(steps, count, dtype=lowered)

    def scratch(wanted: bool, *shape: int, dtype: torch.dtype = layer.real) -> Tensor:
        return source.new_empty(shape if wanted else 0, dtype=dtype)

    has_membrane = layer.current is not None
    keeps = has_membrane and (formula in ("linear", "exponential") or layer.learns_leak)
    summed = layer.learns_threshold or layer.learns_leak
    of_age = formula == "age"
    kept = scratch(
        of_age or formula == "rectangle", steps, count if of_age else row_bytes,
        dtype=torch.int16 if of_age and steps > LONGEST_OF_BYTES else torch.uint8,
    )  # fmt: skip
    passed, totals = scratch(layer.carries, count), scratch(layer.channels > 0, count)
    sums = scratch(summed, triton.cdiv(row_bytes, BYTES_PER_PROGRAM), 3)
    launch(
        _backpropagate, row_bytes, source, sums if mask is None else to_matrix(mask[None]), target,
        layer.packed, _or(layer.last_spike, kept), kept, _or(layer.current, sums),
        _or(layer.bias, sums), _or(layer.before, sums), scratch(keeps, steps, count),
        _or(layer.carry, sums), passed, totals, sums, count, source.shape[1], steps, layer.start,
        channels, width,
        surrogate.alpha / layer.scale, surrogate.beta, layer.threshold, layer.leak,
        formula=formula, over_threshold=surrogate.over_threshold, size=size,
        has_mask=mask is not None, has_membrane=has_membrane, alike=are_alike(layer.before),
        keeps_membrane=keeps,
        constant=layer.current is not None and len(layer.current) < steps,
        has_bias=layer.bias is not None, has_carry=layer.carry is not None, carries=layer.carries,
        temporal=layer.temporal, sums_channels=layer.channels > 0,
        learns_threshold=layer.learns_threshold, learns_leak=layer.learns_leak,
    )  # fmt: skip
    threshold, leak, first = sums.sum(0, dtype=torch.float64) if summed else (0.0, 0.0, 0.0)
    return LayerGradient(
        target, threshold, leak, passed if layer.carries else None, first,
        totals.view(-1, layer.channels).sum(0) if layer.channels else None,
    )  # fmt: skip


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """What a kernel is given where there is nothing, and does not look at."""
    return other if x is None else x
