"""Calibration for few steps: A of least error, both forms, corrected biases, the same again."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

import stdb
from stdb.few_steps import SHARES
from stdb.spikes import Spikes


def images(count: int = 12, channels: int = 3, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(count, channels, size, size, generator=generator).double() * 2 - 1


def lively(net: nn.Module) -> nn.Module:
    """In float64, with biases that matter and norms that do something, ready to be converted."""
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias, 0, 0.2)
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return net.double().eval()


def simple() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(32, 20), nn.ReLU(),
        nn.Linear(20, 10),
    )  # fmt: skip


def converted(net: nn.Module, x: Tensor) -> stdb.SpikingNetwork:
    return stdb.convert(net, stdb.DirectEncoder(), example=x[:2]).eval()


@torch.no_grad()
def rates(snn: stdb.SpikingNetwork, x: Tensor, timesteps: int) -> dict[str, Tensor]:
    """Layer → (B, …) spikes per step; ``"output"``: U_T/T."""
    found: dict[str, Tensor] = {}

    def count(_, layer, value):
        own = value.counts() if isinstance(value, Spikes) else value.sum(0)
        found[layer] = own / timesteps + found.get(layer, 0)

    snn.observers.append(count)
    found["output"] = snn(x, timesteps) / timesteps
    snn.observers.remove(count)
    return found


def states(snn: stdb.SpikingNetwork) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in snn.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[n].nan_to_num(), other[n].nan_to_num()) for n in one
    )


# -- A of least error ------------------------------------------------------------------------------


def least(activations: Tensor, timesteps: int, share: float) -> float:
    """A by trying all, literally, in float64."""
    top = activations.max().item()
    errors = {}
    for k in range(100, 5, -1):
        amplitude = top * (k / 100)
        levels = torch.floor(activations * timesteps / amplitude + share).clamp(0, timesteps)
        errors[amplitude] = ((activations - levels * amplitude / timesteps) ** 2).mean().item()
    assert len(errors) == 95
    return min(errors, key=errors.__getitem__)


@pytest.mark.parametrize("per", ["layer", "channel"])
@pytest.mark.parametrize(("timesteps", "share"), [(1, 0.5), (4, 0.5), (8, 0.0), (30, 0.25)])
def test_the_candidate_of_least_error(per, timesteps, share):
    """Against brute force over torch's own activations; fully connected layers share one A."""
    net, x = lively(simple()), images()
    snn = converted(net, x)
    found = stdb.balance_thresholds(
        snn, x, timesteps, method="mse", per=per, initial_membrane=share, bias_correction=False,
        batch_size=5,
    )  # fmt: skip
    with torch.no_grad():
        first = F.max_pool2d(F.relu(net[1](net[0](x))), 2)
        second = F.relu(net[4](first))
        third = F.relu(net[7](second.flatten(1)))
    for (label, neuron), activations in zip(
        snn.neurons.items(), (first, second, third), strict=True
    ):
        assert neuron.initial_membrane == share
        if per == "layer":
            assert found[label] == pytest.approx(least(activations, timesteps, share), rel=1e-12)
            continue
        assert found[label] == snn.thresholds[label] == 1
        single = activations.dim() == 2
        groups = [activations] * 20 if single else activations.unbind(1)
        expected = [least(group, timesteps, share) for group in groups]
        torch.testing.assert_close(neuron.amplitude, torch.tensor(expected).double())


def test_dead_channels_have_their_layers_amplitude():
    """And are counted."""
    net, x = lively(simple()), images()
    with torch.no_grad():
        net[4].weight[[2, 5]] = -net[4].weight[[2, 5]].abs()
    snn = converted(net, x)
    found = stdb.balance_thresholds(snn, x, 4, method="mse", bias_correction=False)
    assert found.dead == {"4": 2}
    with torch.no_grad():
        activations = F.relu(net[:5](x))
    whole = least(activations, 4, 0.5)
    amplitude = snn.neurons["4"].amplitude
    assert amplitude[[2, 5]].tolist() == pytest.approx([whole, whole])
    assert amplitude[0].item() == pytest.approx(least(activations[:, 0], 4, 0.5))


# -- the two forms ---------------------------------------------------------------------------------


