"""The paper's rules a second time, literally: float64, one step at a time, autograd through it all.

Shares no code with the engine and no idea with it either: it runs the user's own module tree, with
a stateful neuron in the place of each ReLU and a fixed mask in the place of each dropout, and lets
autograd find every gradient but the spike's own.
"""

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn


class Spike(torch.autograd.Function):
    """[U > V] forward; the given ∂O/∂U and ∂O/∂V backward."""

    @staticmethod
    def forward(ctx, membrane, threshold, slope_membrane, slope_threshold):
        """Strictly above the threshold."""
        ctx.save_for_backward(slope_membrane, slope_threshold)
        return (membrane > threshold).to(membrane.dtype)

    @staticmethod
    def backward(ctx, grad):
        """The surrogate's word."""
        slope_membrane, slope_threshold = ctx.saved_tensors
        return grad * slope_membrane, (grad * slope_threshold).sum(), None, None


class LiteralNeuron(nn.Module):
    """Eq. 2 with a surrogate of the paper or a rectangle; V and λ are parameters."""

    def __init__(
        self, threshold, leak, kind, alpha, beta, over_threshold, temporal_gradient, initial=0.0
    ):
        """Start with U = f·V, no spike, S = −∞."""
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold, dtype=torch.float64))
        self.leak = nn.Parameter(torch.tensor(leak, dtype=torch.float64))
        self.kind, self.alpha, self.beta = kind, alpha, beta
        self.over_threshold, self.temporal_gradient = over_threshold, temporal_gradient
        self.t = 0
        self.membrane = initial * self.threshold
        self.spikes = torch.tensor(0.0, dtype=torch.float64)
        self.latest = torch.tensor(-torch.inf, dtype=torch.float64)
        self.train_of_spikes: list[Tensor] = []

    def surrogate(self, membrane: Tensor, threshold: Tensor) -> Tensor:
        """The value s of Eq. 11, 13 or 14, or of a rectangle."""
        distance = membrane / threshold - 1 if self.over_threshold else membrane - threshold
        if self.kind == "stdb":
            s = self.alpha * torch.exp(-self.beta * (self.t - self.latest))
            return torch.where(self.latest > -torch.inf, s, 0.0)
        if self.kind == "linear":
            return self.alpha * torch.clamp(1 - distance.abs(), min=0)
        if self.kind == "rectangle":
            return self.alpha * (distance.abs() < 0.5).double()
        assert self.kind == "exponential", self.kind
        return self.alpha * torch.exp(-self.beta * distance.abs())

    def forward(self, current: Tensor) -> Tensor:
        """One step."""
        self.t += 1
        before = self.membrane if self.temporal_gradient else self.membrane.detach()
        membrane = self.leak * before + current - self.threshold * self.spikes.detach()
        u, v = membrane.detach(), self.threshold.detach()
        now = torch.full_like(u, self.t)
        self.latest = torch.where(u > v, now, self.latest)
        s = self.surrogate(u, v)
        slopes = (s / v, -s * u / v**2) if self.over_threshold else (s, -s)
        self.membrane = membrane
        self.spikes = Spike.apply(membrane, self.threshold, *slopes)
        self.train_of_spikes.append(self.spikes.detach())
        return self.spikes

    def cut(self) -> None:
        """Drop the graph, keep the state."""
        self.membrane, self.spikes = self.membrane.detach(), self.spikes.detach()


class LiteralMaxPool(nn.Module):
    """What the maximum of the sums of all steps so far has become more."""

    def __init__(self, pool: nn.Module):
        """Start with sums of 0."""
        super().__init__()
        self.pool = pool
        self.sums = self.maximum = torch.tensor(0.0, dtype=torch.float64)

    def forward(self, current: Tensor) -> Tensor:
        """One step."""
        self.sums = self.sums + current
        before, self.maximum = self.maximum, self.pool(self.sums)
        return self.maximum - before

    def cut(self) -> None:
        """Drop the graph, keep the state."""
        self.sums, self.maximum = self.sums.detach(), self.maximum.detach()


class Mask(nn.Module):
    """A dropout that was drawn before."""

    def __init__(self, mask: Tensor):
        """Keep the mask (B, …)."""
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return x * self.mask


def relus(net: nn.Module) -> list[str]:
    """The places of the ReLUs in the module tree."""
    return [name for name, module in net.named_modules() if type(module) is nn.ReLU]


class Literal:
    """A module tree run literally.

    Args:
        ann: float64; copied.
        thresholds: place of each ReLU → V.
        leak: λ.
        masks: place of each dropout → mask; those not named are left out.
        surrogate: kind, alpha, beta, over_threshold, temporal_gradient, initial (f of U_0 = f·V).
    """

    def __init__(self, ann, thresholds, leak=1.0, masks=None, **surrogate):
        """Swap the modules."""
        options = {"kind": "stdb", "alpha": 0.3, "beta": 0.01, "over_threshold": False}
        options |= {"temporal_gradient": True} | surrogate
        self.net = copy.deepcopy(ann)
        for name in relus(ann):
            self.net.set_submodule(name, LiteralNeuron(thresholds[name], leak, **options))
        for name, module in ann.named_modules():
            if isinstance(module, nn.MaxPool1d | nn.MaxPool2d):
                self.net.set_submodule(name, LiteralMaxPool(module))
            if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d):
                mask = (masks or {}).get(name)
                self.net.set_submodule(name, nn.Identity() if mask is None else Mask(mask))
        self.with_state = [m for m in self.net.modules() if hasattr(m, "cut")]
        self.neurons = {n: m for n, m in self.net.named_modules() if isinstance(m, LiteralNeuron)}

    def run(self, train: Tensor, windows: list[int] | None = None) -> Iterator[Tensor]:
        """U of the output layer (Eq. 4) at the end of each window; train is (T, B, C, H, W)."""
        output, start = 0.0, 0
        for steps in windows or [len(train)]:
            for x in train[start : start + steps]:
                output = output + self.net(x)
            yield output
            output, start = output.detach(), start + steps
            for module in self.with_state:
                module.cut()

    def spikes(self, name: str) -> Tensor:
        """(T, B, …) of the neuron in a ReLU's place."""
        return torch.stack(self.neurons[name].train_of_spikes)


