"""Several T in turn: what is refused, learned, handed on from one to the next, and resumed."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import pipeline.learning.finetuning as finetuning
import stdb
from pipeline import evaluate_converted, finetune_stdb
from pipeline.files import ANN, SNN
from pipeline.learning.fit import fit, order
from pipeline.learning.networks import build_ann, load_weights
from pipeline.learning.schedules import learning_rate
from pipeline.params import DistilParams, ParamsError, StdbParams
from pipeline.sweeps.space import load_sweep, settings
from pipeline.typed import validate
from tests.pipeline.support import NETWORK, PARAMS, ROOT, STDB, make_files, starting, worker

FALLING = STDB.model_copy(
    update={"timesteps": [3, 2], "epochs": [2, 1], "logit_scale": "auto", "batch_size": 16}
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A repository's files, as earlier stages leave them, and its splits."""
    return make_files(tmp_path_factory.mktemp("files"))


def finetune(files, params, **sections):
    """The worker of a job that has run the stage's loop; its last state is the result."""
    one = worker(files[0], params, **sections)
    finetune_stdb.train_loop(one)
    return one


def whole(params):
    """All parameters, with these of ``stdb``."""
    return PARAMS.model_copy(update={"stdb": params})


def drawn(sample, params):
    """The parameters of ``stdb`` of a trial."""
    return settings(sample, whole(params)).stdb


# -- parameters ------------------------------------------------------------------------------------


def test_each_t_has_its_epochs():
    """A number is the same for each; one T in a list is that T alone."""
    params = drawn({}, FALLING)
    assert [(p.timesteps, p.epochs) for p in params.at_each()] == [(3, 2), (2, 1)]
    assert (params.first_timesteps, params.last_timesteps) == (3, 2)
    same = drawn({}, FALLING.model_copy(update={"epochs": 5}))
    assert [(p.timesteps, p.epochs) for p in same.at_each()] == [(3, 5), (2, 5)]
    (alone,) = drawn({"logit_scale": 0.5}, STDB.model_copy(update={"timesteps": [3]})).at_each()
    assert vars(alone) == vars(STDB) | {"logit_scale": 0.5}


FALLS = r"; allowed: 1 to 32767, or several, each less than the last: \[8, 4, 2, 1\]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timesteps": [2, 4]}, r"timesteps is \[2, 4\]" + FALLS),
        ({"timesteps": [4, 4]}, r"timesteps is \[4, 4\]" + FALLS),
        ({"timesteps": []}, r"timesteps is \[\]" + FALLS),
        ({"timesteps": [4, 0]}, r"timesteps is \[4, 0\]" + FALLS),
        ({"timesteps": [4, 2.0]}, r"timesteps is \[4, 2.0\]" + FALLS),
        ({"timesteps": [40000, 4]}, r"timesteps is \[40000, 4\]" + FALLS),
        ({"epochs": [2]}, r"epochs is \[2\] with timesteps: \[3, 2\]; allowed: a number, or one f"),
        ({"epochs": [2, 0]}, r"epochs is \[2, 0\]; allowed: 1 to 100000, or such a number for eac"),
        ({"timesteps": 3}, r"epochs is \[2, 1\] with timesteps: 3; allowed: a number, or one for"),
        ({"from_scratch": True}, r"timesteps is \[3, 2\] with from_scratch: true; allowed: one T,"),
        ({"logit_scale": 1.0}, r"logit_scale is 1.0 with timesteps: \[3, 2\], .*; allowed: auto, "),
        ({"truncate": 3}, r"truncate is 3 with timesteps: \[3, 2\]; allowed: null, or less than t"),
    ],
    ids=str,
)
def test_what_does_not_fall_is_refused(change, message):
    """In one line, with what is allowed, before anything starts."""
    values = FALLING.model_dump() | change
    with pytest.raises(ParamsError, match=message):
        validate(values, StdbParams, "stdb")