class Form(nn.Module):
    """Layers to build graphs of, all of 8 channels and 8 × 8 pixels."""

    def __init__(self, middle):
        super().__init__()
        self.middle = middle
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.groups = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.wide, self.narrow = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 4, 1, bias=False)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2, groups=2)
        self.pool, self.average, self.norm = nn.MaxPool2d(2), nn.AvgPool2d(2), nn.BatchNorm2d(8)
        self.shuffle = nn.PixelShuffle(2)
        self.small = nn.Conv2d(2, 8, 3, padding=1)
        self.last = nn.LazyLinear(10)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.last(self.middle(self, self.relu(self.first(x))).flatten(1))


FORMS = {
    "chain": lambda m, x: m.relu(m.second(x)),
    "identity": lambda m, x: m.relu(m.second(x) + x),
    "shortcut first": lambda m, x: m.relu(x + m.norm(m.second(x))),
    "before activation": lambda m, x: m.relu(m.norm(m.second(x) + x)) + m.second(x),
    "concat": lambda m, x: m.relu(m.wide(torch.cat([x, m.relu(m.second(x))], 1))),
    "concat of currents": lambda m, x: m.relu(torch.cat([m.narrow(x), m.narrow(x) * 2], 1)),
    "groups": lambda m, x: m.relu(m.second(m.relu(m.groups(x)))),
    "transposed": lambda m, x: m.relu(m.up(m.average(m.relu(m.groups(x))))),
    "max pooling": lambda m, x: m.relu(m.second(m.pool(m.relu(m.groups(x))))),
    "pooled and not": lambda m, x: m.relu(m.up(m.pool(x)) + m.second(x)),
    "relu after pooling": lambda m, x: m.relu(m.average(m.second(x))),
    "shuffled": lambda m, x: m.relu(m.small(m.shuffle(x))),
    "parts": lambda m, x: m.relu(m.second(torch.cat([x[:, 4:], x[:, :4]], 1))),
    "padded": lambda m, x: m.relu(m.groups(F.pad(x[:, 2:, 1:], (0, 0, 1, 0, 1, 1)))),
    "twice": lambda m, x: m.relu(m.second(m.relu(m.second(x)))),
    "bounded": lambda m, x: F.relu6(m.second(x)) + F.hardtanh(m.groups(x), 0.0, 0.5),
}


def form(name: str) -> nn.Module:
    net = Form(FORMS[name])
    net(images().float())
    return lively(net)


@pytest.mark.parametrize("name", FORMS, ids=lambda name: name.replace(" ", "-"))
def test_with_equal_amplitudes_both_forms_spike_alike(name):
    """Spike for spike in every layer, whatever A each layer has; and the logits to rounding."""
    net, x = form(name), images(4)
    snn = converted(net, x)
    for k, neuron in enumerate(snn.neurons.values()):
        neuron.bound = 0.37 + 0.211 * k
    twin = copy.deepcopy(snn)
    for network, per in ((snn, "layer"), (twin, "channel")):
        stdb.balance_thresholds(network, x, 6, method="learned", per=per, bias_correction=False)
    assert set(twin.thresholds.values()) == {1.0}
    ours, theirs = rates(snn, x, 6), rates(twin, x, 6)
    assert ours.keys() == theirs.keys()
    for label in snn.thresholds:
        assert torch.equal(ours[label], theirs[label]), label
        assert ours[label].any()
    torch.testing.assert_close(ours["output"], theirs["output"])


@pytest.mark.parametrize("per", ["layer", "channel"])
@pytest.mark.parametrize("name", FORMS, ids=lambda name: name.replace(" ", "-"))
def test_calibrated_networks_become_their_anns(name, per):
    """With many steps, at A for many steps; at scaled thresholds too."""
    net, x = form(name), images(3)
    snn = converted(net, x)
    stdb.balance_thresholds(snn, x, 200, method="mse", per=per)
    with torch.no_grad():
        expected = net(x)
    largest = expected.abs().max()
    assert (rates(snn, x, 200)["output"] - expected).abs().max() < 0.03 * largest
    snn.scale_thresholds(1.0 if name == "bounded" else 1.2)  # a rate of 1 is the bound
    assert (rates(snn, x, 200)["output"] - expected).abs().max() < 0.03 * largest


