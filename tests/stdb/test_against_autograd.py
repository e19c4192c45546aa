"""The engine's spikes, logits and gradients against a literal step-by-step network in float64."""

import math
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import stdb
from tests.stdb.support import Literal, relus

TOLERANCE = 1e-9
LEARN = ["", "V", "λ", "Vλ"]


def conv(i, o, stride=1, kernel=3, padding=1, groups=1, bias=False):
    """Without a bias unless asked for."""
    return nn.Conv2d(i, o, kernel, stride, padding, groups=groups, bias=bias)


def linear(i, o, bias=False):
    """Without a bias unless asked for."""
    return nn.Linear(i, o, bias=bias)


def prepare(net, seed):
    """Float64, with weights that make deep layers fire."""
    generator = torch.Generator().manual_seed(seed)
    net = net.double().train()
    with torch.no_grad():
        for weight in net.parameters():
            drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            scale = 1 / math.sqrt(weight[0].numel()) if weight.dim() > 1 else 0.2
            weight.copy_((drawn + 0.4) * scale)
    return net


def random_train(shape, seed):
    """A signed spike train (T, B, C, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(shape, generator=generator, dtype=torch.float64)
    return (draw < 0.55).double() - (draw > 0.85).double()


def draw_masks(net, images, seed):
    """A mask of 0 and 1/(1−p) for each dropout: by place, in the order of a step."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}

    def draw(name, module):
        def hook(_, inputs):
            shape = inputs[0].shape
            drawn = shape if type(module) is nn.Dropout else (*shape[:2], *[1] * len(shape[2:]))
            keep = torch.rand(drawn, generator=generator) >= module.p
            masks[name] = (keep.double() / (1 - module.p)).expand(shape)

        return module.register_forward_pre_hook(hook)

    kinds = nn.Dropout | nn.Dropout1d | nn.Dropout2d
    hooks = [draw(n, m) for n, m in net.named_modules() if isinstance(m, kinds)]
    net(images)
    for hook in hooks:
        hook.remove()
    return masks


def close(actual, expected, what, tolerance=TOLERANCE):
    """Deviation relative to the largest value."""
    expected = torch.zeros_like(actual) if expected is None else expected.to(actual)
    error = float((actual - expected).abs().max())
    largest = max(1e-6, float(expected.abs().max()))  # what cancels leaves its terms' rounding
    assert error <= tolerance * largest, f"{what}: off by {error}"


def compare(  # noqa: PLR0913 (what hypothesis draws)
    net, train, *, seed=0, direct=False, chunk=None, windows=None, leak=1.0, kind="stdb",
    alpha=0.3, beta=0.05, over_threshold=False, temporal_gradient=True, learn="Vλ", initial=0.0,
):  # fmt: skip
    """Present the same to both and compare all; returns the literal first weight's gradient."""
    timesteps, batch = train.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(train.shape[1:], dtype=torch.float64)
    if direct:
        images = torch.rand(images.shape, generator=generator, dtype=torch.float64) * 1.5 - 0.5
        pixels = images.clone().requires_grad_()
        train = pixels.expand(timesteps, *images.shape)
        images.requires_grad_()
    places = relus(net)
    levels = 0.2 + 0.6 * torch.rand(len(places), generator=generator)
    thresholds = dict(zip(places, levels.tolist(), strict=True))
    masks = draw_masks(net, images, seed)
    windows = windows or [timesteps]

    surrogate = stdb.SURROGATES[kind](alpha, beta, over_threshold)
    snn = stdb.convert(
        net, stdb.DirectEncoder() if direct else stdb.SpikeTrain(train), surrogate, leak,
        temporal_gradient=temporal_gradient, chunk=chunk,
        learn_thresholds="V" in learn, learn_leaks="λ" in learn, example=images.detach(),
    )  # fmt: skip
    with torch.no_grad():
        for place, value in thresholds.items():
            snn.net.get_submodule(place).threshold.fill_(value)
            snn.net.get_submodule(place).leak.fill_(leak)
            snn.net.get_submodule(place).initial_membrane = initial
    literal = Literal(
        net, thresholds, leak, masks, kind=kind, alpha=alpha, beta=beta,
        over_threshold=over_threshold, temporal_gradient=temporal_gradient, initial=initial,
    )  # fmt: skip

    labels = torch.arange(batch)
    with stdb.record_spikes(snn, trains=True) as statistics:
        presentation = snn.present(images, masks=list(masks.values()))
        for steps, expected in zip(windows, literal.run(train, windows), strict=True):
            logits = snn(presentation, steps)
            close(logits.detach(), expected.detach(), "logits")
            F.cross_entropy(logits, labels % logits.shape[1]).backward()
            F.cross_entropy(expected, labels % logits.shape[1]).backward(retain_graph=direct)
    if direct:
        close(images.grad, pixels.grad, "gradient of the images")
    for i, label in snn.graph.labels.items():
        place = snn.graph.nodes[i].name
        assert torch.equal(statistics.train(label), literal.spikes(place)), f"spikes of {place}"
    expected = dict(literal.net.named_parameters())
    for name, parameter in snn.net.named_parameters():
        if parameter.requires_grad and name in expected:  # units in front of a sum are new
            close(parameter.grad, expected[name].grad, f"gradient of {name}")
    return next(p for n, p in literal.net.named_parameters() if n.endswith("weight")).grad


