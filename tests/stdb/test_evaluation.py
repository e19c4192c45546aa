"""Accuracy at every step, and images as people have them."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stdb

IMAGES = torch.rand(10, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
LABELS = torch.arange(10) % 3


def network(encoder=None):
    """A small one, balanced."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    snn = stdb.convert(net, encoder or stdb.PoissonEncoder(1))
    stdb.balance_thresholds(snn, IMAGES, 20)
    return snn


def test_accuracy_at_every_step_is_that_of_one_presentation():
    """Whatever the batches; the network's mode stays."""
    snn = network().train()
    data = TensorDataset(IMAGES, LABELS)
    found = stdb.evaluate(snn, DataLoader(data, batch_size=4), 6)
    assert snn.training
    logits = snn.eval().logits_over_time(IMAGES, 6)
    expected = (logits.argmax(2) == LABELS).double().mean(1)
    assert torch.equal(found, expected)
    assert torch.equal(stdb.evaluate(snn, [[IMAGES.double(), LABELS]], 6), expected)
    ids = torch.arange(10) + 100
    logits = snn.logits_over_time(IMAGES, 6, sample_ids=ids)
    own = stdb.evaluate(snn, DataLoader(data, batch_size=3), 6, sample_ids=ids)
    assert torch.equal(own, (logits.argmax(2) == LABELS).double().mean(1))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "there are no images to evaluate on"),
        ([IMAGES], r"a batch is a Tensor; allowed: \(images, labels\)"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(batches, message):
    """With what is allowed; the mode stays."""
    snn = network().train()
    with pytest.raises(ValueError, match=message):
        stdb.evaluate(snn, batches, 3)
    assert snn.training


@pytest.mark.parametrize("labelled", [True, False])
def test_thresholds_and_diagnosis_take_a_loaders_batches(labelled):
    """As they take a tensor."""
    snn = network()
    tensors = (IMAGES, LABELS) if labelled else (IMAGES,)
    loader = DataLoader(TensorDataset(*tensors), batch_size=4)
    expected = stdb.balance_thresholds(snn, IMAGES, 20)
    assert stdb.balance_thresholds(snn, loader, 20) == expected
    assert stdb.balance_thresholds(snn, IMAGES.split(3), 20) == expected
    ann = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    assert stdb.diagnose(ann, snn, loader, 5) == stdb.diagnose(ann, snn, IMAGES, 5)


def test_batches_without_images_are_refused():
    """By what they are."""
    with pytest.raises(ValueError, match="a batch is a dict; allowed: a tensor of images"):
        stdb.balance_thresholds(network(), [{"x": IMAGES}], 5)
    with pytest.raises(ValueError, match="there are no images"):
        stdb.balance_thresholds(network(), [], 5)
