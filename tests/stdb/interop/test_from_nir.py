"""A door in: NIR graphs of ours come back as they were, those of others run as they do there."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stdb

nir = pytest.importorskip("nir", reason="nir is not installed; `make setup-bench` installs it")
IMAGES = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Net(nn.Module):
    """Biases, a norm behind a sum, average pooling."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.output = nn.BatchNorm2d(4), nn.Linear(64, 5)

    def forward(self, x):
        y = F.relu(self.first(x))
        z = F.relu(self.norm(self.second(y) + y))
        return self.output(F.avg_pool2d(z, 2).flatten(1))


NETWORKS = {
    "vgg5": lambda: stdb.build("vgg5", 2, 8, 5, width=1 / 16, hidden=12),
    "resnet8": lambda: stdb.build("resnet8", 2, 8, 5, width=1 / 16),
    "biases": Net,
}


@pytest.mark.parametrize("leak", [1.0, 0.875])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_round_trip_is_the_identity(name, leak, tmp_path):
    """Through a file: the logits, V, λ and U_0; and once more, the file."""
    torch.manual_seed(0)
    snn = stdb.convert(NETWORKS[name]().eval(), stdb.PoissonEncoder(1), leak=leak)
    for neuron in snn.neurons.values():
        neuron.initial_membrane = 0.5
    stdb.balance_thresholds(snn, IMAGES, 30, percentile=99)
    nir.write(tmp_path / "snn.nir", stdb.to_nir(snn, (2, 8, 8)))
    again = stdb.from_nir(nir.read(tmp_path / "snn.nir"), stdb.PoissonEncoder(1))
    logits = snn(IMAGES, 20)
    assert logits.abs().max() > 0
    assert torch.equal(again(IMAGES, 20), logits)
    assert list(again.thresholds.values()) == list(snn.thresholds.values())
    third = stdb.from_nir(stdb.to_nir(again, (2, 8, 8)), stdb.PoissonEncoder(1))
    assert torch.equal(third(IMAGES, 20), logits)


def leaky(count, beta, threshold):
    """snnTorch's neuron, with a λ and a V for each, as its export wants them."""
    snn = pytest.importorskip("snntorch", reason="snnTorch is not installed; `make setup-bench`")
    return snn.Leaky(
        beta=torch.full((count,), beta), threshold=torch.full((count,), threshold),
        init_hidden=True, reset_mechanism="subtract",
    )  # fmt: skip


@torch.no_grad()
def test_what_snntorch_exports_runs_as_there():
    """Spike by spike, to its counts: its last layer spikes."""
    torch.manual_seed(0)
    first, second = nn.Linear(16, 20), nn.Linear(20, 5)
    net = nn.Sequential(first, leaky(20, 0.75, 1.0), second, leaky(5, 0.5, 0.5))
    for parameter in (*first.parameters(), *second.parameters()):
        parameter.copy_(torch.round(parameter * 64) / 16)  # float32 has the sums exactly
    export = pytest.importorskip("snntorch.export_nir", reason="needs nirtorch").export_to_nir
    images = (torch.rand(4, 16) * 16).round() / 8
    graph = export(net, images[0])
    with pytest.raises(ValueError, match=r"node 1 is a LIF: NIR resets it to v_reset, ours sub"):
        stdb.from_nir(graph)
    snn = stdb.from_nir(graph, reset="subtract")
    for neuron in snn.neurons.values():  # which the file has to the rounding of 1 − dt/τ
        neuron.leak.copy_((neuron.leak * 64).round() / 64)
        neuron.threshold.copy_((neuron.threshold * 64).round() / 64)
    counts = sum(net(images) for _ in range(20))
    assert counts.max() > 3
    assert torch.equal(snn(images, 20), counts)


def graph(**nodes):
    """A chain of nodes between an input of (2, 4, 4) and the output, a Linear at its end."""
    shape = {"input": np.array([2, 4, 4])}
    nodes = {"input": nir.Input(shape), **nodes, "flatten": nir.Flatten(shape, -3, -1)}
    nodes |= {"linear": nir.Linear(np.ones((3, 32), np.float32))}
    nodes |= {"output": nir.Output({"output": np.array([3])})}
    names = list(nodes)
    return nir.NIRGraph(nodes, list(pairwise(names)), type_check=False)