@st.composite
def networks(draw):
    """A small network of convolutions, residual blocks, poolings, dropouts and linear layers."""
    channels, size = draw(st.integers(1, 3)), draw(st.integers(4, 7))
    layers, c = [], channels
    shape = (1, channels, size, size)
    for _ in range(draw(st.integers(1, 3))):
        planes, stride = draw(st.sampled_from([2, 4])), draw(st.integers(1, 2))
        if draw(st.booleans()):
            layers += [stdb.ResidualBlock(c, planes, stride, dropout=0.25)]
        else:
            kernel, padding = draw(st.sampled_from([(1, 0), (3, 1), (3, 2), ((3, 1), (1, 0))]))
            groups = 2 if c % 2 == 0 and draw(st.booleans()) else 1
            layers += [
                conv(c, planes, stride, kernel, padding, groups, draw(st.booleans())),
                nn.ReLU(),
            ]
        if draw(st.booleans()):
            layers += [nn.Dropout(draw(st.sampled_from([0.2, 0.5])))]
        height = nn.Sequential(*layers)(torch.zeros(shape)).shape[2]
        if height >= 3 and draw(st.booleans()):
            layers += [nn.AvgPool2d(2, draw(st.integers(1, 2)))]
        c = planes
    layers += [nn.Flatten()]
    features = nn.Sequential(*layers)(torch.zeros(shape)).shape[1]
    if draw(st.booleans()):
        layers += [linear(features, 5, draw(st.booleans())), nn.ReLU(), nn.Dropout(0.3)]
        features = 5
    return nn.Sequential(*layers, linear(features, 3, draw(st.booleans()))), shape[1:]


@st.composite
def windows_of(draw, timesteps):
    """None, or lengths of windows that add up to T."""
    if draw(st.booleans()):
        return None
    first = draw(st.integers(1, timesteps))
    return [first] + ([timesteps - first] if first < timesteps else [])


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.data())
def test_random_networks(data):
    """Every rule at once, on networks, chunks, windows and options that nobody chose."""
    net, shape = data.draw(networks())
    timesteps, seed = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 2**20))
    gradient = compare(
        prepare(net, seed),
        random_train((timesteps, data.draw(st.integers(1, 3)), *shape), seed),
        seed=seed,
        direct=data.draw(st.booleans()),
        chunk=data.draw(st.none() | st.integers(1, timesteps + 1)),
        windows=data.draw(windows_of(timesteps)),
        leak=data.draw(st.sampled_from([1.0, 0.9, 0.5])),
        kind=data.draw(st.sampled_from(sorted(stdb.SURROGATES))),
        alpha=data.draw(st.sampled_from([0.3, 1.0])),
        beta=data.draw(st.sampled_from([0.0, 0.05, 2.0])),
        over_threshold=data.draw(st.booleans()),
        temporal_gradient=data.draw(st.booleans()),
        learn=data.draw(st.sampled_from(LEARN)),
        initial=data.draw(st.sampled_from([0.0, 0.5, 0.875])),
    )
    assume(float(gradient.abs().max()) > 0)


class Branching(nn.Module):
    """Each operation takes the value before it, a sum or a concatenation an earlier one as well.

    Args:
        operations: (module, or ``sum`` or ``cat``; the earlier value's number).
        output: the last layer.
    """

    def __init__(self, operations, output):
        """Keep the modules where torch finds them."""
        super().__init__()
        self.layers = nn.ModuleList(o if isinstance(o, nn.Module) else None for o, _ in operations)
        self.steps, self.output = [(o, j) for o, j in operations], output

    def forward(self, x):
        """Images or signals to logits."""
        values = [x]
        for layer, (kind, other) in zip(self.layers, self.steps, strict=True):
            if kind == "sum":
                values.append(values[-1] + values[other])
            elif kind == "cat":
                values.append(torch.cat([values[other], values[-1]], 1))
            else:
                values.append(layer(values[-1]))
        return self.output(torch.flatten(values[-1], 1))


