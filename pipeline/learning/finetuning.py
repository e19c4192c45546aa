"""STDB fine-tuning (Algorithms 2 and 3), the same for the stage and the trials of a sweep."""

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial

import psutil
import torch
from torch import Tensor, nn

import stdb
from pipeline.data import Samples
from pipeline.errors import StageError
from pipeline.jobs.worker import Row, State, Worker
from pipeline.learning.evaluation import (
    Evaluation,
    evaluate_snn,
    fitting_logit_scale,
    fitting_units,
    spike_metrics,
)
from pipeline.learning.fit import BackwardPasses, Losses, Task, cross_entropy, fit, order
from pipeline.learning.networks import (
    build_ann,
    build_snn,
    load_converted,
    use_surrogate,
    use_threads,
)
from pipeline.params import DistilParams, StdbAtT, StdbParams

Networks = tuple[nn.Module, stdb.SpikingNetwork]  # an ANN, and what it is converted to
SCRATCH_IMAGES, SCRATCH_PERCENTILE = 64, 90.0
STEPS = "timesteps"  # of an epoch's metrics: T, where it is one of several
# factors of V that are tried at the next T
DESCENTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
BATCH = 128  # images presented at once where nothing is learned


def fine_tune(
    worker: Worker,
    scale: float,
    train: Samples,
    validation: Samples,
    extra: Callable[[int, Evaluation], Row] = lambda _epoch, _evaluation: {},
    start: Networks | None = None,
) -> tuple[stdb.SpikingNetwork, State]:
    """Algorithms 2 and 3 on the converted network, or on random weights.

    Args:
        worker: that this process is; ``params.stdb`` says how.
        scale: of the thresholds.
        train: the images to learn from.
        validation: the images that choose the epoch.
        extra: further metrics of an epoch, from its evaluation.
        start: the trained ANN and its converted network; None: what earlier stages handed on.

    Returns:
        The network with the weights of its best epoch, and the state of :func:`fit`; its ``tuned``
        has for each T, the last one too, ``timesteps``, the best epoch's ``network`` (state dict),
        ``best`` (validation accuracy), ``epoch``, and ``history``.
    """
    params = worker.params.stdb
    ann, snn = starting_networks(worker, scale, train, validation, start)
    model = worker.data_parallel(snn)
    losses = fine_tuning_losses(worker, ann)

    def validate(at_t: StdbAtT, epoch: int) -> Row:
        evaluation = evaluate_snn(worker, snn, validation, at_t.timesteps, BATCH)
        return {
            "accuracy/validation": evaluation.accuracy[-1],
            "energy/validation_pj": evaluation.energy,
            **spike_metrics(evaluation.spikes),
            **({STEPS: at_t.timesteps} if params.progressive else {}),
            **extra(epoch, evaluation),
        }

    state = begun = worker.resume() or {}
    tuned = begun.get("tuned", [])
    for at_t in params.at_each()[len(tuned) :]:
        if tuned:
            snn.net.load_state_dict(tuned[-1]["network"])
        if params.progressive:
            worker.say(f"T = {at_t.timesteps}, {at_t.epochs} epoch(s)")
        if tuned and params.threshold_scale is None and not snn.has_units:
            lower_thresholds(worker, snn, validation, at_t.timesteps)
        use_surrogate(snn, at_t)
        available = least(worker, free_memory(worker))
        chunk = fitting_chunk(worker, snn, train.shape, at_t, available, begun.get("chunk"))
        task = Task(
            snn.net,
            model,
            backward_passes(snn, model, at_t, chunk, mean=params.in_units),
            torch.optim.Adam(
                [p for p in snn.parameters() if p.requires_grad],
                lr=at_t.learning_rate,
                weight_decay=at_t.weight_decay,
                amsgrad=True,
                fused=True,
            ),
            partial(validate, at_t),
            at_t.clip,
            at_t.micro_batch,
            snn.constrain,
            losses=losses,
        )
        state = fit(worker, task, train, at_t, begun | {"tuned": tuned, "chunk": chunk})
        best = {"network": state["best_network"], "epoch": state["best_epoch"]}
        kept = {"best": state["best"], "history": state["history"]}
        tuned = [*tuned, {"timesteps": at_t.timesteps, **best, **kept}]
        begun = {"epoch": state["epoch"]}
    snn.net.load_state_dict(tuned[-1]["network"])
    return snn, state | {"tuned": tuned}


