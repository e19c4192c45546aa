"""A stage's work as a Ray Train job: CPU workers with gloo, or one worker per GPU with nccl.

One worker on this machine needs no cluster and no process group: it is Ray Train's local mode, in
the stage's own process, which saves the seconds that Ray takes to start. Several workers start Ray
for the job and stop it after it; RAY_ADDRESS joins a running cluster instead. A job that loses a
worker or a node goes on from its last checkpoint: restarts are counted here and not by Ray, whose
own would count a worker's error, such as a wrong file, as well.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.command import print_on_any_terminal
from pipeline.environment import RAY, set_default_environment
from pipeline.errors import StageError
from pipeline.jobs.address import cluster_address
from pipeline.jobs.checkpoints import Checkpoints
from pipeline.jobs.choices import with_choices
from pipeline.jobs.cluster import check_nodes, on_one_machine, ray_cluster
from pipeline.jobs.failures import reason, worker_error, worker_lost
from pipeline.jobs.plan import Plan, machine, plan_workers
from pipeline.jobs.ray_private import file_group
from pipeline.jobs.worker import Row, State, Worker
from pipeline.params import Params
from pipeline.stage import Stage
from pipeline.tracking.tracker import Reporter

START_ATTEMPTS = 10  # to place the workers, a minute each: a node may have to be started
REPORT_EVERY = 3.0  # seconds; a report waits for Ray Train's controller
RESIZE_EVERY = 15.0  # seconds between looks at whether an elastic job can grow

Loop = Callable[[Worker], None]


@dataclass(frozen=True)
class Job:
    """What a process needs to become a worker; goes to it as a pickle.

    Attributes:
        params: all parameters.
        stage: name of the stage.
        checkpoints: where its state lives.
        plan: the workers.
        root: the repository.
        readers: processes of a worker that read image files.
        report_every: seconds between two reports.
    """

    params: Params
    stage: str
    checkpoints: Checkpoints
    plan: Plan
    root: Path
    readers: int = 0
    report_every: float = REPORT_EVERY

    def worker(self, log: Callable[[list[Row]], None] | None = None) -> Worker:
        """The worker that this process is, inside Ray Train; ``log`` gets its metrics, too."""
        import ray.train.torch

        print_on_any_terminal()
        torch.set_num_threads(self.plan.cpus)
        context = ray.train.get_context()

        def send(rows: list[Row]) -> None:
            if log is not None:
                log(rows)
            last = rows[-1] if rows else {}
            ray.train.report({"rows": rows, **last})

        worker = with_choices(
            Worker(
                self.params,
                self.stage,
                self.checkpoints,
                self.root,
                context.get_world_rank(),
                context.get_world_size(),
                ray.train.torch.get_device() if self.plan.use_gpu else torch.device("cpu"),
                self.readers,
                self.report_every,
                sharing=self.plan.sharing,
                send=send,
            )
        )
        use_precision(worker)
        return worker


def use_precision(worker: Worker) -> None:
    """Set the precision of a GPU's products, as chosen for the job."""
    if worker.device.type == "cuda":
        train_ann = worker.stage == "train_ann"
        products = worker.params.train_ann if train_ann else worker.params.stdb
        tf32 = products.precision != "float32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32


def run_job(stage: Stage, loop: Loop) -> State:
    """Run ``loop(worker)`` on every worker; returns the state that was kept last.

    Args:
        stage: names the job, and has its parameters and MLflow run.
        loop: calls :meth:`Worker.checkpoint` at least once.

    Raises:
        StageError: too few resources, or a worker failed in a way that a person can mend; the
            message is the worker's. Any other error of a worker comes as it is.
    """
    set_default_environment(RAY)
    cluster = stage.params.cluster
    checkpoints = Checkpoints(cluster.storage, stage.name, stage.key)
    address = cluster_address()
    if "://" not in cluster.storage:  # other repositories may have it, too
        stage.hold(Path(checkpoints.folder) / "lock", f"the job {checkpoints.job}")
    plan = None if address else plan_workers(cluster, *machine())
    if plan is not None and plan.workers == 1:
        _run_here(stage, loop, _job(stage, checkpoints, plan))
    else:
        with ray_cluster(address, stage.say) as available:
            plan = plan or plan_workers(cluster, *available, elastic=True)
            _run_on_ray(stage, loop, _job(stage, checkpoints, plan))
    state = checkpoints.load()
    if state is None:
        raise StageError("the job ended without a result")
    choices = state.pop("choices")
    stage.tracker.tags(choices)
    if choices:
        stage.say("auto: " + ", ".join(f"{key} {value}" for key, value in choices.items()))
    return state


