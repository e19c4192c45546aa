"""Calibration in the pipeline: what a method cannot do, few steps, trials, workers."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch

import stdb
from pipeline import balance_thresholds, evaluate_converted, finetune_stdb, train_ann
from pipeline.data import load_split
from pipeline.errors import StageError
from pipeline.files import DATA
from pipeline.learning.networks import build_ann, build_snn
from pipeline.sweeps import trial
from tests.pipeline.support import (
    BALANCING,
    DIRECT,
    MSE,
    NETWORK,
    NORMED,
    PARAMS,
    RESNET,
    STDB,
    handed_on,
    make_files,
    worker,
)


def refused(folder, message, network=NETWORK, params=STDB, **changes) -> None:
    """The stage's loop ends with the message before anything is computed."""
    balancing = BALANCING.model_copy(update=changes)
    one = worker(folder, params, network=network, balance_thresholds=balancing)
    with pytest.raises(StageError, match=message):
        balance_thresholds.balance_loop(one)


def test_what_a_method_cannot_do_is_refused(tmp_path):
    """Said before anything is computed, with what is allowed."""
    plain, _ = make_files(tmp_path)
    refused(plain, "learned, and layer conv1 has no bound; allowed: ", method="learned")
    for method in ("learned", "mse", "maximum"):
        message = rf"percentile is 99\.0 with method: {method}; allowed: 100, or method: percentile"
        refused(plain, message, method=method, percentile=99.0)
    leaky = DIRECT.model_copy(update={"leak": 0.9})
    for method in ("learned", "mse"):
        message = rf"method is {method} with stdb\.leak: 0\.9; allowed: leak: 1"
        refused(plain, message, params=leaky, method=method)
    message = r"bias_correction is true with stdb\.leak: 0\.9; allowed: leak: 1"
    refused(plain, message, params=leaky, bias_correction=True)
    message = "balance_thresholds: per is channel with the method maximum; allowed: layer"
    refused(plain, message, per="channel")


def test_the_ann_is_not_trained_for_what_cannot_be_balanced(tmp_path, monkeypatch):
    """train_ann says it at its start."""
    folder, _ = make_files(tmp_path)
    monkeypatch.chdir(folder)
    leaky = DIRECT.model_copy(update={"leak": 0.9})
    sections = {"network": NORMED, "stdb": leaky, "balance_thresholds": MSE}
    stage = SimpleNamespace(params=PARAMS.model_copy(update=sections))
    with pytest.raises(StageError, match=r"method is mse with stdb\.leak: 0\.9; allowed: leak: 1"):
        train_ann.main(stage)


# -- calibration for few steps ---------------------------------------------------------------------


@pytest.mark.parametrize("network", [NORMED, RESNET, NETWORK], ids=["normed", "resnet", "paper"])
def test_a_network_calibrated_for_few_steps_is_handed_on(tmp_path, network):
    """What the engine finds at the T that is wanted, bit for bit, whatever it added."""
    folder, parts = make_files(tmp_path)
    snn, state, ann = handed_on(folder, parts, network)
    train = load_split(folder / DATA / "train.safetensors")  # in the stage's own memory order
    expected = stdb.convert(ann, stdb.DirectEncoder())
    generator = torch.Generator().manual_seed(MSE.seed)
    chosen = train.take(torch.randperm(len(train), generator=generator)[:20])
    found = stdb.balance_thresholds(
        expected, chosen.pixels(), DIRECT.timesteps, method="mse", batch_size=7,
        sample_ids=chosen.ids,
    )  # fmt: skip
    assert state["thresholds"] == dict(found)
    amplitudes = [neuron.amplitude for neuron in expected.neurons.values()]
    assert list(state["means"].values()) == pytest.approx([float(a.mean()) for a in amplitudes])
    for neuron, amplitude in zip(snn.neurons.values(), amplitudes, strict=True):
        assert torch.equal(neuron.amplitude, amplitude)
        assert neuron.initial_membrane == found.initial_membrane
    images = parts["test"].pixels()
    assert torch.equal(snn.eval()(images, 9), expected.eval()(images, 9))


