"""What a training step on a GPU launches and moves, counted where there is no GPU.

The GPU's code runs on the meta device, and what would be launched is counted in the place of its
launch: kernels of Triton by a fake of :func:`stdb.kernels.launch.launch`, torch's own by their
dispatch. A *pass* moves a neuron-step's number in the products' type once.
"""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="Triton has no build for this platform")

import stdb
from stdb import kernels
from stdb.kernels import gpu, gpu_gradients, gpu_random

PRODUCTS = {"convolution", "convolution_backward", "mm", "addmm"}
# arguments that a kernel reads and writes, or reads twice
TWICE = {"_fire": {"times"}, "_backpropagate": {"above", "kept", "membranes", "packed"}}
WITHOUT_KERNEL = {"_unsafe_view", "detach", "_local_scalar_dense"}


class Counted(TorchDispatchMode):
    """Launches, and the bytes that they move, by name."""

    def __init__(self):
        super().__init__()
        self.launches, self.bytes = Counter(), Counter()

    def launch(self, kernel, row_bytes, *arguments, **constants):
        """In the place of a launch; arguments that are not looked at are one of the others."""
        assert row_bytes > 0
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        assert {*given, *constants, "block"} == set(kernel.arg_names)
        name = kernel.__name__
        tensors = {id(t): (key, t) for key, t in given.items() if isinstance(t, Tensor)}
        self.launches[name] += 1
        for key, tensor in tensors.values():
            self.bytes[name] += moved(tensor) * (2 if key in TWICE.get(name, ()) else 1)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        name = function._schema.name.removeprefix("aten::")
        if name in ("convolution", "convolution_backward"):
            result = as_cudnn_gives_it(result)
        if function.is_view or "empty" in name or name in WITHOUT_KERNEL:
            return result
        made = name.startswith("new_") or name.endswith("_like")  # of another's shape alone
        tensors = tree_leaves(result if made else (arguments, options, result))
        wanted = sum(arguments[-1]) if name == "convolution_backward" else 1
        self.launches[name] += wanted
        self.bytes[name] += sum(moved(t) for t in tensors if isinstance(t, Tensor))
        return result

    def passes(self, numbers):
        """Outside of products, of so many numbers in bfloat16."""
        return sum(n for name, n in self.bytes.items() if name not in PRODUCTS) / (2 * numbers)


def moved(tensor):
    """Bytes of a tensor; one that is expanded is as large as what it is expanded from."""
    sizes = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return tensor.element_size() * math.prod(sizes)


def as_cudnn_gives_it(result):
    """Images in the order of channels last, as those that it was given; meta's are not."""
    if isinstance(result, Tensor):
        return result.contiguous(memory_format=torch.channels_last)
    return tuple(x if x is None else as_cudnn_gives_it(x) for x in result)


def network(name, surrogate, few):
    """At full width, resnet9 at half; of few steps, or the paper's."""
    torch.manual_seed(0)
    ann = stdb.build(
        name, width=0.5 if name == "resnet9" else 1.0, dropout=0.0 if few else 0.2,
        classifier_dropout=0.0 if few else 0.5, normalisation="batch" if few else "none",
    )  # fmt: skip
    for module in ann.modules():
        if isinstance(module, nn.BatchNorm2d):  # a bias to be folded
            nn.init.uniform_(module.bias, -0.1, 0.1)
    encoder = stdb.DirectEncoder() if few else stdb.PoissonEncoder(0)
    snn = stdb.convert(
        ann.eval(), encoder, surrogate, learn_thresholds=few, precision=torch.bfloat16
    )
    for neuron in snn.neurons.values():
        neuron.initial_membrane = 0.5 if few else 0.0
    return snn.train()


RECTANGLE, LINEAR = (kind(1.0, 1.0, True) for kind in (stdb.Rectangle, stdb.Linear))


@pytest.mark.parametrize(
    ("name", "surrogate", "timesteps", "batch", "launches", "passes"),
    [
        ("vgg16", RECTANGLE, 4, 256, 350, 9.5),
        ("resnet9", RECTANGLE, 4, 256, 220, 12),
        # each identity shortcut passes over memory for itself
        ("resnet20", LINEAR, 4, 128, 520, 20),
        ("vgg16", stdb.STDB(), 100, 128, 1100, 7),
    ],
)
def test_a_training_step(name, surrogate, timesteps, batch, launches, passes, monkeypatch):
    """At most so many launches, and passes over memory outside of products."""
    few = timesteps < 10
    snn = network(name, surrogate, few)
    presentation = snn.present(torch.rand(batch, 3, 32, 32) * 2 - 1, chunk=25)
    snn.to("meta")
    presentation.images = presentation.images.to("meta")
    presentation.keys = presentation.keys.to("meta")
    counted = Counted()
    monkeypatch.setattr(kernels, "backend", lambda _: gpu)
    monkeypatch.setattr(gpu, "available", lambda _: True)
    for module in (gpu, gpu_gradients, gpu_random):
        monkeypatch.setattr(module, "launch", counted.launch)
    with counted:
        logits = snn(presentation, timesteps)
        F.cross_entropy(logits, torch.zeros(batch, dtype=torch.long, device="meta")).backward()
    neurons = sum(presentation.shapes[i].numel() for i in snn.graph.neurons)
    found = sum(counted.launches.values()), counted.passes(neurons * timesteps)
    assert found[0] <= launches, counted.launches
    assert found[1] <= passes, {k: v / neurons for k, v in counted.bytes.items()}
    # that they are counted: each layer fires, and goes back, once a chunk; each weight is learned
    chunks, layers = -(-timesteps // 25), len(snn.graph.neurons)
    assert counted.launches["_fire"] == counted.launches["_backpropagate"] == chunks * layers
    assert found[0] >= launches * 0.85
    assert found[1] >= passes * 0.85
