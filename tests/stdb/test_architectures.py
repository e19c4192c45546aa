"""The paper's architectures: layers, shapes and sizes, spelt out by hand."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import stdb

CONVOLUTIONS = {
    "vgg5": [64, 128, 128],
    "vgg9": [64, 128, 256, 256, 512, 512, 512],
    "vgg11": [64, 128, 256, 256, 512, 512, 512, 512, 512],
    "vgg11_ann": [64, 128, 256, 512, 512, 512, 512, 512],
    "vgg13": [64, 64, 128, 128, 256, 256, 512, 512, 512, 512],
    "vgg16": [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512],
    "vgg19": [64, 64, 128, 128, *[256] * 4, *[512] * 8],
}
POOLED_AFTER = {  # which convolutions, counted from 1, a pooling follows
    "vgg5": [1, 3],
    "vgg9": [1, 3, 5, 6],
    "vgg11": [1, 4, 7],
    "vgg11_ann": [1, 3, 5, 6],
    "vgg13": [2, 4, 6, 9],
    "vgg16": [2, 4, 7, 10],
    "vgg19": [2, 4, 8, 12],
}
FEATURES = {  # inputs of the first linear layer for a 32×32 image
    "vgg5": 128 * 8 * 8,
    "vgg9": 512 * 2 * 2,
    "vgg11": 512 * 4 * 4,
    "vgg11_ann": 512 * 2 * 2,
    "vgg13": 512 * 2 * 2,
    "vgg16": 512 * 2 * 2,
    "vgg19": 512 * 2 * 2,
    "resnet8": 128 * 8 * 8,
    "resnet12": 512 * 2 * 2,
    "resnet20": 512 * 2 * 2,
    "resnet34": 512 * 2 * 2,
    "resnet34_snn": 512 * 2 * 2,
}
BLOCKS = {  # (planes, stride) of every basic block
    "resnet8": [(64, 1), (128, 2)],
    "resnet12": [(64, 1), (128, 2), (256, 2), (512, 2)],
    "resnet20": [(64, 1)] * 2 + [(128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)],
    "resnet34": [(64, 1)] * 3
    + [(128, 2), *[(128, 1)] * 3]
    + [(256, 2), *[(256, 1)] * 4]
    + [(512, 2), *[(512, 1)] * 2],
}
BLOCKS["resnet34_snn"] = [*BLOCKS["resnet34"][:12], (256, 1), *BLOCKS["resnet34"][12:]]
NAMES = [*CONVOLUTIONS, *BLOCKS]


def weights(network):
    """How many there are."""
    return sum(parameter.numel() for parameter in network.parameters())


def on_meta(*arguments, **options):
    """Build without memory: shapes only."""
    with torch.device("meta"):
        return stdb.build(*arguments, **options)


def of_type(network, kind):
    """All modules of a type, in order."""
    return [module for module in network.modules() if isinstance(module, kind)]


def run_order(network):
    """The top level as letters: Convolution, Relu, Dropout, Pooling, Flatten, Linear, Block."""
    letters = {
        nn.Conv2d: "C", nn.ReLU: "R", nn.Dropout: "D", nn.AvgPool2d: "P", nn.Flatten: "F",
        nn.Linear: "L", stdb.ResidualBlock: "B",
    }  # fmt: skip
    return "".join(letters[type(module)] for module in network)


def test_names():
    """The paper's ten, two of the authors' code, three more; a clear answer to any other name."""
    assert sorted(stdb.ARCHITECTURES) == sorted([*NAMES, "resnet9", "resnet11", "resnet18"])
    with pytest.raises(ValueError, match=r"unknown architecture 'vgg7'.*vgg5.*resnet34"):
        stdb.build("vgg7")


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_vgg_layers(name):
    """Channels, places of the poolings (instead of a dropout), the 4096–4096–classes classifier."""
    network = on_meta(name, num_classes=100)
    convolutions = of_type(network, nn.Conv2d)
    inputs = [3, *CONVOLUTIONS[name]]
    shapes = [(o, i, 3, 3) for i, o in pairwise(inputs)]
    assert [tuple(c.weight.shape) for c in convolutions] == shapes
    linears = [(4096, FEATURES[name]), (4096, 4096), (100, 4096)]
    assert [tuple(m.weight.shape) for m in of_type(network, nn.Linear)] == linears
    features = ["CRP" if k in POOLED_AFTER[name] else "CRD" for k in range(1, len(inputs))]
    assert run_order(network) == "".join(features) + "F" + "LRD" * 2 + "L"


@pytest.mark.parametrize("name", BLOCKS)
def test_resnet_layers(name):
    """Three pre-processing convolutions, a pooling, the groups' blocks, one linear layer."""
    network = on_meta(name, num_classes=100)
    assert run_order(network) == "CRDCRDCRP" + "B" * len(BLOCKS[name]) + "FL"
    first = [tuple(network[i].weight.shape) for i in (0, 3, 6)]
    assert first == [(64, 3, 3, 3), (64, 64, 3, 3), (64, 64, 3, 3)]
    channels = 64
    for block, (planes, stride) in zip(
        of_type(network, stdb.ResidualBlock), BLOCKS[name], strict=True
    ):
        assert tuple(block.conv1.weight.shape) == (planes, channels, 3, 3)
        assert tuple(block.conv2.weight.shape) == (planes, planes, 3, 3)
        assert block.conv1.stride == (stride, stride)
        assert block.conv2.stride == (1, 1)
        if planes == channels:
            assert isinstance(block.shortcut, nn.Identity)
        else:
            assert tuple(block.shortcut.weight.shape) == (planes, channels, 1, 1)
            assert block.shortcut.stride == (stride, stride)
        channels = planes
    assert tuple(network.output.weight.shape) == (100, FEATURES[name])


