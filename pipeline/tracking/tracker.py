"""MLflow: a run for each execution of the pipeline, and in it one for each stage that really ran.

A view only: no stage reads anything back from it.

The tracking server, its credentials and the artefact store are MLflow's own environment variables;
without them everything is in mlflow.db and mlartifacts/ at the root of the repository. Where MLflow
cannot be reached, that is said once and the work goes on.
"""

import os
import subprocess
import sys
import threading
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from pipeline.environment import MLFLOW, set_default_environment
from pipeline.tracking.messages import (
    About,
    Child,
    ChildEnd,
    End,
    Entry,
    Figure,
    Log,
    Message,
    Model,
    Start,
    Summary,
    entries,
    entries_of_rows,
    to_line,
)
from pipeline.tracking.origin import execution, this_process, tracking_uri, without_secrets

PATIENCE = 60.0  # seconds that a stage waits for MLflow at its end


class Tracker:
    """The MLflow run of a stage; a process of its own talks to MLflow (:mod:`.mlflow_process`).

    So whatever MLflow does, the work neither waits for it nor ends with it. The process ends with
    this one; where it is killed the run stays RUNNING, and the next attempt goes on in it.
    """

    def __init__(self, start: Start) -> None:
        code = "from pipeline.tracking.mlflow_process import main; main()"
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)},
            start_new_session=True,  # ctrl-C is the stage's, which then says how the run ended
        )
        self._messages: SimpleQueue[Message | None] = SimpleQueue()
        threading.Thread(target=self._write, daemon=True).start()
        here = {"process": this_process(), "execution": execution()}
        self._messages.put(start.model_copy(update=here))

    @cached_property
    def run_id(self) -> str | None:
        """Id of the run; waits for MLflow. None where it does not answer."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip() or None

    def log(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Metrics, in one batch."""
        self._messages.put(Log(entries=entries(metrics, step or 0)))

    def rows(self, rows: list[dict[str, float]]) -> None:
        """The metrics of epochs, a row each; ``epoch`` is the step."""
        self._messages.put(Log(entries=entries_of_rows(rows)))

    def figure(self, path: Path) -> None:
        """A file as an artefact."""
        self._messages.put(Figure(path=str(path)))

    def summary(self, metrics: dict[str, float], text: str, page: Path) -> None:
        """Of the whole execution, for its parent run: metrics, a description, and a page."""
        self._messages.put(Summary(entries=entries(metrics, 0), text=text, page=str(page)))

    def model(self, path: Path, name: str, example: list[Any], about: About) -> None:
        """The network of a file of ``stdb.save`` as a registered model."""
        self._messages.put(Model(path=str(path), name=name, example=example, about=about))

    def child(self, name: str, params: dict[str, Any]) -> None:
        """Begin a run below this one, or go on in the one of this name that there is."""
        self._messages.put(Child(name=name, params=params))

    def child_rows(self, name: str, rows: list[dict[str, float]]) -> None:
        """The metrics of a child's epochs."""
        self._messages.put(Log(entries=entries_of_rows(rows), child=name))

    def child_end(self, name: str, status: str) -> None:
        """Close a child: FINISHED or FAILED."""
        self._messages.put(ChildEnd(name=name, status=status))

    def end(self, status: str, interrupted: bool = False) -> None:
        """Close the run: FINISHED or FAILED; the next attempt goes on in an interrupted one."""
        self._messages.put(End(status=status, interrupted=interrupted))
        self._messages.put(None)
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            uri = without_secrets(tracking_uri())
            print(f"warning: MLflow at {uri} is slow; what it has not taken by now is lost")

    def _write(self) -> None:
        """Pass messages on; a thread does, since a pipe that nobody reads makes its writer wait."""
        pipe = self._process.stdin
        assert pipe is not None
        with suppress(BrokenPipeError), pipe:
            while (message := self._messages.get()) is not None:
                pipe.write(to_line(message))
                pipe.flush()


class Reporter:
    """Logs what a job's workers report, epoch by epoch; runs in Ray Train's controller.

    A plain function of a run id, so that it can be sent there; ``pipeline.jobs.run`` makes it a
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
                set_default_environment(MLFLOW)
                import mlflow

                self._client = mlflow.MlflowClient(tracking_uri=self.uri)
            log_entries(self._client, self.run_id, entries_of_rows(rows))
        except Exception as error:
            text = f"MLflow at {self.uri} did not take a report: {error}"
            print(f"warning: {without_secrets(text)}")
            self.run_id = None


def log_entries(client: Any, run_id: str, entries: list[Entry]) -> None:
    """Log metrics to a run."""
    from mlflow.entities import Metric

    for start in range(0, len(entries), 1000):  # MLflow's limit for a batch
        batch = [Metric(*entry) for entry in entries[start : start + 1000]]
        client.log_batch(run_id, metrics=batch)
