r"""The spiking neuron: Eq. 2 as a scan over a chunk of time steps, forward and backward.

.. math:: U_t = \lambda U_{t-1} + I_t - V\,O_{t-1}, \qquad O_t = [U_t > V]

λ = 1 is the IF neuron, λ < 1 the LIF neuron; the reset is soft: it subtracts V, after the leak.
A chunk is a matrix (T, M) in memory order: T steps of M = batch × neurons of one layer. State goes
in and comes out explicitly; O_{t−1} is not stored, it is U_{t−1} > V. A CPU runs a kernel over all
steps of a strip of neurons while they are in the cache, a GPU one launch for all steps
(:mod:`stdb.fused`); elsewhere torch runs step after step.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from . import bits, fused, kernels
from .layout import to_matrix
from .surrogate import STDB, Surrogate
from .synapse import Windows

NO_TIMES = np.zeros(0, np.int16)


class SpikingNeuron(nn.Module):
    """One layer of IF/LIF neurons, in the place of the ANN's ReLU. V and λ are one per layer.

    Args:
        threshold: V > 0.
        leak: λ in (0, 1].
        surrogate: stands in for ∂O/∂U.
        temporal_gradient: keep the leak path ∂U_t/∂U_{t−1} = λ in the backward pass (Eq. 10 read
            literally has none).

    ``balanced_threshold`` is V as Algorithm 1 found it, NaN where none was; scaling is relative to
    it. Set ``requires_grad`` of ``threshold`` or ``leak`` to learn them.
    """

    threshold: nn.Parameter
    leak: nn.Parameter
    balanced_threshold: Tensor

    def __init__(
        self,
        threshold: float = 1.0,
        leak: float = 1.0,
        surrogate: Surrogate = STDB(),  # noqa: B008 (frozen)
        temporal_gradient: bool = True,
    ) -> None:
        super().__init__()
        if not 0 < leak <= 1:
            raise ValueError(f"leak is {leak}; allowed: above 0, at most 1 (1 is the IF neuron)")
        self.threshold = nn.Parameter(torch.tensor(threshold), requires_grad=False)
        self.leak = nn.Parameter(torch.tensor(leak), requires_grad=False)
        self.register_buffer("balanced_threshold", torch.tensor(float("nan")))
        self.surrogate = surrogate
        self.temporal_gradient = temporal_gradient

    @property
    def needs_membrane(self) -> bool:
        """Whether the backward pass has to recompute membrane potentials."""
        learned_over = self.threshold.requires_grad and self.surrogate.over_threshold
        return self.surrogate.needs_membrane or self.leak.requires_grad or learned_over

    def forward(self, current: Tensor) -> Tensor:
        """Not used: a spiking layer needs time, which the SpikingNetwork gives it."""
        raise RuntimeError("a spiking neuron has no meaning outside SpikingNetwork.forward")

    def extra_repr(self) -> str:
        """Show V, λ and the surrogate in the module's repr."""
        return f"V={self.threshold.item():.4g}, leak={self.leak.item():.4g}, {self.surrogate}"