def balanced(ann: nn.Module, train: Tensor, keep: dict[str, float] | None = None) -> list[float]:
    """Algorithm 1 literally: the whole network is run anew for every layer, in order.

    Args:
        ann: its ReLUs in the order of the module tree are those of a step.
        train: (T, B, C, H, W).
        keep: places whose V is given.
    """
    found = dict(keep or {})
    for name in relus(ann):
        if name in found:
            continue
        rest = dict.fromkeys(relus(ann), float("inf")) | found
        network = Literal(ann, rest)
        largest = []
        network.neurons[name].register_forward_pre_hook(
            lambda _, inputs, largest=largest: largest.append(float(inputs[0].max()))
        )
        with torch.no_grad():
            list(network.run(train))
        found[name] = max(largest)
    return [found[name] for name in relus(ann)]


# -- a small network with a batch norm and max-pooling, and images for it --------------------------


def batch(seed: int = 0) -> Tensor:
    """Six images of 3 × 12 × 12 pixels in [−1, 1]."""
    return torch.rand(6, 3, 12, 12, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def small_cnn() -> nn.Sequential:
    """Of five classes, always the same."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(216, 5),
    ).eval()  # fmt: skip


# -- golden vectors of our own: biases, initial membranes, max-pooling -----------------------------


def cnn() -> nn.Sequential:
    """The network of ``tests/vectors/cnn_*.npz``."""
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.MaxPool2d(3, 2, 1), nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Dropout(0.25),
        nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5),
    )  # fmt: skip


CNN_VECTORS = {
    "cnn_stdb": {"surrogate": "stdb", "alpha": 0.3, "beta": 0.05, "truncate": 7},
    "cnn_linear_over_threshold": {
        "surrogate": "linear/v", "alpha": 0.4, "beta": 1.0, "truncate": 0, "leak": 0.875,
    },
    # neurons without input stay on its edge, U_0 = V/2
    "cnn_rectangle_over_threshold": {
        "surrogate": "rectangle/v", "alpha": 1.0, "beta": 1.0, "truncate": 0,
    },
}  # fmt: skip


def cnn_vectors(name: str) -> dict[str, np.ndarray]:
    """The arrays of a file of ours, from the literal transcription above.

    ``STDB_WRITE_VECTORS=1 pytest tests/stdb/test_golden_vectors.py -k made`` writes the files.
    """
    about = {"leak": 1.0, "initial": 0.5, **CNN_VECTORS[name]}
    generator = torch.Generator().manual_seed(len(name))
    net = cnn().double()
    for parameter in net.parameters():  # multiples of 1/64: float32 adds them exactly
        bound = 2.0 if parameter.dim() == 1 else 6 / parameter[0].numel() ** 0.5
        values = torch.rand(parameter.shape, generator=generator).double()
        parameter.data = torch.round((values * 2 - 0.8) * bound * 16) / 64
    chance = torch.rand(21, 3, 2, 8, 8, generator=generator)
    train = (chance < 0.2).double() - (chance > 0.9).double()
    labels = torch.tensor([0, 3, 4])
    mask = (torch.rand(3, 12, 2, 2, generator=generator) < 0.75).double() * 1.25
    thresholds = dict(zip(relus(net), [1.0, 2.0, 1.5, 0.75], strict=True))
    kind, _, over = str(about["surrogate"]).partition("/")
    literal = Literal(
        net, thresholds, about["leak"], {"6": mask}, kind=kind, alpha=about["alpha"],
        beta=about["beta"], over_threshold=over == "v", initial=about["initial"],
    )  # fmt: skip
    size = about["truncate"] or len(train)
    windows = [min(size, len(train) - t) for t in range(0, len(train), size)]
    losses = []
    for output in literal.run(train, windows):
        loss = nn.functional.cross_entropy(output, labels)
        loss.backward()
        losses.append(loss.item())
    arrays = {k: np.array(v) for k, v in about.items()}
    arrays |= {"spikes_in": train.to(torch.int8).numpy(), "labels": labels.numpy()}
    arrays |= {"logits": output.detach().numpy(), "loss": np.array(losses)}
    arrays |= {"thresholds": np.array(list(thresholds.values())), "mask_0": mask.numpy()}
    layers = [m for m in literal.net if isinstance(m, nn.Conv2d | nn.Linear)]
    for i, layer in enumerate(layers):
        for what in ("weight", "bias"):
            parameter = getattr(layer, what)
            grad = "grad" if what == "weight" else "grad_bias"
            arrays[f"{what}_{i}"] = parameter.detach().numpy()
            arrays[f"{grad}_{i}"] = parameter.grad.numpy()
    neurons = list(literal.neurons.items())
    for i, (place, _) in enumerate(neurons):
        arrays[f"spikes_{i}"] = literal.spikes(place).to(torch.uint8).numpy()
    arrays["grad_thresholds"] = np.array([float(n.threshold.grad) for _, n in neurons])
    arrays["grad_leaks"] = np.array([float(n.leak.grad) for _, n in neurons])
    return arrays
