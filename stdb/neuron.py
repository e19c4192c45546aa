r"""The spiking neuron of Eq. 2.

.. math:: U_t = \lambda U_{t-1} + I_t - V\,O_{t-1}, \qquad O_t = [U_t > V]

λ = 1 is the IF neuron, λ < 1 the LIF neuron; the reset is soft: it subtracts V, after the leak.
O_{t−1} is not stored, it is U_{t−1} > V. How a layer of them runs is in :mod:`stdb.kernels`.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import kernels
from .kernels import bits
from .surrogate import STDB, Surrogate

EXTRA = "_extra_state"  # torch's name of it in a state dict


def make_room(
    module: nn.Module, state: Mapping[str, Tensor], prefix: str, names: Sequence[str]
) -> None:
    """Buffers as long as they are in a state dict that is about to be loaded, or none."""
    if not any(key.startswith(prefix) for key in state):
        return
    like = next(module.parameters())
    for name in names:
        given = state.get(f"{prefix}{name}")
        module.register_buffer(name, None if given is None else like.new_zeros(given.shape))


class SpikingNeuron(nn.Module):
    """One layer of IF/LIF neurons, in the place of the ANN's ReLU. V and λ are one per layer.

    Args:
        threshold: V > 0.
        leak: λ in (0, 1].
        surrogate: stands in for ∂O/∂U.
        temporal_gradient: keep the leak path ∂U_t/∂U_{t−1} = λ in the backward pass (Eq. 10 read
            literally has none).
        initial_membrane: f in [0, 1): U_0 = f·V. With ½ the floor of a spike count becomes a
            rounding.
        bound: the largest A that the ANN's activation has, such as 6 of ReLU6, or the A that
            ``Clip`` and ``QCFS`` have learned; None: no bound.
        levels: L, how many values above 0 the ANN's activation has up to its bound, as ``QCFS``;
            None: it has all between.
        unit: A, what a spike stands for; the weights above hold it (:mod:`stdb.units`).
        channels: C, where calibration keeps something of each channel; see :meth:`keep`.

    ``balanced_threshold`` is V as Algorithm 1 found it, NaN where none was; scaling is relative to
    it. Set ``requires_grad`` of ``threshold`` or ``leak`` to learn them. ``amplitude``, (C,), is A
    of each channel, by which the weights in front divide the current: a spike stands for ``unit``
    times it. ``correction``, (C,), is what bias correction has added to the current. Both may be
    None.
    """

    threshold: nn.Parameter
    leak: nn.Parameter
    balanced_threshold: Tensor
    amplitude: Tensor | None
    correction: Tensor | None

    def __init__(
        self,
        threshold: float = 1.0,
        leak: float = 1.0,
        surrogate: Surrogate = STDB(),  # noqa: B008 (frozen)
        temporal_gradient: bool = True,
        initial_membrane: float = 0.0,
        unit: float = 1.0,
        bound: float | None = None,
        channels: int = 0,
        levels: int | None = None,
    ) -> None:
        super().__init__()
        if levels is not None and (bound is None or not (isinstance(levels, int) and levels >= 1)):
            raise ValueError(
                f"levels is {levels!r} with the bound {bound}; allowed: a whole number, 1 or more, "
                "with a bound; or None"
            )
        self.unit, self.bound, self.levels = unit, bound, levels
        self.initial_membrane = initial_membrane
        if not 0 < leak <= 1:
            raise ValueError(f"leak is {leak}; allowed: above 0, at most 1 (1 is the IF neuron)")
        self.threshold = nn.Parameter(torch.tensor(threshold), requires_grad=False)
        self.leak = nn.Parameter(torch.tensor(leak), requires_grad=False)
        self.register_buffer("balanced_threshold", torch.tensor(float("nan")))
        self.keep(channels)
        self.surrogate = surrogate
        self.temporal_gradient = temporal_gradient

    def keep(self, channels: int) -> None:
        """Make room for A and the correction of each channel: ones and zeros; or none, for 0."""
        like, some = self.threshold.detach(), channels > 0
        self.register_buffer("amplitude", like.new_ones(channels) if some else None)
        self.register_buffer("correction", like.new_zeros(channels) if some else None)

    def get_extra_state(self) -> Tensor:
        """What ``state_dict`` has besides tensors: U_0/V, and what a spike stands for."""
        return torch.tensor([self.initial_membrane, self.unit], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take it up."""
        self.initial_membrane, self.unit = state.tolist()

    def _load_from_state_dict(
        self,
        state: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        *more: Any,
    ) -> None:
        """As a module does; each calibration keeps other channels, and 0.1.0 no extra state."""
        make_room(self, state, prefix, ("amplitude", "correction"))
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, *more)
        with contextlib.suppress(ValueError):
            missing.remove(f"{prefix}{EXTRA}")

    @property
    def initial_membrane(self) -> float:
        """U_0/V, in [0, 1)."""
        return self._initial_membrane

    @initial_membrane.setter
    def initial_membrane(self, share: float) -> None:
        if not 0 <= share < 1:
            raise ValueError(f"the initial membrane is {share} V; allowed: at least 0, below 1")
        self._initial_membrane = float(share)

    @property
    def mean_threshold(self) -> float:
        """V; where weights hold A of each channel, and V is 1, the mean of V·A."""
        mean = 1.0 if self.amplitude is None else float(self.amplitude.double().mean())
        return self.threshold.item() * mean

    @property
    def needs_membrane(self) -> bool:
        """Whether the backward pass has to recompute membrane potentials."""
        learned_over = self.threshold.requires_grad and self.surrogate.over_threshold
        return self.surrogate.needs_membrane or self.leak.requires_grad or learned_over

    def forward(self, _: Tensor) -> Tensor:
        """Not used: a spiking layer needs time, which the SpikingNetwork gives it."""
        raise RuntimeError("a spiking neuron has no meaning outside SpikingNetwork.forward")

    def extra_repr(self) -> str:
        """Show V, λ and the surrogate in the module's repr."""
        start = f"U_0={self.initial_membrane:.4g} V, " if self.initial_membrane else ""
        return (
            f"V={self.threshold.item():.4g}, leak={self.leak.item():.4g}, {start}{self.surrogate}"
        )


@torch.no_grad()
def simulate_neuron(
    current: Tensor, surrogate: Surrogate, leak: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer of neurons with V = 1 for itself, such as Fig. 1 draws.

    Args:
        current: (T, M) weighted input.
        surrogate: whose gradient is wanted.
        leak: λ.

    Returns:
        Spikes O_t, membrane potentials U_t and surrogate gradients ∂O_t/∂U_t, each (T, M).
    """
    zero = torch.zeros_like(current[0])
    packed = kernels.fire(current, zero.clone(), 1.0, leak)
    spikes = bits.unpack(packed, len(zero), current.dtype)
    membrane = kernels.recompute_membranes(current.clone(), spikes, zero, 1.0, leak)
    if surrogate.needs_ages:
        gradient = surrogate.of_spikes(spikes, torch.zeros_like(zero, dtype=torch.int16), 0)
    else:
        gradient = surrogate.of_membrane(membrane.clone(), 1.0)
    return spikes, membrane, gradient
