"""What an analogue input makes the same at every step is computed once, and anew if it changed."""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import stdb
from stdb.operators.convolution import Convolution
from tests.stdb.support import relus

T = 4
SURROGATES = [stdb.STDB(), stdb.Rectangle(1.0, over_threshold=True)]


@dataclass(frozen=True)
class Repeating:
    """The direct input in memory of its own, of which nobody knows that it is the same."""

    def __call__(self, images, start, stop, keys):
        return images.repeat(stop - start, *[1] * images.dim())


class Branches(nn.Module):
    """Two convolutions without neurons between, pooled, a branch beside them, and one above."""

    def __init__(self):
        super().__init__()
        self.first, self.pool = nn.Conv2d(2, 4, 3, padding=1), nn.AvgPool2d(2)
        self.second, self.beside = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 1, bias=False)
        self.relu, self.above, self.last = nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        x = self.pool(self.first(x))
        x = self.relu(self.second(x) + self.beside(x))
        return self.out(self.last(self.above(x) + x).mean((2, 3)))


def networks(make=Branches, **options):
    """The same network with a direct input, and with one that repeats images."""
    made = []
    for encoder in (stdb.DirectEncoder(), Repeating()):
        torch.manual_seed(0)
        net = make()
        assert len(relus(net)) == 2
        snn = stdb.convert(net, encoder, **options)
        snn.set_thresholds(dict.fromkeys(snn.thresholds, 0.3))
        made.append(snn)
    return made


def images():
    return torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def products(monkeypatch):
    """How often each convolution's product is made: weights' shape → times."""
    counted, forward = Counter(), Convolution.forward

    def counting(operator, site, inputs):
        counted[tuple(site.weight.shape)] += 1
        return forward(operator, site, inputs)

    monkeypatch.setattr(Convolution, "forward", counting)
    return counted


ONCE = {(4, 2, 3, 3): 1, (6, 4, 3, 3): 1, (6, 4, 1, 1): 1}  # first, second, beside
ABOVE = (6, 6, 3, 3)


@pytest.mark.parametrize("chunk", [1, 2, None])
@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=str)
def test_a_training_step_computes_the_first_current_once(products, chunk, surrogate, precision):
    """For all T and the backward pass; gradients and spikes are those of repeated images."""
    snn, repeating = networks(surrogate=surrogate, precision=precision)
    x = images()
    logits = snn(snn.present(x, chunk=chunk), T)
    logits.square().sum().backward()
    above = products.pop(ABOVE)
    assert products == ONCE
    assert above >= (1 if chunk is None else T // chunk)
    expected = repeating(repeating.present(x, chunk=chunk), T)
    expected.square().sum().backward()
    assert products[4, 2, 3, 3] > (1 if chunk is None else T // chunk)
    rough = 1e-5 if precision is None else 2e-2
    torch.testing.assert_close(logits, expected, rtol=rough, atol=rough)
    for (name, own), other in zip(snn.named_parameters(), repeating.parameters(), strict=True):
        if other.grad is not None:
            largest = float(other.grad.abs().max())
            torch.testing.assert_close(own.grad, other.grad, rtol=rough, atol=rough * largest), name


@pytest.mark.parametrize("chunk", [1, 2, None])
def test_an_evaluation_computes_the_first_current_once(products, chunk):
    """After every step, too; another presentation has its own."""
    snn, repeating = networks()
    snn.eval()
    x = images()
    snn.chunk = repeating.chunk = chunk
    found = snn.logits_over_time(x, T)
    assert {shape: products[shape] for shape in ONCE} == ONCE
    other = snn.logits_over_time(-x, T)
    assert products[4, 2, 3, 3] == 2
    torch.testing.assert_close(found, repeating.logits_over_time(x, T))
    torch.testing.assert_close(other, repeating.logits_over_time(-x, T))
    assert (found != other).any()


def test_windows_of_truncated_bptt_share_it(products):
    """Until the weights change."""
    snn, _ = networks(surrogate=SURROGATES[1])
    presentation = snn.present(images(), chunk=1)
    for _ in range(2):
        snn(presentation, 2).square().sum().backward()
    assert {shape: products[shape] for shape in ONCE} == ONCE


def test_what_changes_in_place_is_computed_anew():
    """Weights by an optimiser between two windows, a bias, and the images themselves."""
    ends = []
    for snn in networks():
        x = images()
        presentation = snn.present(x, chunk=1)
        with torch.no_grad():
            logits = [snn(presentation, 2)]
            for tensor in (snn.net.first.weight, snn.net.second.bias, x):
                tensor.mul_(-2).clamp_(-1, 1)
                logits.append(snn(presentation, 2))
        ends.append(torch.stack(logits))
    torch.testing.assert_close(*ends)


def test_computed_weights_are_computed_anew():
    """Weight norm makes other tensors at each run of steps, whose gradients reach its leaves."""

    def normed():
        net = Branches()
        net.first, net.above = weight_norm(net.first), weight_norm(net.above)
        return net

    ends = []
    for snn in networks(normed):
        presentation = snn.present(images(), chunk=1)
        leaf = snn.net.first.parametrizations.weight.original0
        snn(presentation, 2).square().sum().backward()
        with torch.no_grad():
            leaf.mul_(1.5)
        snn(presentation, 2).square().sum().backward()
        ends.append(leaf.grad)
    assert ends[0].abs().max() > 0
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_inference_mode_keeps_nothing_that_could_be_stale():
    """There, nobody can know whether images have changed."""
    ends = []
    for snn in networks():
        snn.eval()
        with torch.inference_mode():
            x = images()
            presentation = snn.present(x, chunk=1)
            first = snn(presentation, 2)
            x.neg_()
            ends.append(torch.stack([first, snn(presentation, 2)]))
    torch.testing.assert_close(*ends)


def test_spikes_are_drawn_at_every_step(products):
    """A Poisson input is another one at every step, also where it is one step at once."""
    torch.manual_seed(0)
    snn = stdb.convert(Branches(), stdb.PoissonEncoder())
    snn.set_thresholds(dict.fromkeys(snn.thresholds, 0.3))
    with torch.no_grad():
        snn(snn.present(images(), chunk=1), T)
    assert products[4, 2, 3, 3] == T


def test_max_pooling_of_a_constant_current_is_no_constant():
    """Its sums grow by as much at every step, but it remembers them."""

    def pooled():
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
            nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3),
        )  # fmt: skip

    ends = []
    for snn in networks(pooled):
        snn.chunk = 1
        logits = snn(images(), T)
        logits.square().sum().backward()
        ends.append((logits.detach(), snn.net[0].weight.grad))
    for own, other in zip(*ends, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
