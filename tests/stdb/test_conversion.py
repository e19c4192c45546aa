"""Conversion and thresholds: what is refused and how, what is kept, what scaling refers to."""

import copy
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import stdb
from stdb.randomness import sample_keys
from tests.stdb.support import balanced


def conv(i=1, o=2, **options):
    """3×3, size kept, no bias."""
    return nn.Conv2d(i, o, 3, padding=1, bias=False, **options)


def linear(i=32, o=3):
    """No bias."""
    return nn.Linear(i, o, bias=False)


def convert(ann, **options):
    """Convert with a Poisson encoder."""
    return stdb.convert(ann, stdb.PoissonEncoder(), **options)


def build(name):
    """A narrow network for 1×8×8 images, with weights that make its deepest layer fire."""
    torch.manual_seed(0)
    ann = stdb.build(name, 1, 8, 3, width=0.06, hidden=8)
    with torch.no_grad():
        for weight in ann.parameters():
            weight += weight.std() / 2
    return ann


def layers(**modules):
    """A Sequential for 1×4×4 images whose layers are named; ``None`` leaves one out."""
    base = {"first": conv(), "relu": nn.ReLU(), "extra": None, "flat": nn.Flatten()}
    base |= {"output": linear(), "last": None} | modules
    return nn.Sequential(OrderedDict((k, m) for k, m in base.items() if m is not None))


class Custom(nn.Module):
    """first → a function of (module, x) → output."""

    def __init__(self, middle):
        """Keep the function."""
        super().__init__()
        self.first, self.relu, self.relu2, self.output = conv(), nn.ReLU(), nn.ReLU(), linear()
        self.scale = nn.Parameter(torch.ones(1))
        self.middle = middle

    def forward(self, x):
        """As said."""
        return self.output(self.middle(self, self.first(x)))


# -- what is refused -----------------------------------------------------------------------------

LAYERS = [  # (network, what the message names, the remedy)
    (layers(extra=nn.GroupNorm(1, 2)), "layer extra is a GroupNorm", "nn.BatchNorm2d"),
    (layers(extra=nn.LayerNorm(4)), "layer extra is a LayerNorm", "nn.BatchNorm2d"),
    (layers(relu=nn.LeakyReLU()), "layer relu is a LeakyReLU", "nn.ReLU"),
    (layers(relu=nn.Sigmoid()), "layer relu is a Sigmoid", "nn.ReLU"),
    (layers(extra=nn.AlphaDropout()), "layer extra is a AlphaDropout", "use nn.Dropout"),
    (layers(extra=nn.LSTM(4, 4)), "layer extra is a LSTM", "allowed: Conv2d, Conv1d, Linear"),
    (layers(flat=nn.Flatten(2)), "layer flat flattens only some", r"nn.Flatten\(\)"),
    (layers(relu=None), "the network has no nn.ReLU", "nn.ReLU"),
    (
        nn.Sequential(OrderedDict(block=layers(extra=nn.GroupNorm(1, 2)))),
        r"layer block\.extra is a GroupNorm",
        "nn.BatchNorm2d",
    ),
]  # fmt: skip
FORWARDS = [  # (between first and output, what the message names, the remedy)
    (lambda m, x: torch.flatten(m.relu(x) * m.scale, 1), "scale .*parameter", "allowed: "),
    (lambda m, x: torch.flatten(torch.add(x, m.relu(x), alpha=2), 1), "alpha", "plain sum"),
    (lambda m, x: torch.flatten(m.relu(x), 1)[0], "it fails on images", "give a batch of im"),
    (lambda m, x: m.relu(x) if x.sum() > 0 else x, "Custom cannot be traced", "control flow"),
    (lambda m, x: torch.flatten(m.relu(x), len(x)), "Custom cannot be traced", "Dimension out of"),
    (lambda m, x: m.relu(x).view(7, -1), "Custom cannot be traced: it fails", "is invalid for in"),
]  # fmt: skip


@pytest.mark.parametrize(("net", "what", "remedy"), LAYERS, ids=[what for _, what, _ in LAYERS])
def test_refused_layers(net, what, remedy):
    """The message names the layer and what to do about it."""
    with pytest.raises(stdb.ConversionError, match=what) as error:
        convert(net)
    assert error.match(remedy)


@pytest.mark.parametrize(("middle", "what", "remedy"), FORWARDS, ids=[w for _, w, _ in FORWARDS])
def test_refused_forwards(middle, what, remedy):
    """So it does where a forward method does what cannot spike."""
    with pytest.raises(stdb.ConversionError, match=what) as error:
        convert(Custom(middle))
    assert error.match(remedy)