def forget_job(stage: Stage) -> None:
    """Remove the checkpoints of a stage's job, now that its outs are written.

    They stay for a process that waits for this one, or will: dvc runs a stage again that outlived
    it, and then only its outs are written again.
    """
    if stage.runs_again:
        stage.say("its checkpoint stays, for the process that waits or since dvc was killed")
        return
    Checkpoints(stage.params.cluster.storage, stage.name, stage.key).remove()


def _job(stage: Stage, checkpoints: Checkpoints, plan: Plan) -> Job:
    asked = stage.params.cluster.readers
    readers = asked if asked != "auto" else min(8, max(1, plan.cpus // 2))
    # not files.root(): the copy of a queued DVC experiment has files of its own
    return Job(stage.params, stage.name, checkpoints, plan, Path.cwd(), readers)


def _run_here(stage: Stage, loop: Loop, job: Job) -> None:
    """One worker, in this process."""
    import ray.train
    from ray.train.torch import TorchTrainer

    for name in ("ray.train", "ray.air"):  # they would repeat every report
        logging.getLogger(name).setLevel(logging.WARNING)
    where = "a GPU" if job.plan.use_gpu else f"{job.plan.cpus} core(s)"
    stage.say(f"one worker, {where}")
    scaling = ray.train.ScalingConfig(num_workers=0, use_gpu=job.plan.use_gpu)
    TorchTrainer(lambda: loop(job.worker(stage.tracker.rows)), scaling_config=scaling).fit()


def _run_on_ray(stage: Stage, loop: Loop, job: Job) -> None:
    """Several workers, each a process; again from the last checkpoint where one was lost."""
    import ray.train

    check_nodes([str(path) for path in stage.handed_on], job.checkpoints)
    stage.say(f"Ray Train job on {job.plan}")
    restarts = stage.params.cluster.restarts
    for restart in range(restarts + 1):
        try:
            fit_on_ray(loop, job, _callback(stage.tracker.reporter()))
            return
        except ray.train.TrainingFailedError as error:
            if not worker_lost(error):
                raise worker_error(error) from error
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


def fit_on_ray(loop: Loop, job: Job, callback: Any) -> None:
    """Run a loop on the workers of a job; ``callback`` gets their reports."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    plan = job.plan
    gpu = {"GPU": 1} if plan.use_gpu else {}
    scaling: dict[str, Any] = {
        "num_workers": (plan.least, plan.workers) if plan.elastic else plan.workers,
        "use_gpu": plan.use_gpu,
        "resources_per_worker": {"CPU": plan.cpus, **gpu},
        "elastic_resize_monitor_interval_s": RESIZE_EVERY,
    }
    running: dict[str, Any] = {
        "name": job.checkpoints.job,
        "storage_path": job.checkpoints.storage,
        "callbacks": [callback],
        "logging_config": ray.train.LoggingConfig(log_level="ERROR"),
    }
    failure: dict[str, Any] = {"max_failures": 0, "controller_failure_limit": START_ATTEMPTS}
    backend = "nccl" if plan.use_gpu else "gloo"
    trainer = TorchTrainer(
        lambda: loop(job.worker()),
        torch_config=file_group(backend) if on_one_machine() else TorchConfig(backend=backend),
        scaling_config=ray.train.ScalingConfig(**scaling),
        run_config=ray.train.RunConfig(
            failure_config=ray.train.FailureConfig(**failure), **running
        ),
    )
    _in_thread(trainer.fit)


def _callback(reporter: Reporter) -> Any:
    import ray.train

    class Callback(ray.train.UserCallback):
        """Hands each report of the workers (the same on all of them) to the reporter."""

        def after_report(
            self,
            run_context: Any,  # noqa: ARG002 (Ray calls with keywords)
            metrics: list[dict[str, Any]],
            checkpoint: Any,  # noqa: ARG002
        ) -> None:
            reporter(metrics[0]["rows"])

    return Callback()


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
