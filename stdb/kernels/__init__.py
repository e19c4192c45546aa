"""The engine's arithmetic over memory: one interface, and a backend for each kind of device.

===========  ============================  ==========================================
device       backend                       holds
===========  ============================  ==========================================
CPU          numba                         :mod:`.neurons`, :mod:`.gradients`, :mod:`.events`,
                                           :mod:`.products`
CUDA         Triton                        :mod:`.gpu`, :mod:`.gpu_gradients`
any other    torch, the oracle of both     :mod:`.reference`
===========  ============================  ==========================================

A chunk is a matrix (T, M) in memory order (:mod:`.layout`): T steps of M = batch × neurons of one
layer. Spikes are bits (:mod:`.bits`): (T, ⌈M/8⌉) bytes. State goes in and comes out explicitly.
"""

from typing import Protocol

import torch
from torch import Tensor

from . import gpu, neurons, reference
from .layer import Layer, LayerGradient
from .pooled import PooledGradient
from .reference import age_slope, recompute_membranes

__all__ = [
    "Backend",
    "Layer",
    "LayerGradient",
    "PooledGradient",
    "age_slope",
    "average",
    "averages_bits",
    "backend",
    "backpropagate",
    "count_spikes",
    "fire",
    "note_last_spikes",
    "recompute_membranes",
    "unpack",
    "works_on_bits",
]


class Backend(Protocol):
    """What a backend does; the functions of this module say it in full."""

    def fire(
        self,
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
        """Eq. 2 over a chunk."""
        ...

    def unpack(self, packed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """Spikes as numbers."""
        ...

    def note_last_spikes(self, packed: Tensor, last_spike: Tensor, start: int) -> None:
        """Latest spike times at the end of a chunk."""
        ...

    def count_spikes(self, packed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """Spikes of each neuron."""
        ...

    def average(
        self,
        packed: Tensor,
        shape: torch.Size,
        size: int,
        mask: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Spikes pooled and masked."""
        ...

    def backpropagate(self, above: Tensor | PooledGradient, layer: Layer) -> LayerGradient:
        """The surrogate, the leak path, and what V and λ learn."""
        ...


def backend(device: torch.device) -> Backend:
    """The backend of a device."""
    if device.type == "cpu":
        return neurons
    if gpu.available(device):
        return gpu
    return reference


def works_on_bits(device: torch.device) -> bool:
    """Whether linear operators there take spikes as bits and events; else as zeros and ones."""
    return device.type == "cpu"


def averages_bits(device: torch.device) -> bool:
    """Whether :func:`average` is there, which takes spikes as bits."""
    return backend(device) is not reference


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
    """Eq. 2 over a chunk: U_t = λ·U_{t−1} + I_t − V·O_{t−1}, O_t = [U_t > V].

    Args:
        current: (T, M) weighted input I or, where it is constant, (1, M), contiguous; it is only
            read. It may be in bfloat16.
        membrane: (M,) membrane potential of the step before the chunk; becomes U_T.
        before: (M,) that of the step before the chunk where it is not in ``membrane``; it is only
            read, and may be one number, expanded.
        threshold: V.
        leak: λ.
        last_spike: (M,) int16, brought to the end of the chunk as by :func:`note_last_spikes`.
        start: the number of steps before the chunk.
        spikes: (T, M) of any type, filled with zeros and ones.
        bias: (C,) what is added to the current of each channel, M being channels last.
        steps: T, where the current is constant.

    Returns:
        The spikes as bits, (T, ⌈M/8⌉).
    """
    return backend(current.device).fire(
        current, membrane, threshold, leak, last_spike=last_spike, start=start, spikes=spikes,
        bias=bias, steps=steps, before=before,
    )  # fmt: skip


def unpack(packed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """(T, count): spikes as zeros and ones of any type."""
    return backend(packed.device).unpack(packed, count, dtype)


def note_last_spikes(packed: Tensor, last_spike: Tensor, start: int) -> None:
    """Bring each neuron's latest spike time (M,) to the end of a chunk, in place.

    Args:
        packed: the chunk's spikes as bits.
        last_spike: times count from 1; 0: never.
        start: the number of steps before the chunk.
    """
    backend(packed.device).note_last_spikes(packed, last_spike, start)


def count_spikes(packed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """(count,): spikes of each neuron over the rows of ``packed``."""
    return backend(packed.device).count_spikes(packed, count, dtype)


def average(
    packed: Tensor, shape: torch.Size, size: int, mask: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Spikes averaged over windows of size × size side by side, times a dropout's mask.

    Args:
        packed: (T, ⌈M/8⌉) bits.
        shape: of the spikes, (T, B, C, H, W) with C a multiple of 8; any such with a size of 1.
        size: of a window; windows may leave a rest. size² is below 256.
        mask: (B, C, H/size, W/size), or None.
        dtype: of the result; sums are made in float32.

    Returns:
        (T, M/size²), channels last.
    """
    return backend(packed.device).average(packed, shape, size, mask, dtype)


def backpropagate(above: Tensor | PooledGradient, layer: Layer) -> LayerGradient:
    """∂L/∂U_t = s_t·∂L/∂O_t + λ·∂L/∂U_{t+1} over a chunk, s_t = ∂O_t/∂U_t of the surrogate.

    The reset carries no gradient to the steps before. ∂U_t/∂V = −O_{t−1}, ∂U_t/∂λ = U_{t−1}; ∂O/∂V
    = −s over U and −s·U/V over U/V. Surrogates that no kernel knows are evaluated in plain torch.

    Args:
        above: ∂L/∂O_t, (T, B, …); its memory may be used for the result.
        layer: the neurons, and what they did in the chunk.

    Raises:
        RuntimeError: the forward pass did not keep what is needed.
    """
    layer.check()
    kind = backend(layer.packed.device) if layer.surrogate.formula else reference
    return kind.backpropagate(above, layer)
