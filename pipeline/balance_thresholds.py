"""Stage balance_thresholds: Algorithm 1 over calibration images, shared among the workers.

    python -m pipeline.balance_thresholds

A worker gets whole batches, so that products round alike and thresholds are the same, whatever the
number of workers: a threshold that differs in its last digit would change spikes above it.
Out: models/thresholds.json, layer by layer the largest weighted input, unscaled.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

import stdb
from pipeline.data import Samples, load_split, normalise
from pipeline.distributed import forget_job, report, run_job, setup, total
from pipeline.network import build_ann, build_snn, load_weights
from pipeline.params import BalanceThresholdsParams, NetworkParams, StdbParams
from pipeline.stage import (
    ANN,
    DATA,
    THRESHOLDS,
    Stage,
    StageError,
    read_json,
    run_stage,
    write_csv,
    write_json,
)


def main(stage: Stage) -> None:
    """Run the job, write the thresholds."""
    params = stage.params
    train = load_split(DATA / "train.safetensors")
    ann = build_ann(params.network, train)
    load_weights(ann, ANN)
    images = min(params.balance_thresholds.images, len(train))
    stage.say(f"T = {params.balance_thresholds.timesteps}, {images} calibration images")
    state = run_job(
        stage,
        balance_loop,
        {
            "data": str(DATA.resolve()),
            "weights": str(ANN.resolve()),
            "network": params.network.model_dump(),
            "balance_thresholds": params.balance_thresholds.model_dump(),
            "stdb": params.stdb.model_dump(),
        },
    )
    layers = [
        {"layer": name, "threshold": value, "balanced": name not in state["kept"]}
        for name, value in state["thresholds"].items()
    ]
    write_json(THRESHOLDS, {"architecture": params.network.architecture, "layers": layers})
    write_csv(Path("plots/thresholds.csv"), layers)
    stage.log({f"thresholds/{row['layer']}": row["threshold"] for row in layers})
    forget_job(stage)


def balance_loop(config: dict[str, Any]) -> None:
    """What each worker does: its share of the images, the maximum over all workers per layer."""
    rank, world, device = setup(config)
    params = BalanceThresholdsParams(**config["balance_thresholds"])
    train = load_split(Path(config["data"]) / "train.safetensors")
    ann = build_ann(NetworkParams(**config["network"]), train)
    load_weights(ann, Path(config["weights"]))
    snn = build_snn(ann, StdbParams(**config["stdb"]), params.seed).to(device)
    generator = torch.Generator().manual_seed(params.seed)
    chosen = torch.randperm(len(train), generator=generator)[: params.images]
    batches = chosen.split(params.batch_size)[rank::world]
    share = train.take(torch.cat([*batches, chosen[:0]])).to(device)

    def progress(layer: str, threshold: float) -> None:
        if rank == 0:
            print(f"[balance_thresholds] {layer:24} V = {threshold:.4f}", flush=True)

    found = stdb.balance_thresholds(
        snn,
        normalise(share.images),
        params.timesteps,
        batch_size=params.batch_size,
        percentile=params.percentile,
        residual_blocks=params.residual_blocks,
        sample_ids=share.ids,
        reduce=total,
        progress=progress,
    )
    kept = [] if params.residual_blocks else sorted(stdb.residual_layers(snn))
    report({"thresholds": found, "kept": kept})


def load_thresholds(snn: stdb.SpikingNetwork, path: Path = THRESHOLDS) -> None:
    """Set a network's thresholds to the balanced ones; an error if they are another network's."""
    try:
        layers = read_json(path)["layers"]
        snn.set_thresholds(
            {row["layer"]: row["threshold"] for row in layers},
            balanced=[row["layer"] for row in layers if row["balanced"]],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StageError(f"{path}: {error}; run balance_thresholds for this network") from error


def converted(
    network: NetworkParams,
    params: StdbParams,
    data: Samples,
    weights: Path = ANN,
    thresholds: Path = THRESHOLDS,
) -> tuple[nn.Module, stdb.SpikingNetwork]:
    """The trained ANN, and the spiking network that it is converted to, at its balanced thresholds.

    Raises:
        StageError: weights or thresholds are another network's.
    """
    ann = build_ann(network, data)
    load_weights(ann, weights)
    snn = build_snn(ann, params, params.seed)
    load_thresholds(snn, thresholds)
    return ann, snn


if __name__ == "__main__":
    run_stage("balance_thresholds", main)
