"""What a spike stands for, in the networks of others: rates times units are the ANN's activations.

The truth is what torch computes in the network's own forward method. One pass with a/A in the place
of each spike train proves weights, biases, units, concatenations and max-pooling together; then
real spikes.
"""

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import stdb
from stdb.spikes import Spikes

RECTIFIERS = ("relu", "hardtanh", "clamp", "max_pool")  # of torch's operations; what neurons become


class Recorder(TorchDispatchMode):
    """What every relu and max-pooling gave, in the order of the calls, as torch itself sees them.

    Values are copied at once: in-place operations follow.
    """

    def __init__(self):
        super().__init__()
        self.values: list[Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.name().removeprefix("aten::").startswith(RECTIFIERS):
            self.values.append((result[0] if isinstance(result, tuple) else result).clone())
        return result


@torch.no_grad()
def strange(name: str) -> nn.Module:
    """A network of torchvision with random weights, and statistics, scales, biases far from 0."""
    torch.manual_seed(0)
    options = {"aux_logits": False} if name == "googlenet" else {}
    options |= {"init_weights": False} if name.startswith(("vgg", "googlenet")) else {}
    net = torchvision.models.get_model(name, weights=None, **options)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias, 0, 0.3)
    return net.eval()


def balanced(net: nn.Module, images: Tensor, timesteps: int) -> stdb.SpikingNetwork:
    """The spiking network, its units found by Algorithm 1."""
    snn = stdb.convert(net, stdb.DirectEncoder())
    for neuron in snn.neurons.values():
        neuron.initial_membrane = 0.5
    stdb.balance_thresholds(snn, images, timesteps, method="maximum")
    return snn.eval()


def own_values(
    snn: stdb.SpikingNetwork, net: nn.Module, images: Tensor
) -> tuple[Tensor, list[tuple[list[int], Tensor]]]:
    """The logits of the user's network, and (layers of neurons, the value that they stand for).

    Several layers stand side by side for a max-pooled concatenation. Every layer is among them.
    """
    with torch.no_grad(), Recorder() as recorder:
        logits = net(images)
    found = [row.found.lower().replace("maxpool", "max_pool") for row in snn.rewrites]
    became = [
        row.became.split(", ")
        for row, what in zip(snn.rewrites, found, strict=True)
        if what.startswith(RECTIFIERS)
    ]
    names = {f"neuron {snn.graph.nodes[i].name}": i for i in snn.graph.neurons}
    layers = [[names[node] for node in nodes if node in names] for nodes in became]
    assert sorted(i for own in layers for i in own) == snn.graph.neurons
    pairs = zip(layers, recorder.values, strict=True)
    return logits, [(own, value) for own, value in pairs if own]


@torch.no_grad()
def one_pass(snn: stdb.SpikingNetwork, images: Tensor) -> list[Tensor]:
    """Every node's value where the spikes of each layer are a/A, a rate, at once.

    The operators are those of a presentation of one step; max-pooling has no sums yet.
    """
    presentation = snn.present(images)
    values: list[Tensor] = []
    for i, node in enumerate(snn.graph.nodes):
        below = [values[j] for j in node.inputs]
        if not below:
            values.append(images[None])
        elif node.operator.fires:
            neuron = snn.module(i)
            values.append(below[0].clamp(min=0, max=neuron.bound) / neuron.threshold)
        elif node.operator.accumulates:
            values.append(node.operator.plain(snn.module(i), below[0][0])[None])
        else:
            values.append(presentation.apply(i, below))
    return [value[0] for value in values]


def in_anns_units(snn: stdb.SpikingNetwork, own: list[int], rates: Any) -> Tensor:
    """Rates of layers, side by side, times what their spikes stand for."""
    return torch.cat([rates[i] * snn.module(i).unit for i in own], 1)


def off(actual: Tensor, expected: Tensor) -> float:
    """The largest deviation, by the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max())


NETWORKS = [
    "alexnet", "densenet121", "googlenet", "mnasnet0_5", "mobilenet_v2", "resnet18", "resnet34",
    "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_0",
    "squeezenet1_1", "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19",
    "vgg19_bn", "wide_resnet50_2",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_rates_that_are_exact_give_the_anns_activations(name):
    """At every layer, to rounding; also at scaled thresholds, which the weights above hold.

    64 × 64 pixels are the fewest that all take (AlexNet); no operator knows the size of an image.
    Four steps of calibration: any units will do.
    """
    net, images = strange(name).double(), torch.rand(2, 3, 64, 64).double() * 2 - 1
    snn = balanced(net, images, 4)
    logits, layers = own_values(snn, net, images)
    for scale in (1.0, 0.7):
        snn.scale_thresholds(scale)
        values = one_pass(snn, images)
        for own, value in layers:
            assert off(in_anns_units(snn, own, values), value) < 1e-9, snn.graph.labels[own[0]]
        assert off(values[-1], logits) < 1e-9


def spike_counts(snn: stdb.SpikingNetwork, images: Tensor, timesteps: int) -> dict[str, Tensor]:
    """Layer → (B, …) spikes of each neuron; and of ``"output"`` U_T."""
    counts: dict[str, Tensor] = {}

    def count(_, layer, value):
        own = value.counts() if isinstance(value, Spikes) else value.sum(0)
        counts[layer] = own + counts.get(layer, 0)

    snn.observers.append(count)
    with torch.no_grad():
        counts["output"] = snn(images, timesteps)
    snn.observers.remove(count)
    return counts


STEPS = 2048


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["alexnet", "mnasnet0_5", "mobilenet_v2", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1"],
)
def test_rates_of_real_spikes_are_the_anns_activations(name):
    """Within 1e-2·A at every layer, A the largest activation, so that neurons use all rates.

    Algorithm 1's A is the largest current of any step, here up to 300 times as large: rates of
    0.003 would be near everything. The deviation falls as 1/T; the largest, in ResNet-18, is 5e-3.
    """
    net, images = strange(name), torch.rand(2, 3, 64, 64) * 2 - 1
    snn = balanced(net, images, 4)
    logits, layers = own_values(snn, net, images)
    values, labels = one_pass(snn, images), snn.graph.labels
    largest = {labels[i]: float(values[i].max()) * snn.module(i).unit for i in snn.graph.neurons}
    snn.set_thresholds(largest)
    counts = spike_counts(snn, images, STEPS)
    for own, value in layers:
        rates = {i: counts[labels[i]] / STEPS for i in own}
        units = max(largest[labels[i]] for i in own)
        found = in_anns_units(snn, own, rates)
        assert float((found - value).abs().max()) < 1e-2 * units, labels[own[0]]
    assert off(counts["output"] / STEPS, logits) < 1e-2
