"""A decision over time: class probabilities after every step, and leaving early when sure enough.

The output layer only accumulates (Eq. 4), so softmax(U_t) is a decision after any step t; it need
not be waited for once it is clear. How sure softmax(U_t) is, is a matter of its
scale (:mod:`stdb.calibration`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .encoding import check_timesteps
from .network import SpikingNetwork

STEPS_AT_ONCE = 4  # after so many steps it is looked whether all are decided


@dataclass(frozen=True)
class Decision:
    """What a network said of a batch of images.

    Attributes:
        probabilities: (t, B, classes), softmax of U_t for t = 1 … the last step presented.
        steps: (B,) int64, the step at which each image was decided: the first with enough
            confidence, else T.
    """

    probabilities: Tensor
    steps: Tensor

    @property
    def final(self) -> Tensor:
        """(B, classes): the probabilities at each image's own step."""
        images = torch.arange(len(self.steps), device=self.steps.device)
        return self.probabilities[self.steps - 1, images]

    @property
    def settled(self) -> Tensor:
        """(B,) int64: the step from which on each image's class was the one decided for."""
        t = torch.arange(1, len(self.probabilities) + 1, device=self.steps.device)[:, None]
        other = self.probabilities.argmax(2) != self.final.argmax(1)
        return torch.where(other & (t <= self.steps), t, 0).amax(0) + 1


@torch.no_grad()
def decide(
    snn: SpikingNetwork,
    images: Tensor,
    timesteps: int,
    confidence: float | None = None,
    *,
    sample_ids: Tensor | None = None,
) -> Decision:
    """Present images until each is decided: for T steps, or until softmax(U_t) says so clearly.

    Args:
        snn: the network; in evaluation mode.
        images: (B, C, H, W), pixels in [−1, 1].
        timesteps: T, the most steps.
        confidence: leave as soon as the largest probability of every image has reached this; None
            presents T steps.
        sample_ids: as for ``SpikingNetwork.present``.
    """
    check_timesteps(timesteps)
    if confidence is not None and not 0 < confidence <= 1:
        raise ValueError(f"confidence is {confidence}; allowed: above 0, at most 1")
    chunk = None if confidence is None else STEPS_AT_ONCE
    presentation = snn.present(images, sample_ids=sample_ids, chunk=chunk)
    parts: list[Tensor] = []
    steps = torch.full((len(images),), timesteps, device=images.device)
    while presentation.t < timesteps:
        start = presentation.t
        size = min(presentation.chunk, timesteps - start)
        parts.append(snn.logits_over_time(presentation, size).softmax(2))
        if confidence is not None:
            steps = torch.minimum(steps, start + first_confident(parts[-1], confidence, timesteps))
            if int(steps.max()) <= presentation.t:
                break
    return Decision(torch.cat(parts), steps)


def first_confident(probabilities: Tensor, confidence: float, otherwise: int) -> Tensor:
    """(B,): the first step, from 1, at which the largest of (t, B, classes) reaches confidence."""
    t = torch.arange(1, len(probabilities) + 1, device=probabilities.device)[:, None]
    sure = probabilities.amax(2) >= confidence
    return torch.where(sure, t, otherwise).amin(0)
