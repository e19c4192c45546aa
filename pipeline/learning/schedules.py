"""The learning rate of every step, and what of a network the weight decay leaves alone.

A rate is a function of parameters, epoch and step, so that a training that was interrupted goes on
where it was.
"""

import math
from typing import Any

from torch import nn

import stdb
from pipeline.params import Schedule

RISE, FIRST, LAST = 0.3, 25, 250_000  # torch's own of OneCycleLR: share, and divisors of the rate
WARM_UP = 0.05  # share of the steps over which the rate of a cosine rises


def learning_rate(params: Schedule, epoch: int, step: int = 1, steps: int = 1) -> float:
    """Of a step, the first of which is number 1, of the ``steps`` of an epoch, from 1, too.

    ===========  ===================================================================================
    milestones   divided by ``decay`` at each milestone, a fraction of the epochs (paper §4)
    onecycle     from a 25th up along a cosine over 30 % of the steps, down along one to a 250,000th
                 (Smith and Topin, 2018; torch's OneCycleLR, with a momentum that stays)
    cosine       up along a line over 5 % of the steps, down along a cosine to 0
    ===========  ===================================================================================
    """
    largest = params.learning_rate
    total, done = params.epochs * steps, (epoch - 1) * steps + step - 1
    if params.schedule == "onecycle":
        top = RISE * total - 1
        if done <= top:
            return _between(largest / FIRST, largest, done / top)
        return _between(largest, largest / LAST, (done - top) / (total - 1 - top))
    if params.schedule == "cosine":
        rise = round(WARM_UP * total)
        if done < rise:
            return largest * (done + 1) / (rise + 1)
        return _between(largest, 0.0, (done - rise) / (total - rise))
    passed = sum(epoch - 1 >= round(m * params.epochs) for m in params.milestones)
    return largest / params.decay**passed


def _between(start: float, end: float, share: float) -> float:
    """Half a wave of a cosine from ``start`` to ``end``."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def parameter_groups(network: nn.Module, params: Schedule) -> list[dict[str, Any]]:
    """A network's parameters as an optimiser takes them: those that decay, and those that do not.

    The bounds of activations never do; batch norms do with the paper's milestones alone.
    """
    norms = () if params.schedule == "milestones" else (nn.modules.batchnorm._BatchNorm,)
    still = {
        id(parameter)
        for module in network.modules()
        if isinstance(module, (stdb.Clip, *norms))
        for parameter in module.parameters(recurse=False)
    }
    groups: list[dict[str, Any]] = [
        {"params": [p for p in network.parameters() if id(p) not in still]}
    ]
    if still:
        kept = [p for p in network.parameters() if id(p) in still]
        groups.append({"params": kept, "weight_decay": 0.0})
    return groups