def test_a_network_of_the_papers_kind_is_given_units():
    """Without biases, identity shortcuts with nothing that could hold a unit."""
    torch.manual_seed(0)
    net = stdb.build("resnet8", in_channels=3, image_size=8, num_classes=5, width=0.1).double()
    x = images(6)
    snn = stdb.convert(net.eval(), stdb.DirectEncoder()).eval()
    labels = [*snn.thresholds]
    for per in ("layer", "channel"):
        stdb.balance_thresholds(snn, x, 200, method="mse", per=per)
        assert [*snn.thresholds] == labels
        with torch.no_grad():
            expected = net(x)
        found = rates(snn, x, 200)["output"]
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_by_itself_the_papers_kind_has_algorithm_1():
    """No weight moves, U_0 neither; a percentile is still one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 9, bias=False), nn.ReLU())
    net.append(nn.Linear(9, 5, bias=False)).double()
    snn, x = converted(net, images()), images()
    found = stdb.balance_thresholds(snn, x, 4)
    assert (found.method, found.per, found.dead, found.agreement) == ("maximum", "layer", {}, None)
    assert found["1"] == pytest.approx((x.flatten(1) @ net[1].weight.t()).max().item())
    assert torch.equal(snn.net[3].weight, net[3].weight)
    assert snn.neurons["1"].initial_membrane == 0
    assert not snn.has_units
    assert stdb.balance_thresholds(snn, x, 4, percentile=90).method == "percentile"


def test_by_itself_a_network_with_biases_has_least_error_per_channel():
    """At λ = 1; with a leak, or a percentile, it is Algorithm 1."""
    net, x = lively(simple()), images()
    snn = converted(net, x)
    found = stdb.balance_thresholds(snn, x, 4)
    assert (found.method, found.per) == ("mse", "channel")
    assert {neuron.initial_membrane for neuron in snn.neurons.values()} <= {*SHARES}
    assert found.agreement is not None
    assert stdb.balance_thresholds(snn, x, 4, percentile=99).method == "percentile"
    leaky = stdb.convert(net, stdb.DirectEncoder(), leak=0.9).eval()
    assert stdb.balance_thresholds(leaky, x, 4).method == "maximum"


# -- the same again --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_second_calibration_gives_what_the_first_gave(dtype):
    """Bit for bit, whatever was asked for between: other methods, scaled thresholds and logits."""
    net, x = lively(simple()).to(dtype), images().to(dtype)
    snn = converted(net, x)
    asked = [
        {"method": "mse"}, {"method": "mse", "per": "layer"}, {"method": "maximum"},
        {"method": "percentile", "percentile": 95, "bias_correction": True},
    ]  # fmt: skip
    first = []
    for settings in asked:
        stdb.balance_thresholds(snn, x, 2, initial_membrane=0.5, **settings)
        first.append(snn(x, 5))
        snn.scale_thresholds(0.7)
    for settings, expected in zip(asked, first, strict=True):
        snn.scale_thresholds(1.3)
        stdb.balance_thresholds(snn, x, 2, initial_membrane=0.5, **settings)
        assert torch.equal(snn(x, 5), expected)


def test_what_was_trained_since_stays():
    """A calibration starts from the weights as they are, not from those of before."""
    net, x = lively(simple()), images()
    snn = converted(net, x)
    stdb.balance_thresholds(snn, x, 4)
    with torch.no_grad():
        for name, parameter in snn.net[9].named_parameters():
            parameter.mul_(2 if name == "weight" else 1)
        net[9].weight.mul_(2)
        expected = net(x)
    stdb.balance_thresholds(snn, x, 200, bias_correction=False)
    found = rates(snn, x, 200)["output"]
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_saved_with_units_and_corrections(tmp_path):
    """Loaded: the same logits, and a calibration finds the same, to rounding."""
    net, x = lively(simple()), images()
    snn = converted(net, x)
    found = stdb.balance_thresholds(snn, x, 2, initial_membrane=0.0)
    assert found.corrected
    stdb.save(snn, tmp_path / "snn", timesteps=2, classes=list("abcdefghij"))
    again, _ = stdb.load(tmp_path / "snn")
    assert torch.equal(again(x, 3), snn(x, 3))
    assert torch.equal(again.output_correction, snn.output_correction)
    second = stdb.balance_thresholds(again, x, 2, initial_membrane=0.0)
    assert second.agreement == found.agreement
    torch.testing.assert_close(again(x, 2), snn(x, 2))


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_workers_finds_the_same(world):
    """Bit for bit; sums are added in the order of the batches. A worker may have none."""
    net, x = lively(simple()).float(), images(9).float()
    alone = converted(net, x)
    expected = stdb.balance_thresholds(alone, x, 2, batch_size=4)
    barrier, values = threading.Barrier(world, timeout=30), {}

    def work(rank):
        def reduce(value, op):
            values[rank] = value
            barrier.wait()
            merged = torch.stack([values[r] for r in range(world)])
            merged = merged.amax(0) if op == "max" else merged.sum(0)
            barrier.wait()
            return merged

        batches = x.split(4)[rank::world]
        own = torch.cat([*batches, x[:0]])
        snn = networks[rank]
        found = stdb.balance_thresholds(
            snn, own, 2, batch_size=4, reduce=reduce, share=(rank, world)
        )
        return found, states(snn)

    networks = [converted(net, x) for _ in range(world)]
    with ThreadPoolExecutor(world) as pool:
        results = list(pool.map(work, range(world)))
    for found, state in results:
        assert found == expected
        assert found.agreement == expected.agreement
        assert same(state, states(alone))


def test_batches_that_are_not_the_workers_own():
    """Without share= the order of the batches is not known."""
    snn, x = converted(lively(simple()), images()), images()
    with pytest.raises(ValueError, match=r"worker 0 of 1 has 3 of 6 batches; allowed: share="):
        stdb.balance_thresholds(snn, x, 2, batch_size=4, reduce=lambda value, _: 2 * value)


# -- bias correction -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["identity", "max pooling", "concat", "twice"])
def test_the_correction_removes_a_bias_that_is_known(name):
    """U_0 = 0 makes every rate A/2T too small; corrected, mean rates are the ANN's means."""
    net, x = form(name), images(30)
    snn = converted(net, x)
    settings = {"method": "mse", "initial_membrane": 0.0}
    stdb.balance_thresholds(snn, x, 3, **settings, bias_correction=False)
    with torch.no_grad():
        ann = net(x).mean(0)
    plain = rates(snn, x, 3)["output"].mean(0) - ann
    found = stdb.balance_thresholds(snn, x, 3, **settings, batch_size=7)
    assert found.corrected
    before, after = found.agreement
    assert after > before
    corrected = rates(snn, x, 3)
    left = corrected["output"].mean(0) - ann
    assert left.abs().max() < 1e-9
    assert plain.abs().max() > 0.05
    twin = stdb.convert(net, stdb.DirectEncoder(), example=x[:2])
    assert [*twin.thresholds] == [*snn.thresholds]
    rows = stdb.diagnose(net, snn, x, 3)
    assert [row.layer for row in rows] == [*snn.thresholds]


