"""What the backward pass of a layer's neurons takes and gives, for every backend."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Slope(Protocol):
    """A surrogate gradient, as :class:`stdb.surrogate.Surrogate` says it in full."""

    alpha: float
    beta: float
    over_threshold: bool

    @property
    def formula(self) -> str | None:
        """What compiled kernels know it by: age, linear, rectangle, exponential; else None."""
        ...

    @property
    def needs_ages(self) -> bool:
        """Whether it is a function of spikes and their ages."""
        ...

    def of_spikes(self, spikes: Tensor, last_spike: Tensor, start: int) -> Tensor:
        """(T, M) of ages."""
        ...

    def of_membrane(self, membrane: Tensor, threshold: float) -> Tensor:
        """(T, M) of membrane potentials."""
        ...


@dataclass(frozen=True)
class Layer:
    """A layer's neurons in a chunk of T steps, as their backward pass finds them.

    Attributes:
        packed: (T, ⌈M/8⌉) the chunk's spikes.
        surrogate: ∂O/∂U.
        threshold: V.
        real: the type of the membranes.
        leak: λ.
        temporal: False drops the leak path.
        start: the number of steps before the chunk.
        last_spike: (M,) int16, latest spike time before the chunk, 0 for never; where the surrogate
            needs ages.
        current: (T, M) or, where it is constant, (1, M) weighted input I; where membrane potentials
            are needed; it may be in bfloat16.
        bias: (C,) what is added to the current of each channel, or None; with ``current``.
        before: (M,) membrane potential of the step before the chunk, maybe one number, expanded;
            with ``current``.
        carry: (M,) ∂L/∂U of the step after the chunk, None at the end of the presentation.
        carries: whether that of this chunk's first step is wanted for the chunk before.
        learns_threshold: whether ∂L/∂V is wanted.
        learns_leak: whether ∂L/∂λ is wanted.
        channels: C where ∂L/∂I summed over all but the channels is wanted, else 0.
        lowered: what ∂L/∂I is wanted in, such as bfloat16; None: the type of the membranes.
    """

    packed: Tensor
    surrogate: Slope
    threshold: float
    real: torch.dtype
    leak: float = 1.0
    temporal: bool = True
    start: int = 0
    last_spike: Tensor | None = None
    current: Tensor | None = None
    bias: Tensor | None = None
    before: Tensor | None = None
    carry: Tensor | None = None
    carries: bool = False
    learns_threshold: bool = False
    learns_leak: bool = False
    channels: int = 0
    lowered: torch.dtype | None = None

    def check(self) -> None:
        """Refuse a backward pass for which the forward pass did not keep what it needs."""
        surrogate = self.surrogate
        recalled = not surrogate.needs_ages or self.learns_leak
        recalled = recalled or (self.learns_threshold and surrogate.over_threshold)
        no_membranes = recalled and (self.current is None or self.before is None)
        if no_membranes or (surrogate.needs_ages and self.last_spike is None):
            raise RuntimeError(
                "a surrogate, or what learns, was changed between forward and backward pass; "
                "present the images again"
            )

    @property
    def scale(self) -> float:
        """What the surrogate is divided by: V where it is over U/V."""
        return self.threshold if self.surrogate.over_threshold else 1.0


@dataclass(frozen=True)
class LayerGradient:
    """What the backward pass of a layer gives.

    Attributes:
        current: (T, M), ∂L/∂U_t, which is ∂L/∂I_t as well.
        threshold: ∂L/∂V of these steps, without U_0's; 0 where it is not wanted.
        leak: ∂L/∂λ; 0 where it is not wanted.
        carry: (M,) ∂L/∂U of the first step, in memory of its own; None where it is not wanted.
        first: Σ ∂L/∂U of the first step; where ∂L/∂V is wanted.
        channels: (C,) ∂L/∂I summed over all but the channels; None where it is not wanted.
    """

    current: Tensor
    threshold: Tensor | float = 0.0
    leak: Tensor | float = 0.0
    carry: Tensor | None = None
    first: Tensor | float = 0.0
    channels: Tensor | None = None
