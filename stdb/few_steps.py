"""Calibration for few steps, step by step: units, A of each layer, U_0, corrected biases.

f of U_0 = f·V rounds best at ½ where spikes come evenly. In the first steps those from below have
not come yet, which a smaller f makes up for, the deeper the network and the fewer the steps: with
``mse`` a few are tried, and that is taken with which the network is least surprised by what its ANN
decides, Σ −log softmax(U_T/T)[decision] over the calibration images.

What is settled before anything is computed is a :class:`Plan`; what is found is a :class:`Balance`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .amplitudes import Activations, Ann, fit_amplitudes, surprise, survey
from .correction import Present, correct_all, correct_biases, logits_of
from .fronts import hold_units, prepare_front, release, remember, set_amplitude, takes_channels
from .network import SpikingNetwork
from .weights import bias_of
from .workers import Workers

METHODS = ("auto", "maximum", "percentile", "mse", "learned")
OF_ACTIVATIONS = ("mse", "learned")  # they take A from the ANN
FORMS = ("layer", "channel")
SHARES = (0.5, 0.4, 0.3)  # f that are tried with mse

Progress = Callable[[str, float], None]


class Balance(dict[str, float]):
    """Layer name → V, and what else a calibration found.

    Attributes:
        method: ``maximum``, ``percentile``, ``mse`` or ``learned``.
        per: ``layer`` or ``channel``.
        initial_membrane: f that was given or found; None where that of the neurons was left.
        dead: layer → channels that never fire and have their layer's A, where there are any.
        agreement: the share of calibration images that the network decides like its ANN, without a
            correction of biases and with it; None where none was tried.
        corrected: whether biases are corrected.
    """

    def __init__(self, method: str, per: str, initial_membrane: float | None = None) -> None:
        super().__init__()
        self.method, self.per, self.initial_membrane = method, per, initial_membrane
        self.dead: dict[str, int] = {}
        self.agreement: tuple[float, float] | None = None
        self.corrected = False


@dataclass(frozen=True)
class Plan:
    """What a calibration does.

    Attributes:
        method: one of ``METHODS``, but ``auto``.
        per: ``layer`` or ``channel``.
        initial_membrane: f, U_0 = f·V; None leaves that of the neurons, with ``mse`` the best of
            ``SHARES``.
        correct: whether to correct biases.
        percentile: of the currents, for Algorithm 1.
    """

    method: str
    per: str
    initial_membrane: float | None
    correct: bool
    percentile: float

    @property
    def of_activations(self) -> bool:
        """Whether A comes from the ANN's activations, and not from currents."""
        return self.method in OF_ACTIVATIONS


