"""Threshold balancing: the door to all methods, and Algorithm 1 in one pass over the layers.

V_l is the largest weighted input W·O^{l−1}_t that layer l sees over the calibration images and all
t, with λ = 1, no dropout, and all lower layers already at their V. What few steps want is in
:mod:`stdb.few_steps`.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .architectures import ResidualBlock
from .correction import Present
from .encoding import check_images, check_timesteps
from .evaluation import all_images
from .few_steps import Balance, Progress, calibrate, set_initial_membranes, settle
from .fronts import release, remember
from .kernels.layout import to_matrix
from .layerwise import LayerwiseRun, Room, present_layerwise
from .network import SpikingNetwork
from .workers import Reduce, Workers

NOT_FINITE = 0x7F800000  # infinity's bits; NaN's are above
DROPPED_BITS = 13  # of a float32's mantissa; the rest tells values 0.1 % apart from each other


@torch.no_grad()
def balance_thresholds(  # noqa: PLR0913 (each with a default, by keyword)
    snn: SpikingNetwork,
    images: Tensor | Iterable[Any],
    timesteps: int,
    *,
    method: str = "auto",
    per: str | None = None,
    initial_membrane: float | None = None,
    bias_correction: bool | None = None,
    batch_size: int = 64,
    percentile: float = 100.0,
    memory: int = 1 << 30,
    residual_blocks: bool = False,
    sample_ids: Tensor | None = None,
    reduce: Reduce | None = None,
    share: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> Balance:
    """Set what each spike of ``snn`` stands for, by Algorithm 1 or by what few steps want.

    A second call gives what the first gave, whatever method came between; only U_0 stays, where the
    second does not set it. ``mse`` and ``learned`` change weights and biases too: a network of the
    paper's kind is none any more afterwards.

    Args:
        snn: a converted network; its thresholds are replaced.
        images: (N, C, H, W), calibration images from the training split, shuffled; or batches of
            them, as a DataLoader gives, all of which are taken.
        timesteps: T of the calibration; with ``mse`` and with a correction the T that is wanted.
        method: ``maximum``: Algorithm 1. ``percentile``: the same with ``percentile``. ``mse``: A
            of least error at T, from the ANN's activations (:mod:`stdb.amplitudes`). ``learned``: A
            is the bound that the ANN's activations were trained with. ``auto``: Algorithm 1 for
            networks of the paper's kind, which have no biases, and where λ < 1; ``mse`` for others;
            ``percentile`` wherever one below 100 is given.
        per: whether A is one of each ``layer`` or of each ``channel``, which ``mse`` and
            ``learned`` can; None: ``channel`` with ``mse``. Fully connected layers have one.
        initial_membrane: f in [0, 1), U_0 = f·V of every layer; None: with ``mse`` that of ½, 0.4,
            0.3 with which the network decides most like its ANN (:mod:`stdb.few_steps`; a run each
            more), ½ with ``learned``, as it is with the others.
        bias_correction: whether biases are corrected (:mod:`stdb.correction`), and that is kept if
            it helps; None: with ``mse`` and ``learned``.
        batch_size: images presented at once; does not change what Algorithm 1 finds.
        percentile: V is this percentile of a layer's weighted inputs over images, neurons and time;
            100 is the paper's maximum. Others are found to 0.1 %, from a histogram.
        memory: bytes that spike trains may take. Those that find no room are made again when they
            are needed, so that any number of images and steps fits; it does not change the result.
        residual_blocks: balance the layers in basic blocks too; Algorithm 1 leaves them at 1, as
            the paper does (§4.2).
        sample_ids: (N,) int64, the images' random streams.
        reduce: ``(tensor, "max" or "sum")`` → the same over several workers that each hold a part
            of the images, which may be none.
        share: (rank, number of workers). Of all batches this worker has every so many-th, from its
            rank on; sums are added in the order of the batches, so that any number of workers finds
            the same. Algorithm 1 takes any parts.
        progress: called with (layer, V) as each is found; per channel with its channels' mean A.

    Returns:
        Layer name → V, and what else was found: dead channels, agreement with the ANN.

    Raises:
        ValueError: a layer's largest weighted input is not above 0, it is silent in the ANN, or has
            no bound to be learned: the message names it. Or a setting that cannot be.
    """
    check_timesteps(timesteps)
    plan = settle(snn, method, per, initial_membrane, bias_correction, percentile)
    images, like = all_images(images), next(snn.net.parameters())
    if len(images) < 1 and reduce is None:
        raise ValueError("no calibration images")
    check_images(images, snn.encoder, snn.dimensions())
    images = images.to(like.device, like.dtype)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; allowed: 1 or more")
    keep_at_one = set() if residual_blocks else residual_layers(snn)

    def present() -> list[LayerwiseRun]:
        return present_layerwise(snn, images, batch_size, sample_ids, Room(memory))

    def by_currents() -> dict[str, float]:
        return _algorithm_1(
            snn, present, timesteps, plan.percentile, keep_at_one, reduce, images, progress
        )

    training = snn.training
    snn.eval()
    try:
        if plan.of_activations or plan.correct:
            return calibrate(
                snn, images, timesteps, plan, batch_size=batch_size, sample_ids=sample_ids,
                workers=Workers(*share, reduce, images.device), present=present,
                by_currents=by_currents, progress=progress,
            )  # fmt: skip
        if snn.has_units:
            release(snn)
            remember(snn)
        set_initial_membranes(snn, plan)
        balance = Balance(plan.method, plan.per, plan.initial_membrane)
        balance.update(by_currents())
    finally:
        snn.train(training)
    return balance


def _algorithm_1(
    snn: SpikingNetwork,
    present: Present,
    timesteps: int,
    percentile: float,
    keep_at_one: set[str],
    reduce: Reduce | None,
    images: Tensor,
    progress: Progress | None,
) -> dict[str, float]:
    """Set every V by Algorithm 1; layer name → V."""
    # V = 1 is a placeholder until a layer's own is known
    snn.set_thresholds(dict.fromkeys(snn.thresholds, 1.0), balanced=())
    batches = present()
    thresholds = {}
    labels = snn.graph.labels
    for position, i in enumerate(snn.graph.neurons):
        if labels[i] in keep_at_one:
            value = 1.0
        else:
            currents = (
                to_matrix(batch.current(i, start, stop))
                for batch in batches
                for start, stop in batch.chunks(timesteps)
            )
            value = _percentile(currents, percentile, reduce, images)
            if not 0 < value < float("inf"):
                which = "largest weighted input" if percentile == 100 else f"{percentile} % point"
                raise ValueError(
                    f"layer {labels[i]} has a {which} of {value}, so no "
                    "threshold can be balanced; it is dead or has diverged: present more "
                    "steps, or look at the ANN's weights and the layers below it"
                )
        bound = snn.module(i).bound
        value = value if bound is None else min(value, bound)
        thresholds[labels[i]] = value
        if snn.has_units:  # the weights above see spikes that stand for so much
            snn.set_thresholds(dict.fromkeys(snn.thresholds, 1.0) | thresholds, balanced=())
        last = position == len(snn.graph.neurons) - 1
        for batch in batches:
            batch.finish(i, value, timesteps, last)
        if progress is not None:
            progress(labels[i], value)
    snn.set_thresholds(thresholds, balanced=set(thresholds) - keep_at_one)
    return thresholds


def residual_layers(snn: SpikingNetwork) -> set[str]:
    """The spiking layers inside basic blocks, whose thresholds the paper leaves at 1 (§4.2)."""
    blocks = [n for n, module in snn.net.named_modules() if isinstance(module, ResidualBlock)]
    return {
        label
        for i, label in snn.graph.labels.items()
        if any(snn.graph.nodes[i].name.startswith(f"{block}.") for block in blocks)
    }


def _percentile(
    currents: Iterator[Tensor],
    percentile: float,
    reduce: Reduce | None,
    like: Tensor,
) -> float:
    """A percentile of all values of some tensors; NaN if a value is and 100 is asked for.

    ``like`` gives device and dtype where there are none.
    """
    if percentile == 100:
        maxima = [current.max().to(like) for current in currents]
        largest = torch.stack(maxima).max() if maxima else like.new_full((), -math.inf)
        return float(largest if reduce is None else reduce(largest, "max"))
    # floats above 0 are in the order of their bits; the upper ones make a histogram
    counts = torch.zeros(1 << (31 - DROPPED_BITS), dtype=torch.int64, device=like.device)
    for current in currents:
        bins = current.float().clamp_(min=0).view(torch.int32).bitwise_right_shift_(DROPPED_BITS)
        counts += torch.bincount(bins.flatten(), minlength=len(counts))
    if reduce is not None:
        counts = reduce(counts, "sum")
    if int(counts[NOT_FINITE >> DROPPED_BITS :].sum()):
        return math.nan
    below = counts.cumsum(0)
    wanted = math.ceil(int(below[-1]) * percentile / 100)
    place = int(torch.searchsorted(below, torch.tensor(wanted, device=below.device)))
    if place == 0:
        return 0.0
    upper = torch.tensor((place + 1) << DROPPED_BITS, dtype=torch.int32)
    return float(upper.view(torch.float32))