def test_refused_signatures():
    """One image in, one batch of logits out."""

    class TwoInputs(Custom):
        def forward(self, x, y):
            return self.output(torch.flatten(self.relu(self.first(x) + y), 1))

    class TwoOutputs(Custom):
        def forward(self, x):
            x = torch.flatten(self.relu(self.first(x)), 1)
            return self.output(x), x

    with pytest.raises(stdb.ConversionError, match="second input, y"):
        convert(TwoInputs(None))
    with pytest.raises(stdb.ConversionError, match="returns several values"):
        convert(TwoOutputs(None))


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: torch.flatten(x, 1),
        lambda x: torch.flatten(input=x, start_dim=1),
        lambda x: x.flatten(1),
        lambda x: x.flatten(start_dim=1, end_dim=-1),
        lambda x: x.view(x.size(0), -1),
        lambda x: x.view(x.size()[0], -1),
        lambda x: x.reshape(x.shape[0], -1),
        lambda x: x.reshape([x.shape[0], -1]),
        lambda x: x.reshape((len(x), -1)),
        lambda x: x.view(-1, 32),
        lambda x: x.view(-1, x.size(1) * x.size(2) * x.size(3)),
        lambda x: x.contiguous().flatten(1),
        lambda x: torch.reshape(x, (-1, x[0].numel())),
    ],
)
def test_ways_to_flatten(flatten):
    """All that people write to flatten a batch does the same as nn.Flatten."""
    torch.manual_seed(0)
    ann = Custom(lambda m, x: flatten(m.relu(x)))
    same = layers(first=ann.first, output=ann.output)
    images = torch.rand(3, 1, 4, 4)
    logits = convert(ann)(images, 5)
    assert logits.abs().max() > 0
    assert torch.equal(logits, convert(same)(images, 5))


def test_keyword_arguments():
    """Inputs that are passed by name count as inputs."""
    torch.manual_seed(0)
    ann = Custom(lambda m, x: torch.flatten(torch.add(m.relu(input=x), other=x), 1))
    plain = Custom(lambda m, x: torch.flatten(m.relu(x) + x, 1))
    plain.load_state_dict(ann.state_dict())
    images = torch.rand(3, 1, 4, 4)
    assert torch.equal(convert(ann)(images, 5), convert(plain)(images, 5))


# -- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vgg5", "resnet8"])
def test_ann_is_not_modified(name):
    """Neither conversion nor what happens to the SNN changes the ANN."""
    ann = build(name).train()
    kept, image = copy.deepcopy(ann.state_dict()), torch.rand(2, 1, 8, 8)
    expected = ann.eval()(image)
    snn = convert(ann.train())
    stdb.balance_thresholds(snn, image, 20)
    with torch.no_grad():
        for parameter in snn.parameters():
            parameter.mul_(0.5)
    assert all(torch.equal(kept[k], v) for k, v in ann.state_dict().items())
    assert not any(isinstance(m, stdb.SpikingNeuron) for m in ann.modules())
    assert torch.equal(ann.eval()(image), expected)


@pytest.mark.parametrize("name", ["vgg5", "resnet8"])
def test_weights_keep_names_and_values(name):
    """ANN and SNN are the same module tree, so a weight has one name in both."""
    ann = build(name)
    snn = convert(ann)
    weights = {n: p for n, p in snn.net.named_parameters() if n.endswith("weight")}
    assert list(weights) == [n for n, _ in ann.named_parameters()]
    assert all(torch.equal(weights[n], p) for n, p in ann.named_parameters())


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_kept(training):
    """Training stays training, evaluation stays evaluation."""
    snn = convert(layers().train(training))
    assert snn.training == training
    assert snn.net.first.training == training


def test_dtype_is_kept_when_a_relu_comes_first():
    """A network whose ReLU is its first attribute stays in double precision."""

    class ReluFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.first, self.output = nn.ReLU(), conv(), linear()

        def forward(self, x):
            return self.output(torch.flatten(self.relu(self.first(x)), 1))

    snn = convert(ReluFirst().double())
    assert {p.dtype for p in snn.parameters()} == {torch.float64}
    assert snn(torch.rand(1, 1, 4, 4).double(), 2).dtype == torch.float64


