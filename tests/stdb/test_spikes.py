"""Spikes and events of a chunk, against torch's dense operators; one thread and several."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stdb
from stdb.kernels import bits, parallel
from stdb.kernels.layout import to_matrix
from stdb.operators import dense as as_tensor
from stdb.operators.pooling import AveragePool
from stdb.spikes import Spikes, column_blocks, tap_rows

STEPS, BATCH = 3, 2


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"], autouse=True)
def threads(request, monkeypatch):
    """However little there is to do."""
    monkeypatch.setattr(parallel, "WORK_PER_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def spikes(channels, size, density=0.2, dtype=torch.float64, seed=0):
    """Spikes (STEPS, BATCH, channels, size, size), as both forms."""
    generator = torch.Generator().manual_seed(seed)
    shape = (STEPS, BATCH, channels, size, size)
    dense = (torch.rand(shape, generator=generator) < density).to(dtype)
    return dense, Spikes(bits.pack(to_matrix(dense)), dense.shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("channels", "size"), [(1, 1), (3, 5), (8, 4), (70, 3)])
def test_forms_of_spikes(channels, size, density, dtype):
    """Bits, events and dense tensor say the same; so do counts."""
    dense, few = spikes(channels, size, density, dtype)
    assert torch.equal(few.dense(), dense)
    assert torch.equal(few.counts(), dense.sum(0))
    assert torch.equal(few.map(), dense.sum((0, 1)).double())
    assert few.total == few.events.total == dense.sum()
    assert few.density == pytest.approx(float(dense.mean()))
    assert torch.equal(few.events.dense(), dense)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_convolution(data):
    """Any kernel, stride, padding, dilation; product and weight gradient, to rounding."""
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    channels, filters, kernel = draw(1, 9), draw(1, 80), draw(1, 3)
    module = nn.Conv2d(
        channels, filters, kernel, draw(1, 2), draw(0, 2), draw(1, 2), bias=False
    ).double()
    dense, few = spikes(channels, draw(5, 8), data.draw(st.sampled_from([0.05, 0.3, 1.0])))
    mask = (torch.rand(dense.shape[1:]) < 0.7).double() / 0.7
    events = few.events.masked(mask)
    x = (dense * mask).flatten(0, 1)
    expected = module(x)
    product = events.convolved(module, tap_rows(module.weight))
    torch.testing.assert_close(product.flatten(0, 1), expected)
    grad = torch.randn_like(product)
    expected.backward(grad.flatten(0, 1))
    torch.testing.assert_close(events.convolved_weight(module, grad), module.weight.grad)


@pytest.mark.parametrize("outputs", [1, 64, 77, 300])
@pytest.mark.parametrize("channels", [6, 20])
def test_linear_after_flatten(outputs, channels):
    """Channels first as torch flattens; blocks of columns, of rows, and the rest."""
    dense, few = spikes(channels, 4)
    module = nn.Linear(channels * 16, outputs, bias=False).double()
    flat = few.events.flattened()
    assert torch.equal(flat.dense(), dense.flatten(2))
    product = flat.multiplied(module, column_blocks(module.weight))
    torch.testing.assert_close(product, module(dense.flatten(2)).detach())


@pytest.mark.parametrize(("window", "size"), [(2, 4), (2, 5), (3, 6), (4, 4)])
@pytest.mark.parametrize("density", [0.1, 0.9])
def test_average_pooling(window, size, density):
    """Each channel is one event a window, whatever of it fires; the gradient spreads back."""
    dense, few = spikes(5, size, density)
    module = nn.AvgPool2d(window)
    x = dense.flatten(0, 1).requires_grad_()
    expected = module(x)
    events = few.events.pooled(window)
    torch.testing.assert_close(events.dense().flatten(0, 1), expected.detach())
    assert events.total == int((expected > 0).sum())
    grad = torch.randn(STEPS, BATCH, *expected.shape[1:], dtype=torch.float64)
    expected.backward(grad.flatten(0, 1))
    site = SimpleNamespace(module=module)
    spread = AveragePool().backward_input(site, grad, 0, dense.shape[2:])
    torch.testing.assert_close(as_tensor(spread).flatten(0, 1), x.grad)


def test_a_group_of_channels_has_no_kernel():
    """It is computed densely, with the same result."""
    torch.manual_seed(0)
    ann = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 36, 3, bias=False),
    )  # fmt: skip
    snn = stdb.convert(ann, stdb.PoissonEncoder(0))
    images = torch.rand(2, 2, 6, 6)
    stdb.balance_thresholds(snn, images, 10)
    logits = snn(images, 10)
    F.cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert all(p.grad is not None for p in snn.parameters() if p.requires_grad)


def test_more_spikes_than_a_byte_counts():
    """Sums are taken out in time, for many steps and for many images."""
    ones = Spikes(bits.pack(torch.ones(300, 16)), torch.Size((300, 2, 8)), torch.float32)
    assert torch.equal(ones.counts(), torch.full((2, 8), 300.0))
    assert torch.equal(ones.map(), torch.full((8,), 600.0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("sides", [(4, 4), (5, 4), (4, 5), (7, 9)])
def test_averages_are_those_of_torch(sides, size, masked, dtype):
    """Of windows that fill the image, and of ones that leave a rest."""
    torch.manual_seed(0)
    dense = (torch.rand(2, 3, 16, *sides) < 0.4).float()
    spikes = Spikes(bits.pack(to_matrix(dense)), dense.shape, torch.float32)
    averages = spikes.averaged(size)
    expected = F.avg_pool2d(dense.flatten(0, 1), size).unflatten(0, (2, 3))
    if masked:
        mask = (torch.rand(expected.shape[1:]) < 0.7) / 0.7
        averages, expected = replace(averages, mask=mask), expected * mask
    assert averages.shape == expected.shape
    torch.testing.assert_close(averages.dense(dtype), expected.to(dtype))


@pytest.mark.parametrize("listed", [False, True])
def test_dense_in_any_order_of_types(listed, monkeypatch):
    """Also where nothing works on bits, as on a GPU."""
    monkeypatch.setattr("stdb.kernels.works_on_bits", lambda _: listed)
    dense = (torch.rand(2, 3, 8) < 0.4).float()
    for types in ((torch.bfloat16, None), (None, torch.bfloat16)):
        spikes = Spikes(bits.pack(dense.flatten(1)), dense.shape, torch.float32)
        for dtype in types:
            assert torch.equal(spikes.dense(dtype), dense.to(dtype or torch.float32))
