"""Stage train_ann: train the ANN under the constraints of conversion (paper §2.3, §4).

    python -m pipeline.train_ann

No bias, no batch normalisation, average pooling, dropout; SGD with momentum. The best epoch is
chosen on the validation split; the test split is read once, at the end. With
``train_ann.weights`` a file of yours stands in for the training and is only evaluated.
Out: models/ann.safetensors, metrics/train_ann.json, plots/train_ann.csv.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data import load_split, load_splits
from pipeline.distributed import data_parallel, forget_job, report, run_job, setup
from pipeline.evaluation import evaluate_ann
from pipeline.network import build_ann, load_weights, save_weights
from pipeline.params import NetworkParams, TrainAnnParams
from pipeline.stage import ANN, DATA, Stage, run_stage, write_csv, write_json
from pipeline.training import fit
from stdb import PoissonEncoder, convert, dropout_mask, sample_keys


def main(stage: Stage) -> None:
    """Check that the network can be converted, run the job, write weights and metrics."""
    params = stage.params
    train = load_split(DATA / "train.safetensors")
    ann = build_ann(params.network, train)
    convert(ann, PoissonEncoder())  # refuses now what could not be converted after the training
    if params.train_ann.weights is not None:
        load_weights(ann, Path(params.train_ann.weights))
    parameters = sum(p.numel() for p in ann.parameters())
    stage.say(f"{params.network.architecture} with {parameters:,} weights, {len(train)} images")
    state = run_job(
        stage,
        train_loop,
        {
            "data": str(DATA.resolve()),
            "network": params.network.model_dump(),
            "train_ann": params.train_ann.model_dump(),
        },
    )
    best = state["history"][state["best_epoch"] - 1] if state["history"] else {}
    save_weights(state["best_network"], ANN, network=params.network.model_dump())
    metrics = {
        "accuracy": {"validation": state["best"], "test": state["test"]},
        "epoch": state["best_epoch"],
        "loss": {"train": best.get("loss/train")},
    }
    write_json(Path("metrics/train_ann.json"), metrics)
    rows = state["history"] or [{"epoch": 0, "accuracy/validation": state["best"]}]
    write_csv(Path("plots/train_ann.csv"), rows)
    stage.log({"accuracy/test": state["test"], "accuracy/best_validation": state["best"]})
    stage.say(f"ANN: validation {state['best']:.2%}, test {state['test']:.2%}")
    forget_job(stage)


def train_loop(config: dict[str, Any]) -> None:
    """What each worker does."""
    rank, world, device = setup(config)
    params = TrainAnnParams(**config["train_ann"])
    train, validation, test = load_splits(
        Path(config["data"]), device, "train", "validation", "test", readers=config["readers"]
    )
    torch.manual_seed(params.seed)
    ann = build_ann(NetworkParams(**config["network"]), train).to(device)
    ann.to(memory_format=torch.channels_last)  # faster convolutions, on a CPU by a sixth
    if params.weights is not None:
        load_weights(ann, Path(params.weights))
        accuracy = evaluate_ann(ann, validation, params.batch_size, rank, world)
        state: dict[str, Any] = {
            "best": accuracy,
            "best_epoch": 0,
            "history": [],
            "best_network": ann.state_dict(),
        }
    else:
        model = data_parallel(ann)

        dropout = SampleDropout(ann, params.seed)

        def present(images: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=params.precision == "bf16"):
                return model(images.contiguous(memory_format=torch.channels_last)).float()

        def windows(images: Tensor, ids: Tensor, epoch: int) -> Iterator[Callable[[], Tensor]]:
            dropout.keys = sample_keys(ids, epoch)
            yield partial(present, images)

        def validate(epoch: int) -> dict[str, float]:
            return {
                "accuracy/validation": evaluate_ann(ann, validation, params.batch_size, rank, world)
            }

        optimizer = torch.optim.SGD(
            ann.parameters(),
            lr=params.learning_rate,
            momentum=params.momentum,
            weight_decay=params.weight_decay,
            fused=True,
        )
        state = fit(
            "train_ann", ann, model, windows, optimizer, train, params, validate, rank, world
        )
        ann.load_state_dict(state["best_network"])
    state["test"] = evaluate_ann(ann, test, params.batch_size, rank, world)
    report(state)


class SampleDropout:
    """Makes a network's dropout a function of (seed, epoch, sample), as the SNN's is.

    So an image drops the same activations whatever batch and worker it comes to.

    Attributes:
        keys: (B,) int64, the random streams of the images that are presented next.
    """

    def __init__(self, network: nn.Module, seed: int) -> None:
        self.seed, self.keys = seed, torch.zeros(0, dtype=torch.int64)
        dropouts = [m for m in network.modules() if isinstance(m, nn.Dropout)]
        for number, module in enumerate(dropouts):
            module.forward = partial(self._drop, module, number)  # type: ignore[method-assign]

    def _drop(self, module: nn.Dropout, number: int, x: Tensor) -> Tensor:
        if not module.training or module.p == 0:
            return x
        return x * dropout_mask(self.keys, self.seed, number, module.p, x.shape, x.dtype)


if __name__ == "__main__":
    run_stage("train_ann", main)