def test_layers_go_by_their_weights():
    """A spiking layer is called as the weights that drive it, where that is unambiguous."""
    assert list(convert(build("vgg5")).thresholds) == [
        "conv1", "conv2", "conv3", "fc1", "fc2",
    ]  # fmt: skip
    assert list(convert(build("resnet8")).thresholds) == [
        "conv1", "conv2", "conv3", "group1_block1.conv1", "group1_block1.conv2",
        "group2_block1.conv1", "group2_block1.conv2",
    ]  # fmt: skip
    twice = Custom(lambda m, x: torch.flatten(m.relu(x) + m.relu2(x), 1))
    assert list(convert(twice).thresholds) == ["relu", "relu2"]
    taken = nn.Sequential(OrderedDict(input=conv(), relu=nn.ReLU(), output=conv(2)))
    assert list(convert(taken).thresholds) == ["relu"]  # statistics call the image "input"


def test_a_fresh_network():
    """Thresholds 1, the leak asked for, nothing but weights learns unless asked."""
    snn = convert(layers(), leak=0.5)
    assert snn.thresholds == {"first": 1.0}
    assert [float(n.leak) for n in snn.neurons.values()] == [0.5]
    assert all(n.endswith("weight") == p.requires_grad for n, p in snn.named_parameters())
    learning = convert(layers(), learn_thresholds=True, learn_leaks=True)
    assert all(p.requires_grad for p in learning.parameters())


def test_state_dict_round_trip():
    """Weights, V, λ and what scaling refers to survive saving and loading."""
    images = torch.rand(4, 1, 8, 8)
    snn, other = convert(build("resnet8"), leak=0.9), convert(build("resnet8"))
    with torch.no_grad():
        other.net.output.weight.zero_()
    stdb.balance_thresholds(snn, images, 20)
    snn.scale_thresholds(0.7)
    assert not torch.equal(snn(images, 30), other(images, 30))
    other.load_state_dict(snn.state_dict())
    assert other.thresholds == snn.thresholds
    assert torch.equal(snn(images, 30), other(images, 30))
    for network in (snn, other):
        network.scale_thresholds(0.4)
    assert other.thresholds == snn.thresholds


# -- thresholds ----------------------------------------------------------------------------------


def resnet():
    """A narrow ResNet8 with calibration images."""
    return convert(build("resnet8")), torch.rand(6, 1, 8, 8)


def test_scaling_is_not_cumulative():
    """Each scale refers to the balanced V; 1 restores it."""
    snn = convert(build("vgg5"))
    found = stdb.balance_thresholds(snn, torch.rand(6, 1, 8, 8), 30)
    for factor in (0.7, 0.7, 0.5, 1.0):
        snn.scale_thresholds(factor)
        expected = {name: v * factor for name, v in found.items()}
        assert snn.thresholds == pytest.approx(expected, rel=1e-6)


def test_resnet_blocks_stay_at_one():
    """The paper balances and scales the pre-processing convolutions only (§4.2)."""
    snn, images = resnet()
    found = stdb.balance_thresholds(snn, images, 30)
    assert found == pytest.approx(snn.thresholds)
    pre = {"conv1", "conv2", "conv3"}
    assert all((value == 1) == (name not in pre) for name, value in found.items())
    snn.scale_thresholds(0.5)
    for name, value in snn.thresholds.items():
        assert value == pytest.approx(found[name] * (0.5 if name in pre else 1))


def test_residual_blocks_can_be_balanced():
    """With residual_blocks=True every layer is balanced and scaled."""
    snn, images = resnet()
    found = stdb.balance_thresholds(snn, images, 30, residual_blocks=True)
    assert all(value != 1 for value in found.values())
    snn.scale_thresholds(0.5)
    assert snn.thresholds == pytest.approx({n: v / 2 for n, v in found.items()})


@pytest.mark.parametrize("residual_blocks", [False, True])
@pytest.mark.parametrize(("batch_size", "chunk"), [(64, None), (4, 7), (1, 1)])
def test_balancing_against_algorithm_1(residual_blocks, batch_size, chunk):
    """Shortcuts included, and whatever the batches and chunks, V is the literal algorithm's."""
    ann, images = build("resnet8").double().train(), torch.rand(5, 1, 8, 8).double()
    encoder = stdb.PoissonEncoder(seed=3)
    train = encoder(images, 0, 25, sample_keys(torch.arange(5), epoch=0))
    snn = stdb.convert(ann, encoder, leak=0.7, chunk=chunk)
    places = [snn.graph.nodes[i].name for i in snn.graph.neurons]
    keep = {} if residual_blocks else {p: 1.0 for p in places if p.startswith("group")}
    found = stdb.balance_thresholds(
        snn, images, 25, batch_size=batch_size, residual_blocks=residual_blocks
    )
    assert list(found.values()) == pytest.approx(balanced(ann, train, keep), rel=1e-9)
    assert snn.training


