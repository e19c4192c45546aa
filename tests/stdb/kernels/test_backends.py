"""Every backend against the reference in plain torch, on random shapes; and that one by hand.

With TRITON_INTERPRET=1 the GPU's kernels are among the backends: ``test_gpu.py`` runs this file so.
"""

import dataclasses
import math
import os

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

import stdb
from stdb import kernels
from stdb.kernels import PooledGradient, bits, gpu, neurons, parallel, reference
from stdb.kernels.layout import to_matrix
from stdb.kernels.pooled import pooled_shape

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [gpu] if INTERPRETED else [neurons]
DTYPES = [torch.float32, torch.float64]
# what numba compiles for is what a network has; bfloat16 goes with float32
LOW = ["none", "all", "above", "current", "target"] if INTERPRETED else ["none", "all"]
EXAMPLES = settings(max_examples=15 if INTERPRETED else 60, deadline=None, derandomize=True)
backends = pytest.mark.parametrize("backend", BACKENDS, ids=lambda module: module.__name__)


if INTERPRETED:
    from triton.runtime import interpreter

    cut = interpreter._convert_float

    def rounded(x, of, to, mode):
        """To bfloat16 as the compiler rounds; the interpreter cuts digits off."""
        if to.name != "bf16":
            return cut(x, of, to, mode)
        return torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view("uint16")

    interpreter._convert_float = rounded


@pytest.fixture(params=[1] if INTERPRETED else [1, 3], ids="{} threads".format, autouse=True)
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


FORMS = st.sampled_from(["plain", "constant", "bias", "constant, bias"])


def given(chunk, form):
    """A chunk's current in a form, and its bias."""
    has_bias = "bias" in form and len(chunk.membrane) % 3 == 0
    current = chunk.current[:1] if "constant" in form else chunk.current
    return current, chunk.grid(3) if has_bias else None


@backends
@EXAMPLES
@hypothesis.given(
    chunk=chunks(),
    spikes_of=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float64]),
    note=st.booleans(),
    form=FORMS,
    low=st.booleans(),
)
def test_fire(backend, chunk, spikes_of, note, form, low):
    """Spikes as bits and as numbers, membranes and spike times are equal; currents are read."""
    found, steps = [], len(chunk.current)
    current, bias = given(chunk, form)
    if low and chunk.dtype == torch.float32:
        current = current.bfloat16()
    for one in (backend, reference):
        read, membrane, times = (t.clone() for t in (current, chunk.membrane, chunk.times))
        spikes = None if spikes_of is None else torch.empty_like(chunk.current, dtype=spikes_of)
        packed = one.fire(
            read, membrane, 0.5, chunk.leak, last_spike=times if note else None, start=4,
            spikes=spikes, bias=bias, steps=steps,
        )  # fmt: skip
        assert torch.equal(read, current)
        if spikes is not None:
            assert torch.equal(spikes, bits.unpack(packed, len(membrane), spikes_of))
        found.append((packed, membrane, times))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@backends
@pytest.mark.parametrize("count", [1, 100, 1056])
def test_membranes_that_start_alike(backend, count):
    """One number, expanded, is what as many would be, in both passes; it is only read."""
    chunk = Chunk(5, count, 3, torch.float32, 0.5)
    one = torch.tensor([0.375])
    expanded, many, found = one.expand(count), one.repeat(count), torch.full((count,), torch.nan)
    packed = backend.fire(chunk.current, found, 0.5, 0.5, before=expanded)
    assert torch.equal(packed, reference.fire(chunk.current, many, 0.5, 0.5))
    assert torch.equal(found, many)
    layer = layer_of(chunk, stdb.Linear(1.0, 1.0, True), False, True, (True, True), "plain", 0)
    layer = dataclasses.replace(layer, packed=packed)
    grad = chunk.normal(*chunk.current.shape)
    close(
        backend.backpropagate(grad.clone(), dataclasses.replace(layer, before=expanded)),
        reference.backpropagate(grad.clone(), dataclasses.replace(layer, before=one.repeat(count))),
    )
    assert one.item() == 0.375


