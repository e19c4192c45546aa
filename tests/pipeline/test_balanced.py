"""Networks with batch norm: what balancing hands on, and what later stages make of it."""

import copy
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

import stdb
from pipeline import balance_thresholds, evaluate_converted, finetune_stdb
from pipeline.errors import StageError
from pipeline.files import ANN, BALANCED
from pipeline.learning.balanced import balanced_state, keep_fixed, load_balanced, save_balanced
from pipeline.learning.networks import build_ann, build_snn, load_converted, recipe, save_weights
from pipeline.learning.weights import load_weights
from tests.pipeline.support import (
    BALANCING,
    DIRECT,
    NETWORK,
    NORMED,
    PARAMS,
    STDB,
    hand_on,
    handed_on,
    make_files,
    seen,
    worker,
)

LAYERS = ["conv1", "conv2", "conv3", "fc1", "fc2"]


def run(folder, loop, params=DIRECT, **sections):
    """A stage's loop on a network with batch norm, as the one worker; the state it ends with."""
    one = worker(folder, params, network=NORMED, **sections)
    loop(one)
    return one.states[-1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An ANN whose norms have seen images, and what balancing hands on of it."""
    folder, parts = make_files(tmp_path_factory.mktemp("files"))
    save_weights(seen(NORMED, parts["train"]).state_dict(), folder / ANN)
    hand_on(run(folder, balance_thresholds.balance_loop, balance_thresholds=BALANCING), folder)
    return folder, parts


@pytest.fixture
def copied(files, tmp_path):
    """The same, for one test to change."""
    folder = tmp_path / "files"
    shutil.copytree(files[0], folder)
    return folder


def trained(files) -> torch.nn.Module:
    ann = build_ann(NORMED, files[1]["train"])
    load_weights(ann, files[0] / ANN)
    return ann.eval()


def balanced_here(files) -> stdb.SpikingNetwork:
    """Converted and balanced by the engine alone."""
    snn = stdb.convert(trained(files), stdb.DirectEncoder())
    generator = torch.Generator().manual_seed(BALANCING.seed)
    train = files[1]["train"]
    chosen = train.take(torch.randperm(len(train), generator=generator)[:20])
    images = chosen.pixels()
    stdb.balance_thresholds(snn, images, 10, method="maximum", sample_ids=chosen.ids)
    return snn


def test_the_whole_network_is_handed_on(files):
    """Weights with units, biases, V: as the engine balances it, bit for bit."""
    _, snn = load_converted(NORMED, DIRECT, files[1]["train"], files[0])
    expected = balanced_here(files)
    images = files[1]["test"].pixels()
    assert snn.thresholds == expected.thresholds
    assert list(snn.thresholds) == LAYERS
    assert [n.unit for n in snn.neurons.values()] == [n.unit for n in expected.neurons.values()]
    assert torch.equal(snn.eval()(images, 9), expected.eval()(images, 9))
    kept = load_file(files[0] / BALANCED)
    assert {"conv1.bias", "conv2.weight", "output.weight", "fc1_relu.threshold"} <= set(kept)
    assert not any("norm" in name for name in kept)


def test_what_is_loaded_is_the_file(files):
    """Weights, biases, V and U_0 are the file's; what drives the network is the parameters'."""
    snn = balanced_here(files)
    for neuron in snn.neurons.values():
        neuron.initial_membrane = 0.5
    train, path = files[1]["train"], files[0] / "another.safetensors"
    network = recipe(NORMED, train)
    save_balanced(balanced_state(snn, train, network, 10, None), path)
    loaded = load_balanced(path, network)
    assert {n.initial_membrane for n in loaded.neurons.values()} == {0.5}
    images = train.pixels()[:4]
    assert torch.equal(loaded(images, 5), snn.eval()(images, 5))


def test_the_parameters_say_how_a_loaded_network_is_driven(files):
    """Encoder, surrogate, λ, what learns, chunk, precision, whose densities decide, seeds."""
    changed = {
        **{"encoder": "poisson", "surrogate": "linear", "alpha": 0.7, "over_threshold": True},
        **{"leak": 0.9, "temporal_gradient": False, "learn_thresholds": True, "learn_leaks": True},
        **{"chunk": 3, "precision": "bf16", "events": "never", "seed": 5},
    }
    params = DIRECT.model_copy(update=changed)
    _, snn = load_converted(NORMED, params, files[1]["train"], files[0])
    expected = build_snn(trained(files), params, 5, files[1]["train"])
    names = ("encoder", "limits", "chunk", "precision", "events", "dropout_seed")
    for name in names:
        assert getattr(snn, name) == getattr(expected, name), name
    for neuron, other in zip(snn.neurons.values(), expected.neurons.values(), strict=True):
        assert neuron.surrogate == other.surrogate
        assert neuron.leak == other.leak
        assert not neuron.temporal_gradient
        assert neuron.threshold.requires_grad
        assert neuron.leak.requires_grad


def test_the_file_holds_nothing_that_the_stage_does_not_track(files):
    """The same bytes whatever surrogate, chunk and seed are, which DVC would not see."""
    changed = {"surrogate": "linear", "chunk": 2, "learn_leaks": True, "seed": 9, "alpha": 9.0}
    params = DIRECT.model_copy(update=changed)
    state = run(files[0], balance_thresholds.balance_loop, params, balance_thresholds=BALANCING)
    written = (files[0] / BALANCED).read_bytes()
    assert bytes(state["balanced"].tolist()) == written


def test_the_leak_is_that_of_the_parameters(files):
    """Also where the file was written at another."""
    params = DIRECT.model_copy(update={"leak": 0.9})
    _, snn = load_converted(NORMED, params, files[1]["train"], files[0])
    assert {round(n.leak.item(), 4) for n in snn.neurons.values()} == {0.9}


def test_a_network_of_the_papers_kind_hands_on_its_thresholds_alone(files, tmp_path):
    """Its weights are the ANN's; the file is there and has nothing, in the bytes of ever."""
    train = files[1]["train"]
    snn = build_snn(build_ann(NETWORK, train), STDB, 0)
    state = balanced_state(snn, train, recipe(NETWORK, train), 10, None)
    path = tmp_path / "balanced.safetensors"
    save_balanced(state, path)
    assert load_file(path) == {}
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"config": '{"units": {}, "initial_membranes": {}}'}
    assert load_balanced(path, recipe(NETWORK, train)) is None


