"""The reference in plain torch, by hand."""

import pytest
import torch

import stdb
from stdb import kernels
from stdb.kernels import bits, reference
from tests.stdb.kernels.test_backends import Chunk


@pytest.mark.parametrize("leak", [1.0, 0.75])
def test_the_reference_by_hand(leak):
    """Eq. 2 and Eq. 11 written out, neuron after neuron, in Python's numbers."""
    chunk = Chunk(7, 5, 3, torch.float64, leak)
    membrane, times = chunk.membrane.clone(), chunk.times.clone()
    packed = reference.fire(chunk.current, membrane, 0.5, leak, last_spike=times, start=4)
    spikes = bits.unpack(packed, 5, torch.float64)
    grad = chunk.normal(7, 5)
    layer = kernels.Layer(
        packed, stdb.STDB(0.3, 0.05), 0.5, torch.float64, leak, start=4, last_spike=chunk.times
    )
    found = reference.backpropagate(grad.clone(), layer).current
    for m in range(5):
        u, last, slopes = float(chunk.membrane[m]), int(chunk.times[m]), []
        for t in range(7):
            u = leak * u - 0.5 * (u > 0.5) + float(chunk.current[t, m])
            assert float(spikes[t, m]) == (u > 0.5)
            last = 5 + t if u > 0.5 else last
            slopes.append(0.3 * 2.718281828459045 ** (-0.05 * (5 + t - last)) if last else 0.0)
        assert float(membrane[m]) == pytest.approx(u)
        assert int(times[m]) == last
        after = 0.0
        for t in reversed(range(7)):
            after = float(grad[t, m]) * slopes[t] + leak * after
            assert float(found[t, m]) == pytest.approx(after)
