"""The engine against golden vectors that a literal float64 transcription of Algorithms 1–3 made.

Reads every ``*.npz`` of the folder in the variable STDB_VECTORS, by default tests/vectors. It runs
on the device in STDB_DEVICE, by default a CPU; a GPU is checked by
``STDB_DEVICE=cuda pytest tests/stdb/test_golden_vectors.py``.
"""

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stdb
from stdb.kernels import works_on_bits
from tests.stdb.support import CNN_VECTORS, cnn, cnn_vectors

FOLDER = Path(os.environ.get("STDB_VECTORS", Path(__file__).parents[1] / "vectors"))
FILES = sorted(FOLDER.glob("*.npz"))
DEVICE = torch.device(os.environ.get("STDB_DEVICE", "cpu"))


def conv(i, o, stride=1):
    return nn.Conv2d(i, o, 3, stride, 1, bias=False)


def vgg():
    return nn.Sequential(
        conv(2, 8), nn.ReLU(), nn.AvgPool2d(2),
        conv(8, 12), nn.ReLU(), nn.Dropout(0.25),
        conv(12, 12), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(48, 24, bias=False), nn.ReLU(), nn.Dropout(0.25),
        nn.Linear(24, 5, bias=False),
    )  # fmt: skip


def resnet():
    return nn.Sequential(
        OrderedDict(
            conv=conv(2, 6), relu=nn.ReLU(),
            block1=stdb.ResidualBlock(6, 6), block2=stdb.ResidualBlock(6, 10, stride=2),
            flatten=nn.Flatten(), output=nn.Linear(160, 5, bias=False),
        )
    )  # fmt: skip


NETWORKS = {"vgg": vgg, "resnet": resnet, "cnn": cnn}


class Case:
    """One file as a network with its weights, thresholds and surrogate."""

    def __init__(self, path: Path, dtype: torch.dtype, learn: bool = False):
        with np.load(path) as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files}
        self.dtype = dtype
        net = NETWORKS[path.name.partition("_")[0]]().to(dtype)
        kind, _, over = str(self.arrays["surrogate"]).partition("/")
        surrogate = stdb.SURROGATES[kind](
            float(self.arrays["alpha"]), float(self.arrays["beta"]), over_threshold=over == "v"
        )
        train = self.tensor("spikes_in")
        self.timesteps, _ = train.shape[:2]
        self.images = torch.zeros(train.shape[1:], dtype=dtype, device=DEVICE)
        self.labels = torch.from_numpy(self.arrays["labels"]).to(DEVICE)
        self.snn = stdb.convert(
            net, stdb.SpikeTrain(train), surrogate, float(self.arrays["leak"]),
            learn_thresholds=learn, learn_leaks=learn,
        ).to(DEVICE).train()  # fmt: skip
        self.snn.set_thresholds(
            dict(zip(self.snn.thresholds, self.arrays["thresholds"].tolist(), strict=True))
        )
        for neuron in self.snn.neurons.values():
            neuron.initial_membrane = float(self.arrays.get("initial", 0.0))
        layers = [m for m in self.snn.net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        self.learned = {}  # gradient's name → parameter; weights as they stand above these V
        for i, layer in enumerate(layers):
            self.learned[f"grad_{i}"] = layer.weight
            if layer.bias is not None:
                self.learned[f"grad_bias_{i}"] = layer.bias
        with torch.no_grad():
            for name, parameter in self.learned.items():
                of = "bias" if "bias" in name else "weight"
                parameter.copy_(self.tensor(f"{of}_{name.rpartition('_')[2]}"))
        masks = [k for k in self.arrays if k.startswith("mask_")]
        self.masks = [self.tensor(f"mask_{i}") for i in range(len(masks))]
        truncate = int(self.arrays["truncate"]) or self.timesteps
        self.windows = [
            min(truncate, self.timesteps - t) for t in range(0, self.timesteps, truncate)
        ]

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name]).to(DEVICE, self.dtype)


def chunks(timesteps: int) -> list[int]:
    """One step, a divisor, a non-divisor, all steps."""
    divisor = next(d for d in range(2, timesteps + 1) if timesteps % d == 0)
    other = next(d for d in range(3, timesteps) if timesteps % d)
    return [1, divisor, other, timesteps]


