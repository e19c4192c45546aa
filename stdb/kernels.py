"""CPU kernels, compiled by numba at first use and kept on disk: work on spikes, not on zeros.

Everything rests on one primitive, :func:`gather_rows`, which adds up the rows of a matrix that
events name, with sums in registers. A convolution of spikes is that for the weights of the taps
around an output pixel; its weight gradient is that for the gradients around the events of a
channel. Arrays are flat and in memory order: (N, P, C) for N = T·B images of P pixels, channels
last. Kernels work on a range [first, last) of their outermost index, so that :func:`run` can give
every thread its share; each output belongs to one range, so results do not depend on the threads.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.cpython.unsafe.numbers import trailing_zeros
from numba.extending import intrinsic

WORK_PER_THREAD = 1 << 16
_pools: dict[int, ThreadPoolExecutor] = {}


def run(kernel: Callable[..., None], count: int, work: int, *arguments: Any) -> None:
    """``kernel(first, last, *arguments)`` over [0, count), shared by torch's number of threads.

    ``work`` is about how many elements are touched; a little of it is not worth a second thread.
    """
    threads = min(torch.get_num_threads(), count, work // WORK_PER_THREAD)
    if threads <= 1:
        kernel(0, count, *arguments)
        return
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads, "stdb")
    edges = [count * k // threads for k in range(threads + 1)]
    tasks = [_pools[threads].submit(kernel, a, b, *arguments) for a, b in pairwise(edges)]
    for task in tasks:
        task.result()


# -- the primitive ---------------------------------------------------------------------------------

VECTOR_BYTES = (
    64  # of one SIMD vector in the code below; LLVM splits it where registers are smaller
)
BLOCK = 4  # vectors that are summed at once


@intrinsic
def gather_rows(typing, out, at, matrix, width, rows, factors, first, last):
    """out[at : at + width] += Σ_k factors[k] · matrix[rows[k], : width] for k in [first, last).

    ``out`` and ``matrix`` are flat arrays of the same float type, ``width`` (elements of a row) is
    whole vectors (:func:`padded`), ``rows`` int32, ``factors`` of the float type.
    """
    if out.dtype != matrix.dtype or out.dtype != factors.dtype or rows.dtype != types.int32:
        raise TypingError("gather_rows wants arrays of one float type, and int32 rows")
    place = types.int64
    signature = types.void(out, place, matrix, place, rows, factors, place, place)

    def generate(context, builder, signature, arguments):
        at, width, first, last = (arguments[k] for k in (1, 3, 6, 7))
        out, matrix, rows, factors = (
            cgutils.create_struct_proxy(signature.args[k])(context, builder, arguments[k]).data
            for k in (0, 2, 4, 5)
        )
        real = context.get_data_type(signature.args[0].dtype)
        size = context.get_abi_sizeof(real)
        lanes = VECTOR_BYTES // size
        vector, index = ir.VectorType(real, lanes), ir.IntType(64)
        undefined = ir.Constant(vector, ir.Undefined)
        fma = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(vector, [vector] * 3),
            f"llvm.fmuladd.v{lanes}f{8 * size}",
        )

        def pointer(base, offset):
            return builder.bitcast(builder.gep(base, [offset]), vector.as_pointer())

        column = cgutils.alloca_once_value(builder, ir.Constant(index, 0))
        for vectors in (BLOCK, 1):  # blocks as wide as possible, then the rest
            step = ir.Constant(index, vectors * lanes)
            check = builder.append_basic_block("columns")
            enter = builder.append_basic_block("block")
            loop = builder.append_basic_block("rows")
            leave = builder.append_basic_block("store")
            end = builder.append_basic_block("next")
            builder.branch(check)
            builder.position_at_end(check)
            j = builder.load(column)
            builder.cbranch(builder.icmp_signed("<=", builder.add(j, step), width), enter, end)
            builder.position_at_end(enter)
            places = [
                pointer(out, builder.add(at, builder.add(j, ir.Constant(index, v * lanes))))
                for v in range(vectors)
            ]
            before = [builder.load(place, align=size) for place in places]
            builder.cbranch(builder.icmp_signed("<", first, last), loop, leave)
            builder.position_at_end(loop)
            k = builder.phi(index)
            k.add_incoming(first, enter)
            sums = [builder.phi(vector) for _ in places]
            row = builder.sext(builder.load(builder.gep(rows, [k])), index)
            factor = builder.insert_element(
                undefined, builder.load(builder.gep(factors, [k])), ir.Constant(ir.IntType(32), 0)
            )
            factor = builder.shuffle_vector(
                factor, undefined, ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
            )
            base = builder.add(builder.mul(row, width), j)
            after = []
            for v in range(vectors):
                place = pointer(matrix, builder.add(base, ir.Constant(index, v * lanes)))
                after.append(builder.call(fma, [factor, builder.load(place, align=size), sums[v]]))
            following = builder.add(k, ir.Constant(index, 1))
            k.add_incoming(following, loop)
            for total, start, value in zip(sums, before, after, strict=True):
                total.add_incoming(start, enter)
                total.add_incoming(value, loop)
            builder.cbranch(builder.icmp_signed("<", following, last), loop, leave)
            builder.position_at_end(leave)
            results = [builder.phi(vector) for _ in places]
            for place, result, start, value in zip(places, results, before, after, strict=True):
                result.add_incoming(start, enter)
                result.add_incoming(value, loop)
                builder.store(result, place, align=size)
            builder.store(builder.add(j, step), column)
            builder.branch(check)
            builder.position_at_end(end)
        return context.get_dummy_value()

    return signature, generate


def padded(width: int, dtype: np.dtype) -> int:
    """``width`` rounded up to whole vectors."""
    lanes = VECTOR_BYTES // dtype.itemsize
    return -(-width // lanes) * lanes


# -- events ----------------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def count_bits(first, last, bits, images_per_step, per_image, counts):
    """counts[n] = spikes of image n; its bits begin at step·stride + (n mod B)·per_image."""
    stride = bits.shape[1]
    flat = bits.reshape(-1)
    for n in range(first, last):
        t, b = divmod(n, images_per_step)
        total = 0
        begin = b * per_image
        end = begin + per_image
        for byte in range(begin >> 3, (end + 7) >> 3):
            value = np.uint32(flat[t * stride + byte])
            if byte == begin >> 3:
                value &= np.uint32(0xFF << (begin & 7) & 0xFF)
            if byte == end >> 3:
                value &= np.uint32((1 << (end & 7)) - 1)
            value = value - ((value >> 1) & np.uint32(0x55))
            value = (value & np.uint32(0x33)) + ((value >> 2) & np.uint32(0x33))
            total += (value + (value >> 4)) & np.uint32(0x0F)
        counts[n] = total


@njit(nogil=True, cache=True)
def list_bits(first, last, bits, images_per_step, pixels, channels, offsets, begins, ends, names):
    """List the set bits of images: names[begins[n, p] : ends[n, p]] are pixel p's channels."""
    stride = bits.shape[1]
    flat = bits.reshape(-1)
    per_image = pixels * channels
    whole_bytes = channels % 8 == 0
    for n in range(first, last):
        t, b = divmod(n, images_per_step)
        e = offsets[n]
        if whole_bytes:
            byte = t * stride + b * (per_image >> 3)
            for p in range(pixels):
                begins[n, p] = e
                for c in range(0, channels, 8):
                    value = np.uint32(flat[byte])
                    byte += 1
                    while value != 0:
                        names[e] = c + np.int64(trailing_zeros(value))
                        value &= value - np.uint32(1)
                        e += 1
                ends[n, p] = e
            continue
        p = 0
        limit = channels  # the first bit of the next pixel
        begins[n, 0] = e
        begin = b * per_image
        for byte in range(begin >> 3, (begin + per_image + 7) >> 3):
            value = np.uint64(flat[t * stride + byte])
            while value != 0:
                m = (byte << 3) + np.int64(trailing_zeros(value)) - begin
                value &= value - np.uint64(1)
                if m < 0:
                    continue
                if m >= per_image:
                    break
                while m >= limit:
                    ends[n, p] = e
                    p += 1
                    begins[n, p] = e
                    limit += channels
                names[e] = m - (limit - channels)
                e += 1
        while p < pixels:
            ends[n, p] = e
            p += 1
            if p < pixels:
                begins[n, p] = e


