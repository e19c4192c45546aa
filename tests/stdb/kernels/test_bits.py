"""Spike trains as bits, against numpy's own packing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stdb.kernels import bits


def spikes(steps, count, seed=0, density=0.5):
    """A float32 train (steps, count) of zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(steps, count, generator=generator) < density).float()


@pytest.mark.parametrize("count", [*range(1, 26), 255, 256, 257, 1003])
def test_same_bytes_as_numpy(count):
    """Bit k of byte b is spike 8·b + k of a step, and its last byte is filled with zeros."""
    train = spikes(3, count, seed=count)
    expected = np.packbits(train.numpy().astype(np.uint8), axis=1, bitorder="little")
    packed = bits.pack(train)
    assert packed.dtype == torch.uint8
    np.testing.assert_array_equal(packed.numpy(), expected)


def test_all_bytes():
    """Each of the 256 bytes survives in both directions."""
    every = torch.arange(256, dtype=torch.uint8)[:, None]
    expected = np.unpackbits(every.numpy(), axis=1, bitorder="little")
    unpacked = bits.unpack(every, 8, torch.float32)
    np.testing.assert_array_equal(unpacked.numpy(), expected)
    assert torch.equal(bits.pack(unpacked), every)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    steps=st.integers(1, 7),
    count=st.integers(1, 300),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    density=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
)
def test_round_trip(steps, count, dtype, density):
    """Whatever the shape and dtype, what was packed comes back; it took 1/8 byte a spike."""
    train = spikes(steps, count, steps, density).to(dtype)
    kept = train.clone()
    packed = bits.pack(train)
    unpacked = bits.unpack(packed, count, dtype)
    assert packed.shape == (steps, -(-count // 8))
    assert unpacked.is_contiguous()
    assert unpacked.dtype == dtype
    assert torch.equal(unpacked, kept)
    assert torch.equal(train, kept)
