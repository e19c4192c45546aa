"""Fine-tuning with the ANN as a teacher: the same steps written out, resumed, and refused."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import pipeline.learning.finetuning
from pipeline import finetune_stdb
from pipeline.data import augment
from pipeline.files import ANN
from pipeline.learning.finetuning import distilling, teacher_of
from pipeline.learning.fit import order
from pipeline.learning.networks import build_ann, load_weights
from pipeline.params import DistilParams, ParamsError, StdbParams
from pipeline.sweeps.space import load_sweep, settings
from tests.pipeline.support import NETWORK, PARAMS, ROOT, STDB, make_files, starting, worker

TEACHING = DistilParams(weight=0.7, temperature=2)
DISTIL = STDB.model_copy(update={"distil": TEACHING, "logit_scale": "auto", "timesteps": 4})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A repository's files, as earlier stages leave them, and its splits."""
    return make_files(tmp_path_factory.mktemp("files"))


def finetune(files, params: StdbParams, **sections):
    """The state that the stage's loop keeps last, as the one worker of a job."""
    one = worker(files[0], params, **sections)
    finetune_stdb.train_loop(one)
    return one.states[-1]


def in_units(files, params: StdbParams):
    """Where it starts, with U_T/T as near to the ANN's logits as one factor brings it."""
    snn, validation = starting(files, params), files[1]["validation"]
    teacher = build_ann(NETWORK, validation)
    load_weights(teacher, files[0] / ANN)
    snn.eval()
    with torch.no_grad():
        u = snn(validation.pixels(), params.timesteps, sample_ids=validation.ids)
        u, z = (u / params.timesteps).double(), teacher.eval()(validation.pixels()).double()
    factor = float((u * z).sum() / (u * u).sum())
    assert abs(factor - 1) > 0.1
    snn.scale_output(float(f"{factor:.6g}"))
    return snn


@pytest.mark.parametrize(
    ("change", "windows"),
    [({}, [4]), ({"truncate": 3}, [3, 1]), ({"augment": True, "seed": 5}, [4])],
    ids=str,
)
def test_the_steps_of_a_distillation_written_out(files, change, windows):
    """Two steps of Adam on U_t/t and the untouched ANN's logits give the stage's weights."""
    params = DISTIL.model_copy(update=change)
    state = finetune(files, params)
    snn, train = in_units(files, params), files[1]["train"]
    teacher = build_ann(NETWORK, train)
    load_weights(teacher, files[0] / ANN)
    teacher.eval()
    snn.train()
    optimizer = torch.optim.Adam(
        [p for p in snn.parameters() if p.requires_grad], lr=1e-3, amsgrad=True, fused=True
    )
    batches = order(len(train), 24, params.seed, 1)
    assert len(batches) == 2
    for batch in batches:
        share = train.take(batch)
        if params.augment:
            images = augment(share.images, share.ids, params.seed, 1)
            share = replace(share, images=images)
        images = share.pixels()
        with torch.no_grad():
            taught = (teacher(images) / 2).softmax(1)
        presentation = snn.present(images, sample_ids=share.ids, epoch=1)
        optimizer.zero_grad()
        for steps in windows:
            z = snn(presentation, steps) / presentation.t
            divergence = (taught * (taught.log() - (z / 2).log_softmax(1))).sum(1)
            (0.3 * F.cross_entropy(z, share.labels) + 0.7 * 4 * divergence.mean()).backward()
        optimizer.step()
    start = in_units(files, params).net.state_dict()
    moved = 0.0
    for name, value in snn.net.state_dict().items():
        torch.testing.assert_close(value, state["best_network"][name], rtol=0, atol=1e-5)
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 1e-3


@pytest.mark.parametrize(
    "distil", [None, {"weight": 0.2, "temperature": 2}, {"weight": 0.7, "temperature": 9}]
)
def test_weight_and_temperature_have_an_effect(files, distil):
    """A parameter that is checked and tracked and then not used would be a lie."""
    other = DISTIL.model_copy(
        update={"distil": None if distil is None else DistilParams(**distil), "logit_scale": 1.0}
    )
    before, after = (finetune(files, params)["network"] for params in (DISTIL, other))
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


def test_a_micro_batch_changes_memory_only(files):
    """The teacher's logits are those of the part that is presented."""
    whole, parts = (
        finetune(files, DISTIL.model_copy(update={"micro_batch": n}))["network"] for n in (None, 5)
    )
    for name, value in whole.items():
        torch.testing.assert_close(value, parts[name], rtol=0, atol=1e-5)


def test_an_interrupted_distillation_ends_where_a_whole_one_ends(files):
    """From within any epoch, bit for bit; the teacher is no part of the state."""
    params = DISTIL.model_copy(update={"epochs": 2, "batch_size": 16, "dropout": 0.5})
    often = PARAMS.cluster.model_copy(update={"checkpoint_steps": 2})
    whole = worker(files[0], params, cluster=often)
    finetune_stdb.train_loop(whole)
    end = whole.states[-1]
    within = [state for state in whole.states if "step" in state]
    assert [state["epoch"] for state in within] == [0, 1]
    for state in within:
        resumed = worker(files[0], params, cluster=often)
        resumed.states.append(copy.deepcopy(state))
        finetune_stdb.train_loop(resumed)
        assert resumed.states[-1]["history"] == end["history"]
        for name, value in end["network"].items():
            assert torch.equal(value, resumed.states[-1]["network"][name]), name


