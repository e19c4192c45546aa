"""A stage's work as a Ray Train job: CPU workers with gloo, or one worker per GPU with nccl.

One worker on this machine needs no cluster and no process group: it is Ray Train's local mode, in
the stage's own process, which saves the seconds that Ray takes to start. Several workers start Ray
for the job and stop it after it; RAY_ADDRESS joins a running cluster instead.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.checkpoints import Checkpoints
from pipeline.params import ClusterParams
from pipeline.stage import Stage, StageError
from pipeline.tracking import Reporter

# Ray's settings, where the user has none: quick reports, no line twice, tame logs.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_DEDUP_LOGS_ALLOW_REGEX": r"^\[",  # the stages' own lines come at once
    "RAY_DEDUP_LOGS_SKIP_REGEX": "Failed to query Ray Train|Reporting training result",
    "RAY_COLOR_PREFIX": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


Loop = Callable[[dict[str, Any]], None]


class Plan(NamedTuple):
    """The workers of a job: how many, whether each has a GPU, and the cores of each."""

    workers: int
    use_gpu: bool
    cpus: int


class _Job:
    """The job that this process works for: a worker's, or the stage's own in local mode."""

    checkpoints: Checkpoints
    checkpoint_steps: int | None = None
    reporter: Reporter | None = None  # in local mode; otherwise Ray Train's controller has it


_job = _Job()


def run_job(stage: Stage, loop: Loop, config: dict[str, Any]) -> dict:
    """Run ``loop(config)`` on every worker; returns the state that it reported last.

    Args:
        stage: names the job, and has its parameters and MLflow run.
        loop: calls :func:`setup` first, and :func:`report` at least once.
        config: plain values; what :func:`setup` needs is added.

    Raises:
        StageError: too few resources, or a worker failed; the message is the worker's.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    cluster = stage.params.cluster
    checkpoints = Checkpoints(cluster.storage, stage.name, stage.key)
    config = config | {
        "checkpoints": checkpoints,
        "checkpoint_steps": cluster.checkpoint_steps,
    }
    address = os.environ.get("RAY_ADDRESS")
    plan = None if address else plan_workers(cluster, *machine())
    if plan is not None and plan.workers == 1:
        _run_here(stage, loop, config | plan._asdict())
    else:
        with _ray(address) as available:
            plan = plan or plan_workers(cluster, *available)
            _run_on_ray(stage, loop, config | plan._asdict())
    state = checkpoints.load()
    if state is None:
        raise StageError("the job ended without a result")
    return state


def _run_here(stage: Stage, loop: Loop, config: dict[str, Any]) -> None:
    """One worker, in this process."""
    import ray.train
    from ray.train.torch import TorchTrainer

    for name in ("ray.train", "ray.air"):  # they would repeat every report
        logging.getLogger(name).setLevel(logging.WARNING)
    where = "a GPU" if config["use_gpu"] else f"{config['cpus']} core(s)"
    stage.say(f"one worker, {where}")
    _job.reporter = Reporter(stage.tracker.run_id)
    try:
        TorchTrainer(
            loop,
            train_loop_config=config,
            scaling_config=ray.train.ScalingConfig(num_workers=0, use_gpu=config["use_gpu"]),
        ).fit()
    except ValueError as error:
        raise StageError(str(error)) from error
    finally:
        _job.reporter = None


def _run_on_ray(stage: Stage, loop: Loop, config: dict[str, Any]) -> None:
    """Several workers, each a process."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    workers, use_gpu, cpus = (config[key] for key in Plan._fields)
    what = f"{workers} GPU worker(s)" if use_gpu else f"{workers} CPU worker(s) × {cpus} core(s)"
    stage.say(f"Ray Train job on {what}")
    trainer = TorchTrainer(
        loop,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus} if not use_gpu else {"CPU": cpus, "GPU": 1},
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name=config["checkpoints"].job,
            storage_path=config["checkpoints"].storage,
            callbacks=[_callback(Reporter(stage.tracker.run_id))],
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise StageError(_reason(error)) from error


def forget_job(stage: Stage) -> None:
    """Remove the checkpoints of a stage's job, now that its outs are written."""
    Checkpoints(stage.params.cluster.storage, stage.name, stage.key).remove()


# -- inside a worker -------------------------------------------------------------------------------


