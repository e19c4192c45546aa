"""Stage finetune_stdb: spike timing dependent backpropagation from the converted network.

    python -m pipeline.finetune_stdb

Algorithms 2 and 3: the balanced thresholds, scaled for the reduced T, and Adam with amsgrad. The
best epoch is chosen on the validation split; the test split is read once, at the end.
With several T, ``stdb.timesteps: [8, 4, 2, 1]``, each starts from the network of the one before it.
With ``stdb.from_scratch`` random weights are trained in the same way, the baseline of Appendix B.
Out: models/snn.safetensors, and in models/snn a network for each T; metrics/finetune_stdb.json,
plots/finetune_stdb.csv, plots/finetuned_*.csv: spikes and diagnosis by layer, accuracy by step,
confusion, leaving early.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

import stdb
from pipeline.data import Samples, load_split, subset
from pipeline.files import ANN, DATA, METRICS, PLOTS, SNN, SNNS, write_csv, write_json, writing
from pipeline.handed_on import read_conversion
from pipeline.jobs.run import forget_job, run_job
from pipeline.jobs.worker import Worker
from pipeline.learning.evaluation import (
    Evaluation,
    collapse,
    diagnose,
    evaluate_snn,
    fitting_logit_scale,
    levels_of,
    longest,
)
from pipeline.learning.finetuning import BATCH, fine_tune
from pipeline.learning.network_file import write_network
from pipeline.learning.networks import (
    build_ann,
    build_snn,
    load_converted,
    load_weights,
    surrogate_of,
    use_surrogate,
)
from pipeline.params import DataParams, Params, StdbParams
from pipeline.stage import Stage, stage_command
from pipeline.tracking.messages import About, child_of


def main(stage: Stage) -> None:
    """Check the inputs, run the job, write weights, metrics and curves."""
    params = stage.params
    train = load_split(DATA / "train.safetensors")
    ann, snn = load_converted(params.network, params.stdb, train)  # refuses another network's files
    if params.stdb.from_scratch:
        snn = build_snn(ann, params.stdb, params.stdb.seed, train)
    images = min(params.stdb.images or len(train), len(train))
    start = "random weights, " if params.stdb.from_scratch else ""
    scale = threshold_scale(params.stdb)
    falling = ", ".join(map(str, params.stdb.falling))
    stage.say(f"{start}T = {falling}, threshold scale {scale}, {images} images")
    if params.stdb.surrogate == "auto":
        used = [surrogate_of(at_t) for at_t in params.stdb.at_each()]
        stage.tracker.tags({"surrogate": ", ".join(dict.fromkeys(one.name for one in used))})
        stage.say(f"auto: {', '.join(dict.fromkeys(map(str, used)))}")
    state = run_job(stage, train_loop)
    tuned, test = state["tuned"], Evaluation(**state["test"])
    write_networks(snn, state, params, train)
    write_json(METRICS / "finetune_stdb.json", metrics(tuned))
    write_csv(PLOTS / "finetune_stdb.csv", [row for one in tuned for row in one["history"]])
    write_csv(
        PLOTS / "finetuned_spikes.csv",
        [{"layer": name, "spikes": value} for name, value in test.spikes.items()],
    )
    write_csv(
        PLOTS / "finetuned_accuracy.csv",
        [{"timesteps": t, "accuracy": a} for t, a in enumerate(state["curve"], start=1)],
    )
    classes = range(len(train.classes))
    write_csv(
        PLOTS / "finetuned_confusion.csv",
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
        PLOTS / "finetuned_exits.csv",
        [
            {"confidence": confidence, "timesteps": steps, "accuracy": right}
            for confidence, (steps, right) in test.exits.items()
        ],
    )
    write_csv(PLOTS / "finetuned_diagnosis.csv", state["diagnosis"])
    log_networks(stage, tuned, train)
    for one in tuned:
        at = f" at T = {one['timesteps']}" if params.stdb.progressive else ""
        right = one["test"]["accuracy"][-1]
        stage.say(f"STDB{at}: validation {one['best']:.2%}, test {right:.2%}")
    images = sum(map(sum, test.confusion))
    if ill := collapse(test.accuracy[-1], len(train.classes), images, state["diagnosis"]):
        stage.say(ill)
    forget_job(stage)


def write_networks(
    snn: stdb.SpikingNetwork, state: dict[str, Any], params: Params, train: Samples
) -> None:
    """A file for each T, and that of the last one in its usual place; no other T's is left."""
    for name, neuron in snn.neurons.items():
        neuron.unit = state["units"][name]
    paths = [network_of(one["timesteps"]) for one in state["tuned"]]
    for path, one, at_t in zip(paths, state["tuned"], params.stdb.at_each(), strict=True):
        use_surrogate(snn, at_t)
        snn.net.load_state_dict(one["network"])
        snn.output_correction = state["correction"]
        snn.scale_output(one["logit_scale"])
        for file in (path, SNN) if path == paths[-1] else (path,):
            with writing(file) as temporary:
                write_network(snn, params, train, temporary, one["timesteps"])
    for other in set(SNNS.iterdir()) - set(paths):
        other.unlink()


