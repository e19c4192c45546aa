"""A network as one file: what comes back is what was written."""

import json
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

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
    ],
)
def test_what_comes_back_is_what_was_written(tmp_path, options):
    """Logits, gradients' rules, thresholds and what they were balanced to, metadata."""
    snn = network(**options)
    stdb.save(snn, tmp_path / "snn", network=VGG5, timesteps=5, classes=CLASSES, note="x")
    again, about = stdb.load(tmp_path / "snn")
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    with torch.no_grad():
        assert torch.equal(again(images, 5), snn(images, 5))
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
        stdb.save(network(), tmp_path / name, network=VGG5, timesteps=5, classes=CLASSES)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_network_of_ones_own_is_built_again(tmp_path, monkeypatch):
    """By its ``module:function``."""
    (tmp_path / "own_network.py").write_text(
        "from torch import nn\n"
        "def build(in_channels, image_size, num_classes):\n"
        "    n = in_channels * image_size**2\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(n, 5, bias=False), nn.ReLU(),\n"
        "                         nn.Linear(5, num_classes, bias=False))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = {"architecture": "own_network:build", **SIZE, "width": 1.0}
    snn = stdb.convert(stdb.build_network(**own), stdb.PoissonEncoder(0)).eval()
    stdb.save(snn, tmp_path / "snn", network=own, timesteps=5, classes=CLASSES)
    again, _ = stdb.load(tmp_path / "snn")
    images = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(images, 4), snn(images, 4))
    sys.modules.pop("own_network")


def test_any_program_can_read_the_file(tmp_path):
    """Plain safetensors with documented names."""
    stdb.save(network(), tmp_path / "snn", network=VGG5, timesteps=5, classes=CLASSES)
    with safe_open(tmp_path / "snn", framework="numpy") as file:
        config = json.loads(file.metadata()["config"])
        assert config["encoder"] == {"name": "poisson", "seed": 9}
        assert file.get_tensor("conv1_relu.threshold") == pytest.approx(0.07)
        assert file.get_tensor("conv1_relu.balanced_threshold") == pytest.approx(0.1)


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
    stdb.save(network(), path, network=VGG5, timesteps=5, classes=CLASSES)
    damage(path)
    with pytest.raises(ValueError, match=message) as refused:
        stdb.load(path)
    assert str(path) in str(refused.value)


def test_an_encoder_of_ones_own_cannot_be_saved(tmp_path):
    """A spike train is not a rule that a file could name."""
    snn = network(encoder=stdb.SpikeTrain(torch.zeros(5, 1, 1, 8, 8)))
    with pytest.raises(ValueError, match="encoder is a SpikeTrain; allowed: poisson, direct"):
        stdb.save(snn, tmp_path / "snn", network=VGG5, timesteps=5, classes=CLASSES)


@pytest.mark.parametrize("name", ["nowhere:build", "stdb:no_such_function", "vgg4"])
def test_an_unknown_architecture_is_refused(name):
    """By name."""
    with pytest.raises(ValueError, match=name.partition(":")[2] or name):
        stdb.build_network(architecture=name, **SIZE)
