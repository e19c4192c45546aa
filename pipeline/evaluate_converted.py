"""Stage evaluate_converted: the converted network before any fine-tuning (Table 1, columns 3, 4).

    python -m pipeline.evaluate_converted

At the long T with balanced thresholds, and at the reduced T of ``stdb.timesteps``, the first of
several, with the threshold scale that is best on the validation split. The output layer only
accumulates, so one presentation gives the accuracy at every t. Beside
them the ANN with activations of T levels, which is what T steps can say of it.
Out: models/conversion.json (the scale), metrics/evaluate_converted.json, plots/converted_*.csv;
among them a diagnosis of every layer, which the stage ends with where accuracy is at chance level.
"""

from typing import Any

import stdb
from pipeline.data import load_split
from pipeline.files import CONVERSION, DATA, METRICS, PLOTS, write_csv, write_json
from pipeline.handed_on import read_ann_results
from pipeline.jobs.run import forget_job, run_job
from pipeline.jobs.worker import Worker
from pipeline.learning.evaluation import (
    Evaluation,
    best_scale,
    collapse,
    diagnose,
    evaluate_quantised,
    evaluate_snn,
    levels_of,
    longest,
    spike_metrics,
)
from pipeline.learning.networks import load_converted, use_threads
from pipeline.stage import Stage, stage_command


def main(stage: Stage) -> None:
    """Check the inputs, run the job, write scale, metrics and curves."""
    params = stage.params
    train = load_split(DATA / "train.safetensors")
    ann, _ = load_converted(params.network, params.stdb, train)
    ann_accuracy = read_ann_results().accuracy.test
    state = run_job(stage, evaluate_loop)
    long, reduced = Evaluation(**state["long"]), Evaluation(**state["reduced"])
    scale, quantised = state["scale"], state["quantised"]
    write_json(CONVERSION, {"timesteps": params.stdb.first_timesteps, "scale": scale})
    metrics = {
        "ann": {"accuracy": ann_accuracy, "energy_pj": stdb.ann_energy(ann, train.shape)},
        "long": _summary(long),
        "reduced": _summary(reduced) | {"threshold_scale": scale},
        "loss_to_ann": {
            "long": ann_accuracy - long.accuracy[-1],
            "reduced": ann_accuracy - reduced.accuracy[-1],
        },
        "quantised": {
            "long": quantised[1.0][len(long.accuracy)],
            "reduced": quantised[scale][len(reduced.accuracy)],
        },
    }
    write_json(METRICS / "evaluate_converted.json", metrics)
    curves = {s: dict(enumerate(curve, start=1)) for s, curve in state["curves"].items()}
    write_csv(PLOTS / "converted_accuracy.csv", _points(curves))
    write_csv(PLOTS / "converted_quantised.csv", _points(quantised))
    write_csv(
        PLOTS / "converted_spikes.csv",
        [{"layer": name, "spikes": value} for name, value in reduced.spikes.items()],
    )
    write_csv(PLOTS / "converted_diagnosis.csv", state["diagnosis"])
    log_curves(stage, scale, curves, quantised)
    stage.log(
        {
            "accuracy/converted": long.accuracy[-1],
            "accuracy/scaled": reduced.accuracy[-1],
            "accuracy/quantised": metrics["quantised"]["reduced"],
            "threshold_scale": scale,
            "energy/scaled_pj": reduced.energy,
            **spike_metrics(reduced.spikes),
            **{f"correlation/{row['layer']}": row["correlation"] for row in state["diagnosis"]},
        }
    )
    stage.say(
        f"test: {long.accuracy[-1]:.2%} at T = {len(long.accuracy)}, "
        f"{reduced.accuracy[-1]:.2%} at T = {len(reduced.accuracy)} (scale {scale}); "
        f"ANN {ann_accuracy:.2%}, with {len(reduced.accuracy)} levels "
        f"{metrics['quantised']['reduced']:.2%}"
    )
    images = sum(map(sum, reduced.confusion))
    if ill := collapse(reduced.accuracy[-1], len(train.classes), images, state["diagnosis"]):
        stage.say(ill)
    forget_job(stage)


def log_curves(
    stage: Stage,
    scale: float,
    curves: dict[float, dict[int, float]],
    quantised: dict[float, dict[int, float]],
) -> None:
    """Accuracy by step for MLflow, where of many steps powers of two suffice.

    At the balanced thresholds, at the best scale, and of the ANN with so many levels at that.
    """
    for name, curve in (
        ("accuracy/at_timestep", curves[1.0]),
        ("accuracy/scaled_at_timestep", curves[scale]),
        ("accuracy/quantised_at_timestep", quantised[scale]),
    ):
        for step in levels_of(stage.params.stdb.falling, max(curve)):
            if step in curve:
                stage.log({name: curve[step]}, step)


def _points(curves: dict[float, dict[int, float]]) -> list[dict[str, float]]:
    """The rows of a file of accuracies by threshold scale and step."""
    return [
        {"timesteps": t, "threshold_scale": scale, "accuracy": accuracy}
        for scale, curve in curves.items()
        for t, accuracy in curve.items()
    ]


def _summary(result: Evaluation) -> dict[str, Any]:
    return {
        "timesteps": len(result.accuracy),
        "accuracy": result.accuracy[-1],
        **result.spiking(),
    }


def evaluate_loop(worker: Worker) -> None:
    """What each worker does: its share of every split."""
    params, timesteps = worker.params.evaluate_converted, worker.params.stdb.first_timesteps
    validation, test = worker.split("validation"), worker.split("test")
    ann, snn = load_converted(worker.params.network, worker.params.stdb, test, worker.root)
    use_threads(worker, ann.to(worker.device), test, params.batch_size)
    snn = snn.to(worker.device)
    best = best_scale(worker, snn, validation, timesteps, params)
    snn.scale_thresholds(best)
    reduced = evaluate_snn(worker, snn, test, timesteps, params.batch_size)
    diagnosis = diagnose(ann, snn, validation, timesteps)
    shown = min(params.timesteps, longest(timesteps))
    at_best = evaluate_snn(worker, snn, test, shown, params.batch_size)
    snn.scale_thresholds(1.0)
    long = evaluate_snn(worker, snn, test, params.timesteps, params.batch_size)
    levels = {1.0: set(levels_of([1], params.timesteps))}
    levels[best] = levels.get(best, set()) | set(
        levels_of(worker.params.stdb.falling, max(shown, timesteps))
    )
    quantised = {}
    for scale, counts in levels.items():
        snn.scale_thresholds(scale)
        quantised[scale] = evaluate_quantised(worker, snn, test, sorted(counts), params.batch_size)
    worker.checkpoint(
        {
            "scale": best,
            "long": vars(long),
            "reduced": vars(reduced),
            # where both are one, the longer
            "curves": {best: at_best.accuracy, 1.0: long.accuracy},
            "quantised": quantised,
            "diagnosis": diagnosis,
        }
    )


if __name__ == "__main__":
    stage_command("evaluate_converted", main, __doc__)
