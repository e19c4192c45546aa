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
    return F.pad(y.clamp(min=0) * 2 - 1, (0, 1)).transpose(2, 3).transpose(2, 3)


FORMS = {
    "functional convolution": lambda m, x: F.relu(
        F.conv2d(F.relu(x), m.second.weight, m.second.bias, 1, 1)
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
}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.replace(" ", "-"))
def test_what_an_operation_becomes_computes_the_same(form, tmp_path):
    """As an ANN to rounding; as an SNN in the limit; and again from its file."""
    net = Custom(FORMS[form])
    net(IMAGES.float())
    trained(net)
    with torch.no_grad():
        expected = net(IMAGES)
    snn = stdb.convert(net, stdb.DirectEncoder(), example=IMAGES)
    assert off(as_ann(snn, IMAGES), expected) < 1e-12
    for neuron in snn.neurons.values():
        neuron.initial_membrane = 0.5
    stdb.balance_thresholds(snn, IMAGES, 32)
    errors = []
    for steps in (16, 400):
        with torch.no_grad():
            errors.append(off(snn(IMAGES, steps) / steps, expected))
    assert errors[1] < 0.03
    assert errors[1] < errors[0] / 3 or errors[1] < 2e-3
    with torch.no_grad():
        assert torch.equal(net(IMAGES), expected)
    stdb.save(snn, tmp_path / "snn", timesteps=16, classes=list("abcde"))
    again, _ = stdb.load(tmp_path / "snn")
    with torch.no_grad():
        assert torch.equal(again(IMAGES, 5), snn(IMAGES, 5))


def test_scaled_thresholds_scale_the_weights_above():
    """With biases V alone would be wrong; and a second calibration gives what the first gave."""
    net = Custom(FORMS["shortcut"])
    net(IMAGES.float())
    trained(net)
    snn = stdb.convert(net, stdb.DirectEncoder(), example=IMAGES)
    first = stdb.balance_thresholds(snn, IMAGES, 32)
    with torch.no_grad():
        kept, expected = snn(IMAGES, 20), net(IMAGES)
        snn.scale_thresholds(0.8)
        assert off(snn(IMAGES, 800) / 800, expected) < 0.2
        snn.scale_thresholds(1.0)
        torch.testing.assert_close(snn(IMAGES, 20), kept)
    again = stdb.balance_thresholds(snn, IMAGES, 32)
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
    "leaky": (lambda m, x: F.leaky_relu(x), "calls leaky_relu, which has no spiking form"),
    "reflection": (lambda m, x: F.pad(m.relu(x), (1, 1, 1, 1), "reflect"), "pads with other"),
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
LARGE = ["vgg11", "vgg16_bn", "resnet50", "resnext50_32x4d", "densenet121", "googlenet"]


@pytest.mark.parametrize(
    "name", [*SMALL, *(pytest.param(n, marks=pytest.mark.slow) for n in LARGE)]
)
def test_torchvisions_networks_convert(name):
    """With their own code, random weights and statistics."""
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    torch.manual_seed(0)
    net = trained(getattr(torchvision.models, name)(weights=None, **options))
    images = torch.rand(1, 3, 64, 64).double()
    snn = stdb.convert(net, stdb.DirectEncoder(), example=images)
    with torch.no_grad():
        assert off(as_ann(snn, images), net(images)) < 1e-9


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenet_v3_small", "regnet_y_400mf"])
def test_others_are_refused_with_all_places(name):
    """SiLU, hard-swish, gates."""
    net = getattr(torchvision.models, name)(weights=None)
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