def convolutions(draw, shape, signal):
    """A convolution of any kind, or a transposed one."""
    channels, tiny = shape[1], min(shape[2:]) < 3
    bias, stride = draw(st.booleans()), draw(st.integers(1, 2))
    planes = draw(st.sampled_from([2, 4]))
    groups = 2 if channels % 2 == 0 and draw(st.booleans()) else 1
    if draw(st.booleans()):
        kind = nn.ConvTranspose1d if signal else nn.ConvTranspose2d
        padding, extra = draw(st.integers(0, 1)), draw(st.integers(0, stride - 1))
        return kind(channels, planes, 3, stride, padding, extra, groups, bias)
    kind = nn.Conv1d if signal else nn.Conv2d
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    if draw(st.booleans()):
        options = {"padding": "same", "dilation": draw(st.integers(1, 2))}
        size = draw(st.integers(1, 3))
        mode = "zeros" if mode == "reflect" else mode
    else:
        options, size = {"padding": 1, "stride": stride}, 3
    options |= {"groups": groups, "bias": bias, "padding_mode": "zeros" if tiny else mode}
    return kind(channels, planes, size, **options)


def linear_maps(draw, shape, signal):
    """What has no weights and takes a value of this shape."""
    size, up = min(shape[2:]), nn.Upsample(scale_factor=2)
    mode = "linear" if signal else "bilinear"
    found = [nn.Dropout(0.25), (nn.Dropout1d if signal else nn.Dropout2d)(0.25)]
    found += [(nn.ReplicationPad1d if signal else nn.ReplicationPad2d)(1), nn.Identity()]
    found += [(nn.AdaptiveAvgPool1d if signal else nn.AdaptiveAvgPool2d)(3)]
    if size >= 3:
        found += [(nn.AvgPool1d if signal else nn.AvgPool2d)(2, draw(st.integers(1, 2)))]
    if max(shape[2:]) <= 5:
        found += [up, nn.Upsample(scale_factor=1.5, mode=mode)]
    if not signal and shape[1] % 4 == 0:
        found += [nn.PixelShuffle(2)]
    if not signal and shape[2] % 2 == shape[3] % 2 == 0 and shape[1] <= 4:
        found += [nn.PixelUnshuffle(2)]
    return draw(st.sampled_from(found))


@st.composite
def branching(draw):
    """A network of branches, sums, concatenations, pools and the rest, of images or signals."""
    signal = draw(st.booleans())
    x = torch.zeros(
        2, draw(st.integers(1, 3)), *([7] if signal else draw(st.sampled_from([(4, 6), (5, 4)])))
    )
    first = x.shape[1:]
    operations, values, positive, hidden = [], [x], [False], set()

    def put(operation, other=0, is_positive=False):
        layer = operation if isinstance(operation, nn.Module) else None
        before, beside = values[-1], values[other]
        after = {"sum": lambda: before, "cat": lambda: torch.cat([beside, before], 1)}
        values.append(layer(before) if layer is not None else after[operation]())
        operations.append((operation, other))
        positive.append(is_positive)

    for step in range(draw(st.integers(2, 6))):
        shape = values[-1].shape
        known = [j for j in range(1, len(values) - 1) if j not in hidden]
        alike = [j for j in known if values[j].shape == shape]
        beside = [j for j in known if values[j].shape[2:] == shape[2:] and shape[1] <= 4]
        choice = draw(st.sampled_from(["conv", "conv", "map", "map", "sum", "cat"]))
        if choice == "sum" and alike:
            j = draw(st.sampled_from(alike))
            put("sum", j, positive[-1] and positive[j])
        elif choice == "cat" and beside:
            j = draw(st.sampled_from(beside))
            put("cat", j, positive[-1] and positive[j])
        elif choice == "map" and step > 0:
            put(linear_maps(draw, shape, signal), is_positive=positive[-1])
        elif choice == "conv" or step == 0:
            put(convolutions(draw, shape, signal))
            # not of spikes: two sums of them may be alike, and either the maximum
            wide = min(values[-1].shape[2:]) >= 3
            if wide and not any(positive) and draw(st.booleans()):
                hidden.add(len(values) - 1)
                put((nn.MaxPool1d if signal else nn.MaxPool2d)(2, draw(st.integers(1, 2))))
                hidden.add(len(values) - 1)
                put(nn.ReLU(), is_positive=True)
        if not positive[-1] and draw(st.booleans()):
            put(nn.ReLU(), is_positive=True)
    if not positive[-1]:
        put(nn.ReLU(), is_positive=True)
    features = values[-1][0].numel()
    return Branching(operations, linear(features, 3, draw(st.booleans()))), first


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_random_graphs(data):
    """Branches, sums, concatenations, and every operator between them; biases and U_0."""
    net, shape = data.draw(branching())
    timesteps, seed = data.draw(st.integers(2, 6)), data.draw(st.integers(0, 2**20))
    train = random_train((timesteps, data.draw(st.integers(1, 2)), *shape), seed)
    noise = torch.rand(train.shape, generator=torch.Generator().manual_seed(seed)).double()
    gradient = compare(
        prepare(net, seed),
        train + noise / 64,  # no two sums alike, of which a maximum may be either
        seed=seed,
        direct=data.draw(st.booleans()),
        chunk=data.draw(st.none() | st.integers(1, timesteps)),
        windows=data.draw(windows_of(timesteps)),
        leak=data.draw(st.sampled_from([1.0, 0.9])),
        kind=data.draw(st.sampled_from(sorted(stdb.SURROGATES))),
        learn=data.draw(st.sampled_from(LEARN)),
        initial=data.draw(st.sampled_from([0.0, 0.5])),
    )
    assume(float(gradient.abs().max()) > 0)


