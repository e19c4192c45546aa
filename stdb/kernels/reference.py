"""Plain torch on any device: the oracle that the other backends are tested against.

A chunk is a matrix (T, M) in memory order: T steps of M = batch × neurons of one layer.
"""

import torch
from torch import Tensor

from . import bits
from .layout import to_matrix
from .pooled import PooledGradient


def fire(
    current: Tensor,
    membrane: Tensor,
    threshold: float,
    leak: float,
    *,
    last_spike: Tensor | None = None,
    start: int = 0,
    spikes: Tensor | None = None,
) -> Tensor:
    """Eq. 2 over a chunk, step after step; see :func:`stdb.kernels.fire`."""
    fired = (membrane > threshold).to(membrane.dtype)
    dense = torch.empty_like(current) if spikes is None else spikes
    for t in range(len(current)):
        if leak != 1.0:
            membrane.mul_(leak)
        membrane.add_(fired, alpha=-threshold).add_(current[t])
        fired = torch.gt(membrane, threshold, out=dense[t])
    packed = bits.pack(dense)
    if last_spike is not None:
        note_last_spikes(packed, last_spike, start)
    return packed


def note_last_spikes(packed: Tensor, last_spike: Tensor, start: int) -> None:
    """Step after step; see :func:`stdb.kernels.note_last_spikes`."""
    spikes = bits.unpack(packed, len(last_spike), torch.bool)
    for t in range(len(spikes)):
        last_spike.masked_fill_(spikes[t], start + t + 1)


def count_spikes(packed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """See :func:`stdb.kernels.count_spikes`."""
    return bits.unpack(packed, count, dtype).sum(0)


def backpropagate_stdb(
    above: Tensor | PooledGradient,
    packed: Tensor,
    last_spike: Tensor,
    start: int,
    alpha: float,
    beta: float,
    carry: Tensor | None,
    leak: float,
    temporal: bool,
) -> Tensor:
    """Eq. 11, then :func:`backpropagate`; see :func:`stdb.kernels.backpropagate_stdb`."""
    grad = to_matrix(above if isinstance(above, Tensor) else above.dense())
    spikes = bits.unpack(packed, grad.shape[1], grad.dtype)
    return backpropagate(
        grad.mul_(age_slope(spikes, last_spike, start, alpha, beta)), carry, leak, temporal
    )


def age_slope(spikes: Tensor, last_spike: Tensor, start: int, alpha: float, beta: float) -> Tensor:
    """(T, M): α·exp(−β·Δt) of Eq. 11 at the steps after ``start``; 0 before the first spike.

    α at a spike, else the value of the step before times e^−β. A call starts from the exact age, so
    rounding never builds up over more than one chunk.

    Args:
        spikes: (T, M) zeros and ones, the output spikes of steps start+1 … start+T.
        last_spike: (M,) int, each neuron's latest spike time ≤ start, from 1; 0: never.
        start: the number of steps before the chunk.
        alpha: α.
        beta: β.
    """
    age = (start - last_spike).to(spikes.dtype)
    before = age.mul_(-beta).exp_().mul_(alpha).mul_(last_spike > 0)
    decay = float(torch.exp(torch.tensor(-beta, dtype=torch.float64)))
    slope = torch.empty_like(spikes)
    fired = spikes.bool()
    for t in range(spikes.shape[0]):
        torch.mul(before, decay, out=slope[t])
        before = slope[t].masked_fill_(fired[t], alpha)
    return slope


def recompute_membranes(
    current: Tensor, spikes: Tensor, before: Tensor, threshold: float, leak: float
) -> Tensor:
    """U_t of a chunk, in place: ``current`` (T, M) becomes U, given its spikes.

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
