"""What each worker does, run in this process as the only worker: the loops of the stages."""

import copy
import dataclasses
import os
import pty
import shutil
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.nn.functional as F

import pipeline.jobs.worker
import pipeline.learning.finetuning
import stdb
from pipeline import balance_thresholds, evaluate_converted, finetune_stdb, train_ann
from pipeline.files import ANN, DATA
from pipeline.learning.evaluation import (
    evaluate_ann,
    evaluate_snn,
    fitting_logit_scale,
    levels_of,
)
from pipeline.learning.finetuning import fitting_chunk, free_memory
from pipeline.learning.fit import order
from pipeline.learning.networks import build_ann, load_weights, save_weights, surrogate_of
from pipeline.params import DistilParams, StdbParams
from tests.pipeline.support import (
    NETWORK,
    PARAMS,
    STDB,
    KeptWorker,
    make_files,
    starting,
    worker,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A repository's files, as earlier stages leave them, and its splits."""
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def alone(files):
    """A plain worker on these files."""
    return worker(files[0])


def run(files, loop, **sections):
    """Run a stage's loop as the one worker of a job; returns the state that it keeps last."""
    one = worker(files[0], **sections)
    loop(one)
    return one.states[-1]


def finetune(files, params: StdbParams = STDB):
    return run(files, finetune_stdb.train_loop, stdb_params=params)


@pytest.mark.parametrize(
    ("truncate", "windows"), [(None, [5]), (5, [5]), (9, [5]), (2, [2, 2, 1]), (1, [1] * 5)]
)
def test_truncated_bptt_adds_up_the_gradients_of_its_windows(files, truncate, windows):
    """Two steps of Adam on the windows of §2.2, written out, give the stage's weights exactly."""
    params = STDB.model_copy(update={"timesteps": 5, "truncate": truncate, "seed": 4})
    state = finetune(files, params)
    snn, train = starting(files, params), files[1]["train"]
    snn.train()
    optimizer = torch.optim.Adam(
        [p for p in snn.parameters() if p.requires_grad], lr=1e-3, amsgrad=True, fused=True
    )
    batches = order(len(train), 24, 4, 1)
    assert len(batches) == 2
    for batch in batches:
        share = train.take(batch)
        presentation = snn.present(share.pixels(), sample_ids=share.ids, epoch=1)
        optimizer.zero_grad()
        for steps in windows:
            F.cross_entropy(snn(presentation, steps), share.labels).backward()
        optimizer.step()
    start = starting(files, params).net.state_dict()
    for name, value in snn.net.state_dict().items():
        assert torch.equal(value, state["best_network"][name]), name
    assert not torch.equal(start["conv1.weight"], state["best_network"]["conv1.weight"])


def test_the_scale_of_the_logits_is_that_of_the_least_loss(files, alone):
    """Over all images of a split, on a fine grid."""
    snn, split = starting(files, STDB).eval(), files[1]["validation"]
    with torch.no_grad():
        logits = snn(split.pixels(), 9, sample_ids=split.ids)
    guess = torch.arange(len(split)) % 3 == 0  # what the network does not know
    labels = torch.where(guess, split.labels, logits.argmax(1))
    known = dataclasses.replace(split, labels=labels)
    scales = [2 ** (k / 40) for k in range(-400, 80)]
    losses = {s: float(F.cross_entropy(logits.double() * s, labels)) for s in scales}
    best = min(losses, key=losses.get)
    assert 0.01 < best < 0.7
    assert fitting_logit_scale(alone, snn, known, 9, 16) == pytest.approx(best, rel=0.1)


def test_the_output_is_scaled_before_the_fine_tuning(files, monkeypatch):
    """By the parameter; auto: as fits validation; random weights are left as they are."""
    still = STDB.model_copy(update={"learning_rate": 1e-30})
    start = starting(files, still).net.state_dict()
    finetuning = pipeline.learning.finetuning
    monkeypatch.setattr(finetuning, "fitting_logit_scale", lambda *arguments: 0.125)
    for scale, factor in (("auto", 0.125), (0.5, 0.5), (1.0, 1.0)):
        found = finetune(files, still.model_copy(update={"logit_scale": scale}))["network"]
        assert torch.equal(found["output.weight"], factor * start["output.weight"])
        assert torch.equal(found["fc2.weight"], start["fc2.weight"])
    scratch = still.model_copy(update={"from_scratch": True})
    one, auto = (
        finetune(files, scratch.model_copy(update={"logit_scale": scale}))["network"]
        for scale in (1.0, "auto")
    )
    assert torch.equal(one["output.weight"], auto["output.weight"])


def test_windows_of_truncated_bptt_change_the_result(files):
    """Were truncate ignored, all of these would be equal."""
    found = [
        finetune(files, STDB.model_copy(update={"timesteps": 5, "truncate": n}))["best_network"]
        for n in (None, 2, 1)
    ]
    first = [state["conv1.weight"] for state in found]
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])


