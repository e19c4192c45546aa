"""Every backend against the reference in plain torch, on random shapes; and that one by hand.

With TRITON_INTERPRET=1 the GPU's kernels are among the backends: ``test_gpu.py`` runs this file so.
"""

import dataclasses
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stdb
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
@given(
    chunk=chunks(),
    dense=st.sampled_from(["none", "apart", "in place"]),
    note=st.booleans(),
    form=st.sampled_from(["plain", "constant", "bias"]),
)
def test_fire(backend, chunk, dense, note, form):
    """Spikes as bits and as numbers, membranes and spike times are equal; currents are read."""
    found, steps = [], len(chunk.current)
    bias = chunk.grid(3) if form == "bias" and len(chunk.membrane) % 3 == 0 else None
    for one in (backend, reference):
        current, membrane, times = (t.clone() for t in (chunk.current, chunk.membrane, chunk.times))
        spikes = {"none": None, "apart": torch.empty_like(current), "in place": current}[dense]
        packed = one.fire(
            current[:1] if form == "constant" else current, membrane, 0.5, chunk.leak,
            last_spike=times if note else None, start=4, spikes=spikes, bias=bias, steps=steps,
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
@given(chunk=chunks(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_unpack(backend, chunk, dtype):
    """Ones where there are spikes, of any type."""
    spikes = chunk.current > 0
    found = backend.unpack(bits.pack(spikes.to(chunk.dtype)), len(chunk.membrane), dtype)
    assert torch.equal(found, spikes.to(dtype))


@backends
@pytest.mark.parametrize("formula", [stdb.STDB, stdb.Rectangle, stdb.Linear, stdb.Exponential])
def test_sixteen_bits(backend, formula):
    """Currents and gradients in bfloat16: exact where they are read, rounded where written."""
    chunk = Chunk(4, 1056, 5, torch.float32)
    layer = layer_of(chunk, formula(1.0, 0.5, True), True, True, (True, False), "bias", 0)
    half = dataclasses.replace(
        layer, current=None if layer.current is None else layer.current.bfloat16(),
        lowered=torch.bfloat16,
    )  # fmt: skip
    grad = chunk.normal(*chunk.current.shape).bfloat16()
    found = backend.backpropagate(grad.clone(), half)
    wanted = reference.backpropagate(grad.float(), layer)
    assert torch.equal(found.current, wanted.current.bfloat16())
    close(dataclasses.replace(found, current=wanted.current), wanted)
    membranes = chunk.membrane.clone(), chunk.membrane.clone()
    spikes = [
        module.fire(current, u, 0.5, 1.0, bias=layer.bias)
        for module, current, u in zip(
            (backend, reference), (chunk.current.bfloat16(), chunk.current), membranes, strict=True
        )
    ]
    assert torch.equal(*spikes)
    assert torch.equal(*membranes)


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


SLOPES = [
    *(kind(0.3, beta, over) for beta in (0.0, 0.05, 2.0) for kind in (stdb.STDB, stdb.Exponential)
      for over in (False, True)),
    *(kind(0.3, 0.0, over) for kind in (stdb.Linear, stdb.Rectangle) for over in (False, True)),
]  # fmt: skip


def layer_of(chunk, surrogate, carried, temporal, learns, form, start):
    """A layer that did what a chunk says, and what its backward pass is given of it."""
    current = chunk.current[:1] if form == "constant" else chunk.current
    bias = chunk.grid(3) if form == "bias" and len(chunk.membrane) % 3 == 0 else None
    times = chunk.times if start else torch.zeros_like(chunk.times)
    packed = reference.fire(
        current, chunk.membrane.clone(), 0.5, chunk.leak, bias=bias, steps=len(chunk.current)
    )
    threshold, leak = learns
    recalled = surrogate.needs_membrane or leak or (threshold and surrogate.over_threshold)
    return kernels.Layer(
        packed, surrogate, 0.5, chunk.dtype, chunk.leak, temporal, start,
        last_spike=times if surrogate.needs_ages else None,
        current=current if recalled else None, bias=bias if recalled else None, carries=carried,
        before=chunk.membrane if recalled else None,
        channels=3 if len(chunk.membrane) % 3 == 0 else 0,
        carry=chunk.normal(len(chunk.membrane)) if carried else None,
        learns_threshold=threshold, learns_leak=leak,
    )  # fmt: skip


def close(found, expected):
    """Two gradients of a layer, to the rounding of their type and of its sums."""
    torch.testing.assert_close(found.current, expected.current)
    single = expected.current.dtype == torch.float32
    loose = {"rtol": 1e-4, "atol": 1e-3} if single else {"rtol": 1e-9, "atol": 1e-9}
    if expected.channels is not None:
        torch.testing.assert_close(found.channels, expected.channels, **loose)
    if expected.carry is not None:
        torch.testing.assert_close(found.carry, expected.carry)
    for name in ("threshold", "leak"):
        ours, theirs = float(getattr(found, name)), float(getattr(expected, name))
        assert math.isclose(ours, theirs, rel_tol=loose["rtol"], abs_tol=loose["atol"]), name


@backends
@EXAMPLES
@given(
    chunk=chunks(),
    surrogate=st.sampled_from(SLOPES),
    carried=st.booleans(),
    temporal=st.booleans(),
    learns=st.tuples(st.booleans(), st.booleans()),
    form=st.sampled_from(["plain", "constant", "bias"]),
    start=st.sampled_from([0, 4]),
)
def test_backpropagate(backend, chunk, surrogate, carried, temporal, learns, form, start):
    """To rounding: each surrogate, with what follows the chunk, V and λ learning."""
    layer = layer_of(chunk, surrogate, carried, temporal, learns, form, start)
    grad = chunk.normal(*chunk.current.shape)
    close(backend.backpropagate(grad.clone(), layer), reference.backpropagate(grad.clone(), layer))


@pytest.mark.parametrize("over", [False, True], ids=["over U", "over U/V"])
@pytest.mark.parametrize("kind", stdb.SURROGATES.values())
@pytest.mark.parametrize("module", [reference, *BACKENDS], ids=lambda m: m.__name__)
def test_backpropagate_is_what_autograd_finds(module, kind, over):
    """torch's own, step by step, with U, V and λ as leaves and the surrogate by its methods."""
    chunk, surrogate = Chunk(5, 21, 7, DTYPES[-1], 0.5), kind(0.3, 0.7, over)
    layer = layer_of(chunk, surrogate, False, True, (True, True), "plain", 4)
    grad = chunk.normal(*chunk.current.shape)
    leaves = (
        chunk.current.clone(),
        torch.tensor(0.5, dtype=grad.dtype),
        torch.tensor(0.5, dtype=grad.dtype),
    )
    current, threshold, leak = (x.requires_grad_() for x in leaves)
    u, loss = chunk.membrane, 0.0
    fired = (u > 0.5).to(grad.dtype)
    spikes = bits.unpack(layer.packed, 21, grad.dtype)
    for t in range(5):
        u = leak * u - threshold * fired + current[t]
        fired = spikes[t]
        with torch.no_grad():
            if surrogate.needs_ages:
                slope = surrogate.of_spikes(spikes, chunk.times, 4)[t]
            else:
                slope = surrogate.of_membrane(u[None].clone(), 0.5)[0]
        loss = loss + (grad[t] * slope * (u / threshold if over else u - threshold)).sum()
    wanted = torch.autograd.grad(loss, (current, threshold, leak))
    close(module.backpropagate(grad.clone(), layer), kernels.LayerGradient(*wanted))


def test_a_rectangle_ends_before_its_edge():
    """At U = V/2, where U_0 leaves a neuron without input, the gradient is 0; beside it, α."""
    for v in (0.3, 0.7, 1.0, 1.7):
        u = torch.tensor([0.5 * v, 0.5001 * v, v, 1.4999 * v, 1.5001 * v])
        found = stdb.Rectangle(0.3, 0.0, True).of_membrane(u, v)
        torch.testing.assert_close(found, torch.tensor([0.0, 0.3, 0.3, 0.3, 0.0]))
        layer = kernels.Layer(
            bits.pack(torch.zeros(1, 5)), stdb.Rectangle(0.3, 0.0, True), v, torch.float32,
            current=u[None], before=torch.zeros(5),
        )  # fmt: skip
        for module in (reference, *BACKENDS):
            gradient = module.backpropagate(torch.ones(1, 5), layer).current[0]
            assert torch.equal(gradient > 0, torch.tensor([False, True, True, True, False])), v


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
    layer = kernels.Layer(packed, stdb.STDB(0.3, 0.05), 1.0, dtype, 0.9, start=4, last_spike=times)
    wanted = reference.backpropagate(dense.clone(), layer)
    close(backend.backpropagate(pooled, layer), wanted)


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


def test_a_backend_for_every_device():
    """A CPU has numba's; a device without kernels of its own has the reference."""
    assert kernels.backend(torch.device("cpu")) is neurons
    assert kernels.backend(torch.device("meta")) is reference