def test_auto_is_mse_for_networks_with_biases_at_no_leak(tmp_path):
    """As the engine's: per channel; with a leak, or at a percentile, Algorithm 1."""
    folder, parts = make_files(tmp_path)
    auto = BALANCING.model_copy(update={"method": "auto"})
    snn, _, _ = handed_on(folder, parts, NORMED, auto)
    assert all(neuron.amplitude is not None for neuron in snn.neurons.values())
    leaky = DIRECT.model_copy(update={"leak": 0.99})
    snn, _, _ = handed_on(folder, parts, NORMED, auto, leaky)
    assert all(neuron.amplitude is None for neuron in snn.neurons.values())
    snn, _, _ = handed_on(folder, parts, NORMED, auto.model_copy(update={"percentile": 99.0}))
    assert all(neuron.amplitude is None for neuron in snn.neurons.values())


@pytest.mark.parametrize("network", [NORMED, RESNET], ids=["normed", "resnet"])
def test_a_calibrated_network_goes_through_the_stages(tmp_path, network):
    """Evaluated, diagnosed beside its ANN, fine-tuned; an interrupted one ends as a whole one."""
    folder, parts = make_files(tmp_path)
    start, _, ann = handed_on(folder, parts, network)
    own = PARAMS.evaluate_converted.model_copy(update={"timesteps": 40, "scales": [1.0]})
    one = worker(folder, DIRECT, network=network, evaluate_converted=own)
    evaluate_converted.evaluate_loop(one)
    rows = one.states[-1]["diagnosis"]
    assert min(row["correlation"] for row in rows) > 0.8
    train = parts["train"]
    twin = finetune_stdb.learned_ann(one, start, train)
    plain = stdb.convert(ann, stdb.DirectEncoder())
    images = train.pixels()[:8]
    assert {neuron.amplitude for neuron in twin.neurons.values()} == {None}
    shown = stdb.diagnose(twin, start, images, 30)
    expected = stdb.diagnose(plain, start, images, 30)
    for row, other in zip(shown, expected, strict=True):
        assert row.correlation == pytest.approx(other.correlation, abs=1e-4)
    params = DIRECT.model_copy(update={"epochs": 2, "threshold_scale": 1.0})
    whole = worker(folder, params, network=network)
    finetune_stdb.train_loop(whole)
    again = worker(folder, params, network=network)
    again.states = whole.states[:1]
    finetune_stdb.train_loop(again)
    end = whole.states[-1]
    for name, value in end["network"].items():
        assert torch.equal(value, again.states[-1]["network"][name]), name
    start.net.load_state_dict(end["best_network"])  # as the stage's main does


def test_the_metrics_are_those_of_the_validation_split(tmp_path):
    """At the T that is wanted, before the correction of biases and after it; dead channels."""
    folder, parts = make_files(tmp_path)
    params = DIRECT.model_copy(update={"timesteps": 2})
    snn, state, ann = handed_on(folder, parts, NORMED, params=params)
    found, validation = state["metrics"], parts["validation"]
    pixels = validation.pixels()
    networks = {"after": snn.eval()}
    if found["corrected"]:
        networks["before"] = stdb.uncorrected(snn)
    with torch.no_grad():
        decisions = {name: one(pixels, 2).argmax(1) for name, one in networks.items()}
        decisions["ann"] = ann(pixels).argmax(1)
    right = {n: (d == validation.labels).double().mean().item() for n, d in decisions.items()}
    assert found["accuracy"] == pytest.approx(right)
    assert (found["method"], found["per"], found["timesteps"]) == ("mse", "channel", 2)
    before, after = found["agreement"].values()
    assert found["corrected"] is (after > before)
    dead = {"conv1": 2, "conv3": 1}
    line = balance_thresholds.summary(found | {"dead_channels": dead})
    assert f"{found['accuracy']['after']:.2%}; ANN {right['ann']:.2%}" in line
    assert line.endswith("3 channels never fire, in conv1, conv3")
    logged = balance_thresholds.logged(found | {"dead_channels": dead})
    assert logged["accuracy/calibrated"] == found["accuracy"]["after"]
    assert logged["agreement/uncorrected"] == before
    assert logged["dead_channels/conv1"] == 2


def test_algorithm_1_has_no_accuracy_of_its_own(tmp_path):
    """Thresholds for many steps say nothing at few; evaluate_converted scales them first."""
    _, state, _ = handed_on(*make_files(tmp_path), NORMED, BALANCING)
    found = state["metrics"]
    assert found["accuracy"] is None
    assert found["agreement"] is None
    assert balance_thresholds.summary(found) == "maximum per layer"


