"""Sweeps: what may be searched, what wins, what stops and what it costs; and the whole chain."""

import csv
import json
import math
import os
import pickle
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import mlflow
import pytest
import torch
import yaml
from ray.tune.schedulers import TrialScheduler
from safetensors.torch import load_file

import pipeline.sweeps.trial
from pipeline.errors import ParamsError, StageError
from pipeline.files import ANN
from pipeline.learning.networks import described
from pipeline.learning.weights import save_weights
from pipeline.overlays import apply, merge
from pipeline.params import DistilParams, Params, load_params
from pipeline.sweep import changes, check_trials, doubts
from pipeline.sweeps.front import candidates, choose, draw_curves, draw_parallel, front
from pipeline.sweeps.search import plan_trials, work_folder
from pipeline.sweeps.space import BudgetParams, ResourceParams, load_sweep, samples, settings
from pipeline.sweeps.trial import adopt, states_of
from pipeline.sweeps.tuner import ACCURACY, Budget, Halving, can_go_on
from pipeline.typed import read_yaml, validate
from tests.pipeline.dependencies import covered, needed
from tests.pipeline.support import (
    BALANCING,
    DIRECT,
    LAYER_THRESHOLDS,
    MSE,
    NORMED,
    PARAMS,
    ROOT,
    STDB,
    Started,
    based,
    copy_of,
    handed_on,
    make_files,
    worker,
)

LEVELS = NORMED.model_copy(update={"activation": "qcfs", "levels": 4})
TEXT = (ROOT / "sweep/params.yaml").read_text()
SPACE = TEXT[TEXT.index("space:") :]


def load(tmp_path, before="", after="", space=None, base=PARAMS):
    assert before in TEXT, f"{before!r} is not in sweep/params.yaml"
    text = TEXT.replace(before, after, 1)
    if space is not None:
        text = text.replace(SPACE, "space:\n" + "".join(f"  {line}\n" for line in space))
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return load_sweep(path, base)


def refusal(tmp_path, *change, **changes) -> str:
    with pytest.raises(ParamsError) as caught:
        load(tmp_path, *change, **changes)
    return str(caught.value)


# -- what may be searched --------------------------------------------------------------------------


def test_every_parameter_of_a_sweep_is_documented():
    """As those of the pipeline are."""
    sweep = load_sweep(ROOT / "sweep/params.yaml", PARAMS)
    for part in (type(sweep), BudgetParams, ResourceParams):
        for name, field in part.model_fields.items():
            assert field.description or name in ("budget", "asha", "resources"), name


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (["alhpa: {choice: [0.3]}"], "space.alhpa is nothing to search; allowed: batch_size"),
        (["epochs: {choice: [3]}"], "space.epochs is nothing to search"),
        (["alpha: {choice: [0.3], uniform: [0, 1]}"], "allowed: exactly one of choice, grid, uni"),
        (["alpha: {}"], "says nothing; allowed: exactly one of"),
        (["alpha: {normal: [0, 1]}"], "space.alpha.normal is no known key; allowed: choice, grid"),
        (["alpha: {uniform: [1, 0.5]}"], "uniform is [1.0, 0.5]; allowed: the smaller number fi"),
        (["alpha: {log_uniform: [0, 1]}"], "log_uniform is [0.0, 1.0]; allowed: numbers above 0"),
        (["timesteps: {integer: [4, 8.5]}"], "space.timesteps.integer.1 is 8.5; allowed: int"),
        (["leak: {uniform: [0.5, 1.5]}"], "space: leak is 1.5; allowed: "),
        (["timesteps: {choice: [8, 0]}"], "space: timesteps is 0; allowed: "),
        (["surrogate: {choice: [stdb, sigmoid]}"], "space: surrogate is 'sigmoid'; allowed: "),
        (["alpha: {choice: [1.0]}", "alpha_100: {choice: [1.0]}"], "has alpha_100 and alpha; all"),
        (["alpha: {grid: [0.1]}"], "space.alpha is grid and method is optuna; allowed: grid wit"),
    ],
)
def test_what_cannot_be_searched_is_refused(tmp_path, space, message):
    """Before anything starts, with what is allowed; also a value that params.yaml would refuse."""
    assert message in refusal(tmp_path, space=space)


def test_values_that_exclude_each_other_are_refused_wherever_they_stand_in_a_list(tmp_path):
    """A trial that draws them would fail after the start; T decides nothing of it."""
    space = ["surrogate: {choice: [stdb, auto, linear]}", "beta_100: {log_uniform: [0.01, 0.1]}"]
    null = {"alpha": None, "beta": None, "over_threshold": None}
    with pytest.raises(ParamsError, match="with surrogate: auto"):
        load(tmp_path, space=space, base=based(**null))


