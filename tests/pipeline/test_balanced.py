"""Networks with batch norm: what balancing hands on, and what later stages make of it."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import stdb
from pipeline import balance_thresholds, evaluate_converted, finetune_stdb
from pipeline.errors import StageError
from pipeline.files import ANN, BALANCED, THRESHOLDS
from pipeline.learning.balanced import balanced_state, load_balanced, save_balanced
from pipeline.learning.networks import build_ann, build_snn, load_converted, save_weights
from pipeline.learning.weights import load_weights
from tests.pipeline.support import NETWORK, NORMED, PARAMS, STDB, make_files, worker

LAYERS = ["conv1", "conv2", "conv3", "fc1", "fc2"]
DIRECT = STDB.model_copy(update={"encoder": "direct", "timesteps": 12, "threshold_scale": 0.2})
BALANCING = PARAMS.balance_thresholds.model_copy(update={"timesteps": 10, "images": 20})


def run(folder, loop, params=DIRECT, **sections):
    """A stage's loop on a network with batch norm, as the one worker; the state it ends with."""
    one = worker(folder, params, network=NORMED, **sections)
    loop(one)
    return one.states[-1]


def hand_on(state, folder) -> None:
    """What the stage's main writes."""
    rows = [{"layer": n, "threshold": v, "balanced": True} for n, v in state["thresholds"].items()]
    (folder / THRESHOLDS).write_text(json.dumps({"layers": rows}))
    save_balanced(state["balanced"], folder / BALANCED)


def seen(network, train) -> torch.nn.Module:
    """An ANN whose norms know the images."""
    torch.manual_seed(3)
    ann = build_ann(network, train).train()
    for _ in range(20):
        ann(train.pixels())
    return ann


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
    assert not any("norm" in name or "leak" in name for name in kept)


def test_what_is_loaded_is_the_file(copied, files):
    """Whatever a later method does to biases and U_0, evaluation and fine-tuning start from it."""
    tensors = load_file(copied / BALANCED)
    tensors["conv1.bias"] += 0.25
    about = {"units": dict.fromkeys(LAYERS, 2.5), "initial_membranes": dict.fromkeys(LAYERS, 0.5)}
    save_file(tensors, copied / BALANCED, {"config": json.dumps(about)})
    _, snn = load_converted(NORMED, DIRECT, files[1]["train"], copied)
    assert torch.equal(snn.net.get_parameter("conv1.bias"), tensors["conv1.bias"])
    assert {n.initial_membrane for n in snn.neurons.values()} == {0.5}
    assert {n.unit for n in snn.neurons.values()} == {2.5}


def test_the_leak_is_that_of_the_parameters(files):
    """Balancing does not track stdb.leak, so that its file does not have it."""
    params = DIRECT.model_copy(update={"leak": 0.9})
    _, snn = load_converted(NORMED, params, files[1]["train"], files[0])
    assert {round(n.leak.item(), 4) for n in snn.neurons.values()} == {0.9}


def test_a_network_of_the_papers_kind_hands_on_its_thresholds_alone(files, tmp_path):
    """Its weights are the ANN's; the file is there and has nothing."""
    snn = build_snn(build_ann(NETWORK, files[1]["train"]), STDB, 0)
    save_balanced(balanced_state(snn), tmp_path / "balanced.safetensors")
    assert load_file(tmp_path / "balanced.safetensors") == {}


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


def test_bounds_are_learned_with_biases_alone(files, tmp_path):
    """Said before anything is computed, with what is allowed."""
    plain, _ = make_files(tmp_path)
    learned = BALANCING.model_copy(update={"method": "learned"})
    with pytest.raises(StageError, match="learned, and layer conv1 has no bound; allowed: "):
        balance_thresholds.balance_loop(worker(plain, balance_thresholds=learned))
    clipped = NETWORK.model_copy(update={"activation": "clip"})
    ann = build_ann(clipped, files[1]["train"])
    save_weights(ann.state_dict(), plain / ANN)
    one = worker(plain, network=clipped, balance_thresholds=learned)
    with pytest.raises(StageError, match="without biases or batch norm; allowed: method: maximum"):
        balance_thresholds.balance_loop(one)
    wrong = learned.model_copy(update={"percentile": 99.0})
    with pytest.raises(StageError, match=r"percentile is 99\.0 with method: learned"):
        balance_thresholds.balance_loop(worker(plain, network=clipped, balance_thresholds=wrong))
    leaky = DIRECT.model_copy(update={"leak": 0.9})
    with pytest.raises(StageError, match=r"stdb\.leak: 0\.9; allowed: leak: 1"):
        balance_thresholds.balance_loop(
            worker(plain, leaky, network=clipped, balance_thresholds=learned)
        )


@pytest.mark.parametrize("content", [b"", b"text", "tensors", "another", "units", "nan"])
def test_a_file_of_something_else_is_refused(copied, files, content):
    """The message names it, and what to do; of a stage's own making it never is."""
    tensors = load_file(copied / BALANCED)
    about = {"units": dict.fromkeys(LAYERS, 1.0), "initial_membranes": dict.fromkeys(LAYERS, 0.0)}
    if isinstance(content, bytes):
        (copied / BALANCED).write_bytes(content)
    else:
        if content == "tensors":
            tensors.pop("conv1.bias")
        elif content == "another":
            about["units"] = about["initial_membranes"] = {"conv9": 1.0}
        elif content == "units":
            about["initial_membranes"]["fc1"] = 1.5
        else:
            tensors["fc1.weight"].fill_(float("nan"))
        save_file(tensors, copied / BALANCED, {"config": json.dumps(about)})
    snn = build_snn(trained(files), DIRECT, 0)
    with pytest.raises(StageError, match=r"balanced\.safetensors"):
        load_balanced(snn, copied / BALANCED)
