"""Decisions over time and leaving early, against the logits of a whole presentation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stdb
from stdb import Decision, first_confident, logit_scale, scaled_losses

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


def test_scaling_the_output_multiplies_every_logit_and_changes_no_decision(network):
    """The output layer is linear and only accumulates."""
    snn, images = network
    scaled = copy.deepcopy(snn)
    scaled.scale_output(0.25)  # a power of two: no rounding
    before, after = (net.logits_over_time(images, T) for net in (snn, scaled))
    assert torch.equal(after, 0.25 * before)
    others = [name for name, _ in snn.net.named_parameters() if not name.startswith("output")]
    for name in others:
        assert torch.equal(snn.net.get_parameter(name), scaled.net.get_parameter(name))


def test_all_branches_of_an_output_are_scaled():
    """Where the output is a sum; one with a branch without weights has a scale of its own."""

    class Sum(nn.Module):
        def __init__(self, second: nn.Module) -> None:
            super().__init__()
            self.flatten, self.fc, self.relu = nn.Flatten(), nn.Linear(9, 4, bias=False), nn.ReLU()
            self.first, self.second = nn.Linear(4, 4, bias=False), second

        def forward(self, x):
            hidden = self.relu(self.fc(self.flatten(x)))
            return self.first(hidden) + self.second(hidden)

    images = torch.rand(3, 1, 3, 3)
    for second in (nn.Linear(4, 4, bias=False), nn.Identity()):
        snn = stdb.convert(Sum(second), stdb.DirectEncoder()).eval()
        snn.set_thresholds(dict.fromkeys(snn.thresholds, 0.1))
        with torch.no_grad():
            before = snn(images, 5)
            snn.scale_output(0.5)
            assert torch.equal(snn(images, 5), 0.5 * before)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_none_is_refused(network, factor):
    """Weights stay as they are."""
    with pytest.raises(ValueError, match="allowed: a positive number"):
        network[0].scale_output(factor)


def test_of_logits_that_say_nothing_no_scale_is_found():
    """It would be 0, and nothing could be learned any more."""
    generator = torch.Generator().manual_seed(0)
    z, labels = torch.randn(4000, 5, generator=generator), torch.arange(4000) % 5
    assert logit_scale(scaled_losses(z, labels)) == 1


def test_the_scale_that_fits_is_found():
    """Labels are drawn from softmax(z); of logits that are 8 times too large, it is 1/8."""
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(4000, 5, generator=generator)
    labels = torch.multinomial(z.softmax(1), 1, generator=generator)[:, 0]
    for factor in (1, 8, 64):
        losses = scaled_losses(factor * z[:2000], labels[:2000])
        losses += scaled_losses(factor * z[2000:], labels[2000:])
        assert logit_scale(losses) == pytest.approx(1 / factor, rel=0.19)
        by_torch = F.cross_entropy(factor * z.double() * logit_scale(losses), labels)
        assert float(losses.min()) / 4000 == pytest.approx(float(by_torch))
