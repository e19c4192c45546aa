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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.tracking.address import tracking_uri
from pipeline.tracking.children import open_child
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
    Tags,
    key_of,
    text_of,
)
from pipeline.tracking.opening import open_mlflow
from pipeline.tracking.origin import is_gone
from pipeline.tracking.outages import OutageError, UnavailableError, is_outage, report
from pipeline.tracking.registry import register
from pipeline.tracking.spool import spool
from pipeline.tracking.tracker import log_entries

QUIET = ("alembic", "mlflow", "mlflow.system_metrics")
PARAMS_AT_ONCE = 100  # MLflow's limit
DIGEST = 12  # characters of a data set's that MLflow's pages show; the tags have all of it
TAGS_AT_ONCE = 50  # MLflow's limit is 100, its own tags among them


class MlflowProcess:
    """MLflow's side of a :class:`.tracker.Tracker`.

    Args:
        folder: what files of messages are relative to.
        late: whether the stage has ended, so that its run is completed and nothing is gone on in.
    """

    def __init__(self, folder: Path = Path(), late: bool = False) -> None:
        self.folder, self.late = folder, late
        self.run_id = self.parent_id = ""
        self.children: dict[str, str] = {}  # name → run, of those that are open
        self.failed = False  # said once; MLflow is a view, and its failure stops nothing
        self.monitor: Any = None
        self.client: Any = None

    def take(self, message: Message) -> bool:
        """Do what a message says; whether it is not to be sent again.

        One that cannot be taken at any time is said, the first one only, and left out.

        Raises:
            OutageError: MLflow may take it later, and what comes after it only then.
        """
        takers: dict[type[Any], Callable[[Any], None]] = {
            Start: self.start,
            Log: self.log,
            Tags: self.tag,
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
            again = is_outage(error)
            if isinstance(message, Start) or (again and not self._answers()):
                dead = again and not isinstance(error, UnavailableError)
                raise OutageError(error, dead) from error
            what = f"did not take {getattr(message, 'path', '') or message.kind!r}"
            rest = f"which is kept in {spool()}; the next stage sends it" if again else "going on"
            if not self.failed:
                report(error, what, rest)
            self.failed = True
            return not again
        return True

    def _answers(self) -> bool:
        """Whether MLflow takes anything at all."""
        try:
            self.client.get_experiment(self.experiment_id)
        except Exception:
            return False
        return True

    def start(self, message: Start) -> None:
        """Open the stage's run, or go on in the one that was interrupted, below its parent."""
        for name in QUIET:
            logging.getLogger(name).setLevel(logging.ERROR)
        self.client, self.experiment_id = open_mlflow(message)
        tags = {"job": message.job, "process": message.process} | message.origin
        self.tags = dict(tags)
        self.source = self._source(f"dvc repro {message.stage}")
        self.run_id = self._run_of(message.journal)
        again = "" if self.run_id else self._unfinished_run(message)
        self.parent_id = self._parent(message, again)
        own = {"mlflow.parentRunId": self.parent_id}
        own |= {"journal": message.journal} if message.journal else {}
        if again:
            self.run_id = again
            self.client.update_run(again, status="RUNNING")
            self._set_tags(again, own | {"process": message.process, "interrupted": "false"})
        elif not self.run_id:
            tags |= own | self.source
            run = self.client.create_run(
                self.experiment_id, message.time, _texts(tags), run_name=message.stage
            )
            self.run_id = run.info.run_id
        self._set_tags(self.run_id, {f"input.{path}": d for path, d in message.inputs.items()})
        self._log_params(self.run_id, message.params)
        for run_id in (self.run_id, self.parent_id):
            self._log_datasets(run_id, message.datasets)
        if not self.late:
            self._watch_machine()

    def _watch_machine(self) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        if self.monitor is None:
            self.monitor = SystemMetricsMonitor(
                self.run_id, resume_logging=True, tracking_uri=tracking_uri()
            )
            self.monitor.start()

    def _run_of(self, journal: str) -> str:
        """The run that these messages have opened before; or ""."""
        found = self._search(f"tags.journal = '{journal}'") if journal else []
        return found[0].info.run_id if found else ""

    def _unfinished_run(self, message: Start) -> str:
        """The run of this job that was interrupted, to go on in; or "".

        A kill leaves it RUNNING; those of other jobs are closed as KILLED, and so are parents.
        Where messages of a run wait on disk, they say how it ended.
        """
        unfinished = ""
        mine = {"job": message.job, "dvc.experiment": self.tags["dvc.experiment"]}
        running = self._search("attributes.status = 'RUNNING'")
        stopped = self._search("tags.interrupted = 'true'")
        for run in [*running, *stopped]:
            tags, runs = run.data.tags, run.info.status == "RUNNING"
            waits = tags.get("journal") and (spool() / tags["journal"]).exists()
            if waits or (runs and not is_gone(tags.get("process", ""))):
                continue
            stage = run.info.run_name == message.stage  # no trial of it
            if stage and not unfinished and all(tags.get(k) == v for k, v in mine.items()):
                unfinished = run.info.run_id
            elif runs and not self.late:
                self.client.set_terminated(run.info.run_id, "KILLED")
        return unfinished

    def _parent(self, message: Start, again: str) -> str:
        """The run of this execution: the one there is, that of the interrupted run, or a new one.

        Where the stage searches some of the parameters, it is named after the stage.
        """
        params = message.everything or message.params
        mine = {"process": message.execution, "dvc.experiment": self.tags["dvc.experiment"]}
        name = self._name(params, message.stage if message.searches else "")
        own = " and ".join(f"tags.`{key}` = '{value}'" for key, value in mine.items())
        if parents := self._search(f"{own} and tags.kind = 'execution'"):
            parent = parents[0].info.run_id
        elif again and (earlier := self._parent_of(again)):
            parent = earlier
            self.client.set_tag(parent, "process", mine["process"])
        else:
            origin = {k: v for k, v in self.tags.items() if k.startswith("git.")}
            tags = mine | origin | self._source("dvc repro") | {"kind": "execution"}
            run = self.client.create_run(
                self.experiment_id, message.time, _texts(tags), run_name=name
            )
            parent = run.info.run_id
        self._log_params(parent, params)
        renamed = name if message.searches else None  # stages above a sweep did not know of it
        if renamed or not self.late:
            self.client.update_run(parent, status=None if self.late else "RUNNING", name=renamed)
        self.execution = message.execution
        return str(parent)

    def _name(self, params: dict[str, Any], sweep: str) -> str:
        """Name of an execution: what tells it from others in lists and legends."""
        if (experiment := self.tags["dvc.experiment"]) != "workspace":
            return experiment
        commit = self.tags["git.commit"][:7] + "-dirty" * (self.tags["git.dirty"] == "true")
        if "network.architecture" not in params:
            return commit
        steps = params["stdb.timesteps"]
        falling = ",".join(map(str, steps)) if isinstance(steps, list) else steps
        which = sweep or f"T={falling}"
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
        run_id = self.run_id if message.child is None else self._child(message.child)
        log_entries(self.client, run_id, message.entries)

    def tag(self, message: Tags) -> None:
        """Tags."""
        for key, value in message.tags.items():
            self.client.set_tag(self.run_id, key_of(key), text_of(value))

    def figure(self, message: Figure) -> None:
        """An artefact."""
        self.client.log_artifact(self.run_id, str(self.folder / message.path))

    def summary(self, message: Summary) -> None:
        """The execution's final figures, its description, and a page, to the parent run."""
        log_entries(self.client, self.parent_id, message.entries)
        self.client.set_tag(self.parent_id, "mlflow.note.content", message.text)
        self.client.log_artifact(self.parent_id, str(self.folder / message.path))

    def model(self, message: Model) -> None:
        """Log the network as a registered model (:func:`.registry.register`)."""
        from mlflow.entities import LoggedModelOutput

        run_id = self.run_id if message.child is None else self._child(message.child)
        commit, before = self.tags["git.commit"], self.client.get_run(run_id).info
        here = message.model_copy(update={"path": str(self.folder / message.path)})
        try:
            logged = register(self.client, run_id, here, self.source, commit)
            shown = self.client.get_run(self.parent_id).outputs  # MLflow refuses a second time
            if logged not in [model.model_id for model in shown.model_outputs]:
                self.client.log_outputs(self.parent_id, [LoggedModelOutput(logged, step=0)])
        finally:
            if before.status == "RUNNING":
                self.client.update_run(run_id, status="RUNNING")
            else:  # where all but the model was taken before
                self.client.set_terminated(run_id, before.status, before.end_time)

    def child(self, message: Child) -> None:
        """Open a run below the stage's, or the one of this name that there is."""
        run_id, _ = open_child(self.client, self.run_id, message.name, again=True)
        self.children[message.name] = run_id
        self._log_params(run_id, message.params)

    def _child(self, name: str) -> str:
        """Its run, opened where it is not."""
        if name in self.children:
            return self.children[name]
        run_id, is_open = open_child(self.client, self.run_id, name)
        if is_open:
            self.children[name] = run_id
        return run_id

    def child_end(self, message: ChildEnd) -> None:
        """Close a child."""
        self.client.set_terminated(self._child(message.name), message.status)
        self.children.pop(message.name, None)

    def _set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        entries = [RunTag(*entry) for entry in _texts(tags).items()]
        for start in range(0, len(entries), TAGS_AT_ONCE):
            self.client.log_batch(run_id, tags=entries[start : start + TAGS_AT_ONCE])

    def _log_params(self, run_id: str, params: dict[str, Any]) -> None:
        from mlflow.entities import Param

        known = self.client.get_run(run_id).data.params
        new = {key: value for key, value in _texts(params).items() if key not in known}
        entries = [Param(*entry) for entry in new.items()]
        for start in range(0, len(entries), PARAMS_AT_ONCE):
            self.client.log_batch(run_id, params=entries[start : start + PARAMS_AT_ONCE])

    def end(self, message: End) -> None:
        """Close the stage's run, its children, and the parent with it.

        Late, only a parent that nobody else closes: its execution has ended.
        """
        if self.monitor is not None:
            self.monitor.finish()
            self.monitor = None
        for name in list(self.children):
            self.child_end(ChildEnd(name=name, status="FAILED"))
        if message.interrupted:
            self.client.set_tag(self.run_id, "interrupted", "true")
        self.client.set_terminated(self.run_id, message.status, message.time)
        if not self.late or self._is_left(self.parent_id):
            self.client.set_terminated(self.parent_id, message.status, message.time)

    def _is_left(self, parent: str) -> bool:
        return is_gone(self.execution) and self.client.get_run(parent).info.status == "RUNNING"


def _texts(values: dict[str, Any]) -> dict[str, str]:
    return {key_of(key): text_of(value) for key, value in values.items()}
