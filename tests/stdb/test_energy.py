"""Energy by operations and with memory: against numbers made by hand, and against each other."""

import copy

import pytest
import torch
from torch import nn

import stdb
from stdb.energy import standing_costs
from stdb.operators.diagonal import Diagonal


def record(snn, x, timesteps):
    with torch.no_grad(), stdb.record_spikes(snn) as statistics:
        snn(x, timesteps)
    return statistics


def test_an_access_costs_more_in_a_larger_memory():
    """Horowitz' three sizes for 64 bits, a line between them and above; never below 8 kB."""
    sizes = {8: 10, 32: 20, 1024: 100, 20: 15, 528: 60, 2016: 180, 1: 10}
    for kilobytes, picojoules in sizes.items():
        assert stdb.access_pj(kilobytes * 128, 64) == pytest.approx(picojoules)
    assert stdb.access_pj(0, 8) == pytest.approx(10 / 8)
    assert stdb.access_pj(8 * 256) == pytest.approx(5)


def test_a_network_by_hand():
    """Two inputs drive three neurons, which drive two outputs; T = 4."""
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 0.25]]))
    snn = stdb.convert(net.eval(), stdb.DirectEncoder())
    snn.set_thresholds({"0": 0.75})
    statistics = record(snn, torch.ones(5, 2), 4)
    # U after the reset: 1 0.25|1.25 …: a spike at each step; 0.5, 1.0 a spike: 2; 0.25, …, 1.0: 1
    fired = statistics.maps["0"].tolist()
    assert fired == [5 * 4, 5 * 2, 5 * 1]
    first, second = statistics.costs()
    assert first == stdb.LayerCost(
        "0", multiplies=6, updates=12, leaves=7, weights=6, inputs=2, outputs=3
    )
    assert second == stdb.LayerCost("2", accumulates=14, arrives=7, weights=6, inputs=3, outputs=2)
    assert first.operations_pj() == pytest.approx(6 * 4.6)
    assert second.operations_pj() == pytest.approx(14 * 0.9)
    access = 10 * 32 / 64  # all memories are small
    assert first.with_memory_pj() == pytest.approx(
        {
            "operations": 6 * 3.2 + (12 + 7) * 0.1,
            "weights": 6 * access,
            "potentials": 2 * 12 * access,
            "values": (6 + 7) * access,
        }
    )
    assert second.with_memory_pj() == pytest.approx(
        {
            "operations": 2 * 7 * 3.2 + 2 * 14 * 0.1,
            "weights": 14 * access,
            "potentials": 2 * 14 * access,
            "values": 7 * access,
        }
    )
    ann = stdb.ann_costs(net, (2,))
    assert [cost.multiplies for cost in ann] == [6, 6]
    assert ann[0].with_memory_pj(8) == pytest.approx(
        {
            "operations": 6 * 0.23,
            "weights": 6 * 10 / 8,
            "potentials": 0,
            "values": (6 + 2 * 3) * 10 / 8,
        }
    )
    assert stdb.ann_energy(net, (2,)) == pytest.approx(12 * 4.6)
    with pytest.raises(ValueError, match="bits is 16; allowed: 8, 32"):
        first.with_memory_pj(16)


@pytest.mark.parametrize("name", ["vgg5", "resnet8", "resnet9"])
@pytest.mark.parametrize("encoder", [stdb.PoissonEncoder(0), stdb.DirectEncoder()])
@pytest.mark.parametrize("normalisation", ["none", "batch"])
def test_layers_add_up_to_the_network(name, encoder, normalisation):
    """Synaptic operations by where they end are those by where they come from, and so is energy."""
    torch.manual_seed(0)
    ann = stdb.build(name, 3, 32, 10, width=0.125, hidden=32, normalisation=normalisation).eval()
    snn = stdb.convert(ann, encoder).eval()
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    stdb.balance_thresholds(snn, x, 4, percentile=95)
    statistics = record(snn, x, 5)
    costs = statistics.costs()
    by_source = statistics.synaptic_operations()
    if isinstance(encoder, stdb.DirectEncoder):
        del by_source["input"]
    assert sum(c.accumulates for c in costs) == pytest.approx(sum(by_source.values()))
    assert sum(c.accumulates for c in costs) > 0
    standing = standing_costs(snn, (3, 32, 32))
    added = sum(c.adds * (1 if c.once else 5) for c in standing)
    total = sum(c.operations_pj() for c in costs) + 0.9 * added
    assert total == pytest.approx(statistics.energy())
    neurons = sum(v.numel() for name, v in statistics.maps.items() if name != "input")
    assert sum(c.updates for c in costs) == 5 * neurons
    weighted = [m for m in snn.modules() if isinstance(m, nn.Conv2d | nn.Linear | Diagonal)]
    assert sum(c.weights for c in costs) == sum(m.weight.numel() for m in weighted)
    fired = sum(float(v.sum()) for name, v in statistics.maps.items() if name != "input") / 3
    assert sum(c.leaves for c in costs) == pytest.approx(fired)
    for bits in (8, 32):
        assert all(min(c.with_memory_pj(bits).values()) >= 0 for c in costs)
    assert len({c.name for c in costs}) == len(costs)