def test_a_sweep_searches_one_t(tmp_path):
    """One that was drawn takes the place of several; else several are refused."""
    one = drawn({"timesteps": 5}, FALLING)
    assert (one.timesteps, one.epochs) == (5, 1)
    with pytest.raises(ParamsError, match=r"timesteps is \[4, 2\]; allowed: one T, since a trial"):
        drawn({"timesteps": [4, 2]}, STDB)
    text = (ROOT / "sweep/params.yaml").read_text()
    head = text[: text.index("\nspace:")]
    path = tmp_path / "params.yaml"
    path.write_text(f"{head}\nspace:\n  timesteps: {{grid: [2, 4]}}\n".replace("optuna", "grid"))
    assert load_sweep(path, whole(FALLING)).space["timesteps"].values == [2, 4]
    path.write_text(f"{head}\nspace:\n  alpha: {{grid: [0.1, 0.3]}}\n".replace("optuna", "grid"))
    with pytest.raises(ParamsError, match=r"stdb.timesteps is \[3, 2\], and a trial has one T"):
        load_sweep(path, whole(FALLING))


def test_thresholds_fall_with_t_as_far_as_validation_says(files):
    """One factor for all layers, also for those that were not balanced; no other one is better."""
    params = FALLING.model_copy(update={"threshold_scale": None})
    one, snn = worker(files[0], params), starting(files, params.at_each()[0])
    snn.eval()
    thresholds, validation = snn.thresholds, files[1]["validation"]
    snn.set_thresholds(thresholds, balanced=set(thresholds) - {"conv2"})
    found = {}
    for factor in finetuning.DESCENTS:
        for name, neuron in snn.neurons.items():
            neuron.threshold.fill_(thresholds[name] * factor)
        batch = [(validation.pixels(), validation.labels)]
        found[factor] = float(stdb.evaluate(snn, batch, 2, sample_ids=validation.ids)[-1])
    snn.set_thresholds(thresholds, balanced=set(thresholds) - {"conv2"})
    finetuning.lower_thresholds(one, snn, validation, 2)
    factors = {round(value / thresholds[name], 4) for name, value in snn.thresholds.items()}
    (factor,) = factors
    assert found[factor] == max(found.values())
    assert len(set(found.values())) > 1


# -- the loop --------------------------------------------------------------------------------------


def in_units(files, params):
    """Where it starts: U_T/T of the first T as near to the ANN's logits as one factor brings it."""
    first = params.at_each()[0]
    snn, validation = starting(files, first), files[1]["validation"]
    ann = build_ann(NETWORK, validation)
    load_weights(ann, files[0] / ANN)
    snn.eval()
    with torch.no_grad():
        u = snn(validation.pixels(), first.timesteps, sample_ids=validation.ids)
        u, z = (u / first.timesteps).double(), ann.eval()(validation.pixels()).double()
    snn.scale_output(float(f"{float((u * z).sum() / (u * u).sum()):.6g}"))
    return snn