def network_of(timesteps: int) -> Path:
    """The file of the network for a T."""
    return SNNS / f"t{timesteps}.safetensors"


def metrics(tuned: list[dict[str, Any]]) -> dict[str, Any]:
    """What was measured at the last T; with several T, at each of them."""
    found = {str(one["timesteps"]): summary(one) for one in tuned}
    last = summary(tuned[-1])
    return last if len(tuned) == 1 else last | {"by_timesteps": found}


def summary(one: dict[str, Any]) -> dict[str, Any]:
    """What was measured of the network for a T."""
    test = Evaluation(**one["test"])
    return {
        "accuracy": {"validation": one["best"], "test": test.accuracy[-1]},
        "timesteps": one["timesteps"],
        "epoch": one["epoch"],
        **test.spiking(),
    }


def log_networks(stage: Stage, tuned: list[dict[str, Any]], train: Samples) -> None:
    """Final figures and the network, to MLflow: with several T to a run below the stage's each."""
    params = stage.params
    for one, at_t in zip(tuned, params.stdb.at_each(), strict=True):
        test, steps = Evaluation(**one["test"]), at_t.timesteps
        about = About(
            accuracy=one["best"],
            timesteps=steps,
            classes=train.classes,
            architecture=params.network.architecture,
        )
        child = None
        if params.stdb.progressive:
            child = child_of(steps)
            stage.tracker.child(child, {"stdb.timesteps": steps, "stdb.epochs": at_t.epochs})
        found = {"accuracy/test": test.accuracy[-1], "accuracy/best_validation": one["best"]}
        found |= {"energy/test_pj": test.energy, "spikes/mean": test.mean_spikes}
        stage.tracker.log(found, child=child)
        for t in levels_of([steps], steps):
            stage.tracker.log({"accuracy/at_timestep": test.accuracy[t - 1]}, t, child)
        path = network_of(steps) if child else SNN
        stage.tracker.model(path, model_name(params.data), example(train), about, child)
        if child:
            stage.tracker.child_end(child, "FINISHED")


def model_name(data: DataParams) -> str:
    """Of the registered model: networks of one data set compete for its champion."""
    name = Path(data.path).name.partition(".")[0] if data.source == "folder" and data.path else ""
    return f"stdb-{name or data.source}"


def example(split: Samples) -> list[Any]:
    """The first image as (1, C, H, W), nested."""
    return split.take(torch.zeros(1, dtype=torch.int64)).images.tolist()


def threshold_scale(params: StdbParams, root: Path = Path()) -> float:
    """The scale that is asked for, or the one that evaluate_converted found."""
    if params.threshold_scale is not None:
        return params.threshold_scale
    return 1.0 if params.from_scratch else float(read_conversion(root).scale)


def train_loop(worker: Worker) -> None:
    """What each worker does: fine-tune, then look at the test split, once."""
    params = worker.params.stdb
    train, validation, test = (worker.split(name) for name in ("train", "validation", "test"))
    few = subset(train, params.images, params.seed)
    snn, state = fine_tune(worker, threshold_scale(params, worker.root), few, validation)
    correction = snn.output_correction
    for one in state["tuned"]:
        snn.net.load_state_dict(one["network"])
        snn.output_correction = correction
        one["logit_scale"] = sure_scale(worker, snn, validation, one["timesteps"])
        snn.scale_output(one["logit_scale"])
        one["test"] = vars(evaluate_snn(worker, snn, test, one["timesteps"], BATCH))
    last = params.last_timesteps
    longer = evaluate_snn(worker, snn, test, longest(last), BATCH)
    rows = diagnose(learned_ann(worker, snn, train), snn, validation, last)
    units = {name: neuron.unit for name, neuron in snn.neurons.items()}
    found = {"test": one["test"], "curve": longer.accuracy, "diagnosis": rows, "units": units}
    worker.checkpoint(state | found | {"correction": correction})


def sure_scale(
    worker: Worker, snn: stdb.SpikingNetwork, validation: Samples, timesteps: int
) -> float:
    """The output's factor with which softmax(U_T) is as sure as it is right; 1 where it learned so.

    Where U_t/t was trained, in the ANN's units, U_T is T times that: far too sure to leave early.
    """
    if not worker.params.stdb.in_units:
        return 1.0
    return fitting_logit_scale(worker, snn, validation, timesteps, BATCH)


def learned_ann(worker: Worker, snn: stdb.SpikingNetwork, train: Samples) -> nn.Module:
    """The ANN with the weights that were learned, which hold no units."""
    if snn.has_units:  # and no batch norm, so that the ANN that was trained has no place for them
        twin = copy.deepcopy(snn)
        stdb.release(twin)
        return twin
    ann = build_ann(worker.params.network, train)
    layers = ann.named_modules()
    bounds = {f"{name}.bound" for name, module in layers if isinstance(module, stdb.Clip)}
    if bounds and not worker.params.stdb.from_scratch:
        load_weights(ann, worker.path(ANN))  # the neurons have none that learn
    own, learned = ann.state_dict(), snn.net.state_dict()
    ann.load_state_dict({n: own[n] if n in bounds else learned[n] for n in own})
    return ann


if __name__ == "__main__":
    stage_command("finetune_stdb", main, __doc__)