@pytest.mark.parametrize(
    "change",
    [
        {"timesteps": 4},
        {"encoder": "direct"},
        {"leak": 0.9},
        {"surrogate": "linear"},
        {"alpha": 0.5},
        {"beta": 0.5},
        {"over_threshold": True},
        {"precision": "bf16"},
        {"from_scratch": True},
        {"truncate": 1},
        {"dropout": 0.0},
        {"dropout": None},
        {"batch_size": 12},
        {"learning_rate": 1e-2},
        {"weight_decay": 0.5},
        {"augment": True},
        {"seed": 1},
    ],
    ids=str,
)
def test_every_parameter_of_the_fine_tuning_has_an_effect(files, change):
    """A parameter that is checked and tracked and then not used would be a lie."""
    before, after = (
        finetune(files, params)["network"] for params in (STDB, STDB.model_copy(update=change))
    )
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


def test_auto_learns_with_the_surrogate_for_its_time_steps(files):
    """As if that one had been named, bit for bit; it is another one above 16."""
    left = {"surrogate": "auto", "alpha": None, "beta": None, "over_threshold": None}
    named = {"surrogate": "rectangle", "alpha": 1.0, "beta": 1.0, "over_threshold": True}
    auto, same = (
        finetune(files, STDB.model_copy(update=change))["network"] for change in (left, named)
    )
    assert all(torch.equal(value, same[name]) for name, value in auto.items())
    assert surrogate_of(STDB.model_copy(update=left | {"timesteps": 17})) == stdb.STDB()


def test_the_temporal_gradient_has_an_effect(files):
    """Without the leak path the gradient of more than one step is another one."""
    base = STDB.model_copy(update={"timesteps": 6, "alpha": 1.0})
    with_path, without = (
        finetune(files, base.model_copy(update={"temporal_gradient": on}))["network"]
        for on in (True, False)
    )
    assert not torch.equal(with_path["conv1.weight"], without["conv1.weight"])


def test_chunks_change_memory_only(files):
    """One time step at once, or all of them: the same weights."""
    base = STDB.model_copy(update={"timesteps": 5})
    whole, single = (
        finetune(files, base.model_copy(update={"chunk": chunk}))["network"] for chunk in (None, 1)
    )
    for name, value in whole.items():
        torch.testing.assert_close(value, single[name], rtol=0, atol=1e-5)


def test_the_fine_tuning_reports_the_best_networks_accuracy(files):
    """The test accuracy is that of the weights that are kept, measured once more here."""
    state = finetune(files, STDB)
    snn, test = starting(files, STDB), files[1]["test"]
    snn.net.load_state_dict(state["best_network"])
    again = evaluate_snn(worker(files[0]), snn, test, 3, 50)
    assert vars(again) == state["test"]
    assert state["curve"][:3] == again.accuracy
    assert len(state["curve"]) == 16


