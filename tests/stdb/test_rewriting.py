"""Any CNN in: what its operations become computes what it computes, exactly, and then spikes."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import prune

import stdb

IMAGES = torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
SIGNALS = IMAGES[..., 0].repeat(1, 1, 2)[..., :21]


@torch.no_grad()
def trained(net):
    """With the statistics and biases of a network that has learned something, in float64."""
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return net.double().eval()


@torch.no_grad()
def as_ann(snn, images):
    """The graph with the ANN's activations in the place of the neurons."""
    values = {0: images}
    for i, node in enumerate(snn.graph.nodes[1:], start=1):
        below = [values[j] for j in node.inputs]
        if node.operator.fires:
            values[i] = below[0].clamp(min=0, max=snn.module(i).bound)
        else:
            values[i] = node.operator.plain(snn.module(i), *below)
    return values[len(snn.graph.nodes) - 1]


def off(actual, expected):
    """The largest deviation, by the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max())


class Custom(nn.Module):
    """A convolution → a function of (module, x) → average → linear."""

    def __init__(self, middle):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.relu, self.pool, self.drop = nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.3)
        self.relu6, self.grouped = nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=4, padding=1)
        self.lines, self.up = nn.Linear(12, 12), nn.ConvTranspose2d(8, 6, 3, 2, 1, bias=False)
        self.up2 = nn.ConvTranspose2d(8, 8, (2, 3), (2, 1), (0, 1), (1, 0), groups=4)
        self.up2.dilation = (2, 2)
        self.even = nn.Conv2d(8, 8, (4, 3), padding="same", dilation=(1, 2))
        self.reflecting = nn.Conv2d(8, 8, 3, padding=(1, 2), padding_mode="reflect")
        self.circular = nn.Conv2d(8, 8, 3, padding="same", padding_mode="circular", bias=False)
        self.nearest, self.bilinear = nn.Upsample(scale_factor=2), nn.UpsamplingBilinear2d((17, 7))
        self.norm6, self.channels = nn.BatchNorm2d(6), nn.Dropout2d(0.4)
        self.replicated, self.zeros = nn.ReplicationPad2d((1, 0, 2, 1)), nn.ZeroPad2d((0, -1, 3, 0))
        self.shuffled, self.unshuffled = nn.PixelShuffle(2), nn.PixelUnshuffle(3)
        self.middle, self.output = middle, nn.LazyLinear(5)

    def forward(self, x):
        return self.output(torch.flatten(self.middle(self, self.first(x)), 1))


class CustomSignals(nn.Module):
    """The same of signals."""

    def __init__(self, middle):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 8, 4, 2, dilation=2)
        self.same = nn.Conv1d(8, 6, 4, padding="same", groups=2, bias=False)
        self.up = nn.ConvTranspose1d(8, 6, 3, 2, 1, 1, groups=2)
        self.norm, self.norm6 = nn.BatchNorm1d(8), nn.BatchNorm1d(6)
        self.relu, self.pool, self.average = nn.ReLU(), nn.MaxPool1d(3, 2, 1), nn.AvgPool1d(3, 2)
        self.adaptive, self.drop = nn.AdaptiveAvgPool1d(4), nn.Dropout1d(0.3)
        self.middle, self.output = middle, nn.LazyLinear(5)

    def forward(self, x):
        return self.output(torch.flatten(self.middle(self, self.first(x)), 1))


def shuffle(x, groups):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


@dataclass
class Pair:
    """What torch.fx cannot look into."""

    one: torch.Tensor
    other: torch.Tensor


def followed_by_export_alone(m, x):
    """A check of the type, which a traced value fails; then norms, pooling, slices, a concat."""
    assert isinstance(x, torch.Tensor)
    pair = Pair(F.relu_(m.norm(x)), m.pool(m.relu(m.norm2(m.second(m.relu6(x))))))
    a, b = F.adaptive_avg_pool2d(pair.one, 6).chunk(2, 1)
    y = torch.cat([b[:, :, ::2, 1::2], a[:, 1:, :3, 3:], pair.other[:, 2:5, ::2, ::2]], 1)
    y = F.pad(y.clamp(min=0) * 2 - 1, (0, 1)).transpose(2, 3).transpose(2, 3)
    y = F.interpolate(F.interpolate(y, scale_factor=2.0), size=(5, 7), mode="bilinear")
    return F.pixel_shuffle(y[:, :4], 2)


FORMS = {
    "functional convolution": lambda m, x: F.relu(
        F.conv2d(F.relu(x), m.second.weight, m.second.bias, 1, 1)
    ),
    "convolution of a module and of a function": lambda m, x: F.relu(
        F.conv2d(F.relu(m.second(x)), m.second.weight, padding=1)
    ),
    "functional convolution with same padding": lambda m, x: F.relu(
        F.conv2d(F.relu(x), m.grouped.weight, m.grouped.bias, padding="same", groups=4)
    ),
    "functional transposed convolution": lambda m, x: F.relu(
        F.conv_transpose2d(F.relu(x), m.up2.weight, m.up2.bias, (2, 1), (0, 1), (1, 0), 4, (2, 2))
    ),
    "functional transposed convolution by keyword": lambda m, x: m.norm6(
        torch.conv_transpose2d(
            weight=m.up.weight, input=F.relu(x), dilation=2, padding=1, output_padding=1, stride=3
        )
    ).relu(),
    "exported transposed convolution": lambda m, x: (
        isinstance(x, torch.Tensor) or Pair(x, x).missing,
        F.conv_transpose2d(m.relu(x), m.up2.weight, None, 2, 0, 1, 4),
    )[1],
    "another layer's bias": lambda m, x: F.relu(
        F.conv2d(F.relu(x), m.second.weight, m.first.bias, padding=1)
    ),
    "functional norm": lambda m, x: F.relu(
        F.batch_norm(
            F.conv2d(F.relu(x), m.second.weight, stride=2),
            m.norm.running_mean,
            m.norm.running_var,
            m.norm.weight,
            m.norm.bias,
        )
    ),
    "norm of a relu": lambda m, x: m.relu(
        m.second(
            torch.batch_norm(
                F.relu(x),
                None,
                m.norm.bias,
                m.norm.running_mean,
                m.norm.running_var,
                False,
                0.1,
                1e-3,
                False,
            )
        )
    ),
    "exported": followed_by_export_alone,
    "functional relu": lambda m, x: F.relu(x),
    "method": lambda m, x: x.relu(),
    "one relu for all": lambda m, x: m.relu(m.second(m.relu(x))),
    "relu twice": lambda m, x: m.relu(m.relu(x)),
    "folded norm": lambda m, x: m.relu(m.norm(x)),
    "two norms": lambda m, x: m.relu(m.norm2(m.second(m.relu(m.norm(x))))),
    "norm behind a relu": lambda m, x: m.relu(m.second(m.norm(m.relu(x)))),
    "norm of what others read": lambda m, x: m.relu(m.norm(x) + x),
    "layer called twice": lambda m, x: m.relu(m.norm(m.second(m.relu(m.second(m.relu(x)))))),
    "shortcut": lambda m, x: (lambda y: m.relu(m.norm(m.second(y)) + y))(m.relu(x)),
    "difference": lambda m, x: (lambda y: m.relu(m.second(y) - y))(m.relu(x)),
    "concat": lambda m, x: (lambda y: torch.cat([y, m.relu(m.second(y))], 1))(m.relu(x)),
    "relu of a concat": lambda m, x: F.relu(torch.cat([x, m.second(m.relu(x))], 1)),
    "max pooling": lambda m, x: m.pool(m.relu(x)),
    "pooling first": lambda m, x: m.relu(m.pool(x)),
    "functional pooling": lambda m, x: F.max_pool2d(F.relu(x), 3, 2, 1),
    "read twice": lambda m, x: (lambda y: m.pool(m.second(y).relu()) + m.pool(y))(m.relu(x)),
    "pooling of a concat": lambda m, x: (lambda y: m.pool(torch.cat([y, F.relu(m.second(y))], 1)))(
        m.relu(x)
    ),
    "pooling of a dropout": lambda m, x: m.pool(m.drop(m.relu(x))),
    "pooling of an average": lambda m, x: m.pool(F.avg_pool2d(m.relu(x), 2)),
    "pooling twice": lambda m, x: m.pool(m.pool(m.relu(x))),
    "average": lambda m, x: F.avg_pool2d(m.relu(x), 3, 2, 1),
    "adaptive": lambda m, x: F.adaptive_avg_pool2d(m.relu(x), (5, 3)),
    "mean": lambda m, x: m.relu(x).mean((2, 3)),
    "mean, kept": lambda m, x: m.relu(x).mean((2, 3), keepdim=True),
    "dropout": lambda m, x: F.dropout(m.relu(x), 0.2, m.training),
    "relu6": lambda m, x: m.relu6(3 * x),
    "clamp": lambda m, x: torch.clamp(x, 0, 0.5),
    "clamp below": lambda m, x: x.clamp(min=0),
    "hardtanh": lambda m, x: F.hardtanh(x, 0.0, 0.7),
    "pooled relu6": lambda m, x: m.pool(m.relu6(5 * x)),
    "strided slice": lambda m, x: m.relu(x)[:, :, ::2, 1::2],
    "option A": lambda m, x: F.pad(m.relu(x)[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)),
    "padding": lambda m, x: F.pad(m.relu(x), (1, 2, 0, 1)),
    "crop": lambda m, x: m.relu(x)[..., 1:-1, 2:7],
    "chunk": lambda m, x: (lambda a, b: torch.cat([b, F.relu(a - b)], 1))(*m.relu(x).chunk(2, 1)),
    "split": lambda m, x: m.relu(x).split([3, 5], 1)[1],
    "channel slice": lambda m, x: m.relu(x)[:, 1:6],
    "channel shuffle": lambda m, x: shuffle(m.relu(x), 2),
    "grouped": lambda m, x: m.relu(m.grouped(shuffle(m.relu(x), 4))),
    "constants": lambda m, x: m.relu(1 - (m.relu(x) * 2 + 0.25) / 4),
    "transposed": lambda m, x: m.relu(m.norm6(m.up(m.relu(x)))),
    "transposed in groups": lambda m, x: m.relu(m.norm(m.up2(m.relu(x)))),
    "transposed concat": lambda m, x: m.up(
        torch.cat([m.relu(x)[:, :5], m.relu(m.second(x))], 1)[:, 2:10]
    ),
    "same padding": lambda m, x: m.relu(m.norm(m.even(m.relu(x)))),
    "reflected": lambda m, x: m.relu(m.norm(m.reflecting(m.relu(x)))),
    "circular twice": lambda m, x: m.relu(m.circular(m.relu(m.circular(m.relu(x))))),
    "padding layers": lambda m, x: m.zeros(m.replicated(m.relu(x))),
    "reflection": lambda m, x: F.pad(m.relu(x), (1, 2, 0, 1), "reflect"),
    "nearest": lambda m, x: m.relu(m.second(m.nearest(m.relu(x)))),
    "bilinear": lambda m, x: m.relu(m.second(m.bilinear(m.relu(x)))),
    "interpolated": lambda m, x: F.interpolate(m.relu(x), x.shape[2] + 5, mode="bilinear"),
    "interpolated like": lambda m, x: (lambda y: y + F.interpolate(m.pool(y), size=y.shape[2:]))(
        m.relu(x)
    ),
    "smaller": lambda m, x: F.interpolate(m.relu(x), scale_factor=0.4, mode="nearest-exact"),
    "area": lambda m, x: F.interpolate(m.relu(x), size=(5, 7), mode="area"),
    "pixel shuffle": lambda m, x: m.shuffled(m.relu(x)),
    "pixel shuffle of a concat": lambda m, x: F.pixel_shuffle(
        torch.cat([m.relu(x), m.relu(m.second(x))], 1)[:, 2:14], 2
    ),
    "pixel unshuffle": lambda m, x: m.unshuffled(torch.cat([m.relu(x), m.relu(m.second(x))], 1)),
    "unshuffled": lambda m, x: F.pixel_unshuffle(m.relu(x), 2),
    "channel dropout": lambda m, x: F.dropout2d(m.channels(m.relu(x)), 0.2, m.training),
    "zeros for channels": lambda m, x: m.relu(m.norm(F.pad(m.relu(x[:, 2:6]), (0, 0, 0, 0, 1, 3)))),
    "slice of a flat concat": lambda m, x: torch.cat(
        [m.relu(x).flatten(1), m.relu(m.second(x)).flatten(1)], 1
    )[:, 1000:1500],
}
OF_SIGNALS = {
    "convolutions": lambda m, x: m.relu(m.norm(m.second(m.relu(m.norm(x))))),
    "same padding": lambda m, x: m.relu(m.norm6(m.same(m.relu(x)))),
    "transposed": lambda m, x: m.relu(m.norm6(m.up(m.relu(x)))),
    "functional transposed": lambda m, x: F.conv_transpose1d(
        m.relu(x), m.up.weight, m.up.bias, 2, groups=2, dilation=3
    ),
    "max pooling": lambda m, x: m.pool(m.relu(x)),
    "functional max pooling": lambda m, x: F.max_pool1d(m.relu(x), 2, ceil_mode=True),
    "average": lambda m, x: m.average(m.relu(x)),
    "functional average": lambda m, x: F.avg_pool1d(m.relu(x), 4, 3, 2, count_include_pad=False),
    "adaptive": lambda m, x: m.adaptive(m.relu(x)),
    "functional adaptive": lambda m, x: F.adaptive_avg_pool1d(m.relu(x), 5),
    "mean": lambda m, x: m.relu(x).mean(-1),
    "mean, kept": lambda m, x: m.relu(x).mean(2, keepdim=True),
    "channel dropout": lambda m, x: m.drop(m.relu(x)),
    "concat": lambda m, x: m.up(torch.cat([m.relu(x)[:, 3:], F.relu(m.norm(x))[:, :3]], 1)),
    "norm": lambda m, x: m.relu(m.norm(m.relu(x) + x)),
    "linear": lambda m, x: F.interpolate(m.relu(x), scale_factor=2, mode="linear"),
    "padding": lambda m, x: F.pad(m.relu(x), (2, 3), "replicate"),
    "crop": lambda m, x: m.relu(x)[:, ::2, 3:],
    "layer called twice": lambda m, x: m.relu(m.second(m.relu(m.second(m.relu(5 * x))))),
}
CASES = [
    *((Custom, form, IMAGES) for form in FORMS.items()),
    *((CustomSignals, form, SIGNALS) for form in OF_SIGNALS.items()),
]


@pytest.mark.parametrize(
    ("custom", "form", "images"),
    CASES,
    ids=[f"{'signals-' * (c is CustomSignals)}{f[0].replace(' ', '-')}" for c, f, _ in CASES],
)
def test_what_an_operation_becomes_computes_the_same(custom, form, images, tmp_path):
    """As an ANN to rounding; as an SNN in the limit; and again from its file."""
    net = custom(form[1])
    net(images.float())
    trained(net)
    with torch.no_grad():
        expected = net(images)
    snn = stdb.convert(net, stdb.DirectEncoder(), example=images)
    assert off(as_ann(snn, images), expected) < 1e-12
    for neuron in snn.neurons.values():
        neuron.initial_membrane = 0.5
    stdb.balance_thresholds(snn, images, 32, method="maximum")
    errors = []
    for steps in (16, 400):
        with torch.no_grad():
            errors.append(off(snn(images, steps) / steps, expected))
    assert errors[1] < 0.03
    assert errors[1] < errors[0] / 3 or errors[1] < 2e-3
    with torch.no_grad():
        assert torch.equal(net(images), expected)
    stdb.save(snn, tmp_path / "snn", timesteps=16, classes=list("abcde"))
    again, _ = stdb.load(tmp_path / "snn")
    with torch.no_grad():
        assert torch.equal(again(images, 5), snn(images, 5))


def test_scaled_thresholds_scale_the_weights_above():
    """With biases V alone would be wrong; and a second calibration gives what the first gave."""
    net = Custom(FORMS["shortcut"])
    net(IMAGES.float())
    trained(net)
    snn = stdb.convert(net, stdb.DirectEncoder(), example=IMAGES)
    first = stdb.balance_thresholds(snn, IMAGES, 32, method="maximum")
    with torch.no_grad():
        kept, expected = snn(IMAGES, 20), net(IMAGES)
        snn.scale_thresholds(0.8)
        assert off(snn(IMAGES, 800) / 800, expected) < 0.2
        snn.scale_thresholds(1.0)
        torch.testing.assert_close(snn(IMAGES, 20), kept)
    again = stdb.balance_thresholds(snn, IMAGES, 32, method="maximum")
    assert again == pytest.approx(first)


def test_a_mask_stays_where_a_norm_is_folded():
    """What is pruned is zero afterwards as well."""
    net = Custom(FORMS["folded norm"])
    net(IMAGES.float())
    trained(net)
    prune.l1_unstructured(net.first, "weight", 0.5)
    snn = stdb.convert(net, stdb.DirectEncoder(), example=IMAGES)
    assert off(as_ann(snn, IMAGES), net(IMAGES).detach()) < 1e-12
    assert ((snn.net.first.weight == 0) == (net.first.weight_mask == 0)).all()


class Statistics(Custom):
    def __init__(self):
        super().__init__(lambda m, x: m.relu(m.norm(x)))
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)


REFUSED = {
    "max pooling of what can be negative": (
        lambda m, x: m.pool(m.second(m.relu(x))) + 0,
        "takes the maximum of what can be negative; allowed: of a ReLU's values",
    ),
    "lower bound": (lambda m, x: F.hardtanh(x), "has the lower bound -1.0; allowed: 0, as a rate"),
    "clamp": (lambda m, x: x.clamp(-1, 1), "has the lower bound -1; allowed: 0"),
    "softmax inside": (lambda m, x: F.softmax(m.relu(x), 1), "is a softmax inside; leave it out"),
    "product": (lambda m, x: m.relu(x) * m.relu(m.second(x)), "multiplies values with each other"),
    "leaky": (lambda m, x: F.leaky_relu(x), "calls leaky_relu, .*use nn.ReLU and train again"),
    "padding with ones": (
        lambda m, x: F.pad(m.relu(x), (1, 1, 1, 1), value=1.0),
        r"pads with 1.0; allowed: zeros, or copies \(reflect",
    ),
    "cubic": (
        lambda m, x: F.interpolate(m.relu(x), scale_factor=2, mode="bicubic"),
        "interpolates with mode='bicubic'; allowed: nearest, .*bilinear",
    ),
    "antialias": (
        lambda m, x: F.interpolate(m.relu(x), size=4, mode="bilinear", antialias=True),
        "has antialias=True; allowed: without it",
    ),
    "product of rows": (
        lambda m, x: m.lines(m.relu(x)),
        r"layer lines is a Linear that is given \(B, 8, 12, 12\); allowed: a flat value",
    ),
    "size of the output": (
        lambda m, x: m.up(m.relu(x), (24, 24)),
        "layer up is called with more than a value; allowed: output_padding in the place",
    ),
    "transposition": (
        lambda m, x: m.relu(m.second(m.relu(x).transpose(2, 3))),
        "transpose .*makes",
    ),
    "computed weights": (
        lambda m, x: F.relu(F.conv2d(x, m.second.weight - m.second.weight.mean())),
        "second.weight is a parameter used outside a layer",
    ),
    "norm of the batch": (
        lambda m, x: F.relu(F.batch_norm(x, None, None, training=True)),
        "normalises by the batch, which a spike does not know",
    ),
    "one image": (lambda m, x: m.relu(x)[:1].expand_as(x), "picks .*; allowed: slices behind"),
    "joined images": (
        lambda m, x: torch.cat([m.relu(x)[:, :4], m.relu(x)[:, 4:]], 2),
        "joins along dimension 2; allowed: the channels",
    ),
}


@pytest.mark.parametrize("form", REFUSED, ids=lambda form: form.replace(" ", "-"))
def test_what_has_no_spiking_form_is_refused(form):
    """With the place and the remedy."""
    middle, message = REFUSED[form]
    net = Custom(middle)
    net(IMAGES.float())
    with pytest.raises(stdb.ConversionError, match=message):
        stdb.convert(net.double(), stdb.DirectEncoder(), example=IMAGES)


def test_a_norm_without_running_statistics_is_refused():
    """It normalises by the batch, which a spike does not know."""
    net = Statistics()
    net(IMAGES.float())
    with pytest.raises(stdb.ConversionError, match="norm keeps no running statistics; train it"):
        stdb.convert(net.double(), stdb.DirectEncoder(), example=IMAGES)


SMALL = ["resnet18", "squeezenet1_1", "mobilenet_v2", "shufflenet_v2_x0_5", "mnasnet0_5", "alexnet"]


@pytest.mark.parametrize("name", SMALL)
def test_torchvisions_networks_convert(name):
    """With their own code, random weights and statistics; the large ones are in test_units.py."""
    torch.manual_seed(0)
    net = trained(getattr(torchvision.models, name)(weights=None))
    images = torch.rand(1, 3, 64, 64).double()
    snn = stdb.convert(net, stdb.DirectEncoder(), example=images)
    with torch.no_grad():
        assert off(as_ann(snn, images), net(images)) < 1e-9


OTHERS = {
    name: lambda name=name: getattr(torchvision.models, name)(weights=None)
    for name in ("efficientnet_b0", "mobilenet_v3_small", "regnet_y_400mf", "swin_v2_t")
}
OTHERS["vit of 24 blocks"] = lambda: torchvision.models.VisionTransformer(64, 16, 24, 2, 32, 64)


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_refused_with_all_places(name):
    """SiLU, hard-swish, gates, attention; however deep."""
    net = OTHERS[name]()
    with pytest.raises(stdb.ConversionError, match=r"^\d+ places have no spiking form:"):
        stdb.convert(net, stdb.DirectEncoder(), example=torch.zeros(1, 3, 64, 64))


def test_a_head_with_a_bias_brings_no_units():
    """A network without biases keeps its weights, whatever head it is given, also from its file."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(432, 9, bias=False), nn.ReLU(), nn.Linear(9, 5, bias=False)
    ).double()
    snn = stdb.convert(net, stdb.DirectEncoder())
    stdb.balance_thresholds(snn, IMAGES, 20)
    snn.net[3] = nn.Linear(9, 5).double()
    kept = snn.net[3].weight.clone()
    snn.scale_thresholds(0.5)
    assert torch.equal(snn.net[3].weight, kept)


def test_a_convolution_with_a_bias_may_be_the_output():
    """Its bias counts once for every step, also where dense products have it inside."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).double()
    nn.init.constant_(net[2].bias, 2.0)
    snn = stdb.convert(net, stdb.DirectEncoder(), example=IMAGES)
    stdb.balance_thresholds(snn, IMAGES, 32, method="maximum")
    with torch.no_grad():
        assert off(snn(IMAGES, 400) / 400, net(IMAGES)) < 0.03
