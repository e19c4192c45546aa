"""A stage's work as a Ray Train job: CPU workers with gloo, or one worker per GPU with nccl.

RAY_ADDRESS joins a running cluster; without it Ray is started for the job and stopped after it.
A job's checkpoints live in ``cluster.storage``, in a folder named by the stage and the hash of its
parameters and inputs: a job that was interrupted goes on from its last report when it is run again,
and a changed parameter starts afresh. They are removed when the stage has written its outs.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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
STATE = "state.pt"


def run_job(stage: Stage, loop: Callable[[dict[str, Any]], None], config: dict[str, Any]) -> dict:
    """Run ``loop(config)`` on every worker; returns the state that it reported last.

    Args:
        stage: names the job, and has its parameters and MLflow run.
        loop: calls :func:`report` at least once.
        config: plain values; ``cpus`` (threads of a worker) is added.

    Raises:
        StageError: too few resources, or a worker failed; the message is the worker's.
    """
    set_environment()
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    with _ray():
        workers, use_gpu, cpus = _resources(stage.params.cluster, ray.cluster_resources())
        where = (
            f"{workers} GPU worker(s)" if use_gpu else f"{workers} CPU worker(s) × {cpus} core(s)"
        )
        stage.say(f"Ray Train job on {where}")
        storage = _storage(stage.params.cluster)
        name = f"{stage.name}-{stage.key}"
        trainer = TorchTrainer(
            loop,
            train_loop_config=config | {"cpus": cpus},
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": cpus} if not use_gpu else {"CPU": cpus, "GPU": 1},
            ),
            run_config=ray.train.RunConfig(  # type: ignore[call-arg]
                name=name,
                storage_path=storage,
                callbacks=[_callback(Reporter(stage.tracker.run_id))],
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise StageError(_reason(error)) from error
        if result.checkpoint is None:
            raise StageError("the job ended without a result")
        with result.checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / STATE, weights_only=True, map_location="cpu")
    return state


def set_environment() -> None:
    """Ray's settings, before it is imported; what the user has set stays."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)


def forget_job(stage: Stage) -> None:
    """Remove the checkpoints of a stage's jobs, now that its outs are written."""
    storage = Path(stage.params.cluster.storage)
    if storage.is_dir():
        for folder in storage.glob(f"{stage.name}-*"):
            shutil.rmtree(folder, ignore_errors=True)


# -- inside a worker -------------------------------------------------------------------------------


def setup(config: dict[str, Any]) -> tuple[int, int, torch.device]:
    """Rank, number of workers and device of this worker; its threads are set."""
    import ray.train.torch

    torch.set_num_threads(config["cpus"])
    context = ray.train.get_context()
    return context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device()


def report(state: dict[str, Any], rows: Sequence[dict[str, float]] = ()) -> None:
    """Report the state to go on from, and metrics, a row an epoch. Called by all workers alike."""
    import ray.train

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if ray.train.get_context().get_world_rank() == 0:
            torch.save(state, Path(folder) / STATE)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({"rows": list(rows)}, checkpoint=checkpoint)


def resume(device: torch.device) -> dict[str, Any] | None:
    """The state that an interrupted run of this job reported last, or None."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return torch.load(Path(folder) / STATE, weights_only=True, map_location=device)


def total(value: Tensor, op: str = "sum") -> Tensor:
    """Sum or maximum over all workers."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    return value


# -- outside ---------------------------------------------------------------------------------------


@contextmanager
def _ray() -> Iterator[None]:
    import ray

    address = os.environ.get("RAY_ADDRESS")
    ray.init(
        address=address or "local",
        include_dashboard=None if address else False,
        logging_level=logging.ERROR,
        log_to_driver=True,
    )
    try:
        yield
    finally:
        ray.shutdown()


def _resources(params: ClusterParams, available: dict[str, float]) -> tuple[int, bool, int]:
    """Workers, whether each has a GPU, and cores of each; an error if there are not so many."""
    cpus, gpus = int(available.get("CPU", 0)), int(available.get("GPU", 0))
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
    return workers, use_gpu, each


def _storage(params: ClusterParams) -> str:
    if "://" in params.storage:
        return params.storage
    return str(Path(params.storage).resolve())


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
