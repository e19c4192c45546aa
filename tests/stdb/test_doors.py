"""What is checked, or just works, at every door: images, weights, surrogates, learned V and λ."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stdb
from tests.stdb.support import Literal, relus


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(36, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False),
    ).double()  # fmt: skip


def network(encoder, surrogate=stdb.STDB(), dtype=torch.float64, **options):  # noqa: B008
    ann = build().to(dtype)
    snn = stdb.convert(ann, encoder, surrogate, **options)
    snn.set_thresholds(dict.fromkeys(snn.thresholds, 0.25))
    return ann, snn


def images(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(4, 1, 8, 8, generator=generator, dtype=dtype) * 2 - 1


LABELS = torch.arange(4) % 3


# -- the gradient of the images --------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_poisson_spikes_pass_the_gradient_straight_through(chunk, frozen):
    """Σ_t of the gradient that autograd, step after step, gives the spikes; frozen ones too."""
    encoder = stdb.PoissonEncoder(3)
    ann, snn = network(encoder, chunk=chunk)
    snn.requires_grad_(not frozen)
    x = images().requires_grad_()
    F.cross_entropy(snn(x, 8), LABELS).backward()
    keys = stdb.sample_keys(torch.arange(4), 0)
    train = encoder(x.detach(), 0, 8, keys).requires_grad_()
    literal = Literal(ann, dict.fromkeys(relus(ann), 0.25))
    (logits,) = literal.run(train)
    F.cross_entropy(logits, LABELS).backward()
    assert train.grad.abs().max() > 0
    torch.testing.assert_close(x.grad, train.grad.sum(0))


def test_a_layer_in_front_of_the_network_learns():
    """Its gradient is that of the chain rule; a frozen network behind it is no obstacle."""
    _, snn = network(stdb.DirectEncoder())
    snn.requires_grad_(False)
    front = nn.Conv2d(1, 1, 1).double()
    x = torch.tanh(front(images()))
    leaf = x.detach().requires_grad_()
    F.cross_entropy(snn(leaf, 8), LABELS).backward()
    F.cross_entropy(snn(x, 8), LABELS).backward()
    x = torch.tanh(front(images()))
    expected = torch.autograd.grad(x, list(front.parameters()), leaf.grad)
    for parameter, gradient in zip(front.parameters(), expected, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(parameter.grad, gradient)


def test_an_encoder_of_ones_own_is_differentiated():
    """Twice the pixel at even steps, its square at odd ones."""

    def encode(x, start, stop, keys):
        return torch.stack([2 * x if t % 2 == 0 else x * x for t in range(start, stop)])

    ann, snn = network(encode, chunk=3)
    x, pixels = images().requires_grad_(), images().requires_grad_()
    F.cross_entropy(snn(x, 7), LABELS).backward()
    literal = Literal(ann, dict.fromkeys(relus(ann), 0.25))
    (logits,) = literal.run(encode(pixels, 0, 7, None))
    F.cross_entropy(logits, LABELS).backward()
    torch.testing.assert_close(x.grad, pixels.grad)


def test_a_given_spike_train_does_not_depend_on_the_images():
    """So their gradient is zero."""
    train = torch.randint(0, 2, (5, 4, 1, 8, 8)).double()
    _, snn = network(stdb.SpikeTrain(train))
    x = images().requires_grad_()
    F.cross_entropy(snn(x, 5), LABELS).backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("what", ["images", "spike train", "weights"])
def test_what_is_changed_before_the_backward_pass_is_noticed(what):
    """By torch's own error, instead of a wrong gradient."""
    train = torch.randint(0, 2, (5, 4, 1, 8, 8)).double()
    encoder = stdb.SpikeTrain(train) if what == "spike train" else stdb.DirectEncoder()
    _, snn = network(encoder)
    x = images()
    loss = F.cross_entropy(snn(x, 5), LABELS)
    changed = {"images": x, "spike train": train, "weights": snn.net[0].weight}[what]
    with torch.no_grad():
        changed.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- what has no kernel, no meaning, or changed since the conversion -------------------------------


