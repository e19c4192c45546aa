"""A network that is there, as one from a file, driven as a conversion would drive it."""

import pytest
import torch
from torch import nn

import stdb


def network() -> nn.Module:
    torch.manual_seed(1)
    first = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*first, *second, nn.Linear(6 * 36, 10)).eval()


def images() -> torch.Tensor:
    return torch.rand(40, 2, 6, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1


WIDE = stdb.PoissonEncoder(4, limits=(2.0, 3.0))


@pytest.mark.parametrize("before", [stdb.DirectEncoder(), stdb.PoissonEncoder(4, limits=(1.5,))])
@pytest.mark.parametrize("after", [WIDE, stdb.DirectEncoder()])
def test_what_is_configured_is_what_conversion_gives(before, after):
    """Encoder with its limits, surrogate, λ, what learns; outputs and gradients."""
    rules = {"temporal_gradient": False, "learn_thresholds": True, "learn_leaks": True}
    snn = stdb.convert(network(), before)
    stdb.configure(snn, after, stdb.Linear(0.7), 0.9, **rules)
    expected = stdb.convert(network(), after, stdb.Linear(0.7), 0.9, **rules)
    for one in (snn, expected):
        one(images(), 6).square().sum().backward()
    torch.testing.assert_close(snn(images(), 6), expected(images(), 6))
    same = dict(expected.named_parameters())
    for name, parameter in snn.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, same[name].grad, rtol=1e-4, atol=1e-5)


def test_a_leak_that_is_none_is_refused():
    """The network stays as it was."""
    snn = stdb.convert(network(), WIDE)
    with pytest.raises(ValueError, match="leak is 0; allowed: above 0"):
        stdb.configure(snn, stdb.DirectEncoder(), leak=0)
    assert snn.encoder == WIDE


def test_a_correction_is_taken_off_a_copy():
    """What is left is what the same calibration gives without one; the network stays."""
    plain, snn = (stdb.convert(network(), stdb.DirectEncoder()) for _ in range(2))
    found = stdb.balance_thresholds(snn, images(), 2, method="mse")
    assert found.corrected
    stdb.balance_thresholds(plain, images(), 2, method="mse", bias_correction=False)
    corrected = snn(images(), 5)
    twin = stdb.uncorrected(snn)
    torch.testing.assert_close(twin(images(), 5), plain(images(), 5))
    assert twin.output_correction is None
    assert torch.equal(snn(images(), 5), corrected)
    assert not torch.allclose(twin(images(), 5), corrected)