@njit(nogil=True, cache=True)
def mask_events(first, last, begins, ends, names, factors, mask, new_ends, new_names, new_factors):
    """Multiply by a mask (B, P, C); what it silences is no event any more."""
    pixels = begins.shape[1]
    for n in range(first, last):
        b = n % mask.shape[0]
        for p in range(pixels):
            e = begins[n, p]
            for k in range(begins[n, p], ends[n, p]):
                value = factors[k] * mask[b, p, names[k]]
                if value != 0:
                    new_names[e] = names[k]
                    new_factors[e] = value
                    e += 1
            new_ends[n, p] = e


@njit(nogil=True, cache=True)
def pool_events(
    first, last, begins, ends, names, factors, width, size, channels, share,
    new_width, new_begins, new_ends, new_names, new_factors,
):  # fmt: skip
    """Average over windows of size × size that do not overlap; a channel comes once a window."""
    place = np.full(channels, -1, np.int64)
    for n in range(first, last):
        e = begins[n, 0]
        for q in range(new_begins.shape[1]):
            top, left = q // new_width * size, q % new_width * size
            begin = e
            for y in range(top, top + size):
                for x in range(left, left + size):
                    p = y * width + x
                    for k in range(begins[n, p], ends[n, p]):
                        c = names[k]
                        if place[c] < begin:
                            place[c] = e
                            new_names[e] = c
                            new_factors[e] = share * factors[k]
                            e += 1
                        else:
                            new_factors[place[c]] += share * factors[k]
            new_begins[n, q] = begin
            new_ends[n, q] = e
        place[:] = -1