def test_the_steps_of_two_t_written_out(files):
    """The loss of U_t/t, windows, a new Adam and schedule at each T; epochs are counted on."""
    change = {"epochs": 1, "timesteps": [5, 3], "truncate": 2, "schedule": "cosine"}
    params = FALLING.model_copy(update=change)
    tuned = finetune(files, params).states[-1]["tuned"]
    snn, train = in_units(files, params), files[1]["train"]
    for epoch, (at_t, windows) in enumerate(
        zip(params.at_each(), ([2, 2, 1], [2, 1]), strict=True), start=1
    ):
        snn.train()
        learned = [p for p in snn.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(learned, amsgrad=True, fused=True)
        batches = order(len(train), 16, params.seed, epoch)
        assert len(batches) == 3
        for step, batch in enumerate(batches, start=1):
            optimizer.param_groups[0]["lr"] = learning_rate(at_t, 1, step, len(batches))
            share = train.take(batch)
            presentation = snn.present(share.pixels(), sample_ids=share.ids, epoch=epoch)
            optimizer.zero_grad()
            for steps in windows:
                z = snn(presentation, steps) / presentation.t
                F.cross_entropy(z, share.labels).backward()
            optimizer.step()
        one = tuned[epoch - 1]
        assert (one["timesteps"], one["epoch"]) == (at_t.timesteps, epoch)
        for name, value in snn.net.state_dict().items():
            torch.testing.assert_close(value, one["network"][name], rtol=0, atol=1e-6)
    assert not torch.equal(tuned[0]["network"]["conv1.weight"], tuned[1]["network"]["conv1.weight"])


def test_the_first_t_is_that_alone_beside_a_teacher(files):
    """What follows changes nothing of it: bit for bit."""
    teaching = {"distil": DistilParams(weight=0.7, temperature=2)}
    several = finetune(files, FALLING.model_copy(update=teaching)).states[-1]["tuned"]
    alone = FALLING.model_copy(update=teaching | {"timesteps": 3, "epochs": 2})
    (first,) = finetune(files, alone).states[-1]["tuned"]
    assert first["test"] == several[0]["test"]
    for name, value in first["network"].items():
        assert torch.equal(value, several[0]["network"][name]), name


def test_what_learned_in_the_anns_units_is_written_as_sure_as_it_is_right(
    files, monkeypatch, tmp_path
):
    """U_T is T times U_T/t; a factor found on validation stands before it, and decides nothing."""
    fitted = []

    def fitting(worker, snn, split, timesteps, batch_size):
        fitted.append((split.ids.tolist(), timesteps))
        return 0.25

    monkeypatch.setattr(finetune_stdb, "fitting_logit_scale", fitting)
    monkeypatch.setattr(finetune_stdb, "SNNS", tmp_path)
    monkeypatch.setattr(finetune_stdb, "SNN", tmp_path / "last.safetensors")
    state = finetune(files, FALLING).states[-1]
    validation, test = files[1]["validation"], files[1]["test"]
    assert fitted == [(validation.ids.tolist(), steps) for steps in (3, 2)]
    params = PARAMS.model_copy(update={"network": NETWORK, "stdb": FALLING})
    snn = starting(files, FALLING)
    finetune_stdb.write_networks(starting(files, FALLING), state, params, files[1]["train"])
    for one in state["tuned"]:
        snn.net.load_state_dict(one["network"])
        written, _ = stdb.load(finetune_stdb.network_of(one["timesteps"]))
        shown = test.pixels(), one["timesteps"]
        mine = snn.eval()(*shown, sample_ids=test.ids)
        torch.testing.assert_close(written(*shown, sample_ids=test.ids), mine * 0.25)
        assert one["test"]["accuracy"][-1] == (mine.argmax(1) == test.labels).double().mean()


def test_a_t_starts_from_the_best_epoch_of_the_one_before(files, monkeypatch):
    """And not from its last one; no scale of the logits is fitted at it."""
    starts, judged, scales = [], [], []

    def noting_fit(job, task, *arguments):
        starts.append(copy.deepcopy(task.network.state_dict()))
        return fit(job, task, *arguments)

    def worse_and_worse(*arguments):
        judged.append(0)
        found = evaluate(*arguments)
        return replace(found, accuracy=[1 / len(judged)] * len(found.accuracy))

    def noting_units(*arguments):
        scales.append(arguments[4])
        return units(*arguments)

    evaluate, units = finetuning.evaluate_snn, finetuning.fitting_units
    monkeypatch.setattr(finetuning, "fit", noting_fit)
    monkeypatch.setattr(finetuning, "evaluate_snn", worse_and_worse)
    monkeypatch.setattr(finetuning, "fitting_units", noting_units)
    monkeypatch.delattr(finetuning, "fitting_logit_scale")
    job = finetune(files, FALLING)
    first, second = job.states[-1]["tuned"]
    assert [first["epoch"], second["epoch"]] == [1, 3]
    last = next(state["network"] for state in job.states if state["epoch"] == 2)
    for name, value in first["network"].items():
        assert torch.equal(value, starts[1][name]), name
    assert not torch.equal(last["conv1.weight"], starts[1]["conv1.weight"])
    assert scales == [3]


def test_an_epoch_says_its_t(files):
    """Where there are several; each network is judged on the test split at its own."""
    state = finetune(files, FALLING).states[-1]
    rows = [row for one in state["tuned"] for row in one["history"]]
    assert [(row["epoch"], row["timesteps"]) for row in rows] == [(1, 3), (2, 3), (3, 2)]
    assert [len(one["test"]["accuracy"]) for one in state["tuned"]] == [3, 2]
    assert state["test"] == state["tuned"][-1]["test"]
    assert state["curve"][:2] == state["test"]["accuracy"]
    assert "timesteps" not in finetune(files, STDB).states[-1]["history"][0]


def test_a_surrogate_is_that_of_its_t(files, monkeypatch):
    """``auto`` goes by T, and so does every T of several."""
    seen = []

    def noting_fit(job, task, train, params, start):
        neurons = [m for m in task.network.modules() if isinstance(m, stdb.SpikingNeuron)]
        seen.append({neuron.surrogate.name for neuron in neurons})
        return fit(job, task, train, params, start)

    monkeypatch.setattr(finetuning, "fit", noting_fit)
    auto = {"surrogate": "auto", "alpha": None, "beta": None, "over_threshold": None}
    finetune(files, FALLING.model_copy(update=auto | {"timesteps": [20, 2], "epochs": 1}))
    assert seen == [{"stdb"}, {"rectangle"}]


def test_interrupted_anywhere_it_ends_where_a_whole_one_ends(files):
    """Within the first T, between both, and within the second one: bit for bit."""
    params = FALLING.model_copy(update={"dropout": 0.5})
    often = PARAMS.cluster.model_copy(update={"checkpoint_steps": 2})
    whole = finetune(files, params, cluster=often)
    *kept, end = whole.states
    moments = [(len(s["tuned"]), s["epoch"], s.get("step")) for s in kept]
    assert moments == [(0, 0, 2), (0, 1, None), (0, 1, 2), (0, 2, None), (1, 2, 2), (1, 3, None)]
    for moment, state in zip(moments, kept, strict=True):
        resumed = worker(files[0], params, cluster=often)
        resumed.states.append(copy.deepcopy(state))
        finetune_stdb.train_loop(resumed)
        for before, after in zip(end["tuned"], resumed.states[-1]["tuned"], strict=True):
            assert before["history"] == after["history"], moment
            assert before["test"] == after["test"], moment
            for name, value in before["network"].items():
                assert torch.equal(value, after["network"][name]), (moment, name)


def test_the_converted_network_is_scaled_for_the_first_t(files):
    """Which fine-tuning starts at."""
    own = PARAMS.evaluate_converted.model_copy(update={"timesteps": 6, "scales": [0.3, 0.6]})
    found = []
    for steps in ([5, 2], 5):
        params = STDB.model_copy(update={"timesteps": steps})
        job = worker(files[0], params, evaluate_converted=own)
        evaluate_converted.evaluate_loop(job)
        found.append(job.states[-1])
    assert found[0] == found[1]


# -- what the stage writes -------------------------------------------------------------------------


def test_a_file_for_each_t_and_of_no_other_one(files, tmp_path, monkeypatch):
    """The last one's is the network in its usual place, too."""
    params = PARAMS.model_copy(update={"network": NETWORK, "stdb": FALLING})
    state = finetune(files, FALLING).states[-1]
    snn, train = starting(files, FALLING.at_each()[0]), files[1]["train"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/snn").mkdir(parents=True)
    (tmp_path / "models/snn/t8.safetensors").write_text("of an earlier run")
    finetune_stdb.write_networks(snn, state, params, train)
    there = sorted(path.name for path in (tmp_path / "models/snn").iterdir())
    assert there == ["t2.safetensors", "t3.safetensors"]
    for one in state["tuned"]:
        path = finetune_stdb.network_of(one["timesteps"])
        read = load_file(path)
        assert torch.equal(read["conv1.weight"], one["network"]["conv1.weight"])
        assert stdb.load(path)[1]["timesteps"] == one["timesteps"]
        assert stdb.load(path)[1]["stdb"]["timesteps"] == [3, 2]
    assert SNN.read_bytes() == finetune_stdb.network_of(2).read_bytes()


def test_metrics_have_each_t(files):
    """Those of the last one in their usual place; of one T alone nothing is added."""
    tuned = finetune(files, FALLING).states[-1]["tuned"]
    found = json.loads(json.dumps(finetune_stdb.metrics(tuned)))
    each = found.pop("by_timesteps")
    assert list(each) == ["3", "2"]
    assert each["2"] == found == finetune_stdb.summary(tuned[1])
    assert each["3"]["accuracy"]["test"] == tuned[0]["test"]["accuracy"][-1]
    assert finetune_stdb.metrics(tuned[:1]) == finetune_stdb.summary(tuned[0])
