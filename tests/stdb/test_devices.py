"""Other precisions and other devices than the one the rest of the tests runs on."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stdb
from stdb import kernels
from stdb.kernels import gpu, neurons

BACKEND = gpu if os.environ.get("TRITON_INTERPRET") == "1" else neurons

SURROGATES = [stdb.STDB(), stdb.Linear(0.3), stdb.Exponential(0.3, 0.5)]


def network(precision=None, surrogate=stdb.STDB(), **options):  # noqa: B008
    """Weights on a grid: sums are exact in float32, and up to 16 in bfloat16 too."""
    torch.manual_seed(0)
    ann = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.ReLU(), nn.AvgPool2d(2), nn.Dropout(0.25),
        nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(192, 20, bias=False), nn.ReLU(), nn.Linear(20, 4, bias=False),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in ann.parameters():
            parameter.copy_(torch.randint(-2, 4, parameter.shape) / 8)
    encoder = stdb.PoissonEncoder(3)
    return stdb.convert(ann, encoder, surrogate, precision=precision, **options)


def images():
    return torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def gradients(snn, x):
    loss = F.cross_entropy(snn(x, 12), torch.arange(len(x), device=x.device))
    loss.backward()
    return [p.grad for p in snn.parameters() if p.requires_grad]


@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda s: type(s).__name__)
def test_bfloat16_products(surrogate):
    """Exact weights and sums give the spikes of float32; gradients to the rounding of bfloat16."""
    nets = [network(p, surrogate).eval() for p in (None, torch.bfloat16)]
    trains = []
    for snn in nets:
        snn.events = "never"
        with stdb.record_spikes(snn, trains=True) as statistics:
            snn(images(), 12)
        trains.append(statistics.trains)
    for name, train in trains[0].items():
        assert torch.equal(torch.cat(train), torch.cat(trains[1][name])), name
        assert 0.02 < torch.cat(train).abs().mean() < 0.98, name
    for exact, rounded in zip(*(gradients(snn, images()) for snn in nets), strict=True):
        assert rounded.dtype == torch.float32
        assert not torch.equal(exact, rounded)
        assert (exact - rounded).norm() < 0.01 * exact.norm()


def test_bfloat16_beside_events():
    """Where there are few spikes products are made of events, in float32."""
    snn = network(torch.bfloat16)
    snn.set_thresholds(dict.fromkeys(snn.thresholds, 4.0))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(snn, images()))


@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_nothing_inside_a_presentation_waits_for_a_value(surrogate, learn, precision):
    """Forward, statistics and backward run where there are no values: on the meta device."""
    snn = network(precision, surrogate, learn_thresholds=learn, learn_leaks=learn)
    presentation = snn.present(images(), chunk=5)  # checks pixels, thresholds: waits once
    snn.to("meta")
    presentation.images = presentation.images.to("meta")
    presentation.keys = presentation.keys.to("meta")
    with stdb.record_spikes(snn):
        logits = snn(presentation, 12)
    assert logits.shape == (3, 4)
    assert logits.is_meta
    logits.sum().backward()
    assert all(p.grad.is_meta for p in snn.parameters() if p.requires_grad)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("surrogate", [stdb.STDB(), stdb.Rectangle(0.3, 1.0, True)])
@pytest.mark.parametrize("chunk", [5, 12])
def test_a_network_whose_products_do_not_read_bits(precision, surrogate, chunk, monkeypatch):
    """As on a GPU, where they read numbers: all is the same; ``test_gpu.py`` has its kernels."""
    found = []
    for own, on_bits in ((BACKEND, False), (neurons, True)):
        monkeypatch.setattr(kernels, "backend", lambda _, own=own: own)
        monkeypatch.setattr(kernels, "works_on_bits", lambda _, on_bits=on_bits: on_bits)
        snn = network(precision, surrogate, learn_thresholds=True)
        snn.events, snn.chunk = "never", chunk
        with stdb.record_spikes(snn, trains=True) as statistics:
            F.cross_entropy(snn(images(), 12), torch.arange(3)).backward()
        trains = [statistics.train(name) for name in statistics.trains]
        found.append((trains, [p.grad for p in snn.parameters() if p.requires_grad]))
    (trains, gradients), (other_trains, others) = found
    assert all(torch.equal(a, b) for a, b in zip(trains, other_trains, strict=True))
    for a, b in zip(gradients, others, strict=True):
        assert (a - b).norm() <= (1e-5 if precision is None else 0.01) * b.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize(
    "surrogate", [*SURROGATES, stdb.Rectangle(0.3, 1.0, True)], ids=lambda s: type(s).__name__
)
def test_a_gpu_agrees(surrogate, learn, precision):
    """Input spikes, masks and spikes are equal, gradients to the rounding of the products."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found = []
    for device in ("cpu", "cuda"):
        snn = network(precision, surrogate, learn_thresholds=learn, learn_leaks=learn).to(device)
        snn.events = "never"
        with stdb.record_spikes(snn, trains=True) as statistics:
            grads = gradients(snn, images().to(device))
        trains = [statistics.train(name).cpu() for name in statistics.trains]
        found.append((trains, [g.cpu() for g in grads]))
    (trains, grads), (others, other_grads) = found
    assert all(torch.equal(a, b) for a, b in zip(trains, others, strict=True))
    for a, b in zip(grads, other_grads, strict=True):
        if precision is None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        else:
            assert (a - b).norm() <= 0.01 * a.norm()