def test_a_correction_that_does_not_help_is_not_kept():
    """At many steps nothing is left to win: weights and biases are those without it."""
    net, x = lively(simple()), images()
    snn = converted(net, x)
    stdb.balance_thresholds(snn, x, 64, bias_correction=False, initial_membrane=0.5)
    expected = states(snn)
    found = stdb.balance_thresholds(snn, x, 64, initial_membrane=0.5)
    before, after = found.agreement
    assert after <= before
    assert not found.corrected
    assert same(states(snn), expected)


@pytest.mark.parametrize("correct", [True, False])
def test_the_initial_membrane_with_least_surprise_is_taken(correct):
    """Of those that are tried, each by itself, with the decisions of torch's own network."""
    net, x = lively(simple()), images(40)
    decisions, surprises = net(x).argmax(1), {}
    for share in SHARES:
        snn = converted(net, x)
        found = stdb.balance_thresholds(snn, x, 3, initial_membrane=share, bias_correction=correct)
        assert found.corrected is correct
        with torch.no_grad():
            surprises[share] = float(F.cross_entropy(snn(x, 3) / 3, decisions))
    expected = min(surprises, key=surprises.__getitem__)
    snn = converted(net, x)
    found = stdb.balance_thresholds(snn, x, 3, bias_correction=correct)
    assert found.initial_membrane == expected
    assert {neuron.initial_membrane for neuron in snn.neurons.values()} == {expected}


# -- what cannot be --------------------------------------------------------------------------------

