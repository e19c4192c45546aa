"""MLflow: a run for each execution of the pipeline, and in it one for each stage that really ran.

A view only: no stage reads anything back from it.

The tracking server, its credentials and the artefact store are MLflow's own environment variables;
without them everything is in mlflow.db and mlartifacts/ at the root of the repository. Where MLflow
cannot be reached, that is said once and the work goes on.
"""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import psutil

EXPERIMENT = "stdb"
PATIENCE = 60.0  # seconds that a stage waits for MLflow at its end
Entry = tuple[str, float, int, int]  # a metric: key, value, milliseconds since 1970, step
# What a run itself changes in git's eyes
GENERATED = (
    *("**/dvc.lock", "metrics/**", "plots/**", "report/**"),
    *("sweep/**/trials.csv", "sweep/**/best_params.yaml", "sweep/**/*.png"),
)

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

    changed = git(
        "status", "--porcelain", "--", ".", *(f":(exclude,glob){path}" for path in GENERATED)
    )
    return {
        "git.commit": git("rev-parse", "HEAD") or "none",
        "git.dirty": str(bool(changed)).lower(),
        "dvc.stage": os.environ.get("DVC_STAGE", "none"),
        "dvc.experiment": os.environ.get("DVC_EXP_NAME", "workspace"),
    }


class Tracker:
    """The MLflow run of a stage; a process of its own talks to MLflow (:mod:`pipeline.keeper`).

    So whatever MLflow does, the work neither waits for it nor ends with it. The process ends with
    this one; where it is killed the run stays RUNNING, and the next attempt goes on in it.
    """

    def __init__(
        self,
        stage: str,
        params: dict[str, Any],
        inputs: dict[str, str],
        key: str,
        everything: dict[str, Any] | None = None,
        datasets: list[dict[str, Any]] | None = None,
        searches: bool = False,
    ) -> None:
        code = "from pipeline.keeper import keep; keep()"
        paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)},
            start_new_session=True,  # ctrl-C is the stage's, which then says how the run ended
        )
        self._messages: SimpleQueue[list | None] = SimpleQueue()
        threading.Thread(target=self._write, daemon=True).start()
        tags = {"job": f"{stage}-{key}", "process": this_process()}
        parent = {"process": execution(), "params": everything or params, "searches": searches}
        self._tell("start", stage, params, inputs, tags, parent, datasets or [])

    @cached_property
    def run_id(self) -> str | None:
        """Of the run; waits for MLflow. None where it does not answer."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip() or None

    def log(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Metrics, in one batch."""
        self._tell("log", _entries(metrics, step or 0))

    def rows(self, rows: list[dict[str, float]]) -> None:
        """The metrics of epochs, a row each; ``epoch`` is the step."""
        self._tell("log", _entries_of_rows(rows))

    def figure(self, path: Path) -> None:
        """A file as an artefact."""
        self._tell("figure", str(path))

    def summary(self, metrics: dict[str, float], text: str, page: Path) -> None:
        """Of the whole execution, for its parent run: metrics, a description, and a page."""
        self._tell("summary", _entries(metrics, 0), text, str(page))

    def model(self, path: Path, name: str, example: list, about: dict[str, Any]) -> None:
        """The network of a file of ``stdb.save`` as a registered model; see :mod:`.keeper`."""
        self._tell("model", str(path), name, example, about)

    def child(self, name: str, params: dict[str, Any]) -> None:
        """Begin a run below this one, or go on in the one of this name that there is."""
        self._tell("child", name, params)

    def child_rows(self, name: str, rows: list[dict[str, float]]) -> None:
        """The metrics of a child's epochs."""
        self._tell("child_log", name, _entries_of_rows(rows))

    def child_end(self, name: str, status: str) -> None:
        """Close a child: FINISHED or FAILED."""
        self._tell("child_end", name, status)

    def end(self, status: str, interrupted: bool = False) -> None:
        """Close the run: FINISHED or FAILED; the next attempt goes on in an interrupted one."""
        self._tell("end", status, interrupted)
        self._messages.put(None)
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            uri = without_secrets(tracking_uri())
            print(f"warning: MLflow at {uri} is slow; what it has not taken by now is lost")

    def _tell(self, *message: Any) -> None:
        self._messages.put(list(message))

    def _write(self) -> None:
        """Pass messages on; a thread does, since a pipe that nobody reads makes its writer wait."""
        pipe = self._process.stdin
        assert pipe is not None
        with suppress(BrokenPipeError):
            while (message := self._messages.get()) is not None:
                pipe.write(json.dumps(message) + "\n")
                pipe.flush()
            pipe.close()


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
            log_entries(self._client, self.run_id, _entries_of_rows(rows))
        except Exception as error:
            text = f"MLflow at {self.uri} did not take a report: {error}"
            print(f"warning: {without_secrets(text)}")
            self.run_id = None


def _entries(metrics: dict[str, float], step: int) -> list[Entry]:
    """Metrics as they are now."""
    now = int(time.time() * 1000)
    return [(key, float(value), now, step) for key, value in metrics.items()]


def _entries_of_rows(rows: list[dict[str, float]]) -> list[Entry]:
    entries = []
    for row in rows:
        values = {key: value for key, value in row.items() if key != "epoch"}
        entries += _entries(values, int(row["epoch"]))
    return entries


def log_entries(client: Any, run_id: str, entries: list[Entry]) -> None:
    """Log metrics to a run."""
    from mlflow.entities import Metric

    for start in range(0, len(entries), 1000):  # MLflow's limit for a batch
        batch = [Metric(*entry) for entry in entries[start : start + 1000]]
        client.log_batch(run_id, metrics=batch)


def without_secrets(text: str) -> str:
    """A text without the user names and passwords of the addresses in it."""
    return re.sub(r"(://)[^/@\s]+@", r"\1***@", text)


def execution() -> str:
    """Names what runs this stage: the `dvc` above it; itself where there is none."""
    for process in [psutil.Process(), *psutil.Process().parents()]:
        with suppress(psutil.Error):
            if any(Path(part).name == "dvc" for part in process.cmdline()[:3]):
                return _named(process)
    return this_process()


def this_process() -> str:
    """Names this process on this machine, also against a later one with the same number."""
    return _named(psutil.Process())


def _named(process: psutil.Process) -> str:
    return f"{socket.gethostname()} {process.pid} {process.create_time():.0f}"


def is_gone(process: str) -> bool:
    """Whether a process of this machine has ended; of another machine nobody knows."""
    host, _, rest = process.partition(" ")
    number, _, created = rest.partition(" ")
    if host != socket.gethostname():
        return False
    try:
        return f"{psutil.Process(int(number)).create_time():.0f}" != created
    except psutil.NoSuchProcess:
        return True
