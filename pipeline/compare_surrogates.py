"""Stage surrogates: where STDB stops helping, by surrogate × T × seed on the network that is there.

    python -m pipeline.compare_surrogates [FOLDER]     # sweep/surrogates

What is compared stands in FOLDER/params.yaml, by ``stdb.encoder``: a network for few steps, or one
of the paper's kind. First the converted network at every T, at the threshold scale that is best on
validation; then for each surrogate β, where it has one, at one T with one seed; then its cells, all
from the same network. Validation accuracy counts; the test split is never read. A comparison that
was killed goes on, trial by trial.
Out, in FOLDER/results: ENCODER.csv, a row a cell, and surrogates.png, of all kinds that are there.
"""

import copy
import shutil
from functools import partial
from pathlib import Path

from pipeline.command import parser, print_on_any_terminal
from pipeline.data import load_split
from pipeline.errors import StageError
from pipeline.files import DATA, read_csv, read_json, write_csv, write_json, writing
from pipeline.handed_on import read_ann_results
from pipeline.jobs.run import run_job
from pipeline.jobs.worker import Worker
from pipeline.learning.evaluation import best_scale, evaluate_snn
from pipeline.learning.networks import load_converted
from pipeline.params import Params
from pipeline.stage import Stage, run_stage
from pipeline.sweeps.search import Room, room_for_trials, search, work_folder
from pipeline.sweeps.space import SweepParams
from pipeline.sweeps.surrogates import (
    KindParams,
    Row,
    base_of,
    cell_search,
    cells,
    draw_gains,
    gains,
    load_comparison,
    sentence,
    width,
    width_search,
)
from pipeline.sweeps.trial import starting_point


def main(stage: Stage, folder: Path) -> None:
    """Check everything, compare, write the table and the picture."""
    params = stage.params
    comparison, kind = load_comparison(folder / "params.yaml", params)
    train = load_split(DATA / "train.safetensors")
    load_converted(params.network, params.stdb, train)  # refuses files of another network
    ann = read_ann_results().accuracy.validation
    times = sorted({*kind.timesteps, kind.beta_at})
    work = work_folder(stage)
    converted = run_job(stage, partial(converted_loop, timesteps=times))["converted"]
    scales = {t: found["scale"] for t, found in converted.items()}
    rows: list[Row] = []
    with room_for_trials(stage, comparison.resources) as room:
        trials = partial(searched, stage, room=room, work=work, scales=scales)
        for name in kind.surrogates:
            base = base_of(name, kind, params)
            widths = width_search(comparison, kind, name)
            beta = best_width(kind, name, trials(widths, base, f"{name}-beta") if widths else [])
            if beta is not None:
                stage.say(f"{name}: {width(kind, name)[0]} {beta:g}")
            found = trials(cell_search(comparison, kind, name, beta), base, name)
            rows += cells(found, converted, ann)
    results = folder / "results"
    write_csv(results / f"{params.stdb.encoder}.csv", rows)
    tables = {path.stem: read_csv(path) for path in sorted(results.glob("*.csv"))}
    with writing(results / "surrogates.png") as temporary:
        draw_gains(tables, temporary)
    for name in (f"{params.stdb.encoder}.csv", "surrogates.png"):
        stage.tracker.figure(results / name)
    for name, by_time in gains(rows).items():
        for t, (gained, _) in by_time.items():
            stage.log({f"gain/{name}": gained}, t)
        points = ", ".join(f"{g:+.1f} ± {s:.1f} at T = {t}" for t, (g, s) in by_time.items())
        stage.say(f"{name:12} {points} (points, validation)")
    stage.say(sentence(rows))
    if not stage.runs_again:
        shutil.rmtree(work, ignore_errors=True)


def converted_loop(worker: Worker, timesteps: list[int]) -> None:
    """The converted network at each T: its best threshold scale, its accuracy on validation."""
    params, scales = worker.params.stdb, worker.params.evaluate_converted
    found = (worker.resume() or {"converted": {}})["converted"]
    validation = worker.split("validation")
    for t in timesteps:
        if t in found:
            continue
        at_t = copy.copy(worker)  # a calibration for few steps is one for its T
        at_t.params = worker.params.model_copy(
            update={"stdb": params.model_copy(update={"timesteps": t})}
        )
        _, snn = starting_point(at_t, validation, worker.params)
        scale = params.threshold_scale
        if scale is None:
            scale = best_scale(worker, snn, validation, t, scales)
        snn.scale_thresholds(scale)
        evaluation = evaluate_snn(worker, snn, validation, t, scales.batch_size)
        found[t] = {"scale": scale, "accuracy": evaluation.accuracy[-1]}
        worker.say(f"converted, T = {t}: {evaluation.accuracy[-1]:.1%} at scale {scale}")
        worker.checkpoint({"converted": found})


def searched(
    stage: Stage,
    sweep: SweepParams,
    base: Params,
    name: str,
    *,
    room: Room,
    work: Path,
    scales: dict[int, float],
) -> list[Row]:
    """The trials of one search, which is kept when it is done.

    Raises:
        StageError: none of them came to an accuracy; says why.
    """
    done = work / name / "trials.json"
    if done.exists():
        stage.say(f"{name}: was done before")
        return list(read_json(done))
    trials, _ = search(stage, sweep, base, room, work / name, scales)
    if all(row["accuracy"] is None for row in trials):
        reasons = sorted({row["error"] for row in trials})
        raise StageError(f"{name}: no trial ended with an accuracy: {'; '.join(reasons)}")
    write_json(done, trials)
    return trials


def best_width(kind: KindParams, name: str, trials: list[Row]) -> float | None:
    """β of the most accurate trial; the only one that is given; None: the surrogate's own."""
    key, values = width(kind, name)
    learned = [row for row in trials if row["accuracy"] is not None]
    if learned:
        return float(max(learned, key=lambda row: row["accuracy"])[key])
    return values[0] if values else None


if __name__ == "__main__":
    print_on_any_terminal()
    line = parser(__doc__, "compare_surrogates")
    line.add_argument("folder", nargs="?", default="sweep/surrogates", type=Path)
    where = line.parse_args().folder
    run_stage(where.resolve().name, partial(main, folder=where), where / "dvc.yaml")
