"""Plain torch on any device: the oracle that the other backends are tested against.

A chunk is a matrix (T, M) in memory order: T steps of M = batch × neurons of one layer.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import bits
from .layer import Layer, LayerGradient
from .layout import from_matrix, to_matrix
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
    bias: Tensor | None = None,
    steps: int | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """Eq. 2 over a chunk, step after step; see :func:`stdb.kernels.fire`."""
    current = whole(current, bias, steps or len(current), membrane.dtype)
    if before is not None:
        membrane.copy_(before)
    fired = (membrane > threshold).to(membrane.dtype)
    dense = torch.empty_like(current, dtype=torch.bool) if spikes is None else spikes
    for t in range(len(current)):
        if leak != 1.0:
            membrane.mul_(leak)
        membrane.add_(fired, alpha=-threshold).add_(current[t])
        fired = (membrane > threshold).to(membrane.dtype)
        dense[t] = fired
    packed = bits.pack(dense)
    if last_spike is not None:
        note_last_spikes(packed, last_spike, start)
    return packed


def whole(current: Tensor, bias: Tensor | None, steps: int, real: torch.dtype) -> Tensor:
    """(T, M) the current of every step with its bias, in the type of the membranes."""
    current = current.to(real).expand(steps, -1)
    if bias is not None:
        current = (current.unflatten(1, (-1, len(bias))) + bias).flatten(1)
    return current.contiguous()


def unpack(packed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """See :func:`stdb.kernels.unpack`."""
    return bits.unpack(packed, count, dtype)


def note_last_spikes(packed: Tensor, last_spike: Tensor, start: int) -> None:
    """Step after step; see :func:`stdb.kernels.note_last_spikes`."""
    spikes = bits.unpack(packed, len(last_spike), torch.bool)
    for t in range(len(spikes)):
        last_spike.masked_fill_(spikes[t], start + t + 1)


def count_spikes(packed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """See :func:`stdb.kernels.count_spikes`."""
    return bits.unpack(packed, count, dtype).sum(0)


def average(
    packed: Tensor, shape: torch.Size, size: int, mask: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See :func:`stdb.kernels.average`."""
    spikes = from_matrix(bits.unpack(packed, shape[1:].numel(), torch.float32), shape)
    if size > 1:
        spikes = F.avg_pool2d(spikes.flatten(0, 1), size).unflatten(0, shape[:2])
    return to_matrix(spikes if mask is None else spikes * mask).to(dtype)


def backpropagate(above: Tensor | PooledGradient, layer: Layer) -> LayerGradient:
    """Step after step, for surrogates of any formula; see :func:`stdb.kernels.backpropagate`."""
    grad = to_matrix(above if isinstance(above, Tensor) else above.dense()).to(layer.real)
    surrogate, v, leak = layer.surrogate, layer.threshold, layer.leak
    spikes = bits.unpack(layer.packed, grad.shape[1], grad.dtype)
    membrane: Any = None
    if layer.current is not None:
        assert layer.before is not None
        current = whole(layer.current, layer.bias, len(grad), layer.real).clone()
        membrane = recompute_membranes(current, spikes, layer.before, v, leak)
    if surrogate.needs_ages:
        assert layer.last_spike is not None
        slope = surrogate.of_spikes(spikes, layer.last_spike, layer.start)
    else:
        slope = surrogate.of_membrane(membrane.clone(), v)
    if surrogate.over_threshold:
        slope /= v
    grad.mul_(slope)  # ∂L/∂O · ∂O/∂U
    of_threshold: Tensor | float = 0.0
    if layer.learns_threshold:
        of_threshold = -(grad * membrane / v if surrogate.over_threshold else grad).sum()
    if layer.temporal:
        after = layer.carry
        for t in reversed(range(len(grad))):
            if after is not None:
                grad[t].add_(after, alpha=leak)
            after = grad[t]
    if layer.learns_threshold:
        of_threshold -= (grad[1:] * spikes[:-1]).sum() + (grad[0] * _spiked_before(layer)).sum()
    of_leak: Tensor | float = 0.0
    if layer.learns_leak:
        assert layer.before is not None
        of_leak = (grad[1:] * membrane[:-1]).sum() + (grad[0] * layer.before).sum()
    channels = grad.unflatten(1, (-1, layer.channels)).sum((0, 1)) if layer.channels else None
    carry = grad[0].clone() if layer.carries else None
    lowered = grad if layer.lowered is None else grad.to(layer.lowered)
    return LayerGradient(lowered, of_threshold, of_leak, carry, grad[0].sum(), channels)


def _spiked_before(layer: Layer) -> Tensor:
    """(M,) whether each neuron spiked in the step before the chunk."""
    if layer.before is not None:
        return layer.before > layer.threshold
    assert layer.last_spike is not None
    return (layer.last_spike == layer.start) & (layer.last_spike > 0)


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
