"""MLflow: a run for each execution of the pipeline, and in it one for each stage that really ran.

A view only: no stage reads anything back from it.

The tracking server, its credentials, the experiment and the artefact store are MLflow's own
environment variables; without them everything is in mlflow.db and mlartifacts/ at the root of the
repository. Where MLflow cannot be reached, that is said once and the work goes on; what it has not
taken is kept on disk (:mod:`.spool`) and sent by the next stage.
"""

import os
import select
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from pipeline.environment import MLFLOW, set_default_environment
from pipeline.tracking.address import (
    address,
    experiment,
    experiment_id,
    fault_of,
    tracking_uri,
    without_secrets,
)
from pipeline.tracking.children import open_child
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
    Tags,
    entries,
    entries_of_rows,
    key_of,
    logs_of_rows,
    now,
)
from pipeline.tracking.origin import execution, provenance, this_process
from pipeline.tracking.spool import Journal, keep_report, spool, waiting

PATIENCE = 60.0  # seconds that a stage waits for MLflow at its end
BEHIND = 30.0  # where an earlier stage's messages wait already: MLflow does not answer, or slowly
OPENING = 30.0  # until MLflow has opened a run, which a job with several workers asks for
KEPT = 3  # exit status of the process: it has said what was not taken


class Tracker:
    """The MLflow run of a stage; a process of its own talks to MLflow (:mod:`.delivery`).

    So whatever MLflow does, the work neither waits for it nor ends with it. The process ends with
    this one; where it is killed the run stays RUNNING, and the next attempt goes on in it.
    """

    def __init__(self, start: Start) -> None:
        self._process: subprocess.Popen[str] | None = None
        if fault := fault_of(tracking_uri()):
            print(f"warning: {fault}; MLflow gets nothing of this stage", file=sys.stderr)
            return
        earlier = waiting(spool())
        for kept in earlier:
            kept.close()
        behind = any(kept.address == address() for kept in earlier)
        self._patience = BEHIND if behind else PATIENCE
        self._journal = Journal()
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        self._lock = threading.Lock()  # a sweep's messages come from several threads
        self._process = self._started()
        threading.Thread(target=self._write, args=(self._process,), daemon=True).start()
        here = {
            "process": this_process(), "execution": execution(), "origin": provenance(),
            "journal": self._journal.name, "address": address(), "experiment": experiment(),
            "experiment_id": experiment_id(), "time": now(),
        }  # fmt: skip
        self._put(start.model_copy(update=here))

    def _started(self) -> "subprocess.Popen[str]":
        """The process, which shares the lock of the journal."""
        code = "from pipeline.tracking.delivery import main; main()"
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        folder, file = self._journal.folder, self._journal.file
        return subprocess.Popen(
            [sys.executable, "-c", code, *([] if folder is None else [str(folder)])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)},
            pass_fds=[] if file is None else [file.fileno()],
            start_new_session=True,  # ctrl-C is the stage's, which then says how the run ended
        )

    @cached_property
    def run_id(self) -> str | None:
        """Id of the run; waits for MLflow, but not long. None where it does not answer."""
        if self._process is None:
            return None
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], OPENING)
        return (ready and self._process.stdout.readline().strip()) or None

    def reporter(self) -> "Reporter":
        """What logs the reports of a job with several workers."""
        return Reporter(self.run_id, self._journal.folder if self._process else None)

    def log(
        self, metrics: dict[str, float], step: int | None = None, child: str | None = None
    ) -> None:
        """Metrics, in one batch; of a child where one is named."""
        self._put(Log(entries=entries(metrics, step or 0), child=child))

    def rows(self, rows: list[dict[str, float]]) -> None:
        """The metrics of epochs, a row each; ``epoch`` is the step, ``timesteps`` names a child."""
        for message in logs_of_rows(rows):
            self._put(message)

    def tags(self, tags: dict[str, str]) -> None:
        """Tags of the run."""
        self._put(Tags(tags=tags))

    def figure(self, path: Path) -> None:
        """A file as an artefact."""
        self._put(Figure(path=str(path)), path)

    def summary(
        self,
        metrics: dict[str, float],
        text: str,
        page: Path,
        curves: Sequence[tuple[int, Mapping[str, float]]] = (),
    ) -> None:
        """Of the whole execution, for its parent run: metrics, a description, and a page.

        Args:
            metrics: name → value.
            text: the description, Markdown.
            page: a file that becomes an artefact.
            curves: metrics by T, whose step is T: name → value.
        """
        by_step = [one for timesteps, at in curves for one in entries(at, timesteps)]
        logged = entries(metrics, 0) + by_step
        self._put(Summary(entries=logged, text=text, path=str(page)), page)

    def model(
        self, path: Path, name: str, example: list[Any], about: About, child: str | None = None
    ) -> None:
        """The network of a file of ``stdb.save`` as a registered model; of a child's, if named."""
        message = Model(path=str(path), name=name, example=example, about=about, child=child)
        self._put(message, path)

    def child(self, name: str, params: dict[str, Any]) -> None:
        """Begin a run below this one, or go on in the one of this name that there is."""
        self._put(Child(name=name, params=params))

    def child_rows(self, name: str, rows: list[dict[str, float]]) -> None:
        """The metrics of a child's epochs."""
        self._put(Log(entries=entries_of_rows(rows), child=name))

    def child_end(self, name: str, status: str) -> None:
        """Close a child: FINISHED or FAILED."""
        self._put(ChildEnd(name=name, status=status))

    def end(self, status: str, interrupted: bool = False) -> None:
        """Close the run: FINISHED or FAILED; the next attempt goes on in an interrupted one."""
        if self._process is None:
            return
        self._put(End(status=status, interrupted=interrupted, time=now()))
        self._lines.put(None)
        outcome = "is slow"
        try:
            ended = self._process.wait(self._patience)
            outcome = "" if ended in (0, KEPT) else f"lost its process (status {ended})"
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if outcome:
            whole = self._journal.whole and not self._journal.full
            rest = "is lost" if not whole else f"is kept in {spool()}; the next stage sends it"
            text = f"MLflow at {tracking_uri()} {outcome}; what it has not taken by now {rest}"
            print(f"warning: {without_secrets(text)}", file=sys.stderr)
        self._journal.close()

    def _put(self, message: Message, path: Path | None = None) -> None:
        """Keep a message, with the file that it names, and hand it to the process."""
        if self._process is None:
            return
        with self._lock:
            if path is not None:
                message = message.model_copy(update={"path": self._journal.keep(path)})
            self._lines.put(self._journal.add(message))

    def _write(self, process: "subprocess.Popen[str]") -> None:
        """Pass messages on; a thread does, since a pipe that nobody reads makes its writer wait."""
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin as pipe:
            while (line := self._lines.get()) is not None:
                pipe.write(line)
                pipe.flush()


