"""Stage balance_thresholds: what each spike stands for, from calibration images, shared by workers.

    python -m pipeline.balance_thresholds

A worker gets whole batches, so that products round alike and thresholds are the same, whatever the
number of workers: a threshold that differs in its last digit would change spikes above it.
``method`` says how: Algorithm 1, from the currents over the stage's own ``timesteps``; ``mse`` and
``learned`` from the ANN's activations, for the few steps of ``stdb.timesteps``.
Out: models/thresholds.json, layer by layer V, unscaled, and models/balanced.safetensors: of a
network with biases or batch norm all of it, as stdb.save writes it, of others nothing;
metrics/balance_thresholds.json: what a calibration for few steps gave, on the validation split.
"""

from typing import Any

from torch import nn

import stdb
from pipeline.data import load_split
from pipeline.files import ANN, BALANCED, DATA, METRICS, PLOTS, THRESHOLDS, write_csv, write_json
from pipeline.jobs.run import forget_job, run_job
from pipeline.jobs.worker import Worker
from pipeline.learning.balanced import balanced_state, save_balanced
from pipeline.learning.calibration import Calibration, calibrate
from pipeline.learning.evaluation import evaluate_ann, evaluate_snn
from pipeline.learning.networks import (
    build_ann,
    load_weights,
    recipe,
    use_threads,
)
from pipeline.stage import Stage, stage_command

PARTS = ("before", "after")  # a correction of biases


def main(stage: Stage) -> None:
    """Run the job, write the thresholds, or the whole network."""
    params = stage.params
    train = load_split(DATA / "train.safetensors")
    ann = build_ann(params.network, train)
    load_weights(ann, ANN)
    state = run_job(stage, balance_loop)
    layers = [
        {"layer": name, "threshold": value, "balanced": name not in state["kept"]}
        for name, value in state["thresholds"].items()
    ]
    write_json(THRESHOLDS, {"architecture": params.network.architecture, "layers": layers})
    save_balanced(state["balanced"], BALANCED)
    shown = [row | {"threshold": state["means"][row["layer"]]} for row in layers]
    write_csv(PLOTS / "thresholds.csv", shown)
    metrics = state["metrics"]
    write_json(METRICS / "balance_thresholds.json", metrics)
    stage.log({f"thresholds/{row['layer']}": row["threshold"] for row in shown})
    stage.log(logged(metrics))
    stage.say(summary(metrics))
    forget_job(stage)


def logged(metrics: dict[str, Any]) -> dict[str, float]:
    """What the MLflow run has of them."""
    found = {f"dead_channels/{layer}": float(n) for layer, n in metrics["dead_channels"].items()}
    for name in ("accuracy", "agreement"):
        for part, word in (("before", "uncorrected"), ("after", "calibrated")):
            if part in (metrics[name] or {}):
                found[f"{name}/{word}"] = metrics[name][part]
    return found


def summary(metrics: dict[str, Any]) -> str:
    """What was found, in a line."""
    parts = [f"{metrics['method']} per {metrics['per']}"]
    if metrics["accuracy"] is not None:
        shown = {part: f"{value:.2%}" for part, value in metrics["accuracy"].items()}
        before = f"{shown['before']}, corrected " if metrics["corrected"] else ""
        after = f"{before}{shown['after']}; ANN {shown['ann']}"
        parts.append(f"validation at T = {metrics['timesteps']}: {after}")
    if metrics["agreement"] is not None:
        before, after = (f"{metrics['agreement'][part]:.1%}" for part in PARTS)
        kept = "kept" if metrics["corrected"] else "taken back"
        parts.append(
            f"{before} of the calibration images decided like the ANN, {after} with corrected "
            f"biases, which were {kept}"
        )
    if dead := metrics["dead_channels"]:
        parts.append(f"{sum(dead.values())} channels never fire, in {', '.join(dead)}")
    return "; ".join(parts)


def balance_loop(worker: Worker) -> None:
    """What each worker does: its share of the images; the same network in all of them."""
    params = worker.params
    train = load_split(worker.path(DATA) / "train.safetensors")
    ann = build_ann(params.network, train)
    load_weights(ann, worker.path(ANN))
    whole = params.balance_thresholds.batch_size * worker.world  # batches are not divided
    use_threads(worker, ann.to(worker.device), train, whole)
    found = calibrate(worker, ann, train)
    snn, network = found.snn, recipe(params.network, train)
    worker.checkpoint(
        {
            "thresholds": dict(found.balance),
            "means": {name: neuron.mean_threshold for name, neuron in snn.neurons.items()},
            "kept": [n for n, neuron in snn.neurons.items() if neuron.balanced_threshold.isnan()],
            "metrics": measured(worker, ann, found),
            "balanced": balanced_state(snn, train, network, found.timesteps, found.wanted),
        }
    )


def measured(worker: Worker, ann: nn.Module, found: Calibration) -> dict[str, Any]:
    """What metrics/balance_thresholds.json says.

    Accuracies are of a calibration for the T that is wanted, without its correction of biases where
    it has one, and with it. Those of Algorithm 1 are evaluate_converted's: it is for many steps,
    and at few the thresholds have to be scaled first.
    """
    balance, accuracy = found.balance, None
    if found.wanted is not None:
        size = worker.params.balance_thresholds.batch_size
        validation = worker.split("validation")
        accuracy = {"ann": evaluate_ann(worker, ann, validation, size)}
        networks = {"after": found.snn}
        if balance.corrected:
            networks = {"before": stdb.uncorrected(found.snn)} | networks
        for part, snn in networks.items():
            evaluation = evaluate_snn(worker, snn, validation, found.wanted, size)
            accuracy[part] = evaluation.accuracy[-1]
    agreement = balance.agreement
    return {
        "method": balance.method,
        "per": balance.per,
        "initial_membrane": balance.initial_membrane,
        "timesteps": found.timesteps,
        "corrected": balance.corrected,
        "accuracy": accuracy,
        "agreement": None if agreement is None else dict(zip(PARTS, agreement, strict=True)),
        "dead_channels": balance.dead,
    }


if __name__ == "__main__":
    stage_command("balance_thresholds", main, __doc__)