def test_more_steps_than_spike_times_are_kept_for_are_refused():
    """With gradient and STDB; its gradient would be wrong. Others, and inference, may be longer."""
    _, snn = network(stdb.DirectEncoder(), chunk=4096)
    presentation = snn.present(images())
    presentation.t = 32_760
    with pytest.raises(ValueError, match=r"32768 time steps with gradient; allowed .* up to 32767"):
        snn(presentation, 8)
    assert snn(presentation, 7).requires_grad
    _, other = network(stdb.DirectEncoder(), stdb.Linear(0.3))
    presentation = other.present(images())
    presentation.t = 32_760
    assert other(presentation, 8).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_without_kernels_are_refused(dtype):
    """At both doors, with what is meant instead."""
    with pytest.raises(
        ValueError, match=rf"0.weight is {dtype}; allowed: torch.float32, .*precisi"
    ):
        network(stdb.DirectEncoder(), dtype=dtype)
    _, snn = network(stdb.DirectEncoder())
    with pytest.raises(ValueError, match=rf"0.weight is {dtype}; allowed"):
        snn.to(dtype)(images(dtype), 3)


def replace(snn, place, module):
    snn.net[place] = module.double()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda snn: replace(snn, 0, nn.Linear(8, 5, False)),
            "layer 0 is a Linear; allowed in its",
        ),
        (lambda snn: setattr(snn.net[0], "padding_mode", "reflect"), "layer 0 pads with 'reflect'"),
    ],
)
def test_a_layer_that_was_changed_after_the_conversion_is_refused(change, message):
    """It would be computed wrongly, without a word."""
    _, snn = network(stdb.DirectEncoder())
    change(snn)
    with pytest.raises(stdb.ConversionError, match=message):
        snn(images(), 3)


def test_a_neuron_that_was_replaced_is_refused():
    """By the layer's name."""
    _, snn = network(stdb.DirectEncoder())
    snn.net[1] = nn.ReLU()
    with pytest.raises(ValueError, match="1 is a ReLU; allowed in its place: SpikingNeuron"):
        snn(images(), 3)


def test_a_presentation_is_not_given_other_streams():
    """It has its own; what came later was ignored."""
    _, snn = network(stdb.PoissonEncoder(0))
    presentation = snn.present(images())
    for options in ({"epoch": 7}, {"sample_ids": torch.arange(4)}):
        with pytest.raises(ValueError, match="a presentation has its"):
            snn(presentation, 3, **options)
        with pytest.raises(ValueError, match="a presentation has its"):
            snn.logits_over_time(presentation, 3, **options)


@pytest.mark.parametrize("timesteps", [0, -1, 2.5])
def test_time_steps_are_whole_numbers(timesteps):
    """And a chunk is at least one of them."""
    _, snn = network(stdb.DirectEncoder())
    with pytest.raises(ValueError, match=f"timesteps is {timesteps}; allowed: 1 or more"):
        snn(images(), timesteps)
    with pytest.raises(ValueError, match="chunk is -1; allowed: 1 or more"):
        snn.present(images(), chunk=-1)


class Shortcut(nn.Module):
    """The input reaches the output beside all weights."""

    def __init__(self):
        super().__init__()
        self.a, self.relu, self.b = nn.Linear(3, 4, False), nn.ReLU(), nn.Linear(4, 3, False)
        self.flatten = nn.Flatten()

    def forward(self, x):
        x = self.flatten(x)
        return self.b(self.relu(self.a(x))) + x


def test_an_output_that_cannot_be_scaled_is_refused():
    """A part of it has no weights: decisions would change."""
    snn = stdb.convert(Shortcut(), stdb.DirectEncoder())
    with pytest.raises(ValueError, match="a branch reaches the output without weights"):
        snn.scale_output(0.5)


def test_another_head_is_fine():
    """Of other classes, without a bias: transfer learning."""
    _, snn = network(stdb.DirectEncoder())
    replace(snn, 6, nn.Linear(8, 7, bias=False))
    assert snn(images(), 3).shape == (4, 7)


