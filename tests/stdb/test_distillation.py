"""The distillation loss against its equation, written out in float64, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from stdb import distillation_loss

CASES = [(0.7, 2.0), (0.3, 0.5), (0.0, 3.0), (1.0, 1.0), (0.5, 20.0)]


@pytest.fixture
def given():
    """Logits of nine images, labels, and a teacher's logits."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(9, 5, dtype=torch.float64)).requires_grad_()
    return logits, torch.randint(0, 5, (9,)), 4 * torch.randn(9, 5, dtype=torch.float64)


@pytest.mark.parametrize(("weight", "temperature"), CASES)
def test_the_loss_is_its_equation(given, weight, temperature):
    """Sums of p·log p, and torch's own losses as they are called on probabilities."""
    logits, labels, teacher = given
    p = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    of_labels = -p[torch.arange(9), labels].log()
    own, taught = (z / temperature for z in (logits, teacher))
    q, t = (torch.exp(z) / torch.exp(z).sum(1, keepdim=True) for z in (own, taught))
    divergence = (t * (t.log() - q.log())).sum(1)
    torch.testing.assert_close(F.kl_div(q.log(), t, reduction="none").sum(1), divergence)
    each = (1 - weight) * of_labels + weight * temperature**2 * divergence
    options = {"weight": weight, "temperature": temperature}
    for reduction, expected in (("mean", each.mean()), ("sum", each.sum())):
        found = distillation_loss(logits, labels, teacher, **options, reduction=reduction)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("weight", "temperature"), CASES)
def test_the_gradient_by_hand(given, weight, temperature):
    """(1 − w)·(softmax(z) − y) + w·τ·(softmax(z/τ) − softmax(z_ANN/τ)), of each image's sum."""
    logits, labels, teacher = given
    distillation_loss(
        logits, labels, teacher, weight=weight, temperature=temperature, reduction="sum"
    ).backward()
    z = logits.detach()
    hard = z.softmax(1) - F.one_hot(labels, 5)
    soft = (z / temperature).softmax(1) - (teacher / temperature).softmax(1)
    expected = (1 - weight) * hard + weight * temperature * soft
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-12)


def test_the_defaults_are_those_of_the_documentation(given):
    """w = 0.7, τ = 2, the mean; a teacher that requires a gradient gets none."""
    logits, labels, teacher = given
    learned = teacher.clone().requires_grad_()
    found = distillation_loss(logits, labels, learned)
    found.backward()
    assert learned.grad is None
    whole = distillation_loss(
        logits, labels, teacher, weight=0.7, temperature=2.0, reduction="mean"
    )
    assert torch.equal(found, whole)


def test_a_student_that_is_its_teacher_learns_from_the_labels_alone(given):
    """The divergence and its gradient are 0; large logits are no trouble."""
    logits, labels, _ = given
    alone = distillation_loss(logits, labels, logits.detach(), weight=1.0)
    alone.backward()
    assert alone.item() == 0
    assert logits.grad.abs().max() < 1e-15
    huge = torch.full((1, 2), 1e4).mul(torch.tensor([1, -1]))
    assert distillation_loss(huge, torch.zeros(1).long(), -huge).isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 1.1}, "weight is 1.1; allowed: 0 to 1"),
        ({"weight": float("nan")}, "weight is nan; allowed"),
        ({"temperature": 0}, "temperature is 0; allowed: a number above 0"),
        ({"temperature": float("inf")}, "temperature is inf; allowed"),
        ({"reduction": "none"}, "reduction is 'none'; allowed: 'mean', 'sum'"),
        ({"teacher": torch.zeros(9, 4)}, r"are \(9, 4\); allowed: as the network's, \(9, 5\)"),
        ({"teacher": torch.zeros(1, 5)}, r"are \(1, 5\); allowed"),
    ],
)
def test_what_is_not_allowed_is_refused(given, change, message):
    """Also a teacher of other classes, or of one image that would be broadcast."""
    logits, labels, teacher = given
    arguments = {"teacher": teacher} | change
    with pytest.raises(ValueError, match=message):
        distillation_loss(logits, labels, **arguments)
