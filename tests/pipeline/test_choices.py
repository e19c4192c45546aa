"""What `auto` stands for: decided once by the first worker, and kept by a job that goes on."""

import pytest
import torch

import pipeline.jobs.choices
from pipeline.jobs.checkpoints import Checkpoints
from pipeline.jobs.choices import precision, with_choices
from pipeline.jobs.worker import Worker
from pipeline.params import load_params
from stdb import multiplies_bfloat16
from tests.pipeline.support import ROOT

PARAMS = load_params(ROOT / "params.yaml")


def worker(folder, stage="finetune_stdb", rank=0, world=1, **changes):
    name = "train_ann" if stage == "train_ann" else "stdb"
    section = getattr(PARAMS, name).model_copy(update=changes)
    params = PARAMS.model_copy(update={name: section})
    return Worker(params, stage, Checkpoints(str(folder), stage, "job"), rank=rank, world=world)


@pytest.fixture
def machine(monkeypatch):
    """A CPU with these instructions, and bfloat16 or none in hardware."""

    def have(instructions, lowered):
        monkeypatch.setattr(pipeline.jobs.choices, "instruction_set", lambda: instructions)
        monkeypatch.setattr(pipeline.jobs.choices, "multiplies_bfloat16", lambda _: lowered)

    return have


@pytest.mark.parametrize(("lowered", "expected"), [(True, "bf16"), (False, "float32")])
def test_auto_follows_the_hardware(tmp_path, machine, lowered, expected):
    """What is asked for by name stays."""
    machine("avx2", lowered)
    chosen = with_choices(worker(tmp_path, precision="auto"))
    assert chosen.params.stdb.precision == "float32"  # spikes hang on it
    assert chosen.params.stdb.events == "avx2"
    assert chosen.choices == {"precision": "float32", "events": "avx2"}
    pinned = with_choices(worker(tmp_path, precision="tf32", events="amx"))
    assert (pinned.params.stdb.precision, pinned.params.stdb.events) == ("tf32", "amx")
    assert pinned.choices == {}
    ann = with_choices(worker(tmp_path, "train_ann", precision="auto"))
    assert ann.params.train_ann.precision == expected
    assert ann.choices == {"precision": expected}


def test_a_gpu_without_bfloat16_has_tf32(machine):
    """Which its products of float32 are made in."""
    machine("avx2", False)
    for section in ("train_ann", "stdb"):
        assert precision(section, torch.device("cuda")) == "tf32"


def test_a_job_that_goes_on_elsewhere_keeps_its_choices(tmp_path, machine):
    """As its checkpoint has them."""
    machine("amx", True)
    for stage in ("train_ann", "finetune_stdb"):
        begun = with_choices(worker(tmp_path, stage, precision="auto"))
        begun.checkpoint({"epoch": 1})
    machine("avx2", False)
    going_on = with_choices(worker(tmp_path, "train_ann", precision="auto"))
    assert going_on.choices == {"precision": "bf16"}
    going_on = with_choices(worker(tmp_path, precision="auto"))
    assert going_on.choices == {"precision": "float32", "events": "amx"}
    assert going_on.resume() == {"epoch": 1, "choices": begun.choices}


def test_other_workers_do_as_the_first(tmp_path, machine, monkeypatch):
    """Whatever machine they are on."""
    machine("avx2", False)
    sent = {"precision": "bf16", "events": "amx"}
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda o: o.__setitem__(0, sent))
    second = with_choices(worker(tmp_path, rank=1, world=2, precision="auto"))
    assert (second.params.stdb.precision, second.params.stdb.events) == ("bf16", "amx")


def test_this_cpu_is_known():
    """A CPU of a kind; a GPU is asked where there is one."""
    assert multiplies_bfloat16("cpu") in (True, False)