def settle(
    snn: SpikingNetwork,
    method: str,
    per: str | None,
    initial_membrane: float | None,
    bias_correction: bool | None,
    percentile: float,
) -> Plan:
    """The plan for what was asked for; see ``balance_thresholds``.

    Raises:
        ValueError: it cannot be, as a leak with ``mse``; says what is allowed.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed: {', '.join(METHODS)}")
    if per not in (None, *FORMS):
        raise ValueError(f"per is {per!r}; allowed: {', '.join(FORMS)}, or None")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile is {percentile}; allowed: above 0, at most 100 (the maximum)")
    leaks = {name: neuron.leak.item() for name, neuron in snn.neurons.items()}
    leaky = next((name for name, leak in leaks.items() if leak < 1), None)
    if method == "auto":
        few_steps = snn.has_units and leaky is None and percentile == 100
        currents = "maximum" if percentile == 100 else "percentile"
        method = "mse" if few_steps else currents
    elif percentile < 100 and method != "percentile":
        raise ValueError(
            f"percentile is {percentile} with the method {method}; allowed: 100, or the method "
            "percentile"
        )
    fits = method in OF_ACTIVATIONS
    per = per or ("channel" if method == "mse" else "layer")
    correct = fits if bias_correction is None else bias_correction
    if per == "channel" and not fits:
        raise ValueError(
            f"per is channel with the method {method}; allowed: layer, or the methods "
            f"{', '.join(OF_ACTIVATIONS)}"
        )
    if leaky is not None and (fits or correct):
        raise ValueError(
            f"the leak of {leaky} is {leaks[leaky]:.6g} with "
            f"{f'the method {method}' if fits else 'bias_correction'}; allowed: 1, since a current "
            "below (1 − leak)·V never fires; or the methods maximum, percentile without correction"
        )
    if initial_membrane is not None and not 0 <= initial_membrane < 1:
        raise ValueError(
            f"initial_membrane is {initial_membrane}; allowed: at least 0, below 1 (times V)"
        )
    if method == "learned":
        _bounds(snn)
    share = 0.5 if initial_membrane is None and method == "learned" else initial_membrane
    return Plan(method, per, share, correct, percentile)


def _check_biases(snn: SpikingNetwork, what: str) -> None:
    """Refuse a network as of another program, whose weights hold its V already."""
    modules = (snn.module(i) for i, node in enumerate(snn.graph.nodes) if node.operator.learns)
    if not snn.has_units and any(bias_of(module) is not None for module in modules):
        raise ValueError(
            f"{what} wants a network whose weights hold no thresholds, and this one has biases "
            "that go with its V; allowed: one from stdb.convert, or the methods maximum, "
            "percentile without correction"
        )


def calibrate(
    snn: SpikingNetwork,
    images: Tensor,
    timesteps: int,
    plan: Plan,
    *,
    batch_size: int,
    sample_ids: Tensor | None,
    workers: Workers,
    present: Present,
    by_currents: Callable[[], dict[str, float]],
    progress: Progress | None,
) -> Balance:
    """Do what the plan says to a network in evaluation mode.

    Args:
        snn: the network.
        images: (N, …) this worker's.
        timesteps: T.
        plan: the plan.
        batch_size: images at once.
        sample_ids: (N,) of the images.
        workers: that share them.
        present: starts presentations of this worker's batches.
        by_currents: Algorithm 1, where A does not come from activations: sets and returns V.
        progress: called with (layer, V), per channel with their mean A.
    """
    _check_biases(snn, f"the method {plan.method}" if plan.of_activations else "bias_correction")
    hold_units(snn, images.shape[1:])
    release(snn)
    set_initial_membranes(snn, plan)
    added = _prepare(snn, Ann(snn, images, batch_size, timesteps, sample_ids), plan)
    remember(snn)
    ann = Ann(snn, images, batch_size, timesteps, sample_ids)
    found = survey(ann, workers) if plan.correct or plan.method == "mse" else Activations()
    if plan.method == "mse" and plan.initial_membrane is None:
        share = _least_surprise(snn, ann, plan, found, workers, present)
        plan = replace(plan, initial_membrane=share)
    balance = Balance(plan.method, plan.per, plan.initial_membrane)
    if plan.of_activations:
        _start(snn, ann, plan, found, workers, balance, progress)
    else:
        balance.update(by_currents())
    if plan.correct:
        _make_room(snn, ann)
        balance.corrected, balance.agreement = correct_biases(snn, ann, found, workers, present)
        if not balance.corrected:
            _take_away(snn, plan, added)
    return balance


def _least_surprise(
    snn: SpikingNetwork,
    ann: Ann,
    plan: Plan,
    found: Activations,
    workers: Workers,
    present: Present,
) -> float:
    """The best f of ``SHARES``; the network is in the ANN's own units afterwards, as before."""
    surprises = {}
    for share in SHARES:
        _start(snn, ann, replace(plan, initial_membrane=share), found, workers, None, None)
        if plan.correct:
            _make_room(snn, ann)
            logits, snn.output_correction = correct_all(snn, ann, found, workers, present)
            decisions = [d.flatten() for d in found.decisions]
        else:
            logits, decisions = logits_of(snn, ann, present), found.decisions
        surprises[share] = surprise(decisions, logits, ann.steps, workers)
        release(snn)
    return min(surprises, key=surprises.__getitem__)