def test_weighted_layers_of_resnets():
    """A ResNet's number counts its weighted layers, projections left out: 34 = 3 + 2·15 + 1."""
    for name in set(BLOCKS) - {"resnet34_snn"}:
        network = on_meta(name)
        layers = of_type(network, nn.Conv2d) + of_type(network, nn.Linear)
        shortcuts = [c for c in layers if isinstance(c, nn.Conv2d) and c.kernel_size == (1, 1)]
        assert len(layers) - len(shortcuts) == int(name.removeprefix("resnet"))


def test_resnet18_of_small_images():
    """As everybody has it for CIFAR: 11,173,962 with a bias of 10 at the end, which ours lacks."""
    network = on_meta("resnet18", dropout=0.0, normalisation="batch")
    assert weights(network) == 11_173_952
    assert [m.stride[0] for m in of_type(network, nn.Conv2d) if m.kernel_size == (3, 3)] == [
        *[1] * 5, 2, 1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1
    ]  # fmt: skip
    assert network.pool.kernel_size == 4


def test_parameters_by_hand():
    """VGG5 and ResNet8, counted on paper."""
    vgg5 = 9 * (3 * 64 + 64 * 128 + 128 * 128) + 8192 * 4096 + 4096 * 4096 + 4096 * 10
    assert weights(on_meta("vgg5")) == vgg5
    pre = 9 * (3 * 64 + 2 * 64 * 64)
    blocks = 9 * 2 * 64 * 64 + 9 * (64 * 128 + 128 * 128) + 64 * 128
    assert weights(on_meta("resnet8")) == pre + blocks + 8192 * 10


@pytest.mark.parametrize("name", NAMES)
def test_no_biases_and_padding(name):
    """Nothing has a bias; every 3×3 keeps the size (padding 1)."""
    network = on_meta(name)
    assert all(n.endswith("weight") for n, _ in network.named_parameters())
    for conv in of_type(network, nn.Conv2d):
        assert conv.padding == ((1, 1) if conv.kernel_size == (3, 3) else (0, 0))


@pytest.mark.parametrize("name", NAMES)
def test_dropout_rates(name):
    """Convolutions and classifier have rates of their own."""
    network = on_meta(name, dropout=0.25, classifier_dropout=0.4)
    rates = [module.p for module in of_type(network, nn.Dropout)]
    linear = 2 if name.startswith("vgg") else 0
    assert rates == [0.25] * (len(rates) - linear) + [0.4] * linear


@pytest.mark.parametrize("name", NAMES)
def test_converts_and_runs(name):
    """Every network converts as it is, one spiking layer for each ReLU, and runs two steps."""
    ann = stdb.build(name, 1, 32, 7, width=0.05, hidden=6)
    snn = stdb.convert(ann, stdb.PoissonEncoder())
    logits = snn(torch.rand(2, 1, 32, 32), 2)
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    assert len(snn.thresholds) == len(of_type(ann, nn.ReLU))
    logits.sum().backward()


def test_resnet11():
    """At half width 1.94 million weights, and a block more than resnet9 has."""
    network = on_meta("resnet11", width=0.5, normalisation="batch")
    convolutions = [tuple(c.weight.shape[:2]) for c in of_type(network, nn.Conv2d)]
    assert convolutions == [
        (32, 3), (64, 32), (64, 64), (64, 64), (128, 64), (128, 128), (128, 128), (256, 128),
        (256, 256), (256, 256),
    ]  # fmt: skip
    assert "".join(type(m).__name__[0] for m in network) == "CBRDCBRAR" + "CBRAR" * 2 + "AFL"
    assert round(weights(network) / 1e6, 2) == 1.94
    with FlopCounterMode(display=False) as counter:
        on_meta("resnet11", width=0.5)(torch.zeros(1, 3, 32, 32, device="meta"))
    assert round(counter.get_total_flops() / 2e6) == 114