@njit(nogil=True, cache=True)
def flatten_events(
    first, last, begins, ends, names, factors, pixels, new_begins, new_ends, new_names, new_factors
):
    """(P, C) → channels-first places c·P + p of one pixel."""
    for n in range(first, last):
        e = begins[n, 0]
        new_begins[n, 0] = e
        for p in range(pixels):
            for k in range(begins[n, p], ends[n, p]):
                new_names[e] = names[k] * pixels + p
                new_factors[e] = factors[k]
                e += 1
        new_ends[n, 0] = e


@njit(nogil=True, cache=True)
def scatter_events(first, last, begins, ends, names, factors, out):
    """out[n, p, names] = factors, on zeros."""
    for n in range(first, last):
        for p in range(begins.shape[1]):
            for k in range(begins[n, p], ends[n, p]):
                out[n, p, names[k]] = factors[k]


# -- products --------------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def convolve(
    first, last, begins, ends, names, factors, matrix, wide, kernel, stride, padding, dilation,
    channels, shape, new_shape, out,
):  # fmt: skip
    """out[n, q, :] = Σ over taps and events of matrix[tap·C + channel, :].

    Ranges over (image, output row). ``out`` is (N, Q, ≥ filters); where a row of it is not whole
    vectors, sums are made aside. ``shape`` and ``new_shape`` are (H, W) before and after.
    """
    height, width = shape
    new_height, new_width = new_shape
    filters = out.shape[2]
    taps = kernel[0] * kernel[1]
    rows = np.empty(taps * channels, np.int32)
    values = np.empty(taps * channels, out.dtype)
    aside = np.zeros(wide, out.dtype)
    flat = out.reshape(-1)
    for task in range(first, last):
        n, y = divmod(task, new_height)
        for x in range(new_width):
            count = 0
            for i in range(kernel[0]):
                iy = y * stride[0] + i * dilation[0] - padding[0]
                if iy < 0 or iy >= height:
                    continue
                for j in range(kernel[1]):
                    ix = x * stride[1] + j * dilation[1] - padding[1]
                    if ix < 0 or ix >= width:
                        continue
                    p = iy * width + ix
                    base = (i * kernel[1] + j) * channels
                    for k in range(begins[n, p], ends[n, p]):
                        rows[count] = base + names[k]
                        values[count] = factors[k]
                        count += 1
            at = ((n * new_height + y) * new_width + x) * filters
            if wide == filters:
                flat[at : at + filters] = 0
                gather_rows(flat, at, matrix, wide, rows, values, 0, count)
            else:
                aside[:] = 0
                gather_rows(aside, 0, matrix, wide, rows, values, 0, count)
                flat[at : at + filters] = aside[:filters]