def test_an_initial_membrane_is_handed_on_of_any_network(tmp_path):
    """Thresholds alone do not say U_0."""
    folder, parts = make_files(tmp_path)
    started = BALANCING.model_copy(update={"initial_membrane": 0.25})
    one = worker(folder, balance_thresholds=started)
    balance_thresholds.balance_loop(one)
    hand_on(one.states[-1], folder)
    _, snn = load_converted(NETWORK, STDB, parts["train"], folder)
    assert {neuron.initial_membrane for neuron in snn.neurons.values()} == {0.25}
    assert not snn.has_units
    assert snn.thresholds == one.states[-1]["thresholds"]


def test_all_layers_of_basic_blocks_are_balanced(files):
    """V = 1 there is the paper's, for its networks: it would cut off what is above 1."""
    network = NORMED.model_copy(update={"architecture": "resnet8", "width": 0.2})
    folder, parts = files
    one = worker(folder, DIRECT, network=network, balance_thresholds=BALANCING)
    ann = seen(network, parts["train"])
    kept = (folder / ANN).read_bytes()
    try:
        save_weights(ann.state_dict(), folder / ANN)
        balance_thresholds.balance_loop(one)
    finally:
        (folder / ANN).write_bytes(kept)
    state = one.states[-1]
    assert state["kept"] == []
    assert 1.0 not in state["thresholds"].values()
    assert len(state["thresholds"]) == 3 + 2 * 2