@pytest.mark.parametrize("name", ["vgg5", "vgg16", "resnet8", "resnet9", "resnet20"])
def test_an_ann_multiplies_where_it_has_weights(name):
    """As often as ones times ones say, borders left out; behind a pooling there is less."""
    ann = stdb.build(name, 3, 32, 10, width=0.25, hidden=32).eval()
    ones = copy.deepcopy(ann)
    found = []
    for module in ones.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.ones_(module.weight)
            module.register_forward_pre_hook(lambda _, x: (torch.ones_like(x[0]),))
            module.register_forward_hook(lambda _, x, y: found.append(float(y.double().sum())))
    with torch.no_grad():
        ones(torch.zeros(1, 3, 32, 32))
    costs = stdb.ann_costs(ann, (3, 32, 32))
    assert sorted(cost.multiplies for cost in costs if cost.weights) == sorted(found)
    blocks = [m for m in ann.modules() if isinstance(m, stdb.ResidualBlock)]
    plain = sum(isinstance(block.shortcut, nn.Identity) for block in blocks)
    assert sum(not cost.weights for cost in costs) == plain
    assert stdb.ann_energy(ann, (3, 32, 32)) == pytest.approx(
        4.6 * sum(cost.multiplies for cost in costs)
    )


@pytest.mark.parametrize("bias", [False, True])
def test_a_shortcut_behind_a_pooling_counts_once(bias):
    """In units or not: a multiply-accumulate of each value that is added, and no weights."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=bias), nn.ReLU())
            self.second = nn.Conv2d(4, 4, 3, 2, 1, bias=bias)
            self.pool, self.relu = nn.AvgPool2d(2), nn.ReLU()
            self.out = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=bias))

        def forward(self, x):
            x = self.first(x)
            return self.out(self.relu(self.second(x) + self.pool(x)))

    costs = stdb.ann_costs(Pooled().eval(), (1, 8, 8))
    assert [cost.multiplies for cost in costs if not cost.weights] == [64]
    assert len(costs) == 4


def test_shortcuts_are_counted_with_the_neurons_that_add_them():
    """Their potentials are those of the neurons, whose memory they are in."""
    snn = stdb.convert(stdb.build("resnet8", width=0.125).eval(), stdb.PoissonEncoder(0)).eval()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    stdb.balance_thresholds(snn, x, 4, percentile=95)
    costs = {cost.name: cost for cost in record(snn, x, 5).costs()}
    assert "add" not in costs
    block = costs["group1_block1.conv2"]
    assert block.outputs == 8 * 16 * 16
    assert block.updates == 5 * block.outputs


def test_a_max_pooling_keeps_sums_as_large_as_its_input():
    """They are the potentials that spikes reach; it looks at all of them at every step."""
    ann = stdb.build("vgg5", width=0.125, hidden=16, pooling="max").eval()
    snn = stdb.convert(ann, stdb.PoissonEncoder(0)).eval()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    stdb.balance_thresholds(snn, x, 4, percentile=95)
    costs = {cost.name: cost for cost in record(snn, x, 5).costs()}
    kinds = {type(module).__name__ for module in snn.modules()}
    assert "MaxPool2d" in kinds
    assert costs["conv1"].outputs == 8 * 32 * 32
    assert costs["conv1"].updates >= 5 * 8 * 32 * 32