@njit(nogil=True, cache=True)
def convolve_weight(
    first, last, lists, places, factors, grad, wide, kernel, stride, padding, dilation,
    shape, new_shape, images, out,
):  # fmt: skip
    """out[c, tap, :] += Σ over the events of channel c of the gradient where they arrive.

    Ranges over channels. lists[n, c] … lists[n, c + 1] are the events of channel c in image n
    (``places``: their pixels); ``grad`` is flat, (N, Q, wide).
    """
    width = shape[1]
    new_height, new_width = new_shape
    taps = kernel[0] * kernel[1]
    most = shape[0] * shape[1]
    rows = np.empty(most, np.int32)
    values = np.empty(most, grad.dtype)
    flat = out.reshape(-1)
    for n in range(images):
        for c in range(first, last):
            begin, end = lists[n, c], lists[n, c + 1]
            if begin == end:
                continue
            for i in range(kernel[0]):
                for j in range(kernel[1]):
                    count = 0
                    for k in range(begin, end):
                        iy, ix = divmod(places[k], width)
                        oy = iy + padding[0] - i * dilation[0]
                        ox = ix + padding[1] - j * dilation[1]
                        if oy < 0 or ox < 0:
                            continue
                        if stride[0] != 1 or stride[1] != 1:
                            if oy % stride[0] != 0 or ox % stride[1] != 0:
                                continue
                            oy //= stride[0]
                            ox //= stride[1]
                        if oy >= new_height or ox >= new_width:
                            continue
                        rows[count] = (n * new_height + oy) * new_width + ox
                        values[count] = factors[k]
                        count += 1
                    at = (c * taps + i * kernel[1] + j) * wide
                    gather_rows(flat, at, grad, wide, rows, values, 0, count)


@njit(nogil=True, cache=True)
def by_channel(
    first, last, begins, ends, names, factors, channels, offsets, lists, places, new_factors
):
    """The events of every image again, sorted by channel."""
    pixels = begins.shape[1]
    for n in range(first, last):
        for c in range(channels + 1):
            lists[n, c] = 0
        for p in range(pixels):
            for k in range(begins[n, p], ends[n, p]):
                lists[n, names[k] + 1] += 1
        lists[n, 0] = offsets[n]
        for c in range(channels):
            lists[n, c + 1] += lists[n, c]
        for p in range(pixels):
            for k in range(begins[n, p], ends[n, p]):
                e = lists[n, names[k]]
                places[e] = p
                new_factors[e] = factors[k]
                lists[n, names[k]] = e + 1
        for c in range(channels, 0, -1):
            lists[n, c] = lists[n, c - 1]
        lists[n, 0] = offsets[n]


