"""A network as one file: what comes back is what was written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

import stdb

SIZE = {"in_channels": 1, "image_size": 8, "num_classes": 4}
VGG5 = {"architecture": "vgg5", **SIZE, "width": 0.1, "hidden": 8}
CLASSES = ["a", "b", "c", "d"]


def network(**options):
    torch.manual_seed(2)
    options = {"encoder": stdb.PoissonEncoder(9), "surrogate": stdb.Linear(0.2, 0.1)} | options
    snn = stdb.convert(stdb.build_network(**VGG5), **options)
    snn.set_thresholds({name: 0.1 * k for k, name in enumerate(snn.thresholds, start=1)})
    snn.scale_thresholds(0.7)
    return snn.eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"leak": 0.9, "surrogate": stdb.STDB(0.3, 0.02, over_threshold=True)},
        {"encoder": stdb.DirectEncoder(), "temporal_gradient": False},
        {"encoder": stdb.DirectEncoder(), "precision": torch.bfloat16},
    ],
)
def test_what_comes_back_is_what_was_written(tmp_path, options):
    """Logits, gradients' rules, thresholds and what they were balanced to, metadata."""
    snn = network(**options)
    stdb.save(snn, tmp_path / "snn", timesteps=5, classes=CLASSES, note="x")
    again, about = stdb.load(tmp_path / "snn")
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    with torch.no_grad():
        assert torch.equal(again(images, 5), snn(images, 5))
    assert again.precision == snn.precision
    assert again.thresholds == snn.thresholds
    ours, theirs = next(iter(snn.neurons.values())), next(iter(again.neurons.values()))
    assert theirs.surrogate == ours.surrogate
    assert theirs.temporal_gradient == ours.temporal_gradient
    assert torch.equal(theirs.balanced_threshold, ours.balanced_threshold)
    assert not again.training
    assert about["classes"] == CLASSES
    assert about["timesteps"] == 5
    assert about["note"] == "x"


def test_the_same_network_is_the_same_bytes(tmp_path):
    """So that a pipeline's out does not change where nothing did."""
    for name in "ab":
        stdb.save(network(), tmp_path / name, timesteps=5, classes=CLASSES)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_says_what_becomes_of_pixels(tmp_path):
    """One that says nothing, as those of 0.1.0, means x/127.5 − 1; so does the default's."""
    given = stdb.Normalisation([0.3], [0.2])
    stdb.save(network(), tmp_path / "plain", timesteps=5, classes=CLASSES)
    stdb.save(network(), tmp_path / "own", timesteps=5, classes=CLASSES, normalisation=given)
    assert stdb.load(tmp_path / "plain")[1]["normalisation"] == stdb.Normalisation()
    assert stdb.load(tmp_path / "own")[1]["normalisation"] == given
    with safe_open(tmp_path / "plain", framework="pt") as file:
        assert "normalisation" not in json.loads(file.metadata()["config"])


@pytest.mark.parametrize("kept", [{"mean": [0.5], "std": [0]}, "imagenet", {"mean": [0.5]}])
def test_a_file_whose_normalisation_is_none_is_refused(tmp_path, kept):
    """Nobody could show it an image."""
    stdb.save(network(), tmp_path / "snn", timesteps=5, classes=CLASSES)
    with safe_open(tmp_path / "snn", framework="pt") as file:
        config = json.loads(file.metadata()["config"]) | {"normalisation": kept}
    save_file(load_file(tmp_path / "snn"), tmp_path / "snn", {"config": json.dumps(config)})
    with pytest.raises(ValueError, match=r"snn: (std|normalisation) .*; allowed"):
        stdb.load(tmp_path / "snn")


