"""Clip and QCFS against their closed forms; their bounds started from images; their conversion."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stdb
from stdb.amplitudes import Ann

A = 1.7
LEVELS = [None, 1, 2, 4, 8]


def layer(levels, bound=A) -> stdb.Clip:
    return stdb.Clip(bound) if levels is None else stdb.QCFS(levels, bound)


def points(levels) -> list[float]:
    """Below, inside and above, the edges, and where one level ends and the next begins."""
    steps = [A * (k + 0.5) / (levels or 5) for k in range(levels or 5)]
    around = [x * (1 + side) for x in steps for side in (-1e-6, 1e-6)]
    return [-3.0, -1e-9, 0.0, 1e-9, *around, A / 3, A * (1 - 1e-9), A, A * (1 + 1e-9), 5.0]


@pytest.mark.parametrize("levels", LEVELS)
def test_values_and_gradients_are_the_closed_forms(levels):
    """One number after the other, in Python's own arithmetic, the edges among them."""
    activation = layer(levels).double()
    with torch.no_grad():
        activation.bound.fill_(A)
    for x in points(levels):
        pixel = torch.tensor([x], dtype=torch.float64, requires_grad=True)
        activation.bound.grad = None
        y = activation(pixel)
        (3 * y).sum().backward()
        u = x / A
        clamped = min(max(u, 0.0), 1.0)
        q = clamped if levels is None else math.floor(clamped * levels + 0.5) / levels
        slope = 0.0 if u < 0 else 1.0 if u > 1 else q - u
        assert y.item() == pytest.approx(A * q, abs=1e-12), x
        assert pixel.grad.item() == (3 if 0 <= u <= 1 else 0), x
        assert activation.bound.grad.item() == pytest.approx(3 * slope, abs=1e-12), x


def test_the_bounds_gradient_is_the_sum_over_a_layer():
    """One A for all images and neurons, each with its own gradient from above."""
    activation = stdb.QCFS(4, A).double()
    x = torch.linspace(-1, 3, 24, dtype=torch.float64).view(2, 3, 4)
    above = torch.linspace(1, 2, 24, dtype=torch.float64).view(2, 3, 4)
    (activation(x) * above).sum().backward()
    expected = 0.0
    for value, weight in zip(x.flatten().tolist(), above.flatten().tolist(), strict=True):
        u = value / activation.bound.item()
        q = math.floor(min(max(u, 0), 1) * 4 + 0.5) / 4
        expected += weight * (0 if u < 0 else 1 if u > 1 else q - u)
    assert activation.bound.grad.item() == pytest.approx(expected)


@pytest.mark.parametrize("levels", LEVELS)
def test_sixteen_bits_are_computed_in_float32(levels):
    """Their levels are those of the float32 values; bfloat16 has 8 bits for a quotient."""
    activation = layer(levels)
    x = torch.linspace(-1, 3, 999).bfloat16().requires_grad_()
    y = activation(x)
    y.sum().backward()
    precise = x.detach().float().requires_grad_()
    wanted = activation(precise)
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert torch.equal(y, wanted.bfloat16())
    wanted.sum().backward()
    assert torch.equal(x.grad.float(), precise.grad)


def test_a_bound_stays_above_0():
    """However large the step was; a bound above stays as it is."""
    activation = stdb.QCFS(4, 2.0)
    activation.constrain()
    assert activation.bound.item() == 2.0
    with torch.no_grad():
        activation.bound.fill_(-7.0)
    activation.constrain()
    assert 0 < activation.bound.item() < 1e-3


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: stdb.Clip(0.0), "bound is 0.0; allowed: a number above 0"),
        (lambda: stdb.QCFS(4, math.nan), "bound is nan; allowed"),
        (lambda: stdb.QCFS(0), "levels is 0; allowed: a whole number, 1 or more"),
        (lambda: stdb.QCFS(2.5), "levels is 2.5; allowed"),
        (lambda: stdb.build("vgg5", activation="gelu"), "'gelu'; allowed: relu, clip, qcfs"),
        (lambda: stdb.build("vgg5", levels=4), "levels is 4 with activation relu; allowed: None"),
        (lambda: stdb.build("vgg5", activation="clip", levels=4), "levels is 4 with activation cl"),
        (lambda: stdb.build("vgg5", activation="qcfs"), "levels is None with activation qcfs; all"),
        (lambda: stdb.start_bounds(stdb.Clip(), [], 0), "percentile is 0; allowed: above 0"),
        (lambda: stdb.start_bounds(stdb.Clip(), []), "no batches of images; allowed: one or more"),
        (
            lambda: stdb.start_bounds(nn.Sequential(stdb.Clip()), [torch.full((2, 3), math.nan)]),
            "values that arrive at 0 are not finite; allowed: numbers",
        ),
        (lambda: stdb.QCFS(True), "levels is True; allowed: a whole number, 1 or more"),
    ],
)
def test_what_is_not_allowed_is_refused(make, said):
    """By name, with what is allowed."""
    with pytest.raises(ValueError, match=said):
        make()


