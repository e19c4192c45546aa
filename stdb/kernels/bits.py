"""Spike trains kept as bits: eight spikes to a byte, a row of bytes for every time step.

Exact backpropagation through time with the STDB surrogate needs nothing of the past but the spikes,
so they are what is stored, at 1/8 byte each. Packing works on eight bytes at a time: multiplying a
64-bit word of eight 0/1 bytes by a constant gathers their lowest bits in the word's top byte.
"""

import torch
from torch import Tensor

# Bit k of the top byte of the product is the lowest bit of byte k (little endian).
_GATHER = sum(1 << (56 - 7 * k) for k in range(8))


def pack(spikes: Tensor) -> Tensor:
    """Pack (T, M) zeros and ones into (T, ⌈M/8⌉) bytes."""
    steps, count = spikes.shape
    padded = torch.empty(steps, row_bytes(count) * 8, dtype=torch.uint8, device=spikes.device)
    padded[:, :count] = spikes
    padded[:, count:] = 0
    words = padded.view(torch.int64)
    return words.mul_(_GATHER).bitwise_right_shift_(56).to(torch.uint8)


def unpack(packed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Undo :func:`pack`: a contiguous (T, count) tensor of zeros and ones."""
    spread = _byte_table(packed.device)[packed.int()].view(torch.uint8)
    return spread.view(len(packed), -1)[:, :count].to(dtype)


def row_bytes(count: int) -> int:
    """⌈count/8⌉."""
    return -(-count // 8)


def _byte_table(device: torch.device) -> Tensor:
    """(256,) int64: the eight bits of each byte spread over the eight bytes of a word."""
    byte = torch.arange(256, device=device)
    bits = byte[:, None] >> torch.arange(8, device=device) & 1  # (256, 8)
    return bits.to(torch.uint8).view(torch.int64).reshape(256)
