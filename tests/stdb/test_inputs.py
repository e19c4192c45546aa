"""What is presented: images, signals and vectors; pixels beyond ±1; weights that are used twice."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stdb

LIMITS = (2.0, 0.5, 3.0)


def off(actual, expected):
    """The largest deviation, by the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max())


def uniform(*shape, seed=0):
    """Float64, in [−1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


def of_vectors(bias=True):
    torch.manual_seed(0)
    layers = nn.Linear(20, 64, bias), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10, bias)
    return nn.Sequential(*layers).double().eval()


def of_signals(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 6, 5, padding=2, bias=bias), nn.ReLU(), nn.AvgPool1d(2), nn.Dropout1d(0.2),
        nn.Conv1d(6, 8, 3, bias=bias), nn.ReLU(), nn.Flatten(), nn.Linear(48, 10, bias=bias),
    ).double().eval()  # fmt: skip


INPUTS = {"vectors": (of_vectors, (20,)), "signals": (of_signals, (2, 16))}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("what", INPUTS)
def test_vectors_and_signals_work_as_images_do(what, bias, tmp_path):
    """Without an example; balanced, presented, trained, counted, predicted, saved and exported."""
    make, shape = INPUTS[what]
    ann, x = make(bias), uniform(4, *shape)
    snn = stdb.convert(ann, stdb.DirectEncoder())
    stdb.balance_thresholds(snn, x, 64, method="maximum")
    with torch.no_grad(), stdb.record_spikes(snn) as statistics:
        logits, expected = snn(x, 600) / 600, ann(x)
    if bias:
        assert off(logits, expected) < 0.05
    assert (logits.argmax(1) == expected.argmax(1)).all()
    assert statistics.maps["input"].shape == shape
    assert statistics.energy() > 0
    reach = stdb.fan_out(snn, shape)
    assert reach["input"].shape == shape
    assert stdb.ann_energy(ann, shape) > 0
    assert 0 < stdb.training_memory(snn, shape, 8, 4) < stdb.training_memory(snn, shape, 800, 400)
    rows = stdb.diagnose(ann, snn, x, 64)
    assert all(row.correlation > 0.9 for row in rows)
    stdb.save(snn, tmp_path / "snn", timesteps=8, classes=list("abcdefghij"))
    again, _ = stdb.load(tmp_path / "snn")
    program = stdb.export_program(snn, 5, shape)
    with torch.no_grad():
        assert torch.equal(again(x, 5), snn(x, 5))
        torch.testing.assert_close(program.module()(x), snn(x, 5))
    x.requires_grad_()
    F.cross_entropy(snn.train()(x, 8), torch.arange(4)).backward()
    assert x.grad.abs().max() > 0
    assert all(p.grad.abs().max() > 0 for p in snn.net.parameters() if p.requires_grad)


@pytest.mark.parametrize("what", INPUTS)
def test_poisson_spikes_of_vectors_and_signals(what):
    """Their rates are the pixels, and their gradient goes straight through."""
    make, shape = INPUTS[what]
    x = uniform(3, *shape)
    snn = stdb.convert(make(), stdb.PoissonEncoder(1))
    stdb.balance_thresholds(snn, x, 50, method="maximum")
    encoded = snn.encoder(x, 0, 3000, stdb.sample_keys(torch.arange(3), 0))
    assert (encoded.mean(0) - x).abs().max() < 0.05
    snn(x.requires_grad_(), 8).sum().backward()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("make", "shape", "allowed"),
    [
        (of_vectors, (4, 2, 20), r"\(B, n\)"),
        (of_signals, (2, 16), r"\(B, C, L\)"),
        (of_signals, (4, 2, 16, 1), r"\(B, C, L\)"),
        (of_vectors, (20,), r"\(B, n\)"),
    ],
)
def test_other_dimensions_are_refused(make, shape, allowed):
    """A signal without its batch is none of vectors."""
    snn = stdb.convert(make(), stdb.DirectEncoder())
    with pytest.raises(ValueError, match=rf"allowed: a floating-point batch {allowed}$"):
        snn.present(uniform(*shape))


# -- pixels beyond ±1 ------------------------------------------------------------------------------


def limited(seed=0):
    """(B, 3, 4, 4) within the limits, and beyond ±1."""
    return uniform(4, 3, 4, 4, seed=seed) * torch.tensor(LIMITS).view(3, 1, 1)


def straight(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.PixelUnshuffle(2), nn.Conv2d(12, 8, 1, bias=bias), nn.ReLU(), nn.Flatten(),
        nn.Linear(32, 5, bias=bias),
    ).double()  # fmt: skip


class Adding(nn.Module):
    """The input is added to a convolution of it, and stands beside spikes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.output = nn.Linear(64, 5)

    def forward(self, x):
        y = F.relu(self.first(x) + x)
        z = F.relu(self.second(torch.cat([y, x[:, :, ::1]], 1)))
        return self.output(torch.flatten(z, 1))