def test_a_list_of_t_in_the_parameters_does_not_speak_for_the_trials(tmp_path):
    """Each has a T of its own, at which values have to be allowed, and no list."""
    space = ["timesteps: {choice: [20, 40]}", "truncate: {choice: [8, 10]}"]
    falling = {"timesteps": [8, 4], "logit_scale": "auto"}
    sweep = load(tmp_path, space=space, base=based(**falling))
    assert sweep.space["truncate"].values == [8, 10]


def test_a_grid_has_values_only(tmp_path):
    """And knows how many combinations it has."""
    both = ["alpha: {grid: [0.1, 0.2]}", "seed: {grid: [0, 1, 2]}"]
    assert load(tmp_path, "method: optuna ", "method: grid ", space=both).combinations == 6
    many = ["alpha: {grid: [0.1, 0.2]}", f"seed: {{grid: {[*range(13)]}}}"]
    assert "trials is 24 and the grid has 26 combinations; allowed: trials of at lea" in refusal(
        tmp_path, "method: optuna ", "method: grid ", space=many
    )
    mixed = ["alpha: {grid: [0.1, 0.2]}", "beta: {uniform: [0, 1]}"]
    assert "space.beta is uniform and method is grid" in refusal(
        tmp_path, "method: optuna ", "method: grid ", space=mixed
    )
    assert "asha.grace is 9; allowed: up to epochs, 4" in refusal(tmp_path, "grace: 1", "grace: 9")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (["method: {choice: [mse, best]}"], "space: method is 'best'; allowed: "),
        (["initial_membrane: {uniform: [0.3, 1.0]}"], "space: initial_membrane is 1.0; allowed: "),
        (["distil_weight: {choice: [0.5, 2.0]}"], "space: distil.weight is 2.0; allowed: "),
        (["distil_weight: {choice: [high]}"], "space: distil_weight is 'high'; allowed: a number"),
        (["levels: {choice: [4, 8]}"], "levels is 8; allowed: 4, which network.levels is, and"),
        (["levels: {choice: [[4], 4]}"], r"levels is \[4\]; allowed: "),
        (["levels: {integer: [2, 4]}"], "levels is integer; allowed: choice, grid"),
    ],
)
def test_a_calibration_that_cannot_be_searched_is_refused(tmp_path, space, message):
    """As what params.yaml would refuse, and levels that no ANN was trained with."""
    base = based("network", activation="qcfs", levels=4)
    with pytest.raises(ParamsError, match=message):
        load(tmp_path, space=space, base=base)


def test_anns_without_levels_are_refused(tmp_path):
    """They would stand for nothing."""
    message = refusal(tmp_path, "anns: []", "anns: [{levels: 2, weights: two.pt}]")
    assert "levels is not there, and anns are; allowed: anns: []" in message


def test_values_are_tried_with_those_that_trials_have(tmp_path):
    """A percentile that is drawn goes with the method that is drawn, not with params.yaml's."""
    base = based("balance_thresholds", method="learned")
    space = ["method: {choice: [percentile]}", "percentile: {uniform: [99, 99.9]}"]
    found = load(tmp_path, space=space, base=base)
    for sample in samples(found.space, base.stdb):
        assert ("percentile" in sample) == ("method" in sample), sample


@pytest.mark.parametrize(
    ("anns", "message"),
    [
        ("[{levels: 2, weights: a.pt}]", "anns has levels 2, and levels has not"),
        ("[{levels: 4, weights: a.pt}]", "or 4, which network.levels is"),
        ("[{levels: 8, weights: a.pt}, {levels: 8, weights: b.pt}]", "several of the same levels"),
    ],
)
def test_anns_that_no_trial_would_take_are_refused(tmp_path, anns, message):
    """They would be left out without a word."""
    base = based("network", activation="qcfs", levels=4)
    space = ["levels: {choice: [4, 8]}"]
    assert message in refusal(tmp_path, "anns: []", f"anns: {anns}", space=space, base=base)


def test_a_sweep_of_another_ann_does_not_go_on(tmp_path):
    """A file of the same name and another content is another sweep."""
    stage = SimpleNamespace(params=PARAMS, name="sweep", key="k")
    file = tmp_path / "two.pt"
    folders = []
    for content in (b"a", b"b", b"a"):
        file.write_bytes(content)
        folders.append(work_folder(stage, [str(file)]))
    assert folders[0] == folders[2] != folders[1]
    assert work_folder(stage).name == "sweep-k"