def small():
    """Two convolutions, a pooling, two linear layers, two dropouts, for 2×4×4 images."""
    net = nn.Sequential(
        conv(2, 3), nn.ReLU(), nn.Dropout(0.25), conv(3, 3, stride=2), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), linear(3, 6), nn.ReLU(), nn.Dropout(0.25), linear(6, 3),
    )  # fmt: skip
    return prepare(net, 1)


@pytest.mark.parametrize("learn", LEARN)
@pytest.mark.parametrize("temporal", [True, False], ids=["temporal", "instant"])
@pytest.mark.parametrize("over", [True, False], ids=["u_over_v", "u"])
@pytest.mark.parametrize("kind", sorted(stdb.SURROGATES))
def test_surrogates(kind, over, temporal, learn):
    """Each surrogate alone: over U and U/V, with and without leak path, V and λ learning."""
    gradient = compare(
        small(), random_train((7, 3, 2, 4, 4), 3), kind=kind, over_threshold=over, leak=0.75,
        temporal_gradient=temporal, learn=learn, chunk=3, beta=0.4,
    )  # fmt: skip
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("windows", [[7], [1, 6]])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "train"])
@pytest.mark.parametrize("learn", ["", "Vλ"])
@pytest.mark.parametrize("kind", sorted(stdb.SURROGATES))
def test_biases_and_initial_membranes(kind, learn, direct, windows):
    """A bias is a current at every step, also of the output; U_0 = f·V follows V."""
    torch.manual_seed(0)
    net = nn.Sequential(
        conv(2, 3, bias=True), nn.ReLU(), nn.Dropout(0.25), conv(3, 3, stride=2, bias=True),
        nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), linear(3, 6, bias=True), nn.ReLU(),
        linear(6, 3, bias=True),
    )  # fmt: skip
    gradient = compare(
        prepare(net, 1), random_train((7, 3, 2, 4, 4), 3), kind=kind, over_threshold=True,
        leak=0.75, learn=learn, chunk=3, beta=0.4, initial=0.5, direct=direct, windows=windows,
    )  # fmt: skip
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("chunk", [1, 3, 7])
@pytest.mark.parametrize("windows", [[7], [1, 4, 2]])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "train"])
@pytest.mark.parametrize("kind", sorted(stdb.SURROGATES))
def test_max_pooling(kind, direct, windows, chunk):
    """Of accumulated currents, in front of the neurons; overlapping and padded windows, too."""
    torch.manual_seed(0)
    net = nn.Sequential(
        conv(2, 3, bias=True), nn.MaxPool2d(3, 1, 1), nn.ReLU(), conv(3, 3), nn.MaxPool2d(2),
        nn.ReLU(), nn.Flatten(), linear(12, 6), nn.ReLU(), linear(6, 3),
    )  # fmt: skip
    gradient = compare(
        prepare(net, 2), random_train((7, 3, 2, 4, 4), 3), kind=kind,
        leak=0.75, chunk=chunk, beta=0.4, initial=0.5, direct=direct, windows=windows,
    )  # fmt: skip
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("windows", [[1] * 7, [2, 2, 3], [3, 4], [7]])
@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_truncated_windows_and_chunks(windows, chunk):
    """A chunk that ends inside a window, at its end, or is longer, changes nothing."""
    compare(small(), random_train((7, 3, 2, 4, 4), 3), windows=windows, chunk=chunk, leak=0.9)


