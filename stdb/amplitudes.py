"""What one spike of a layer should stand for, from the ANN's activations: A of least error.

At T steps a neuron with threshold A that starts at f·A says, of a constant activation a,

    q(a) = clamp(⌊a·T/A + f⌋, 0, T) · A/T

of 95 candidates, from 1.00 to 0.06 of the largest activation, the one with the least mean of
(a − q(a))² is taken: for a layer, or for each of its channels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .checking import activations
from .encoding import mean_input
from .network import SpikingNetwork
from .randomness import sample_keys
from .workers import Workers

CANDIDATES = tuple(k / 100 for k in range(100, 5, -1))  # shares of the largest activation
AT_ONCE = 1 << 22  # activations that are sorted at once
SILENT = 1e-6  # of the layer's largest activation: a channel below it never fires


@dataclass
class Activations:
    """What the ANN's activations are over all calibration images.

    Attributes:
        largest: layer → (C,) of each channel.
        mean: layer → (C,) float64; of ``""`` that of the logits.
        decisions: this worker's images' most likely classes, in batches.
    """

    largest: dict[str, Tensor] = field(default_factory=dict)
    mean: dict[str, Tensor] = field(default_factory=dict)
    decisions: list[Tensor] = field(default_factory=list)


class Ann:
    """The ANN that a network stands for, over calibration images, batch by batch.

    Args:
        snn: in units of 1: its weights are the ANN's own.
        images: (N, …) this worker's.
        batch_size: images at once.
        timesteps: that an encoder other than ours is asked for; the ANN is given their mean.
        sample_ids: (N,) of the images.
    """

    def __init__(
        self,
        snn: SpikingNetwork,
        images: Tensor,
        batch_size: int,
        timesteps: int,
        sample_ids: Tensor | None,
    ) -> None:
        self.snn, self.images, self.size, self.steps = snn, images, batch_size, timesteps
        ids = torch.arange(len(images), device=images.device)
        self.ids = ids if sample_ids is None else sample_ids
        self.labels: dict[int, str] = {**snn.graph.labels, len(snn.graph.nodes) - 1: ""}
        shapes = snn.shapes(images.shape[1:])
        self.channels = {label: shapes[i][0] for i, label in self.labels.items()}
        self.pixels = {label: shapes[i][1:].numel() for i, label in self.labels.items()}
        self.flat = {label for i, label in self.labels.items() if len(shapes[i]) == 1}

    def batches(self) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """For every batch the layers and their activations (B, C, …), and the logits as ``""``."""
        parts = zip(self.images.split(self.size), self.ids.split(self.size), strict=True)
        for images, ids in parts:
            if len(images):
                keys = sample_keys(ids, 0)
                yield self._layers(mean_input(images, self.snn.encoder, self.steps, keys))

    def _layers(self, pixels: Tensor) -> Iterator[tuple[str, Tensor]]:
        for i, value in activations(self.snn.graph.nodes, self.snn.net, pixels):
            if i in self.labels:
                yield self.labels[i], value


def survey(ann: Ann, workers: Workers) -> Activations:
    """The largest and mean activations, and what the ANN decides.

    Raises:
        ValueError: a layer is silent; names it.
    """
    like = ann.images
    largest = {label: like.new_zeros(n) for label, n in ann.channels.items() if label}
    sums: dict[str, list[Tensor]] = {label: [] for label in ann.channels}
    found = Activations()
    values = 0
    for batch in ann.batches():
        for label, value in batch:
            rows = rows_of(value)
            sums[label].append(rows.sum(1, dtype=torch.float64))
            if label:
                torch.maximum(largest[label], rows.amax(1), out=largest[label])
            else:
                found.decisions.append(value.argmax(1))
                values += len(value)
    images = workers.total(values)
    if not images:
        raise ValueError("no calibration images")
    for label, n in ann.channels.items():
        total = workers.in_order(sums[label], torch.zeros(n))
        found.mean[label] = total / (images * ann.pixels[label])
        if label:
            found.largest[label] = workers.max(largest[label])
            top = float(found.largest[label].max())
            if not 0 < top < float("inf"):
                raise ValueError(
                    f"layer {label} is silent: its largest activation over the calibration images "
                    f"is {top}; allowed: above 0; look at the ANN's weights, give other images"
                )
    return found


def rows_of(value: Tensor) -> Tensor:
    """(B, C, …) → (C, B·…)."""
    return value.movedim(1, 0).flatten(1)


def fit_amplitudes(
    ann: Ann,
    found: Activations,
    workers: Workers,
    share: float,
    by_channel: set[str],
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """A of least error, layer by layer.

    Args:
        ann: the network.
        found: what :func:`survey` gave.
        workers: that share the images.
        share: f, U_0/V.
        by_channel: the layers whose channels have A of their own.

    Returns:
        Layer → A, (C,) or (1,), and layer → channels that never fire, which have their layer's A,
        where there are any.
    """
    dead = {
        label: largest <= SILENT * largest.max()
        for label, largest in found.largest.items()
        if label in by_channel
    }
    # the last row is the whole layer
    tops = {}
    for label, largest in found.largest.items():
        whole = largest.max()[None]
        tops[label] = torch.cat([largest, whole]) if label in by_channel else whole
    shares = torch.tensor(CANDIDATES, dtype=torch.float64, device=ann.images.device)
    errors: dict[str, list[Tensor]] = {label: [] for label in tops}
    for batch in ann.batches():
        for label, value in batch:
            if not label:
                continue
            candidates = tops[label].double()[:, None] * shares
            rows = rows_of(value)
            parts = []
            if label in by_channel:
                parts.append(squared_errors(rows, candidates[:-1], ann.steps, share))
            if label not in by_channel or bool(dead[label].any()):
                parts.append(squared_errors(rows.reshape(1, -1), candidates[-1:], ann.steps, share))
            else:
                parts.append(candidates.new_zeros(1, len(shares)))
            errors[label].append(torch.cat(parts))
    amplitudes = {}
    for label, top in tops.items():
        total = workers.in_order(errors[label], torch.zeros(len(top), len(shares)))
        amplitude = top.double() * shares[total.argmin(1)]
        if label in by_channel:
            amplitude = torch.where(dead[label], amplitude[-1], amplitude[:-1])
        amplitudes[label] = amplitude
    return amplitudes, {n: int(which.sum()) for n, which in dead.items() if bool(which.any())}


def squared_errors(rows: Tensor, candidates: Tensor, timesteps: int, share: float) -> Tensor:
    """(R, K) float64: Σ (a − q(a))² of every row of activations for every A.

    q rises by A/T at each a = (k − f)·A/T, k = 1 … T: with the activations in order, and their sums
    from the largest down, Σ q·a and Σ q² are sums over these T places, Σ q² = Σ_k (2k − 1)·n_k.

    Args:
        rows: (R, N), none below 0.
        candidates: (R, K) float64, A.
        timesteps: T.
        share: f.
    """
    pieces = rows.split(max(1, AT_ONCE // len(rows)), 1)
    errors = [_squared_errors(piece, candidates, timesteps, share) for piece in pieces]
    return torch.stack(errors).sum(0)


def _squared_errors(rows: Tensor, candidates: Tensor, timesteps: int, share: float) -> Tensor:
    """The same of so many as are sorted at once."""
    ordered = rows.contiguous().sort(1).values.double()
    count = ordered.shape[1]
    sums = torch.nn.functional.pad(ordered.flip(1).cumsum(1).flip(1), (0, 1))  # of a[n] and above
    squares = (ordered * ordered).sum(1)
    k = torch.arange(1, timesteps + 1, dtype=torch.float64, device=rows.device)
    errors = []
    for amplitude in candidates.t():
        step = (amplitude / timesteps)[:, None]
        first = torch.searchsorted(ordered, (k - share) * step)  # of those at this place or above
        products = sums.gather(1, first).sum(1)
        levels = ((2 * k - 1) * (count - first)).sum(1)
        errors.append(squares - 2 * step[:, 0] * products + step[:, 0] ** 2 * levels)
    return torch.stack(errors, 1)


def agreement(decisions: Sequence[Tensor], logits: Sequence[Tensor], workers: Workers) -> int:
    """The number of images of all workers that the network decides like its ANN."""
    pairs = zip(decisions, logits, strict=True)
    return workers.total(sum(int((z.argmax(1) == d).sum()) for d, z in pairs))


def surprise(
    decisions: Sequence[Tensor], logits: Sequence[Tensor], timesteps: int, workers: Workers
) -> float:
    """Σ −log softmax(U_T/T) of what the ANN decides, over all workers' images, in float64.

    Unlike a count of decisions it tells networks apart that decide a few images alike.
    """
    pairs = zip(decisions, logits, strict=True)
    sums = [cross_entropy(z.double() / timesteps, d, reduction="sum")[None] for d, z in pairs]
    return float(workers.in_order(sums, torch.zeros(1)))
