"""Checkpoints in the layout of the authors' code: what is read, what it computes, what is refused.

The files are made here by module trees of that layout, which also run: as an ANN, and as an SNN by
their rule, in which every layer passes its spikes on one step late.
"""

import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stdb
from stdb.randomness import sample_keys

A = "A"
VGG = {  # their tables; the two of VGG11 are those of their ANN and of the SNN of the paper
    "vgg5": [64, A, 128, 128, A],
    "vgg11": [64, A, 128, 256, 256, A, 512, 512, 512, A, 512, 512],
    "vgg11_ann": [64, A, 128, 256, A, 512, 512, A, 512, A, 512, 512],
    "vgg16": [64, 64, A, 128, 128, A, *[256] * 3, A, *[512] * 3, A, *[512] * 3],
}
RESNET = {"resnet8": [1, 1, 0, 0], "resnet34": [3, 4, 5, 3], "resnet34_snn": [3, 4, 6, 3]}
NARROW = 16  # times narrower than theirs


class AuthorsVGG(nn.Module):
    """features: conv, ReLU, dropout or in its place a pooling; classifier: three linear layers."""

    def __init__(self, name, colours, size, classes, hidden):
        super().__init__()
        layers: list[nn.Module] = []
        channels = colours
        for entry in VGG[name]:
            if entry == A:
                layers[-1] = nn.AvgPool2d(2)
                size //= 2
            else:
                planes = entry // NARROW
                layers += [nn.Conv2d(channels, planes, 3, padding=1, bias=False), nn.ReLU()]
                layers += [nn.Dropout(0.2)]
                channels = planes
        self.features = nn.Sequential(*layers)
        sizes = [channels * size * size, hidden, hidden, classes]
        layers = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs, bias=False), nn.ReLU(), nn.Dropout(0.5)]
        self.classifier = nn.Sequential(*layers[:-2])

    def forward(self, x):
        """As an ANN."""
        return self.classifier(self.features(x).flatten(1))

    def spiking(self, train, thresholds, leak):
        """U of the output layer; every layer gives the spikes of its membrane before this step."""
        layers = [*self.features, nn.Flatten(), *self.classifier]
        weighted = [m for m in layers if isinstance(m, nn.Conv2d | nn.Linear)]
        threshold = dict(zip(weighted, thresholds, strict=False))
        membrane: dict[nn.Module, Tensor] = {}
        output = 0.0
        for x in train:
            for layer in layers:
                if layer in threshold:
                    current, v = layer(x), threshold[layer]
                    before = membrane.get(layer, torch.zeros_like(current))
                    x = (before > v).float()
                    membrane[layer] = leak * before + current - v * x
                elif isinstance(layer, nn.AvgPool2d | nn.Flatten):
                    x = layer(x)
            output = output + layers[-1](x)
        return output


class AuthorsBlock(nn.Module):
    """residual: conv, ReLU, dropout, conv; identity: nothing, or a 1×1 convolution."""

    def __init__(self, inputs, planes, stride):
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, planes, 3, stride, 1, bias=False), nn.ReLU(), nn.Dropout(0.2),
            nn.Conv2d(planes, planes, 3, 1, 1, bias=False),
        )  # fmt: skip
        self.identity = nn.Sequential()
        if stride != 1 or inputs != planes:
            self.identity.append(nn.Conv2d(inputs, planes, 1, stride, bias=False))

    def forward(self, x):
        """As a part of an ANN."""
        return F.relu(self.residual(x) + self.identity(x))


