"""The search of a sweep: Ray, room for its trials, the trials, the tables of what they found."""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.environment import TUNE, set_default_environment
from pipeline.errors import StageError
from pipeline.files import digest
from pipeline.jobs.address import cluster_address
from pipeline.jobs.cluster import ray_cluster
from pipeline.jobs.failures import reason
from pipeline.jobs.plan import Plan, machine
from pipeline.jobs.ray_private import HEAD, trials_of
from pipeline.learning.networks import surrogate_of
from pipeline.params import Params
from pipeline.stage import Stage
from pipeline.sweeps.space import ResourceParams, SweepParams, settings
from pipeline.sweeps.trial import Common, run_trial, states_of

Tables = tuple[list[dict[str, Any]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Room:
    """What trials have in the Ray that is there.

    Attributes:
        parallel: how many run at once.
        use_gpu: whether on GPUs.
        sharing: how many at once find the same memory free: on one GPU, or in the machine.
        needed: what Tune reserves for each.
    """

    parallel: int
    use_gpu: bool
    sharing: int
    needed: Any


@contextmanager
def room_for_trials(stage: Stage, resources: ResourceParams) -> Iterator[Room]:
    """Ray, joined or started, for the searches within the block.

    Raises:
        StageError: a trial needs more than there is.
    """
    set_default_environment(TUNE)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # errors are in the table of trials
    address = cluster_address()
    if address is None:
        plan_trials(resources, *machine())  # refuses before Ray starts
    several = resources.workers > 1
    with ray_cluster(address, stage.say, dashboard=several, logs=False) as there:
        yield plan_trials(resources, *there)


def search(
    stage: Stage,
    sweep: SweepParams,
    base: Params,
    room: Room,
    work: Path,
    scales: dict[int, float] | None = None,
) -> Tables:
    """Run the trials; the table of them, and of their epochs.

    Args:
        stage: the sweep's.
        sweep: what is searched, and how.
        base: the parameters that are not searched.
        room: of :func:`room_for_trials`.
        work: where it is kept until it is done.
        scales: T → threshold scale, where ``base`` has none; what it lacks a trial finds itself.
    """
    from ray import tune

    from pipeline.sweeps.tuner import Watch, make_tuner

    total = sweep.combinations if sweep.method == "grid" else sweep.trials
    resources = sweep.resources
    cpus = max(1, math.floor(resources.cpus))
    of_trials = base.stdb.model_copy(update={"epochs": sweep.epochs})
    common = Common(
        base.model_copy(update={"stdb": of_trials}),
        Path.cwd(),
        str(work / "states"),
        Plan(resources.workers, resources.workers, room.use_gpu, cpus, room.sharing),
        sweep.train_images,
        sweep.seed,
        scales or {},
        sweep.weights,
        time.time(),
    )
    stage.say(f"up to {total} trials, {room.parallel} at once")
    trainable = tune.with_resources(partial(run_trial, common=common), room.needed)
    results = make_tuner(trainable, sweep, work, room.parallel, Watch(stage, total)).fit()
    return tables(results, sweep, base, work)


def plan_trials(resources: ResourceParams, cpus: int, gpus: int) -> Room:
    """What trials have of so many CPUs and GPUs.

    A trial of several workers reserves next to nothing for itself: its workers need the rest.

    Raises:
        StageError: a trial needs more than there is.
    """
    from ray import tune

    each = (1.0 if gpus else 0.0) if resources.gpus == "auto" else resources.gpus
    workers, room = resources.workers, math.inf
    for name, there, asked in (("CPUs", cpus, resources.cpus), ("GPUs", gpus, each)):
        if workers * asked > there:
            raise StageError(
                f"a trial needs {workers * asked:g} {name} (resources of the sweep); there are "
                f"{there}"
            )
        room = min(room, there // (workers * asked)) if asked else room
    parallel = int(room) if resources.parallel == "auto" else min(int(room), resources.parallel)
    sharing = min(parallel, max(1, int(1 / each))) if each else parallel
    if workers > 1:
        return Room(parallel, each > 0, sharing, tune.PlacementGroupFactory([{HEAD: 0.001}]))
    return Room(parallel, each > 0, sharing, {"CPU": resources.cpus, "GPU": each})


def tables(results: Any, sweep: SweepParams, base: Params, work: Path) -> Tables:
    """A row a trial and a row an epoch, from the states that trials keep."""
    trials, epochs = [], []
    for trial, result in zip(trials_of(results), results, strict=True):
        sample = {name: trial.config[name] for name in sweep.space}
        state = states_of(str(work / "states"), sample, trial.trial_id).load() or {}
        history = state.get("history", [])
        params = settings(sample, base, sweep.weights).stdb
        surrogate = surrogate_of(params)
        best: dict[str, Any] = max(history, key=lambda row: row["accuracy/validation"], default={})
        early = "stopped" if len(history) < sweep.epochs else "finished"
        trials.append(
            {
                "trial": trial.trial_id,
                "status": "failed" if result.error else early,
                **sample,
                "timesteps": params.timesteps,
                "alpha": surrogate.alpha,
                "beta": surrogate.beta,
                "epochs": len(history),
                "accuracy": best.get("accuracy/validation"),
                "best_epoch": best.get("epoch"),
                "spikes": best.get("spikes"),
                "energy_pj": best.get("energy/validation_pj"),
                "energy_delay": best.get("energy_delay"),
                "neuron_steps": history[-1]["neuron_steps"] if history else 0.0,
                "error": reason(result.error) if result.error else "",
            }
        )
        epochs += [
            {**sample, "epoch": row["epoch"], "accuracy": row["accuracy/validation"]}
            for row in history
        ]
    return trials, epochs


def work_folder(stage: Stage, files: Iterable[str] = ()) -> Path:
    """Where an unfinished sweep is kept.

    Args:
        stage: the sweep's.
        files: that trials read and no stage tracks; of others' contents it is another sweep.
    """
    storage = stage.params.cluster.storage
    if "://" in storage:
        raise StageError(f"cluster.storage is {storage}; allowed for a sweep: a folder")
    name = f"{stage.name}-{stage.key}"
    for file in files:
        name = f"{name}-{digest(Path(file))[:8]}"
    return Path(storage).resolve() / name
