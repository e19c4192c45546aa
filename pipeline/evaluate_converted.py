"""Stage evaluate_converted: the converted network before any fine-tuning (Table 1, columns 3, 4).

    python -m pipeline.evaluate_converted

At the long T with balanced thresholds, and at the reduced T of ``stdb.timesteps`` with the
threshold scale that is best on the validation split. The output layer only accumulates, so one
presentation gives the accuracy at every t.
Out: models/conversion.json (the scale), metrics/evaluate_converted.json, plots/converted_*.csv;
among them a diagnosis of every layer, which the stage ends with where accuracy is at chance level.
"""

from pathlib import Path
from typing import Any

import stdb
from pipeline.balance_thresholds import converted
from pipeline.data import Samples, load_split, load_splits
from pipeline.distributed import forget_job, report, run_job, setup
from pipeline.evaluation import (
    Evaluation,
    collapse,
    diagnose,
    evaluate_snn,
    longest,
    spike_metrics,
)
from pipeline.params import EvaluateConvertedParams, NetworkParams, StdbParams
from pipeline.stage import (
    ANN,
    CONVERSION,
    DATA,
    THRESHOLDS,
    Stage,
    read_json,
    run_stage,
    write_csv,
    write_json,
)


def main(stage: Stage) -> None:
    """Check the inputs, run the job, write scale, metrics and curves."""
    params = stage.params
    train = load_split(DATA / "train.safetensors")
    ann, _ = converted(params.network, params.stdb, train)
    ann_accuracy = read_json(Path("metrics/train_ann.json"))["accuracy"]["test"]
    state = run_job(
        stage,
        evaluate_loop,
        {
            "data": str(DATA.resolve()),
            "weights": str(ANN.resolve()),
            "thresholds": str(THRESHOLDS.resolve()),
            "network": params.network.model_dump(),
            "evaluate_converted": params.evaluate_converted.model_dump(),
            "stdb": params.stdb.model_dump(),
        },
    )
    long, reduced = Evaluation(**state["long"]), Evaluation(**state["reduced"])
    write_json(CONVERSION, {"timesteps": params.stdb.timesteps, "scale": state["scale"]})
    metrics = {
        "ann": {"accuracy": ann_accuracy, "energy_pj": stdb.ann_energy(ann, train.shape)},
        "long": _summary(long),
        "reduced": _summary(reduced) | {"threshold_scale": state["scale"]},
        "loss_to_ann": {
            "long": ann_accuracy - long.accuracy[-1],
            "reduced": ann_accuracy - reduced.accuracy[-1],
        },
    }
    write_json(Path("metrics/evaluate_converted.json"), metrics)
    write_csv(
        Path("plots/converted_accuracy.csv"),
        [
            {"timesteps": t, "threshold_scale": scale, "accuracy": accuracy}
            for scale, curve in state["curves"].items()
            for t, accuracy in enumerate(curve, start=1)
        ],
    )
    write_csv(
        Path("plots/converted_spikes.csv"),
        [{"layer": name, "spikes": value} for name, value in reduced.spikes.items()],
    )
    write_csv(Path("plots/converted_diagnosis.csv"), state["diagnosis"])
    for step, accuracy in enumerate(long.accuracy, start=1):
        if step == len(long.accuracy) or step & (step - 1) == 0:  # powers of two suffice there
            stage.log({"accuracy/at_timestep": accuracy}, step)
    stage.log(
        {
            "accuracy/long": long.accuracy[-1],
            "accuracy/reduced": reduced.accuracy[-1],
            "threshold_scale": state["scale"],
            "energy/reduced_pj": reduced.energy,
            **spike_metrics(reduced.spikes),
            **{f"correlation/{row['layer']}": row["correlation"] for row in state["diagnosis"]},
        }
    )
    stage.say(
        f"test: {long.accuracy[-1]:.2%} at T = {len(long.accuracy)}, "
        f"{reduced.accuracy[-1]:.2%} at T = {len(reduced.accuracy)} (scale {state['scale']}); "
        f"ANN {ann_accuracy:.2%}"
    )
    images = sum(map(sum, reduced.confusion))
    if ill := collapse(reduced.accuracy[-1], len(train.classes), images, state["diagnosis"]):
        stage.say(ill)
    forget_job(stage)


def _summary(result: Evaluation) -> dict[str, Any]:
    return {
        "timesteps": len(result.accuracy),
        "accuracy": result.accuracy[-1],
        "spikes_per_neuron": result.spikes,
        "synaptic_operations": result.operations,
        "energy_pj": result.energy,
        "energy_delay": result.energy * len(result.accuracy),
    }


def evaluate_loop(config: dict[str, Any]) -> None:
    """What each worker does: its share of every split."""
    rank, world, device = setup(config)
    params = EvaluateConvertedParams(**config["evaluate_converted"])
    stdb_params = StdbParams(**config["stdb"])
    validation, test = load_splits(
        Path(config["data"]), device, "validation", "test", readers=config["readers"]
    )
    network, weights, thresholds = (config[key] for key in ("network", "weights", "thresholds"))
    ann, snn = converted(
        NetworkParams(**network), stdb_params, test, Path(weights), Path(thresholds)
    )
    snn = snn.to(device)
    best = best_scale(snn, validation, stdb_params.timesteps, params, rank, world)
    snn.scale_thresholds(best)
    reduced = evaluate_snn(snn, test, stdb_params.timesteps, params.batch_size, rank, world)
    diagnosis = diagnose(ann, snn, validation, stdb_params.timesteps)
    shown = min(params.timesteps, longest(stdb_params.timesteps))
    at_best = evaluate_snn(snn, test, shown, params.batch_size, rank, world)
    snn.scale_thresholds(1.0)
    long = evaluate_snn(snn, test, params.timesteps, params.batch_size, rank, world)
    report(
        {
            "scale": best,
            "long": vars(long),
            "reduced": vars(reduced),
            "curves": {
                best: at_best.accuracy,
                1.0: long.accuracy,
            },  # where both are one, the longer
            "diagnosis": diagnosis,
        },
    )


def best_scale(
    snn: stdb.SpikingNetwork,
    validation: Samples,
    timesteps: int,
    params: EvaluateConvertedParams,
    rank: int,
    world: int,
) -> float:
    """The threshold scale at which the converted network is most accurate after so many steps."""
    accuracies: dict[float, float] = {}
    for scale in params.scales:
        snn.scale_thresholds(scale)
        found = evaluate_snn(snn, validation, timesteps, params.batch_size, rank, world)
        accuracies[scale] = found.accuracy[-1]
        if rank == 0:
            print(
                f"[evaluate_converted] scale {scale:<5} T = {timesteps}: "
                f"validation {accuracies[scale]:.1%}",
                flush=True,
            )
    return max(accuracies, key=lambda scale: accuracies[scale])


if __name__ == "__main__":
    run_stage("evaluate_converted", main)
