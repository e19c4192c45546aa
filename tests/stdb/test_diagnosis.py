"""The diagnosis of a conversion, against numpy and against the network's own spikes."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import stdb
from stdb.diagnosis import LayerDiagnosis

T = 12


@pytest.fixture
def converted():
    """An ANN, its balanced conversion, images."""
    torch.manual_seed(0)
    ann = stdb.build("vgg5", 1, 16, 10, width=0.25, hidden=32)
    snn = stdb.convert(ann, stdb.PoissonEncoder(3))
    images = torch.rand(10, 1, 16, 16) * 2 - 1
    stdb.balance_thresholds(snn, images, T)
    snn.scale_thresholds(0.5)
    return ann, snn, images


def test_every_figure_is_that_of_the_recorded_spikes(converted):
    """Correlation by numpy, rates, silent and saturated neurons from the whole spike trains."""
    ann, snn, images = converted
    found = stdb.diagnose(ann, snn, images, T, batch_size=4)
    activations = {}
    relus = [name for name, module in ann.named_modules() if isinstance(module, nn.ReLU)]
    for relu in relus:
        ann.get_submodule(relu).register_forward_hook(
            lambda module, inputs, output, name=relu: activations.setdefault(name, output)
        )
    ann.eval()
    snn.eval()
    with torch.no_grad(), stdb.record_spikes(snn, trains=True) as statistics:
        ann(images)
        snn(images, T)
    assert [row.layer for row in found] == list(snn.thresholds)
    for row, relu in zip(found, relus, strict=True):
        counts = statistics.train(row.layer).sum(0).flatten().numpy()
        own = activations[relu].flatten().numpy()
        assert row.correlation == pytest.approx(np.corrcoef(own, counts)[0, 1], abs=1e-6)
        assert row.rate == pytest.approx(counts.mean() / T)
        by_neuron = statistics.train(row.layer).sum((0, 1))
        assert row.dead == pytest.approx(float((by_neuron == 0).double().mean()))
        assert row.saturated == pytest.approx((counts >= 0.9 * T).mean())
        assert row.threshold == snn.thresholds[row.layer]


def test_what_is_left_is_what_the_membrane_holds():
    """A neuron with input 0.7 at V = 1 for 3 steps fires at 1.4 and 1.1 and keeps 0.1."""
    ann = nn.Sequential(
        nn.Flatten(), nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 2, bias=False)
    )
    snn = stdb.convert(ann, stdb.DirectEncoder())
    with torch.no_grad():
        ann[1].weight.fill_(0.7)
        snn.net[1].weight.fill_(0.7)
    (row,) = stdb.diagnose(ann, snn, torch.ones(1, 1, 1, 1), 3)
    assert row.rate == pytest.approx(2 / 3)
    assert row.residual == pytest.approx(0.1, abs=1e-6)


def test_an_exact_conversion_correlates_fully():
    """With the analogue input and no rounding to speak of, counts are activations."""
    torch.manual_seed(1)
    ann = nn.Sequential(
        nn.Flatten(), nn.Linear(16, 30, bias=False), nn.ReLU(), nn.Linear(30, 2, bias=False)
    )
    snn = stdb.convert(ann, stdb.DirectEncoder())
    images = torch.rand(20, 1, 4, 4)
    stdb.balance_thresholds(snn, images, 10)
    (row,) = stdb.diagnose(ann, snn, images, 2000)
    assert row.correlation > 0.999
    assert row.hint == ""


def test_channels_that_stand_for_different_amounts_are_weighed():
    """Spikes of a channel of A = 100 say more than those of one of A = 1; all neurons count."""
    torch.manual_seed(0)
    ann = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(108, 2),
    )  # fmt: skip
    with torch.no_grad():
        ann[0].weight.mul_(torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1, 1))
    snn, images = stdb.convert(ann, stdb.DirectEncoder()), torch.rand(8, 1, 8, 8)
    stdb.balance_thresholds(snn, images, 256, method="mse", per="channel")
    assert snn.neurons["0"].amplitude.max() > 10 * snn.neurons["0"].amplitude.min()
    first, second = stdb.diagnose(ann, snn, images, 256)
    assert first.correlation > 0.999
    assert second.correlation > 0.99
    with torch.no_grad(), stdb.record_spikes(snn) as statistics:
        snn(images, 256)
    assert first.rate == pytest.approx(statistics.spikes_per_neuron()["0"] / 256)


def test_a_layer_that_is_silenced_is_named(converted):
    """Its threshold is out of reach: it is dead, and what helps is said in words."""
    ann, snn, images = converted
    snn.set_thresholds(snn.thresholds | {"conv3": 1e6})
    rows = {row.layer: row for row in stdb.diagnose(ann, snn, images, T)}
    assert rows["conv2"].hint == ""
    assert rows["conv3"].dead == 1
    assert rows["conv3"].correlation == 0
    assert rows["conv3"].hint.startswith("conv3 fires 0.00% of the steps: lower its threshold")


def test_a_layer_that_is_saturated_is_named(converted):
    """Its threshold is next to nothing: half of it spikes in every step."""
    ann, snn, images = converted
    snn.set_thresholds(snn.thresholds | {"fc1": 1e-6})
    rows = {row.layer: row for row in stdb.diagnose(ann, snn, images, T)}
    assert rows["fc1"].saturated > 0.2
    assert "raise its threshold scale" in rows["fc1"].hint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"rate": 0.0009}, "fires 0.09% of the steps"),
        ({"saturated": 0.11}, "11% of conv7 spike in nearly every step"),
        ({"correlation": 0.2}, "say little about the ANN's activations (correlation 0.20)"),
    ],
)
def test_the_hint_follows_from_the_figures(change, words):
    """One hint a layer, none where it is well."""
    well = LayerDiagnosis("conv7", 1.0, 0.05, 0.9, 0.1, 0.0, 0.3)
    hint = dataclasses.replace(well, **change).hint
    assert words in hint
    assert bool(hint) == bool(change)


def test_nothing_is_left_behind(converted):
    """Modes, hooks and observers are as before."""
    ann, snn, images = converted
    ann.train()
    snn.eval()
    stdb.diagnose(ann, snn, images, 2)
    assert ann.training
    assert not snn.training
    assert not snn.observers
    assert not any(module._forward_hooks for module in ann.modules())


def test_a_threshold_that_is_far_too_small():
    """Few neurons are driven at all, and those hold hundreds of V: no rate says so."""
    torch.manual_seed(0)
    ann = nn.Sequential(
        nn.Flatten(), nn.Linear(1, 40, bias=False), nn.ReLU(), nn.Linear(40, 2, bias=False)
    )
    with torch.no_grad():
        ann[1].weight.fill_(-1.0)
        ann[1].weight[:2] = 687.0
    snn = stdb.convert(ann, stdb.DirectEncoder())
    (row,) = stdb.diagnose(ann, snn, torch.ones(1, 1, 1, 1), 20)
    assert row.saturated == 2 / 40
    assert row.residual == pytest.approx(686 * 20 * 2 / 40)
    assert "left with a potential of 686 V on average" in row.hint
    assert "raise its threshold scale" in row.hint
