"""MLflow's side of a stage: the process that takes a :class:`pipeline.tracking.Tracker`'s messages.

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
from contextlib import suppress
from typing import Any

from pipeline.registry import register
from pipeline.tracking import (
    EXPERIMENT,
    Entry,
    is_gone,
    log_entries,
    provenance,
    root,
    tracking_uri,
    without_secrets,
)

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


def keep() -> None:
    """What the process does: take messages from its input until it ends."""
    keeper = Keeper()
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            if not keeper.failed or (name == "end" and keeper.run_id):
                getattr(keeper, name)(*arguments)
        except Exception as error:
            if not keeper.failed:
                warn(f"MLflow at {tracking_uri()} does not answer, going on without: {error}")
            keeper.failed = True
        if name == "start":
            with suppress(BrokenPipeError):  # where the stage was killed meanwhile
                os.write(sys.stdout.fileno(), f"{keeper.run_id}\n".encode())


def warn(text: str) -> None:
    """Say that something of MLflow's failed; nothing else does with it."""
    print(f"warning: {without_secrets(text)}", file=sys.stderr, flush=True)


class Keeper:
    """MLflow's side of a :class:`Tracker`; its methods are the messages."""

    def __init__(self) -> None:
        self.run_id = self.parent_id = ""
        self.children: dict[str, str] = {}  # name → run, of those that are open
        self.failed = False  # said once; MLflow is a view, and its failure stops nothing
        self.monitor: Any = None

    def start(
        self,
        stage: str,
        params: dict[str, Any],
        inputs: dict[str, str],
        tags: dict[str, str],
        execution: dict[str, Any],
        datasets: list[dict[str, Any]],
    ) -> None:
        """Open the stage's run, or go on in the one that was interrupted, below its parent."""
        import mlflow
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        for name in QUIET:
            logging.getLogger(name).setLevel(logging.ERROR)
        self.client = client = mlflow.MlflowClient(tracking_uri=tracking_uri())
        self.experiment_id = self._experiment()
        tags |= provenance()
        self.tags = dict(tags)
        self.source = self._source(f"dvc repro {stage}")
        self.run_id = self._unfinished_run(tags)
        self.parent_id = self._parent(stage, execution)
        below = {"mlflow.parentRunId": self.parent_id}
        if self.run_id:
            client.update_run(self.run_id, status="RUNNING")
            again = {"process": tags["process"], "interrupted": "false", **below}
            for key, value in again.items():
                client.set_tag(self.run_id, key, value)
        else:
            tags |= below | self.source
            tags |= {f"input.{path}": value for path, value in inputs.items()}
            run = client.create_run(self.experiment_id, run_name=stage, tags=tags)
            self.run_id = run.info.run_id
            self._log_params(self.run_id, params)
        for run_id in (self.run_id, self.parent_id):
            self._log_datasets(run_id, datasets)
        self.monitor = SystemMetricsMonitor(
            self.run_id, resume_logging=True, tracking_uri=tracking_uri()
        )
        self.monitor.start()

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(EXPERIMENT)
        if found is not None:
            return found.experiment_id
        local = tracking_uri().startswith("sqlite")
        place = (root() / "mlartifacts").as_uri() if local else None
        try:
            return self.client.create_experiment(
                EXPERIMENT, artifact_location=place, tags={"mlflow.note.content": PURPOSE}
            )
        except MlflowException:  # perhaps another process was faster
            found = self.client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
            return found.experiment_id

    def _unfinished_run(self, tags: dict[str, str]) -> str:
        """The run of this job that was interrupted, to go on in; or "".

        A kill leaves it RUNNING; those of other jobs are closed, and so are parents.
        """
        found = ""
        running = self._search("attributes.status = 'RUNNING'")
        stopped = self._search("tags.interrupted = 'true'")
        for run in [*running, *stopped]:
            if run.info.status == "RUNNING" and not is_gone(run.data.tags.get("process", "")):
                continue
            same = all(run.data.tags.get(k) == tags[k] for k in ("job", "dvc.experiment"))
            if same and not found:
                found = run.info.run_id
            elif run.info.status == "RUNNING":
                self.client.set_terminated(run.info.run_id, "FAILED")
        return found

    def _parent(self, stage: str, execution: dict[str, Any]) -> str:
        """The run of this execution: the one there is, that of the interrupted run, or a new one.

        ``execution`` has ``process``, which runs the pipeline, all ``params``, and whether the
        stage ``searches`` some of them; the execution is then named after it.
        """
        mine = {"process": execution["process"], "dvc.experiment": self.tags["dvc.experiment"]}
        name = self._name(execution["params"], stage if execution["searches"] else "")
        own = " and ".join(f"tags.`{key}` = '{value}'" for key, value in mine.items())
        if found := self._search(f"{own} and tags.kind = 'execution'"):
            parent = found[0].info.run_id
        elif self.run_id and (earlier := self._parent_of(self.run_id)):
            parent = earlier
            self.client.set_tag(parent, "process", mine["process"])
        else:
            origin = {k: v for k, v in self.tags.items() if k.startswith("git.")}
            tags = mine | origin | self._source("dvc repro") | {"kind": "execution"}
            run = self.client.create_run(self.experiment_id, run_name=name, tags=tags)
            parent = run.info.run_id
            self._log_params(parent, execution["params"])
        renamed = name if execution["searches"] else None  # stages above a sweep did not know of it
        self.client.update_run(parent, status="RUNNING", name=renamed)
        return parent

    def _name(self, params: dict[str, Any], sweep: str) -> str:
        """Of an execution: what tells it from others in lists and legends."""
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

    def _search(self, text: str) -> list:
        return list(self.client.search_runs([self.experiment_id], text))

    def _log_datasets(self, run_id: str, datasets: list[dict[str, Any]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        given = [
            DatasetInput(
                Dataset(
                    row["name"], row["digest"][:DIGEST], "local", json.dumps({"uri": row["path"]}),
                    profile=json.dumps(row["profile"]),
                ),
                [InputTag("mlflow.data.context", row["context"])],
            )
            for row in datasets
        ]  # fmt: skip
        if given:
            self.client.log_inputs(run_id, given)

    def log(self, entries: list[Entry]) -> None:
        """Metrics."""
        log_entries(self.client, self.run_id, entries)

    def figure(self, path: str) -> None:
        """An artefact."""
        self.client.log_artifact(self.run_id, path)

    def summary(self, entries: list[Entry], text: str, page: str) -> None:
        """The execution's final figures, its description, and a page, to the parent run."""
        log_entries(self.client, self.parent_id, entries)
        self.client.set_tag(self.parent_id, "mlflow.note.content", text)
        self.client.log_artifact(self.parent_id, page)

    def model(self, path: str, name: str, example: list, about: dict[str, Any]) -> None:
        """Log the network as a registered model (:func:`pipeline.registry.register`)."""
        from mlflow.entities import LoggedModelOutput

        commit = self.tags["git.commit"]
        try:
            logged = register(
                self.client, self.run_id, path, name, example, about, self.source, commit
            )
            self.client.log_outputs(self.parent_id, [LoggedModelOutput(logged, step=0)])
        except Exception as error:
            warn(f"MLflow at {tracking_uri()} did not take the model: {error}")
        finally:
            self.client.update_run(self.run_id, status="RUNNING")

    def child(self, name: str, params: dict[str, Any]) -> None:
        """Open a run below the stage's, or the one of this name that there is."""
        found = self._search(
            f"tags.mlflow.parentRunId = '{self.run_id}' and attributes.run_name = '{name}'"
        )
        if found:
            self.children[name] = found[0].info.run_id
            self.client.update_run(self.children[name], status="RUNNING")
            return
        tags = {**self.tags, "mlflow.parentRunId": self.run_id}
        run = self.client.create_run(self.experiment_id, run_name=name, tags=tags)
        self.children[name] = run.info.run_id
        self._log_params(run.info.run_id, params)

    def child_log(self, name: str, entries: list[Entry]) -> None:
        """A child's metrics."""
        log_entries(self.client, self.children[name], entries)

    def child_end(self, name: str, status: str) -> None:
        """Close a child."""
        self.client.set_terminated(self.children.pop(name), status)

    def _log_params(self, run_id: str, params: dict[str, Any]) -> None:
        from mlflow.entities import Param

        entries = [Param(key, str(value)) for key, value in params.items()]
        for start in range(0, len(entries), PARAMS_AT_ONCE):
            self.client.log_batch(run_id, params=entries[start : start + PARAMS_AT_ONCE])

    def end(self, status: str, interrupted: bool) -> None:
        """Close the stage's run, its children, and the parent with it."""
        if self.monitor is not None:
            self.monitor.finish()
        for name in list(self.children):
            self.child_end(name, "FAILED")
        if interrupted:
            self.client.set_tag(self.run_id, "interrupted", "true")
        for run_id in (self.run_id, self.parent_id):
            if run_id:
                self.client.set_terminated(run_id, status)