def test_what_comes_before_the_fine_tuning_is_drawn_too():
    """The calibration, the ANN with as many levels, and the weight of distillation alone."""
    base = based("network", activation="qcfs", levels=4)
    sample = {"method": "mse", "initial_membrane": 0.4, "levels": 2, "distil_weight": 0.3}
    found = settings(sample, base, {2: "two.safetensors"})
    assert found.balance_thresholds.method == "mse"
    assert found.balance_thresholds.initial_membrane == 0.4
    assert (found.network.levels, found.train_ann.weights) == (2, "two.safetensors")
    assert found.stdb.distil == DistilParams(weight=0.3, temperature=2.0)
    warmer = based(distil=DistilParams(weight=0.9, temperature=5.0))
    assert settings({"distil_weight": 0.3}, warmer).stdb.distil.temperature == 5.0
    assert settings({"levels": 4}, base) == base  # the pipeline's own ANN has as many


def test_a_space_that_does_not_suit_few_steps_is_said(tmp_path):
    """The digits' space on a network for few steps; not on the digits', nor docs/sweeps.md's."""
    own = load_sweep(ROOT / "sweep/params.yaml", PARAMS)
    assert list(doubts(own, PARAMS)) == []
    values = read_yaml(ROOT / "params.yaml")
    merge(values, read_yaml(ROOT / "presets/cpu-fewsteps-cifar10.yaml"), "the preset")
    few = validate(values, Params, "the preset")
    said = list(doubts(own, few))
    assert len(said) == 2
    assert "threshold_scale is searched up to 0.6" in said[0]
    assert "beta_100 is searched, and the surrogate has no β" in said[1]


def test_the_winner_is_written_by_section():
    """What differs from params.yaml, wherever it stands there."""
    base = based("network", activation="qcfs", levels=4)
    best = settings({"timesteps": 2, "method": "mse", "levels": 2}, base, {2: "two.pt"})
    assert changes(best, base) == {
        "network": {"levels": 2},
        "train_ann": {"weights": "two.pt"},
        "balance_thresholds": {"method": "mse"},
        "stdb": {"timesteps": 2},
    }


def test_a_trial_starts_from_the_network_of_its_levels(tmp_path):
    """That file's ANN, calibrated as the stage would: the same network to the last bit."""
    folder, parts = make_files(tmp_path)
    images = parts["test"].pixels()
    two, four = (LEVELS.model_copy(update={"levels": n}) for n in (2, 4))
    learned = BALANCING.model_copy(update={"method": "learned"})
    expected, _, ann = handed_on(folder, parts, two, learned)
    shutil.move(folder / ANN, folder / "two.safetensors")
    other, _, _ = handed_on(folder, parts, four, learned)
    made = worker(folder, DIRECT, network=four, balance_thresholds=learned).params
    one = worker(folder, DIRECT)
    one.params = settings({"levels": 2}, made, {2: "two.safetensors"})
    teacher, own = pipeline.sweeps.trial.starting_point(one, parts["train"], made)
    assert torch.equal(own.eval()(images, 3), expected.eval()(images, 3))
    assert not torch.equal(own(images, 3), other.eval()(images, 3))
    assert torch.equal(teacher.eval()(images), ann(images))
    rows = []
    one.send = rows.extend
    pipeline.sweeps.trial.run_trial_training(one, images=30, seed=0, made=made)
    assert [row["epoch"] for row in rows] == [1]


def test_a_trial_calibrates_by_the_method_that_was_drawn(tmp_path):
    """And for the encoder and the precision: what was handed on is of params.yaml's."""
    folder, parts = make_files(tmp_path)
    images = parts["test"].pixels()
    plain = BALANCING.model_copy(update={"method": "maximum"})
    for sample in ({"method": "mse"}, {"encoder": "poisson"}, {"precision": "bf16"}):
        made = worker(folder, DIRECT, network=NORMED, balance_thresholds=plain).params
        one = worker(folder, DIRECT)
        one.params = settings(sample, made)
        balancing = one.params.balance_thresholds
        expected, _, _ = handed_on(folder, parts, NORMED, balancing, one.params.stdb)
        handed_on(folder, parts, NORMED, plain)
        _, own = pipeline.sweeps.trial.starting_point(one, parts["train"], made)
        assert torch.equal(own.eval()(images, 3), expected.eval()(images, 3))