@pytest.mark.parametrize("make", [straight, lambda: Adding().double()], ids=["straight", "adding"])
def test_the_first_weights_hold_the_limits(make, tmp_path):
    """Rates of x/u, and the ANN in the limit; so does the file, and nothing changes the ANN."""
    ann, x = make(), limited()
    assert x.abs().max() > 2
    snn = stdb.convert(ann, stdb.PoissonEncoder(3, limits=LIMITS), example=x)
    train = snn.encoder(x, 0, 50, stdb.sample_keys(torch.arange(4), 0))
    assert set(train.unique().tolist()) == {-1.0, 0.0, 1.0}
    for neuron in snn.neurons.values():
        neuron.initial_membrane = 0.5
    stdb.balance_thresholds(snn, x, 100, percentile=99)
    with torch.no_grad():
        assert off(snn(x, 6000) / 6000, ann(x)) < 0.1
    assert all(row.correlation > 0.8 for row in stdb.diagnose(ann, snn, x, 400))
    stdb.save(snn, tmp_path / "snn", timesteps=8, classes=list("abcde"))
    again, _ = stdb.load(tmp_path / "snn")
    assert again.encoder == snn.encoder
    with torch.no_grad():
        assert torch.equal(again(x, 9), snn(x, 9))


def test_the_gradient_of_limited_pixels():
    """Σ_t ∂L/∂spike, over u: the derivative of the spike's expectation."""
    x = limited().requires_grad_()
    snn = stdb.convert(straight(), stdb.PoissonEncoder(3, limits=LIMITS), example=x)
    plain = stdb.convert(straight(), stdb.DirectEncoder(), example=x)
    train = snn.encoder(x.detach(), 0, 6, stdb.sample_keys(torch.arange(4), 0))
    plain.net[1].weight.data.copy_(snn.net[1].weight.data)
    given = torch.zeros_like(x, requires_grad=True)

    def replay(images, start, stop, keys):
        return train[start:stop] + images

    plain.encoder = replay
    snn(x, 6).square().sum().backward()
    plain(given, 6).square().sum().backward()
    assert given.grad.abs().max() > 0
    torch.testing.assert_close(x.grad, given.grad / torch.tensor(LIMITS).view(3, 1, 1))


def test_what_is_beyond_the_limits_is_refused():
    """By channel; limits of other channels; and another encoder than it was converted with."""
    x = limited()
    snn = stdb.convert(straight(), stdb.PoissonEncoder(3, limits=LIMITS), example=x)
    with pytest.raises(ValueError, match=r"1\.2 times the limit .* limits, 2, 0\.5, 3"):
        snn.present(torch.full_like(x, 0.6))
    few = stdb.convert(straight(), stdb.PoissonEncoder(3, limits=(2.0,)), example=x)
    few.present(x / 2)
    with pytest.raises(ValueError, match=r"limits are \(1.0, -1.0\); allowed: positive numbers"):
        stdb.PoissonEncoder(limits=(1.0, -1.0))
    snn.encoder = stdb.PoissonEncoder(3)
    with pytest.raises(
        ValueError, match=r"the first weights hold \(2.0, 0.5, 3.0\); allowed: a net"
    ):
        snn.present(x / 3)
    two = stdb.convert(of_signals(), stdb.PoissonEncoder(3, limits=(2.0, 1.0)))
    two.encoder = stdb.PoissonEncoder(3, limits=LIMITS)
    with pytest.raises(ValueError, match="limits of 3 channels, the images have 2"):
        two.present(uniform(1, 2, 16))


def test_without_limits_files_say_nothing_of_them(tmp_path):
    """As they always were."""
    snn = stdb.convert(of_vectors(), stdb.PoissonEncoder(4))
    stdb.save(snn, tmp_path / "snn", timesteps=8, classes=list("abcdefghij"))
    _, config = stdb.load(tmp_path / "snn")
    assert config["encoder"] == {"name": "poisson", "seed": 4}


# -- weights that are used twice -------------------------------------------------------------------


class Shared(nn.Module):
    """One convolution in two places, whose spikes stand for very different values."""

    def __init__(self, tied):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.one = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.other, self.output = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8 * 16, 5)
        if tied:
            self.other.weight, self.other.bias = self.one.weight, self.one.bias
        else:
            self.other = self.one
        nn.init.constant_(self.one.bias, 0.3)
        self.one.weight.data.mul_(4)

    def forward(self, x):
        x = F.relu(self.other(F.relu(self.one(F.relu(self.first(x))))))
        return self.output(torch.flatten(x, 1))


@pytest.mark.parametrize("tied", [True, False], ids=["two modules", "one module"])
def test_weights_that_are_used_twice_stay_one(tied, tmp_path):
    """Right in both places; one leaf, whose gradient is that of both; also from a file."""
    ann, x = Shared(tied).double(), uniform(3, 3, 4, 4)
    snn = stdb.convert(ann, stdb.DirectEncoder(), example=x)
    for neuron in snn.neurons.values():
        neuron.initial_membrane = 0.5
    stdb.balance_thresholds(snn, x, 64, method="maximum")
    one, two, _ = list(snn.thresholds.values())
    assert two > 2 * one
    with torch.no_grad():
        assert off(snn(x, 1000) / 1000, ann(x)) < 0.03
    assert torch.equal(snn.net.one.weight, ann.one.weight)
    stdb.save(snn, tmp_path / "snn", timesteps=8, classes=list("abcde"))
    again, _ = stdb.load(tmp_path / "snn")
    if tied:
        assert again.net.other.weight is again.net.one.weight
    for network in (snn, again):
        network(x, 8).square().sum().backward()
        assert network.net.one.weight.grad.abs().max() > 0
    assert torch.equal(again.net.one.weight.grad, snn.net.one.weight.grad)
