"""Input encoders: how an image becomes the input of every time step.

An encoder is any callable ``encoder(images, start, stop, keys)`` that gives the input of the steps
start < t ≤ stop as a (stop − start, B, C, H, W) tensor. It has to be a pure function of its
arguments: the backward pass calls it again instead of keeping what it gave. One that has a name in
``ENCODERS`` is a frozen dataclass, whose fields a saved network keeps. The gradient of images that
require one goes through the encoder by autograd, or, where it says ``straight_through``, past it.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from .randomness import derive, uniform

Encoder = Callable[[Tensor, int, int, Tensor], Tensor]


def check_images(images: Tensor, bounded: bool = True) -> None:
    """Refuse what is no batch (B, C, H, W), and pixels that are no firing probability.

    Args:
        images: one host synchronisation.
        bounded: whether pixels have to be in [−1, 1]; a current does not.
    """
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"images are {tuple(images.shape)} {images.dtype}; "
            "allowed: a floating-point batch (B, C, H, W)"
        )
    largest = float(images.detach().abs().max()) if images.numel() else 0.0
    if not bounded and largest < float("inf"):
        return
    if not largest <= 1.0:
        raise ValueError(f"a pixel of size {largest} cannot be encoded; allowed: −1 to 1")


@dataclass(frozen=True)
class PoissonEncoder:
    """At each t and pixel x a spike of sign(x) with probability |x| (paper §2.1, signed).

    Args:
        seed: chooses the random streams; the same seed gives the same spike trains everywhere.
    """

    seed: int = 0

    #: ∂spike/∂pixel is taken as 1: the derivative of the spike's expectation, which is the pixel
    straight_through: ClassVar[bool] = True

    def __call__(self, images: Tensor, start: int, stop: int, keys: Tensor) -> Tensor:
        """(stop − start, B, C, H, W) of −1, 0 and 1, in the dtype of ``images``."""
        steps = torch.arange(start, stop, device=images.device)
        streams = derive(derive(keys, self.seed)[None, :], steps[:, None])  # (T, B)
        draws = uniform(streams, images[0].numel()).view(len(steps), *images.shape)
        return torch.where(draws < images.abs(), images.sign(), 0.0)


@dataclass(frozen=True)
class DirectEncoder:
    """The analogue pixel is fed as a current at every step (DIET-SNN, Rathi & Roy 2020)."""

    #: no spikes, so that the first layer multiplies; the same at every step: it does so once
    analogue: ClassVar[bool] = True
    constant: ClassVar[bool] = True

    def __call__(self, images: Tensor, start: int, stop: int, keys: Tensor) -> Tensor:
        """(stop − start, B, C, H, W), a view that repeats ``images`` without copying it."""
        return images.expand(stop - start, *images.shape)


class SpikeTrain:
    """Replays a given input, such as one recorded by an event camera.

    Args:
        spikes: (T, B, C, H, W), fed as it is.
    """

    def __init__(self, spikes: Tensor) -> None:
        self.spikes = spikes

    def __call__(self, images: Tensor, start: int, stop: int, keys: Tensor) -> Tensor:
        """Steps start … stop − 1 of the train; an error if it is too short."""
        if stop > len(self.spikes):
            raise ValueError(f"the spike train has {len(self.spikes)} steps; asked for {stop}")
        return self.spikes[start:stop].to(images)


ENCODERS: dict[str, type[Any]] = {"poisson": PoissonEncoder, "direct": DirectEncoder}


def encoder_of(name: str, seed: int) -> Encoder:
    """The encoder of this name in ``ENCODERS``; one that draws random numbers gets the seed."""
    kind = ENCODERS[name]
    draws = any(field.name == "seed" for field in fields(kind))
    made: Encoder = kind(seed=seed) if draws else kind()
    return made
