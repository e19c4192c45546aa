"""The ANN with T levels, against QCFS and against the formula on the untouched ANN."""

import pytest
import torch
from torch import Tensor, nn

import stdb

LEVELS = 4


def images(count: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(count, 3, 8, 8, generator=generator).double() * 2 - 1


def network(*, bias: bool = True, levels: int | None = None) -> nn.Sequential:
    """In float64, with pooling, and norms that do something where there are biases."""
    torch.manual_seed(1)

    def relu(bound: float) -> nn.Module:
        return nn.ReLU() if levels is None else stdb.QCFS(levels, bound)

    norm = nn.BatchNorm2d(6) if bias else nn.Identity()
    pool = nn.MaxPool2d(2) if bias else nn.AvgPool2d(2)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=bias), norm, relu(0.8), pool,
        nn.Conv2d(6, 8, 3, bias=bias), relu(1.7), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(32, 10, bias=bias),
    )  # fmt: skip
    if isinstance(norm, nn.BatchNorm2d):
        nn.init.normal_(norm.running_mean, 0, 0.2)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if bias:
                nn.init.normal_(module.bias, 0, 0.2)
    return net.double().eval()


def quantised(ann: nn.Sequential, amplitudes: list[Tensor], levels: int, f: float) -> Tensor:
    """The formula, at the places of the ReLUs of an ANN that is a chain."""
    x, left = images(), list(amplitudes)
    with torch.no_grad():
        for module in ann:
            x = module(x)
            if isinstance(module, nn.ReLU):
                a = left.pop(0).view(-1, 1, 1)
                x = a * torch.clamp(torch.floor(x * levels / a + f), 0, levels) / levels
    return x


@pytest.mark.parametrize("per", ["layer", "channel"])
@pytest.mark.parametrize("corrected", [True, False])
def test_an_ann_of_qcfs_is_that_already(per, corrected):
    """With L = T, whatever holds A, and whatever a correction has added to biases."""
    ann, x = network(levels=LEVELS), images()
    snn = stdb.convert(ann, stdb.DirectEncoder(), example=x[:2])
    balance = stdb.balance_thresholds(
        snn, x, timesteps=8, method="learned", per=per, bias_correction=corrected
    )
    assert balance.corrected is corrected
    with torch.no_grad():
        torch.testing.assert_close(stdb.quantised_logits(snn, x, LEVELS), ann(x))
        other = stdb.quantised_logits(snn, x, 2 * LEVELS)
    assert not torch.allclose(other, ann(x))


@pytest.mark.parametrize("per", ["layer", "channel"])
@pytest.mark.parametrize("levels", [1, 3, 8])
def test_a_network_with_biases_is_its_untouched_ann_with_levels(per, levels):
    """A of least error for T = 8, U_0 = V/2, corrected biases left out."""
    ann, x = network(), images()
    snn = stdb.convert(ann, stdb.DirectEncoder(), example=x[:2])
    balance = stdb.balance_thresholds(
        snn, x, timesteps=8, method="mse", per=per, initial_membrane=0.5
    )
    assert balance.corrected
    amplitudes = [
        torch.tensor([n.unit], dtype=torch.float64)
        if per == "layer" or n.amplitude is None
        else n.amplitude
        for n in snn.neurons.values()
    ]
    expected = quantised(ann, amplitudes, levels, f=0.5)
    torch.testing.assert_close(stdb.quantised_logits(snn, x, levels), expected)


@pytest.mark.parametrize(("levels", "f"), [(1, 0.0), (8, 0.0), (8, 0.5)])
def test_a_network_of_the_papers_kind_is_its_ann_with_levels(levels, f):
    """A_l = V_l·A_{l−1} in a chain, Poisson spikes by their mean; logits in units of the last A."""
    ann, x = network(bias=False), images()
    snn = stdb.convert(ann, stdb.PoissonEncoder(seed=0)).train()
    snn.set_thresholds(dict(zip(snn.thresholds, (0.6, 1.3), strict=True)))
    for neuron in snn.neurons.values():
        neuron.initial_membrane = f
    amplitudes = torch.tensor([[0.6], [0.6 * 1.3]], dtype=torch.float64)
    expected = quantised(ann, list(amplitudes), levels, f) / (0.6 * 1.3)
    torch.testing.assert_close(stdb.quantised_logits(snn, x, levels), expected)
    assert snn.training


def test_many_levels_say_what_the_ann_says():
    """Up to A, which the scale of the thresholds changes with all else."""
    ann, x = network(), images()
    snn = stdb.convert(ann, stdb.DirectEncoder(), example=x[:2])
    stdb.balance_thresholds(snn, x, timesteps=20, method="maximum")
    snn.scale_thresholds(50.0)
    with torch.no_grad():
        torch.testing.assert_close(
            stdb.quantised_logits(snn, x, 1 << 24), ann(x), rtol=1e-4, atol=1e-4
        )


def test_an_encoder_of_your_own_is_taken_on_average():
    """Over T, of the images' random streams."""

    def rising(images, start, stop, keys):
        steps = torch.arange(start + 1, stop + 1).view(-1, 1, 1, 1, 1)
        return images * steps

    ann, x = network(bias=False), images() / 10
    snn = stdb.convert(ann, rising)
    twin = stdb.convert(ann, stdb.DirectEncoder())
    torch.testing.assert_close(
        stdb.quantised_logits(snn, x, 3), stdb.quantised_logits(twin, 2 * x, 3)
    )


@pytest.mark.parametrize("levels", [0, -1, 1.5])
def test_levels_that_are_none_are_refused(levels):
    """As numbers of steps are."""
    snn = stdb.convert(network(), stdb.DirectEncoder())
    with pytest.raises(ValueError, match=f"timesteps is {levels}; allowed: 1 or more"):
        stdb.quantised_logits(snn, images(), levels)