def test_the_converted_network_follows_its_ann(files):
    """At many steps its accuracy is the ANN's on the images, and every layer's rates say much."""
    own = PARAMS.evaluate_converted.model_copy(update={"timesteps": 200, "scales": [1.0]})
    params = DIRECT.model_copy(update={"timesteps": 100})
    state = run(files[0], evaluate_converted.evaluate_loop, params, evaluate_converted=own)
    assert [row["layer"] for row in state["diagnosis"]] == LAYERS
    assert min(row["correlation"] for row in state["diagnosis"]) > 0.9
    test = files[1]["test"]
    right = trained(files)(test.pixels()).argmax(1) == test.labels
    assert state["long"]["accuracy"][-1] == pytest.approx(right.double().mean().item(), abs=0.03)


def test_fine_tuning_learns_weights_and_biases(files):
    """All of them; what is folded has no part in it, and the diagnosis is of what was learned."""
    state = run(files[0], finetune_stdb.train_loop)
    _, start = load_converted(NORMED, DIRECT, files[1]["train"], files[0])
    start.scale_thresholds(DIRECT.threshold_scale)
    learned = [n for n, p in start.net.named_parameters() if p.requires_grad]
    assert {"conv1.bias", "conv3.bias", "output.weight", "fc1.weight"} <= set(learned)
    assert not any("norm" in name for name in learned)
    before = start.net.state_dict()
    for name in learned:
        assert not torch.equal(before[name], state["network"][name]), name
    assert [row["layer"] for row in state["diagnosis"]] == LAYERS
    assert state["units"] == pytest.approx(start.thresholds)


def test_the_ann_of_what_was_learned_has_no_units(files):
    """Weights and biases of the ANN, batch norms folded, from the balanced and scaled network."""
    train = files[1]["train"]
    _, snn = load_converted(NORMED, DIRECT, train, files[0])
    snn.scale_thresholds(0.4)
    kept = copy.deepcopy(snn.net.state_dict())
    twin = finetune_stdb.learned_ann(worker(files[0], DIRECT, network=NORMED), snn, train)
    folded = build_snn(trained(files), DIRECT, 0)
    for name, parameter in folded.net.named_parameters():
        torch.testing.assert_close(twin.net.get_parameter(name), parameter, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(v, kept[n]) for n, v in snn.net.state_dict().items() if "bal" not in n)


def test_an_interrupted_fine_tuning_ends_as_a_whole_one(files):
    """The state is what is learned; units are those of the start."""
    params = DIRECT.model_copy(update={"epochs": 3})
    one = worker(files[0], params, network=NORMED)
    finetune_stdb.train_loop(one)
    again = worker(files[0], params, network=NORMED)
    again.states = one.states[:1]
    finetune_stdb.train_loop(again)
    end = one.states[-1]
    for name, value in end["network"].items():
        assert torch.equal(value, again.states[-1]["network"][name]), name
    assert end["test"] == again.states[-1]["test"]


def test_learned_bounds_are_handed_on(files, tmp_path):
    """V and A are the ANN's bounds, U_0 = V/2: the levels of QCFS are spike counts at T = L."""
    folder, parts = make_files(tmp_path)
    network = NORMED.model_copy(update={"activation": "qcfs", "levels": 4})
    ann = seen(network, parts["train"]).eval()
    stdb.start_bounds(ann, [parts["train"].pixels()])
    save_weights(ann.state_dict(), folder / ANN)
    learned = BALANCING.model_copy(update={"method": "learned"})
    one = worker(folder, DIRECT, network=network, balance_thresholds=learned)
    balance_thresholds.balance_loop(one)
    hand_on(one.states[-1], folder)
    _, snn = load_converted(network, DIRECT, parts["train"], folder)
    bounds = [m.bound.item() for m in ann.modules() if isinstance(m, stdb.QCFS)]
    assert list(snn.thresholds.values()) == pytest.approx(bounds)
    assert [neuron.unit for neuron in snn.neurons.values()] == pytest.approx(bounds)
    assert {neuron.initial_membrane for neuron in snn.neurons.values()} == {0.5}


# -- what is fixed in the ANN ----------------------------------------------------------------------