def fire(threshold, **more):
    """An IF of (2, 4, 4) that subtracts."""
    array = np.broadcast_to(np.asarray(threshold, np.float32), (2, 4, 4)).copy()
    return nir.IF(r=np.ones_like(array), v_threshold=array, metadata={"reset": "subtract"}, **more)


@torch.no_grad()
def test_thresholds_by_channel_become_a_scale():
    """I/V_c against 1 spikes as I against V_c."""
    levels = np.array([0.5, 2.0]).reshape(2, 1, 1)
    image = torch.full((1, 2, 4, 4), 0.75)
    snn = stdb.from_nir(graph(neuron=fire(levels)))
    with stdb.record_spikes(snn) as statistics:
        snn(image, 8)
    counts = statistics.maps["neuron_scale"]
    assert counts[0].unique().tolist() == [8.0]  # 0.75 a step over 0.5: at every step
    assert counts[1].unique().tolist() == [2.0]  # 6 in all, over 2 strictly


@torch.no_grad()
def test_graphs_in_graphs_and_sums_of_pixels():
    """Inlined, names joined; SumPool2d is four times an average."""
    shape = {"input": np.array([2, 4, 4])}
    pooled = {"input": np.array([2, 2, 2])}
    one = np.ones((2, 2, 2), np.float32)
    inner = nir.NIRGraph(
        {
            "input": nir.Input(shape),
            "pool": nir.SumPool2d(np.array([2, 2]), np.array([2, 2]), np.array([0, 0])),
            "neuron": nir.IF(r=one, v_threshold=3 * one, metadata={"reset": "subtract"}),
            "output": nir.Output({"output": np.array([2, 2, 2])}),
        },
        [("input", "pool"), ("pool", "neuron"), ("neuron", "output")],
        type_check=False,
    )
    whole = nir.NIRGraph(
        {
            "input": nir.Input(shape), "block": inner, "flatten": nir.Flatten(pooled, -3, -1),
            "linear": nir.Linear(np.ones((3, 8), np.float32)),
            "output": nir.Output({"output": np.array([3])}),
        },
        [("input", "block"), ("block", "flatten"), ("flatten", "linear"), ("linear", "output")],
        type_check=False,
    )  # fmt: skip
    snn = stdb.from_nir(whole)
    assert list(snn.neurons) == ["block_neuron"]
    # 4 × 1 a step against 3: 4, 5 (spike: the third), … all 8 neurons alike
    assert snn(torch.ones(1, 2, 4, 4), 2).tolist() == [[16.0] * 3]


REFUSED = {
    "a neuron that is not there": (
        lambda: graph(neuron=nir.Threshold(np.ones((2, 4, 4), np.float32))),
        "node neuron is a Threshold: there is nothing for it here; allowed: ",
    ),
    "reset": (
        lambda: graph(neuron=nir.IF(r=np.ones((2, 4, 4)), v_threshold=np.ones((2, 4, 4)))),
        "node neuron is a IF: NIR resets it to v_reset, ours subtracts V",
    ),
    "pixels": (
        lambda: graph(neuron=fire(np.arange(32).reshape(2, 4, 4) + 1)),
        "node neuron is a IF: its values differ from pixel to pixel",
    ),
    "threshold": (lambda: graph(neuron=fire(-1)), "node neuron is a IF: λ is 1, V from -1"),
    "v_reset": (
        lambda: graph(neuron=fire(1, v_reset=np.full((2, 4, 4), 0.5))),
        "it has a v_reset; allowed: 0",
    ),
    "dt": (
        lambda: graph(
            neuron=nir.LIF(
                tau=np.full((2, 4, 4), 1e-5), r=np.ones((2, 4, 4)), v_leak=np.zeros((2, 4, 4)),
                v_threshold=np.ones((2, 4, 4)), metadata={"reset": "subtract"},
            )
        ),
        "is dt the writer's",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_there_is_no_neuron_for_is_refused_by_node(case):
    """With what is allowed."""
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        stdb.from_nir(make())


def test_recurrence_is_refused():
    """By the nodes of the cycle."""
    looped = graph(neuron=fire(1))
    looped.edges.append(("neuron", "neuron"))
    with pytest.raises(ValueError, match=r"the nodes neuron, .* are recurrent"):
        stdb.from_nir(looped)
    with pytest.raises(ValueError, match="reset is 'zero'; allowed: 'subtract'"):
        stdb.from_nir(graph(neuron=fire(1)), reset="zero")
