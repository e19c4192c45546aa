"""What a conversion says of itself: the table of rewrites, and the check against the ANN."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stdb
from stdb.operators.linear import FullyConnected

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Net(nn.Module):
    """One of each kind of row."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.pool = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2)
        self.same, self.output = nn.Identity(), nn.Linear(36, 5)

    def forward(self, x):
        x = self.pool(F.relu(self.norm(self.conv(x))))
        return F.softmax(self.output(torch.flatten(self.same(x), 1)), 1)


def test_every_operation_has_a_row():
    """Its place, what it was, what it became."""
    snn = stdb.convert(Net().eval(), stdb.DirectEncoder(), example=IMAGES)
    assert [tuple(row) for row in snn.rewrites] == [
        ("conv", "Conv2d", "convolution conv"),
        ("norm", "BatchNorm2d", "folded into conv"),
        ("relu (in forward)", "relu", "neurons behind the max-pooling that reads it"),
        ("pool", "MaxPool2d", "max pooling pool_, neuron pool_relu"),
        ("same", "Identity", "nothing"),
        ("flatten (in forward)", "flatten", "flatten flatten"),
        ("output", "Linear", "linear output"),
        ("softmax (in forward)", "softmax", "nothing"),
    ]


def test_what_hooks_change_is_found():
    """Tracing does not see them; the first layer that differs is named."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    )
    net[2].register_forward_hook(lambda module, inputs, output: output * 2)
    stdb.convert(net, stdb.DirectEncoder())
    with pytest.raises(stdb.ConversionError, match=r"^layer 2 .*differs .*forward hooks"):
        stdb.convert(net, stdb.DirectEncoder(), example=IMAGES)


class Random(Net):
    """Noise that no mode turns off."""

    def forward(self, x):
        return super().forward(x + torch.rand(()).item())


def test_what_differs_at_each_call_is_found():
    """In the layer behind it."""
    with pytest.raises(stdb.ConversionError, match=r"^layer norm .*differs from the ANN's"):
        stdb.convert(Random(), stdb.DirectEncoder(), example=IMAGES)


def test_the_check_leaves_the_network_as_it_is():
    """Its mode, type, hooks, statistics, and the generator of random numbers."""
    net = Net().train()
    net.conv.register_forward_hook(hook := lambda module, inputs, output: None)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.random.get_rng_state()
    snn = stdb.convert(net, stdb.DirectEncoder(), example=IMAGES)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert net.training
    assert snn.training
    hooks = [list(module._forward_hooks.values()) for module in net.modules()]
    assert hooks == [[], [hook], [], [], [], []]
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == before[name].dtype


class Watched(nn.Sequential):
    """Notes what there is in float64 while it is called."""

    def forward(self, x):
        HELD.append(in_float64())
        return super().forward(x)


HELD = []


def in_float64():
    """Bytes of all tensors of that type that are alive; those of a tracing have no memory."""
    alive = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
    found = [t for t in alive if t.dtype == torch.float64 and t.device.type == "cpu"]
    return sum({t.data_ptr(): t.numel() * 8 for t in found}.values())


def test_the_check_holds_one_copy_in_float64(monkeypatch):
    """The user's network is one, and then the graph's: twice the memory of float32 weights."""
    net = Watched(nn.Flatten(), nn.Linear(192, 999), nn.ReLU(), nn.Linear(999, 999), nn.ReLU())
    net.append(nn.Linear(999, 5))
    plain = FullyConnected.plain

    def watched(operator, module, *inputs):
        HELD.append(in_float64())
        return plain(operator, module, *inputs)

    monkeypatch.setattr(FullyConnected, "plain", watched)
    gc.collect()
    HELD.clear()
    before = in_float64()
    stdb.convert(net, stdb.DirectEncoder(), example=IMAGES)
    whole = sum(p.numel() * 8 for p in net.parameters())
    assert 0.9 * whole < max(HELD) - before < 1.2 * whole
    net[3].register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(stdb.ConversionError, match=r"^layer 3 "):
        stdb.convert(net, stdb.DirectEncoder(), example=IMAGES)


def test_export_follows_where_torch_fx_does_not_and_names_stay():
    """With an example; without one the cause is said."""

    class Checked(Net):
        def forward(self, x):
            assert isinstance(x, torch.Tensor)
            return super().forward(x)

    net = Checked().eval()
    with pytest.raises(stdb.ConversionError, match="cannot be traced"):
        stdb.convert(net, stdb.DirectEncoder())
    snn = stdb.convert(net, stdb.DirectEncoder(), example=IMAGES)
    assert list(snn.thresholds) == ["conv"]
    assert {"net.conv.weight", "net.output.bias"} <= set(snn.state_dict())


def test_what_neither_follows_is_said_once(capfd, caplog):
    """In torch.fx's words, and nothing of torch.export's."""

    class Looks(Net):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    with pytest.raises(stdb.ConversionError, match="control flow that depends on the data"):
        stdb.convert(Looks(), stdb.DirectEncoder(), example=IMAGES)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