@pytest.mark.parametrize("percentile", [100, 99])
def test_balancing_over_workers(percentile):
    """Two workers with half of the images each, exchanging what they saw, find the V of all."""
    ann, images = build("resnet8"), torch.rand(6, 1, 8, 8)
    expected = stdb.balance_thresholds(convert(ann), images, 20, percentile=percentile)
    barrier, values = threading.Barrier(2, timeout=30), {}

    def work(rank):
        def reduce(value, op):
            values[rank] = value
            barrier.wait()
            merged = torch.stack([values[0], values[1]])
            merged = merged.amax(0) if op == "max" else merged.sum(0)
            barrier.wait()
            return merged

        part = slice(3 * rank, 3 * rank + 3)
        return stdb.balance_thresholds(
            convert(ann), images[part], 20, sample_ids=torch.arange(6)[part], reduce=reduce,
            percentile=percentile,
        )  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, range(2)))
    assert found == [expected, expected]
    alone = stdb.balance_thresholds(convert(ann), images[:3], 20)
    assert alone != expected


@pytest.mark.parametrize("memory", [0, 1500, 40_000])
def test_balancing_in_little_memory(memory):
    """Spike trains that find no room are made again: the same thresholds, bit for bit."""
    ann, images = build("resnet8"), torch.rand(6, 1, 8, 8)
    expected = stdb.balance_thresholds(convert(ann), images, 25, batch_size=2)
    assert (
        stdb.balance_thresholds(convert(ann), images, 25, batch_size=2, memory=memory) == expected
    )


class Shortcuts(nn.Module):
    """40 residual layers: as many paths through them as 2 to the power of 40."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(40))
        self.relu, self.output = nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x):
        for layer in self.layers:
            x = self.relu(x + layer(x))
        return self.output(x)


@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_a_deep_network_with_shortcuts_is_balanced(memory):
    """No path is walked alone, which would take for ever."""
    snn = stdb.convert(Shortcuts(), stdb.DirectEncoder())
    settings = {"method": "maximum", "memory": memory}
    found = stdb.balance_thresholds(snn, torch.rand(2, 4), 4, **settings)
    assert len(found) == 40


@pytest.mark.parametrize("percentile", [50, 90, 99.9])
def test_percentile_of_the_weighted_inputs(percentile):
    """V of the first layer is the quantile of all its inputs, to 0.1 %; higher layers follow."""
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(5, 40, bias=False), nn.ReLU(), nn.Linear(40, 3, bias=False))
    with torch.no_grad():
        net[0].weight.abs_()
    images = torch.rand(30, 5).view(30, 5, 1, 1)
    ann = nn.Sequential(nn.Flatten(), *net)
    snn = stdb.convert(ann, stdb.PoissonEncoder(0))
    inputs = stdb.PoissonEncoder(0)(images, 0, 40, snn.present(images).keys).flatten(2)
    currents = (inputs @ net[0].weight.t()).flatten().double()
    found = stdb.balance_thresholds(snn, images, 40, percentile=percentile, batch_size=7)
    wanted = currents.detach().quantile(percentile / 100, interpolation="higher")
    assert next(iter(found.values())) == pytest.approx(float(wanted), rel=1.1e-3)


@pytest.mark.parametrize("percentile", [0, -1, 100.1, float("nan")])
def test_an_impossible_percentile(percentile):
    """The message says what is allowed."""
    with pytest.raises(ValueError, match=r"percentile is .*allowed: above 0, at most 100"):
        stdb.balance_thresholds(
            convert(build("resnet8")), torch.rand(2, 1, 8, 8), 5, percentile=percentile
        )


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_dead_layer_in_balancing(place, value):
    """A layer that never gets a positive input, or NaN, has no V: the error names it."""
    net = layers(
        relu=nn.Sequential(nn.ReLU(), nn.Identity()), extra=nn.Sequential(conv(2, 2), nn.ReLU())
    )
    snn = convert(net)
    weight = snn.net.first.weight if place == 0 else snn.net.extra[0].weight
    with torch.no_grad():
        snn.net.first.weight.fill_(1.0)
        weight.fill_(value)
    name = "first" if place == 0 else r"extra\.0"
    with pytest.raises(ValueError, match=f"layer {name} has a largest weighted input of"):
        stdb.balance_thresholds(snn, torch.ones(2, 1, 4, 4), 10)


def test_nan_anywhere_is_found():
    """One NaN among the chunks of finite inputs does not hide behind them."""
    train = torch.ones(20, 1, 1, 4, 4)
    train[13, 0, 0, 2, 2] = float("nan")
    net = layers()
    with torch.no_grad():
        net.first.weight.fill_(1.0)
    snn = stdb.convert(net, stdb.SpikeTrain(train), chunk=4)
    with pytest.raises(ValueError, match="layer first has a largest weighted input of nan"):
        stdb.balance_thresholds(snn, torch.zeros(1, 1, 4, 4), 20)


def test_nothing_to_balance_on():
    """No steps or no images are errors before any work."""
    snn, images = resnet()
    with pytest.raises(ValueError, match="timesteps is 0; allowed: 1 or more"):
        stdb.balance_thresholds(snn, images, 0)
    with pytest.raises(ValueError, match="no calibration images"):
        stdb.balance_thresholds(snn, images[:0], 10)


def test_thresholds_of_another_network():
    """Names are checked: missing, unknown and this network's own are listed."""
    snn = convert(build("vgg5"))
    other = convert(build("resnet8")).thresholds
    message = (
        r"another network: missing \['fc1', 'fc2'\], unknown \['group1.*conv1, conv2, conv3, fc1"
    )
    with pytest.raises(ValueError, match=message):
        snn.set_thresholds(other)
    assert set(snn.thresholds.values()) == {1.0}


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_thresholds(value):
    """V has to be positive where it is set, and where a presentation starts (it may be learnt)."""
    snn = convert(layers())
    with pytest.raises(ValueError, match=r"threshold of first is .*; allowed: a positive number"):
        snn.set_thresholds({"first": value})
    with torch.no_grad():
        snn.net.relu.threshold.fill_(value)
    with pytest.raises(ValueError, match=r"threshold of first is .*; allowed: a positive number"):
        snn(torch.zeros(1, 1, 4, 4), 1)


