"""Stage balance_thresholds: what each spike stands for, from calibration images, shared by workers.

    python -m pipeline.balance_thresholds

A worker gets whole batches, so that products round alike and thresholds are the same, whatever the
number of workers: a threshold that differs in its last digit would change spikes above it.
``method`` says how: Algorithm 1, from the currents over the stage's own ``timesteps``; ``mse`` and
``learned`` from the ANN's activations, for the few steps of ``stdb.timesteps``.
Out: models/thresholds.json, layer by layer V, unscaled, and models/balanced.safetensors: of a
network with biases or batch norm all of it, as stdb.save writes it, of others nothing.
"""

import stdb
from pipeline.data import load_split
from pipeline.files import ANN, BALANCED, DATA, PLOTS, THRESHOLDS, write_csv, write_json
from pipeline.jobs.run import forget_job, run_job
from pipeline.jobs.worker import Worker
from pipeline.learning.balanced import balanced_state, save_balanced
from pipeline.learning.calibration import calibrate
from pipeline.learning.networks import build_ann, load_weights, recipe, use_threads
from pipeline.stage import Stage, stage_command


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
    stage.log({f"thresholds/{row['layer']}": row["threshold"] for row in shown})
    forget_job(stage)


def balance_loop(worker: Worker) -> None:
    """What each worker does: its share of the images; the same network in all of them."""
    params = worker.params
    train = load_split(worker.path(DATA) / "train.safetensors")
    ann = build_ann(params.network, train)
    load_weights(ann, worker.path(ANN))
    use_threads(worker, ann.to(worker.device), train, params.balance_thresholds.batch_size)
    found = calibrate(worker, ann, train)
    snn, network = found.snn, recipe(params.network, train)
    worker.checkpoint(
        {
            "thresholds": dict(found.balance),
            "means": {name: mean_threshold(neuron) for name, neuron in snn.neurons.items()},
            "kept": [n for n, neuron in snn.neurons.items() if neuron.balanced_threshold.isnan()],
            "balanced": balanced_state(snn, train, network, found.timesteps, found.wanted),
        }
    )


def mean_threshold(neuron: stdb.SpikingNeuron) -> float:
    """V; where weights hold A of each channel, and V is 1, the mean of V·A."""
    mean = 1.0 if neuron.amplitude is None else float(neuron.amplitude.double().mean())
    return neuron.threshold.item() * mean


if __name__ == "__main__":
    stage_command("balance_thresholds", main, __doc__)
