"""The calibration of a converted network, the same for the stage and the trials of a sweep."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import stdb
from pipeline.data import Samples
from pipeline.errors import StageError
from pipeline.jobs.worker import Worker
from pipeline.learning.checks import check_calibration
from pipeline.learning.networks import build_snn
from pipeline.params import BalanceThresholdsParams, Params

BY_CURRENTS = "method: maximum, percentile"


@dataclass(frozen=True)
class Calibration:
    """A calibrated network.

    Attributes:
        snn: the network.
        balance: layer → V, and what else was found.
        timesteps: T of the calibration.
        wanted: the same where another T would have given another network, else None.
    """

    snn: stdb.SpikingNetwork
    balance: stdb.Balance
    timesteps: int
    wanted: int | None


def calibration_images(params: BalanceThresholdsParams, train: Samples) -> Tensor:
    """Positions of the images that are drawn to calibrate on.

    Raises:
        StageError: they are all of one class.
    """
    generator = torch.Generator().manual_seed(params.seed)
    chosen = torch.randperm(len(train), generator=generator)[: params.images]
    check_calibration(train.labels[chosen], len(train.classes))
    return chosen


def calibrate(worker: Worker, ann: nn.Module, train: Samples) -> Calibration:
    """Convert the trained ANN and balance it, as ``balance_thresholds`` says.

    A worker gets whole batches, so that products round alike, and sums are added in the order of
    the batches: the result is the same to the last bit, whatever the number of workers.

    Args:
        worker: that this process is.
        ann: with its trained weights, on the worker's device.
        train: the whole training split, which the images are drawn from.

    Raises:
        StageError: the method cannot be used with the network, or a layer is dead or has diverged.
    """
    params = worker.params.balance_thresholds
    snn = build_snn(ann, worker.params.stdb, params.seed, train).to(worker.device)
    snn.chunk = None  # the stage does not track it, and it changes how sums are rounded
    plan = check_method(worker.params, snn)
    wanted = worker.params.stdb.first_timesteps if for_wanted_steps(plan) else None
    timesteps = wanted or params.timesteps
    chosen = calibration_images(params, train)
    batches = chosen.split(params.batch_size)[worker.rank :: worker.world]
    share = train.take(torch.cat([*batches, chosen[:0]])).to(worker.device)
    worker.say(f"method {plan.method}, T = {timesteps}, {len(chosen)} calibration images")
    try:
        balance = stdb.balance_thresholds(
            snn,
            share.pixels(),
            timesteps,
            batch_size=params.batch_size,
            method=params.method,
            per=params.per,
            initial_membrane=params.initial_membrane,
            bias_correction=params.bias_correction,
            percentile=params.percentile,
            # V = 1 in basic blocks is the paper's, §4.2, for its networks
            residual_blocks=params.residual_blocks or snn.has_units,
            sample_ids=share.ids,
            reduce=worker.all_reduce,
            share=(worker.rank, worker.world),
            progress=lambda layer, threshold: worker.say(f"{layer:24} V = {threshold:.4f}"),
        )
    except ValueError as error:  # of a layer that is dead, has diverged or has no bound
        raise StageError(str(error)) from error
    return Calibration(snn, balance, timesteps, wanted)


def for_wanted_steps(plan: stdb.Plan) -> bool:
    """Whether what a calibration finds depends on the T that is wanted."""
    return plan.of_activations or plan.correct


def check_method(params: Params, snn: stdb.SpikingNetwork) -> stdb.Plan:
    """Refuse what ``balance_thresholds`` says and cannot be done with a converted network.

    Returns:
        What is to be done.

    Raises:
        StageError: says what is allowed.
    """
    asked, leak = params.balance_thresholds, params.stdb.leak
    if asked.percentile < 100 and asked.method not in ("auto", "percentile"):
        raise StageError(
            f"balance_thresholds.percentile is {asked.percentile} with method: {asked.method}; "
            "allowed: 100, or method: percentile"
        )
    if leak < 1 and (asked.method in ("mse", "learned") or asked.bias_correction):
        what = "bias_correction is true" if asked.bias_correction else f"method is {asked.method}"
        raise StageError(
            f"balance_thresholds.{what} with stdb.leak: {leak}; allowed: leak: 1, since a current "
            f"below (1 − leak)·V never fires, or {BY_CURRENTS} without correction"
        )
    unbounded = next((n for n, neuron in snn.neurons.items() if neuron.bound is None), None)
    if asked.method == "learned" and unbounded is not None:
        raise StageError(
            f"balance_thresholds.method is learned, and layer {unbounded} has no bound; allowed: "
            f"network.activation: clip, qcfs, or method: mse, maximum, percentile"
        )
    try:
        return stdb.settle(
            snn,
            asked.method,
            asked.per,
            asked.initial_membrane,
            asked.bias_correction,
            asked.percentile,
        )
    except ValueError as error:
        raise StageError(f"balance_thresholds: {error}") from error
