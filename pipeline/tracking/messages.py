"""What a stage tells the process that talks to MLflow: typed messages, a line of JSON each."""

import json
import re
import time
from collections.abc import Mapping
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from pipeline.tracking.address import EXPERIMENT

Entry = tuple[str, float, int, int]  # a metric: key, value, milliseconds since 1970, step


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Dataset(_Record):
    """A split among a stage's inputs, as MLflow shows data sets."""

    name: str
    """Name that MLflow shows."""
    digest: str
    """sha256 of the file."""
    path: str
    """Path of the file in the repository."""
    context: str
    """``training``, ``validation`` or ``test``."""
    profile: dict[str, Any]
    """Number of images, shape, classes."""


class Start(_Record):
    """Open the stage's run, or go on in the one that was interrupted, below its execution's."""

    kind: Literal["start"] = "start"
    stage: str
    """Name of the stage."""
    job: str
    """Name of its job, by which an interrupted run is found."""
    params: dict[str, Any]
    """Parameters that the stage tracks."""
    inputs: dict[str, str] = {}
    """Path → sha256 of the files that it depends on."""
    everything: dict[str, Any] = {}
    """All parameters, for the run of the whole execution."""
    datasets: list[Dataset] = []
    """Splits among the inputs."""
    searches: bool = False
    """Whether it searches T and more, so that the execution is not named after one T."""
    process: str = ""
    """The process that the stage runs in."""
    execution: str = ""
    """The process that runs the pipeline."""
    origin: dict[str, str] = {}
    """Tags that lead to the code and to DVC."""
    journal: str = ""
    """Names the run among those that wait on disk."""
    address: str = ""
    """Names the tracking server, without secrets; "" is the database at the root."""
    experiment: str = EXPERIMENT
    """Name of the experiment."""
    experiment_id: str = ""
    """Number of the experiment, where it is named by its number."""
    time: int | None = None
    """Milliseconds since 1970."""


class Log(_Record):
    """Metrics of the stage's run, or of a child's."""

    kind: Literal["log"] = "log"
    entries: list[Entry]
    """The metrics."""
    child: str | None = None
    """Name of the child."""


class Tags(_Record):
    """Tags of the stage's run."""

    kind: Literal["tags"] = "tags"
    tags: dict[str, str]
    """Key → value."""


class Figure(_Record):
    """A file as an artefact of the stage's run."""

    kind: Literal["figure"] = "figure"
    path: str
    """Path of the file."""


class Summary(_Record):
    """The execution's final figures, for its run."""

    kind: Literal["summary"] = "summary"
    entries: list[Entry]
    """The metrics."""
    text: str
    """Description, in Markdown."""
    path: str
    """Path of a page that becomes an artefact."""


class About(_Record):
    """What the registry says of a network."""

    accuracy: float
    """On validation."""
    timesteps: int
    """T that it was trained for."""
    classes: list[str]
    """Names of the classes."""
    architecture: str
    """``network.architecture``."""


class Model(_Record):
    """The network of a file of ``stdb.save`` as a registered model."""

    kind: Literal["model"] = "model"
    path: str
    """Path of the file."""
    name: str
    """Name of the registered model."""
    example: list[Any]
    """uint8 images (1, C, H, W), nested."""
    about: About
    """What it is."""
    child: str | None = None
    """Name of the child that it is of."""


class Child(_Record):
    """Begin a run below the stage's, or go on in the one of this name that there is."""

    kind: Literal["child"] = "child"
    name: str
    """Name of the child."""
    params: dict[str, Any]
    """Its parameters."""


class ChildEnd(_Record):
    """Close a child."""

    kind: Literal["child_end"] = "child_end"
    name: str
    """Name of the child."""
    status: str
    """FINISHED or FAILED."""


class End(_Record):
    """Close the stage's run."""

    kind: Literal["end"] = "end"
    status: str
    """FINISHED or FAILED."""
    interrupted: bool = False
    """Whether the next attempt is to go on in it."""
    time: int | None = None
    """Milliseconds since 1970."""


Message = Start | Log | Tags | Figure | Summary | Model | Child | ChildEnd | End
_ADAPTER: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")])


def to_line(message: Message) -> str:
    """A message as a line; metrics may be NaN or infinite, which strict JSON has no words for."""
    return json.dumps(message.model_dump()) + "\n"


def from_line(line: str) -> Message:
    """The message that :func:`to_line` wrote."""
    return _ADAPTER.validate_python(json.loads(line))


def key_of(name: str) -> str:
    """A name as MLflow takes it for a metric, parameter or tag: its characters, 250 of them."""
    parts = re.sub(r"[^/\w.\- :]", "_", text_of(name)).split("/")
    return "/".join(part for part in parts if part.strip(". "))[:250].rstrip("/") or "_"


def text_of(value: Any) -> str:
    """A value as text that any database takes: without NUL and halves of characters."""
    return str(value).replace("\0", "\ufffd").encode(errors="replace").decode()


def now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


def entries(metrics: Mapping[str, float], step: int) -> list[Entry]:
    """Metrics as they are now."""
    when = now()
    return [(key, float(value), when, step) for key, value in metrics.items()]


def child_of(timesteps: int) -> str:
    """Name of the run of a T, below that of a stage that has several."""
    return f"T={timesteps}"


def logs_of_rows(rows: list[dict[str, float]]) -> list[Log]:
    """The metrics of epochs, a row each; of rows that name their T, for the run of that T."""
    logs = []
    for steps, of_one in groupby(rows, lambda row: row.get("timesteps")):
        plain = [{k: v for k, v in row.items() if k != "timesteps"} for row in of_one]
        child = None if steps is None else child_of(int(steps))
        logs.append(Log(entries=entries_of_rows(plain), child=child))
    return logs


def entries_of_rows(rows: list[dict[str, float]]) -> list[Entry]:
    """The metrics of epochs, a row each; ``epoch`` is the step."""
    logged = []
    for row in rows:
        values = {key: value for key, value in row.items() if key != "epoch"}
        logged += entries(values, int(row["epoch"]))
    return logged