class Branches(nn.Module):
    """A network of a user's own: residual additions, a skip to the output, view."""

    def __init__(self):
        """Set up the layers."""
        super().__init__()
        self.relu = nn.ReLU()  # before any weight, as people write it
        self.stem, self.branch, self.project = (
            conv(2, 4),
            conv(4, 4),
            conv(2, 4, kernel=1, padding=0),
        )
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(2))
        self.drop, self.pool = nn.Dropout(0.3), nn.AvgPool2d(2)
        self.hidden, self.out = linear(16, 16), linear(16, 3)

    def forward(self, x):
        """Images to logits."""
        a = self.relu(self.stem(x))
        b = self.relus[0](self.branch(self.drop(a)) + a + self.project(x))
        c = self.pool(b)
        c = c.view(c.size(0), -1)
        d = self.relus[1](self.hidden(c))
        return self.out(d + c)


class SkipToOutput(nn.Module):
    """A layer's spikes, its current, and the input itself reach neurons and the output layer."""

    def __init__(self):
        """Set up the layers."""
        super().__init__()
        self.first, self.second, self.third = linear(8, 6), linear(6, 6), linear(8, 3)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.out1, self.out2, self.out3 = linear(6, 3), linear(6, 3), linear(6, 3)

    def forward(self, x):
        """Images to logits."""
        x = torch.flatten(x, 1)
        current = self.first(x)
        a = self.relu1(current)
        b = self.relu2(self.second(a) + a)
        return self.out1(a) + self.out2(b + a) + self.out3(current) + self.third(x)


class SharedWeights(nn.Module):
    """The same convolution drives two layers of neurons."""

    def __init__(self):
        """Set up the layers."""
        super().__init__()
        self.conv, self.relu1, self.relu2 = conv(2, 2), nn.ReLU(), nn.ReLU()
        self.out = linear(8, 3)

    def forward(self, x):
        """Images to logits."""
        return self.out(torch.flatten(self.relu2(self.conv(self.relu1(self.conv(x)))), 1))


class ConstantBranches(nn.Module):
    """With direct input, one current that is constant over time meets another that is not."""

    def __init__(self):
        """Set up the layers."""
        super().__init__()
        self.stem, self.branch, self.project = conv(2, 2), conv(2, 2), conv(2, 2)
        self.relu1, self.relu2, self.out = nn.ReLU(), nn.ReLU(), linear(8, 3)

    def forward(self, x):
        """Images to logits."""
        current = self.stem(x)
        summed = self.branch(self.relu1(current)) + self.project(current)
        return self.out(torch.flatten(self.relu2(summed), 1))


class SharedBiases(nn.Module):
    """Two layers whose biases have the same gradient in a sum; one is called elsewhere, too."""

    def __init__(self):
        """Set up the layers."""
        super().__init__()
        self.stem, self.a, self.b = (conv(2, 2, bias=True) for _ in range(3))
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.out = linear(8, 3)

    def forward(self, x):
        """Images to logits."""
        x = self.relu1(self.stem(x))
        y = self.relu2(self.a(x) * 0.5)
        return self.out(torch.flatten(self.relu3(self.a(y) + self.b(y)), 1))


class NeuronsInARow(nn.Module):
    """Nothing but a flatten between the input and two layers; a sum of their spikes."""

    def __init__(self):
        """Set up the layers."""
        super().__init__()
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.first, self.out = linear(8, 8), linear(8, 3)

    def forward(self, x):
        """Images to logits."""
        a = self.relu1(torch.flatten(x, 1))
        b = self.relu2(torch.flatten(x, 1))
        return self.out(self.relu3(self.first(a + b)))


CUSTOM = [
    Branches, SkipToOutput, SharedWeights, SharedBiases, ConstantBranches, NeuronsInARow,
]  # fmt: skip