def test_what_no_trial_could_start_from_is_refused_before_the_first(tmp_path, monkeypatch):
    """A method that the network does not allow, a file of other levels."""
    folder, parts = make_files(tmp_path)
    monkeypatch.chdir(folder)
    handed_on(folder, parts, LEVELS, BALANCING.model_copy(update={"method": "learned"}))
    made = worker(folder, DIRECT, network=LEVELS, balance_thresholds=MSE).params
    text = TEXT.replace(
        SPACE, "space: {method: {choice: [mse, percentile]}, leak: {choice: [0.9]}}"
    )
    (folder / "sweep.yaml").write_text(text)
    with pytest.raises(StageError, match=r"method is mse with stdb\.leak: 0\.9; allowed: leak: 1"):
        check_trials(load_sweep(folder / "sweep.yaml", made), made, parts["train"])
    auto = worker(folder, DIRECT, network=LEVELS).params  # with a leak it is Algorithm 1
    text = TEXT.replace(SPACE, "space: {per: {choice: [channel]}, leak: {choice: [1.0, 0.9]}}")
    (folder / "sweep.yaml").write_text(text)
    with pytest.raises(StageError, match="per is channel with the method maximum"):
        check_trials(load_sweep(folder / "sweep.yaml", auto), auto, parts["train"])
    text = TEXT.replace(SPACE, "space: {levels: {choice: [2, 4]}}")
    text = text.replace("anns: []", "anns: [{levels: 2, weights: models/ann.safetensors}]")
    (folder / "sweep.yaml").write_text(text)
    save_weights(load_file(ANN), ANN, network=described(LEVELS))
    with pytest.raises(StageError, match=r"sweep's .*with levels: 4, and network\.levels is 2"):
        check_trials(load_sweep(folder / "sweep.yaml", made), made, parts["train"])


@pytest.mark.parametrize(("timesteps", "alpha", "beta"), [(100, 0.3, 0.01), (25, 0.6, 0.04)])
def test_alpha_and_beta_follow_the_time_steps(timesteps, alpha, beta):
    """The paper's at T = 100; larger at a smaller T, the decay over a presentation the same."""
    found = settings({"alpha_100": 0.3, "beta_100": 0.01, "timesteps": timesteps}, PARAMS).stdb
    assert (found.alpha, found.beta) == (pytest.approx(alpha), pytest.approx(beta))
    assert found.timesteps == timesteps
    assert settings({"alpha": 0.7}, PARAMS).stdb.alpha == 0.7
    assert settings({"timesteps": timesteps}, PARAMS) == based(timesteps=timesteps)


@pytest.mark.parametrize("folder", ["sweep", "sweep/ablation"])
def test_the_sweeps_that_come_with_the_project_run_on_its_parameters(folder):
    """As they stand: params.yaml has several T, and a trial one."""
    load_sweep(ROOT / folder / "params.yaml", load_params(ROOT / "params.yaml"))


def test_a_sweep_depends_on_the_code_that_makes_its_result():
    """And on no test split, which it never reads."""
    scripts = {"sweep": "sweep", "sweep/ablation": "sweep"}
    for folder, script in (scripts | {"sweep/surrogates": "compare_surrogates"}).items():
        stages = yaml.safe_load((ROOT / folder / "dvc.yaml").read_text())["stages"]
        (stage,) = stages.values()
        deps = set(stage["deps"])
        assert [file for file in needed(f"pipeline/{script}.py") if not covered(file, deps)] == []
        assert not any("test" in path for path in deps)


# -- what wins -------------------------------------------------------------------------------------


def trial(accuracy, timesteps, seed=0, alpha=1.0):
    return {"accuracy": accuracy, "timesteps": timesteps, "seed": seed, "alpha": alpha}


def test_curves_have_room_beside_long_names(tmp_path, recwarn):
    """Five searched parameters in a line of the legend leave the axes their place."""
    names = ["timesteps", "threshold_scale", "alpha_100", "beta_100", "learning_rate"]
    tried = [dict.fromkeys(names, 1e-4 / 3) | {"timesteps": k} for k in range(9)]
    epochs = [{**row, "epoch": e, "accuracy": 0.1 * e} for row in tried for e in range(3)]
    draw_curves(epochs, names, tmp_path / "curves.png")
    assert not [str(warning.message) for warning in recwarn]
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_the_front_is_what_nothing_beats():
    """Each point more accurate than all that cost as much or less."""
    rows = [trial(0.9, 4), trial(0.8, 4, alpha=2), trial(0.85, 6), trial(0.95, 8), trial(0.95, 9)]
    found = candidates(rows, ["timesteps", "alpha"], "timesteps")
    assert [(c.cost, c.accuracy) for c in front(found)] == [(4, 0.9), (8, 0.95)]