class Own(nn.Module):
    """A shortcut, a layer that nobody calls, two layers that share their weights."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.Identity())
        self.relus = nn.ModuleList([nn.ReLU() for _ in range(4)])
        self.block = stdb.ResidualBlock(4, 4)
        self.first, self.second = (nn.Linear(4 * 64, 4 * 64, bias=False) for _ in range(2))
        self.second.weight = self.first.weight
        self.never_called = nn.Linear(3, 3)
        self.output = nn.Linear(4 * 64, 4, bias=False)

    def forward(self, x):
        x = self.relus[0](self.stem(x))
        x = torch.flatten(self.block(x), 1)
        x = x + self.relus[1](self.first(x))
        return self.output(self.relus[2](self.second(x)))


def saved(tmp_path, change=lambda net: net):
    """Such a network, and its file."""
    torch.manual_seed(3)
    snn = stdb.convert(change(Own()), stdb.PoissonEncoder(0)).eval()
    snn.set_thresholds(dict.fromkeys(snn.thresholds, 0.3))
    stdb.save(snn, tmp_path / "snn", timesteps=5, classes=CLASSES)
    return snn, tmp_path / "snn"


@torch.no_grad()
def says_the_same(one, other):
    """Spikes of all layers, bit for bit, by the layers' names."""
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    with stdb.record_spikes(one) as ours, stdb.record_spikes(other) as theirs:
        same = torch.equal(one(images, 6), other(images, 6))
    return same and ours.spikes_per_neuron() == theirs.spikes_per_neuron()


def test_a_network_of_ones_own_needs_none_of_its_code(tmp_path):
    """Names, places in a Sequential, residual blocks, shared weights: as they were."""
    snn, path = saved(tmp_path)
    again, about = stdb.load(path)
    assert says_the_same(snn, again)
    assert about["format"] == 2
    assert list(again.thresholds) == list(snn.thresholds)
    assert stdb.residual_layers(again) == stdb.residual_layers(snn) != set()
    assert again.net.first.weight is again.net.second.weight
    assert isinstance(again.net.stem[0], nn.Conv2d)
    assert "never_called.weight" not in again.net.state_dict()
    with torch.no_grad():
        again.net.first.weight.mul_(2)
    stdb.save(again, tmp_path / "twice", timesteps=5, classes=CLASSES)
    twice, _ = stdb.load(tmp_path / "twice")
    assert torch.equal(twice.net.second.weight, 2 * snn.net.second.weight)


def test_a_loaded_network_learns(tmp_path):
    """As the one that was saved."""
    snn, path = saved(tmp_path)
    again, _ = stdb.load(path)
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    for net in (snn, again):
        net(images, 6).square().sum().backward()
    for (name, ours), theirs in zip(snn.named_parameters(), again.parameters(), strict=False):
        if ours.grad is not None:
            torch.testing.assert_close(again.get_parameter(name).grad, ours.grad)
            assert theirs is not None


def test_float64_stays_float64(tmp_path):
    """The type of the weights is the file's."""
    snn, path = saved(tmp_path, lambda net: net.double())
    again, _ = stdb.load(path)
    assert again.net.output.weight.dtype == torch.float64
    assert again.thresholds == snn.thresholds


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
def test_weights_may_be_kept_in_half_the_bytes(tmp_path, storage):
    """They come back in their type, rounded; thresholds and biases are not rounded."""
    torch.manual_seed(0)
    ann = stdb.build("vgg5", 1, 8, 3, width=0.5, hidden=64, normalisation="batch").eval()
    snn = stdb.convert(ann, stdb.DirectEncoder())
    stdb.balance_thresholds(snn, torch.rand(4, 1, 8, 8) * 2 - 1, 4)
    for name, kept in (("whole", None), ("half", storage)):
        stdb.save(snn, tmp_path / name, timesteps=4, classes=["a", "b", "c"], storage=kept)
    whole, half = ((tmp_path / name).stat().st_size for name in ("whole", "half"))
    assert half < 0.6 * whole
    loaded, about = stdb.load(tmp_path / "half")
    assert "stored_from" not in about
    assert loaded.thresholds == snn.thresholds
    for (name, ours), theirs in zip(
        loaded.named_parameters(), stdb.load(tmp_path / "whole")[0].parameters(), strict=True
    ):
        assert ours.dtype == torch.float32
        rounded = theirs.to(storage).float() if theirs.dim() > 1 else theirs
        assert torch.equal(ours, rounded), name
    with torch.no_grad():
        snn.net.conv1.weight[0, 0, 0, 0] = 1e6
    if storage == torch.float16:
        with pytest.raises(ValueError, match=r"conv1\.weight is too large for torch\.float16"):
            stdb.save(snn, tmp_path / "no", timesteps=4, classes=["a"], storage=storage)
    with pytest.raises(ValueError, match=r"storage is torch\.int8; allowed: a floating-point type"):
        stdb.save(snn, tmp_path / "no", timesteps=4, classes=["a"], storage=torch.int8)


