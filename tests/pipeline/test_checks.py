"""Networks that cannot work are refused before they are built or trained."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.errors import StageError
from pipeline.learning.checks import build_own, check_calibration, check_randomness, check_room

NUMBERS = itertools.count()
ARGUMENTS = {
    **{"architecture": "vgg16", "in_channels": 3, "image_size": 32, "num_classes": 10},
    **{"width": 1.0, "hidden": 4096, "dropout": 0.2, "classifier_dropout": 0.5},
}
MODULE = """
import torch
from torch import nn
class Mine(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.classes, self.calls = classes, 0
        self.norm = nn.BatchNorm2d(1)
    def forward(self, x):
        self.calls += 1
        x = self.norm(x)
        return torch.rand(len(x), self.classes)
def build(in_channels, image_size, num_classes):
    return Mine(num_classes)
def fails(in_channels, image_size, num_classes):
    network = nn.Flatten()
    raise KeyError("mine")
def fixed():
    return Mine(10)
def by_name(num_classes=5, norm=True):
    return Mine(num_classes if norm else 0)
def by_any_name(**options):
    return Mine(len(options) * 10 // 3)
"""


@pytest.mark.parametrize(
    "changes",
    [{"hidden": 10**11}, {"width": 1e300}, {"image_size": 10**6}, {"width": 1e9}],
    ids=repr,
)
def test_a_network_that_is_too_large_is_refused_before_it_is_built(changes):
    """The line names what is large, and its value."""
    ((key, value),) = changes.items()
    with pytest.raises(StageError, match=rf"{key} \S+.* needs .*GiB free") as caught:
        check_room(ARGUMENTS | changes)
    shown = f"{value:g}" if key == "width" else str(value)
    assert shown in str(caught.value)


def test_the_papers_networks_fit_and_no_random_number_is_drawn():
    """The check leaves the weights as they would be without it."""
    before = torch.random.get_rng_state()
    check_room(ARGUMENTS)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of one's own; its name."""
    name = f"mine_{next(NUMBERS)}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_network_of_ones_own_is_called_once_on_two_images(module):
    """Nothing of it is changed: neither its mode, nor its statistics, nor the random numbers."""
    before = torch.random.get_rng_state()
    network = build_own(ARGUMENTS | {"architecture": f"{module}:build"}, (1, 8, 8))
    assert network.calls == 1
    assert network.training
    assert network.norm.num_batches_tracked == 0
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("function", ["fixed", "by_name", "by_any_name"])
def test_a_function_is_called_with_those_arguments_that_it_takes(module, function):
    """As strangers' are, resnet20() say; one that takes any name is told everything."""
    network = build_own(ARGUMENTS | {"architecture": f"{module}:{function}"}, (1, 8, 8))
    assert network.classes == 10


def test_its_own_exception_is_named_with_its_line(module):
    """File and line of the person's code."""
    arguments = ARGUMENTS | {"architecture": f"{module}:fails"}
    with pytest.raises(
        StageError,
        match=rf"{module}:fails, which raises KeyError: 'mine' \(.*{module}\.py, line 17\)",
    ):
        build_own(arguments, (1, 8, 8))


def test_logits_for_other_classes_are_refused(module, monkeypatch):
    """How many there are, and how many are needed."""
    network = build_own(ARGUMENTS | {"architecture": f"{module}:build"}, (1, 8, 8))
    monkeypatch.setattr(type(network), "forward", lambda self, x: torch.zeros(2, 7))
    with pytest.raises(StageError, match=r"gives \(2, 7\) for two images; allowed: .*\(2, 10\)"):
        build_own(ARGUMENTS | {"architecture": f"{module}:build"}, (1, 8, 8))


class Middle(nn.Module):
    """A norm, a function of (module, x), a linear layer."""

    def __init__(self, middle):
        super().__init__()
        self.norm, self.drop, self.last = nn.BatchNorm2d(3), nn.Dropout2d(), nn.Linear(12, 2)
        self.middle = middle

    def forward(self, x):
        return self.last(self.middle(self, self.norm(x)).flatten(1))


def noisy(m, x):
    return x + torch.randn_like(x) * m.training


def checkpointed(m, x):
    return checkpoint(lambda y: F.dropout(y, 0.5, m.training), x, use_reentrant=False)


def broken(m, x):
    return x if not m.training else x.nothing


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (noisy, "draws random numbers .*allowed: nn.Dropout"),
        (lambda m, x: torch.dropout(x, 0.5, m.training), "draws random numbers"),
        (lambda m, x: F.alpha_dropout(x, 0.5, m.training), "draws random numbers"),
        (checkpointed, "raises RuntimeError: a dropout within torch.utils.checkpoint"),
        (broken, r"in training is given images of \(3, 2, 2\).* raises AttributeError"),
    ],
)
def test_random_numbers_that_a_restart_changes_are_refused(middle, message):
    """Before the training."""
    with pytest.raises(StageError, match=message):
        check_randomness(Middle(middle), (3, 2, 2))


def test_the_check_of_randomness_leaves_all_as_it_is():
    """Mode, statistics, gradients, hooks and torch's generator; dropouts of all spellings pass."""
    network = Middle(lambda m, x: F.dropout(m.drop(x), 0.5, m.training)).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.random.get_rng_state()
    check_randomness(network, (3, 2, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module.training for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_calibration_images_of_one_class_are_refused():
    """A class of the data set's only one is no fault; nor are two classes of ten."""
    said = r"images draws 3 calibration images, all of class 7 of 10, .*; allowed: more images"
    with pytest.raises(StageError, match=said):
        check_calibration(torch.tensor([7, 7, 7]), 10)
    check_calibration(torch.tensor([7, 0, 7]), 10)
    check_calibration(torch.tensor([0, 0]), 1)
    check_calibration(torch.tensor([], dtype=torch.int64), 10)