@pytest.mark.parametrize(
    ("floor", "cost", "timesteps"),
    [(0.5, "timesteps", 4), (0.91, "timesteps", 8), (0.99, "timesteps", 16), (0.5, None, 16)],
)
def test_the_winner_is_the_cheapest_above_the_floor(floor, cost, timesteps):
    """Or the most accurate, where none is or where accuracy is all that counts."""
    rows = [trial(0.9, 4), trial(0.95, 8), trial(0.96, 16), trial(0.96, 32)]
    found = candidates(rows, ["timesteps"], cost)
    assert choose(found, cost, floor).cost == timesteps


def test_seeds_are_one_candidate_and_failures_none():
    """The mean decides, and the spread is known."""
    rows = [trial(0.9, 4), trial(0.8, 4, seed=1), trial(None, 4, seed=2), trial(0.86, 5)]
    found = candidates(rows, ["timesteps", "seed"], "timesteps")
    assert [(c.accuracy, len(c.trials)) for c in found] == [(pytest.approx(0.85), 2), (0.86, 1)]
    assert found[0].spread == pytest.approx(0.05)


# -- what stops and what it costs ------------------------------------------------------------------


def test_values_of_any_kind_can_be_drawn_and_told_apart(tmp_path):
    """null, numbers and mappings beside each other."""
    teacher = {"weight": 0.7, "temperature": 2}
    values = [(None, None), (teacher, 1.0), (None, 0.5), (teacher, 1.0)]
    rows = [
        {"accuracy": 0.5, "timesteps": 4, "distil": d, "clip": c, "seed": 0, "epoch": 1}
        for d, c in values
    ]
    assert len(candidates(rows, ["distil", "clip"], None)) == 3
    for draw in (draw_parallel, draw_curves):
        draw(rows, ["distil", "clip"], tmp_path / "drawn.png")
        assert (tmp_path / "drawn.png").stat().st_size > 1000


EARLIER, LATER = "2026-11-27_17-34-08", "2026-11-27_17-40-59"


