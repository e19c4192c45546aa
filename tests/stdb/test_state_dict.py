"""What ``state_dict`` of a spiking network has, into whichever network of the kind it is loaded."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import stdb
from tests.stdb.support import batch, small_cnn

IMAGES = batch()


def fresh() -> stdb.SpikingNetwork:
    return stdb.convert(small_cnn(), stdb.DirectEncoder())


def calibrated(seed: int, **settings) -> stdb.SpikingNetwork:
    snn = fresh()
    stdb.balance_thresholds(snn, batch(seed), 4, **settings)
    return snn.eval()


@pytest.mark.parametrize("into", [fresh, lambda: calibrated(9), lambda: calibrated(9, per="layer")])
@pytest.mark.parametrize("corrected", [True, False])
def test_it_is_all_that_another_calibration_has_to_know(into, corrected):
    """U_0, V, amplitudes and corrections, where the other has none of them or others."""
    kept = [calibrated(seed, bias_correction=corrected) for seed in range(4)]
    assert len({next(iter(one.neurons.values())).initial_membrane for one in kept}) > 1
    for one in kept:
        other = into().eval()
        other.load_state_dict(one.state_dict())
        assert torch.equal(other(IMAGES, 4), one(IMAGES, 4))
        other.scale_thresholds(0.5)  # which what a spike stands for takes part in
        twin = copy.deepcopy(one)
        twin.scale_thresholds(0.5)
        assert torch.equal(other(IMAGES, 4), twin(IMAGES, 4))


def test_one_of_before_is_still_read():
    """Version 0.1.0 kept tensors alone; U_0 is then the network's own."""
    snn = calibrated(0)
    before = {name: x for name, x in snn.state_dict().items() if not name.endswith("_extra_state")}
    assert len(before) < len(snn.state_dict())
    expected = snn(IMAGES, 4)
    snn.load_state_dict(before)
    assert torch.equal(snn(IMAGES, 4), expected)
    with pytest.raises(RuntimeError, match="Missing key"):
        snn.load_state_dict({n: x for n, x in before.items() if not n.endswith("leak")})


def test_a_file_of_the_network_has_tensors_alone(tmp_path):
    """The settings of a module are in the file's description."""
    snn = calibrated(0)
    stdb.save(snn, tmp_path / "snn.safetensors", timesteps=4, classes=list("abcde"))
    found, _ = stdb.load(tmp_path / "snn.safetensors")
    assert torch.equal(found(IMAGES, 4), snn(IMAGES, 4))
    assert b"_extra_state" not in (tmp_path / "snn.safetensors").read_bytes()


class TwoHeads(nn.Module):
    """One of which forward does not use."""

    def __init__(self):
        super().__init__()
        self.body, self.other = small_cnn(), nn.Linear(216, 3)

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("make", [small_cnn, TwoHeads], ids=["folded", "two-heads"])
def test_all_that_learns_has_a_gradient(make, tmp_path):
    """So that DistributedDataParallel does not wait for one: norms that were folded have none."""
    surrogate = stdb.surrogate_of("rectangle", 4)
    snn = stdb.convert(make(), stdb.DirectEncoder(), surrogate, learn_thresholds=True)
    stdb.balance_thresholds(snn, IMAGES, 4)
    snn.train()(IMAGES, 4).square().sum().backward()
    learns = {name for name, parameter in snn.named_parameters() if parameter.requires_grad}
    assert learns == {name for name, p in snn.named_parameters() if p.grad is not None}
    assert len(learns) == 5  # two layers' weights and biases, one V
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        parallel = DistributedDataParallel(snn)
        for _ in range(2):
            parallel(IMAGES, 4).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
