"""Products of events with weights on a CPU, compiled by numba: the work is that of the spikes.

Everything rests on one primitive, :func:`gather_rows`, which adds up the rows of a matrix that
events name, with sums in registers. A convolution of spikes is that for the weights of the taps
around an output pixel; its weight gradient is that for the gradients around the events of a
channel. Arrays are flat and in memory order: (N, P, C) for N = T·B images of P pixels, channels
last; events are as in :mod:`stdb.kernels.events`.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from .compiled import compiled

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


@compiled()
def convolve(
    first, last, starts, ends, channels, values, matrix, wide, kernel, stride, padding, dilation,
    channel_count, shape, new_shape, out,
):  # fmt: skip
    """out[n, q, :] = Σ over taps and events of matrix[tap·C + channel, :].

    Ranges over (image, output row). ``out`` is (N, Q, ≥ filters); where a row of it is not whole
    vectors, sums are made aside. ``shape`` and ``new_shape`` are (H, W) before and after.
    """
    height, width = shape
    new_height, new_width = new_shape
    filters = out.shape[2]
    taps = kernel[0] * kernel[1]
    rows = np.empty(taps * channel_count, np.int32)
    weights = np.empty(taps * channel_count, out.dtype)
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
                    base = (i * kernel[1] + j) * channel_count
                    for k in range(starts[n, p], ends[n, p]):
                        rows[count] = base + channels[k]
                        weights[count] = values[k]
                        count += 1
            at = ((n * new_height + y) * new_width + x) * filters
            if wide == filters:
                flat[at : at + filters] = 0
                gather_rows(flat, at, matrix, wide, rows, weights, 0, count)
            else:
                aside[:] = 0
                gather_rows(aside, 0, matrix, wide, rows, weights, 0, count)
                flat[at : at + filters] = aside[:filters]


@compiled()
def convolve_weight(
    first, last, lists, places, values, grad, wide, kernel, stride, padding, dilation,
    shape, new_shape, images, out,
):  # fmt: skip
    """out[c, tap, :] += Σ over the events of channel c of the gradient where they arrive.

    Ranges over channel_count. lists[n, c] … lists[n, c + 1] are the events of channel c in image n
    (``places``: their pixels); ``grad`` is flat, (N, Q, wide).
    """
    width = shape[1]
    new_height, new_width = new_shape
    taps = kernel[0] * kernel[1]
    most = shape[0] * shape[1]
    rows = np.empty(most, np.int32)
    weights = np.empty(most, grad.dtype)
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
                        weights[count] = values[k]
                        count += 1
                    at = (c * taps + i * kernel[1] + j) * wide
                    gather_rows(flat, at, grad, wide, rows, weights, 0, count)


@compiled()
def multiply(first, last, edges, channels, values, matrix, wide, columns, images, out):
    """out[n, :] = Σ over events of matrix[name, :], over blocks of ``columns`` columns.

    Ranges over blocks, outermost, and within each goes by blocks of rows (:func:`by_rows`), so that
    a tile of the matrix stays in the first cache for all images. ``matrix`` is (blocks, channels,
    columns), ``out`` (blocks, N, columns), on zeros.
    """
    for block in range(first, last):
        part = matrix[block * wide :]
        for r in range(edges.shape[1] - 1):
            for n in range(images):
                gather_rows(
                    out, (block * images + n) * columns, part, columns, channels, values,
                    edges[n, r], edges[n, r + 1],
                )  # fmt: skip


@compiled()
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