@pytest.mark.parametrize(
    ("torn", "left"),
    [
        ("", {EARLIER, LATER}),
        (f"experiment_state-{LATER}.json", {EARLIER}),
        (f"searcher-state-{LATER}.pkl", {EARLIER}),
        (f"search_gen_state-{EARLIER}.json", {LATER}),
        ("tuner.pkl", set()),
    ],
)
def test_what_a_kill_left_half_written_is_not_gone_on_from(tmp_path, torn, left):
    """Of a session that ends early nothing is taken; the one before it stands for it."""
    folder = tmp_path / "trials"
    (folder / "trial-2026").mkdir(parents=True)
    names = {"experiment_state-{}.json", "search_gen_state-{}.json", "searcher-state-{}.pkl"}
    files = {name.format(session) for name in names for session in (EARLIER, LATER)}
    unknown = b"cno_such_module\nClass\n."  # of a library that has changed since: it is whole
    for name in {*files, "tuner.pkl"}:
        content = b"{}" if name.startswith("experiment") else unknown  # Tune's .json, too
        (folder / name).write_bytes(content[: len(content) // 2] if name == torn else content)
    for name in (f"tmp-search_gen_state-{LATER}.json", f".1f-tmp-searcher-state-{LATER}.pkl"):
        (folder / name).write_bytes(b"")  # Ray had not come to their renaming
    assert can_go_on(folder) == bool(left)
    found = {file.name for file in folder.glob("[!.]*-*.*") if "tmp" not in file.name}
    assert found == {name.format(session) for name in names for session in left}
    assert folder.exists() == bool(left)


def test_a_search_that_begins_again_takes_its_trials(tmp_path):
    """States of the same values, of before; those of another's, or in use, stay."""
    sample = {"timesteps": 4, "distil": None}
    before = states_of(str(tmp_path), sample, "a_00001")
    before.save({"epoch": 3})
    states_of(str(tmp_path), {**sample, "timesteps": 2}, "a_00002").save({"epoch": 7})
    in_use = states_of(str(tmp_path), dict(reversed(sample.items())), "b_00000")
    adopt(in_use, time.time() - 3600)
    assert in_use.load() is None
    first, second = (states_of(str(tmp_path), sample, f"b_0000{k}") for k in (1, 2))
    for one in (first, second, first):
        adopt(one, time.time() + 1)
    assert (before.load(), first.load(), second.load()) == (None, {"epoch": 3}, None)


def test_a_sweep_that_was_killed_before_its_first_state_starts_afresh(tmp_path):
    """An empty tuner.pkl, or one beside which there is nothing."""
    for content in (b"", pickle.dumps({})):
        folder = tmp_path / "trials"
        folder.mkdir()
        (folder / "tuner.pkl").write_bytes(content)
        assert not can_go_on(folder)
        assert not folder.exists()
    assert not can_go_on(folder)


def test_a_budget_counts_a_trial_once_also_after_a_kill(tmp_path):
    """Neuron-steps grow within a trial; what was spent before is read back."""
    limits = BudgetParams(neuron_steps=100.0, seconds=None)
    budget = Budget(limits, tmp_path / "spent.json")
    for name, steps in (("a", 30.0), ("a", 60.0), ("b", 30.0)):
        assert budget(name, {"neuron_steps": steps}) is False
    assert budget.neuron_steps == 90
    assert not budget.stop_all()
    again = Budget(limits, tmp_path / "spent.json")
    again("b", {"neuron_steps": 30.0})  # the same epoch, after a restart
    assert not again.stop_all()
    again("b", {"neuron_steps": 40.0})
    assert again.stop_all()


def test_seconds_are_those_of_all_attempts(tmp_path, monkeypatch):
    """The clock of an earlier attempt goes on."""
    path = tmp_path / "spent.json"
    path.write_text(json.dumps({"neuron_steps": {}, "seconds": 50.0}))
    start = time.monotonic()
    budget = Budget(BudgetParams(neuron_steps=None, seconds=60.0), path)
    monkeypatch.setattr(time, "monotonic", lambda: start + 9)
    assert not budget.stop_all()
    monkeypatch.setattr(time, "monotonic", lambda: start + 11)
    assert budget.stop_all()


@pytest.mark.parametrize(
    ("objectives", "decision"),
    [("accuracy, timesteps", TrialScheduler.CONTINUE), ("accuracy", TrialScheduler.STOP)],
)
def test_a_trial_is_compared_with_those_of_its_time_steps(tmp_path, objectives, decision):
    """T = 4 less accurate than T = 16 goes on where T is a cost, and not where it is none."""
    before = "objectives: accuracy, timesteps "
    sweep = load(tmp_path, before, f"objectives: {objectives} ")
    halving = Halving(sweep, default=8)
    trials = [
        SimpleNamespace(trial_id=str(k), config={"timesteps": t}, status="RUNNING")
        for k, t in enumerate((16, 17, 15, 4))
    ]
    for one in trials:
        halving.on_trial_add(None, one)
    said = [
        halving.on_trial_result(None, one, {"epoch": 1, ACCURACY: accuracy})
        for one, accuracy in zip(trials, (0.9, 0.95, 0.1, 0.5), strict=True)
    ]
    assert said[:2] == [TrialScheduler.CONTINUE] * 2
    assert said[2] == TrialScheduler.STOP  # among those of its own
    assert said[3] == decision


RESOURCES = {"parallel": "auto", "workers": 1, "cpus": 1.0, "gpus": "auto"}


@pytest.mark.parametrize(
    ("change", "there", "parallel", "use_gpu", "sharing"),
    [
        ({}, (2, 0), 2, False, 2),
        ({"cpus": 2.0}, (2, 0), 1, False, 1),
        ({"cpus": 0.5}, (2, 0), 4, False, 4),
        ({"parallel": 3}, (8, 0), 3, False, 3),
        ({"parallel": 3}, (2, 0), 2, False, 2),
        ({"workers": 2}, (5, 0), 2, False, 2),
        ({}, (16, 2), 2, True, 1),
        ({"gpus": 0.25}, (16, 2), 8, True, 4),
        ({"gpus": 0.25, "parallel": 3}, (16, 2), 3, True, 3),
        ({"gpus": 0.0}, (16, 2), 16, False, 16),
    ],
)
def test_as_many_trials_run_at_once_as_there_is_room_for(change, there, parallel, use_gpu, sharing):
    """Cores, GPUs and fractions of them; those of one GPU, or all on CPUs, share its memory."""
    room = plan_trials(ResourceParams(**(RESOURCES | change)), *there)
    assert (room.parallel, room.use_gpu, room.sharing) == (parallel, use_gpu, sharing)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cpus": 3.0}, "a trial needs 3 CPUs .*; there are 2"),
        ({"workers": 3}, "a trial needs 3 CPUs"),
        ({"gpus": 1.0}, "a trial needs 1 GPUs .*; there are 0"),
    ],
)
def test_a_trial_that_never_fits_is_refused(change, message):
    """It would wait for ever."""
    with pytest.raises(StageError, match=message):
        plan_trials(ResourceParams(**(RESOURCES | change)), 2, 0)


