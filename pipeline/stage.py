"""What every stage does around its work: check parameters, open a run, report errors.

dvc.yaml is the one place that says what a stage reads and writes; its parameters, inputs and outs
are looked up there, so that what MLflow shows and what resumes a job is what DVC tracks.
"""

import atexit
import gc
import hashlib
import json
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.command import FAULT, INTERRUPTED, parser, print_on_any_terminal, status_of
from pipeline.errors import ParamsError, StageError
from pipeline.files import DATA, check_outs, digest, files_below, write_json
from pipeline.handed_on import RUNS, Run, read_data_summary, read_runs
from pipeline.jobs.lock import Lock
from pipeline.params import Params, load_params
from pipeline.tracking.messages import Dataset, Start
from pipeline.tracking.origin import execution, is_gone
from pipeline.tracking.tracker import Tracker
from pipeline.typed import problems, read_yaml

__all__ = ["Stage", "StageError", "run_stage", "stage_command"]

LOCKS = Path(".results")  # a file for each stage that ran here
HANDED_ON = ("data", "metrics", "models", "plots")  # folders of what stages hand on to each other


class Spec(BaseModel):
    """What dvc.yaml says of a stage."""

    model_config = ConfigDict(frozen=True, strict=True)

    deps: list[str] = []
    params: list[str | dict[str, None]] = []
    outs: list[str | dict[str, Any]] = []
    metrics: list[str | dict[str, Any]] = []
    plots: list[str | dict[str, Any]] = []


class Stage:
    """One execution of a stage.

    Attributes:
        name: as in dvc.yaml, or in another ``file`` of its kind.
        params: all parameters; the stage uses those that it tracks, and ``cluster``.
        tracked: the tracked parameters, ``section.key`` → value.
        inputs: path → sha256 of every file that the stage depends on.
        handed_on: where those of them are that earlier stages made.
        key: hash of both; names the checkpoints of the stage's job.
        above: names the dvc that runs it.
        locks: what no other process may do meanwhile; let go of at its end.
        tracker: its MLflow run.
    """

    def __init__(self, name: str, params: Params, file: Path = Path("dvc.yaml")) -> None:
        self.name, self.params = name, params
        spec = read_spec(file, name)
        self.outs = [
            Path(next(iter(out)) if isinstance(out, dict) else out)
            for out in (*spec.outs, *spec.metrics, *spec.plots)
        ]
        check_outs(self.outs)
        read_runs()  # a broken one is refused now, and not after the work
        self.tracked = _flatten(params.model_dump(), spec.params)
        self.inputs = {str(f): digest(f) for d in spec.deps for f in files_below(Path(d))}
        made = [Path(d) for d in spec.deps if d.split("/")[0] in HANDED_ON]
        self.handed_on = [path.resolve() for path in made]
        identity = json.dumps([name, self.tracked, self.inputs], sort_keys=True)
        self.key = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self.above = execution()
        self.locks: list[Lock] = []
        self.hold(LOCKS / f"lock-{name}", "this stage")
        sections = list(Params.model_fields)
        self.tracker = Tracker(
            Start(
                stage=name,
                job=f"{name}-{self.key}",
                params=self.tracked,
                inputs=self.inputs,
                everything=_flatten(params.model_dump(), sections),
                datasets=datasets(params, self.inputs),
                # T and more: the execution is not one of this T
                searches=file != Path("dvc.yaml"),
            )
        )

    def hold(self, path: Path, what: str) -> None:
        """Wait until no other process does ``what``, and let none begin until the stage ends."""
        self.locks.append(Lock(path, what, self.say))

    @property
    def runs_again(self) -> bool:
        """Whether another process waits to run it, or the dvc above it was killed."""
        return is_gone(self.above) or any(lock.awaited for lock in self.locks)

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        print(f"[{self.name}] {text}", flush=True)

    def log(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Metrics of the MLflow run."""
        self.tracker.log(metrics, step)


def stage_command(name: str, main: Callable[[Stage], None], doc: str | None) -> None:
    """A stage as a program, which takes no arguments; ``--help`` says what it does."""
    print_on_any_terminal()
    parser(doc, name).parse_args()
    run_stage(name, main)


def run_stage(name: str, main: Callable[[Stage], None], file: Path = Path("dvc.yaml")) -> None:
    """Run a stage as a program; where it fails, a message on stderr and the error's exit status.

    ctrl-C, and the SIGTERM of a scheduler, end it in order: the run is closed, checkpoints stay.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    atexit.register(gc.freeze)  # else Python's end looks through all of torch, for half a second
    started: list[Stage] = []

    def work() -> None:
        start = time.monotonic()
        stage = Stage(name, load_params(), file)
        started.append(stage)
        main(stage)
        seconds = time.monotonic() - start
        stage.log({"duration_seconds": seconds})
        note_run(name, seconds)
        stage.say(f"done in {seconds:.0f} s")

    status = FAULT
    try:
        status = status_of(
            work,
            f"\nerror in stage {name}",
            f"\nstage {name} was interrupted; dvc repro goes on from its last checkpoint",
        )
    finally:
        for stage in started:
            stage.tracker.end("FAILED" if status else "FINISHED", status == INTERRUPTED)
            for lock in stage.locks:
                lock.release()
    if status:
        sys.exit(status)


def read_spec(file: Path, name: str) -> Spec:
    """What a file such as dvc.yaml says of a stage.

    Raises:
        ParamsError: the file has no such stage, or is none of DVC's; names it, and the key.
    """
    whole = read_yaml(file)
    stages = whole.get("stages") if isinstance(whole, dict) else None
    if not isinstance(stages, dict) or name not in stages:
        raise ParamsError(f"{file} has no stage {name}; allowed: stages.{name}, as git has it")
    try:
        return Spec.model_validate(stages[name])
    except ValidationError as error:
        said = problems(error, Spec)[0]
        raise ParamsError(f"{file} cannot be used: stages.{name}.{said}") from None


def datasets(params: Params, inputs: dict[str, str]) -> list[Dataset]:
    """The splits among a stage's inputs, as MLflow shows data sets."""
    summary = read_data_summary()
    known = summary.model_dump(exclude_unset=True) if summary else {}
    contexts = {"train": "training", "validation": "validation", "test": "test"}
    return [
        Dataset(
            name=f"{params.data.source} {name}",
            digest=inputs[path],
            path=path,
            context=context,
            profile={k: known.get(k) for k in ("shape", "classes")} | known.get(name, {}),
        )
        for name, context in contexts.items()
        if (path := str(DATA / f"{name}.safetensors")) in inputs
    ]


def note_run(name: str, seconds: float) -> None:
    """For the report: when, where and how long a stage ran; no out, since it differs each time."""
    known = read_runs()
    ended = time.strftime("%Y-%m-%d %H:%M:%S %z")
    known[name] = Run(seconds=seconds, ended=ended, machine=socket.gethostname())
    write_json(RUNS, {stage: run.model_dump() for stage, run in known.items()})


def _flatten(params: dict[str, Any], tracked: Sequence[str | dict[str, None]]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for entry in tracked:
        if isinstance(entry, dict):  # all of another file
            for file in entry:
                values = read_yaml(Path(file))
                flat |= values if isinstance(values, dict) else {}  # the stage refuses it
            continue
        value: Any = params
        for part in entry.split("."):
            if not isinstance(value, dict) or part not in value:
                raise ParamsError(f"dvc.yaml has the parameter {entry}, which params.yaml has not")
            value = value[part]
        if isinstance(value, dict):
            flat |= {f"{entry}.{key}": v for key, v in value.items()}
        else:
            flat[entry] = value
    return flat