def test_resnet9():
    """At half width 1.65 million weights and 95 million multiply-accumulates at 32×32."""
    network = on_meta("resnet9", width=0.5, normalisation="batch")
    convolutions = [tuple(c.weight.shape[:2]) for c in of_type(network, nn.Conv2d)]
    assert convolutions == [
        (32, 3), (64, 32), (64, 64), (64, 64), (128, 64), (256, 128), (256, 256), (256, 256)
    ]  # fmt: skip
    assert [c.out_channels for c in of_type(on_meta("resnet9"), nn.Conv2d)][:2] == [64, 128]
    kinds = [type(m).__name__[0] for m in network]
    assert "".join(kinds) == "CBRD" + "CBRA" + "R" + "CBRA" * 2 + "RAFL"
    norms = 2 * (32 + 3 * 64 + 128 + 3 * 256)
    assert weights(network) == 1_643_872 + norms
    assert round(weights(network) / 1e6, 2) == 1.65
    snn = stdb.convert(stdb.build("resnet9", width=0.5), stdb.PoissonEncoder())
    with FlopCounterMode(display=False) as counter:
        on_meta("resnet9", width=0.5)(torch.zeros(1, 3, 32, 32, device="meta"))
    assert round(counter.get_total_flops() / 2e6) == 95
    assert list(snn.thresholds) == [
        "conv1", "conv2", "block1.conv1", "block1.conv2", "conv3", "conv4",
        "block2.conv1", "block2.conv2",
    ]  # fmt: skip


OPTIONS = [
    ("vgg9", "batch", "average"), ("vgg9", "none", "max"), ("resnet12", "batch", "max"),
    ("resnet9", "batch", "average"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "normalisation", "pooling"), OPTIONS)
def test_norms_and_poolings_of_ones_choice(name, normalisation, pooling):
    """A batch norm behind every convolution, shortcuts' too; weights are drawn as without it."""
    networks = []
    for options in ({}, {"normalisation": normalisation, "pooling": pooling}):
        torch.manual_seed(3)
        networks.append(stdb.build(name, 1, 32, 7, width=0.05, hidden=6, **options))
    plain, network = networks
    convolutions = of_type(network, nn.Conv2d)
    norms = of_type(network, nn.BatchNorm2d)
    assert len(norms) == (len(convolutions) if normalisation == "batch" else 0)
    assert len(of_type(network, nn.MaxPool2d)) == (
        len(of_type(plain, nn.AvgPool2d)) if pooling == "max" else 0
    )
    drawn = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for one, other in zip(drawn, plain.parameters(), strict=True):
        assert torch.equal(one, other)
    behind = {type(b) for a, b in pairwise(network) if isinstance(a, nn.Conv2d)}
    assert behind == ({nn.BatchNorm2d} if norms else {nn.ReLU})


@pytest.mark.parametrize(("name", "normalisation", "pooling"), OPTIONS)
def test_networks_with_norms_and_other_poolings_convert(name, normalisation, pooling):
    """One spiking layer for each ReLU, and the rates of many steps give the ANN's decision."""
    torch.manual_seed(0)
    options = {"normalisation": normalisation, "pooling": pooling}
    ann = stdb.build(name, 1, 32, 4, width=0.05, hidden=6, **options)
    snn = stdb.convert(ann, stdb.DirectEncoder())
    assert len(snn.thresholds) == len(of_type(ann, nn.ReLU))
    assert snn(torch.rand(2, 1, 32, 32), 2).isfinite().all()


def test_a_block_is_normalised_where_it_says_so():
    """By hand, with statistics of its own."""
    torch.manual_seed(0)
    block = stdb.ResidualBlock(2, 3, 2, 0.0, normalised=True).eval()
    for norm in of_type(block, nn.BatchNorm2d):
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.weight, 0.5, 2)
    x = torch.randn(1, 2, 6, 6)
    inner = block.norm1(block.conv1(x)).relu()
    expected = block.norm2(block.conv2(inner)) + block.shortcut[1](block.shortcut[0](x))
    assert torch.equal(block(x), expected.relu())
    assert set(stdb.ResidualBlock(2, 2).state_dict()) == {"conv1.weight", "conv2.weight"}


@pytest.mark.parametrize(
    ("key", "allowed"), [("normalisation", "none, batch"), ("pooling", "average, max")]
)
def test_unknown_options(key, allowed):
    """The message names what there is."""
    with pytest.raises(ValueError, match=f"{key} is 'group'; allowed: {allowed}"):
        stdb.build("vgg5", **{key: "group"})


def test_width_multiplies_channels():
    """Half the width is half the channels in every convolution; never less than one channel."""
    network = on_meta("vgg5", width=0.5, hidden=100)
    assert [c.out_channels for c in of_type(network, nn.Conv2d)] == [32, 64, 64]
    assert [m.out_features for m in of_type(network, nn.Linear)] == [100, 100, 10]
    assert {c.out_channels for c in of_type(on_meta("resnet8", width=1e-6), nn.Conv2d)} == {1}