# -- started from images ---------------------------------------------------------------------------


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), stdb.QCFS(4), nn.Dropout(0.5),
        nn.Conv2d(4, 6, 3), stdb.Clip(), nn.Flatten(), nn.Linear(96, 3),
    )  # fmt: skip


def batches(count=3):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(8, 2, 8, 8, generator=generator) for _ in range(count)]


def test_bounds_start_at_a_percentile_of_the_first_batches():
    """Layer by layer, by hand: norms by each batch, the bound below in place, no dropout."""
    network, by_hand = normed(), normed()
    found = stdb.start_bounds(network, batches(), 99.0)
    first, second = [], []
    with torch.no_grad():
        for images in batches():
            x = F.batch_norm(by_hand[0](images), None, None, training=True)
            first.append(float(np.sort(x.flatten().numpy())[math.ceil(x.numel() * 0.99) - 1]))
            by_hand[2].bound.fill_(np.mean(first))
            x = by_hand[4](by_hand[2](x))
            second.append(float(np.sort(x.flatten().numpy())[math.ceil(x.numel() * 0.99) - 1]))
    assert list(found) == ["2", "5"]
    assert found["2"] == float(network[2].bound) == pytest.approx(np.mean(first), rel=1e-5)
    assert found["5"] == float(network[5].bound) == pytest.approx(np.mean(second), rel=1e-5)


def test_starting_bounds_leaves_all_else_as_it_was():
    """Modes, running statistics, weights, hooks and the generator of random numbers."""
    network = normed().train()
    network[1].eval()
    before, state = copy.deepcopy(network.state_dict()), torch.random.get_rng_state()
    stdb.start_bounds(network, batches())
    changed = [n for n, v in network.state_dict().items() if not torch.equal(v, before[n])]
    assert changed == ["2.bound", "5.bound"]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [m.training for m in network] == [True, False, *[True] * 6]
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_a_silent_layer_starts_above_0():
    """Nothing is divided by 0."""
    network = nn.Sequential(nn.Linear(2, 2, bias=False), stdb.QCFS(4))
    with torch.no_grad():
        network[0].weight.fill_(-1.0)
    assert 0 < stdb.start_bounds(network, [torch.rand(4, 2)])["1"] < 1e-3


# -- converted -------------------------------------------------------------------------------------

IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Mine(stdb.QCFS):
    """Changes nothing."""


class Own(nn.Module):
    """Layers of one's own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.steps = nn.BatchNorm2d(4), stdb.QCFS(4, 0.9)
        self.mine, self.clip, self.pool = Mine(3, 0.5), stdb.Clip(0.7), nn.MaxPool2d(2)
        self.output = nn.Linear(64, 5)


class Chain(Own):
    """Each once, the last one below a max-pooling."""

    def forward(self, x):
        x = self.clip(self.norm(self.second(self.steps(self.first(x)))))
        return self.output(self.pool(self.mine(self.second(x))).flatten(1))


class Twice(Own):
    """A layer that is called twice, and one behind a sum."""

    def forward(self, x):
        x = self.steps(self.first(x))
        x = self.clip(x + self.steps(self.norm(self.second(x))))
        return self.output(self.pool(x).flatten(1))


@pytest.mark.parametrize(("net", "bounds"), [(Chain, [0.9, 0.7, 0.5]), (Twice, [0.9, 0.9, 0.7])])
def test_what_is_converted_is_checked_with_its_levels(net, bounds):
    """Layer by layer the network of its user, floors and all; neurons know the learned bound."""
    snn = stdb.convert(net().eval(), stdb.DirectEncoder(), example=IMAGES)
    assert [snn.module(i).bound for i in snn.graph.neurons] == pytest.approx(bounds)
    assert not [name for name, _ in snn.named_parameters() if name.endswith("bound")]


def sharp(net: nn.Module) -> nn.Module:
    """In float64, with weights that reach every level and both sides of a bound."""
    with torch.no_grad():
        for name in ("first", "second", "output"):
            getattr(net, name).weight.mul_(3)
    return net.double().eval()


@pytest.mark.parametrize("net", [Chain, Twice])
@pytest.mark.parametrize("written", [False, True], ids=["converted", "from a file"])
def test_neurons_know_their_levels(net, written, tmp_path):
    """What calibration and diagnosis take for the ANN is the user's own, in float64."""
    own, x = sharp(net()), IMAGES.double()
    snn = stdb.convert(own, stdb.DirectEncoder(), example=x).eval()
    levels = {Chain: [4, None, 3], Twice: [4, 4, None]}[net]
    if written:
        stdb.save(snn, tmp_path / "snn", timesteps=4, classes=list("abcde"))
        snn, _ = stdb.load(tmp_path / "snn")
    assert [neuron.levels for neuron in snn.neurons.values()] == levels
    with torch.no_grad():
        expected = own(x)
        (batch,) = Ann(snn, x, 5, 4, None).batches()
        torch.testing.assert_close(dict(batch)[""], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["mse", "learned"])