def test_an_interrupted_fine_tuning_ends_where_a_whole_one_ends(files):
    """From any step of any epoch: all epochs have their dropout, order and log."""
    params = STDB.model_copy(update={"epochs": 3, "batch_size": 16, "dropout": 0.5})
    often = PARAMS.cluster.model_copy(update={"checkpoint_steps": 2})
    whole = worker(files[0], params, cluster=often)
    finetune_stdb.train_loop(whole)
    end = whole.states[-1]
    within = [state for state in whole.states if "step" in state]
    assert [(state["epoch"], state["step"]) for state in within] == [(0, 2), (1, 2), (2, 2)]
    for state in within:
        resumed = worker(files[0], params, cluster=often)
        resumed.states.append(copy.deepcopy(state))
        finetune_stdb.train_loop(resumed)
        assert resumed.states[-1]["history"] == end["history"]
        for name, value in end["network"].items():
            again = resumed.states[-1]["network"][name]
            assert torch.equal(value, again), (state["epoch"], name)


def test_from_scratch_nothing_of_the_ann_is_left(files, tmp_path):
    """Other weights and no thresholds of the ANN give the same network; another seed another."""
    params = STDB.model_copy(update={"from_scratch": True, "threshold_scale": 1.0})
    first = finetune(files, params)["network"]
    shutil.copytree(files[0] / DATA, tmp_path / DATA)
    torch.manual_seed(99)
    (tmp_path / ANN.parent).mkdir()
    save_weights(build_ann(NETWORK, files[1]["train"]).state_dict(), tmp_path / ANN)
    again = finetune((tmp_path, files[1]), params)["network"]
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    other = finetune(files, params.model_copy(update={"seed": 5}))["network"]
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def balance(files, params: StdbParams, **changes):
    own = PARAMS.balance_thresholds.model_copy(update={"timesteps": 10, "images": 20} | changes)
    loop = balance_thresholds.balance_loop
    return run(files, loop, stdb_params=params, balance_thresholds=own)["thresholds"]


UNTRACKED_BY_BALANCING = {
    "timesteps": 9,
    "leak": 0.5,
    "surrogate": "linear",
    "alpha": 0.9,
    "beta": 0.9,
    "over_threshold": True,
    "temporal_gradient": False,
    "learn_thresholds": True,
    "learn_leaks": True,
    "from_scratch": True,
    "truncate": 1,
    "micro_batch": 2,
    "threshold_scale": 0.3,
    "logit_scale": 0.5,
    "distil": DistilParams(weight=0.7, temperature=2),
    "dropout": 0.9,
    "seed": 7,
}


@pytest.mark.parametrize("name", UNTRACKED_BY_BALANCING)
def test_balancing_depends_on_no_parameter_that_it_does_not_track(files, name):
    """dvc.yaml lists encoder and precision of stdb: nothing else may change the thresholds."""
    changed = STDB.model_copy(update={name: UNTRACKED_BY_BALANCING[name]})
    assert balance(files, changed) == balance(files, STDB)


def test_balancing_depends_on_what_it_tracks(files):
    """What is tracked reaches Algorithm 1; the batch size does not matter."""
    first = balance(files, STDB)
    assert balance(files, STDB.model_copy(update={"precision": "bf16"})) != first
    assert balance(files, STDB.model_copy(update={"encoder": "direct"})) != first
    assert balance(files, STDB, timesteps=40) != first
    assert balance(files, STDB, images=45) != first
    assert balance(files, STDB, seed=1) != first
    assert balance(files, STDB, batch_size=7) == pytest.approx(first, rel=1e-5)


def evaluate(files, params: StdbParams):
    own = PARAMS.evaluate_converted.model_copy(update={"timesteps": 6, "scales": [1.0, 0.3, 0.6]})
    loop = evaluate_converted.evaluate_loop
    return run(files, loop, stdb_params=params, evaluate_converted=own)