class Reporter:
    """Logs what a job's workers report, epoch by epoch; runs in Ray Train's controller.

    A plain function of a run id, so that it can be sent there; ``pipeline.jobs.run`` makes it a
    callback of Ray's.
    """

    def __init__(self, run_id: str | None, folder: Path | None = None) -> None:
        self.run_id, self.folder, self.uri = run_id, folder, tracking_uri()
        self._client: Any = None

    def __call__(self, rows: list[dict[str, float]]) -> None:
        """Log the metrics of a report, a row an epoch, as :meth:`Tracker.rows` does."""
        for message in logs_of_rows(rows):
            self._send(message)

    def _send(self, message: Log) -> None:
        try:
            if self.run_id is not None:
                self._log(message)
                return
        except Exception as error:
            kept = self.folder is not None and self.folder.is_dir()
            rest = "is kept and sent later" if kept else "is lost"
            text = " ".join(f"MLflow at {self.uri} did not take a report, which {rest}".split())
            print(f"warning: {without_secrets(f'{text}: {error}')}")
            self.run_id = None
        if self.folder is not None and self.folder.is_dir():  # else on another machine
            with suppress(OSError):
                keep_report(self.folder, message)

    def _log(self, message: Log) -> None:
        if self._client is None:
            set_default_environment(MLFLOW)
            import mlflow

            self._client = mlflow.MlflowClient(tracking_uri=self.uri)
        assert self.run_id is not None
        run_id = self.run_id
        if message.child is not None:
            run_id = open_child(self._client, run_id, message.child)[0]
        log_entries(self._client, run_id, message.entries)


def log_entries(client: Any, run_id: str, entries: list[Entry]) -> None:
    """Log metrics to a run."""
    from mlflow.entities import Metric

    for start in range(0, len(entries), 1000):  # MLflow's limit for a batch
        batch = entries[start : start + 1000]
        metrics = [Metric(key_of(key), value, when, step) for key, value, when, step in batch]
        client.log_batch(run_id, metrics=metrics)