def fire(
    current: Tensor,
    membrane: Tensor,
    threshold: float,
    leak: float,
    last_spike: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    """Eq. 2 over a chunk; ``membrane`` (M,) becomes U_T.

    Args:
        current: (T, M) weighted input, contiguous; elsewhere than on a CPU it becomes the spikes,
            zeros and ones.
        membrane: (M,) membrane potential of the step before the chunk.
        threshold: V.
        leak: λ.
        last_spike: (M,) int16, brought to the end of the chunk as by :func:`latest`, if given.
        start: the number of steps before the chunk.

    Returns:
        The spikes as bits, (T, ⌈M/8⌉).
    """
    steps, count = current.shape
    if current.device.type == "cpu":
        packed = torch.empty(steps, bits.row_bytes(count), dtype=torch.uint8)
        real = current[:0].numpy().dtype.type
        kernels.run(
            kernels.fire, packed.shape[1], current.numel(), current.numpy(), membrane.numpy(),
            real(threshold), real(leak), packed.numpy(),
            NO_TIMES if last_spike is None else last_spike.numpy(), last_spike is not None, start,
        )  # fmt: skip
        return packed
    if fused.available(current.device):
        packed = fused.fire(current, membrane, threshold, leak)
    else:
        packed = _fire_in_torch(current, membrane, threshold, leak)
    if last_spike is not None:
        latest(packed, last_spike, start)
    return packed


def _fire_in_torch(current: Tensor, membrane: Tensor, threshold: float, leak: float) -> Tensor:
    """Step after step; ``current`` becomes the spikes."""
    fired = (membrane > threshold).to(membrane.dtype)
    for t in range(len(current)):
        if leak != 1.0:
            membrane.mul_(leak)
        membrane.add_(fired, alpha=-threshold).add_(current[t])
        fired = torch.gt(membrane, threshold, out=current[t])
    return bits.pack(current)


def latest(packed: Tensor, last_spike: Tensor, start: int) -> None:
    """Bring each neuron's latest spike time (M,) to the end of a chunk, in place.

    Args:
        packed: the chunk's spikes as bits.
        last_spike: times count from 1; 0: never.
        start: the number of steps before the chunk.
    """
    if packed.device.type == "cpu":
        arguments = (packed.numpy(), start, last_spike.numpy())
        kernels.run(kernels.latest, packed.shape[1], packed.numel(), *arguments)
        return
    if fused.available(packed.device):
        fused.latest(packed, last_spike, start)
        return
    spikes = bits.unpack(packed, len(last_spike), torch.bool)
    for t in range(len(spikes)):
        last_spike.masked_fill_(spikes[t], start + t + 1)


def membranes(
    current: Tensor, spikes: Tensor, before: Tensor, threshold: float, leak: float
) -> Tensor:
    """Recompute U_t for a chunk, in place: ``current`` (T, M) becomes U, given its spikes.

    Args:
        current: (T, M) weighted input.
        spikes: (T, M) the output spikes that :func:`fire` gave for it.
        before: (M,) membrane potential of the step before the chunk.
        threshold: V.
        leak: λ.
    """
    fired = (before > threshold).to(before.dtype)
    for t in range(current.shape[0]):
        current[t].add_(before, alpha=leak).add_(fired, alpha=-threshold)
        before, fired = current[t], spikes[t]
    return current


def backpropagate(grad: Tensor, carry: Tensor | None, leak: float, temporal: bool) -> Tensor:
    """Gradient of the membrane potentials, in place: ∂L/∂U_t = s_t·∂L/∂O_t + λ·∂L/∂U_{t+1}.

    Args:
        grad: (T, M) s_t·∂L/∂O_t; becomes ∂L/∂U_t, which is ∂L/∂I_t as well. The reset carries none.
        carry: (M,) ∂L/∂U of the step after the chunk, None at the end of the presentation.
        leak: λ.
        temporal: False drops the leak path.
    """
    if temporal:
        for t in reversed(range(grad.shape[0])):
            if carry is not None:
                grad[t].add_(carry, alpha=leak)
            carry = grad[t]
    return grad


def fuses(device: torch.device) -> bool:
    """Whether :func:`backpropagate_stdb` runs on a device."""
    return device.type == "cpu" or fused.available(device)


def backpropagate_stdb(
    grad: Tensor, packed: Tensor, last_spike: Tensor, start: int, surrogate: STDB, threshold: float,
    carry: Tensor | None, leak: float, temporal: bool, windows: Windows | None = None,
) -> Tensor:  # fmt: skip
    """Eq. 11 and :func:`backpropagate` in one pass, from the spikes' bits, where :func:`fuses`.

    Args:
        grad: (T, M) ∂L/∂O_t; becomes ∂L/∂U_t.
        windows: ∂L/∂O_t, where it is not in ``grad`` yet; on a CPU.
        packed: (T, ⌈M/8⌉) the chunk's spikes.
        last_spike: (M,) latest spike time before the chunk, 0 for never.
        start: the number of steps before the chunk.
        surrogate: α, β, and whether it is over U/V.
        threshold: V.
        carry: (M,) ∂L/∂U of the step after the chunk, None at the end of the presentation.
        leak: λ.
        temporal: False drops the leak path.
    """
    alpha = surrogate.alpha / threshold if surrogate.over_threshold else surrogate.alpha
    if grad.device.type != "cpu":
        return fused.backpropagate_stdb(
            grad, packed, last_spike, start, alpha, surrogate.beta, carry, leak, temporal
        )
    ages = torch.arange(start + 1, dtype=torch.float64)
    table = alpha * torch.exp(-surrogate.beta * ages)
    real = grad[:0].numpy().dtype.type
    none = grad[:1, :0]
    following = carry if carry is not None else none[0]
    above, size, channels, width, mask = none, 0, 0, 0, none[0]
    if windows is not None:
        above, size = to_matrix(windows.above), windows.size
        channels, width = windows.shape[2], windows.shape[4]
        if windows.mask is not None:
            mask = to_matrix(windows.mask[None])[0]
    kernels.run(
        kernels.backpropagate, packed.shape[1], grad.numel(), above.numpy(),
        real(1 / size**2 if size else 1), size, channels, width, mask.numpy(), grad.numpy(),
        packed.numpy(), last_spike.numpy(), start, table.to(grad.dtype).numpy(),
        real(math.exp(-surrogate.beta)), following.numpy(), carry is not None, real(leak), temporal,
    )  # fmt: skip
    return grad