class Pruned(nn.Module):
    """Two convolutions with batch norm, one of them pruned, one layer frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten())
        self.output = nn.Linear(6 * 4 * 4, 10)
        for layer in (self.first[0], self.second[0]):
            prune.random_unstructured(layer, "weight", 0.4)
        self.output.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.output(self.second(self.first(images)))


def pruned_network(**_) -> nn.Module:
    """For ``network.architecture``."""
    return Pruned()


def test_what_is_pruned_or_frozen_stays_so(tmp_path):
    """Also where a norm is folded in; the file has plain weights."""
    folder, parts = make_files(tmp_path)
    own = {"architecture": f"{__name__}:pruned_network", "normalisation": "none"}
    network = NETWORK.model_copy(update=own)
    _, _, ann = handed_on(folder, parts, network)
    assert not any("mask" in name for name in load_file(folder / BALANCED))
    params = DIRECT.model_copy(update={"threshold_scale": 1.0, "learning_rate": 0.01})
    one = worker(folder, params, network=network)
    finetune_stdb.train_loop(one)
    _, snn = load_converted(network, params, parts["train"], folder)
    before = {n: p.detach().clone() for n, p in snn.net.named_parameters()}
    snn.net.load_state_dict(one.states[-1]["network"])
    for name in ("first.0", "second.0"):
        gone = ann.get_submodule(name).weight_mask == 0
        assert gone.any()
        layer = snn.net.get_submodule(name)
        next(iter(layer._forward_pre_hooks.values()))(layer, None)
        assert not layer.weight[gone].any()
        assert layer.weight[~gone].all()
        assert not torch.equal(before[f"{name}.weight_orig"], layer.weight_orig)
    assert torch.equal(before["output.weight"], snn.net.output.weight)


def test_a_pruned_layer_that_is_not_there_is_refused(files):
    """Its zeros would learn."""
    ann, snn = trained(files), balanced_here(files)
    other = nn.Sequential(nn.Linear(3, 3))
    prune.random_unstructured(other[0], "weight", 0.5)
    with pytest.raises(StageError, match=r"balanced\.safetensors has no layer 0, which is pruned"):
        keep_fixed(other, snn, files[0] / BALANCED)
    keep_fixed(ann, snn, files[0] / BALANCED)


# -- files of something else -----------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"text", "tensors", "old", "nan"])
def test_a_file_of_something_else_is_refused(copied, content):
    """The message names it, and what to do; of a stage's own making it never is."""
    path = copied / BALANCED
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["config"])
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        if content == "tensors":
            tensors.pop("conv1.bias")
        elif content == "old":  # of earlier versions
            about = {"units": dict.fromkeys(LAYERS, 1.0), "initial_membranes": {}}
        else:
            tensors["fc1.weight"].fill_(float("nan"))
        save_file(tensors, path, {"config": json.dumps(about)})
    with pytest.raises(StageError, match=r"(?s)balanced\.safetensors .*; run (balance_t|dvc r)"):
        load_balanced(path, about.get("network", {}))


def test_the_file_of_another_network_is_refused(files, tmp_path):
    """Other layers, other classes, other images; one without biases, and one with."""
    folder, parts = files
    train = parts["train"]
    path = folder / BALANCED
    wider = NORMED.model_copy(update={"width": 0.2})
    message = (
        r"balanced\.safetensors is of another network: its width is 0\.1, this one's 0\.2; run "
    )
    with pytest.raises(StageError, match=message + "balance_thresholds"):
        load_balanced(path, recipe(wider, train))
    for name, value in (("num_classes", 7), ("image_size", [8, 9]), ("in_channels", 3)):
        other = recipe(NORMED, train) | {name: value}
        with pytest.raises(StageError, match=rf"its {name} is \d+, this one's .*; run balance_t"):
            load_balanced(path, other)
    plain, _ = make_files(tmp_path)
    shutil.copy(folder / ANN, plain / ANN)
    with pytest.raises(StageError, match="one without biases or batch norm: it has no weights"):
        load_converted(NORMED, DIRECT, train, plain)