def test_computed_weights_are_plain_there(tmp_path):
    """Pruned to zero they stay; how they were computed is not kept."""
    snn, path = saved(tmp_path)
    prune.l1_unstructured(snn.net.first, "weight", 0.5)
    stdb.save(snn, path, timesteps=5, classes=CLASSES)
    again, _ = stdb.load(path)
    assert (again.net.first.weight == 0).float().mean() == 0.5
    assert says_the_same(snn, again)


FILES = Path(__file__).parent / "files"


@pytest.mark.parametrize("name", ["vgg5", "resnet8"])
def test_files_of_the_first_version_load(name):
    """Bit for bit; what they said then they say now (made by the code of 0.1.0)."""
    snn, about = stdb.load(FILES / f"0.1.0-{name}.safetensors")
    said = load_file(FILES / f"0.1.0-{name}-said.safetensors")
    images, logits = said.pop("images"), said.pop("logits")
    state = snn.net.state_dict()
    state = {key: value for key, value in state.items() if not key.endswith("_extra_state")}
    assert state.keys() == said.keys()
    for key, value in said.items():
        assert torch.equal(state[key].nan_to_num(-1), value.nan_to_num(-1))
    with torch.no_grad():
        torch.testing.assert_close(snn(images, 9), logits)
    assert about["classes"] == CLASSES