def test_a_trial_finds_its_threshold_scale_on_the_trained_network(tmp_path, monkeypatch):
    """Where none is drawn: the ANN's weights, the balanced thresholds. Then it learns at it."""
    files = make_files(tmp_path)
    seen, thresholds = {}, {}

    def scale(worker, snn, *arguments):
        seen.update(snn.net.state_dict())
        thresholds.update(snn.thresholds)
        return 0.35

    trial = pipeline.sweeps.trial
    monkeypatch.setattr(trial, "best_scale", scale)
    params = STDB.model_copy(update={"threshold_scale": None})
    rows, learned = [], []
    one = worker(files[0], params)
    one.send = rows.extend
    tune = trial.fine_tune

    def fine_tune(worker, scale, *arguments):
        learned.append(scale)
        return tune(worker, scale, *arguments)

    monkeypatch.setattr(trial, "fine_tune", fine_tune)
    trial.run_trial_training(one, images=30, seed=0)
    for name, weight in load_file(files[0] / ANN).items():
        assert torch.equal(seen[name], weight), name
    assert thresholds == pytest.approx(LAYER_THRESHOLDS)
    assert learned == [0.35]
    assert [row["epoch"] for row in rows] == [1]
    assert rows[0]["timesteps"] == params.timesteps


# -- the winner becomes params.yaml ----------------------------------------------------------------


def test_the_winner_is_written_with_all_comments_kept(tmp_path):
    """Only its lines differ; the difference is shown."""
    target, overlay = tmp_path / "params.yaml", tmp_path / "best.yaml"
    shutil.copy(ROOT / "params.yaml", target)
    overlay.write_text("stdb: {timesteps: 5, alpha: 0.61, threshold_scale: 0.4, surrogate: linear}")
    shown = apply(overlay, target)
    after = load_params(target).stdb
    assert (after.timesteps, after.alpha, after.threshold_scale) == (5, 0.61, 0.4)
    before = (ROOT / "params.yaml").read_text().splitlines()
    now = target.read_text().splitlines()
    differing = [(a, b) for a, b in zip(before, now, strict=True) if a != b]
    assert len(differing) == 4
    assert all(a.partition("#")[2] == b.partition("#")[2] for a, b in differing)
    assert shown.count("\n+  ") == 4
    assert apply(overlay, target) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stdb: {alhpa: 1.0}", "has alhpa; allowed: timesteps"),
        ("stdb: {alpha: -1.0}", "stdb.alpha is -1.0; allowed: greater than 0"),
        (None, "is missing; make sweep makes it"),
    ],
)
def test_what_is_not_allowed_leaves_params_yaml_as_it_is(tmp_path, text, message):
    """With the reason."""
    target, overlay = tmp_path / "params.yaml", tmp_path / "best.yaml"
    shutil.copy(ROOT / "params.yaml", target)
    if text is not None:
        overlay.write_text(text)
    with pytest.raises(ParamsError, match=message):
        apply(overlay, target)
    assert target.read_text() == (ROOT / "params.yaml").read_text()
    assert set(tmp_path.iterdir()) <= {target, overlay}


# -- the chain -------------------------------------------------------------------------------------

SWEEP = [sys.executable, "-m", "pipeline.sweep"]
SMALL = {
    "trials: 24 ": "trials: 6 ",
    "epochs: 4 ": "epochs: 3 ",
    "timesteps: {choice: [1, 2, 3, 4, 6, 8, 12, 16]}": "timesteps: {choice: [2, 3, 4]}",
    "seconds: 600": "seconds: 900",
    "floor: 1.0 ": "floor: 90.0 ",
}


@pytest.fixture
def searched(finished, tmp_path):
    """The finished repository with a small sweep in it, and without a test split."""
    repository = copy_of(finished, tmp_path / "repository")
    edit(repository, SMALL)
    return repository


def edit(repository, changes: dict[str, str]) -> None:
    path = repository.root / "sweep/params.yaml"
    text = path.read_text()
    for before, after in changes.items():
        assert before in text, before
        text = text.replace(before, after, 1)
    path.write_text(text)


