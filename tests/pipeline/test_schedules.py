"""Schedules against torch's own; what the weight decay leaves alone."""

import math

import pytest
import torch
from torch import nn

import stdb
from pipeline.learning.schedules import learning_rate, parameter_groups
from pipeline.params import TrainAnnParams
from tests.pipeline.support import PARAMS


def params(**changes) -> TrainAnnParams:
    return TrainAnnParams(**PARAMS.train_ann.model_dump() | changes)


def rates(chosen: TrainAnnParams, steps: int) -> list[float]:
    """Of all steps of a training."""
    epochs = range(1, chosen.epochs + 1)
    return [learning_rate(chosen, e, s, steps) for e in epochs for s in range(1, steps + 1)]


def of_torch(make, count: int) -> list[float]:
    """The rates that a scheduler of torch gives."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    scheduler, found = make(optimizer), []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(("epochs", "steps"), [(1, 2), (3, 7), (10, 20), (1, 1)])
def test_onecycle_is_torchs(epochs, steps):
    """At its defaults."""
    found = rates(params(schedule="onecycle", learning_rate=0.2, epochs=epochs), steps)
    count = epochs * steps

    def make(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, count, cycle_momentum=False)

    assert found == pytest.approx(of_torch(make, count), rel=1e-9)


@pytest.mark.parametrize(("epochs", "steps", "rise"), [(3, 7, 1), (10, 20, 10), (1, 5, 0)])
def test_a_cosine_rises_along_a_line_and_falls_as_torchs(epochs, steps, rise):
    """Over a twentieth of the steps, and over the rest; the last step is still above 0."""
    found = rates(params(schedule="cosine", learning_rate=0.2, epochs=epochs), steps)
    count = epochs * steps

    def make(optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count - rise)

    assert found[:rise] == pytest.approx([0.2 * (k + 1) / (rise + 1) for k in range(rise)])
    assert found[rise:] == pytest.approx(of_torch(make, count - rise), abs=1e-9)
    assert found[-1] > 0
    assert max(found) == 0.2


def test_milestones_are_of_epochs():
    """The same at every step of one, as the paper has it."""
    found = rates(params(milestones=[0.5, 0.75], epochs=4, learning_rate=1.0), 3)
    assert found == pytest.approx([1.0] * 6 + [0.1] * 3 + [0.01] * 3)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), stdb.QCFS(4), nn.Flatten(), nn.Linear(8, 3)
    )


@pytest.mark.parametrize("schedule", ["milestones", "onecycle", "cosine"])
def test_bounds_do_not_decay_and_norms_only_with_milestones(schedule):
    """In the order of the network; the rest as the parameters say."""
    net = network()
    decays, *still = parameter_groups(net, params(schedule=schedule))
    names = {id(p): name for name, p in net.named_parameters()}
    norms = ["1.weight", "1.bias"]
    plain = ["0.weight", "0.bias", "4.weight", "4.bias"]
    with_norms = ["0.weight", "0.bias", *norms, "4.weight", "4.bias"]
    kept = [names[id(p)] for p in decays["params"]]
    assert kept == (with_norms if schedule == "milestones" else plain)
    ((group),) = still
    expected = ["2.bound"] if schedule == "milestones" else [*norms, "2.bound"]
    assert [names[id(p)] for p in group["params"]] == expected
    assert group["weight_decay"] == 0
    assert "weight_decay" not in decays


def test_the_papers_network_is_one_group():
    """As it always was."""
    net = stdb.build("vgg5", image_size=8, width=0.1, hidden=8)
    for schedule in ("milestones", "onecycle"):
        ((group),) = parameter_groups(net, params(schedule=schedule))
        assert [id(p) for p in group["params"]] == [id(p) for p in net.parameters()]


def test_rates_are_finite_for_any_length():
    """Also of very short trainings."""
    for schedule in ("onecycle", "cosine"):
        for epochs in (1, 2, 3, 4):
            for steps in (1, 2, 3, 10):
                found = rates(params(schedule=schedule, epochs=epochs), steps)
                assert all(math.isfinite(rate) and rate > 0 for rate in found)
