"""One trial of a sweep: STDB from the balanced network with the values that were drawn.

It learns and is judged as finetune_stdb does, on the training and validation splits alone: a sweep
never reads the test split.
"""

import copy
import hashlib
import json
import math
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import stdb
from pipeline.data import Samples, load_split, subset
from pipeline.files import ANN, BALANCED, DATA
from pipeline.jobs.checkpoints import Checkpoints
from pipeline.jobs.choices import with_choices
from pipeline.jobs.plan import Plan
from pipeline.jobs.run import Job, fit_on_ray, use_precision
from pipeline.jobs.worker import Row, Worker
from pipeline.learning.balanced import calibrated_for, keep_fixed
from pipeline.learning.calibration import calibrate, check_method, for_wanted_steps
from pipeline.learning.evaluation import Evaluation, best_scale
from pipeline.learning.finetuning import fine_tune
from pipeline.learning.fit import order
from pipeline.learning.networks import (
    build_ann,
    build_snn,
    configure,
    load_converted,
    load_given,
    use_threads,
)
from pipeline.params import Params
from pipeline.sweeps.space import settings

OF_CALIBRATION = ("encoder", "leak", "precision", "events")  # what it takes of ``stdb``, and T


@dataclass(frozen=True)
class Common:
    """What all trials of a sweep have in common.

    Attributes:
        params: all parameters, ``stdb.epochs`` those of a trial.
        weights: number of levels → weights file of an ANN with as many.
        root: the repository.
        storage: where their states live.
        plan: the workers of each.
        train_images: training images of each; None: as many as ``stdb.images`` says.
        seed: draws them.
        scales: T → threshold scale, where ``stdb.threshold_scale`` is None; what it lacks is found.
        began: when this attempt at the sweep did, in seconds since 1970.
    """

    params: Params
    root: Path
    storage: str
    plan: Plan
    train_images: int | None
    seed: int
    scales: dict[int, float] = field(default_factory=dict)
    weights: dict[int, str] = field(default_factory=dict)
    began: float = 0.0


def run_trial(sample: dict[str, Any], common: Common) -> None:
    """A trial: in this process, or as a Ray Train job of its own where it has several workers.

    Args:
        sample: name → the value that was drawn.
        common: what all trials have in common.
    """
    import ray.tune
    from ray.tune.integration.ray_train import TuneReportCallback

    checkpoints = states_of(common.storage, sample, ray.tune.get_context().get_trial_id())
    adopt(checkpoints, common.began)
    params = settings(sample, common.params, common.weights)
    loop = partial(
        run_trial_training,
        images=common.train_images,
        seed=common.seed,
        known=common.scales.get(params.stdb.last_timesteps),
        made=common.params,
    )
    if common.plan.workers > 1:
        job = Job(params, "trial", checkpoints, common.plan, common.root, report_every=0.0)
        fit_on_ray(loop, job, TuneReportCallback())
        return
    torch.set_num_threads(common.plan.cpus)

    def send(rows: list[Row]) -> None:
        for row in rows:
            ray.tune.report(row)

    device = torch.device("cuda" if common.plan.use_gpu else "cpu")
    worker = with_choices(
        Worker(
            params,
            "trial",
            checkpoints,
            common.root,
            device=device,
            sharing=common.plan.sharing,
            send=send,
        )
    )
    use_precision(worker)
    loop(worker)


def states_of(storage: str, sample: dict[str, Any], trial: str) -> Checkpoints:
    """Where a trial's states are: below what was drawn, and its id."""
    drawn = hashlib.sha256(json.dumps(sample, sort_keys=True).encode()).hexdigest()
    return Checkpoints(storage, "trial", f"{drawn[:16]}-{trial}")


def adopt(checkpoints: Checkpoints, began: float) -> None:
    """Take the states of a trial of the same values that nobody goes on with.

    It is one of before ``began``, of a search whose own record of it was lost.
    """
    own = Path(checkpoints.folder)
    if not own.exists():
        for other in sorted(own.parent.glob(f"{own.name.rpartition('-')[0]}-*")):
            if all(file.stat().st_mtime < began for file in other.iterdir()):
                with suppress(OSError):  # somebody else took it
                    other.rename(own)
                    return


