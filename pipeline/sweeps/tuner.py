"""What a sweep adds to Ray Tune: its search space, halving by T, a budget, and MLflow's runs."""

import json
import math
import pickletools
import shutil
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from pipeline.files import write_text
from pipeline.jobs.ray_private import replace_callbacks
from pipeline.stage import Stage
from pipeline.sweeps.space import BudgetParams, SweepParams, short

ACCURACY = "accuracy/best"
SPENT = "spent.json"
LOGGED = ("epoch", "neuron_steps", "energy_delay", "spikes")  # besides metrics of a group


def space(sweep: SweepParams) -> dict[str, Any]:
    """Tune's form of the search space."""
    make: dict[str, Callable[[list[Any]], Any]] = {
        "choice": tune.choice,
        "grid": tune.grid_search,
        "uniform": lambda ends: tune.uniform(*ends),
        "log_uniform": lambda ends: tune.loguniform(*ends),
        "integer": lambda ends: tune.randint(ends[0], ends[1] + 1),
    }
    return {name: make[values.kind](values.values) for name, values in sweep.space.items()}


def search_algorithm(sweep: SweepParams) -> Any:
    """Optuna's TPE, of one or two objectives; values at random, or those of a grid in turn."""
    if sweep.method != "optuna":
        return BasicVariantGenerator(random_state=sweep.seed)
    import optuna
    from optuna.samplers import TPESampler
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    names, modes = [ACCURACY], ["max"]
    if sweep.cost is not None:
        names, modes = [*names, sweep.cost], [*modes, "min"]
    single = len(names) == 1
    return OptunaSearch(
        metric=names[0] if single else names,
        mode=modes[0] if single else modes,
        sampler=TPESampler(seed=sweep.seed, n_startup_trials=8),
    )