@pytest.mark.parametrize("direct", [False, True], ids=["spikes", "direct"])
@pytest.mark.parametrize("kind", ["stdb", "linear"])
@pytest.mark.parametrize("chunk", [1, 2, 6])
@pytest.mark.parametrize("network", CUSTOM, ids=lambda c: c.__name__)
def test_custom_modules(network, chunk, kind, direct):
    """A user's own forward: the graph is the one that forward computes."""
    size = 4 if network is Branches else 2
    gradient = compare(
        prepare(network(), 2), random_train((6, 3, 2, size, size), 5), direct=direct, chunk=chunk,
        kind=kind, leak=0.8, windows=[2, 4],
    )  # fmt: skip
    assert gradient.abs().max() > 0


def test_input_is_left_alone():
    """Neurons right behind the input do not write into it, forward or backward."""
    train = random_train((5, 2, 2, 2, 2), 0)
    kept = train.clone()
    snn = stdb.convert(prepare(NeuronsInARow(), 0), stdb.SpikeTrain(train), stdb.Linear())
    snn(torch.zeros(train.shape[1:], dtype=torch.float64), 5).sum().backward()
    assert torch.equal(train, kept)


@pytest.mark.parametrize("kind", sorted(stdb.SURROGATES))
def test_float32_agrees(kind):
    """Single precision gives the same spikes on representable weights, and gradients to 1e-4."""
    net = small()
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_((weight * 64).round() / 64)
    train, gradients, trains = random_train((40, 3, 2, 4, 4), 3), [], []
    for dtype in (torch.float32, torch.float64):
        snn = stdb.convert(
            net.to(dtype), stdb.SpikeTrain(train), stdb.SURROGATES[kind](0.3, 0.1), chunk=7
        ).eval()
        snn.set_thresholds(dict.fromkeys(snn.thresholds, 0.375))
        with stdb.record_spikes(snn, trains=True) as statistics:
            logits = snn(torch.zeros(train.shape[1:], dtype=dtype), 40)
        F.cross_entropy(logits, torch.arange(3)).backward()
        gradients.append([p.grad for p in snn.net.parameters() if p.requires_grad])
        trains.append([statistics.train(name).double() for name in snn.thresholds])
    for single, double in zip(*trains, strict=True):
        assert torch.equal(single, double)
        assert 0 < double.mean() < 1
    for single, double in zip(*gradients, strict=True):
        assert single.dtype == torch.float32
        close(single.double(), double, "gradient", 1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
@pytest.mark.parametrize("chunk", [1, 100, 4096])
def test_ages_over_thousands_of_steps(dtype, tolerance, chunk):
    """∂O/∂U is α·exp(−β·Δt) up to Δt = 4095: ages neither saturate, wrap nor underflow.

    One neuron fires at t = 1 only. Its other inputs have weight 0 and one spike each, so without
    the leak path the gradient of each weight is the surrogate's value at that spike's step.
    """
    ages = [0, 1, 7, 8, 103, 104, 127, 128, 255, 256, 1000, 2048, 4095]
    train = torch.zeros(4096, 1, 1 + len(ages), 1, 1, dtype=dtype)
    train[0, 0, 0] = 1
    for k, age in enumerate(ages, start=1):
        train[age, 0, k] = 1
    net = nn.Sequential(nn.Flatten(), linear(1 + len(ages), 1), nn.ReLU(), linear(1, 1)).to(dtype)
    snn = stdb.convert(
        net, stdb.SpikeTrain(train), stdb.STDB(0.3, 0.002), temporal_gradient=False, chunk=chunk
    )
    first, second = (p for p in snn.net.parameters() if p.requires_grad)
    with torch.no_grad():
        first.zero_()[0, 0] = 1.5
        second.fill_(0.5)
    snn(torch.zeros(train.shape[1:], dtype=dtype), 4096).sum().backward()
    assert float(second.grad) == 1  # one spike
    expected = torch.tensor([0.5 * 0.3 * math.exp(-0.002 * age) for age in ages])
    actual = first.grad[0, 1:].double()
    torch.testing.assert_close(actual, expected.double(), rtol=max(tolerance, 1e-7), atol=0)


def test_age_sum_over_thousands_of_steps():
    """With the leak path a weight sees the geometric series of all 4,096 ages, in any chunk."""
    train = torch.zeros(4096, 1, 1, 1, 1, dtype=torch.float64)
    train[0] = 1
    beta = 0.001
    expected = 0.3 * (1 - math.exp(-beta * 4096)) / (1 - math.exp(-beta))
    for chunk in (13, 512, 4096):
        net = nn.Sequential(nn.Flatten(), linear(1, 1), nn.ReLU(), linear(1, 1)).double()
        with torch.no_grad():
            net[1].weight.fill_(1.5)
            net[3].weight.fill_(1.0)
        snn = stdb.convert(net, stdb.SpikeTrain(train), stdb.STDB(0.3, beta), chunk=chunk)
        snn(torch.zeros(1, 1, 1, 1, dtype=torch.float64), 4096).sum().backward()
        assert float(snn.net[1].weight.grad) == pytest.approx(expected, rel=TOLERANCE)


class LearnedEncoder(nn.Module):
    """A convolution of the image that grows with t, by a number that is learned."""

    def __init__(self, constant=False):
        super().__init__()
        torch.manual_seed(3)
        self.mix, self.growth = (
            nn.Conv2d(2, 2, 1).double(),
            nn.Parameter(torch.tensor(0.1).double()),
        )
        self.unused, self.constant = nn.Parameter(torch.ones(3).double()), constant

    def forward(self, images, start, stop, keys):
        """(stop − start, B, C, H, W)."""
        current = self.mix(images) * (1 + self.growth)
        if self.constant:
            return current.expand(stop - start, *current.shape)
        t = torch.arange(start + 1, stop + 1, dtype=images.dtype)
        return current * (1 + self.growth * t).view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("of_images", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_an_encoder_learns(constant, of_images, frozen):
    """Its gradient is autograd's, in any chunk, whatever else learns; with no use of one, zero."""
    images = random_train((1, 3, 2, 4, 4), 5)[0] * 0.8
    encoder, ann = LearnedEncoder(constant), small().eval()
    literal = Literal(ann, dict.fromkeys(relus(ann), 0.3))
    pixels = images.clone().requires_grad_()
    (logits,) = literal.run(encoder(pixels, 0, 9, None))
    logits.square().sum().backward()
    expected = {name: p.grad for name, p in encoder.named_parameters()}
    for chunk in (2, 9):
        encoder.zero_grad()
        snn = stdb.convert(ann, encoder, stdb.STDB(0.3, 0.01), chunk=chunk)
        snn.set_thresholds(dict.fromkeys(snn.thresholds, 0.3))
        snn.net.requires_grad_(not frozen)
        given = images.clone().requires_grad_(of_images)
        snn(given, 9).square().sum().backward()
        assert {"encoder.mix.weight", "encoder.growth"} < dict(snn.named_parameters()).keys()
        for name in ("mix.weight", "mix.bias", "growth"):
            found = encoder.get_parameter(name).grad
            assert expected[name].abs().max() > 0
            torch.testing.assert_close(found, expected[name], rtol=TOLERANCE, atol=0)
        assert encoder.unused.grad.abs().max() == 0
        if of_images:
            torch.testing.assert_close(given.grad, pixels.grad, rtol=TOLERANCE, atol=1e-12)
        if not frozen:
            weight = literal.net[0].weight.grad
            torch.testing.assert_close(snn.net[0].weight.grad, weight, rtol=TOLERANCE, atol=1e-12)


def test_no_gradient_before_the_first_spike():
    """A neuron that stays below threshold gets none, under STDB, however close it comes."""
    net = nn.Sequential(OrderedDict(f=nn.Flatten(), a=linear(1, 1), r=nn.ReLU(), o=linear(1, 1)))
    with torch.no_grad():
        net.a.weight.fill_(0.25)
        net.o.weight.fill_(1.0)
    for steps, expected in ((4, 0.0), (5, 0.3 * 5)):  # U = 0.25·t crosses V = 1 at t = 5, not at 4
        snn = stdb.convert(net, stdb.DirectEncoder(), stdb.STDB(0.3, 0.0))
        snn(torch.ones(1, 1, 1, 1), steps).sum().backward()
        assert float(snn.net.a.weight.grad) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["stdb", "linear"])
def test_steps_without_gradient_first(kind):
    """After steps under no_grad STDB refuses, since it noted no ages; others have all they need."""
    snn = stdb.convert(small(), stdb.DirectEncoder(), stdb.SURROGATES[kind]())
    presentation = snn.present(torch.ones(1, 2, 4, 4, dtype=torch.float64))
    with torch.no_grad():
        snn(presentation, 3)
    if kind == "stdb":
        with pytest.raises(RuntimeError, match=r"first 3 steps .* without gradient"):
            snn(presentation, 3)
    else:
        assert snn(presentation, 3).requires_grad


def test_backward_twice_is_an_error():
    """The record of the steps is used up by the backward pass: a second one must not give zeros."""
    snn = stdb.convert(small(), stdb.DirectEncoder())
    logits = snn(torch.ones(1, 2, 4, 4, dtype=torch.float64), 3)
    logits.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already"):
        logits.sum().backward()


@pytest.mark.parametrize("kinds", [("stdb", "linear"), ("linear", "stdb")])
def test_a_surrogate_changed_before_backward(kinds):
    """What the other one needs was not kept."""
    first, then = (stdb.SURROGATES[kind]() for kind in kinds)
    snn = stdb.convert(small(), stdb.DirectEncoder(), first)
    logits = snn(torch.ones(1, 2, 4, 4, dtype=torch.float64), 3)
    for neuron in snn.neurons.values():
        neuron.surrogate = then
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        logits.sum().backward()


def test_weights_changed_before_backward():
    """An optimiser step between forward and backward is noticed, as in any torch network."""
    snn = stdb.convert(small(), stdb.DirectEncoder())
    logits = snn(torch.ones(1, 2, 4, 4, dtype=torch.float64), 3)
    with torch.no_grad():
        snn.net[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


def test_frozen_layers():
    """A frozen layer gets no gradient and does not change the others'."""
    train = random_train((5, 2, 2, 4, 4), 1)
    gradients = []
    for frozen in (False, True):
        snn = stdb.convert(small(), stdb.SpikeTrain(train)).eval()
        snn.set_thresholds(dict.fromkeys(snn.thresholds, 0.3))
        snn.net[3].weight.requires_grad_(not frozen)
        snn(torch.zeros(2, 2, 4, 4, dtype=torch.float64), 5).square().sum().backward()
        gradients.append({n: p.grad for n, p in snn.net.named_parameters()})
    assert gradients[0]["0.weight"].abs().max() > 0
    assert gradients[1]["3.weight"] is None
    for name in ("0.weight", "7.weight", "10.weight"):
        assert torch.equal(gradients[0][name], gradients[1][name])


def test_only_the_output_learns():
    """With the body frozen, the output layer's gradient is unchanged."""
    train = random_train((5, 2, 2, 4, 4), 1)
    gradients = []
    for frozen in (False, True):
        snn = stdb.convert(small(), stdb.SpikeTrain(train)).eval()
        snn.set_thresholds(dict.fromkeys(snn.thresholds, 0.3))
        if frozen:
            snn.requires_grad_(False)
            snn.net[10].weight.requires_grad_(True)
        snn(torch.zeros(2, 2, 4, 4, dtype=torch.float64), 5).square().sum().backward()
        gradients.append(snn.net[10].weight.grad)
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_learned_thresholds_and_leaks_stay_where_they_have_a_meaning():
    """However large the step: V above 0, λ in (0, 1]; what does not learn is left alone."""
    ann = nn.Sequential(
        nn.Flatten(), linear(4, 5), nn.ReLU(), linear(5, 5), nn.ReLU(), linear(5, 2)
    )
    snn = stdb.convert(ann, stdb.PoissonEncoder(0), learn_thresholds=True, learn_leaks=True)
    snn.set_thresholds(dict.fromkeys(snn.thresholds, 2.0))
    first, second = snn.neurons.values()
    with torch.no_grad():
        first.threshold.fill_(-3.0), second.threshold.fill_(0.5)
        first.leak.fill_(1.5), second.leak.fill_(-0.1)
    snn.constrain()
    assert (first.threshold.item(), second.threshold.item()) == (pytest.approx(0.02), 0.5)
    assert (first.leak.item(), second.leak.item()) == (1.0, pytest.approx(0.01))
    snn(torch.rand(2, 1, 2, 2), 3).sum().backward()  # presents without complaint
    for neuron in snn.neurons.values():
        neuron.threshold.requires_grad_(False)
    with torch.no_grad():
        first.threshold.fill_(1e-9)
    snn.constrain()
    assert first.threshold.item() == pytest.approx(1e-9)


@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_have_the_memory_layout_of_their_weights(channels):
    """Otherwise DDP and fused optimisers copy them, and DDP warns."""
    torch.manual_seed(0)
    ann = stdb.build("vgg5", channels, 8, 4, width=0.1, hidden=8, dropout=0.0)
    snn = stdb.convert(ann, stdb.PoissonEncoder(0), stdb.STDB(0.3, 0.01))
    images = torch.rand(5, channels, 8, 8) * 2 - 1
    stdb.balance_thresholds(snn, images, 5, percentile=90)
    snn(images, 4).square().sum().backward()
    for name, parameter in snn.net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.stride() == parameter.stride(), name
