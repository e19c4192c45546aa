"""How pixels of 0 … 255 become the numbers that a network sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SMALLEST_STD = 1e-6


@dataclass(frozen=True)
class Normalisation:
    """(x/255 − mean)/std, channel by channel; without mean and std x/127.5 − 1, in [−1, 1].

    Args:
        mean: (C,), of each channel, in [0, 1] as pixels are from black to white.
        std: (C,), of each channel, in the same units, 1e-6 to 1.

    Raises:
        ValueError: not as many of the one as of the other, or a number that is not allowed.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Tuples of floats, checked."""
        for name, least in (("mean", 0.0), ("std", SMALLEST_STD)):
            object.__setattr__(self, name, _numbers(name, getattr(self, name), least))
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"mean has {len(self.mean)} channels and std {len(self.std)}; "
                "allowed: a number for each channel in both"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Pixels (B, C, H, W), 0 to 255 of any type → float32 of the same shape.

        Raises:
            ValueError: the images have other channels.
        """
        pixels = images.to(torch.float32, copy=True)
        if not self.mean:
            return pixels.div_(127.5).sub_(1.0)
        self.check_channels(pixels.shape[1], "the images have")
        mean, std = (
            torch.tensor(of_channels, device=pixels.device).view(-1, 1, 1)  # (C, 1, 1)
            for of_channels in (self.mean, self.std)
        )
        return pixels.div_(255).sub_(mean).div_(std)

    def check_channels(self, channels: int, who: str) -> None:
        """Refuse images of other channels.

        Args:
            channels: of the images.
            who: has them, with its verb; begins the message.

        Raises:
            ValueError: there is not a mean for each of them.
        """
        if self.mean and channels != len(self.mean):
            raise ValueError(
                f"{who} {channels} channel{'s' * (channels != 1)} and the normalisation "
                f"{len(self.mean)}; allowed: as many"
            )

    @property
    def largest(self) -> tuple[float, ...]:
        """(C,): the largest |number| that a pixel of each channel becomes; (1,) by default."""
        pairs = zip(self.mean, self.std, strict=True)
        return tuple(max(mean, 1 - mean) / std for mean, std in pairs) or (1.0,)

    def settings(self) -> dict[str, list[float]]:
        """What a file keeps of it; empty for x/127.5 − 1."""
        return {"mean": list(self.mean), "std": list(self.std)} if self.mean else {}


def normalisation_of(kept: Any) -> Normalisation:
    """What :meth:`Normalisation.settings` gave; None, of files that have none, is x/127.5 − 1.

    Raises:
        ValueError: it is something else.
    """
    if kept is None:
        return Normalisation()
    if not isinstance(kept, Mapping) or set(kept) not in ({"mean", "std"}, set()):
        raise ValueError(f"normalisation is {kept!r}; allowed: mean and std, or none")
    return Normalisation(**kept)


def _numbers(name: str, values: Any, least: float) -> tuple[float, ...]:
    """A tuple of floats."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"{name} is {values!r}; allowed: a list, a number for each channel")
    for value in values:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not least <= value <= 1:
            raise ValueError(
                f"{name} has {value!r}; allowed: {least:g} to 1, in units where black is 0 and "
                "white 1"
            )
    return tuple(map(float, values))


NORMALISATIONS = {  # mean and deviation of all pixels of their training images
    "imagenet": Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Normalisation((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