class AuthorsResNet(nn.Module):
    """pre_process, layer1 … layer4, classifier."""

    def __init__(self, name, colours, size, classes, hidden):
        super().__init__()
        channels = 64 // NARROW
        layers: list[nn.Module] = []
        for k in range(3):
            inputs = channels if k else colours
            layers += [nn.Conv2d(inputs, channels, 3, padding=1, bias=False), nn.ReLU()]
            layers += [nn.Dropout(0.2)]
        self.pre_process = nn.Sequential(*layers[:-1], nn.AvgPool2d(2))
        size //= 2
        for group, blocks in enumerate(RESNET[name]):
            layers, planes = [], 64 * 2**group // NARROW
            for block in range(blocks):
                stride = 2 if group and block == 0 else 1
                layers.append(AuthorsBlock(channels, planes, stride))
                channels, size = planes, -(-size // stride)
            setattr(self, f"layer{group + 1}", nn.Sequential(*layers))
        linear = nn.Linear(channels * size * size, classes, bias=False)
        self.classifier = nn.Sequential(linear)

    @property
    def blocks(self):
        """In order."""
        return [b for g in range(1, 5) for b in getattr(self, f"layer{g}")]

    def forward(self, x):
        """As an ANN."""
        x = self.pre_process(x)
        for block in self.blocks:
            x = block(x)
        return self.classifier(x.flatten(1))

    def spiking(self, train, thresholds, leak):
        """U of the output layer, nothing late: Eq. 2 in place of every ReLU."""
        membrane: dict[int, Tensor] = {}

        def fire(place, current):
            u, o = membrane.get(place, (torch.zeros_like(current), torch.zeros_like(current)))
            v = thresholds[place]
            u = leak * u + current - v * o
            membrane[place] = (u, (u > v).float())
            return membrane[place][1]

        output = 0.0
        for x in train:
            for k in range(3):
                x = fire(k, self.pre_process[3 * k](x))
            x = self.pre_process[-1](x)
            for k, block in enumerate(self.blocks):
                inner = fire(3 + 2 * k, block.residual[0](x))
                x = fire(4 + 2 * k, block.residual[3](inner) + block.identity(x))
            output = output + self.classifier(x.flatten(1))
        return output


def authors(name, colours=3, size=32, classes=10, hidden=12, seed=0):
    """Their network, narrow, with weights whose sums float32 has exactly."""
    torch.manual_seed(seed)
    kind = AuthorsVGG if name in VGG else AuthorsResNet
    model = kind(name, colours, size, classes, hidden).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(((weight / weight.std() / 4 + 0.01) * 16).round() / 16)
    return model


def state_dict(model, prefix="module."):
    """As ``nn.DataParallel`` names it, or not."""
    return {prefix + name: weight for name, weight in model.state_dict().items()}


def ann_file(name, path, prefix="module.", **more):
    """What ann.py saves, in a file; the model that is in it."""
    model = authors(name)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    state = {"accuracy": 0.9, "epoch": 7, "optimizer": optimizer.state_dict()}
    torch.save(state | {"state_dict": state_dict(model, prefix)} | more, path)
    return model


def spiking_layers(model):
    """How many."""
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return len(weighted) - 1 - sum(m.weight.shape[2:] == (1, 1) for m in weighted)


def thresholds_of(model):
    """One for each spiking layer, all different."""
    return [0.5 + k / 64 for k in range(spiking_layers(model))]


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("name", [*VGG, *RESNET])
def test_an_ann_gives_the_same_logits(name, prefix, tmp_path):
    """Recognised by its layers, with the weights where they belong; a recipe that builds it."""
    model = ann_file(name, tmp_path / "ann.pth", prefix)
    found = stdb.import_authors(tmp_path / "ann.pth")
    assert found.network["architecture"] == name
    assert found.snn is None
    assert found.timesteps is None
    assert found.accuracy == 0.9
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(found.ann(images), expected)
        again = stdb.build_network(**found.network).eval()
        again.load_state_dict(found.ann.state_dict())
        torch.testing.assert_close(again(images), expected)
    assert expected.std() > 0
    assert all(p.requires_grad for p in found.ann.parameters())


@pytest.mark.parametrize(
    ("name", "colours", "size", "leak"),
    [("vgg5", 1, 28, 1.0), ("vgg11", 3, 32, 0.5), ("vgg16", 3, 32, 1.0), ("resnet8", 3, 32, 0.5),
     ("resnet34_snn", 3, 32, 1.0)],
)  # fmt: skip
def test_an_snn_gives_the_same_logits(name, colours, size, leak):
    """A VGG's are those of theirs L steps later; a ResNet's those of Eq. 2 written down here."""
    model, steps = authors(name, colours, size), 6
    thresholds = thresholds_of(model)
    file = {
        "state_dict": state_dict(model), "thresholds": thresholds, "timesteps": steps,
        "leak": leak, "activation": "Linear",
    }  # fmt: skip
    found = stdb.import_authors(file)
    assert found.timesteps == steps
    assert list(found.snn.thresholds.values()) == thresholds
    images = torch.rand(3, colours, size, size) * 2 - 1
    late = len(thresholds) if name in VGG else 0
    train = found.snn.encoder(images, 0, steps + late, sample_keys(torch.arange(3), 0))
    with torch.no_grad():
        expected = model.spiking(train, thresholds, leak)
        logits = found.snn(images, steps)
    assert len(expected.unique(dim=0)) == 3
    assert torch.equal(logits, expected)


def test_thresholds_of_an_ann_can_be_scaled(tmp_path):
    """They are Algorithm 1's; a ResNet's are those of its three first layers, the others stay 1."""
    ann_file("resnet8", tmp_path / "ann.pth", thresholds=[3.0, 2.0, 1.5])
    snn = stdb.import_authors(tmp_path / "ann.pth").snn
    snn.scale_thresholds(0.5)
    assert list(snn.thresholds.values()) == [1.5, 1.0, 0.75, 1.0, 1.0, 1.0, 1.0]


def test_thresholds_of_an_snn_are_scaled_already(tmp_path):
    """Scaling again would be wrong, and does nothing."""
    ann_file("vgg5", tmp_path / "snn.pth", thresholds=[5.0, 4.0, 3.0, 2.0, 1.0], timesteps=9)
    snn = stdb.import_authors(tmp_path / "snn.pth").snn
    snn.scale_thresholds(0.5)
    assert list(snn.thresholds.values()) == [5.0, 4.0, 3.0, 2.0, 1.0]


def test_an_old_file_has_thresholds_and_their_scale(tmp_path):
    """With one for the output layer, which has none; the leak by another name."""
    old = {"thresholds": [5.0, 4.0, 3.0, 2.0, 1.0, 1.0], "timesteps": 9, "leak_mem": 0.75}
    ann_file("vgg5", tmp_path / "snn.pth", scaling_threshold=0.5, **old)
    snn = stdb.import_authors(tmp_path / "snn.pth").snn
    assert list(snn.thresholds.values()) == [2.5, 2.0, 1.5, 1.0, 0.5]
    assert {float(neuron.leak) for neuron in snn.neurons.values()} == {0.75}
    snn.scale_thresholds(1.0)
    assert list(snn.thresholds.values()) == [5.0, 4.0, 3.0, 2.0, 1.0]


@pytest.mark.parametrize(("activation", "kind"), [("STDB", stdb.STDB), ("Linear", stdb.Linear)])
def test_surrogate(activation, kind, tmp_path):
    """Theirs is over U/V; α and β are not in the file."""
    more = {"thresholds": [1.0] * 5, "timesteps": 9, "activation": activation}
    ann_file("vgg5", tmp_path / "snn.pth", **more)
    snn = stdb.import_authors(tmp_path / "snn.pth").snn
    assert {n.surrogate for n in snn.neurons.values()} == {kind(0.3, 0.01, over_threshold=True)}
    own = stdb.Exponential(0.2, 0.1)
    snn = stdb.import_authors(tmp_path / "snn.pth", surrogate=own).snn
    assert {n.surrogate for n in snn.neurons.values()} == {own}


def test_an_imported_network_can_be_saved_and_trained(tmp_path):
    """It is one like any other."""
    ann_file("vgg5", tmp_path / "snn.pth", thresholds=[0.5] * 5, timesteps=4)
    found = stdb.import_authors(tmp_path / "snn.pth", encoder=stdb.DirectEncoder())
    classes = [str(k) for k in range(10)]
    stdb.save(found.snn, tmp_path / "snn", network=found.network, timesteps=4, classes=classes)
    again, _ = stdb.load(tmp_path / "snn")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    logits = found.snn(images, 4)
    assert torch.equal(again(images, 4), logits)
    F.cross_entropy(logits, torch.tensor([1, 2])).backward()
    assert found.snn.net.conv1.weight.grad.abs().sum() > 0


def damaged(name, change, **options):
    """The message about a file whose state dict or other entries were changed."""
    model = authors(name)
    file = {"state_dict": state_dict(model), "timesteps": 9, "leak": 1.0}
    file |= {"thresholds": thresholds_of(model), "activation": "STDB"}
    change(file, file["state_dict"])
    with pytest.raises(ValueError, match=r"^the checkpoint") as refused:
        stdb.import_authors(file, **options)
    return str(refused.value)


def test_weights_that_do_not_fit_are_named():
    """By the file's own names: missing, unknown, of another shape."""
    told = damaged("vgg5", lambda file, state: state.pop("module.classifier.3.weight"))
    assert "classifier.3.weight is missing" in told
    told = damaged("vgg5", lambda f, s: s.update({"module.features.3.bias": torch.zeros(8)}))
    assert "features.3.bias is not known" in told
    told = damaged(
        "vgg5", lambda f, s: s.update({"module.features.3.weight": torch.ones(8, 4, 5, 5)})
    )
    assert "features.3.weight is (8, 4, 5, 5), allowed: (8, 4, 3, 3)" in told
    told = damaged("resnet8", lambda f, s: s.pop("module.layer2.0.identity.0.weight"))
    assert "layer2.0.identity.0.weight is missing" in told
    told = damaged("resnet8", lambda f, s: s.pop("module.layer1.0.residual.3.weight"))
    assert "layer1.0.residual.3.weight is missing" in told


def test_another_network_than_asked_for():
    """A ResNet-34 of their SNN is not one of their ANN: the sixth block of the third group."""
    told = damaged("resnet34_snn", lambda f, s: None, architecture="resnet34")
    assert "not the weights of a resnet34 " in told
    assert "layer3.5.residual.0.weight is not known" in told
    told = damaged("resnet34", lambda f, s: None, architecture="resnet34_snn")
    assert "layer3.5.residual.3.weight is missing" in told
    told = damaged("vgg11_ann", lambda f, s: None, architecture="vgg11")
    assert "features.9.weight is (32, 16, 3, 3), allowed: (16, 16, 3, 3)" in told


def test_another_image_size():
    """The classifier shows it."""
    told = damaged("vgg5", lambda f, s: None, image_size=28)
    assert "3×28×28 images" in told
    assert "classifier.0.weight is (12, 512), allowed: (12, 392)" in told


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vgg5", lambda f, s: s.pop("module.features.6.weight"), "none of the authors' VGGs: fea"),
        ("resnet8", lambda f, s: [s.pop(k) for k in list(s) if "layer2" in k], r"\[1, 0, 0, 0\] b"),
        ("vgg5", lambda f, s: s.pop("module.features.0.weight"), "neither a VGG"),
        ("vgg5", lambda f, s: s.clear(), "its layers are none"),
        ("vgg5", lambda f, s: f.pop("state_dict"), "no state_dict"),
        ("vgg5", lambda f, s: f["thresholds"].pop(), "4 thresholds; allowed: 5, for conv1, conv2"),
        ("resnet8", lambda f, s: f["thresholds"].pop(), "6 thresholds; allowed: 7 or 3, for conv1"),
        ("vgg5", lambda f, s: f.pop("thresholds"), "0 thresholds"),
        ("vgg5", lambda f, s: f.update(thresholds=[1.0, 1.0, 0.0, 1.0, 1.0]), "of conv3 is 0.0"),
        ("vgg5", lambda f, s: f.update(leak=1.5), "leak is 1.5"),
        ("vgg5", lambda f, s: f.update(activation="Step"), "activation is 'Step'; allowed: STDB"),
        ("vgg5", lambda f, s: s.update({"module.features.0.weight": torch.ones(4)}), "of its kind"),
    ],
)
def test_what_is_no_such_file_is_refused(name, change, message):
    """With what is wrong in it."""
    assert re.search(message, damaged(name, change))


def test_a_file_that_cannot_be_read(tmp_path):
    """Cut off, or holding code; by its path."""
    path = tmp_path / "ann.pth"
    ann_file("vgg5", path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ValueError, match=r"ann\.pth cannot be read"):
        stdb.import_authors(path)
    torch.save({"state_dict": nn.Linear(2, 2)}, path)
    with pytest.raises(ValueError, match=r"ann\.pth cannot be read"):
        stdb.import_authors(path)