REFUSED = {
    "method": ({"method": "mean"}, r"method is 'mean'; allowed: auto, maximum, percentile, mse"),
    "form": ({"per": "neuron"}, "per is 'neuron'; allowed: layer, channel"),
    "channels": (
        {"method": "maximum", "per": "channel"},
        "per is channel with the method maximum; allowed: layer, or the methods mse, learned",
    ),
    "percentile": (
        {"method": "mse", "percentile": 99},
        "percentile is 99 with the method mse; allowed: 100, or the method percentile",
    ),
    "start": ({"initial_membrane": 1.0}, r"initial_membrane is 1.0; allowed: at least 0, below 1"),
    "bound": (
        {"method": "learned"},
        "layer 0 has no bound that its activation was trained with, nor have 2 others; allowed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_be(name):
    """Named, with what is allowed, and nothing has changed."""
    settings, message = REFUSED[name]
    snn, x = converted(lively(simple()), images()), images()
    before = states(snn)
    with pytest.raises(ValueError, match=message):
        stdb.balance_thresholds(snn, x, 2, **settings)
    assert same(states(snn), before)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"method": "mse"}, "the method mse"),
        ({"method": "learned"}, "the method learned"),
        ({"method": "maximum", "bias_correction": True}, "bias_correction"),
    ],
)
def test_a_leak_is_refused(settings, what):
    """A current below (1 − λ)·V never fires."""
    snn = stdb.convert(lively(simple()), stdb.DirectEncoder(), leak=0.75)
    with pytest.raises(ValueError, match=rf"the leak of 0 is 0.75 with {what}; allowed: 1"):
        stdb.balance_thresholds(snn, images(), 2, **settings)


def test_a_silent_layer_is_named():
    net, x = lively(simple()), images()
    with torch.no_grad():
        net[4].weight.copy_(-net[4].weight.abs())
    snn = converted(net, x)
    with pytest.raises(ValueError, match=r"layer 4 is silent: .* is 0.0; allowed: above 0"):
        stdb.balance_thresholds(snn, x, 2)


# -- kinds of networks -----------------------------------------------------------------------------


class Shifted(nn.Module):
    """Biases are nowhere but in the normalisation of the pixels; a shortcut takes spikes along."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.b = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.f = nn.Linear(8, 5, bias=False)

    def forward(self, x):
        x = torch.relu(self.a((x - 0.5) / 0.25))
        return self.f(torch.relu(self.b(x) + x).mean((2, 3)))


KINDS = {
    "a shift": Shifted,
    "batch norm behind flatten": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(512),
        nn.Linear(512, 16), nn.ReLU(), nn.Linear(16, 5),
    ),
    "spectral norm": lambda: nn.Sequential(
        spectral_norm(nn.Conv2d(3, 8, 3, padding=1)), nn.ReLU(), nn.Flatten(),
        spectral_norm(nn.Linear(512, 5)),
    ),
    "logits with pixels": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", ["mse", "maximum"])
@pytest.mark.parametrize("kind", KINDS)
def test_long_presentations_give_the_anns_logits(kind, method):
    """Whatever makes a network one with units; and a second calibration gives the first."""
    torch.manual_seed(3)
    ann = KINDS[kind]()
    images = torch.rand(16, 3, 8, 8)
    for _ in range(20):  # norms see something
        ann.train()(images)
    ann.eval()
    snn = stdb.convert(ann, stdb.DirectEncoder(), example=images[:2]).eval()
    first = stdb.balance_thresholds(snn, images, 128, method=method)
    with torch.no_grad():
        expected, found = ann(images), snn(images, 128) / 128
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    if first.agreement is not None:
        assert max(first.agreement) <= 1
    second = stdb.balance_thresholds(snn, images, 128, method=method)
    assert second == pytest.approx(first, rel=1e-4)


def test_presenting_computes_no_weights_to_count_them():
    """A spectral norm would move on."""
    snn = stdb.convert(KINDS["spectral norm"]().eval(), stdb.DirectEncoder()).train()
    layer = snn.net.get_submodule("0")
    before = layer.weight_u.clone()
    snn.present(torch.rand(2, 3, 8, 8))
    assert torch.equal(layer.weight_u, before)


def test_a_network_of_another_program_is_refused():
    """Its V is in weights already, so that biases would no longer fit their currents."""
    images = torch.rand(8, 3, 8, 8)
    ann = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    snn = stdb.convert(ann, stdb.DirectEncoder()).eval()
    stdb.balance_thresholds(snn, images, 8, per="layer", bias_correction=False)
    read = stdb.from_nir(stdb.to_nir(snn, (3, 8, 8)))
    with pytest.raises(ValueError, match=r"mse wants a network .* biases that go with its V"):
        stdb.balance_thresholds(read, images, 8, method="mse")
    assert stdb.balance_thresholds(read, images, 8).method == "maximum"
