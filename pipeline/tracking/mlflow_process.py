"""MLflow's side of a stage: the process that takes a :class:`.tracker.Tracker`'s messages.

    network, T, commit              one execution of the pipeline: all parameters, the final figures
    ├── prepare_data
    ├── train_ann                   a stage: its parameters, metrics by epoch, figures, data sets
    ├── …
    └── finetune_stdb               the network as a registered model

The first stage of an execution that really runs finds or makes the parent, by the process that
runs the pipeline. A stage leaves it as FINISHED as it is itself; the next one opens it again.
"""

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pipeline.environment import MLFLOW, set_default_environment
from pipeline.files import root
from pipeline.tracking.messages import (
    Child,
    ChildEnd,
    Dataset,
    End,
    Figure,
    Log,
    Message,
    Model,
    Start,
    Summary,
    from_line,
)
from pipeline.tracking.origin import (
    EXPERIMENT,
    is_gone,
    provenance,
    tracking_uri,
    without_secrets,
)
from pipeline.tracking.registry import register
from pipeline.tracking.tracker import log_entries

QUIET = ("alembic", "mlflow", "mlflow.system_metrics")
PARAMS_AT_ONCE = 100  # MLflow's limit
DIGEST = 12  # characters of a data set's that MLflow's pages show; the tags have all of it
PURPOSE = """\
A run is one execution of the pipeline, with a run for each stage below it. Select two to compare.

Image classifiers become spiking networks that are accurate at few time steps T: an ANN is trained,
converted by threshold balancing, and fine-tuned by STDB. `accuracy/` is that of the test split,
`spikes/` are per neuron and image, `energy/` is per image. Runs are named after network, T and
commit, or after their DVC experiment.
"""
# whose exceptions say that MLflow, its database or its store does not answer
OUTSIDE = (
    *("mlflow", "requests", "urllib3", "sqlalchemy", "sqlite3", "alembic"),
    *("botocore", "boto3", "google", "azure"),
)


def main() -> None:
    """Take messages from standard input until it ends."""
    set_default_environment(MLFLOW)
    process = MlflowProcess()
    for line in sys.stdin:
        message = from_line(line)
        process.take(message)
        if isinstance(message, Start):
            with suppress(BrokenPipeError):  # where the stage was killed meanwhile
                os.write(sys.stdout.fileno(), f"{process.run_id}\n".encode())


def warn(text: str) -> None:
    """Say that something of MLflow's failed; nothing else does with it."""
    print(f"warning: {without_secrets(text)}", file=sys.stderr, flush=True)


def report(error: Exception, outage: str, outcome: str) -> None:
    """Say what came of an error: an outage in one line, an error of our own with its traceback."""
    outside = type(error).__module__.partition(".")[0] in OUTSIDE
    missing = isinstance(error, FileNotFoundError)  # a file that we said there is
    if outside or (isinstance(error, OSError) and not missing):
        warn(f"MLflow at {tracking_uri()} {outage}, {outcome}: {error}")
    else:
        lines = "".join(traceback.format_exception(error))
        warn(f"a fault of this program, {outcome}:\n{lines.rstrip()}")


