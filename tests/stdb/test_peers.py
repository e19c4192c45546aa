"""The engine against snnTorch and SpikingJelly, on the rules that they share with the paper.

=================  ===================================================  =========================
peer               its rule                                             ours where
=================  ===================================================  =========================
snnTorch Leaky     U ← β·U + I − V·O of the step before; U > V fires    always
SpikingJelly IF    U ← U + I; U ≥ V fires; then U ← U − V·O             no U meets V exactly
SpikingJelly LIF   as IF, so the leak also shrinks the reset: λ·V       never, with a soft reset
=================  ===================================================  =========================

All weights, inputs, thresholds and leaks are short binary fractions, so float32 sums are exact and
spikes have to be equal, not close.
"""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stdb
from stdb.kernels import bits, fire

pytestmark = pytest.mark.peer
HINT = "{} is not installed; `make setup-bench` installs it"
SIZES = [6, 8, 7, 3]


def snntorch():
    """Import it, or skip."""
    return pytest.importorskip("snntorch", reason=HINT.format("snnTorch"))


def spikingjelly():
    """Import its neurons, or skip."""
    name = "spikingjelly.activation_based"
    return pytest.importorskip(name + ".neuron", reason=HINT.format("SpikingJelly"))


def on_grid(*shape, step=1 / 16, mean=0.1, seed=0):
    """Normal numbers, rounded to multiples of ``step``."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.5 + mean
    return (drawn / step).round() * step


def dense_layers():
    """Three linear layers with weights on a grid."""
    layers = [nn.Linear(i, o, bias=False) for i, o in pairwise(SIZES)]
    with torch.no_grad():
        for k, layer in enumerate(layers):
            layer.weight.copy_(on_grid(*layer.weight.shape, seed=k))
    return layers


def ours(train: Tensor, threshold: float, leak: float) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Spikes of both hidden layers, logits, gradients of the weights, with Eq. 13 at α = 1."""
    first, second, output = dense_layers()
    ann = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), output)
    snn = stdb.convert(ann, stdb.SpikeTrain(train), stdb.Linear(alpha=1.0), leak, chunk=5)
    snn.set_thresholds(dict.fromkeys(snn.thresholds, threshold))
    with stdb.record_spikes(snn, trains=True) as statistics:
        logits = snn(torch.zeros(train.shape[1:]), len(train))
    F.cross_entropy(logits, torch.arange(len(logits)) % 3).backward()
    trains = [statistics.train(name) for name in snn.thresholds]
    return trains, logits, [snn.net[i].weight.grad for i in (1, 3, 5)]


def theirs(train: Tensor, neurons: list) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """The same of two layers of a peer's neurons, each a function of the current of one step."""
    first, second, output = layers = dense_layers()
    trains, logits = ([], []), 0.0
    for x in train.flatten(2):
        a = neurons[0](first(x))
        b = neurons[1](second(a))
        logits = logits + output(b)
        trains[0].append(a.detach())
        trains[1].append(b.detach())
    F.cross_entropy(logits, torch.arange(len(logits)) % 3).backward()
    return [torch.stack(t) for t in trains], logits, [layer.weight.grad for layer in layers]


def assert_same(actual, expected):
    """Equal spikes and logits; gradients to single precision."""
    for mine, peer in zip(actual[0], expected[0], strict=True):
        assert 0.05 < float(peer.mean()) < 0.95
        assert torch.equal(mine, peer)
    assert torch.equal(actual[1], expected[1])
    for mine, peer in zip(actual[2], expected[2], strict=True):
        assert peer.abs().max() > 0
        torch.testing.assert_close(mine, peer, rtol=1e-4, atol=1e-6)


def triangle(distance: Tensor, grad: Tensor, spikes: Tensor) -> Tensor:
    """Eq. 13 with α = 1."""
    return grad * torch.clamp(1 - distance.abs(), min=0)


@pytest.mark.parametrize("leak", [1.0, 0.75, 0.5])
def test_neuron_of_snntorch(leak):
    """Eq. 2 alone: leak, strict threshold, soft reset after the leak; U_T and every spike equal."""
    current = on_grid(8, 64, step=1 / 8)
    current[0, :8] = 0.5  # on the threshold: no spike
    neuron = snntorch().Leaky(beta=leak, threshold=0.5, reset_mechanism="subtract")
    membrane = torch.zeros(64)
    spikes = []
    for x in current:
        spike, membrane = neuron(x, membrane)
        spikes.append(spike)
    mine = torch.zeros(64)
    packed = fire(current.clone(), mine, 0.5, leak)
    assert torch.equal(bits.unpack(packed, 64, torch.float32), torch.stack(spikes))
    assert torch.equal(mine, membrane)
    assert not spikes[0][:8].any()


def test_neuron_of_spikingjelly():
    """Eq. 2 alone with λ = 1; no sum of eighths is 1 to 50 times this V, so no U meets V."""
    current = on_grid(50, 64, step=1 / 8)
    neuron = spikingjelly().IFNode(v_threshold=0.501953125, v_reset=None, step_mode="s")
    expected = torch.stack([neuron(x) for x in current])
    mine = torch.zeros(64)
    packed = fire(current.clone(), mine, 0.501953125, 1.0)
    spikes = bits.unpack(packed, 64, torch.float32)
    assert torch.equal(spikes, expected)
    assert torch.equal(mine - 0.501953125 * spikes[-1], neuron.v)  # theirs is already reset


@pytest.mark.parametrize("leak", [1.0, 0.5])
def test_network_of_snntorch(leak):
    """Spikes, logits and the gradients of three layers, back through time."""
    snn = snntorch()
    surrogate = pytest.importorskip("snntorch.surrogate").custom_surrogate(triangle)
    train = (torch.rand(12, 4, 6, 1, 1, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    neurons = [
        snn.Leaky(
            leak, threshold=0.5, reset_mechanism="subtract", spike_grad=surrogate, init_hidden=True
        )
        for _ in range(2)
    ]  # fmt: skip
    assert_same(ours(train, 0.5, leak), theirs(train, neurons))


def test_network_of_spikingjelly():
    """As above with λ = 1; no sum of sixteenths is 1 to 12 times this V, so no U meets V."""
    neuron = spikingjelly()
    surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate")
    train = (torch.rand(12, 4, 6, 1, 1, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    neurons = [
        neuron.IFNode(
            v_threshold=0.50390625, v_reset=None, detach_reset=True, step_mode="s",
            surrogate_function=surrogate.PiecewiseQuadratic(alpha=1.0),
        )
        for _ in range(2)
    ]  # fmt: skip
    assert_same(ours(train, 0.50390625, 1.0), theirs(train, neurons))