class Halving(FIFOScheduler):
    """ASHA on validation accuracy by epoch, one for every octave of T where T is a cost.

    A trial at T = 4 is not as accurate as one at T = 40 and yet may be the best of its kind.
    """

    def __init__(self, sweep: SweepParams, default: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        assert sweep.asha is not None
        self.by_timesteps, self.default = sweep.cost is not None, default
        self.settings: dict[str, Any] = {
            "metric": ACCURACY,
            "mode": "max",
            "time_attr": "epoch",
            "max_t": sweep.epochs,
            "grace_period": sweep.asha.grace,
            "reduction_factor": sweep.asha.reduction,
        }
        self.halvings: dict[int, ASHAScheduler] = {}

    def _of(self, trial: Any) -> ASHAScheduler:
        timesteps = trial.config.get("timesteps", self.default)
        octave = round(math.log2(timesteps)) if self.by_timesteps else 0
        return self.halvings.setdefault(octave, ASHAScheduler(**self.settings))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Into the bracket of its T."""
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether it goes on."""
        return self._of(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Its last result counts, too."""
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Out of its bracket."""
        self._of(trial).on_trial_remove(tune_controller, trial)


class Budget(tune.Stopper):
    """Ends a sweep that has spent its neuron-steps or seconds, and keeps in a file what was spent.

    Neuron-steps are known by trial, so that one that goes on after a kill isn't counted twice.
    """

    def __init__(self, limits: BudgetParams, path: Path) -> None:
        self.limits, self.path = limits, path
        self.start = time.monotonic()
        self.trials: dict[str, float] = {}
        self.before = 0.0  # seconds of earlier attempts
        if path.exists():
            spent = json.loads(path.read_text(encoding="utf-8"))
            self.trials, self.before = spent["neuron_steps"], spent["seconds"]

    @property
    def seconds(self) -> float:
        """Seconds of all attempts."""
        return self.before + time.monotonic() - self.start

    @property
    def neuron_steps(self) -> float:
        """Neuron-steps of all trials."""
        return sum(self.trials.values())

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """A trial's report; never stops it alone."""
        self.trials[trial_id] = result.get("neuron_steps", 0.0)
        spent = {"neuron_steps": self.trials, "seconds": self.seconds}
        write_text(self.path, json.dumps(spent))
        return False

    def stop_all(self) -> bool:
        """Whether nothing is left."""
        steps, seconds = self.limits.neuron_steps, self.limits.seconds
        return (steps is not None and self.neuron_steps >= steps) or (
            seconds is not None and self.seconds >= seconds
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Budget, (self.limits, self.path)  # Tune keeps it; what was spent is in the file


class Watch(tune.Callback):
    """A line and an MLflow run for every trial.

    Args:
        stage: the sweep's.
        total: trials that there will be.
    """

    def __init__(self, stage: Stage, total: int) -> None:
        self.say, self.tracker, self.total = stage.say, stage.tracker, total
        self.timesteps = stage.params.stdb.last_timesteps  # where they are not searched
        self.done = 0

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Open its run."""
        self.tracker.child(trial.trial_id, trial.config)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Log an epoch."""
        row = {k: v for k, v in result.items() if k in LOGGED or ("/" in k and is_number(v))}
        self.tracker.child_rows(trial.trial_id, [row])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Close its run."""
        self._ended(trial, "FINISHED")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Close its run; the others go on."""
        self._ended(trial, "FAILED")

    def _ended(self, trial: Any, status: str) -> None:
        self.done += 1
        self.tracker.child_end(trial.trial_id, status)
        values = ", ".join(f"{name} {short(value)}" for name, value in trial.config.items())
        last = trial.last_result or {}
        outcome = (
            "failed"
            if status == "FAILED" or ACCURACY not in last
            else (f"{last[ACCURACY]:.1%} after {last['epoch']} epoch(s)")
        )
        self.say(f"trial {self.done} of up to {self.total}: {values}: {outcome}")

    def __reduce__(self) -> tuple[Any, ...]:
        return tune.Callback, ()  # Tune keeps callbacks in a file; this one is of this process


def can_go_on(folder: Path) -> bool:
    """Whether Tune can go on from what it keeps in a folder; else nothing is left there.

    It writes in place, so that a kill may leave a file that ends early. All that was written when
    that file was (a session's files end alike) is removed: the session before it is gone on from.
    Trials that are then unknown are taken by :func:`pipeline.sweeps.trial.adopt`.
    """
    if whole(folder / "tuner.pkl"):
        for file in folder.glob("[!.]*-*.*"):
            if file.is_file() and not file.name.startswith("tmp-") and not whole(file):
                for other in folder.glob(f"*-{session_of(file)}.*"):
                    other.unlink()
        if list(folder.glob("experiment_state-*.json")):
            return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def session_of(file: Path) -> str:
    """When the attempt began that wrote a file of Tune's: ``…-2026-11-27_17-34-08.json``."""
    return "-".join(file.stem.split("-")[-5:])


def whole(file: Path) -> bool:
    """Whether a JSON or pickle file is there, from its beginning to its end; nothing of it runs.

    What it is shows in its first byte: Tune has pickles that are called ``.json``.
    """
    try:
        content = file.read_bytes()
        if content.startswith(b"{"):
            json.loads(content)
        else:
            deque(pickletools.genops(content), maxlen=0)
    except (FileNotFoundError, ValueError):
        return False
    return True


def make_tuner(
    trainable: Callable[..., Any], sweep: SweepParams, folder: Path, parallel: int, watch: Watch
) -> tune.Tuner:
    """A new sweep in ``folder``, or the one that was interrupted there."""
    path = folder / "trials"
    begun = path.exists()
    if can_go_on(path):
        watch.say("goes on: finished trials are kept")
        tuner = tune.Tuner.restore(str(path), trainable, param_space=space(sweep))
        replace_callbacks(tuner, [watch])
        return tuner
    if begun:
        watch.say("the kill cut off what Tune keeps: the search begins again, with its trials")
        (folder / SPENT).unlink(missing_ok=True)
    return tune.Tuner(
        trainable,
        param_space=space(sweep),
        tune_config=tune.TuneConfig(
            search_alg=search_algorithm(sweep),
            scheduler=Halving(sweep, watch.timesteps) if sweep.asha is not None else None,
            num_samples=1 if sweep.method == "grid" else sweep.trials,
            max_concurrent_trials=parallel,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=path.name,
            storage_path=str(folder),
            stop=Budget(sweep.budget, folder / SPENT),
            callbacks=[watch],
            verbose=0,
        ),
    )


def is_number(value: Any) -> bool:
    """A metric."""
    return isinstance(value, int | float) and not isinstance(value, bool)