@njit(nogil=True, cache=True)
def by_rows(first, last, begins, ends, names, factors, rows, edges, new_names, new_factors):
    """The events of every image (one pixel) again, sorted by block of ``rows`` names.

    edges[n, r] … edges[n, r + 1] are those of block r.
    """
    blocks = edges.shape[1] - 1
    for n in range(first, last):
        edges[n, :] = 0
        for k in range(begins[n, 0], ends[n, 0]):
            edges[n, names[k] // rows + 1] += 1
        edges[n, 0] = begins[n, 0]
        for r in range(blocks):
            edges[n, r + 1] += edges[n, r]
        for k in range(begins[n, 0], ends[n, 0]):
            r = names[k] // rows
            e = edges[n, r]
            new_names[e] = names[k]
            new_factors[e] = factors[k]
            edges[n, r] = e + 1
        for r in range(blocks, 0, -1):
            edges[n, r] = edges[n, r - 1]
        edges[n, 0] = begins[n, 0]


@njit(nogil=True, cache=True)
def multiply(first, last, edges, names, factors, matrix, wide, columns, images, out):
    """out[n, :] = Σ over events of matrix[name, :], over blocks of ``columns`` columns.

    Ranges over blocks, outermost, and within each goes by blocks of rows (:func:`by_rows`), so that
    a tile of the matrix stays in the first cache for all images. ``matrix`` is (blocks, names,
    columns), ``out`` (blocks, N, columns), on zeros.
    """
    for block in range(first, last):
        part = matrix[block * wide :]
        for r in range(edges.shape[1] - 1):
            for n in range(images):
                gather_rows(
                    out, (block * images + n) * columns, part, columns, names, factors,
                    edges[n, r], edges[n, r + 1],
                )  # fmt: skip


@njit(nogil=True, cache=True)
def blocks_of_columns(first, last, weight, columns, out):
    """out[block, n, j] = weight[block·columns + j, n], 0 past its end. Ranges over blocks."""
    outputs, inputs = weight.shape
    for block in range(first, last):
        low = block * columns
        high = min(low + columns, outputs)
        for j in range(low, high):
            for n in range(inputs):
                out[block, n, j - low] = weight[j, n]
        out[block, :, high - low :] = 0


# -- neurons ---------------------------------------------------------------------------------------

# a byte's bits as the bytes of a word
BITS_OF = np.array([sum((v >> j & 1) << 8 * j for j in range(8)) for v in range(256)], np.uint64)
STRIP = 512  # neurons whose steps are worked on while they are in the cache


@njit(nogil=True, cache=True, error_model="numpy")
def fire(first, last, current, membrane, threshold, leak, bits, times, note_times, start):
    """Eq. 2 over a chunk: membranes move on, spikes are written as bits. Ranges over 8 neurons.

    ``times`` (count,): brought to each neuron's latest spike, as :func:`latest` does, if
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


@njit(nogil=True, cache=True)
def latest(first, last, bits, start, times):
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


@njit(nogil=True, cache=True)
def count_spikes(first, last, bits, counts):
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


@njit(nogil=True, cache=True, error_model="numpy")
def backpropagate(
    first, last, above, share, size, channels, width, mask, grad, bits, times, start, table, decay,
    carry, has_carry, leak, temporal,
):  # fmt: skip
    """∂L/∂U_t = s_t·∂L/∂O_t + λ·∂L/∂U_{t+1} over a chunk, s of STDB from the spikes.

    ``grad`` (T, M) becomes ∂L/∂U. ∂L/∂O is what it holds; or, for ``size`` > 0, it comes from
    ``above`` (T, M/size²), of which every pixel of a window of size × size gets ``share``, in
    images of ``channels`` and ``width`` that the windows fill, times ``mask`` (M,) unless that
    is empty. ``times``: last spike before the chunk, 0 for never; ``table[Δt]`` =
    α·exp(−β·Δt), ``decay`` = exp(−β); ``carry`` is ∂L/∂U of the step after the chunk. Ranges over
    8 neurons.
    """
    steps, count = grad.shape
    slope = np.empty(STRIP, grad.dtype)
    begins = np.empty(STRIP + 1, np.int64)  # of the strip's pixels …
    sources = np.empty(STRIP, np.int64)  # … and what they are taken from
    for strip in range(first * 8, min(last * 8, count), STRIP):
        end = min(strip + STRIP, last * 8, count)
        pixels = 0
        if size > 0:
            m = strip
            while m < end:
                p, c = divmod(m, channels)
                y, x = divmod(p, width)
                begins[pixels] = m - strip
                sources[pixels] = (y // size * (width // size) + x // size) * channels + c
                m += channels - c
                pixels += 1
            begins[pixels] = end - strip
        for m in range(end - strip):
            then = times[strip + m]
            slope[m] = table[start - then] if then > 0 else 0.0
        for t in range(steps):
            row = grad[t, strip:end]
            for p in range(pixels):
                source = above[t, sources[p] :]
                target = row[begins[p] : begins[p + 1]]
                if len(mask) > 0:
                    part = mask[strip + begins[p] :]
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
