"""A stage's work as a Ray Train job: CPU workers with gloo, or one worker per GPU with nccl.

One worker on this machine needs no cluster and no process group: it is Ray Train's local mode, in
the stage's own process, which saves the seconds that Ray takes to start. Several workers start Ray
for the job and stop it after it; RAY_ADDRESS joins a running cluster instead. A job that loses a
worker or a node goes on from its last checkpoint.
"""

import logging
import os
import signal
import tempfile
import threading
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
START_ATTEMPTS = 10  # to place the workers, a minute each: a node may have to be started
REPORT_EVERY = 3.0  # seconds; a report waits for Ray Train's controller
RESIZE_EVERY = 15.0  # seconds between looks at whether an elastic job can grow

Loop = Callable[[dict[str, Any]], None]
Row = dict[str, float]  # the metrics of an epoch


class Plan(NamedTuple):
    """The workers of a job: how many, whether each has a GPU, and the cores of each.

    On a cluster an elastic job has from ``least`` to ``workers`` of them.
    """

    workers: int
    least: int
    use_gpu: bool
    cpus: int


class _Job:
    """The job that this process works for: a worker's, or the stage's own in local mode."""

    checkpoints: Checkpoints
    checkpoint_steps: int | None = None
    rank: int = 0
    report_every: float = 0.0  # seconds
    send: Callable[[list[Row]], None]  # to whoever watches the job
    log: Callable[[list[Row]], None] | None = None  # in local mode; otherwise the controller has it


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
    prefer(ENVIRONMENT)
    cluster = stage.params.cluster
    checkpoints = Checkpoints(cluster.storage, stage.name, stage.key)
    config = config | {
        "checkpoints": checkpoints,
        "checkpoint_steps": cluster.checkpoint_steps,
    }
    address = os.environ.get("RAY_ADDRESS")
    plan = None if address else plan_workers(cluster, *machine())
    if plan is not None and plan.workers == 1:
        _run_here(stage, loop, plan, _settings(config, cluster, plan))
    else:
        with ray_cluster(address) as available:
            plan = plan or plan_workers(cluster, *available, elastic=True)
            _run_on_ray(stage, loop, plan, _settings(config, cluster, plan))
    state = checkpoints.load()
    if state is None:
        raise StageError("the job ended without a result")
    return state


def prefer(settings: dict[str, str]) -> None:
    """Set environment variables that the user has not set."""
    for key, value in settings.items():
        os.environ.setdefault(key, value)