@backends
@EXAMPLES
@hypothesis.given(
    chunk=chunks(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
)
def test_unpack(backend, chunk, dtype):
    """Ones where there are spikes, of any type."""
    spikes = chunk.current > 0
    found = backend.unpack(bits.pack(spikes.to(chunk.dtype)), len(chunk.membrane), dtype)
    assert torch.equal(found, spikes.to(dtype))


def lowered(layer, low):
    """A layer with its current in bfloat16, and its gradient wanted so."""
    if layer.current is not None and low in ("all", "current"):
        layer = dataclasses.replace(layer, current=layer.current.bfloat16())
    return dataclasses.replace(layer, lowered=torch.bfloat16 if low in ("all", "target") else None)


@backends
@pytest.mark.parametrize("formula", [stdb.STDB, stdb.Rectangle, stdb.Linear, stdb.Exponential])
def test_sixteen_bits(backend, formula):
    """Currents and gradients in bfloat16: exact where they are read, rounded where written."""
    chunk = Chunk(4, 1056, 5, torch.float32)
    layer = layer_of(chunk, formula(1.0, 0.5, True), True, True, (True, False), "bias", 0)
    half = lowered(layer, "all")
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
@hypothesis.given(chunk=chunks(), start=st.sampled_from([0, 4, 30_000]))
def test_note_last_spikes(backend, chunk, start):
    """The latest spike of each neuron, counted from 1; one that was silent keeps its time."""
    packed = bits.pack((chunk.current > 1).to(chunk.dtype))
    found, expected = chunk.times.clone(), chunk.times.clone()
    backend.note_last_spikes(packed, found, start)
    reference.note_last_spikes(packed, expected, start)
    assert torch.equal(found, expected)


@backends
@EXAMPLES
@hypothesis.given(chunk=chunks())
def test_count_spikes(backend, chunk):
    """Each neuron's, in the type that is asked for."""
    packed = bits.pack((chunk.current > 0).to(chunk.dtype))
    found = backend.count_spikes(packed, len(chunk.membrane), chunk.dtype)
    assert found.dtype == chunk.dtype
    assert torch.equal(found, reference.count_spikes(packed, len(chunk.membrane), chunk.dtype))


@backends
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("sides", [(4, 4), (7, 9), ()])
def test_average(backend, sides, size, dtype, masked):
    """Equal, of windows that fill the image and of ones that leave a rest; and masked."""
    if not sides and size > 1:
        return
    chunk, shape = Chunk(2, 3 * 16 * math.prod(sides), size, torch.float32), (2, 3, 16, *sides)
    packed = bits.pack((chunk.current > 0).float())
    pooled = pooled_shape(torch.Size(shape), size)
    mask = (chunk.normal(*pooled[1:]) < 0.5).float() / 0.7 if masked else None
    found, expected = (
        one.average(packed, torch.Size(shape), size, mask, dtype) for one in (backend, reference)
    )
    torch.testing.assert_close(found, expected)
    assert dtype == torch.bfloat16 or torch.equal(found, expected)


SLOPES = [
    *(kind(0.3, beta, over) for beta in (0.0, 0.05, 2.0) for kind in (stdb.STDB, stdb.Exponential)
      for over in (False, True)),
    *(kind(0.3, 0.0, over) for kind in (stdb.Linear, stdb.Rectangle) for over in (False, True)),
]  # fmt: skip


def layer_of(chunk, surrogate, carried, temporal, learns, form, start):
    """A layer that did what a chunk says, and what its backward pass is given of it."""
    current, bias = given(chunk, form)
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
    single = expected.current.dtype != torch.float64
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
@hypothesis.given(
    chunk=chunks(),
    surrogate=st.sampled_from(SLOPES),
    carried=st.booleans(),
    temporal=st.booleans(),
    learns=st.tuples(st.booleans(), st.booleans()),
    form=FORMS,
    start=st.sampled_from([0, 4]),
    low=st.sampled_from(LOW),
)
def test_backpropagate(backend, chunk, surrogate, carried, temporal, learns, form, start, low):
    """To rounding: each surrogate, with what follows the chunk, V and λ learning."""
    layer = layer_of(chunk, surrogate, carried, temporal, learns, form, start)
    grad = chunk.normal(*chunk.current.shape)
    if chunk.dtype == torch.float32:
        layer = lowered(layer, low)
        grad = grad.bfloat16() if low in ("all", "above") else grad
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
@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("surrogate", [stdb.STDB(0.3, 0.05), stdb.Rectangle(1.0, 1.0, True)])
@pytest.mark.parametrize(("size", "channels"), [(1, 3), (2, 1), (2, 40), (3, 7)])
def test_backpropagate_below_a_pool(backend, size, channels, surrogate, low, masked):
    """The gradient that is spread on the way is the one that is spread before."""
    dtype = torch.float64 if low == "none" else torch.float32
    chunk = Chunk(3, 2 * channels * 24 * size**2, size, dtype)
    shape = (3, 2, channels, 4 * size, 6 * size)
    above = chunk.normal(3, 2, channels, 4, 6)
    above = above.bfloat16().float() if low in ("all", "above") else above
    mask = (chunk.normal(*shape[1:]) < 0.5).to(dtype) / 0.7 if masked else None
    pooled = PooledGradient(above, size, mask)
    spread = above.repeat_interleave(size, 3).repeat_interleave(size, 4) / size**2
    torch.testing.assert_close(pooled.dense(), spread if mask is None else spread * mask)
    assert pooled.shape == shape
    layer = layer_of(chunk, surrogate, True, True, (True, False), "bias", 4)
    layer = dataclasses.replace(lowered(layer, low), channels=channels)
    if layer.current is not None:
        layer = dataclasses.replace(layer, bias=torch.zeros(channels, dtype=dtype) + 0.25)
    wanted = reference.backpropagate(to_matrix(pooled.dense()), layer)
    if low in ("all", "above"):
        pooled = dataclasses.replace(pooled, above=above.bfloat16())
    close(backend.backpropagate(pooled, layer), wanted)


@backends
@pytest.mark.parametrize("steps", [255, 256, 300])
def test_many_steps_at_once(backend, steps):
    """Ages of spikes, and of none, over more steps than a byte counts."""
    chunk = Chunk(steps, 9, 1, torch.float32)
    chunk.current[:, ::2] = 0
    chunk.current[0, 0] = 1
    chunk.membrane.zero_()
    layer = layer_of(chunk, stdb.STDB(0.3, 0.01), False, False, (False, False), "plain", 4)
    grad = chunk.normal(steps, 9)
    close(backend.backpropagate(grad.clone(), layer), reference.backpropagate(grad.clone(), layer))


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