def _start(
    snn: SpikingNetwork,
    ann: Ann,
    plan: Plan,
    found: Activations,
    workers: Workers,
    balance: Balance | None,
    progress: Progress | None,
) -> None:
    """U_0 and A of every layer, from the ANN's activations; noted in ``balance``."""
    set_initial_membranes(snn, plan)
    dead: dict[str, int] = {}
    thresholds = _set_amplitudes(snn, ann, plan, found, workers, dead, progress)
    if balance is not None:
        balance.update(thresholds)
        balance.dead.update(dead)


def _make_room(snn: SpikingNetwork, ann: Ann) -> None:
    """For the correction of every channel."""
    for label, neuron in snn.neurons.items():
        if neuron.amplitude is None:
            neuron.keep(ann.channels[label])


def set_initial_membranes(snn: SpikingNetwork, plan: Plan) -> None:
    """U_0/V of every layer, where the plan says it."""
    if plan.initial_membrane is not None:
        for neuron in snn.neurons.values():
            neuron.initial_membrane = plan.initial_membrane


def _take_away(snn: SpikingNetwork, plan: Plan, added: list[str]) -> None:
    """What was made room for, and is of no use."""
    for path in added:
        snn.net.get_submodule(path).bias = None  # type: ignore[assignment]
    if plan.per == "layer":
        for neuron in snn.neurons.values():
            neuron.keep(0)


def _prepare(snn: SpikingNetwork, ann: Ann, plan: Plan) -> list[str]:
    """Make room in front of every layer; the places of the biases that were added."""
    added: list[str | None] = []
    if plan.correct or plan.per == "channel":
        labels = [label for label in ann.channels if label]
        added = [prepare_front(snn, n, ann.channels[n], plan.correct) for n in labels]
    if plan.correct:
        added.append(prepare_front(snn, "", ann.channels[""], True))
    return [path for path in added if path is not None]


def _set_amplitudes(
    snn: SpikingNetwork,
    ann: Ann,
    plan: Plan,
    found: Activations,
    workers: Workers,
    dead: dict[str, int],
    progress: Progress | None,
) -> dict[str, float]:
    """Find A of every layer and set it; V of every layer. ``dead`` is filled."""
    if plan.method == "learned":
        amplitudes = _bounds(snn)
    else:
        apart = {
            label
            for i, label in snn.graph.labels.items()
            if plan.per == "channel" and label not in ann.flat and takes_channels(snn.graph, i)
        }
        assert plan.initial_membrane is not None
        amplitudes, own = fit_amplitudes(ann, found, workers, plan.initial_membrane, apart)
        dead.update(own)
    like = next(snn.parameters())
    thresholds = {}
    for label, neuron in snn.neurons.items():
        amplitude = amplitudes[label].to(like)
        if neuron.bound is not None:
            amplitude = amplitude.clamp(max=neuron.bound)
        if plan.per == "channel":
            set_amplitude(snn, label, amplitude.expand(ann.channels[label]))
        thresholds[label] = 1.0 if plan.per == "channel" else float(amplitude)
        if progress is not None:
            progress(label, float(amplitude.mean()))
    snn.set_thresholds(thresholds)
    return thresholds


def _bounds(snn: SpikingNetwork) -> dict[str, Tensor]:
    """The bound of every layer's activation, as A."""
    without = [label for label, neuron in snn.neurons.items() if neuron.bound is None]
    if without:
        raise ValueError(
            f"layer {without[0]} has no bound that its activation was trained with, nor have "
            f"{len(without) - 1} others; allowed with the method learned: layers that clip, such "
            "as ReLU6; or the method mse"
        )
    return {
        label: torch.tensor([neuron.bound], dtype=torch.float64)
        for label, neuron in snn.neurons.items()
    }