@pytest.mark.parametrize(
    "name", sorted(set(UNTRACKED_BY_BALANCING) - {"timesteps", "leak", "seed"})
)
def test_evaluation_depends_on_no_parameter_that_it_does_not_track(files, name):
    """dvc.yaml lists T, leak, encoder, precision, seed: nothing else may change the metrics."""
    changed = STDB.model_copy(update={name: UNTRACKED_BY_BALANCING[name]})
    assert evaluate(files, changed) == evaluate(files, STDB)


def test_evaluation_takes_the_scale_that_is_best_on_validation(files, alone):
    """Each scale measured here again, the first of the best is the one; curves are its own."""
    state, parts = evaluate(files, STDB), files[1]
    snn = starting(files, STDB)
    accuracy = {}
    for scale in (1.0, 0.3, 0.6):
        snn.scale_thresholds(scale)
        accuracy[scale] = evaluate_snn(alone, snn, parts["validation"], 3, 128).accuracy[-1]
    assert state["scale"] == max(accuracy, key=accuracy.get)
    snn.scale_thresholds(state["scale"])
    assert state["reduced"] == vars(evaluate_snn(alone, snn, parts["test"], 3, 128))
    snn.scale_thresholds(1.0)
    assert state["long"] == vars(evaluate_snn(alone, snn, parts["test"], 6, 128))


def test_evaluation_looks_at_the_ann_with_as_many_levels(files):
    """At the balanced thresholds up to the long T, at the best scale at T, image by image."""
    state, test = evaluate(files, STDB), files[1]["test"]
    snn = starting(files, STDB).eval()
    counts = {1.0: [1, 2, 4, 6]} | {state["scale"]: [1, 2, 3, 4, 6]}
    assert {scale: list(found) for scale, found in state["quantised"].items()} == counts
    for scale, found in state["quantised"].items():
        snn.scale_thresholds(scale)
        for levels, accuracy in found.items():
            images = test.pixels().split(1)
            decided = torch.cat([stdb.quantised_logits(snn, x, levels).argmax(1) for x in images])
            assert accuracy == (decided == test.labels).double().mean().item()


@pytest.mark.parametrize(
    ("timesteps", "most", "levels"),
    [
        ([4], 16, [1, 2, 3, 4, 8, 16]),
        ([100, 70], 250, [*range(1, 11), 16, 32, 64, 70, 100, 128, 250]),
        ([1], 6, [1, 2, 4, 6]),
        ([12], 5, [1, 2, 3, 4, 5]),
    ],
)
def test_levels_are_powers_of_two_and_t_and_each_of_the_first(timesteps, most, levels):
    """Of a large T few, since each is a pass over the split."""
    assert levels_of(timesteps, most) == levels


def share_of_two(files, rank):
    """One of two workers whose sums are not added up."""
    one = worker(files[0])
    one.rank, one.world = rank, 2
    one.all_reduce = lambda value, op="sum": value
    return one


