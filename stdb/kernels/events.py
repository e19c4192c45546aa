"""Events on a CPU: lists of what is not zero, made of bits, and passed through linear operators.

Compiled by numba at first use and kept on disk. Of N = T·B images of P pixels, channels last, the
events of pixel p of image n are ``channels[starts[n, p] : ends[n, p]]`` and ``values`` of the same
range (compressed sparse rows). Kernels work on a range [first, last) of their outermost index
(:func:`stdb.kernels.parallel.run`), images unless said otherwise.
"""

import numpy as np
from numba.cpython.unsafe.numbers import trailing_zeros

from .compiled import compiled


@compiled()
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


@compiled()
def list_bits(
    first, last, bits, images_per_step, pixels, channel_count, offsets, starts, ends, channels
):
    """List the set bits of images, pixel after pixel."""
    stride = bits.shape[1]
    flat = bits.reshape(-1)
    per_image = pixels * channel_count
    whole_bytes = channel_count % 8 == 0
    for n in range(first, last):
        t, b = divmod(n, images_per_step)
        e = offsets[n]
        if whole_bytes:
            byte = t * stride + b * (per_image >> 3)
            for p in range(pixels):
                starts[n, p] = e
                for c in range(0, channel_count, 8):
                    value = np.uint32(flat[byte])
                    byte += 1
                    while value != 0:
                        channels[e] = c + np.int64(trailing_zeros(value))
                        value &= value - np.uint32(1)
                        e += 1
                ends[n, p] = e
            continue
        p = 0
        limit = channel_count  # the first bit of the next pixel
        starts[n, 0] = e
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
                    starts[n, p] = e
                    limit += channel_count
                channels[e] = m - (limit - channel_count)
                e += 1
        while p < pixels:
            ends[n, p] = e
            p += 1
            if p < pixels:
                starts[n, p] = e


@compiled()
def mask_events(
    first, last, starts, ends, channels, values, mask, new_ends, new_channels, new_values
):
    """Multiply by a mask (B, P, C); what it silences is no event any more."""
    pixels = starts.shape[1]
    for n in range(first, last):
        b = n % mask.shape[0]
        for p in range(pixels):
            e = starts[n, p]
            for k in range(starts[n, p], ends[n, p]):
                value = values[k] * mask[b, p, channels[k]]
                if value != 0:
                    new_channels[e] = channels[k]
                    new_values[e] = value
                    e += 1
            new_ends[n, p] = e


@compiled()
def pool_events(
    first, last, starts, ends, channels, values, width, size, channel_count, share,
    new_width, new_starts, new_ends, new_channels, new_values,
):  # fmt: skip
    """Average over windows of size × size that do not overlap; a channel comes once a window."""
    place = np.full(channel_count, -1, np.int64)
    for n in range(first, last):
        e = starts[n, 0]
        for q in range(new_starts.shape[1]):
            top, left = q // new_width * size, q % new_width * size
            begin = e
            for y in range(top, top + size):
                for x in range(left, left + size):
                    p = y * width + x
                    for k in range(starts[n, p], ends[n, p]):
                        c = channels[k]
                        if place[c] < begin:
                            place[c] = e
                            new_channels[e] = c
                            new_values[e] = share * values[k]
                            e += 1
                        else:
                            new_values[place[c]] += share * values[k]
            new_starts[n, q] = begin
            new_ends[n, q] = e
        place[:] = -1


@compiled()
def flatten_events(
    first,
    last,
    starts,
    ends,
    channels,
    values,
    pixels,
    new_starts,
    new_ends,
    new_channels,
    new_values,
):
    """(P, C) → channels-first places c·P + p of one pixel."""
    for n in range(first, last):
        e = starts[n, 0]
        new_starts[n, 0] = e
        for p in range(pixels):
            for k in range(starts[n, p], ends[n, p]):
                new_channels[e] = channels[k] * pixels + p
                new_values[e] = values[k]
                e += 1
        new_ends[n, 0] = e


@compiled()
def scatter_events(first, last, starts, ends, channels, values, out):
    """out[n, p, channels] = values, on zeros."""
    for n in range(first, last):
        for p in range(starts.shape[1]):
            for k in range(starts[n, p], ends[n, p]):
                out[n, p, channels[k]] = values[k]


@compiled()
def by_channel(
    first, last, starts, ends, channels, values, channel_count, offsets, lists, places, new_values
):
    """The events of every image again, sorted by channel."""
    pixels = starts.shape[1]
    for n in range(first, last):
        for c in range(channel_count + 1):
            lists[n, c] = 0
        for p in range(pixels):
            for k in range(starts[n, p], ends[n, p]):
                lists[n, channels[k] + 1] += 1
        lists[n, 0] = offsets[n]
        for c in range(channel_count):
            lists[n, c + 1] += lists[n, c]
        for p in range(pixels):
            for k in range(starts[n, p], ends[n, p]):
                e = lists[n, channels[k]]
                places[e] = p
                new_values[e] = values[k]
                lists[n, channels[k]] = e + 1
        for c in range(channel_count, 0, -1):
            lists[n, c] = lists[n, c - 1]
        lists[n, 0] = offsets[n]


@compiled()
def by_rows(first, last, starts, ends, channels, values, rows, edges, new_channels, new_values):
    """The events of every image (one pixel) again, sorted by block of ``rows`` channels.

    edges[n, r] … edges[n, r + 1] are those of block r.
    """
    blocks = edges.shape[1] - 1
    for n in range(first, last):
        edges[n, :] = 0
        for k in range(starts[n, 0], ends[n, 0]):
            edges[n, channels[k] // rows + 1] += 1
        edges[n, 0] = starts[n, 0]
        for r in range(blocks):
            edges[n, r + 1] += edges[n, r]
        for k in range(starts[n, 0], ends[n, 0]):
            r = channels[k] // rows
            e = edges[n, r]
            new_channels[e] = channels[k]
            new_values[e] = values[k]
            edges[n, r] = e + 1
        for r in range(blocks, 0, -1):
            edges[n, r] = edges[n, r - 1]
        edges[n, 0] = starts[n, 0]
