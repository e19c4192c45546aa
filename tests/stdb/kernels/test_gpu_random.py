"""The GPU's random numbers are those of plain torch, in Triton's interpreter.

With TRITON_INTERPRET=1: ``test_gpu.py`` runs this file so.
"""

import os

import pytest
import torch

from stdb import randomness
from stdb.kernels import gpu_random

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="test_gpu.py runs it in the interpreter"
)
KEYS = randomness.sample_keys(torch.tensor([3, 1 << 40, 7]), 5)


@pytest.mark.parametrize("count", [1, 100, 1500])
def test_uniform(count):
    """Bit for bit, of any number of streams."""
    for keys in (KEYS, randomness.derive(KEYS[None], torch.arange(4)[:, None])):
        assert torch.equal(gpu_random.uniform(keys, count), randomness.uniform(keys, count))


@pytest.mark.parametrize("number", [5, -1, 1 << 40, torch.arange(4)[:, None]])
def test_streams(number):
    """Bit for bit, of one coordinate for all and of one for each."""
    found = gpu_random.derive(KEYS, torch.as_tensor(number))
    assert torch.equal(found, randomness.derive(KEYS, number))


@pytest.mark.parametrize("shape", [(3, 20), (3, 5, 6), (3, 16, 5, 7), (3, 16, 1, 1)])
@pytest.mark.parametrize("rate", [0.1, 0.25, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropout_masks(shape, rate, dtype):
    """Bit for bit, in channels-last order."""
    arguments = (rate, torch.Size(shape), dtype)
    wanted = randomness.dropout_mask(KEYS, 2, 1, *arguments)
    keys = randomness.derive(randomness.derive(KEYS, 2), randomness._DROPOUT_STREAM + 1)
    found = gpu_random.dropout_mask(keys, *arguments)
    assert torch.equal(found, wanted)
    assert found.movedim(1, -1).is_contiguous()
