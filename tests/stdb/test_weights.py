"""Weights that are computed: pruned, normalised, parametrised. Fine-tuning reaches their leaves."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import stdb
from stdb.weights import is_computed, plain_copy, weight_of


class LowRank(nn.Module):
    """W + B·A, with W frozen, as LoRA has it."""

    def __init__(self, weight):
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        self.a = nn.Parameter(torch.randn(2, columns, dtype=weight.dtype) / 9)
        self.b = nn.Parameter(torch.randn(rows, 2, dtype=weight.dtype) / 9)

    def forward(self, weight):
        return weight + (self.b @ self.a).view_as(weight)


def low_rank(module):
    module.weight.requires_grad_(False)
    parametrize.register_parametrization(module, "weight", LowRank(module.weight))


@pytest.fixture(
    params=[
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
        lambda m: prune.ln_structured(m, "weight", 0.5, 2, 0),
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        low_rank,
        pytest.param(weight_norm, marks=pytest.mark.filterwarnings("ignore")),
        spectral_norm,
    ],
    ids=[
        "pruned", "pruned rows", "weight norm", "spectral norm", "low rank", "old weight norm",
        "old spectral norm",
    ],
)  # fmt: skip
def change(request):
    """What makes a layer's weights computed."""
    return request.param


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(24, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False),
    ).double()  # fmt: skip


def convert(ann):
    with torch.no_grad():
        for place in (0, 4):
            weights = ann[place].parameters()
            next(weights).mul_(3)  # so that all layers fire
    snn = stdb.convert(ann, stdb.PoissonEncoder(1))
    return snn.eval()  # where spectral norm's iteration stands still


IMAGES = torch.rand(5, 2, 4, 4, generator=torch.Generator().manual_seed(0)).double() * 2 - 1


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_the_gradient_reaches_the_leaves(change, first):
    """∂L/∂leaf by autograd, from ∂L/∂W of a network with these weights as plain ones."""
    ann = network()
    if first:
        for place in (0, 4, 6):
            change(ann[place])
    snn = convert(ann.eval())
    if not first:
        for place in (0, 4, 6):
            change(snn.net[place])
    snn.eval()
    plain = stdb.convert(plain_copy(ann if first else snn.net), snn.encoder) if first else None
    if plain is None:
        plain = copy.deepcopy(snn)
        plain.net = plain_copy(snn.net)
    F.cross_entropy(snn(IMAGES, 9), torch.arange(5) % 4).backward()
    F.cross_entropy(plain(IMAGES, 9), torch.arange(5) % 4).backward()
    for place in (0, 4, 6):
        assert is_computed(snn.net[place])
        assert not is_computed(plain.net[place])
        assert plain.net[place].weight.grad.abs().max() > 0
        leaves = [p for p in snn.net[place].parameters() if p.requires_grad]
        expected = torch.autograd.grad(
            weight_of(snn.net[place]), leaves, plain.net[place].weight.grad
        )
        for leaf, wanted in zip(leaves, expected, strict=True):
            torch.testing.assert_close(leaf.grad, wanted)


def test_pruned_weights_stay_zero():
    """Over steps of an optimiser, in windows of time, and the others learn."""
    snn = convert(network())
    prune.global_unstructured(
        [(snn.net[0], "weight"), (snn.net[4], "weight")], prune.L1Unstructured, amount=0.6
    )
    before = weight_of(snn.net[0]).detach().clone()
    optimiser = torch.optim.SGD([p for p in snn.parameters() if p.requires_grad], 0.5)
    for _ in range(2):
        presentation = snn.present(IMAGES)
        for _ in range(2):
            optimiser.zero_grad()
            F.cross_entropy(snn(presentation, 4), torch.arange(5) % 4).backward()
            optimiser.step()
    after = weight_of(snn.net[0])
    pruned = snn.net[0].weight_mask == 0
    assert pruned.any()
    assert (after[pruned] == 0).all()
    assert (after != before)[~pruned].any()


def test_two_windows_and_one_backward_pass(change):
    """Each window's gradient goes through the weights that it was computed with."""
    ann = network()
    change(ann[0])
    snn = convert(ann)
    together, apart = copy.deepcopy(snn), snn
    presentation = together.present(IMAGES)
    sum(together(presentation, n)[:, 0].sum() for n in (3, 4)).backward()
    presentation = apart.present(IMAGES)
    for n in (3, 4):
        apart(presentation, n)[:, 0].sum().backward()
    for one, other in zip(together.parameters(), apart.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad)


def test_copies_and_exports(change):
    """deepcopy at any time; a program for other runtimes has the weights made plain."""
    ann = network()
    change(ann[4])
    ann(IMAGES)  # now the module holds what autograd made
    snn = convert(ann)
    expected = snn(IMAGES, 6)
    torch.testing.assert_close(copy.deepcopy(snn)(IMAGES, 6), expected)
    program = stdb.export_program(snn, 6, (2, 4, 4)).module()
    torch.testing.assert_close(program(IMAGES, torch.arange(5)), expected)
    assert is_computed(snn.net[4])
    assert is_computed(ann[4])


def test_the_output_is_scaled_at_its_leaves():
    """Where they can be: not those of spectral norm, which nothing scales."""
    for change in (lambda m: prune.l1_unstructured(m, "weight", 0.5), parametrizations.weight_norm):
        snn = convert(network())
        change(snn.net[6])
        expected = 3 * snn(IMAGES, 6)
        snn.scale_output(3)
        torch.testing.assert_close(snn(IMAGES, 6), expected)
    snn = convert(network())
    parametrizations.spectral_norm(snn.net[6])
    with pytest.raises(ValueError, match="cannot be scaled; make them plain first"):
        snn.eval().scale_output(3)
