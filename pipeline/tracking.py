"""MLflow: one run per execution of a stage. A view only; no stage reads anything back from it.

The tracking server, its credentials and the artefact store are MLflow's own environment variables;
without them everything is in mlflow.db and mlartifacts/ at the root of the repository. Where MLflow
cannot be reached, that is said once and the work goes on.
"""

import os
import re
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

EXPERIMENT = "stdb"
GENERATED = ("dvc.lock", "metrics", "plots", "report")  # what a run itself changes in git's eyes

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# MLflow's own 7 retries of 120 s each would hold up every stage for minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")


def root() -> Path:
    """The repository, also from within the temporary copy of a queued DVC experiment."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


def tracking_uri() -> str:
    """Where runs go."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root() / 'mlflow.db'}"


def provenance() -> dict[str, str]:
    """Tags that lead from a run to the code and to DVC."""

    def git(*command: str) -> str:
        result = subprocess.run(["git", *command], capture_output=True, text=True, check=False)
        return result.stdout.strip()

    changed = git("status", "--porcelain", "--", ".", *(f":!{path}" for path in GENERATED))
    return {
        "git.commit": git("rev-parse", "HEAD") or "none",
        "git.dirty": str(bool(changed)).lower(),
        "dvc.stage": os.environ.get("DVC_STAGE", "none"),
        "dvc.experiment": os.environ.get("DVC_EXP_NAME", "workspace"),
    }


class Tracker:
    """The MLflow run of a stage."""

    def __init__(
        self, stage: str, params: dict[str, Any], inputs: dict[str, str], key: str
    ) -> None:
        self.run_id: str | None = None
        self.warned = False
        self._client: Any = None
        self._guard(lambda: self._start(stage, params, inputs, key))

    def _start(self, stage: str, params: dict[str, Any], inputs: dict[str, str], key: str) -> None:
        import logging

        import mlflow

        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._client = mlflow.MlflowClient(tracking_uri=tracking_uri())
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        if experiment is not None:
            experiment_id = experiment.experiment_id
        elif tracking_uri().startswith("sqlite"):
            experiment_id = self._client.create_experiment(
                EXPERIMENT, artifact_location=(root() / "mlartifacts").as_uri()
            )
        else:
            experiment_id = self._client.create_experiment(EXPERIMENT)
        tags = provenance() | {"job": f"{stage}-{key}", "process": _this_process()}
        self.run_id = self._unfinished_run(experiment_id, tags)
        if self.run_id is not None:
            self._client.update_run(self.run_id, status="RUNNING")
            self._client.set_tag(self.run_id, "process", tags["process"])
            self._client.set_tag(self.run_id, "interrupted", "false")
            return
        tags |= {f"input.{path}": value for path, value in inputs.items()}
        run = self._client.create_run(experiment_id, run_name=stage, tags=tags)
        self.run_id = run.info.run_id
        entries = [mlflow.entities.Param(key, str(value)) for key, value in params.items()]
        self._client.log_batch(self.run_id, params=entries)

    def _unfinished_run(self, experiment_id: str, tags: dict[str, str]) -> str | None:
        """The run of this job that was interrupted, to go on in.

        A kill leaves it RUNNING; those of other jobs are closed.
        """
        found = None
        running = self._client.search_runs([experiment_id], "attributes.status = 'RUNNING'")
        stopped = self._client.search_runs([experiment_id], "tags.interrupted = 'true'")
        for run in [*running, *stopped]:
            if run.info.status == "RUNNING" and not _is_gone(run.data.tags.get("process", "")):
                continue
            same = all(run.data.tags.get(k) == tags[k] for k in ("job", "dvc.experiment"))
            if same and found is None:
                found = run.info.run_id
            elif run.info.status == "RUNNING":
                self._client.set_terminated(run.info.run_id, "FAILED")
        return found

    def log(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Metrics, in one batch."""
        self._guard(
            lambda: self._client.log_batch(self.run_id, metrics=_entities(metrics, step or 0))
        )

    def figure(self, path: Path) -> None:
        """A file as an artefact."""
        self._guard(lambda: self._client.log_artifact(self.run_id, str(path)))

    def end(self, status: str, interrupted: bool = False) -> None:
        """Close the run: FINISHED or FAILED; the next attempt goes on in an interrupted one."""
        if interrupted:
            self._guard(lambda: self._client.set_tag(self.run_id, "interrupted", "true"))
        self._guard(lambda: self._client.set_terminated(self.run_id, status))

    def _guard(self, action: Callable[[], None]) -> None:
        """MLflow is a view: its failure is said once and stops nothing."""
        if self.warned:
            return
        try:
            action()
        except Exception as error:
            self.warned = True
            text = f"MLflow at {tracking_uri()} does not answer, going on without: {error}"
            print(f"warning: {without_secrets(text)}")


def without_secrets(text: str) -> str:
    """A text without the user names and passwords of the addresses in it."""
    return re.sub(r"(://)[^/@\s]+@", r"\1***@", text)


def _this_process() -> str:
    """Names this process on this machine, also against a later one with the same number."""
    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time():.0f}"


def _is_gone(process: str) -> bool:
    """Whether a process of this machine has ended; of another machine nobody knows."""
    host, _, rest = process.partition(" ")
    number, _, created = rest.partition(" ")
    if host != socket.gethostname():
        return False
    try:
        return f"{psutil.Process(int(number)).create_time():.0f}" != created
    except psutil.NoSuchProcess:
        return True


def _entities(metrics: dict[str, float], step: int) -> list:
    """MLflow's form of metrics."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [Metric(key, float(value), now, step) for key, value in metrics.items()]


class Reporter:
    """Logs what a job's workers report, epoch by epoch; runs in Ray Train's controller.

    A plain function of a run id, so that it can be sent there; ``pipeline.distributed`` makes it a
    callback of Ray's.
    """

    def __init__(self, run_id: str | None) -> None:
        self.run_id, self.uri = run_id, tracking_uri()
        self._client: Any = None

    def __call__(self, rows: list[dict[str, float]]) -> None:
        """Log the metrics of a report, a row an epoch; ``epoch`` is the step."""
        if self.run_id is None or not rows:
            return
        try:
            if self._client is None:
                import mlflow

                self._client = mlflow.MlflowClient(tracking_uri=self.uri)
            entries = []
            for row in rows:
                values = {key: value for key, value in row.items() if key != "epoch"}
                entries += _entities(values, int(row["epoch"]))
            for start in range(0, len(entries), 1000):  # MLflow's limit for a batch
                batch = entries[start : start + 1000]
                self._client.log_batch(self.run_id, metrics=batch)
        except Exception as error:
            text = f"MLflow at {self.uri} did not take a report: {error}"
            print(f"warning: {without_secrets(text)}")
            self.run_id = None
