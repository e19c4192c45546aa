"""Every backend against the reference in plain torch, on random shapes; and that one by hand.

With TRITON_INTERPRET=1 the GPU's kernels are among the backends: ``test_gpu.py`` runs this file so.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stdb import kernels
from stdb.kernels import PooledGradient, bits, gpu, neurons, parallel, reference
from stdb.kernels.layout import to_matrix

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# the interpreter is slow, and Triton's arithmetic is that of float32
BACKENDS = [gpu] if INTERPRETED else [neurons]
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.float64]
EXAMPLES = settings(max_examples=15 if INTERPRETED else 60, deadline=None, derandomize=True)
backends = pytest.mark.parametrize("backend", BACKENDS, ids=lambda module: module.__name__)


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"], autouse=True)
def threads(request, monkeypatch):
    """However little there is to do."""
    monkeypatch.setattr(parallel, "WORK_PER_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


class Chunk:
    """A chunk of random currents, and a state to start from."""

    def __init__(self, steps, count, seed, dtype, leak=1.0):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.leak = dtype, leak
        # multiples of 1/8: sums are exact where λ is a power of two, ties with V included
        self.current = self.grid(steps, count)
        self.membrane = self.grid(count)
        self.times = torch.randint(0, 5, (count,), generator=self.generator).to(torch.int16)

    def grid(self, *shape):
        return torch.randint(-16, 17, shape, generator=self.generator).to(self.dtype) / 8

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=self.dtype)


@st.composite
def chunks(draw):
    """Chunks of all widths: within a byte, about a strip, over several."""
    count = draw(st.one_of(st.integers(1, 20), st.integers(500, 530), st.integers(1020, 1100)))
    steps, seed = draw(st.integers(1, 9)), draw(st.integers(0, 1000))
    leak = draw(st.sampled_from([1.0, 0.5]))
    return Chunk(steps, count, seed, draw(st.sampled_from(DTYPES)), leak)


@backends
@EXAMPLES
@given(chunk=chunks(), dense=st.sampled_from(["none", "apart", "in place"]), note=st.booleans())
def test_fire(backend, chunk, dense, note):
    """Spikes as bits and as numbers, membranes and spike times are equal; currents are read."""
    found = []
    for one in (backend, reference):
        current, membrane, times = (t.clone() for t in (chunk.current, chunk.membrane, chunk.times))
        spikes = {"none": None, "apart": torch.empty_like(current), "in place": current}[dense]
        packed = one.fire(
            current, membrane, 0.5, chunk.leak, last_spike=times if note else None, start=4,
            spikes=spikes,
        )  # fmt: skip
        if dense != "in place":
            assert torch.equal(current, chunk.current)
        if spikes is not None:
            assert torch.equal(spikes, bits.unpack(packed, len(membrane), chunk.dtype))
        found.append((packed, membrane, times))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@backends
@EXAMPLES
@given(chunk=chunks(), start=st.sampled_from([0, 4, 30_000]))
def test_note_last_spikes(backend, chunk, start):
    """The latest spike of each neuron, counted from 1; one that was silent keeps its time."""
    packed = bits.pack((chunk.current > 1).to(chunk.dtype))
    found, expected = chunk.times.clone(), chunk.times.clone()
    backend.note_last_spikes(packed, found, start)
    reference.note_last_spikes(packed, expected, start)
    assert torch.equal(found, expected)


@backends
@EXAMPLES
@given(chunk=chunks())
def test_count_spikes(backend, chunk):
    """Each neuron's, in the type that is asked for."""
    packed = bits.pack((chunk.current > 0).to(chunk.dtype))
    found = backend.count_spikes(packed, len(chunk.membrane), chunk.dtype)
    assert found.dtype == chunk.dtype
    assert torch.equal(found, reference.count_spikes(packed, len(chunk.membrane), chunk.dtype))


@backends
@EXAMPLES
@given(
    chunk=chunks(),
    carried=st.booleans(),
    temporal=st.booleans(),
    beta=st.sampled_from([0.0, 0.05, 2.0]),
)
def test_backpropagate_stdb(backend, chunk, carried, temporal, beta):
    """To the rounding of the type, with and without the step after the chunk and the leak path."""
    packed = bits.pack((chunk.current > 1).to(chunk.dtype))
    grad = chunk.normal(*chunk.current.shape)
    carry = chunk.normal(len(chunk.membrane)) if carried else None
    rest = packed, chunk.times, 4, 0.3, beta, carry, chunk.leak, temporal
    found = backend.backpropagate_stdb(grad.clone(), *rest)
    torch.testing.assert_close(found, reference.backpropagate_stdb(grad.clone(), *rest))


@backends
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("size", "channels"), [(1, 3), (2, 1), (2, 40), (3, 7)])
def test_backpropagate_below_a_pool(backend, size, channels, masked):
    """The gradient that is spread on the way is the one that is spread before."""
    generator = torch.Generator().manual_seed(size)
    shape = (3, 2, channels, 4 * size, 6 * size)
    dtype = DTYPES[-1]
    above = torch.randn(3, 2, channels, 4, 6, generator=generator, dtype=dtype)
    mask = (torch.rand(shape[1:], generator=generator) < 0.7).to(dtype) / 0.7 if masked else None
    pooled = PooledGradient(above, size, mask)
    spread = above.repeat_interleave(size, 3).repeat_interleave(size, 4) / size**2
    torch.testing.assert_close(pooled.dense(), spread if mask is None else spread * mask)
    assert pooled.shape == shape
    dense = to_matrix(pooled.dense())
    packed = bits.pack((torch.rand(dense.shape, generator=generator) < 0.2).to(dtype))
    times = torch.randint(0, 5, dense.shape[1:], generator=generator).to(torch.int16)
    rest = packed, times, 4, 0.3, 0.05, None, 0.9, True
    wanted = reference.backpropagate_stdb(dense.clone(), *rest)
    torch.testing.assert_close(backend.backpropagate_stdb(pooled, *rest), wanted)


@pytest.mark.parametrize("leak", [1.0, 0.75])
def test_the_reference_by_hand(leak):
    """Eq. 2 and Eq. 11 written out, neuron after neuron, in Python's numbers."""
    chunk = Chunk(7, 5, 3, torch.float64, leak)
    membrane, times = chunk.membrane.clone(), chunk.times.clone()
    packed = reference.fire(chunk.current, membrane, 0.5, leak, last_spike=times, start=4)
    spikes = bits.unpack(packed, 5, torch.float64)
    grad = chunk.normal(7, 5)
    found = reference.backpropagate_stdb(
        grad.clone(), packed, chunk.times, 4, 0.3, 0.05, None, leak, True
    )
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


def test_a_backend_for_every_device():
    """A CPU has numba's; a device without kernels of its own has the reference."""
    assert kernels.backend(torch.device("cpu")) is neurons
    assert kernels.backend(torch.device("meta")) is reference
