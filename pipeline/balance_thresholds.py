"""Stage balance_thresholds: Algorithm 1 over calibration images, shared among the workers.

    python -m pipeline.balance_thresholds

A worker gets whole batches, so that products round alike and thresholds are the same, whatever the
number of workers: a threshold that differs in its last digit would change spikes above it.
With ``method: learned`` V is the bound that the layer's activation was trained with, and U_0 = V/2.
Out: models/thresholds.json, layer by layer the largest weighted input, unscaled, and
models/balanced.safetensors: of a network with biases or batch norm all of it, of others nothing.
"""

import torch

import stdb
from pipeline.data import load_split
from pipeline.errors import StageError
from pipeline.files import ANN, BALANCED, DATA, PLOTS, THRESHOLDS, write_csv, write_json
from pipeline.jobs.run import forget_job, run_job
from pipeline.jobs.worker import Worker
from pipeline.learning.balanced import balanced_state, save_balanced
from pipeline.learning.checks import check_method
from pipeline.learning.networks import build_ann, build_snn, load_weights, use_threads
from pipeline.stage import Stage, stage_command


def main(stage: Stage) -> None:
    """Run the job, write the thresholds, or the whole network."""
    params = stage.params
    train = load_split(DATA / "train.safetensors")
    ann = build_ann(params.network, train)
    load_weights(ann, ANN)
    images = min(params.balance_thresholds.images, len(train))
    stage.say(f"T = {params.balance_thresholds.timesteps}, {images} calibration images")
    state = run_job(stage, balance_loop)
    layers = [
        {"layer": name, "threshold": value, "balanced": name not in state["kept"]}
        for name, value in state["thresholds"].items()
    ]
    write_json(THRESHOLDS, {"architecture": params.network.architecture, "layers": layers})
    save_balanced(state["balanced"], BALANCED)
    write_csv(PLOTS / "thresholds.csv", layers)
    stage.log({f"thresholds/{row['layer']}": row["threshold"] for row in layers})
    forget_job(stage)


def balance_loop(worker: Worker) -> None:
    """What each worker does: its share of the images, the maximum over all workers per layer."""
    params = worker.params.balance_thresholds
    train = load_split(worker.path(DATA) / "train.safetensors")
    ann = build_ann(worker.params.network, train)
    load_weights(ann, worker.path(ANN))
    use_threads(worker, ann.to(worker.device), train, params.batch_size)
    snn = build_snn(ann, worker.params.stdb, params.seed, train).to(worker.device)
    check_method(worker.params, snn)
    method = params.method
    if method == "auto":
        method = "maximum" if params.percentile == 100 else "percentile"
    in_blocks = params.residual_blocks or snn.has_units  # V = 1 there is the paper's, §4.2
    generator = torch.Generator().manual_seed(params.seed)
    chosen = torch.randperm(len(train), generator=generator)[: params.images]
    batches = chosen.split(params.batch_size)[worker.rank :: worker.world]
    share = train.take(torch.cat([*batches, chosen[:0]])).to(worker.device)
    try:
        thresholds = stdb.balance_thresholds(
            snn,
            share.pixels(),
            params.timesteps,
            batch_size=params.batch_size,
            method=method,
            bias_correction=False,
            percentile=params.percentile,
            residual_blocks=in_blocks,
            sample_ids=share.ids,
            reduce=worker.all_reduce,
            progress=lambda layer, threshold: worker.say(f"{layer:24} V = {threshold:.4f}"),
        )
    except ValueError as error:  # of a layer that is dead, has diverged or has no bound
        raise StageError(str(error)) from error
    kept = [] if in_blocks else sorted(stdb.residual_layers(snn))
    found = {"thresholds": dict(thresholds), "kept": kept, "balanced": balanced_state(snn)}
    worker.checkpoint(found)


if __name__ == "__main__":
    stage_command("balance_thresholds", main, __doc__)