def close(actual, expected, relative):
    """Largest deviation relative to the array's largest value."""
    expected = torch.as_tensor(expected)
    error = (actual.detach().cpu().double() - expected).abs().max() / expected.abs().max()
    assert error < relative, f"off by {error:.2e} of the largest value"


def test_there_are_vectors():
    assert FILES, f"no *.npz in {FOLDER}"


# Every product from events, where there are any, and the fused backward pass of STDB; or every
# product dense, and the backward pass that learns V and λ too.
FORMS = {"events": ("always", False), "dense": ("never", True)}
if not works_on_bits(DEVICE):
    FORMS = {"fused": ("never", False), "dense": ("never", True)}
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
CASES = [
    pytest.param(
        path, dtype, position, form, id=f"{path.stem}-{str(dtype)[6:]}-chunk{position}-{form}"
    )
    for path in FILES
    for dtype in (torch.float32, torch.float64)
    for position in range(4)
    for form in FORMS
]


@pytest.mark.parametrize(("path", "dtype", "position", "form"), CASES)
def test_presentation(path, dtype, position, form):
    """Spikes equal, logits and loss to 1e-5, gradients to 1e-4 relative, whatever the chunk."""
    events, learn = FORMS[form]
    case = Case(path, dtype, learn)
    case.snn.events = events
    case.snn.chunk = chunks(case.timesteps)[position]
    with stdb.record_spikes(case.snn, trains=True) as statistics:
        presentation = case.snn.present(case.images, masks=case.masks)
        losses = []
        for steps in case.windows:
            logits = case.snn(presentation, steps)
            loss = F.cross_entropy(logits, case.labels)
            loss.backward()
            losses.append(loss.item())
    for i, name in enumerate(case.snn.thresholds):
        expected = torch.from_numpy(case.arrays[f"spikes_{i}"])
        spikes = statistics.train(name).cpu().to(torch.uint8)
        assert torch.equal(spikes, expected), f"spikes of {name}"
    close(logits, case.arrays["logits"], 1e-5)
    np.testing.assert_allclose(losses, case.arrays["loss"], rtol=1e-5)
    for name, parameter in case.learned.items():
        close(parameter.grad, case.arrays[name], 1e-4)
    if not learn:
        return
    neurons = list(case.snn.neurons.values())
    close(torch.stack([n.threshold.grad for n in neurons]), case.arrays["grad_thresholds"], 1e-4)
    close(torch.stack([n.leak.grad for n in neurons]), case.arrays["grad_leaks"], 1e-4)


@pytest.mark.parametrize("chunk", [1, 4, 7, 300])
@pytest.mark.parametrize(
    "path", [p for p in FILES if p.stem.startswith("vgg")], ids=lambda p: p.stem
)
def test_balanced_thresholds(path, chunk):
    """Algorithm 1, to 1e-6, whatever the chunk."""
    case = Case(path, torch.float64)
    case.snn.chunk = chunk
    found = stdb.balance_thresholds(
        case.snn, case.images, case.timesteps, batch_size=len(case.images)
    )
    np.testing.assert_allclose(list(found.values()), case.arrays["balanced_thresholds"], rtol=1e-6)
    assert list(case.snn.thresholds.values()) == list(found.values())


@pytest.mark.parametrize("name", CNN_VECTORS)
def test_our_own_vectors_are_made_by_the_transcription(name):
    """Not by the engine: from the random weights on, to rounding."""
    path = Path(__file__).parents[1] / "vectors" / f"{name}.npz"
    made = cnn_vectors(name)
    if os.environ.get("STDB_WRITE_VECTORS"):
        np.savez_compressed(path, **made)
    with np.load(path) as arrays:
        assert set(arrays.files) == set(made)
        for key in arrays.files:
            if made[key].dtype == np.float64:
                np.testing.assert_allclose(made[key], arrays[key], rtol=1e-9, atol=1e-12)
            else:
                assert np.array_equal(made[key], arrays[key]), key