@torch.no_grad()
def lower_thresholds(
    worker: Worker, snn: stdb.SpikingNetwork, validation: Samples, timesteps: int
) -> None:
    """Multiply V by the factor with which the network is best at its next T, on validation.

    Fewer steps bring less potential, to every layer: also to those that were not balanced, the
    blocks of the paper's ResNets. A network with units was calibrated at a V that its weights hold,
    and stays.
    """
    layers = list(snn.neurons.values())
    before = [neuron.threshold.clone() for neuron in layers]
    accuracies: dict[float, float] = {}

    def multiply(factor: float) -> None:
        for neuron, threshold in zip(layers, before, strict=True):
            neuron.threshold.copy_(threshold * factor)

    for factor in DESCENTS:
        multiply(factor)
        accuracies[factor] = evaluate_snn(worker, snn, validation, timesteps, BATCH).accuracy[-1]
    best = max(accuracies, key=lambda factor: accuracies[factor])
    multiply(best)
    worker.say(f"thresholds × {best:g}: validation {accuracies[best]:.1%} at T = {timesteps}")


def starting_networks(
    worker: Worker,
    scale: float,
    train: Samples,
    validation: Samples,
    start: Networks | None = None,
) -> Networks:
    """The ANN, and the converted network at its scaled thresholds, its output scaled.

    Or those of random weights. ``start`` as for :func:`fine_tune`.
    """
    params = worker.params.stdb
    torch.manual_seed(params.seed)
    snn = None
    if params.from_scratch:
        ann = build_ann(worker.params.network, train).to(worker.device)
    elif start is not None:
        ann, snn = start
    else:
        ann, snn = load_converted(worker.params.network, params, train, worker.root)
        ann, snn = ann.to(worker.device), snn.to(worker.device)
    use_threads(worker, ann, train, params.batch_size)
    if snn is None:  # its thresholds depend on the threads
        snn = build_snn(ann, params, params.seed, train).to(worker.device)
        balance_random(snn, train, params)
    if params.dropout is not None:
        for module in snn.net.modules():
            if isinstance(module, nn.Dropout):
                module.p = params.dropout
    snn.scale_thresholds(scale)
    factor = params.logit_scale
    if factor == "auto":
        factor = fitting_scale(worker, ann, snn, validation)
    snn.scale_output(factor)
    return ann, snn


def fitting_scale(
    worker: Worker, ann: nn.Module, snn: stdb.SpikingNetwork, validation: Samples
) -> float:
    """The output layer's factor for a loss of U_T; for one of U_T/T that in the ANN's units.

    Found at the first T: units are the same at every other one.
    """
    params = worker.params.stdb
    if params.from_scratch:  # random weights are not sure of anything
        return 1.0
    if not params.in_units:
        factor = fitting_logit_scale(worker, snn, validation, params.first_timesteps, BATCH)
    elif snn.has_units:  # which the weights hold
        return 1.0
    else:
        factor = fitting_units(worker, ann, snn, validation, params.first_timesteps, BATCH)
    worker.say(f"logit scale {factor:.3g}")
    return factor


def backward_passes(
    snn: stdb.SpikingNetwork, model: nn.Module, params: StdbAtT, chunk: int, *, mean: bool
) -> BackwardPasses:
    """One backward pass over all T, or one for each window of truncated BPTT (§2.2).

    What a pass gives is U_t after its steps, or with ``mean`` U_t/t.
    """

    def present_mean(presentation: stdb.Presentation, steps: int) -> Tensor:
        summed: Tensor = model(presentation, steps)
        return summed / presentation.t  # t is known after the steps

    present = present_mean if mean else model

    def passes(images: Tensor, ids: Tensor, epoch: int) -> Iterator[Callable[[], Tensor]]:
        presentation = snn.present(images, sample_ids=ids, epoch=epoch, chunk=chunk)
        size = params.truncate or params.timesteps
        for start in range(0, params.timesteps, size):
            steps = min(size, params.timesteps - start)
            yield partial(present, presentation, steps)

    return passes


