"""Operators: what a node of a network's graph does to the values below it.

All but the neurons are linear and the same at every time step. A value has a leading time
dimension: (T, B, C, H, W), (T, B, C, L) or (T, B, n), kept in channels-last order; T = 1 stands for
a value that is constant over the chunk. An operator has no state: weights are those of the module
at its node, and what a presentation has for it comes as a :class:`Site`. One class an operator, a
file a family.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..kernels import PooledGradient
from ..kernels.layout import channels_last
from ..spikes import Averages, Events, Spikes


@dataclass(frozen=True)
class Product:
    """What a product gives, as it gives it; neurons add the bias when they read it.

    Attributes:
        product: (T, B, C, …), maybe in bfloat16.
        bias: (C,), or None.
        real: the type of the weights, which the value has.
    """

    product: Tensor
    bias: Tensor | None
    real: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Of the value."""
        return self.product.shape

    def dense(self) -> Tensor:
        """The value, in the type of the weights and memory of its own."""
        return add_bias(self.product.to(self.real, copy=True), self.bias)


Value = Tensor | Spikes | Averages | Events | Product
Gradient = Tensor | PooledGradient


class Site(Protocol):
    """An operator's place in a presentation: its module, and what it may ask for."""

    @property
    def module(self) -> Any:
        """The module at the node; None where the operator has none."""
        ...

    @property
    def mask(self) -> Tensor | None:
        """(B, …): the node's inverted dropout mask; None where nothing is dropped."""
        ...

    @property
    def precision(self) -> torch.dtype | None:
        """What dense products are made in; None: the type of the weights."""
        ...

    @property
    def density_limit(self) -> float:
        """The density below which its product, or the one that reads it, takes events."""
        ...

    def lowered(self, x: Tensor) -> Tensor:
        """``x`` in the precision of the network's products."""
        ...

    @property
    def weight(self) -> Tensor:
        """The module's weights, computed where they are not a parameter (pruned, normalised)."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """The module's bias, times the steps of a value that is summed over them (Eq. 4)."""
        ...

    def prepared(self, make: Callable[[Tensor], Tensor]) -> Tensor:
        """What ``make`` makes of the weights, kept until they change."""
        ...


class Operator(Protocol):
    """One kind of node. Subclasses say what differs from an operator that passes its input on.

    Attributes:
        name: what messages call it, and files: a name that was saved stays.
        kinds: types of modules that become it → their settings, which a file keeps; each is an
            attribute and an argument of the type.
        learns: it has weights, its module's ``weight``.
        fires: it is a layer of neurons, which needs time; the presentation runs it.
        owns: its value is memory of its own, which it does not share with its input.
        accumulates: it remembers sums over time; the presentation runs it.
        lowered: its backward pass takes a gradient in the precision of the products.
        product: of events or dense, by :func:`stdb.kernels.densities.density_limit` of this kind;
            empty: it passes on what its readers take.
    """

    name: str
    kinds: ClassVar[Mapping[type[nn.Module], tuple[str, ...]]] = {}
    learns: bool = False
    fires: bool = False
    owns: bool = False
    accumulates: bool = False
    lowered: bool = False
    product: str = ""

    def plain(self, module: Any, *inputs: Tensor) -> Tensor:
        """The operator in plain torch at one time step: (B, …) → (B, …)."""
        return inputs[0]

    def forward(self, site: Site, inputs: Sequence[Value]) -> Value:
        """The node's value over a chunk; of events where they are few."""
        return inputs[0]

    def backward_input(
        self, site: Site, grad: Gradient, position: int, shape: torch.Size
    ) -> Gradient:
        """∂L/∂ of the input at ``position``, of this shape; maybe in ``grad``'s memory.

        Inputs are asked for in reverse order, so that the first may have ``grad``'s memory; those
        that nothing learns below are not.
        """
        return grad

    def backward_weight(self, site: Site, grad: Tensor, x: Value, total: Tensor | None) -> Tensor:
        """``total`` (None: nothing yet) + ∂L/∂W summed over time and batch, given ∂L/∂I."""
        problem = "does not say its gradient" if self.learns else "has no weights"
        raise NotImplementedError(f"{self.name} {problem}")

    def backward_bias(self, site: Site, grad: Tensor, total: Tensor | None) -> Tensor:
        """``total`` + ∂L/∂b: ∂L/∂I summed over time, batch and pixels."""
        own = grad.sum([d for d in range(grad.dim()) if d != 2], dtype=site.weight.dtype)
        return own if total is None else total.add_(own)

    def fan_out(self, module: Any, targets: Tensor, position: int, shape: torch.Size) -> Tensor:
        """How many synapses each input drives, given those that each output does (``targets``)."""
        return targets


def dense(x: Value | Gradient) -> Tensor:
    """A value or gradient as a tensor."""
    return x if isinstance(x, Tensor) else x.dense()


def bias_apart(x: Value) -> tuple[Tensor, Tensor | None]:
    """A value as a tensor, maybe in bfloat16, and the bias that is to be added to it."""
    return (x.product, x.bias) if isinstance(x, Product) else (dense(x), None)


def operand(site: Site, x: Value) -> Tensor:
    """A value as a tensor in the precision of the products."""
    if isinstance(x, Spikes | Averages):
        return x.dense(site.precision)
    return site.lowered(dense(x))


def few_events(site: Site, x: Value) -> Events | None:
    """A value as events, where there are few enough."""
    if not isinstance(x, Spikes | Events) or x.density >= site.density_limit:
        return None
    return x.events if isinstance(x, Spikes) else x


def per_image(operator: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply an operator of (N, …) to (T, B, …); they come out channels-last."""
    y = channels_last(operator(x.flatten(0, 1)))
    whole: Tensor = y.unflatten(0, x.shape[:2])
    return whole


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """``y`` (T, B, C, …) + b of each channel, in its memory."""
    if bias is None:
        return y
    return y.add_(bias.view(-1, *[1] * (y.dim() - 3)))


def with_bias(site: Site, y: Tensor) -> Tensor | Product:
    """``y`` (T, B, C, …) + b of each channel, which is added when it is read."""
    real, bias = site.weight.dtype, site.bias
    return y if bias is None and y.dtype == real else Product(y, bias, real)


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Both of a kernel's sizes, where one may stand for both."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


__all__ = [
    "Gradient",
    "Operator",
    "Product",
    "Site",
    "Value",
    "add_bias",
    "bias_apart",
    "dense",
    "few_events",
    "operand",
    "pair",
    "per_image",
    "with_bias",
]
