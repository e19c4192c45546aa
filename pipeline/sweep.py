"""Stage sweep: Ray Tune over T, α, β and more, from one balanced network.

    python -m pipeline.sweep [FOLDER]     # sweep: its dvc.yaml and params.yaml

Every trial is STDB at the values that were drawn (:mod:`pipeline.sweeps.trial`). Validation
accuracy decides; the test split is never read. A sweep that was killed goes on: finished trials
are kept, running ones go on from their last epoch, and what was spent of the budget stays spent.
Out, in FOLDER: trials.csv, best_params.yaml, pareto.png, epochs.png, parallel.png.
"""

import logging
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from pipeline.command import parser, print_on_any_terminal
from pipeline.data import load_split
from pipeline.environment import TUNE, set_default_environment
from pipeline.errors import StageError
from pipeline.files import DATA, write_csv, write_text, writing
from pipeline.handed_on import read_ann_results
from pipeline.jobs.address import cluster_address
from pipeline.jobs.checkpoints import Checkpoints
from pipeline.jobs.cluster import ray_cluster
from pipeline.jobs.failures import reason
from pipeline.jobs.plan import Plan, machine
from pipeline.jobs.ray_private import HEAD, trials_of
from pipeline.learning.networks import load_converted
from pipeline.params import StdbParams
from pipeline.stage import Stage, run_stage
from pipeline.sweeps.front import candidates, choose, draw_curves, draw_front, draw_parallel
from pipeline.sweeps.space import ResourceParams, SweepParams, load_sweep, settings
from pipeline.sweeps.trial import Common, run_trial


def main(stage: Stage, folder: Path) -> None:
    """Check everything, search, write what was found."""
    params = stage.params
    sweep = load_sweep(folder / "params.yaml", params.stdb)
    train = load_split(DATA / "train.safetensors")
    load_converted(params.network, params.stdb, train)  # refuses files of another network
    accuracy = read_ann_results().accuracy.validation
    trials, epochs = search(stage, sweep)
    tried = candidates(trials, list(sweep.space), sweep.cost)
    if not tried:
        spent = f"{sweep.budget} was spent before a trial's first epoch"
        reasons = sorted({row["error"] for row in trials if row["error"]}) or [spent]
        raise StageError(f"no trial ended with an accuracy: {'; '.join(reasons)}")
    floor = accuracy - sweep.floor / 100
    winner = choose(tried, sweep.cost, floor)
    write_csv(folder / "trials.csv", trials)
    chosen = {name: winner.trials[0][name] for name in sweep.space if name != "seed"}
    best, before = settings(chosen, params.stdb).model_dump(), params.stdb.model_dump()
    changed = {n: v for n, v in best.items() if v != before[n]}
    text = yaml.safe_dump({"stdb": changed}, sort_keys=False)
    write_text(folder / "best_params.yaml", text)
    with writing(folder / "pareto.png") as temporary:
        draw_front(tried, winner, sweep.cost, accuracy, floor, temporary)
    with writing(folder / "epochs.png") as temporary:
        draw_curves(epochs, list(sweep.space), temporary)
    with writing(folder / "parallel.png") as temporary:
        draw_parallel(trials, list(sweep.space), temporary)
    for name in ("trials.csv", "best_params.yaml", "pareto.png", "epochs.png", "parallel.png"):
        stage.tracker.figure(folder / name)
    stage.log({"accuracy/best_validation": winner.accuracy, "timesteps": best["timesteps"]})
    within = "within" if winner.accuracy >= floor else "none is within"
    stage.say(
        f"{winner.accuracy:.2%} at T = {best['timesteps']}, {within} {sweep.floor} points of the "
        f"ANN's {accuracy:.2%} (validation); make apply-best writes it into params.yaml"
    )
    if not stage.runs_again:
        shutil.rmtree(_work(stage), ignore_errors=True)


def search(stage: Stage, sweep: SweepParams) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run the trials; the table of them, and of their epochs."""
    set_default_environment(TUNE)
    from ray import tune

    from pipeline.sweeps.tuner import Watch, make_tuner

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # errors are in the table of trials

    params, work = stage.params, _work(stage)
    stage.hold(work / "lock", "this sweep")
    total = sweep.combinations if sweep.method == "grid" else sweep.trials
    if sweep.method == "grid" and total > sweep.trials:
        raise StageError(
            f"the grid has {total} combinations; allowed: up to trials, {sweep.trials}"
        )
    address = cluster_address()
    several = sweep.resources.workers > 1
    if address is None:
        plan_trials(sweep.resources, *machine())  # refuses before Ray starts
    with ray_cluster(address, stage.say, dashboard=several, logs=False) as there:
        parallel, use_gpu, needed = plan_trials(sweep.resources, *there)
        resources = sweep.resources
        cpus = max(1, math.floor(resources.cpus))
        common = Common(
            params.model_copy(
                update={"stdb": params.stdb.model_copy(update={"epochs": sweep.epochs})}
            ),
            Path.cwd(),
            str(work / "states"),
            Plan(resources.workers, resources.workers, use_gpu, cpus),
            sweep.train_images,
            sweep.seed,
        )
        stage.say(f"up to {total} trials, {parallel} at once")
        trainable = tune.with_resources(partial(run_trial, common=common), needed)
        watch = Watch(stage, total)
        results = make_tuner(trainable, sweep, work, parallel, watch).fit()
        return tables(results, sweep, params.stdb, work)


def plan_trials(resources: ResourceParams, cpus: int, gpus: int) -> tuple[int, bool, Any]:
    """How many trials run at once, whether on GPUs, and what Tune reserves for each.

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
    if workers > 1:
        return parallel, each > 0, tune.PlacementGroupFactory([{HEAD: 0.001}])
    return parallel, each > 0, {"CPU": resources.cpus, "GPU": each}


def tables(
    results: Any, sweep: SweepParams, base: StdbParams, work: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row a trial and a row an epoch, from the states that trials keep."""
    trials, epochs = [], []
    for trial, result in zip(trials_of(results), results, strict=True):
        state = Checkpoints(str(work / "states"), "trial", trial.trial_id).load() or {}
        history = state.get("history", [])
        sample = {name: trial.config[name] for name in sweep.space}
        params = settings(sample, base)
        best: dict[str, Any] = max(history, key=lambda row: row["accuracy/validation"], default={})
        early = "stopped" if len(history) < sweep.epochs else "finished"
        trials.append(
            {
                "trial": trial.trial_id,
                "status": "failed" if result.error else early,
                **sample,
                **{n: getattr(params, n) for n in ("timesteps", "alpha", "beta")},
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


def _work(stage: Stage) -> Path:
    """Where an unfinished sweep is kept."""
    storage = stage.params.cluster.storage
    if "://" in storage:
        raise StageError(f"cluster.storage is {storage}; allowed for a sweep: a folder")
    return Path(storage).resolve() / f"{stage.name}-{stage.key}"


if __name__ == "__main__":
    print_on_any_terminal()
    line = parser(__doc__, "sweep")
    line.add_argument("folder", nargs="?", default="sweep", type=Path, help="by default sweep")
    where = line.parse_args().folder
    run_stage(where.resolve().name, partial(main, folder=where), where / "dvc.yaml")