def test_a_long_evaluation_says_how_far_it_is(files, alone, monkeypatch, capsys):
    """Every so many seconds; the first worker, for all of them."""
    monkeypatch.setattr(pipeline.jobs.worker, "LOG_EVERY", -1.0)
    snn, test = starting(files, STDB), files[1]["test"]
    evaluate_snn(alone, snn, test, 3, len(test) // 2)
    assert f"T = 3: {len(test) // 2} of {len(test)} images presented" in capsys.readouterr().out
    evaluate_snn(share_of_two(files, 1), snn, test, 3, len(test) // 2)
    assert capsys.readouterr().out == ""


def test_progress_is_one_line_on_a_terminal(files, monkeypatch):
    """It is written over, and nothing of it stays when something is said."""
    monkeypatch.setattr(pipeline.jobs.worker, "TERMINAL_EVERY", -1.0)
    ours, theirs = pty.openpty()
    with open(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        one = worker(files[0])
        one.progress("step 1")
        one.progress("step 2")
        one.say("done")
        terminal.flush()
        written = os.read(ours, 1000).decode()
    os.close(ours)
    first, second, third = written.split("\r\033[K")[1:]
    assert first.endswith("step 1")
    assert second.endswith("step 2")
    assert third.endswith("done\r\n")


def test_the_shares_of_the_workers_add_up_to_the_whole_evaluation(files, alone):
    """Accuracy and spikes are exact counts: two halves, and any batch size, give the whole."""
    snn, test = starting(files, STDB), files[1]["test"]
    whole = evaluate_snn(alone, snn, test, 3, 128)
    assert vars(evaluate_snn(alone, snn, test, 3, 7)) == vars(whole)
    both = [share_of_two(files, rank) for rank in range(2)]
    halves = [evaluate_snn(one, snn, test, 3, 128).accuracy for one in both]
    assert [a + b for a, b in zip(*halves, strict=True)] == pytest.approx(whole.accuracy)
    ann = build_ann(NETWORK, test)
    parts = [evaluate_ann(one, ann, test, 16) for one in both]
    assert sum(parts) == pytest.approx(evaluate_ann(alone, ann, test, 128))


def test_weights_of_ones_own_stand_in_for_the_training(files):
    """train_ann.weights: nothing is trained, the file's network is evaluated and passed on."""
    folder, parts = files
    params = PARAMS.train_ann.model_copy(update={"weights": str(folder / ANN)})
    state = run(files, train_ann.train_loop, train_ann=params)
    ann = build_ann(NETWORK, parts["train"])
    load_weights(ann, folder / ANN)
    assert state["history"] == []
    for name, value in ann.state_dict().items():
        assert torch.equal(value, state["best_network"][name])
    assert state["test"] == evaluate_ann(worker(folder), ann, parts["test"], 64)


def test_the_anns_energy_is_a_multiply_accumulate_at_every_synapse(files):
    """Against the count written out for a network of one hidden layer."""
    images = files[1]["train"]
    ann = torch.nn.Sequential()
    ann.add_module("flatten", torch.nn.Flatten())
    ann.add_module("fc1", torch.nn.Linear(64, 12, bias=False))
    ann.add_module("relu", torch.nn.ReLU())
    ann.add_module("fc2", torch.nn.Linear(12, 10, bias=False))
    each = stdb.statistics.MULTIPLY_ACCUMULATE_PJ
    assert stdb.ann_energy(ann, images.shape) == pytest.approx(each * (64 * 12 + 12 * 10))


def test_trials_at_once_share_the_free_memory(files, monkeypatch):
    """Each counts on its share alone; workers of a trial share that."""
    there = SimpleNamespace(available=1200)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: there)
    assert free_memory(worker(files[0])) == 1200
    assert free_memory(KeptWorker(PARAMS, files[0], sharing=3)) == 400
    assert free_memory(KeptWorker(PARAMS, files[0], world=2, sharing=3)) == 200


def test_a_training_that_will_not_fit_is_said_before_it_starts(files, capsys):
    """The chunk shrinks first, which changes no result; where that is not enough, a warning."""
    snn, shape = starting(files, STDB), files[1]["train"].shape
    params = STDB.model_copy(update={"timesteps": 100})
    one = worker(files[0], params)
    (at_t,) = params.at_each()
    assert fitting_chunk(one, snn, shape, at_t, 1 << 40) == 10  # about 256 images at once
    assert "a training step takes about 0.1 GB of 1099.5 GB free" in capsys.readouterr().out
    little = stdb.training_memory(snn, shape, 100, 24, 4)
    assert (fitting := fitting_chunk(one, snn, shape, at_t, little)) in (2, 4, 5)
    assert fitting_chunk(one, snn, shape, at_t, 1 << 40, fitting) == fitting  # as it began
    assert fitting_chunk(one, snn, shape, at_t, little, 10) == fitting  # which does not fit here
    assert "warning" not in capsys.readouterr().out
    assert fitting_chunk(one, snn, shape, at_t, 1000) == 1
    assert "warning: a training step takes about" in capsys.readouterr().out
    small = at_t.model_copy(update={"micro_batch": 1, "chunk": 3})
    assert fitting_chunk(one, snn, shape, small, 1 << 40) == 3
