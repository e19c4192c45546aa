"""Stage finetune_stdb: spike timing dependent backpropagation from the converted network.

    python -m pipeline.finetune_stdb

Algorithms 2 and 3: the balanced thresholds, scaled for the reduced T, and Adam with amsgrad. The
best epoch is chosen on the validation split; the test split is read once, at the end.
With ``stdb.from_scratch`` random weights are trained in the same way, the baseline of Appendix B.
Out: models/snn.safetensors, metrics/finetune_stdb.json, plots/finetune_stdb.csv,
plots/finetuned_*.csv: spikes and diagnosis by layer, accuracy by step, confusion, leaving early.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

import stdb
from pipeline.balance_thresholds import converted, load_thresholds
from pipeline.data import Samples, load_split, load_splits, normalise, some
from pipeline.distributed import data_parallel, forget_job, report, run_job, setup
from pipeline.evaluation import (
    Evaluation,
    collapse,
    diagnose,
    evaluate_snn,
    fitting_logit_scale,
    longest,
    spike_metrics,
)
from pipeline.network import build_ann, build_snn, load_weights, recipe
from pipeline.params import DataParams, NetworkParams, StdbParams
from pipeline.stage import (
    ANN,
    CONVERSION,
    DATA,
    SNN,
    THRESHOLDS,
    Stage,
    read_json,
    run_stage,
    write_csv,
    write_json,
    writing,
)
from pipeline.training import fit, order

SCRATCH_IMAGES, SCRATCH_PERCENTILE = 64, 90.0
BATCH = 128  # images presented at once where nothing is learned


def main(stage: Stage) -> None:
    """Check the inputs, run the job, write weights, metrics and curves."""
    params = stage.params
    train = load_split(DATA / "train.safetensors")
    _, snn = converted(params.network, params.stdb, train)  # refuses files of another network
    found = 1.0 if params.stdb.from_scratch else read_json(CONVERSION)["scale"]
    scale = params.stdb.threshold_scale or found
    images = min(params.stdb.images or len(train), len(train))
    start = "random weights, " if params.stdb.from_scratch else ""
    stage.say(f"{start}T = {params.stdb.timesteps}, threshold scale {scale}, {images} images")
    state = run_job(
        stage,
        train_loop,
        {
            "data": str(DATA.resolve()),
            "weights": str(ANN.resolve()),
            "thresholds": str(THRESHOLDS.resolve()),
            "scale": scale,
            "network": params.network.model_dump(),
            "stdb": params.stdb.model_dump(),
        },
    )
    test = Evaluation(**state["test"])
    snn.net.load_state_dict(state["best_network"])
    with writing(SNN) as temporary:
        stdb.save(
            snn,
            temporary,
            network=recipe(params.network, train),
            timesteps=params.stdb.timesteps,
            classes=train.classes,
            stdb=params.stdb.model_dump(),
        )
    write_json(
        Path("metrics/finetune_stdb.json"),
        {
            "accuracy": {"validation": state["best"], "test": test.accuracy[-1]},
            "timesteps": params.stdb.timesteps,
            "epoch": state["best_epoch"],
            "spikes_per_neuron": test.spikes,
            "synaptic_operations": test.operations,
            "energy_pj": test.energy,
            "energy_delay": test.energy * params.stdb.timesteps,
        },
    )
    write_csv(Path("plots/finetune_stdb.csv"), state["history"])
    write_csv(
        Path("plots/finetuned_spikes.csv"),
        [{"layer": name, "spikes": value} for name, value in test.spikes.items()],
    )
    write_csv(
        Path("plots/finetuned_accuracy.csv"),
        [{"timesteps": t, "accuracy": a} for t, a in enumerate(state["curve"], start=1)],
    )
    classes = range(len(train.classes))
    write_csv(
        Path("plots/finetuned_confusion.csv"),
        [
            {
                "actual": train.classes[a],
                "predicted": train.classes[b],
                "images": test.confusion[a][b],
            }
            for a in classes
            for b in classes
            if a == b or test.confusion[a][b]
        ],
    )
    write_csv(
        Path("plots/finetuned_exits.csv"),
        [
            {"confidence": confidence, "timesteps": steps, "accuracy": right}
            for confidence, (steps, right) in test.exits.items()
        ],
    )
    write_csv(Path("plots/finetuned_diagnosis.csv"), state["diagnosis"])
    stage.log({"accuracy/test": test.accuracy[-1], "accuracy/best_validation": state["best"]})
    about = {
        "accuracy": state["best"],
        "timesteps": params.stdb.timesteps,
        "classes": train.classes,
        "architecture": params.network.architecture,
    }
    stage.tracker.model(SNN, model_name(params.data), example(train), about)
    stage.say(f"STDB: validation {state['best']:.2%}, test {test.accuracy[-1]:.2%}")
    images = sum(map(sum, test.confusion))
    if ill := collapse(test.accuracy[-1], len(train.classes), images, state["diagnosis"]):
        stage.say(ill)
    forget_job(stage)


def model_name(data: DataParams) -> str:
    """Of the registered model: networks of one data set compete for its champion."""
    name = Path(data.path).name.partition(".")[0] if data.source == "folder" and data.path else ""
    return f"stdb-{name or data.source}"


def example(split: Samples) -> list:
    """The first image as (1, C, H, W), nested."""
    return split.take(torch.zeros(1, dtype=torch.int64)).images.tolist()


def train_loop(config: dict[str, Any]) -> None:
    """What each worker does: fine-tune, then look at the test split, once."""
    rank, world, device = setup(config)
    timesteps = config["stdb"]["timesteps"]
    train, validation, test = load_splits(
        Path(config["data"]), device, "train", "validation", "test", readers=config["readers"]
    )
    few = some(train, config["stdb"]["images"], config["stdb"]["seed"])
    snn, state = fine_tune(config, few, validation, rank, world, device)
    found = evaluate_snn(snn, test, timesteps, BATCH, rank, world)
    longer = evaluate_snn(snn, test, longest(timesteps), BATCH, rank, world)
    ann = build_ann(NetworkParams(**config["network"]), train)  # with the weights that were learned
    learned = snn.net.state_dict()
    ann.load_state_dict({name: learned[name] for name in ann.state_dict()})
    rows = diagnose(ann, snn, validation, timesteps)
    report(state | {"test": vars(found), "curve": longer.accuracy, "diagnosis": rows})


def fine_tune(
    config: dict[str, Any],
    train: Samples,
    validation: Samples,
    rank: int,
    world: int,
    device: torch.device,
    extra: Callable[[int, Evaluation], dict[str, float]] = lambda epoch, found: {},
) -> tuple[stdb.SpikingNetwork, dict[str, Any]]:
    """Algorithms 2 and 3 on the converted network, or on random weights.

    ``extra`` gives further metrics of an epoch, from its evaluation.

    Returns:
        The network with the weights of its best epoch, and the state of :func:`fit`.
    """
    params = StdbParams(**config["stdb"])
    torch.manual_seed(params.seed)
    ann = build_ann(NetworkParams(**config["network"]), train)
    if not params.from_scratch:
        load_weights(ann, Path(config["weights"]))
    if params.dropout is not None:
        for module in ann.modules():
            if isinstance(module, nn.Dropout):
                module.p = params.dropout
    snn = build_snn(ann, params, params.seed).to(device)
    if params.from_scratch:
        balance_random(snn, train, params)
    else:
        load_thresholds(snn, Path(config["thresholds"]))
    snn.scale_thresholds(config["scale"])
    factor = params.logit_scale
    if factor == "auto":  # random weights are not sure of anything
        factor = 1.0
        if not params.from_scratch:
            factor = fitting_logit_scale(snn, validation, params.timesteps, BATCH, rank, world)
            if rank == 0:
                print(f"[finetune_stdb] logit scale {factor:.3g}", flush=True)
    snn.scale_output(factor)
    model = data_parallel(snn)
    chunk = fitting_chunk(snn, params, train.shape, world, free_memory(device, world))

    def windows(images: Tensor, ids: Tensor, epoch: int) -> Iterator[Callable[[], Tensor]]:
        presentation = snn.present(images, sample_ids=ids, epoch=epoch, chunk=chunk)
        size = params.truncate or params.timesteps
        for start in range(0, params.timesteps, size):
            steps = min(size, params.timesteps - start)
            yield partial(model, presentation, steps)

    def validate(epoch: int) -> dict[str, float]:
        found = evaluate_snn(snn, validation, params.timesteps, BATCH, rank, world)
        return {
            "accuracy/validation": found.accuracy[-1],
            "energy/validation_pj": found.energy,
            **spike_metrics(found.spikes),
            **extra(epoch, found),
        }

    optimizer = torch.optim.Adam(
        [p for p in snn.parameters() if p.requires_grad],
        lr=params.learning_rate,
        weight_decay=params.weight_decay,
        amsgrad=True,
        fused=True,
    )
    state = fit(
        "finetune_stdb", snn.net, model, windows, optimizer, train, params, validate, rank, world,
        params.clip, params.micro_batch, snn.constrain,
    )  # fmt: skip
    snn.net.load_state_dict(state["best_network"])
    return snn, state


def balance_random(snn: stdb.SpikingNetwork, train: Samples, params: StdbParams) -> None:
    """Thresholds for random weights, from a few images, the same in every worker.

    At a percentile: at the maximum, and still at the 98th, layer after layer passes on less, the
    highest are silent, and nothing is learned.
    """
    few = train.take(order(len(train), SCRATCH_IMAGES, params.seed, 0)[0])
    stdb.balance_thresholds(
        snn,
        normalise(few.images),
        params.timesteps,
        percentile=SCRATCH_PERCENTILE,
        residual_blocks=True,
        sample_ids=few.ids,
    )


def free_memory(device: torch.device, world: int) -> int:
    """Bytes that are free for a worker: on its GPU, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // world


def fitting_chunk(
    snn: stdb.SpikingNetwork,
    params: StdbParams,
    shape: tuple[int, int, int],
    world: int,
    available: int,
) -> int:
    """The chunk of ``params``, or one with which a training step fits; says where none does."""
    images = min(params.micro_batch or params.batch_size, -(-params.batch_size // world))
    steps = min(params.truncate or params.timesteps, params.timesteps)
    chunk = params.chunk or stdb.largest_chunk(snn, shape, steps, images, available) or 1
    needed = stdb.training_memory(snn, shape, steps, images, chunk)
    text = f"a training step takes about {needed / 1e9:.1f} GB of {available / 1e9:.1f} GB free"
    if needed > available:
        text = f"warning: {text}; a smaller stdb.micro_batch (or truncate) may save it"
    print(f"[finetune_stdb] {text}", flush=True)
    return chunk


if __name__ == "__main__":
    run_stage("finetune_stdb", main)
