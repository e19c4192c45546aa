"""Numbers in compiled loops: bfloat16 as it lies in memory, and e^x that a processor's lanes take.

numba has no bfloat16: its arrays come as the 16-bit words that they are (:func:`words`).
"""

import math
from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from .compiled import compiled

# a byte's bits as the bytes of a word
BITS_OF = np.array([sum((v >> j & 1) << 8 * j for j in range(8)) for v in range(256)], np.uint64)
LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # ln 2 in two parts
LOWEST = np.float32(-87.0)  # e^x is above the smallest normal float32 there
# 1/n! of the Taylor series, which is enough for |r| ≤ ln(2)/2: its rest is r⁷/7!
C2, C3, C4, C5, C6, C7 = (np.float32(1 / math.factorial(n)) for n in range(2, 8))
ROUND = np.float32(12582912.0)  # 1.5 · 2²³: what is added to it loses its fraction


def words(x: Tensor) -> Any:
    """A tensor as numpy's array of its memory; bfloat16 as uint16."""
    x = x.detach()
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()


def wide(x: Any) -> Any:
    """A number of an array as one to compute with."""
    raise NotImplementedError


def narrow(x: Any, like: Any) -> Any:
    """A number as those of an array are: bfloat16 rounded to the nearest, to even."""
    raise NotImplementedError


def exponential(x: Any) -> Any:
    """e^x for x ≤ 0; below −87 in float32 that of −87."""
    raise NotImplementedError


@overload(wide)
def _wide(x):
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


@overload(narrow)
def _narrow(x, like):
    if like.dtype == types.uint16:
        return _to_bfloat16
    return lambda x, like: x


def _to_bfloat16(x, like):
    word = np.float32(x).view(np.uint32)
    half = np.uint32(np.uint32(0x7FFF) + (np.uint32(word >> np.uint32(16)) & np.uint32(1)))
    rounded = np.uint16(np.uint32(word + half) >> np.uint32(16))
    return np.uint16(0x7FC0) if x != x else rounded  # not a number stays none


@overload(exponential)
def _exponential(x):
    if x == types.float32:
        return _exponential_float32
    return lambda x: math.exp(x)


def _exponential_float32(x):
    x = max(x, LOWEST)
    n = np.float32(np.float32(x * LOG2_E + ROUND) - ROUND)
    r = x - n * LN2_HIGH - n * LN2_LOW
    y = ((((C7 * r + C6) * r + C5) * r + C4) * r + C3) * r + C2
    y = y * r * r + r + np.float32(1.0)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23))
    return y * power.view(np.float32)


@compiled()
def by_neuron(values, first, count, out):
    """Write those of each channel, if there are any, to neurons ``first`` … of ``out``."""
    channels, m = len(values), 0
    while channels > 0 and m < count:
        start = (first + m) % channels
        run = min(channels - start, count - m)
        source, target = values[start : start + run], out[m : m + run]
        for k in range(run):
            target[k] = source[k]
        m += run


@compiled()
def by_channel(values, first, count, out):
    """Add neurons ``first`` … to the sums of their channels, if there are any."""
    channels, m = len(out), 0
    while channels > 0 and m < count:
        start = (first + m) % channels
        run = min(channels - start, count - m)
        source, target = values[m : m + run], out[start : start + run]
        for k in range(run):
            target[k] += source[k]
        m += run