class MlflowProcess:
    """MLflow's side of a :class:`.tracker.Tracker`."""

    def __init__(self) -> None:
        self.run_id = self.parent_id = ""
        self.children: dict[str, str] = {}  # name → run, of those that are open
        self.failed = False  # said once; MLflow is a view, and its failure stops nothing
        self.monitor: Any = None

    def take(self, message: Message) -> None:
        """Do what a message says; after a failure, which is reported once, only the end."""
        if self.failed and not (isinstance(message, End) and self.run_id):
            return
        takers: dict[type[Any], Callable[[Any], None]] = {
            Start: self.start,
            Log: self.log,
            Figure: self.figure,
            Summary: self.summary,
            Model: self.model,
            Child: self.child,
            ChildEnd: self.child_end,
            End: self.end,
        }
        try:
            takers[type(message)](message)
        except Exception as error:
            if not self.failed:
                report(error, "does not answer", "going on without")
            self.failed = True

    def start(self, message: Start) -> None:
        """Open the stage's run, or go on in the one that was interrupted, below its parent."""
        import mlflow
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        for name in QUIET:
            logging.getLogger(name).setLevel(logging.ERROR)
        self.client = client = mlflow.MlflowClient(tracking_uri=tracking_uri())
        self.experiment_id = self._experiment()
        tags = {"job": message.job, "process": message.process} | provenance()
        self.tags = dict(tags)
        self.source = self._source(f"dvc repro {message.stage}")
        self.run_id = self._unfinished_run(tags)
        self.parent_id = self._parent(message)
        below = {"mlflow.parentRunId": self.parent_id}
        if self.run_id:
            client.update_run(self.run_id, status="RUNNING")
            again = {"process": tags["process"], "interrupted": "false", **below}
            for key, value in again.items():
                client.set_tag(self.run_id, key, value)
        else:
            tags |= below | self.source
            tags |= {f"input.{path}": value for path, value in message.inputs.items()}
            run = client.create_run(self.experiment_id, run_name=message.stage, tags=tags)
            self.run_id = run.info.run_id
            self._log_params(self.run_id, message.params)
        for run_id in (self.run_id, self.parent_id):
            self._log_datasets(run_id, message.datasets)
        self.monitor = SystemMetricsMonitor(
            self.run_id, resume_logging=True, tracking_uri=tracking_uri()
        )
        self.monitor.start()

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        if experiment is not None:
            return experiment.experiment_id
        local = tracking_uri().startswith("sqlite")
        place = (root() / "mlartifacts").as_uri() if local else None
        try:
            return self.client.create_experiment(
                EXPERIMENT, artifact_location=place, tags={"mlflow.note.content": PURPOSE}
            )
        except MlflowException:  # perhaps another process was faster
            experiment = self.client.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                raise
            return experiment.experiment_id

    def _unfinished_run(self, tags: dict[str, str]) -> str:
        """The run of this job that was interrupted, to go on in; or "".

        A kill leaves it RUNNING; those of other jobs are closed, and so are parents.
        """
        unfinished = ""
        running = self._search("attributes.status = 'RUNNING'")
        stopped = self._search("tags.interrupted = 'true'")
        for run in [*running, *stopped]:
            if run.info.status == "RUNNING" and not is_gone(run.data.tags.get("process", "")):
                continue
            same = all(run.data.tags.get(k) == tags[k] for k in ("job", "dvc.experiment"))
            if same and not unfinished:
                unfinished = run.info.run_id
            elif run.info.status == "RUNNING":
                self.client.set_terminated(run.info.run_id, "FAILED")
        return unfinished

    def _parent(self, message: Start) -> str:
        """The run of this execution: the one there is, that of the interrupted run, or a new one.

        Where the stage searches some of the parameters, it is named after the stage.
        """
        params = message.everything or message.params
        mine = {"process": message.execution, "dvc.experiment": self.tags["dvc.experiment"]}
        name = self._name(params, message.stage if message.searches else "")
        own = " and ".join(f"tags.`{key}` = '{value}'" for key, value in mine.items())
        if parents := self._search(f"{own} and tags.kind = 'execution'"):
            parent = parents[0].info.run_id
        elif self.run_id and (earlier := self._parent_of(self.run_id)):
            parent = earlier
            self.client.set_tag(parent, "process", mine["process"])
        else:
            origin = {k: v for k, v in self.tags.items() if k.startswith("git.")}
            tags = mine | origin | self._source("dvc repro") | {"kind": "execution"}
            run = self.client.create_run(self.experiment_id, run_name=name, tags=tags)
            parent = run.info.run_id
            self._log_params(parent, params)
        renamed = name if message.searches else None  # stages above a sweep did not know of it
        self.client.update_run(parent, status="RUNNING", name=renamed)
        return str(parent)

    def _name(self, params: dict[str, Any], sweep: str) -> str:
        """Name of an execution: what tells it from others in lists and legends."""
        if (experiment := self.tags["dvc.experiment"]) != "workspace":
            return experiment
        commit = self.tags["git.commit"][:7] + "-dirty" * (self.tags["git.dirty"] == "true")
        if "network.architecture" not in params:
            return commit
        which = sweep or f"T={params['stdb.timesteps']}"
        return f"{params['network.architecture']} {which} {commit}"

    def _source(self, name: str) -> dict[str, str]:
        """What ran, for MLflow's columns Source and Version."""
        source = {"mlflow.source.name": name, "mlflow.source.type": "LOCAL"}
        if (commit := self.tags["git.commit"]) != "none":
            source["mlflow.source.git.commit"] = commit
        return source

    def _parent_of(self, run_id: str) -> str:
        from mlflow.exceptions import MlflowException

        parent = self.client.get_run(run_id).data.tags.get("mlflow.parentRunId", "")
        try:
            return self.client.get_run(parent).info.run_id if parent else ""
        except MlflowException:  # somebody has deleted it
            return ""

    def _search(self, text: str) -> list[Any]:
        return list(self.client.search_runs([self.experiment_id], text))

    def _log_datasets(self, run_id: str, datasets: list[Dataset]) -> None:
        from mlflow import entities

        given = [
            entities.DatasetInput(
                entities.Dataset(
                    one.name, one.digest[:DIGEST], "local", json.dumps({"uri": one.path}),
                    profile=json.dumps(one.profile),
                ),
                [entities.InputTag("mlflow.data.context", one.context)],
            )
            for one in datasets
        ]  # fmt: skip
        if given:
            self.client.log_inputs(run_id, given)

    def log(self, message: Log) -> None:
        """Metrics."""
        run_id = self.run_id if message.child is None else self.children[message.child]
        log_entries(self.client, run_id, message.entries)

    def figure(self, message: Figure) -> None:
        """An artefact."""
        self.client.log_artifact(self.run_id, message.path)

    def summary(self, message: Summary) -> None:
        """The execution's final figures, its description, and a page, to the parent run."""
        log_entries(self.client, self.parent_id, message.entries)
        self.client.set_tag(self.parent_id, "mlflow.note.content", message.text)
        self.client.log_artifact(self.parent_id, message.page)

    def model(self, message: Model) -> None:
        """Log the network as a registered model (:func:`.registry.register`)."""
        from mlflow.entities import LoggedModelOutput

        commit = self.tags["git.commit"]
        try:
            logged = register(self.client, self.run_id, message, self.source, commit)
            self.client.log_outputs(self.parent_id, [LoggedModelOutput(logged, step=0)])
        except Exception as error:
            report(error, "did not take the model", "going on without its registration")
        finally:
            self.client.update_run(self.run_id, status="RUNNING")

    def child(self, message: Child) -> None:
        """Open a run below the stage's, or the one of this name that there is."""
        name = message.name
        earlier = self._search(
            f"tags.mlflow.parentRunId = '{self.run_id}' and attributes.run_name = '{name}'"
        )
        if earlier:
            self.children[name] = earlier[0].info.run_id
            self.client.update_run(self.children[name], status="RUNNING")
            return
        tags = {**self.tags, "mlflow.parentRunId": self.run_id}
        run = self.client.create_run(self.experiment_id, run_name=name, tags=tags)
        self.children[name] = run.info.run_id
        self._log_params(run.info.run_id, message.params)

    def child_end(self, message: ChildEnd) -> None:
        """Close a child."""
        self.client.set_terminated(self.children.pop(message.name), message.status)

    def _log_params(self, run_id: str, params: dict[str, Any]) -> None:
        from mlflow.entities import Param

        entries = [Param(key, str(value)) for key, value in params.items()]
        for start in range(0, len(entries), PARAMS_AT_ONCE):
            self.client.log_batch(run_id, params=entries[start : start + PARAMS_AT_ONCE])

    def end(self, message: End) -> None:
        """Close the stage's run, its children, and the parent with it."""
        if self.monitor is not None:
            self.monitor.finish()
        for name in list(self.children):
            self.child_end(ChildEnd(name=name, status="FAILED"))
        if message.interrupted:
            self.client.set_tag(self.run_id, "interrupted", "true")
        for run_id in (self.run_id, self.parent_id):
            if run_id:
                self.client.set_terminated(run_id, message.status)
