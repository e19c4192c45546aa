"""The loop of train_ann for few steps: bounds that start, learn and stay above 0; recipes."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

import stdb
from pipeline import finetune_stdb, train_ann
from pipeline.files import ANN
from pipeline.learning.fit import order
from pipeline.learning.networks import build_ann, described, save_weights
from pipeline.learning.norms import group_sizes
from tests.pipeline.support import NETWORK, PARAMS, STDB, KeptWorker, make_files, worker

FEW = NETWORK.model_copy(
    update={"normalisation": "batch", "activation": "qcfs", "levels": 4, "dropout": 0.0}
)
RECIPE = PARAMS.train_ann.model_copy(
    update={
        **{"epochs": 3, "batch_size": 12, "norm_images": 4, "learning_rate": 0.1},
        **{"schedule": "onecycle", "nesterov": True, "label_smoothing": 0.1, "weight_decay": 0.1},
        **{"augment": True, "cutout": 3},
    }
)
BOUNDS = [f"{name}_relu.bound" for name in ("conv1", "conv2", "conv3", "fc1", "fc2")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


def worker_of(files, network=FEW, recipe=RECIPE, **changes) -> KeptWorker:
    cluster = PARAMS.cluster.model_copy(update={"checkpoint_steps": 2})
    ann = recipe.model_copy(update=changes)
    sections = {"network": network, "train_ann": ann, "cluster": cluster}
    return KeptWorker(PARAMS.model_copy(update=sections), files[0])


def loop(one: KeptWorker) -> dict:
    train_ann.train_loop(one)
    return one.states[-1]


@pytest.fixture(scope="module")
def whole(files) -> KeptWorker:
    """A training that nothing interrupted."""
    one = worker_of(files)
    loop(one)
    return one


@pytest.mark.parametrize("place", range(4))
def test_an_interrupted_training_with_bounds_ends_as_a_whole_one(files, whole, place):
    """Resumed within an epoch or after one: bounds, rates, cutouts, all bit for bit."""
    end = whole.states[-1]
    again = worker_of(files)
    again.states = whole.states[place : place + 1]
    resumed = loop(again)
    assert set(BOUNDS) <= set(end["network"])
    for name, value in end["network"].items():
        assert torch.equal(value, resumed["network"][name]), name
    assert resumed["history"] == end["history"]
    assert resumed["test"] == end["test"]


def test_bounds_start_from_the_first_images_and_learn(files, whole):
    """Those of the first epoch's order, in the groups of the norms, whatever the workers."""
    train = files[1]["train"]
    torch.manual_seed(RECIPE.seed)
    ann = build_ann(FEW, train)
    first = torch.cat(order(len(train), 12, RECIPE.seed, 1))
    sizes = group_sizes(len(first), 4)
    expected = stdb.start_bounds(ann, train.take(first).pixels().split(sizes))
    still = loop(worker_of(files, epochs=1, learning_rate=1e-30))["network"]
    found = whole.states[-1]["network"]
    for name in BOUNDS:
        start = expected[name.removesuffix(".bound")]
        assert float(still[name]) == pytest.approx(start, rel=1e-5)
        assert 0 < float(found[name]) != start


def test_bounds_are_kept_above_0(files):
    """By a training whose steps are too large for them."""
    found = loop(worker_of(files, epochs=1, learning_rate=3.0, schedule="milestones", momentum=0.0,
                           nesterov=False))["network"]  # fmt: skip
    assert min(float(found[name]) for name in BOUNDS) > 0


@pytest.mark.parametrize(("schedule", "same"), [("milestones", False), ("cosine", True)])
def test_norms_decay_with_the_papers_schedule_alone(files, schedule, same):
    """And bounds with none: with another decay, what has none goes the same first step."""
    size = len(files[1]["train"])
    one, other = (
        loop(worker_of(files, epochs=1, batch_size=size, schedule=schedule, weight_decay=decay))
        for decay in (0.0, 0.3)
    )
    one, other = one["network"], other["network"]
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])
    assert torch.equal(one["conv1_norm.weight"], other["conv1_norm.weight"]) is same
    for name in BOUNDS:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize(
    "change",
    [{"nesterov": False}, {"label_smoothing": 0.0}, {"cutout": 0}, {"schedule": "cosine"}],
)
def test_every_part_of_the_recipe_has_an_effect(files, whole, change):
    """A parameter that is tracked and then not used would be a lie."""
    other = loop(worker_of(files, **change))["network"]
    assert not torch.equal(other["conv1.weight"], whole.states[-1]["network"]["conv1.weight"])


def test_sixteen_bits_learn_too(files):
    """Levels are counted in float32 there; it is another training."""
    found = loop(worker_of(files, epochs=1, precision="bf16"))
    assert found["network"]["conv1_relu.bound"].dtype == torch.float32
    assert found["history"][0]["loss/train"] < 5


def test_weights_that_are_given_keep_their_bounds(files, tmp_path):
    """They are evaluated, not started again."""
    torch.manual_seed(9)
    ann = build_ann(FEW, files[1]["train"])
    with torch.no_grad():
        ann.conv1_relu.bound.fill_(0.77)
    path = tmp_path / "given.safetensors"
    save_weights(ann.state_dict(), path)
    found = loop(worker_of(files, weights=str(path)))["best_network"]
    assert float(found["conv1_relu.bound"]) == pytest.approx(0.77)


def test_a_file_says_what_is_not_the_papers(tmp_path):
    """And nothing more, so that other files stay byte for byte."""
    assert "activation" not in described(NETWORK)
    assert "levels" not in described(NETWORK)
    save_weights({"w": torch.zeros(1)}, tmp_path / "w.safetensors", network=described(FEW))
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        network = json.loads(file.metadata()["config"])["network"]
    assert (network["activation"], network["levels"]) == ("qcfs", 4)


def test_the_ann_of_what_was_fine_tuned_has_its_bounds(files, tmp_path):
    """A network without batch norm: weights as learned, bounds as the ANN's training left them."""
    network = NETWORK.model_copy(update={"activation": "clip"})
    train = files[1]["train"]
    torch.manual_seed(2)
    ann = build_ann(network, train)
    stdb.start_bounds(ann, [train.pixels()])
    (tmp_path / ANN).parent.mkdir()
    save_weights(ann.state_dict(), tmp_path / ANN)
    snn = stdb.convert(ann, stdb.DirectEncoder(), example=train.pixels()[:2])
    with torch.no_grad():
        snn.net.conv1.weight.mul_(2)
    before = copy.deepcopy(ann.state_dict())
    found = finetune_stdb.learned_ann(worker(tmp_path, STDB, network=network), snn, train)
    for name, value in found.state_dict().items():
        assert torch.equal(value, before[name] * (2 if name == "conv1.weight" else 1)), name
    assert isinstance(found, nn.Module)
