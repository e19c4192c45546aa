"""Decisions over time and leaving early, against the logits of a whole presentation."""

import pytest
import torch

import stdb
from stdb.decision import Decision, first_confident

T = 20


@pytest.fixture(scope="module")
def network():
    """A balanced network in evaluation mode, and images."""
    torch.manual_seed(0)
    ann = stdb.build("vgg5", 1, 16, 10, width=0.25, hidden=32)
    snn = stdb.convert(ann, stdb.PoissonEncoder(3))
    images = torch.rand(8, 1, 16, 16) * 2 - 1
    stdb.balance_thresholds(snn, images, T)
    snn.scale_thresholds(0.5)
    return snn.eval(), images


def test_the_probabilities_are_the_softmax_of_the_logits(network):
    """After every step; the last is that of the network's own output."""
    snn, images = network
    decision = stdb.decide(snn, images, T)
    assert torch.equal(decision.probabilities, snn.logits_over_time(images, T).softmax(2))
    with torch.no_grad():
        expected = snn(images, T).softmax(1)
    assert torch.allclose(decision.final, expected, atol=1e-6)
    assert decision.steps.tolist() == [T] * 8


@pytest.mark.parametrize("confidence", [0.2, 0.3, 0.5, 1.0])
def test_leaving_early_takes_the_first_confident_step(network, confidence):
    """By a loop over images and steps; the steps that are not needed are not presented."""
    snn, images = network
    whole = snn.logits_over_time(images, T).softmax(2)
    decision = stdb.decide(snn, images, T, confidence)
    for k in range(len(images)):
        sure = [t for t in range(1, T + 1) if whole[t - 1, k].max() >= confidence]
        step = sure[0] if sure else T
        assert int(decision.steps[k]) == step
        assert torch.allclose(decision.final[k], whole[step - 1, k], atol=1e-6)
    last = int(decision.steps.max())
    assert last <= len(decision.probabilities) < last + 4


def test_a_decision_settles_where_the_class_changes_for_the_last_time():
    """Written out: classes 1 0 0 1 1, decided after 5 and after 3 steps."""
    classes = torch.tensor([1, 0, 0, 1, 1])
    probabilities = torch.nn.functional.one_hot(classes, 2).float()[:, None].expand(-1, 2, -1)
    assert Decision(probabilities, torch.tensor([5, 3])).settled.tolist() == [4, 2]


def test_an_image_is_decided_alike_in_any_company(network):
    """With the same random stream, a batch of one gives what the batch of eight gives."""
    snn, images = network
    ids = torch.zeros(8, dtype=torch.int64)
    together = stdb.decide(snn, images, T, 0.3, sample_ids=ids)
    for k in range(8):
        alone = stdb.decide(snn, images[k : k + 1], T, 0.3, sample_ids=ids[:1])
        assert int(alone.steps) == int(together.steps[k])
        assert torch.allclose(alone.final[0], together.final[k], atol=1e-6)


def test_nobody_is_sure():
    """Then it is the last step."""
    even = torch.full((3, 2, 4), 0.25)
    assert first_confident(even, 0.5, 3).tolist() == [3, 3]
    assert first_confident(even, 0.25, 3).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("timesteps", "confidence", "message"),
    [(0, None, "timesteps is 0"), (3, 0.0, "confidence is 0.0"), (3, 1.5, "confidence is 1.5")],
)
def test_impossible_wishes_are_refused(network, timesteps, confidence, message):
    """With what is allowed."""
    with pytest.raises(ValueError, match=message):
        stdb.decide(*network, timesteps, confidence)