SIZES = [
    ("vgg5", 8, 128 * 2 * 2), ("vgg5", 28, 128 * 7 * 7), ("vgg9", 28, 512), ("vgg11", 8, 512),
    ("resnet8", 8, 128 * 2 * 2), ("resnet8", 28, 128 * 7 * 7), ("resnet20", 8, 512),
    ("resnet34", 8, 512), ("resnet34", 28, 512 * 2 * 2),
]  # fmt: skip


@pytest.mark.parametrize(("name", "size", "features"), SIZES)
def test_other_image_sizes(name, size, features):
    """The classifier's input follows from the image; poolings round down, strides up."""
    network = on_meta(name, 1, size)
    assert of_type(network, nn.Linear)[0].in_features == features
    small = stdb.build(name, 1, size, width=0.03, hidden=4)
    assert small.eval()(torch.zeros(1, 1, size, size)).shape == (1, 10)


def test_imagenet_vgg16():
    """At 224×224 the classic five poolings: 512·7·7 features."""
    network = on_meta("vgg16", image_size=224, num_classes=1000)
    assert len(of_type(network, nn.AvgPool2d)) == 5
    assert network.fc1.in_features == 512 * 7 * 7
    assert network(torch.zeros(1, 3, 224, 224, device="meta")).shape == (1, 1000)


def test_imagenet_resnet34():
    """At 224×224 a global average pooling leaves 512 features."""
    network = on_meta("resnet34", image_size=224, num_classes=1000)
    assert len(of_type(network, nn.AvgPool2d)) == 2
    assert network.pool.kernel_size == 14
    assert network.output.in_features == 512
    assert network(torch.zeros(1, 3, 224, 224, device="meta")).shape == (1, 1000)


@pytest.mark.parametrize(
    ("name", "smallest"),
    [("vgg5", 4), ("vgg9", 16), ("vgg11", 8), ("vgg13", 16), ("vgg16", 16), ("vgg19", 16),
     ("resnet8", 2)],
)  # fmt: skip
def test_smallest_image(name, smallest):
    """As many halvings as poolings have to fit; one pixel less is an error that says so."""
    on_meta(name, image_size=smallest)
    with pytest.raises(ValueError, match=r"image_size.*too small"):
        on_meta(name, image_size=smallest - 1)


@pytest.mark.parametrize("key", ["in_channels", "num_classes", "hidden", "width"])
def test_impossible_values(key):
    """The message names the parameter, its value and what is allowed."""
    with pytest.raises(ValueError, match=f"{key} is 0; allowed: "):
        stdb.build("vgg5", **{key: 0})


def test_initial_weights():
    """Convolutions N(0, √(2/(k²·out))), linear layers N(0, 0.01) in the paper's size."""
    torch.manual_seed(0)
    network = stdb.build("vgg5", width=0.5, hidden=16)
    for conv in of_type(network, nn.Conv2d)[1:]:
        std, mean = torch.std_mean(conv.weight.detach())
        assert float(std) == pytest.approx((2 / (9 * conv.out_channels)) ** 0.5, rel=0.03)
        assert abs(float(mean)) < 0.1 * float(std)
    wide = nn.Sequential(nn.Linear(20000, 16, bias=False))
    stdb.architectures.initialise(wide)
    assert float(wide[0].weight.detach().std()) == pytest.approx(0.01, rel=0.03)


@pytest.mark.parametrize("name", stdb.ARCHITECTURES)
@pytest.mark.parametrize("size", [(32, 48), (130, 64), (128, 160)])
def test_images_that_are_not_square(name, size):
    """Height and width; the same layers as of squares, and one logit a class."""
    network = on_meta(name, image_size=size)
    assert network(torch.zeros(2, 3, *size, device="meta")).shape == (2, 10)
    assert list(network.state_dict()) == list(on_meta(name, image_size=min(size)).state_dict())


def test_weights_without_memory_are_not_drawn(monkeypatch):
    """For a meta tensor torch would load its compiler first; others' numbers stay as they were."""
    torch.manual_seed(0)
    before = stdb.build("vgg5", width=0.1, hidden=8).state_dict()
    torch.manual_seed(0)
    with monkeypatch.context() as patched, torch.device("meta"):
        patched.setattr(nn.init, "normal_", lambda *_: pytest.fail("drew"))
        empty = stdb.build("vgg5", width=0.1, hidden=8).state_dict()
    after = stdb.build("vgg5", width=0.1, hidden=8).state_dict()
    for name, tensor in empty.items():
        assert tensor.is_meta
        assert tensor.shape == before[name].shape
        assert before[name].equal(after[name])