def setup(config: dict[str, Any]) -> tuple[int, int, torch.device]:
    """Rank, number of workers and device of this worker; its threads are set."""
    import ray.train.torch

    _job.checkpoints = config["checkpoints"]
    _job.checkpoint_steps = config["checkpoint_steps"]
    torch.set_num_threads(config["cpus"])
    if config["use_gpu"]:
        tf32 = config.get("stdb", {}).get("precision") != "float32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    context = ray.train.get_context()
    device = ray.train.torch.get_device() if config["use_gpu"] else torch.device("cpu")
    return context.get_world_rank(), context.get_world_size(), device


def data_parallel(network: nn.Module) -> nn.Module:
    """The network wrapped by DDP where there are several workers."""
    from ray.train.torch import prepare_model

    return prepare_model(network, move_to_device=False)


def report(state: dict[str, Any], rows: Sequence[dict[str, float]] = ()) -> None:
    """Keep the state to go on from, log metrics, a row an epoch. Called by all workers alike."""
    import ray.train

    if ray.train.get_context().get_world_rank() == 0:
        _job.checkpoints.save(state)
    if _job.reporter is not None:
        _job.reporter(list(rows))
    ray.train.report({"rows": list(rows)})


def checkpoint_due(step: int) -> bool:
    """Whether the state is to be kept after this step of an epoch."""
    return _job.checkpoint_steps is not None and step % _job.checkpoint_steps == 0


def resume(device: torch.device) -> dict[str, Any] | None:
    """The state that an interrupted run of this job reported last, or None."""
    return _job.checkpoints.load(device)


def total(value: Tensor, op: str = "sum") -> Tensor:
    """Sum or maximum over all workers."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    return value


# -- outside ---------------------------------------------------------------------------------------


@contextmanager
def _ray(address: str | None) -> Iterator[tuple[int, int]]:
    """Ray, joined or started; gives its CPUs and GPUs."""
    import ray

    ray.init(
        address=address or "local",
        include_dashboard=None if address else False,
        logging_level=logging.ERROR,
        log_to_driver=True,
    )
    try:
        available = ray.cluster_resources()
        yield int(available.get("CPU", 0)), int(available.get("GPU", 0))
    finally:
        ray.shutdown()


def machine() -> tuple[int, int]:
    """CPUs that this process may use (affinity and container limits counted) and GPUs."""
    import joblib

    return joblib.cpu_count(), torch.cuda.device_count()


def plan_workers(params: ClusterParams, cpus: int, gpus: int) -> Plan:
    """The workers for what a machine or a cluster has.

    Raises:
        StageError: ``cluster`` asks for more than there is.
    """
    if params.use_gpu is True and gpus == 0:
        raise StageError("cluster.use_gpu is true and there is no GPU; allowed here: auto, false")
    use_gpu = gpus > 0 if params.use_gpu == "auto" else params.use_gpu
    workers = (gpus if use_gpu else 1) if params.workers == "auto" else params.workers
    if use_gpu and workers > gpus:
        raise StageError(
            f"cluster.workers is {workers}; there are {gpus} GPUs, one for each worker"
        )
    each = max(1, cpus // workers) if params.cpus_per_worker == "auto" else params.cpus_per_worker
    if workers * each > cpus:
        raise StageError(
            f"cluster.workers is {workers}, with {each} core(s) each; there are {cpus} cores"
        )
    return Plan(workers, use_gpu, each)


def _callback(reporter: Reporter) -> Any:
    import ray.train

    class Callback(ray.train.UserCallback):
        """Hands each report of the workers (the same on all of them) to the reporter."""

        def after_report(self, run_context: Any, metrics: list[dict], checkpoint: Any) -> None:
            reporter(metrics[0]["rows"])

    return Callback()


def _reason(error: Exception) -> str:
    """The message of the worker's own exception, out of what Ray wraps around it."""
    failures = getattr(error, "worker_failures", None)
    cause: BaseException = next(iter(failures.values())) if failures else error
    while True:
        inner = getattr(cause, "cause", None) or cause.__cause__
        if inner is None:
            break
        cause = inner
    text = str(cause).strip() or type(cause).__name__
    return text if isinstance(cause, ValueError | StageError) else f"{type(cause).__name__}: {text}"
