"""Calibration after balancing: the scale of the logits with which softmax(U_T) is as sure as right.

U_T grows with T, far beyond what an ANN's logits are; see ``SpikingNetwork.scale_output``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SCALES = tuple(2 ** (k / 4) for k in range(-48, 9))  # tried for the logits: 1/4096 to 4
INFORMED = 0.98  # of the loss of a guess: below it, logits say something


def scaled_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(scales,) float64: cross-entropy of softmax(s·logits), summed over images, s in ``SCALES``.

    Args:
        logits: (B, classes).
        labels: (B,).
    """
    logits = logits.double()
    return torch.stack([F.cross_entropy(s * logits, labels, reduction="sum") for s in SCALES])


def logit_scale(losses: Tensor) -> float:
    """The scale of the logits that fits best: temperature scaling (Guo et al., ICML 2017).

    1 where no scale fits better than knowing nothing, which a scale near 0 amounts to.

    Args:
        losses: what :func:`scaled_losses` gives, added up over images the network has not learned.
    """
    best = int(losses.argmin())
    return SCALES[best] if losses[best] < INFORMED * losses[0] else 1.0