@pytest.mark.parametrize("value", [0.0, -0.5, 1.5, float("nan")])
def test_impossible_leaks(value):
    """0 < λ ≤ 1, at conversion and where a presentation starts."""
    with pytest.raises(ValueError, match=r"leak is .*; allowed: above 0, at most 1"):
        convert(layers(), leak=value)
    snn = convert(layers())
    with torch.no_grad():
        snn.net.relu.leak.fill_(value)
    with pytest.raises(ValueError, match=r"leak of first is .*; allowed: in \(0, 1\]"):
        snn(torch.zeros(1, 1, 4, 4), 1)


@pytest.mark.parametrize("kind", stdb.SURROGATES.values())
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_impossible_surrogates(kind, value):
    """α > 0 and β ≥ 0."""
    with pytest.raises(ValueError, match=r"alpha is .*; allowed: a number above 0"):
        kind(alpha=value)
    with pytest.raises(ValueError, match="alpha is 0"):
        kind(alpha=0.0)
    with pytest.raises(ValueError, match=r"beta is .*; allowed: 0 or a positive number"):
        kind(beta=value)
    assert kind(beta=0.0).beta == 0


@pytest.mark.parametrize("value", [0, -3])
def test_impossible_steps(value):
    """T and chunk are at least 1."""
    snn = convert(layers())
    for run in (snn, snn.logits_over_time):
        with pytest.raises(ValueError, match=f"timesteps is {value}; allowed: 1 or more"):
            run(torch.zeros(1, 1, 4, 4), value)
    with pytest.raises(ValueError, match=f"chunk is {value}; allowed: 1 or more"):
        convert(layers(), chunk=value)


@pytest.mark.parametrize("value", [0.0, -0.7, float("nan"), float("inf")])
def test_impossible_scale(value):
    """A scale is a positive number, and a refused one changes nothing."""
    snn = convert(layers())
    snn.set_thresholds({"first": 2.0})
    with pytest.raises(ValueError, match=r"threshold scale is .*; allowed: a positive number"):
        snn.scale_thresholds(value)
    assert snn.thresholds == {"first": 2.0}


def test_neuron_outside_a_network():
    """A spiking neuron called like a ReLU says where it belongs."""
    with pytest.raises(RuntimeError, match="no meaning outside SpikingNetwork"):
        convert(layers()).net(torch.zeros(1, 1, 4, 4))