def run_trial_training(
    worker: Worker,
    images: int | None,
    seed: int,
    known: float | None = None,
    made: Params | None = None,
) -> None:
    """Fine-tune at the trial's parameters, and at the threshold scale that is best for its T.

    Args:
        worker: that this process is.
        images: training images, drawn by ``seed``; None: as many as ``stdb.images`` says.
        seed: draws them.
        known: the scale, where the parameters have none and it was found before.
        made: the parameters of what the pipeline made; None: the trial's.
    """
    params = worker.params.stdb
    train, validation = worker.split("train"), worker.split("validation")
    train = subset(train, images or params.images, seed)
    ann, snn = starting_point(worker, train, made)
    shapes = snn.shapes(train.shape)
    neurons = sum(math.prod(shapes[i]) for i in snn.graph.labels)
    learned = sum(map(len, order(len(train), params.batch_size, params.seed, 1)))
    steps = learned * params.last_timesteps * neurons

    validated: list[int] = []

    def extra(epoch: int, evaluation: Evaluation) -> Row:
        validated.append(epoch)
        return {
            "timesteps": params.last_timesteps,
            "neuron_steps": epoch * float(steps),
            "energy_delay": evaluation.energy * params.last_timesteps,
            "spikes": sum(evaluation.spikes.values()),
        }

    scale = 1.0 if params.from_scratch else params.threshold_scale
    if scale is None and known is not None:
        scale = known
    if scale is None:
        scales = worker.params.evaluate_converted
        before = copy.deepcopy(snn)
        scale = best_scale(worker, before, validation, params.last_timesteps, scales)
    _, state = fine_tune(worker, scale, train, validation, extra, (ann, snn))
    if not validated:  # killed after its last epoch, before anybody noted that it was done
        worker.checkpoint(state, state["history"][-1:])


def starting_point(
    worker: Worker, train: Samples, made: Params | None = None
) -> tuple[nn.Module, stdb.SpikingNetwork]:
    """The ANN, and its spiking network as balance_thresholds does it at the trial's parameters.

    What the pipeline made is taken where they are the same, for all that it depends on.

    Args:
        worker: that this process is.
        train: images of the training split.
        made: the parameters of what the pipeline made; None: the trial's.
    """
    params, path = worker.params, worker.path(ANN)
    made = made or params
    if params.network == made.network:
        ann, snn = load_converted(params.network, params.stdb, train, worker.root)
    else:
        path = worker.path(Path(str(params.train_ann.weights)))
        ann = build_ann(params.network, train)
        load_given(ann, params.network, path)
        snn = build_snn(ann, params.stdb, params.stdb.seed, train)
    plan = check_method(params, snn)
    wanted = params.stdb.first_timesteps if for_wanted_steps(plan) else None
    if not _calibrates_alike(worker, made) or wanted != calibrated_for(worker.path(BALANCED)):
        whole = load_split(worker.path(DATA) / "train.safetensors")
        batch = params.balance_thresholds.batch_size * worker.world  # batches are not divided
        use_threads(worker, ann.to(worker.device), whole, batch)
        snn = calibrate(worker, ann, whole).snn
        configure(snn, params.stdb, params.stdb.seed, train)
        keep_fixed(ann, snn, path)
    return ann.to(worker.device), snn.to(worker.device)


def _calibrates_alike(worker: Worker, made: Params) -> bool:
    """Whether a calibration at a trial's parameters is that at others, T apart."""
    chosen = {k: v for k, v in worker.choices.items() if getattr(made.stdb, k) == "auto"}
    made_stdb, params = made.stdb.model_copy(update=chosen), worker.params
    same = (params.network, params.balance_thresholds) == (made.network, made.balance_thresholds)
    return same and all(getattr(params.stdb, k) == getattr(made_stdb, k) for k in OF_CALIBRATION)