@pytest.mark.parametrize(
    "values", [{"alpha": float("inf")}, {"alpha": float("nan")}, {"beta": float("inf")}]
)
def test_a_surrogate_takes_finite_numbers(values):
    """Anything else would make every gradient infinite or nothing."""
    with pytest.raises(ValueError, match="allowed"):
        stdb.STDB(**values)


def test_a_surrogate_of_auto_follows_the_time_steps():
    """A rectangle over U/V up to 16, then STDB as the paper has it, over U."""
    few, many = stdb.Rectangle(1.0, 1.0, over_threshold=True), stdb.STDB(0.3, 0.01)
    found = {t: stdb.surrogate_of("auto", t) for t in (1, 4, 16, 17, 100)}
    assert found == {1: few, 4: few, 16: few, 17: many, 100: many}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stdb", stdb.STDB(0.3, 0.01, over_threshold=False)),
        ("linear", stdb.Linear(1.0, 1.0, over_threshold=True)),
        ("exponential", stdb.Exponential(1.0, 1.0, over_threshold=True)),
        ("rectangle", stdb.Rectangle(1.0, 1.0, over_threshold=True)),
    ],
)
def test_a_surrogate_has_numbers_of_its_own(name, expected):
    """Which what is given goes before."""
    assert stdb.surrogate_of(name, 100) == expected
    assert expected.name == name
    given = stdb.surrogate_of(name, 4, alpha=0.2, beta=0.0, over_threshold=False)
    assert given == type(expected)(0.2, 0.0, over_threshold=False)


def test_a_surrogate_that_nobody_knows_is_refused():
    """With those that there are."""
    with pytest.raises(ValueError, match="surrogate is 'sigmoid'; allowed: auto, stdb, linear"):
        stdb.surrogate_of("sigmoid", 4)


@pytest.mark.parametrize("leak", [1.0, 0.02])
def test_learned_thresholds_and_leaks_stay_in_range_by_themselves(leak):
    """In any loop: the next presentation brings back what a step took too far."""
    learn = {"learn_thresholds": True, "learn_leaks": True, "leak": leak}
    _, snn = network(stdb.DirectEncoder(), stdb.Linear(0.3), **learn)
    scalars = [p for p in snn.parameters() if p.requires_grad and not p.dim()]
    with torch.no_grad():
        for parameter in scalars:
            parameter.add_(5.0 if leak == 1 else -5.0)
    assert snn(images(), 3).isfinite().all()
    assert all(0 < neuron.leak <= 1 for neuron in snn.neurons.values())
    assert all(value > 0 for value in snn.thresholds.values())


def quantised():
    return torch.ao.quantization.quantize_dynamic(build(), {nn.Linear})


def fill(net, value):
    nn.init.constant_(net[0].weight, value)
    return net


def give(net, weight):
    net[0].weight = nn.Parameter(weight, requires_grad=False)
    return net


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fill(build(), math.nan), "0.weight holds NaN or infinity; allowed: finite"),
        (lambda: fill(build(), math.inf), "0.weight holds NaN or infinity"),
        (
            lambda: build().to(torch.complex64),
            "0.weight is torch.complex64; allowed",
        ),
        (lambda: give(build(), torch.ones(4, 1, 3, 3, dtype=torch.int8)), "0.weight is torch.int8"),
        (lambda: give(build(), torch.ones(4, 1, 3, 3)), r"4.weight is .*64 and the layers before"),
        (lambda: give(build(), torch.ones(4, 1, 3, 3).to_sparse()), "0.weight is torch.sparse_coo"),
        (lambda: build().to("meta"), "0.weight is on the meta device; load the weights first"),
        (lambda: nn.Sequential(nn.LazyLinear(5, bias=False)), "0.weight is uninitialised"),
        (quantised, "quantized.* no spiking form; convert the network as it was before"),
        (lambda: build().state_dict(), "ann is a OrderedDict; allowed: an nn.Module; build"),
        (lambda: None, "ann is a NoneType; allowed: an nn.Module"),
    ],
)
def test_weights_that_nothing_can_be_made_of_are_refused(make, message):
    """At the conversion, by name; not as silence or as torch's words later."""
    with pytest.raises(ValueError, match=message):
        stdb.convert(make(), stdb.DirectEncoder())
