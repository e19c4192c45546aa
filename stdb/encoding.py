"""Input encoders: how an image becomes the input of every time step.

An encoder is any callable ``encoder(images, start, stop, keys)`` that gives the input of the steps
start < t ≤ stop as a (stop − start, B, C, H, W) tensor, of signals (B, C, L) and vectors (B, n)
alike. It has to be a pure function of its arguments: the backward pass calls it again instead of
keeping what it gave. One that has a name in ``ENCODERS`` is a frozen dataclass, whose fields a file
keeps. The gradient of images that require one goes through the encoder by autograd, or, where it
says ``straight_through``, past it. One that is a module learns: its parameters are among the
network's, and their gradient goes through it by autograd.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .randomness import derive, uniform

Encoder = Callable[[Tensor, int, int, Tensor], Tensor]

SHAPES = {4: "(B, C, H, W)", 3: "(B, C, L)", 2: "(B, n)"}  # of images, signals and vectors
ROUNDING = 1e-5  # by which the largest pixel of a normalisation may be over its limit


def check_timesteps(timesteps: int) -> None:
    """Refuse what is no number of steps."""
    if not isinstance(timesteps, Integral) or timesteps < 1:
        raise ValueError(f"timesteps is {timesteps}; allowed: 1 or more, a whole number")


def check_images(images: Tensor, encoder: Encoder, dimensions: int | None = None) -> None:
    """Refuse what is no batch of images, signals or vectors, and pixels beyond what is encoded.

    Those of a direct encoder are currents, and any numbers; others have to be in [−u, u], where u
    is the encoder's limit, and 1 without one. One host synchronisation.

    Args:
        images: the batch.
        encoder: of the network.
        dimensions: how many the network takes; None: any of the shapes that there are.
    """
    allowed = SHAPES if dimensions is None else {dimensions: SHAPES[dimensions]}
    if images.dim() not in allowed or not images.is_floating_point():
        raise ValueError(
            f"images are {tuple(images.shape)} {images.dtype}; "
            f"allowed: a floating-point batch {' or '.join(allowed.values())}"
        )
    limits = limits_of(encoder)
    if limits is not None and len(limits) not in (1, images.shape[1]):
        raise ValueError(
            f"the encoder has limits of {len(limits)} channels, the images have {images.shape[1]}; "
            "allowed: one for each, or one for all"
        )
    pixels = in_units(images.detach(), encoder).abs()
    largest = float(pixels.max()) if images.numel() else 0.0
    if isinstance(encoder, DirectEncoder) and largest < float("inf"):
        return
    if limits is None and not largest <= 1.0:
        raise ValueError(
            f"a pixel of size {largest} cannot be encoded; allowed: −1 to 1, or a PoissonEncoder "
            "with limits=, the largest |pixel| of each channel"
        )
    if not largest <= 1.0 + ROUNDING:
        raise ValueError(
            f"a pixel is {largest:.6g} times the limit of its channel; allowed: at most the "
            f"encoder's limits, {', '.join(f'{u:.6g}' for u in limits or ())}"
        )


def limits_of(encoder: Encoder) -> tuple[float, ...] | None:
    """The limits u of each channel, or one for all; None where a spike stands for a pixel of 1."""
    limits: tuple[float, ...] | None = getattr(encoder, "limits", None)
    return limits


def parameters_of(encoder: Encoder) -> list[nn.Parameter]:
    """What an encoder that is a module learns; of others nothing."""
    return list(encoder.parameters()) if isinstance(encoder, nn.Module) else []


def in_units(images: Tensor, encoder: Encoder) -> Tensor:
    """x/u: what an encoder with limits encodes (B, C, …); the images themselves without."""
    limits = limits_of(encoder)
    if limits is None:
        return images
    return images / images.new_tensor(limits).view(-1, *[1] * (images.dim() - 2))


@dataclass(frozen=True)
class PoissonEncoder:
    """At each t and pixel x a spike of sign(x) with probability ``|x|`` (paper §2.1, signed).

    With ``limits`` u the probability is ``|x|/u``, and a converted network's first weights hold u,
    so that pixels beyond ±1, as of a normalisation by mean and deviation, can be encoded.

    Args:
        seed: chooses the random streams; the same seed gives the same spike trains everywhere.
        limits: u, the largest ``|pixel|`` that there can be: one of each channel, or one for all;
            None is 1.

    Raises:
        ValueError: a limit that is not a positive number.
    """

    seed: int = 0
    limits: tuple[float, ...] | None = None

    #: ∂spike/∂pixel is taken as 1/u: the derivative of the spike's expectation, the pixel over u
    straight_through: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Take any sequence, such as a file's."""
        if self.limits is None:
            return
        limits = tuple(float(u) for u in self.limits)
        if not limits or not all(0 < u < float("inf") for u in limits):
            raise ValueError(f"limits are {limits}; allowed: positive numbers, one of each channel")
        object.__setattr__(self, "limits", limits)

    def __call__(self, images: Tensor, start: int, stop: int, keys: Tensor) -> Tensor:
        """(stop − start, B, C, H, W) of −1, 0 and 1, in the dtype of ``images``."""
        steps = torch.arange(start, stop, device=images.device)
        streams = derive(derive(keys, self.seed)[None, :], steps[:, None])  # (T, B)
        draws = uniform(streams, images[0].numel()).view(len(steps), *images.shape)
        return torch.where(draws < in_units(images.abs(), self), images.sign(), 0.0)


@dataclass(frozen=True)
class DirectEncoder:
    """The analogue pixel is fed as a current at every step (DIET-SNN, Rathi & Roy 2020)."""

    #: no spikes, so that the first layer multiplies; the same at every step: it does so once
    analogue: ClassVar[bool] = True
    constant: ClassVar[bool] = True

    def __call__(self, images: Tensor, start: int, stop: int, keys: Tensor) -> Tensor:
        """(stop − start, B, C, H, W), a view that repeats ``images`` without copying it."""
        return images.expand(stop - start, *images.shape)


def mean_input(images: Tensor, encoder: Encoder, timesteps: int, keys: Tensor) -> Tensor:
    """What an encoder gives on average, (B, …): of ours the images in its units.

    Args:
        images: the batch.
        encoder: of the network.
        timesteps: that an encoder other than ours is asked for, whose mean is taken.
        keys: (B,) of the images.
    """
    if isinstance(encoder, DirectEncoder | PoissonEncoder):
        return in_units(images, encoder)
    return encoder(images, 0, timesteps, keys).mean(0)


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
