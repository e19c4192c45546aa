"""Input encoders, and the counter-based random numbers that they and dropout draw.

An encoder is any callable ``encoder(images, start, stop, keys)`` that gives the input of the steps
start < t ≤ stop as a (stop − start, B, C, H, W) tensor. It has to be a pure function of its
arguments: the backward pass calls it again instead of keeping what it gave.

Random numbers are a function of (seed, epoch, sample, t, pixel) and nothing else, so a sample's
spike train does not depend on the batch it sits in, on the number of workers, or on a restart.
"""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as a signed 64-bit integer
DROPOUT_STREAM = 1 << 40  # no step t of an encoder with the same seed comes here
_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def _shift(word: Tensor, bits: int) -> Tensor:
    """Logical right shift of signed 64-bit words."""
    return (word >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def mix(word: Tensor) -> Tensor:
    """Hash int64 words: the output function of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    word = (word ^ _shift(word, 30)).mul_(_MIX[0])
    word = word.bitwise_xor_(_shift(word, 27)).mul_(_MIX[1])
    return word.bitwise_xor_(_shift(word, 31))


def derive(keys: Tensor, number: int | Tensor) -> Tensor:
    """Derive stream keys from ``keys`` and a further coordinate (seed, epoch, sample, t, layer)."""
    if isinstance(number, int):
        number = torch.full((), number, device=keys.device)
    return mix((keys + _GOLDEN) ^ mix(number + _GOLDEN))


def uniform(keys: Tensor, count: int) -> Tensor:
    """The first ``count`` numbers of each key's stream: (*keys.shape, count) float32 in [0, 1)."""
    counter = torch.arange(1, count + 1, device=keys.device).mul_(_GOLDEN)
    return _shift(mix(keys[..., None] + counter), 40).float().mul_(2.0**-24)


def sample_keys(sample_ids: Tensor, epoch: int) -> Tensor:
    """(B,) int64: the random streams of these samples in this epoch."""
    return derive(derive(torch.zeros_like(sample_ids), epoch), sample_ids)


def check_images(images: Tensor) -> None:
    """Refuse pixels that are not a firing probability; (B, C, H, W), one host synchronisation."""
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"images are {tuple(images.shape)} {images.dtype}; "
            "allowed: a floating-point batch (B, C, H, W)"
        )
    largest = float(images.detach().abs().max()) if images.numel() else 0.0
    if not largest <= 1.0:
        raise ValueError(f"a pixel of size {largest} cannot be encoded; allowed: −1 to 1")


class PoissonEncoder:
    """At each t and pixel x a spike of sign(x) with probability |x| (paper §2.1, signed).

    Args:
        seed: chooses the random streams; the same seed gives the same spike trains everywhere.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __call__(self, images: Tensor, start: int, stop: int, keys: Tensor) -> Tensor:
        """(stop − start, B, C, H, W) of −1, 0 and 1, in the dtype of ``images``."""
        steps = torch.arange(start, stop, device=images.device)
        streams = derive(derive(keys, self.seed)[None, :], steps[:, None])  # (T, B)
        draws = uniform(streams, images[0].numel()).view(len(steps), *images.shape)
        return torch.where(draws < images.abs(), images.sign(), 0.0)


class DirectEncoder:
    """The analogue pixel is fed as a current at every step (DIET-SNN, Rathi & Roy 2020)."""

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


ENCODERS = {"poisson": PoissonEncoder, "direct": DirectEncoder}