def rows(repository) -> list[dict[str, str]]:
    with (repository.root / "sweep/trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def noted(repository) -> int:
    """Trials that are over in what Tune would go on from."""
    states = sorted(repository.root.glob(".results/sweep-*/trials/experiment_state-*.json"))
    return states[-1].read_text().count("TERMINATED") if states else 0


def children(repository) -> list:
    """MLflow's runs of trials, below one run of the sweep."""
    client = mlflow.MlflowClient(f"sqlite:///{repository.root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("stdb").experiment_id
    (parent,) = client.search_runs([experiment], "attributes.run_name = 'sweep'")
    assert parent.info.status == "FINISHED"
    return client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_its_winner_makes_a_full_run(searched, tmp_path):
    """Search, kill, search, apply, repro. The test split is not there while it searches."""
    hidden = searched.root / "data/prepared/test.safetensors"
    hidden.rename(tmp_path / "test.safetensors")
    edit(searched, {"epochs: 3 ": "epochs: 80 ", "grace: 1 ": "grace: 50 "})  # seconds a trial
    started = Started(searched, tmp_path / "log", SWEEP)
    deadline = time.monotonic() + 500
    while noted(searched) < 2:
        assert started.process.poll() is None, started.says()
        assert time.monotonic() < deadline, started.says()
        time.sleep(0.1)
    os.killpg(started.process.pid, signal.SIGKILL)
    started.wait_until_gone(60)
    output = searched.run(*SWEEP).stdout
    assert "goes on: finished trials are kept" in output
    found = rows(searched)
    assert len(found) == len({row["trial"] for row in found}) == 6
    assert {row["status"] for row in found} <= {"finished", "stopped"}
    assert 0 < output.count("[sweep] trial") <= 4  # two were done before
    runs = children(searched)
    assert sorted(run.info.run_name for run in runs) == sorted(row["trial"] for row in found)
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        row = next(row for row in found if row["trial"] == run.info.run_name)
        assert run.data.params["timesteps"] == row["timesteps"]
        assert run.data.metrics["accuracy/best"] == pytest.approx(float(row["accuracy"]))
    assert not list((searched.root / ".results").glob("sweep-*"))
    (tmp_path / "test.safetensors").rename(hidden)
    best = yaml.safe_load((searched.root / "sweep/best_params.yaml").read_text())["stdb"]
    floor = json.loads((searched.root / "metrics/train_ann.json").read_text())
    enough = [r for r in found if float(r["accuracy"]) >= floor["accuracy"]["validation"] - 0.9]
    assert best.get("timesteps", 3) == min(int(row["timesteps"]) for row in enough)
    shown = searched.run(sys.executable, "-m", "pipeline.apply_best").stdout
    assert "+  alpha:" in shown
    searched.repro()
    made = json.loads((searched.root / "metrics/finetune_stdb.json").read_text())
    assert made["timesteps"] == best.get("timesteps", 3)


@pytest.mark.slow
def test_a_trial_that_fails_is_a_row_and_not_the_end(searched):
    """Through DVC; its error is in the table, its run is FAILED."""
    edit(searched, {"method: optuna": "method: grid  "})
    text = (searched.root / "sweep/params.yaml").read_text()
    keep = text[: text.index("space:")] + "space:\n  learning_rate: {grid: [1.0e-4, 1.0e+30]}\n"
    (searched.root / "sweep/params.yaml").write_text(keep)
    searched.repro("sweep/dvc.yaml")
    good, bad = sorted(rows(searched), key=lambda row: float(row["learning_rate"]))
    assert good["status"] == "finished"
    assert bad["status"] == "failed"
    assert "the training diverged" in bad["error"]
    assert {run.info.status for run in children(searched)} == {"FINISHED", "FAILED"}
    assert searched.run("dvc", "status", "-q", "sweep/dvc.yaml").returncode == 0
    assert "Running stage" not in searched.repro().stdout  # the main pipeline is as it was


@pytest.mark.slow
def test_a_budget_that_is_too_small_is_named(searched):
    """Instead of an error without a reason."""
    edit(searched, {"seconds: 900": "seconds: 0.01"})
    result = searched.run(*SWEEP, check=False)
    assert result.returncode == 1
    assert "the budget (seconds 0.01) was spent before a trial's first epoch" in result.stderr


@pytest.mark.slow
def test_trials_of_several_workers_do_not_wait_for_each_other(searched):
    """Two trials of two workers each on two cores: one after the other, and no dead-lock."""
    edit(
        searched,
        {"workers: 1 ": "workers: 2 ", "trials: 6 ": "trials: 2 ", "seconds: 900": "seconds: 600"},
    )
    start = time.monotonic()
    searched.run(*SWEEP)
    assert time.monotonic() - start < 700
    assert len(rows(searched)) == 2
    assert all(math.isfinite(float(row["accuracy"])) for row in rows(searched))