def test_a_trial_calibrates_for_its_own_steps(tmp_path, monkeypatch):
    """With mse the network depends on T; by Algorithm 1 what was handed on does for any."""
    folder, parts = make_files(tmp_path)
    handed, _, _ = handed_on(folder, parts, NORMED)
    few = DIRECT.model_copy(update={"timesteps": 2})
    one = worker(folder, few, network=NORMED, balance_thresholds=MSE)
    _, own = trial.starting_point(one, parts["train"])
    expected, _, _ = handed_on(folder, parts, NORMED, params=few)
    images = parts["test"].pixels()
    assert torch.equal(own.eval()(images, 3), expected.eval()(images, 3))
    assert not torch.equal(own(images, 3), handed.eval()(images, 3))
    monkeypatch.setattr(trial, "calibrate", None)  # is not called any more
    _, again = trial.starting_point(one, parts["train"])
    assert torch.equal(again.eval()(images, 3), expected(images, 3))
    handed_on(folder, parts, NORMED, BALANCING)
    by_currents = worker(folder, few, network=NORMED, balance_thresholds=BALANCING)
    trial.starting_point(by_currents, parts["train"])


@pytest.mark.parametrize(("handed", "tried"), [(1.0, 0.95), (0.95, 1.0)])
def test_a_trial_calibrates_for_its_own_leak(tmp_path, handed, tried):
    """What ``auto`` is with one, Algorithm 1, is not what it is without."""
    folder, parts = make_files(tmp_path)
    auto = BALANCING.model_copy(update={"method": "auto"})
    with_leak = {leak: DIRECT.model_copy(update={"leak": leak}) for leak in (handed, tried)}
    handed_on(folder, parts, NORMED, auto, params=with_leak[handed])
    one = worker(folder, with_leak[tried], network=NORMED, balance_thresholds=auto)
    _, own = trial.starting_point(one, parts["train"])
    expected, _, _ = handed_on(folder, parts, NORMED, auto, params=with_leak[tried])
    images = parts["test"].pixels()
    assert torch.equal(own.eval()(images, 3), expected.eval()(images, 3))


def test_random_weights_do_without_what_was_handed_on(tmp_path):
    """Their layers are a fresh conversion's, without what a calibration added."""
    folder, parts = make_files(tmp_path)
    handed_on(folder, parts, RESNET)
    params = DIRECT.model_copy(update={"from_scratch": True, "threshold_scale": 1.0})
    one = worker(folder, params, network=RESNET)
    finetune_stdb.train_loop(one)
    snn = build_snn(build_ann(RESNET, parts["train"]), params, params.seed, parts["train"])
    snn.net.load_state_dict(one.states[-1]["best_network"])
    assert one.states[-1]["correction"] is None


class Together:
    """Workers in threads of this process, and what they add up."""

    def __init__(self, world: int) -> None:
        self.values: list = [None] * world
        self.barrier = Barrier(world)

    def reduce(self, rank: int, value, op: str):
        self.values[rank] = value.clone()
        self.barrier.wait(60)
        stacked = torch.stack(self.values)
        self.barrier.wait(60)
        return value.copy_(stacked.amax(0) if op == "max" else stacked.sum(0))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("method", ["mse", "maximum"])
def test_any_number_of_workers_hands_on_the_same_bytes(tmp_path, world, method):
    """Three batches, of which the last is smaller."""
    folder, parts = make_files(tmp_path)
    balancing = MSE.model_copy(update={"method": method, "bias_correction": True})
    _, state, _ = handed_on(folder, parts, NORMED, balancing)
    together = Together(world)

    def part(rank: int) -> torch.Tensor:
        torch.set_num_threads(1)
        one = worker(folder, DIRECT, network=NORMED, balance_thresholds=balancing)
        one.rank, one.world = rank, world
        one.all_reduce = lambda value, op="sum": together.reduce(rank, value, op)
        balance_thresholds.balance_loop(one)
        return one.states[-1]["balanced"]

    with ThreadPoolExecutor(world) as pool:
        for found in pool.map(part, range(world)):
            assert torch.equal(found, state["balanced"])