def _settings(config: dict[str, Any], cluster: ClusterParams, plan: Plan) -> dict[str, Any]:
    """What a worker needs to know, besides the stage's own."""
    readers = cluster.readers if cluster.readers != "auto" else min(8, max(1, plan.cpus // 2))
    return config | {"use_gpu": plan.use_gpu, "cpus": plan.cpus, "readers": readers}


def _run_here(stage: Stage, loop: Loop, plan: Plan, config: dict[str, Any]) -> None:
    """One worker, in this process."""
    import ray.train
    from ray.train.torch import TorchTrainer

    for name in ("ray.train", "ray.air"):  # they would repeat every report
        logging.getLogger(name).setLevel(logging.WARNING)
    where = "a GPU" if plan.use_gpu else f"{plan.cpus} core(s)"
    stage.say(f"one worker, {where}")
    _job.log = stage.tracker.rows
    try:
        TorchTrainer(
            loop,
            train_loop_config=config,
            scaling_config=ray.train.ScalingConfig(num_workers=0, use_gpu=plan.use_gpu),
        ).fit()
    except ValueError as error:
        raise StageError(str(error)) from error
    finally:
        _job.log = None


def _run_on_ray(stage: Stage, loop: Loop, plan: Plan, config: dict[str, Any]) -> None:
    """Several workers, each a process; again from the last checkpoint where one was lost."""
    import ray.train

    inputs = [config[key] for key in ("data", "weights", "thresholds") if key in config]
    check_nodes(inputs, config["checkpoints"])
    count = str(plan.workers) if plan.least == plan.workers else f"{plan.least} to {plan.workers}"
    kind = "GPU worker(s)" if plan.use_gpu else f"CPU worker(s) × {plan.cpus} core(s)"
    stage.say(f"Ray Train job on {count} {kind}")
    restarts = stage.params.cluster.restarts
    for restart in range(restarts + 1):
        try:
            fit_on_ray(loop, plan, config, _callback(Reporter(stage.tracker.run_id)))
            return
        except ray.train.TrainingFailedError as error:
            if not worker_lost(error):
                raise StageError(reason(error)) from error
            if restart == restarts:
                raise StageError(
                    f"workers were lost {restart + 1} times, the last one with: {reason(error)}; "
                    "where it is the memory that is short, a smaller stdb.micro_batch or "
                    "batch_size helps; dvc repro goes on from the last checkpoint"
                ) from error
            stage.say(
                f"a worker was lost ({reason(error).splitlines()[0]}); on from the last "
                f"checkpoint, restart {restart + 1} of {restarts}"
            )


def fit_on_ray(loop: Loop, plan: Plan, config: dict[str, Any], callback: Any) -> None:
    """Run ``loop(config)`` on the workers of ``plan``; ``callback`` gets their reports."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    elastic = plan.least < plan.workers
    gpu = {"GPU": 1} if plan.use_gpu else {}
    scaling: dict[str, Any] = {
        "num_workers": (plan.least, plan.workers) if elastic else plan.workers,
        "use_gpu": plan.use_gpu,
        "resources_per_worker": {"CPU": plan.cpus, **gpu},
        "elastic_resize_monitor_interval_s": RESIZE_EVERY,
    }
    failure: dict[str, Any] = {"max_failures": 0, "controller_failure_limit": START_ATTEMPTS}
    running: dict[str, Any] = {
        "name": config["checkpoints"].job,
        "storage_path": config["checkpoints"].storage,
        "callbacks": [callback],
        "logging_config": ray.train.LoggingConfig(log_level="ERROR"),
    }
    trainer = TorchTrainer(
        loop,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if plan.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(**scaling),
        run_config=ray.train.RunConfig(
            failure_config=ray.train.FailureConfig(**failure), **running
        ),
    )
    _in_thread(trainer.fit)


def _in_thread(work: Callable[[], Any]) -> None:
    """Run ``work`` aside, so that ctrl-C and SIGTERM end this function as they end others.

    In the main thread Ray Train would take ctrl-C itself, and end the process without a word.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)  # signals are looked at in between
    if raised:
        raise raised[0]


def forget_job(stage: Stage) -> None:
    """Remove the checkpoints of a stage's job, now that its outs are written."""
    Checkpoints(stage.params.cluster.storage, stage.name, stage.key).remove()


# -- inside a worker -------------------------------------------------------------------------------


def setup(
    config: dict[str, Any], report_every: float = REPORT_EVERY
) -> tuple[int, int, torch.device]:
    """Rank, number of workers and device of this worker; its threads are set."""
    import ray.train.torch

    torch.set_num_threads(config["cpus"])
    if config["use_gpu"]:
        products = config.get("stdb") or config.get("train_ann") or {}
        tf32 = products.get("precision") != "float32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    context = ray.train.get_context()

    def send(rows: list[Row]) -> None:
        if _job.log is not None:
            _job.log(rows)
        last = rows[-1] if rows else {}
        ray.train.report({"rows": rows, **last})

    work_for(config["checkpoints"], config["checkpoint_steps"], context.get_world_rank(), send)
    _job.report_every = report_every
    device = ray.train.torch.get_device() if config["use_gpu"] else torch.device("cpu")
    return context.get_world_rank(), context.get_world_size(), device


def work_for(
    checkpoints: Checkpoints,
    checkpoint_steps: int | None,
    rank: int,
    send: Callable[[list[Row]], None],
) -> None:
    """Make this process a worker of a job; ``send`` is called with the metrics of every epoch."""
    _job.checkpoints, _job.checkpoint_steps = checkpoints, checkpoint_steps
    _job.rank, _job.report_every, _job.send = rank, 0.0, send


def data_parallel(network: nn.Module) -> nn.Module:
    """The network wrapped by DDP where there are several workers."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return network
    from ray.train.torch import prepare_model

    return prepare_model(network, move_to_device=False)


def report(state: dict[str, Any], rows: Sequence[Row] = ()) -> None:
    """Keep the state to go on from, log metrics, a row an epoch. Called by all workers alike."""
    if _job.rank == 0:
        _job.checkpoints.save(state)
    _job.send(list(rows))


def report_due(seconds: float) -> bool:
    """Whether so long after the last report there is to be one; short epochs share one."""
    return seconds > _job.report_every


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
def ray_cluster(
    address: str | None, *, dashboard: bool = False, logs: bool = True
) -> Iterator[tuple[int, int]]:
    """Ray, joined or started; gives its CPUs and GPUs. What was started leaves nothing behind."""
    import ray

    prefer(ENVIRONMENT)
    with tempfile.TemporaryDirectory(
        prefix="ray-", dir=_short_folder(), ignore_cleanup_errors=True
    ) as folder:
        handler = signal.getsignal(signal.SIGTERM)  # Ray's own would end the process
        ray.init(
            address=address or "local",
            include_dashboard=None if address else dashboard,
            logging_level=logging.ERROR,
            log_to_driver=logs,
            _temp_dir=None if address else folder,
        )
        signal.signal(signal.SIGTERM, handler)
        try:
            available = ray.cluster_resources()
            yield int(available.get("CPU", 0)), int(available.get("GPU", 0))
        finally:
            ray.shutdown()


def _short_folder() -> str:
    """Where Ray's sockets can be: the system allows them a path of 107 characters."""
    folder = tempfile.gettempdir()
    return folder if len(folder) < 24 else "/tmp"


def check_nodes(inputs: list[str], checkpoints: Checkpoints) -> None:
    """On several nodes, each has to see the repository's files and the checkpoints.

    Raises:
        StageError: names a node and what it does not see.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return

    def unseen(places: list[str]) -> list[str]:  # sent by value: a node may not have this code
        from pyarrow import fs

        def there(place: str) -> bool:
            here = fs.LocalFileSystem(), place
            system, path = fs.FileSystem.from_uri(place) if "://" in place else here
            return system.get_file_info(path).type != fs.FileType.NotFound

        return [place for place in places if not there(place)]

    with checkpoints.mark() as mark:
        task = ray.remote(num_cpus=0)(unseen)
        answers = [
            task.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote([mark, *inputs])
            for node in nodes
        ]
        for node, missing in zip(nodes, ray.get(answers), strict=True):
            for place in missing:
                name = node["NodeManagerAddress"]
                if place == mark:
                    raise StageError(
                        f"node {name} does not see cluster.storage, {checkpoints.storage}; allowed "
                        f"on {len(nodes)} nodes: a folder on a disk that all of them mount, such "
                        "as NFS, or a URL such as s3://bucket/folder"
                    )
                raise StageError(
                    f"node {name} does not see {place}; on {len(nodes)} nodes the repository has "
                    "to be on a disk that all of them mount at the same path, such as NFS"
                )


def machine() -> tuple[int, int]:
    """CPUs that this process may use (affinity and container limits counted) and GPUs."""
    import joblib

    return joblib.cpu_count(), torch.cuda.device_count()


def plan_workers(params: ClusterParams, cpus: int, gpus: int, *, elastic: bool = False) -> Plan:
    """The workers for what a machine or a cluster has.

    Args:
        params: what is asked for.
        cpus: there are.
        gpus: there are.
        elastic: a range stays one; otherwise it is as many as there is room for.

    Raises:
        StageError: ``cluster`` asks for more than there is.
    """
    if params.use_gpu is True and gpus == 0:
        raise StageError("cluster.use_gpu is true and there is no GPU; allowed here: auto, false")
    use_gpu = gpus > 0 if params.use_gpu == "auto" else params.use_gpu
    if isinstance(params.workers, list):
        least, workers = params.workers
    elif params.workers == "auto":
        workers = gpus if use_gpu else 1
        least = workers if elastic else 1
    else:
        least = workers = params.workers
    if use_gpu and least > gpus:
        raise StageError(
            f"cluster.workers is {params.workers}; there are {gpus} GPUs, one for each worker"
        )
    if not elastic:
        workers = max(least, min(workers, gpus if use_gpu else cpus))
    each = max(1, cpus // workers) if params.cpus_per_worker == "auto" else params.cpus_per_worker
    if least * each > cpus:
        raise StageError(
            f"cluster.workers is {params.workers}, with {each} core(s) each; there are {cpus} cores"
        )
    if not elastic:
        least = workers = min(workers, cpus // each)
    return Plan(workers, least, use_gpu, each)


def worker_lost(error: Exception) -> bool:
    """Whether a job failed since a worker, its node or a connection was lost, not by an error."""
    failures = getattr(error, "worker_failures", None) or {}
    return bool(failures) and all(_is_loss(_cause(failure)) for failure in failures.values())


def _is_loss(cause: BaseException) -> bool:
    from ray.exceptions import RayError

    broken = isinstance(cause, RuntimeError) and any(
        word in str(cause).lower() for word in ("gloo", "nccl", "connection")
    )
    ray_trains = type(cause).__module__.startswith("ray.train")
    return broken or ray_trains or isinstance(cause, RayError | dist.DistError)


def _callback(reporter: Reporter) -> Any:
    import ray.train

    class Callback(ray.train.UserCallback):
        """Hands each report of the workers (the same on all of them) to the reporter."""

        def after_report(self, run_context: Any, metrics: list[dict], checkpoint: Any) -> None:
            reporter(metrics[0]["rows"])

    return Callback()


def _cause(error: Exception) -> BaseException:
    """The worker's own exception, out of what Ray wraps around it."""
    failures = getattr(error, "worker_failures", None)
    cause: BaseException = next(iter(failures.values())) if failures else error
    while True:
        inner = (
            getattr(cause, "cause", None) or getattr(cause, "_base_exc", None) or cause.__cause__
        )
        if not isinstance(inner, BaseException):
            return cause
        cause = inner


def reason(error: Exception) -> str:
    """The message of a worker's own exception."""
    cause = _cause(error)
    text = str(cause).strip() or type(cause).__name__
    return text if isinstance(cause, ValueError | StageError) else f"{type(cause).__name__}: {text}"
