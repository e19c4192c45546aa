"""One trial of a sweep: STDB from the balanced network with the values that were drawn.

It learns and is judged as finetune_stdb does, on the training and validation splits alone: a sweep
never reads the test split.
"""

import math
from pathlib import Path
from typing import Any

import torch

from pipeline.balance_thresholds import converted
from pipeline.checkpoints import Checkpoints
from pipeline.data import load_splits, some
from pipeline.distributed import Plan, Row, fit_on_ray, report, setup, work_for
from pipeline.evaluate_converted import best_scale
from pipeline.evaluation import Evaluation
from pipeline.finetune_stdb import fine_tune
from pipeline.params import EvaluateConvertedParams, NetworkParams, StdbParams
from pipeline.sweep_params import settings
from pipeline.training import order


def run_trial(sample: dict[str, Any], given: dict[str, Any]) -> None:
    """A trial: in this process, or as a Ray Train job of its own where it has several workers.

    Args:
        sample: name → the value that was drawn.
        given: what all trials have in common.
    """
    import ray.tune
    from ray.tune.integration.ray_train import TuneReportCallback

    name = ray.tune.get_context().get_trial_id()
    checkpoints = Checkpoints(given["storage"], "trial", name)
    params = settings(sample, StdbParams(**given["stdb"]))
    config = given | {"stdb": params.model_dump(), "checkpoints": checkpoints}
    workers, use_gpu = given["workers"], given["use_gpu"]
    if workers > 1:
        plan = Plan(workers, workers, use_gpu, given["cpus"])
        fit_on_ray(search_loop, plan, config, TuneReportCallback())
        return
    torch.set_num_threads(given["cpus"])

    def send(rows: list[Row]) -> None:
        for row in rows:
            ray.tune.report(row)

    work_for(checkpoints, given["checkpoint_steps"], 0, send)
    learn(config, 0, 1, torch.device("cuda" if use_gpu else "cpu"))


def search_loop(config: dict[str, Any]) -> None:
    """What each worker of a trial does, where there are several."""
    learn(config, *setup(config, report_every=0.0))


def learn(config: dict[str, Any], rank: int, world: int, device: torch.device) -> None:
    """Fine-tune at the trial's parameters, and at the threshold scale that is best for its T."""
    params = StdbParams(**config["stdb"])
    train, validation = load_splits(
        Path(config["data"]), device, "train", "validation", readers=config["readers"]
    )
    train = some(train, config["train_images"] or params.images, config["seed"])
    network, weights, thresholds = (config[key] for key in ("network", "weights", "thresholds"))
    _, snn = converted(NetworkParams(**network), params, train, Path(weights), Path(thresholds))
    shapes = snn.shapes(train.shape)
    neurons = sum(math.prod(shapes[i]) for i in snn.graph.labels)
    images = sum(map(len, order(len(train), params.batch_size, params.seed, 1)))
    steps = images * params.timesteps * neurons

    validated: list[int] = []

    def extra(epoch: int, found: Evaluation) -> dict[str, float]:
        validated.append(epoch)
        return {
            "timesteps": params.timesteps,
            "neuron_steps": epoch * float(steps),
            "energy_delay": found.energy * params.timesteps,
            "spikes": sum(found.spikes.values()),
        }

    scale = 1.0 if params.from_scratch else params.threshold_scale
    if scale is None:
        evaluation = EvaluateConvertedParams(**config["evaluate_converted"])
        scale = best_scale(snn.to(device), validation, params.timesteps, evaluation, rank, world)
    _, state = fine_tune(config | {"scale": scale}, train, validation, rank, world, device, extra)
    if not validated:  # killed after its last epoch, before anybody noted that it was done
        report(state, state["history"][-1:])
