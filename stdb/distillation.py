"""Distillation: a spiking network learns from its ANN's logits beside the labels.

At few steps the labels alone say little: the ANN's probabilities say which other classes an image
is like, too (Hinton et al., 2015).
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def distillation_loss(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor,
    *,
    weight: float = 0.7,
    temperature: float = 2.0,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    r"""The loss of logits z against labels y and a teacher's logits.

    .. math::

        L = (1 - w)\,\mathrm{CE}(z, y)
            + w\,\tau^2\,\mathrm{KL}(\mathrm{softmax}(z_\mathrm{ANN}/\tau)
            \,\|\, \mathrm{softmax}(z/\tau))

    τ² keeps the second gradient as large as the first, whatever τ is. A spiking network's z is
    U_t/t after t steps, which is in the ANN's units: ``snn(images, t) / t``.

    Args:
        logits: z, (B, classes).
        labels: y, (B,) int64.
        teacher: z_ANN, (B, classes): the ANN's logits in evaluation mode, without gradient.
        weight: w in [0, 1], the share of the teacher.
        temperature: τ > 0, by which both are divided before they are compared.
        reduction: ``mean`` over the images, or their ``sum``.

    Returns:
        A scalar, differentiable with respect to ``logits``.

    Raises:
        ValueError: the teacher's classes or images are others; w, τ or reduction is not allowed.
    """
    if teacher.shape != logits.shape:
        raise ValueError(
            f"the teacher's logits are {tuple(teacher.shape)}; allowed: as the network's, "
            f"{tuple(logits.shape)}"
        )
    if not 0 <= weight <= 1:
        raise ValueError(f"weight is {weight}; allowed: 0 to 1")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; allowed: a number above 0, finite")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; allowed: 'mean', 'sum'")
    of_labels = F.cross_entropy(logits, labels, reduction=reduction)
    own = F.log_softmax(logits / temperature, 1)
    taught = F.log_softmax(teacher.detach() / temperature, 1)
    over = "batchmean" if reduction == "mean" else "sum"
    of_teacher = F.kl_div(own, taught, reduction=over, log_target=True)
    return (1 - weight) * of_labels + weight * temperature**2 * of_teacher