def first_version(path, architecture, **options):
    """A file of 0.1.0 of a network with another builder."""
    with safe_open(FILES / "0.1.0-vgg5.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config["network"] |= {"architecture": architecture, **options}
    save_file(tensors, path, {"config": json.dumps(config)})


def test_no_code_is_run_that_a_file_names(tmp_path, monkeypatch):
    """A file of 0.1.0 for a network of one's own: the caller builds it."""
    called = []
    monkeypatch.setattr("os.system", called.append)
    first_version(tmp_path / "snn", "os:system", in_channels="true")
    with pytest.raises(ValueError, match=r"built by 'os:system', and no code .*network=ann"):
        stdb.load(tmp_path / "snn")
    snn, _ = stdb.load(tmp_path / "snn", network=stdb.build_network(**VGG5))
    assert snn.thresholds["conv1"] > 0
    assert not called


def test_any_program_can_read_the_file(tmp_path):
    """Plain safetensors with documented names."""
    stdb.save(network(), tmp_path / "snn", timesteps=5, classes=CLASSES)
    with safe_open(tmp_path / "snn", framework="numpy") as file:
        config = json.loads(file.metadata()["config"])
        assert config["encoder"] == {"name": "poisson", "seed": 9}
        assert file.get_tensor("conv1_relu.threshold") == pytest.approx(0.07)
        assert file.get_tensor("conv1_relu.balanced_threshold") == pytest.approx(0.1)


def rewrite(path, change):
    """Change what a file says of itself."""
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(config, tensors)
    save_file(tensors, path, {"config": json.dumps(config)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c.update(format=3), "has format 3; this version of stdb reads 2"),
        (lambda c, t: c.update(format="2"), "has format 2; this"),
        (lambda c, t: c.pop("graph"), "'graph'"),
        (lambda c, t: c.update(graph=[]), "no nn.ReLU"),
        (lambda c, t: c["graph"][1].update(operator="os:system"), "'os:system'"),
        (lambda c, t: c["graph"][1].update(inputs=[1]), "node conv1 takes"),
        (lambda c, t: c["graph"][1].update(inputs=[-1]), "node conv1 takes"),
        (lambda c, t: c["graph"][1].update(inputs=[]), "node conv1 is out of place"),
        (lambda c, t: c["graph"][1].update(path="conv1_relu"), "conv1_relu is a SpikingNeuron"),
        (lambda c, t: c["graph"][2].update(path="conv1"), "conv1 is a Conv2d, not a Spik"),
        (lambda c, t: c["modules"]["conv1"].update(type="system"), "'system'"),
        (lambda c, t: c["modules"]["conv1"].update(in_channels=10**9), "size mismatch"),
        (lambda c, t: c["modules"]["conv1"].update(in_channels="x"), "describe its own"),
        (lambda c, t: c["modules"]["conv1"].update(nonsense=1), "nonsense"),
        (lambda c, t: c["modules"]["conv1"].update(padding=[1, 1], bias=True), "conv1.bias"),
        (lambda c, t: c["modules"].pop(""), "describe its own"),
        (lambda c, t: c.update(modules=[]), "describe its own"),
        (lambda c, t: c["encoder"].update(name="os:system"), "'os:system'"),
        (lambda c, t: c["surrogate"].update(alpha="x"), "describe its own"),
        (lambda c, t: c.update(products="int4"), "products is 'int4'; allowed: bfloat16, float32"),
        (lambda c, t: c.update(timesteps=0), "timesteps is 0; allowed"),
        (lambda c, t: c.update(classes="abcd"), "classes are 'abcd'; allowed: a list"),
        (lambda c, t: c.update(tied={"fc2.weight": "nowhere"}), "'nowhere'"),
        (lambda c, t: t["conv1.weight"].fill_(float("nan")), "conv1.weight holds NaN"),
        (lambda c, t: t.update({"conv1.weight": t["conv1.weight"].half()}), "is torch.float16"),
        (lambda c, t: t.pop("conv1.weight"), "Missing key"),
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path, change, message):
    """With its name, before anything is made of it."""
    path = tmp_path / "snn"
    stdb.save(network(), path, timesteps=5, classes=CLASSES)
    rewrite(path, change)
    with pytest.raises(ValueError, match=message) as refused:
        stdb.load(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "cannot be read"),
        (lambda path: path.write_bytes(b"hello"), "cannot be read"),
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: save_file({"x": torch.ones(1)}, path, {"config": "{}"}), "does not say"),
        (
            lambda path: save_file(
                {"x": torch.ones(1)}, path, {"config": safe_open(path, "pt").metadata()["config"]}
            ),
            "does not describe its own weights",
        ),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, damage, message):
    """With its name and what is wrong."""
    path = tmp_path / "snn"
    stdb.save(network(), path, timesteps=5, classes=CLASSES)
    damage(path)
    with pytest.raises(ValueError, match=message) as refused:
        stdb.load(path)
    assert str(path) in str(refused.value)


def test_an_encoder_of_ones_own_cannot_be_saved(tmp_path):
    """A spike train is not a rule that a file could name."""
    snn = network(encoder=stdb.SpikeTrain(torch.zeros(5, 1, 1, 8, 8)))
    with pytest.raises(ValueError, match="encoder is a SpikeTrain; allowed: poisson, direct"):
        stdb.save(snn, tmp_path / "snn", timesteps=5, classes=CLASSES)


@pytest.mark.parametrize("name", ["nowhere:build", "stdb:no_such_function", "vgg4"])
def test_an_unknown_architecture_is_refused(name):
    """By name."""
    with pytest.raises(ValueError, match=name.partition(":")[2] or name):
        stdb.build_network(architecture=name, **SIZE)
