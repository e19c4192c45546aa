"""Stage sweep: Ray Tune over T, α, β and more, from one balanced network.

    python -m pipeline.sweep [FOLDER]     # sweep: its dvc.yaml and params.yaml

Every trial is STDB at the values that were drawn (:mod:`pipeline.sweeps.trial`). Validation
accuracy decides; the test split is never read. A sweep that was killed goes on: finished trials
are kept, running ones go on from their last epoch, and what was spent of the budget stays spent.
Out, in FOLDER: trials.csv, best_params.yaml, pareto.png, epochs.png, parallel.png.
"""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from pipeline.command import parser, print_on_any_terminal
from pipeline.data import Samples, load_split
from pipeline.errors import StageError
from pipeline.files import DATA, write_csv, write_text, writing
from pipeline.handed_on import read_ann_results
from pipeline.learning.calibration import check_method
from pipeline.learning.networks import build_ann, configure, load_converted, load_given
from pipeline.params import Params
from pipeline.stage import Stage, run_stage
from pipeline.sweeps.front import candidates, choose, draw_curves, draw_front, draw_parallel
from pipeline.sweeps.search import room_for_trials, search, work_folder
from pipeline.sweeps.space import SweepParams, load_sweep, samples, settings


def main(stage: Stage, folder: Path) -> None:
    """Check everything, search, write what was found."""
    params = stage.params
    sweep = load_sweep(folder / "params.yaml", params)
    train = load_split(DATA / "train.safetensors")
    check_trials(sweep, params, train)
    for doubt in doubts(sweep, params):
        stage.say(doubt)
    accuracy = read_ann_results().accuracy.validation
    work = work_folder(stage, sweep.weights.values())
    stage.hold(work / "lock", "this sweep")
    with room_for_trials(stage, sweep.resources) as room:
        trials, epochs = search(stage, sweep, params, room, work)
    tried = candidates(trials, list(sweep.space), sweep.cost)
    if not tried:
        spent = f"{sweep.budget} was spent before a trial's first epoch"
        reasons = sorted({row["error"] for row in trials if row["error"]}) or [spent]
        raise StageError(f"no trial ended with an accuracy: {'; '.join(reasons)}")
    floor = accuracy - sweep.floor / 100
    winner = choose(tried, sweep.cost, floor)
    write_csv(folder / "trials.csv", trials)
    chosen = {name: winner.trials[0][name] for name in sweep.space if name != "seed"}
    best = settings(chosen, params, sweep.weights)
    text = yaml.safe_dump(changes(best, params), sort_keys=False)
    write_text(folder / "best_params.yaml", text)
    with writing(folder / "pareto.png") as temporary:
        draw_front(tried, winner, sweep.cost, accuracy, floor, temporary)
    with writing(folder / "epochs.png") as temporary:
        draw_curves(epochs, list(sweep.space), temporary)
    with writing(folder / "parallel.png") as temporary:
        draw_parallel(trials, list(sweep.space), temporary)
    for name in ("trials.csv", "best_params.yaml", "pareto.png", "epochs.png", "parallel.png"):
        stage.tracker.figure(folder / name)
    stage.log({"accuracy/best_validation": winner.accuracy, "timesteps": best.stdb.last_timesteps})
    within = "within" if winner.accuracy >= floor else "none is within"
    stage.say(
        f"{winner.accuracy:.2%} at T = {best.stdb.last_timesteps}, {within} {sweep.floor} points "
        f"of the ANN's {accuracy:.2%} (validation); make apply-best writes it into params.yaml"
    )
    if not stage.runs_again:
        shutil.rmtree(work, ignore_errors=True)


def check_trials(sweep: SweepParams, params: Params, train: Samples) -> None:
    """Refuse what trials could not start from, whatever they draw.

    Raises:
        StageError: the files are another network's, an ANN's levels are others, or a calibration
            cannot be done.
    """
    _, snn = load_converted(params.network, params.stdb, train)
    checked = set()
    try:
        for levels, path in sweep.weights.items():
            network = params.network.model_copy(update={"levels": levels})
            load_given(build_ann(network, train), network, Path(path))
        for sample in samples(sweep.space, params.stdb):
            trial = settings(sample, params, sweep.weights)
            asked = (trial.balance_thresholds.model_dump_json(), trial.stdb.leak)
            if asked not in checked:
                configure(snn, trial.stdb, trial.stdb.seed, train)
                check_method(trial, snn)
                checked.add(asked)
    except StageError as error:
        raise StageError(f"the sweep's parameters cannot be used: {error}") from error


def doubts(sweep: SweepParams, params: Params) -> Iterator[str]:
    """What is allowed, and hardly what a search for few steps is meant to do."""

    def tried(name: str, own: Any) -> list[Any]:
        return sweep.space[name].values if name in sweep.space else [own]

    scales = tried("threshold_scale", 1.0)
    methods = tried("method", params.balance_thresholds.method)
    if max(scale or 1.0 for scale in scales) < 1 and {"mse", "learned"} & {*methods}:
        yield (
            f"threshold_scale is searched up to {max(scales):g}, and thresholds of mse and learned "
            "are right at 1: docs/sweeps.md has a space for few steps"
        )
    surrogates = tried("surrogate", params.stdb.surrogate)
    if "beta_100" in sweep.space and {"rectangle", "linear"} >= {*surrogates}:
        yield "beta_100 is searched, and the surrogate has no β"


def changes(best: Params, before: Params) -> dict[str, Any]:
    """Section → key → value, of what differs."""
    sections, old = best.model_dump(), before.model_dump()
    found = {
        name: {key: value for key, value in section.items() if value != old[name][key]}
        for name, section in sections.items()
    }
    return {name: section for name, section in found.items() if section}


if __name__ == "__main__":
    print_on_any_terminal()
    line = parser(__doc__, "sweep")
    line.add_argument("folder", nargs="?", default="sweep", type=Path, help="by default sweep")
    where = line.parse_args().folder
    run_stage(where.resolve().name, partial(main, folder=where), where / "dvc.yaml")
