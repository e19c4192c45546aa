r"""Surrogate gradients: what stands in for :math:`\partial O_t/\partial U_t` in the backward pass.

The spike :math:`O_t = [U_t > V]` has no useful derivative. Stand-ins, three of them the paper's
(§2.2):

=============  ==========================================  ========
class          ∂O/∂U                                       equation
=============  ==========================================  ========
`STDB`         :math:`\alpha\, e^{-\beta\,\Delta t}`        11
`Linear`       :math:`\alpha\,\max(0, 1-|U-V|)`             13
`Exponential`  :math:`\alpha\, e^{-\beta\,|U-V|}`           14
`Rectangle`    :math:`\alpha\,[|U-V| < 1/2]`
=============  ==========================================  ========

:math:`\Delta t = t - S` is the age of the neuron's latest spike, zero at a spike; a neuron that has
not fired yet in this presentation gets no gradient. With ``over_threshold=True`` the spike is taken
as a function of U/V: ∂O/∂U = s/V, ∂O/∂V = −s·U/V², and U/V − 1 takes the place of U − V.
:func:`surrogate_of` makes one by its name, or by the number of time steps.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .kernels import age_slope


@dataclass(frozen=True)
class Surrogate:
    """The parameters that all surrogates share; the defaults are the paper's for STDB.

    Args:
        alpha: α > 0, the gradient at a spike (dimensionless).
        beta: β ≥ 0, how fast it falls: per time step (STDB) or per unit of membrane (Exponential).
        over_threshold: differentiate with respect to U/V instead of U.
    """

    alpha: float = 0.3
    beta: float = 0.01
    over_threshold: bool = False

    #: what the backward pass has to find again to evaluate it: membrane potentials, or the ages of
    #: the latest spikes
    needs_membrane: ClassVar[bool] = True
    needs_ages: ClassVar[bool] = False
    #: whether β has a meaning
    uses_beta: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}; allowed: a number above 0, finite")
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta is {self.beta}; allowed: 0 or a positive number, finite")

    @property
    def name(self) -> str:
        """Its key in ``SURROGATES``, or the name of its class."""
        known = (name for name, kind in SURROGATES.items() if kind is type(self))
        return next(known, type(self).__name__)

    @property
    def formula(self) -> str | None:
        """What compiled kernels know it by; None: it is evaluated by the methods below."""
        return FORMULAS.get(type(self))

    def of_spikes(self, spikes: Tensor, last_spike: Tensor, start: int) -> Tensor:
        """∂O/∂U (T, M) from spikes and their ages, where ``needs_ages``."""
        raise NotImplementedError(f"{type(self).__name__} does not look at ages")

    def of_membrane(self, membrane: Tensor, threshold: float) -> Tensor:
        """∂O/∂U (T, M) from membrane potentials (T, M), where ``needs_membrane``."""
        raise NotImplementedError(f"{type(self).__name__} does not look at membranes")

    def distance(self, membrane: Tensor, threshold: float) -> Tensor:
        """|U − V|, or |U/V − 1| over the threshold; a new tensor."""
        if self.over_threshold:
            return (membrane / threshold).sub_(1.0).abs_()
        return (membrane - threshold).abs_()


class STDB(Surrogate):
    """Spike timing dependent backpropagation, Eq. 11: α·exp(−β·Δt)."""

    needs_membrane = False
    needs_ages = True

    def of_spikes(self, spikes: Tensor, last_spike: Tensor, start: int) -> Tensor:
        """Evaluate Eq. 11 for the steps after ``start``; times count from 1, 0 means never.

        Args:
            spikes: (T, M) zeros and ones, the output spikes of steps start+1 … start+T.
            last_spike: (M,) int, each neuron's latest spike time ≤ start, 0 if there is none.
            start: the number of steps that came before.

        Returns:
            (T, M): ∂O/∂U, without the division by V of ``over_threshold``.
        """
        return age_slope(spikes, last_spike, start, self.alpha, self.beta)


@dataclass(frozen=True)
class Linear(Surrogate):
    """Eq. 13: ``α·max(0, 1 − |U − V|)``. β is not used."""

    alpha: float = 1.0
    beta: float = 1.0

    uses_beta = False

    def of_membrane(self, membrane: Tensor, threshold: float) -> Tensor:
        """Evaluate Eq. 13 elementwise."""
        return self.distance(membrane, threshold).neg_().add_(1.0).clamp_(min=0).mul_(self.alpha)


@dataclass(frozen=True)
class Rectangle(Surrogate):
    """``α·[|U − V| < ½]``: straight through for a membrane near the threshold. β is not used.

    Over U/V it is the gradient of a quantised activation's rounding (Bu et al., ICLR 2022). The
    edge is outside: with U_0 = V/2 a neuron without input stays there, and learns nothing.
    """

    alpha: float = 1.0
    beta: float = 1.0

    uses_beta = False

    def of_membrane(self, membrane: Tensor, threshold: float) -> Tensor:
        """Evaluate it elementwise."""
        return (self.distance(membrane, threshold) < 0.5).to(membrane.dtype).mul_(self.alpha)


@dataclass(frozen=True)
class Exponential(Surrogate):
    """Eq. 14: ``α·exp(−β·|U − V|)``."""

    alpha: float = 1.0
    beta: float = 1.0

    def of_membrane(self, membrane: Tensor, threshold: float) -> Tensor:
        """Evaluate Eq. 14 elementwise."""
        return self.distance(membrane, threshold).mul_(-self.beta).exp_().mul_(self.alpha)


SURROGATES: dict[str, type[Surrogate]] = {
    "stdb": STDB,
    "linear": Linear,
    "exponential": Exponential,
    "rectangle": Rectangle,
}
# those of exactly these types have compiled kernels
FORMULAS: dict[type[Surrogate], str] = {
    STDB: "age",
    Linear: "linear",
    Exponential: "exponential",
    Rectangle: "rectangle",
}

# Up to so many steps the age of the latest spike says too little, and how near U came to V more.
# CIFAR-10, three seeds: STDB is 2.2, 0.9, 0.4, 0.4, 0 points behind the rectangle at T = 1, 2, 4,
# 8, 16. RESULTS.md has the study, `make surrogates` makes it.
FEW_STEPS = 16


def surrogate_of(
    name: str,
    timesteps: int,
    alpha: float | None = None,
    beta: float | None = None,
    over_threshold: bool | None = None,
) -> Surrogate:
    """A surrogate by its name in ``SURROGATES``, or the one for so many steps.

    Args:
        name: a key of ``SURROGATES``; ``auto``: ``rectangle`` up to :data:`FEW_STEPS`, 16, and
            ``stdb`` beyond.
        timesteps: T of the fine-tuning, 1 or more; says what ``auto`` is.
        alpha: α > 0; None: the surrogate's own default.
        beta: β ≥ 0; None: the same.
        over_threshold: whether it is over U/V; None: where it looks at membranes.

    Raises:
        ValueError: there is no such surrogate, or a number is out of its range.
    """
    if name == "auto":
        name = "rectangle" if timesteps <= FEW_STEPS else "stdb"
    if name not in SURROGATES:
        allowed = ", ".join(["auto", *SURROGATES])
        raise ValueError(f"surrogate is {name!r}; allowed: {allowed}")
    kind = SURROGATES[name]
    if over_threshold is None:
        over_threshold = kind.needs_membrane
    given = {"alpha": alpha, "beta": beta}
    return kind(over_threshold=over_threshold, **{k: v for k, v in given.items() if v is not None})