def test_the_teacher_is_asked_once_for_each_batch(files, monkeypatch):
    """Without gradient, in evaluation mode, also with several windows; its weights stay."""
    asked, kept = [], {}

    def watched(*arguments):
        teacher = teacher_of(*arguments)
        kept.update(teacher=teacher, before=copy.deepcopy(teacher.state_dict()))

        def note(module, inputs, logits):
            asked.append((len(inputs[0]), module.training, logits.requires_grad))

        teacher.register_forward_hook(note)
        return teacher

    monkeypatch.setattr(pipeline.learning.finetuning, "teacher_of", watched)
    finetune(files, DISTIL.model_copy(update={"truncate": 1}))
    assert asked == [(24, False, False)] * 2
    for name, value in kept["teacher"].state_dict().items():
        assert torch.equal(value, kept["before"][name])
    assert not any(p.requires_grad for p in kept["teacher"].parameters())


def test_the_teacher_computes_in_the_precision_of_the_products(files):
    """In bfloat16 its products are rounded, its logits are float32."""
    train, seen = files[1]["train"].take(torch.arange(4)), []
    teacher = teacher_of(build_ann(NETWORK, train))
    teacher.register_forward_hook(lambda module, inputs, logits: seen.append(logits.dtype))
    losses = {
        precision: distilling(teacher, TEACHING, precision)(train.pixels())
        for precision in ("float32", "bf16")
    }
    assert seen == [torch.float32, torch.bfloat16]
    logits = {name: loss.keywords["teacher"] for name, loss in losses.items()}
    assert logits["bf16"].dtype == torch.float32
    error = (logits["bf16"] - logits["float32"]).abs().max() / logits["float32"].abs().max()
    assert 0 < error < 0.05


def test_the_scale_beside_a_teacher_is_that_of_its_units(files, monkeypatch):
    """And not the one at which the network is as sure as it is right."""
    for name, factor in (("fitting_logit_scale", 0.125), ("fitting_units", 0.25)):
        monkeypatch.setattr(pipeline.learning.finetuning, name, lambda *_, f=factor: f)
    still = DISTIL.model_copy(update={"learning_rate": 1e-30})
    start = starting(files, still).net.state_dict()["output.weight"]
    assert torch.equal(finetune(files, still)["network"]["output.weight"], 0.25 * start)
    alone = still.model_copy(update={"distil": None})
    assert torch.equal(finetune(files, alone)["network"]["output.weight"], 0.125 * start)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"from_scratch": True},
            r"from_scratch true, which does without the ANN .*; allowed: from",
        ),
        ({"logit_scale": 0.5}, "logit_scale is 0.5 beside distil, .*; allowed: auto, which finds"),
        ({"distil": {"weight": 0, "temperature": 2}}, "distil.weight is 0; allowed: greater than"),
        ({"distil": {"weight": 2, "temperature": 2}}, "distil.weight is 2; allowed: less than or"),
        ({"distil": {"weight": 1, "temperature": 0}}, "distil.temperature is 0; allowed: greater"),
        ({"distil": {"weight": 0.7}}, r"distil is {'weight': 0.7}; allowed: null, or {weight: 0.7"),
        ({"distil": 0.7}, "distil is 0.7; allowed: null, or {weight: 0.7, temperature: 2}"),
        ({"distil": True}, "distil is True; allowed: null, or {weight"),
    ],
)
def test_what_cannot_be_distilled_is_refused(changes, message):
    """By name, with what is allowed, before anything starts; the same for a sweep's values."""
    values = {"distil": {"weight": 0.7, "temperature": 2}} | changes
    with pytest.raises(ParamsError, match=message):
        settings(values, PARAMS)


def test_a_sweep_over_what_excludes_each_other_is_refused(tmp_path):
    """Also where only values in the middle do."""
    text = (ROOT / "sweep/params.yaml").read_text()
    head = text[: text.index("\nspace:")].replace("method: grid", "method: random")
    teacher = "{weight: 0.7, temperature: 2}"
    for scales, refused in (("[auto, auto]", False), ("[auto, 0.5, auto]", True)):
        space = f"  distil: {{choice: [null, {teacher}]}}\n  logit_scale: {{choice: {scales}}}\n"
        path = tmp_path / "params.yaml"
        path.write_text(f"{head}\nspace:\n{space}")
        if not refused:
            assert set(load_sweep(path, PARAMS).space) == {"distil", "logit_scale"}
            continue
        with pytest.raises(ParamsError, match=r"space: logit_scale is 0.5 beside distil"):
            load_sweep(path, PARAMS)
