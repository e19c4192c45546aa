"""Stage train_ann: train the ANN under the constraints of conversion (paper §2.3, §4).

    python -m pipeline.train_ann

No bias, no batch normalisation, average pooling, dropout; SGD with momentum. Networks with batch
norm, as ``network.normalisation`` or a network of your own have it, learn its statistics from fixed
groups of images, so that the number of workers changes no result. Activations for few steps,
``network.activation``, learn their bounds, which start from the first images; a modern schedule is
an option beside the paper's. The best epoch is chosen on the validation split; the test split is
read once, at the end. With ``train_ann.weights`` a file of yours stands in for the training and is
only evaluated; one of a ``torchvision:`` network for other classes is where the training begins,
with a new output layer.
Out: models/ann.safetensors, metrics/train_ann.json, plots/train_ann.csv.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import stdb
from pipeline.data import Samples, load_split
from pipeline.errors import StageError
from pipeline.files import ANN, DATA, METRICS, PLOTS, write_csv, write_json
from pipeline.jobs.run import forget_job, run_job
from pipeline.jobs.worker import Row, State, Worker
from pipeline.learning import published
from pipeline.learning.calibration import calibration_images, check_method
from pipeline.learning.checks import check_norms, check_randomness
from pipeline.learning.compiling import compiled
from pipeline.learning.dropout import SampleDropout
from pipeline.learning.evaluation import evaluate_ann
from pipeline.learning.fit import Task, cross_entropy, fit, order
from pipeline.learning.networks import (
    build_ann,
    described,
    example_of,
    load_given,
    save_weights,
    use_threads,
)
from pipeline.learning.norms import group_sizes
from pipeline.learning.schedules import parameter_groups
from pipeline.stage import Stage, stage_command

START_IMAGES = 512  # that the bounds of activations start from


def main(stage: Stage) -> None:
    """Check that the network can be converted, run the job, write weights and metrics."""
    params = stage.params
    train = load_split(DATA / "train.safetensors")
    ann = build_ann(params.network, train)
    side = min(train.shape[1:])
    if params.train_ann.cutout >= side:
        raise StageError(
            f"train_ann.cutout is {params.train_ann.cutout}, and the images' shorter side {side}; "
            f"allowed: 0 to {side - 1}"
        )
    check_norms(ann)
    # refuses now what could not be converted, or calibrated, after the training
    calibration_images(params.balance_thresholds, train)
    check_method(params, stdb.convert(ann, stdb.PoissonEncoder(), example=example_of(train)))
    given = params.train_ann.weights
    if given is None or load_given(ann, params.network, Path(given)) is not None:  # is trained
        check_randomness(ann, train.shape)
    parameters = sum(p.numel() for p in ann.parameters())
    stage.say(f"{params.network.architecture} with {parameters:,} weights, {len(train)} images")
    state = run_job(stage, train_loop)
    best = state["history"][state["best_epoch"] - 1] if state["history"] else {}
    save_weights(state["best_network"], ANN, network=described(params.network))
    metrics = {
        "accuracy": {"validation": state["best"], "test": state["test"]},
        "epoch": state["best_epoch"],
        "loss": {"train": best.get("loss/train")},
    }
    write_json(METRICS / "train_ann.json", metrics)
    rows = state["history"] or [{"epoch": 0, "accuracy/validation": state["best"]}]
    write_csv(PLOTS / "train_ann.csv", rows)
    stage.log({"accuracy/test": state["test"], "accuracy/best_validation": state["best"]})
    stage.say(f"ANN: validation {state['best']:.2%}, test {state['test']:.2%}")
    forget_job(stage)


def train_loop(worker: Worker) -> None:
    """What each worker does."""
    params = worker.params.train_ann
    train, validation, test = (worker.split(name) for name in ("train", "validation", "test"))
    torch.manual_seed(params.seed)
    ann = build_ann(worker.params.network, train).to(worker.device)
    work = use_threads(worker, ann, train, params.batch_size)
    ann.to(memory_format=torch.channels_last)  # faster convolutions, on a CPU by a sixth
    other = None  # number of classes, of a file for others
    if params.weights is not None:
        other = load_given(ann, worker.params.network, worker.path(Path(params.weights)))
    if other is not None:
        worker.say(
            f"{params.weights} is for {other} classes, the images have {len(train.classes)}: "
            f"layer {published.head(ann)} is new, and the training begins from the others' weights"
        )
    if params.weights is not None and other is None:
        accuracy = evaluate_ann(worker, ann, validation, params.batch_size)
        state: State = {"best": accuracy, "best_epoch": 0, "history": []}
        state["best_network"] = ann.state_dict()
    else:
        if params.weights is None:
            start_bounds(worker, ann, train)
        with compiled(worker, ann, train, work) as fast:
            state = train_ann(worker, ann, train, validation, fast)
        ann.load_state_dict(state["best_network"])
    state["test"] = evaluate_ann(worker, ann, test, params.batch_size)
    worker.checkpoint(state)


def train_ann(
    worker: Worker, ann: nn.Module, train: Samples, validation: Samples, fast: bool = False
) -> State:
    """SGD with momentum on the training split; the state of :func:`fit`.

    Args:
        worker: that this process is.
        ann: the network.
        train: the images to learn from.
        validation: the images that choose the epoch.
        fast: the network is compiled, and has no dropout.
    """
    params = worker.params.train_ann
    model = worker.data_parallel(ann)

    def present(images: Tensor, keys: Tensor) -> Tensor:
        lowered = params.precision == "bf16"
        lower = torch.autocast(worker.device.type, torch.bfloat16, enabled=lowered)
        dropout = nullcontext() if fast else SampleDropout(params.seed, keys)
        with lower, dropout:
            logits: Tensor = model(images.contiguous(memory_format=torch.channels_last))
            return logits.float()

    def passes(images: Tensor, ids: Tensor, epoch: int) -> Iterator[Callable[[], Tensor]]:
        yield partial(present, images, stdb.sample_keys(ids, epoch))

    def validate(_: int) -> Row:
        return {"accuracy/validation": evaluate_ann(worker, ann, validation, params.batch_size)}

    def constrain() -> None:
        for module in bounded:
            module.constrain()

    bounded = [module for module in ann.modules() if isinstance(module, stdb.Clip)]
    optimizer = torch.optim.SGD(
        parameter_groups(ann, params),
        lr=params.learning_rate,
        momentum=params.momentum,
        weight_decay=params.weight_decay,
        nesterov=params.nesterov,
        fused=True,
    )
    task = Task(
        ann,
        model,
        passes,
        optimizer,
        validate,
        constrain=constrain if bounded else None,
        norm_images=params.norm_images,
        losses=partial(cross_entropy, label_smoothing=params.label_smoothing),
        cutout=params.cutout,
    )
    return fit(worker, task, train, params)


def start_bounds(worker: Worker, ann: nn.Module, train: Samples) -> None:
    """Start the bounds of activations from the first images of the first epoch.

    Every worker looks at all of them, so that it is the same for any number of workers.
    """
    if not any(isinstance(module, stdb.Clip) for module in ann.modules()):
        return
    params = worker.params.train_ann
    first = torch.cat(order(len(train), params.batch_size, params.seed, 1))[:START_IMAGES]
    images = train.take(first).to(worker.device).pixels()
    images = images.contiguous(memory_format=torch.channels_last)
    found = stdb.start_bounds(ann, images.split(group_sizes(len(images), params.norm_images)))
    worker.say(f"bounds start at {min(found.values()):.3g} to {max(found.values()):.3g}")


if __name__ == "__main__":
    stage_command("train_ann", main, __doc__)