def fine_tuning_losses(worker: Worker, ann: nn.Module) -> Losses:
    """Cross-entropy, or with ``stdb.distil`` that and the divergence from the ANN as it is."""
    params = worker.params.stdb
    if params.distil is None:
        return cross_entropy
    return distilling(teacher_of(ann), params.distil, params.precision)


def teacher_of(ann: nn.Module) -> nn.Module:
    """A copy of the trained ANN, in evaluation mode and without gradient."""
    teacher = copy.deepcopy(ann).to(memory_format=torch.channels_last)
    return teacher.eval().requires_grad_(False)


def distilling(teacher: nn.Module, params: DistilParams, precision: str) -> Losses:
    """``stdb.distillation_loss`` against what the ANN makes of the same images, once for each."""

    def losses(images: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        lowered = torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16")
        with torch.no_grad(), lowered:
            logits = teacher(images.contiguous(memory_format=torch.channels_last))
        return partial(
            stdb.distillation_loss,
            teacher=logits.to(images.dtype),
            weight=params.weight,
            temperature=params.temperature,
            reduction="sum",
        )

    return losses


def balance_random(snn: stdb.SpikingNetwork, train: Samples, params: StdbParams) -> None:
    """Thresholds for random weights, from a few images, the same in every worker.

    At a percentile: at the maximum, and still at the 98th, layer after layer passes on less, the
    highest are silent, and nothing is learned.
    """
    few = train.take(order(len(train), SCRATCH_IMAGES, params.seed, 0)[0])
    try:
        stdb.balance_thresholds(
            snn,
            few.pixels(),
            params.first_timesteps,
            percentile=SCRATCH_PERCENTILE,
            residual_blocks=True,
            sample_ids=few.ids,
        )
    except ValueError as error:  # of a layer that is dead
        raise StageError(f"stdb.from_scratch: {error}") from error


def free_memory(worker: Worker) -> int:
    """Bytes that are free for a worker: its share of its GPU's, or of the machine's."""
    if worker.device.type == "cuda":  # what torch keeps for later is free, too
        device = worker.device
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] // worker.sharing + kept
    return int(psutil.virtual_memory().available // (worker.world * worker.sharing))


def least(worker: Worker, available: int) -> int:
    """Of what all workers have, so that they compute alike."""
    return -int(worker.all_reduce(torch.tensor(-available, device=worker.device), "max"))


def fitting_chunk(
    worker: Worker,
    snn: stdb.SpikingNetwork,
    shape: tuple[int, int, int],
    params: StdbAtT,
    available: int,
    begun: int | None = None,
) -> int:
    """The chunk of the parameters, or one with which a training step fits; says where none does.

    Sums over time are rounded by chunks: a training that goes on keeps the one that it has
    ``begun`` with, while it fits.
    """
    images = min(params.micro_batch or params.batch_size, -(-params.batch_size // worker.world))
    steps = min(params.truncate or params.timesteps, params.timesteps)
    settings, continued = (snn, shape, steps, images), steps < params.timesteps
    largest = stdb.largest_chunk(*settings, available, continued=continued) or 1
    chunk = params.chunk or min(begun or largest, largest)
    needed = stdb.training_memory(*settings, chunk, continued=continued)
    if params.chunk is None and chunk < (stdb.largest_chunk(*settings, sys.maxsize) or 1):
        snn.chunk = chunk  # the evaluations between epochs find as little room
    text = f"a training step takes about {needed / 1e9:.1f} GB of {available / 1e9:.1f} GB free"
    if needed > available:
        text = f"warning: {text}; a smaller stdb.micro_batch (or truncate) may save it"
    worker.say(text)
    return chunk
