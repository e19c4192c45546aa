"""The compiled training: when it is, why not, and that it is the same training."""

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from pipeline import train_ann
from pipeline.errors import StageError
from pipeline.learning.compiling import PAYS, compiled, obstacle
from pipeline.learning.networks import build_ann
from tests.pipeline.support import NETWORK, PARAMS, KeptWorker, make_files

FEW = NETWORK.model_copy(
    update={
        **{"normalisation": "batch", "activation": "qcfs", "levels": 4},
        **{"dropout": 0.0, "classifier_dropout": 0.0},
    }
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


def worker_of(files, network=FEW, world=1, **changes) -> KeptWorker:
    ann = PARAMS.train_ann.model_copy(
        update={"epochs": 3, "batch_size": 12, "norm_images": 4, **changes}
    )
    cluster = PARAMS.cluster.model_copy(update={"checkpoint_steps": 2})
    sections = {"network": network, "train_ann": ann, "cluster": cluster}
    return KeptWorker(PARAMS.model_copy(update=sections), files[0], world=world)


@pytest.fixture
def calls(monkeypatch) -> list:
    """What is given to torch.compile, which does nothing here; and the images of each call."""
    seen: list = []

    def compiling(function, **settings):
        seen.append(settings)

        def fast(images):
            seen.append(len(images))
            return function(images)

        return fast

    monkeypatch.setattr(torch, "compile", compiling)
    return seen


def enter(files, worker, work=1e12) -> bool:
    train = files[1]["train"]
    with compiled(worker, build_ann(worker.params.network, train), train, work) as fast:
        return fast


@pytest.mark.parametrize(
    ("wanted", "work", "changes", "found"),
    [
        ("auto", PAYS, {}, True),
        ("auto", PAYS / 1000, {}, False),  # of 3 epochs of 48 images
        ("auto", PAYS, {"activation": "relu", "levels": None}, False),
        (True, 1, {"activation": "relu", "levels": None}, True),
        (False, PAYS, {}, False),
    ],
)
def test_auto_compiles_long_trainings_with_bounds(files, calls, wanted, work, changes, found):
    """Where it pays; true and false are meant."""
    network = FEW.model_copy(update=changes)
    assert enter(files, worker_of(files, network, compile=wanted), work) is found
    assert len(calls) == found


def test_the_default_of_the_digits_is_not_compiled():
    """Nor any training of its size: its weights stay as they are, byte for byte."""
    assert PARAMS.train_ann.compile == "auto"
    work = 10**6  # of its network, an image
    assert PARAMS.train_ann.epochs * 1797 * work < PAYS / 100


@pytest.mark.parametrize(
    ("network", "world", "compiler", "said"),
    [
        ({"dropout": 0.1}, 1, "sh", "its dropouts are drawn by sample; with network.dropout and"),
        ({}, 3, "sh", "it is that of one worker alone"),
        ({}, 1, "no-such-compiler", "there is no C++ compiler, no-such-compiler"),
    ],
)
def test_what_keeps_it_from_being_compiled_is_said(
    files, calls, monkeypatch, capsys, network, world, compiler, said
):
    """In a line; the training goes on as it is."""
    monkeypatch.setenv("CXX", compiler)
    worker = worker_of(files, FEW.model_copy(update=network), world, compile=True)
    assert enter(files, worker) is False
    assert f"the training is not compiled: {said}" in capsys.readouterr().out
    assert calls == []


def test_networks_of_ones_own_are_not_compiled(files):
    """They may do anything."""
    network = FEW.model_copy(update={"architecture": "my_networks:small"})
    assert "built-in" in obstacle(worker_of(files, network), torch.nn.Identity())


def test_only_steps_are_compiled(files, calls):
    """Every group of a batch; evaluations are not, and the network is left as it was."""
    worker = worker_of(files, compile=True)
    train_ann.train_loop(worker)
    assert calls[0] == {"dynamic": False}
    assert calls[1:] == [4] * (3 * len(files[1]["train"]) // 4)
    plain = worker_of(files, compile=False)
    train_ann.train_loop(plain)
    for name, value in plain.states[-1]["network"].items():
        assert torch.equal(worker.states[-1]["network"][name], value), name


def test_a_compiler_that_fails_is_said_and_the_training_goes_on(files, monkeypatch, capsys):
    """Once; as if it had not been asked for."""

    def failing(function, **settings):
        def fast(images):
            raise RuntimeError("g++: fatal error\nmuch more")

        return fast

    monkeypatch.setattr(torch, "compile", failing)
    worker, plain = worker_of(files, compile=True), worker_of(files, compile=False)
    train_ann.train_loop(worker)
    said = capsys.readouterr().out
    assert said.count("is not compiled: torch.compile failed: g++: fatal error\n") == 1
    train_ann.train_loop(plain)
    for name, value in plain.states[-1]["network"].items():
        assert torch.equal(worker.states[-1]["network"][name], value), name


@pytest.mark.parametrize("begun", ["false", "true", None])
def test_what_auto_chose_stays_with_the_job(files, calls, begun):
    """A training that goes on elsewhere goes on as it began."""
    worker = worker_of(files, compile="auto")
    if begun is not None:
        worker.states = [{"choices": {"compile": begun}}]
    assert enter(files, worker, PAYS) is (begun != "false")
    assert worker.choices == {"compile": begun or "true"}
    assert len(calls) == (begun != "false")


def test_a_compiler_that_fails_in_the_backward_pass_is_a_mistake_to_mend(files, calls):
    """It is compiled when it is first wanted, behind the forward pass."""
    train = files[1]["train"]
    worker = worker_of(files, compile=True)
    said = "torch.compile failed: no loop; train_ann.compile: false trains without it"
    with (
        pytest.raises(StageError, match=said),
        compiled(worker, build_ann(worker.params.network, train), train, PAYS),
    ):
        raise TorchDynamoException("no loop\nmuch more")


@pytest.mark.slow
def test_an_interrupted_compiled_training_ends_as_a_whole_one(files):
    """Bit for bit; and to rounding, of which a level makes a step, as one that is not compiled."""
    whole, plain = worker_of(files, compile=True), worker_of(files, compile=False)
    train_ann.train_loop(whole)
    train_ann.train_loop(plain)
    again = worker_of(files, compile=True)
    again.states = whole.states[1:2]
    train_ann.train_loop(again)
    end = whole.states[-1]
    for name, value in end["network"].items():
        assert torch.equal(value, again.states[-1]["network"][name]), name
    assert end["history"] == again.states[-1]["history"]
    losses = [row["loss/train"] for row in plain.states[-1]["history"]]
    assert [row["loss/train"] for row in end["history"]] == pytest.approx(losses, rel=2e-2)
