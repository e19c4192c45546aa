"""The GPU's kernels in Triton's interpreter, against those of the CPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")

PROGRAM = """
import torch
from stdb import bits, fused, neuron
from stdb.surrogate import STDB

for count in (1, 9, 1000, 4099):
    for leak in (1.0, 0.75):
        generator = torch.Generator().manual_seed(count)
        draw = lambda *shape: torch.randn(shape, generator=generator)
        current, membrane, grad = draw(9, count), draw(count), draw(9, count)
        times = torch.randint(0, 5, (count,), generator=generator).to(torch.int16)
        ours, theirs, spikes = membrane.clone(), membrane.clone(), current.clone()
        packed = neuron.fire(current, ours, 0.5, leak)
        assert torch.equal(fused.fire(spikes, theirs, 0.5, leak), packed)
        assert torch.equal(theirs, ours)
        assert torch.equal(spikes, bits.unpack(packed, count, torch.float32))
        later, again = times.clone(), times.clone()
        neuron.latest(packed, later, 4)
        fused.latest(packed, again, 4)
        assert torch.equal(again, later)
        for carry in (None, draw(count)):
            for temporal in (True, False):
                expected = neuron.backpropagate_stdb(
                    grad.clone(), packed, times, 4, STDB(0.3, 0.05), 0.5, carry, leak, temporal
                )
                found = fused.backpropagate_stdb(
                    grad.clone(), packed, times, 4, 0.3, 0.05, carry, leak, temporal
                )
                torch.testing.assert_close(found, expected)
print("equal")
"""


def test_fused_kernels_in_the_interpreter():
    """Spikes, bits, membranes and spike times equal, gradients to rounding."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # read when Triton is imported
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "equal\n"