def test_the_corrected_output_has_the_mean_of_the_users_own(method):
    """Which a network that only clips does not have."""
    own, x = sharp(Chain()), torch.rand(20, 3, 8, 8).double() * 2 - 1
    snn = stdb.convert(own, stdb.DirectEncoder(), example=x).eval()
    found = stdb.balance_thresholds(snn, x, 2, method=method, initial_membrane=0.0)
    assert found.corrected
    with torch.no_grad():
        expected = own(x).mean(0)
        torch.testing.assert_close(snn(x, 2).mean(0) / 2, expected)


def test_levels_that_cannot_be_are_refused():
    """None without a bound, and whole numbers only."""
    for settings in ({"levels": 4}, {"levels": 0, "bound": 1.0}, {"levels": 2.5, "bound": 1.0}):
        with pytest.raises(ValueError, match=r"levels is .*; allowed: a whole number, 1 or more"):
            stdb.SpikingNeuron(**settings)


def test_the_check_sees_what_a_hook_does_to_levels():
    """A layer of levels is compared itself, not only what comes after it."""
    net = nn.Sequential(nn.Conv2d(3, 2, 3), stdb.QCFS(4), nn.Flatten(), nn.Linear(72, 3))
    net[1].register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.raises(stdb.ConversionError, match=r"^layer 1 of the converted network differs"):
        stdb.convert(net, stdb.DirectEncoder(), example=IMAGES)


def test_a_bound_that_is_not_above_0_is_refused():
    """As one that a training did not constrain."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), stdb.QCFS(4), nn.Linear(4, 3))
    with torch.no_grad():
        net[2].bound.fill_(-0.5)
    with pytest.raises(stdb.ConversionError, match=r"has the bound -0.5; allowed: .*constrain\(\)"):
        stdb.convert(net, stdb.DirectEncoder())


@pytest.mark.parametrize("levels", [1, 3, 8])
def test_as_many_steps_as_levels_give_the_anns_values(levels):
    """An even input, V = A, U_0 = V/2: the spikes of T = L steps are the levels (§6.4)."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 40), stdb.QCFS(levels, 0.6), nn.Linear(40, 7)
    ).eval()
    snn = stdb.convert(net, stdb.DirectEncoder(), example=IMAGES).eval()
    snn.set_thresholds({name: float(net[2].bound) for name in snn.thresholds})
    for neuron in snn.neurons.values():
        neuron.initial_membrane = 0.5
    with torch.no_grad():
        logits = snn(IMAGES, levels) / levels
        torch.testing.assert_close(logits, net(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vgg5", "resnet8", "resnet9"])
def test_a_built_in_network_has_the_activation_in_each_place_of_a_relu(name):
    """The same weights; blocks and hidden layers, too; it converts to the same neurons."""
    made = {}
    for activation, levels in (("relu", None), ("clip", None), ("qcfs", 4)):
        torch.manual_seed(0)
        made[activation] = stdb.build(
            name, image_size=8, width=0.1, hidden=8, activation=activation, levels=levels
        )
    places = [n for n, m in made["relu"].named_modules() if isinstance(m, nn.ReLU)]
    for activation, kind in (("clip", stdb.Clip), ("qcfs", stdb.QCFS)):
        network = made[activation]
        assert [n for n, m in network.named_modules() if type(m) is kind] == places
        state = network.state_dict()
        for key, value in made["relu"].state_dict().items():
            assert torch.equal(state[key], value)
        assert len(state) == len(made["relu"].state_dict()) + len(places)
        snn = stdb.convert(network.eval(), stdb.DirectEncoder(), example=IMAGES)
        plain = stdb.convert(made["relu"].eval(), stdb.DirectEncoder(), example=IMAGES)
        assert snn.graph.labels == plain.graph.labels
    assert all(m.levels == 4 for m in made["qcfs"].modules() if isinstance(m, stdb.QCFS))
