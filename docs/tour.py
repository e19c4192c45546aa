# %% [markdown]
# # A tour
#
# From a trained CNN with batch norm and max-pooling to a spiking network that decides in four
# time steps; with its curve, its spikes and its energy. Half a minute on a CPU, nothing is
# downloaded. `PYTHONPATH=. python docs/tour.py` runs it. An editor that knows the percent format
# (VS Code, PyCharm, Jupyter with jupytext) runs it cell by cell.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stdb

torch.manual_seed(0)
T = 4

# %% [markdown]
# ## Images, and a CNN as anybody would write it
#
# Handwritten digits, 8×8 pixels, in [−1, 1]. 1,200 to train on, 200 to calibrate and look at, the
# rest for the test.

# %%
digits = load_digits()
pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # (N, 1, 8, 8)
labels = torch.tensor(digits.target)
order = torch.tensor(np.random.default_rng(0).permutation(len(labels)))
train, validation, test = order[:1200], order[1200:1400], order[1400:]
batches = DataLoader(TensorDataset(pixels[train], labels[train]), batch_size=64, shuffle=True)
tested = [(pixels[test], labels[test])]


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.conv2, self.norm2 = nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.conv3, self.norm3 = nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(64 * 2 * 2, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(F.relu(self.norm1(self.conv1(x))))
        x = F.relu(self.norm2(self.conv2(x)))
        x = self.pool(F.relu(x + self.norm3(self.conv3(x))))  # a shortcut
        return self.head(x.flatten(1))


cnn = Cnn()
optimiser = torch.optim.AdamW(cnn.parameters(), lr=2e-3)
for _ in range(15):
    for images, classes in batches:
        optimiser.zero_grad()
        F.cross_entropy(cnn(images), classes).backward()
        optimiser.step()
cnn.eval()
with torch.no_grad():
    of_cnn = (cnn(pixels[test]).argmax(1) == labels[test]).double().mean().item()
print(f"CNN: {of_cnn:.1%} of {len(test)} test images")

# %% [markdown]
# ## Convert
#
# The network is traced, batch norms are folded into the weights, neurons move behind the
# max-pooling, and every relu becomes spiking neurons. `rewrites` says what became of what.

# %%
snn = stdb.convert(cnn, stdb.DirectEncoder(), example=pixels[:2]).eval()
for layer, found, became in snn.rewrites:
    print(f"{layer:<8} {found:<12} {became}")

# %% [markdown]
# ## Calibrate
#
# How much one spike stands for, for T = 4: by Algorithm 1 of the paper, which is for many steps,
# and by the least error at T. `evaluate` gives the accuracy after every step of one presentation.

# %%
curves = {}
for method in ("maximum", "mse"):
    stdb.balance_thresholds(snn, pixels[train[:200]], T, method=method)
    curves[method] = stdb.evaluate(snn, tested, 32)

# %% [markdown]
# ## Fine-tune at T = 4
#
# These digits are easy: calibrated, nothing is lost at T = 4, and what is won shows at fewer steps.
# A plain loop: gradients go through the spikes by a surrogate; the CNN is the teacher; thresholds
# learn, too.

# %%
stdb.configure(
    snn, snn.encoder, stdb.surrogate_of("auto", timesteps=T), learn_thresholds=True
)  # a rectangle over U/V, which is for few steps
optimiser = torch.optim.Adam(snn.parameters(), lr=3e-4)
snn.train()
for _ in range(8):
    for images, classes in batches:
        with torch.no_grad():
            teacher = cnn(images)
        optimiser.zero_grad()
        loss = stdb.distillation_loss(snn(images, T) / T, classes, teacher)
        loss.backward()
        optimiser.step()
        snn.constrain()
snn.eval()
curves["fine-tuned"] = stdb.evaluate(snn, tested, 32)
for name, curve in curves.items():
    at = ", ".join(f"{curve[t - 1]:.1%} at T = {t}" for t in (1, 2, 4, 32))
    print(f"{name:<10} {at}")

# %%
steps = range(1, 33)
plt.figure(figsize=(6, 3.5))
for name, curve in curves.items():
    plt.plot(steps, 100 * curve, label=name)
plt.axhline(100 * of_cnn, color="grey", linestyle=":", label="CNN")
plt.xscale("log", base=2)
plt.xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
plt.xlabel("time steps")
plt.ylabel("test accuracy, %")
plt.legend()
plt.savefig("tour-curve.png", dpi=130, bbox_inches="tight")

# %% [markdown]
# ## Look at the spikes
#
# Of one image, the first hundred neurons of each layer: a row is a neuron, a column a step.

# %%
with torch.no_grad(), stdb.record_spikes(snn, trains=True) as statistics:
    snn(pixels[test[:1]], T)
layers = list(statistics.spikes_per_neuron())
figure, axes = plt.subplots(1, len(layers), figsize=(9, 3.5))
for axis, name in zip(axes, layers, strict=True):
    spikes = statistics.train(name).reshape(T, -1)[:, :100]  # (T, neurons)
    t, neuron = spikes.nonzero(as_tuple=True)
    axis.scatter(t + 1, neuron, marker="_", s=80)
    axis.set(title=name, xlabel="time step", xticks=range(1, T + 1))
axes[0].set_ylabel("neuron")
figure.savefig("tour-raster.png", dpi=130, bbox_inches="tight")

# %% [markdown]
# ## What does it cost?
#
# Additions where a spike arrives, against multiply-accumulates everywhere (45 nm); once with the
# operations alone, once with the memory that they read and write. docs/energy.md has what is in
# it.

# %%
with torch.no_grad(), stdb.record_spikes(snn) as statistics:
    snn(pixels[validation], T)
dense = stdb.ann_costs(cnn, (1, 8, 8))
spiking = statistics.costs()
operations = [sum(cost.operations_pj() for cost in costs) for costs in (spiking, dense)]
memory = [sum(sum(c.with_memory_pj().values()) for c in costs) for costs in (spiking, dense)]
print(f"spikes of a neuron: {statistics.spikes_per_neuron()}")
print(f"energy by operations: {operations[0] / operations[1]:.0%} of the CNN's")
print(f"with memory: {memory[0] / memory[1]:.0%} of the CNN's")

# %% [markdown]
# ## Keep it
#
# One file, that `stdb.load` and `python -m stdb predict` read; `stdb.to_nir` and
# `stdb.export_program` hand it on.

# %%
stdb.save(
    snn,
    "tour.safetensors",
    timesteps=T,
    classes=[str(k) for k in range(10)],
    network={"in_channels": 1, "image_size": 8},
)
again, about = stdb.load("tour.safetensors")
assert torch.equal(again(pixels[:2], T), snn(pixels[:2], T))
print(f"tour.safetensors is written, for {about['timesteps']} steps")
