"""What every stage does around its work: check parameters, open a run, report errors.

dvc.yaml is the one place that says what a stage reads and writes; its parameters, inputs and outs
are looked up there, so that what MLflow shows and what resumes a job is what DVC tracks.
"""

import hashlib
import json
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import DataError, ParamsError, StageError
from pipeline.files import DATA, METRICS, check_outs, digest, files_below, read_json, write_json
from pipeline.jobs.lock import Lock
from pipeline.params import Params, load_params
from pipeline.tracking.messages import Dataset, Start
from pipeline.tracking.origin import execution, is_gone
from pipeline.tracking.tracker import Tracker
from pipeline.typed import read_yaml
from stdb import ConversionError

__all__ = ["RUNS", "Stage", "StageError", "run_stage"]

RUNS = Path(".results/runs.json")  # when and how long each stage ran here last; nobody's input
LOCKS = Path(".results")  # a file for each stage that ran here
HANDED_ON = ("data", "metrics", "models", "plots")  # folders of what stages hand on to each other


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
        spec = yaml.safe_load(file.read_text(encoding="utf-8"))["stages"][name]
        self.outs = [
            Path(next(iter(o)) if isinstance(o, dict) else o)
            for group in ("outs", "metrics", "plots")
            for o in spec.get(group, [])
        ]
        check_outs(self.outs)
        self.tracked = _flatten(params.model_dump(), spec.get("params", []))
        self.inputs = {str(f): digest(f) for d in spec["deps"] for f in files_below(Path(d))}
        made = [Path(d) for d in spec["deps"] if Path(d).parts[0] in HANDED_ON]
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


def run_stage(name: str, main: Callable[[Stage], None], file: Path = Path("dvc.yaml")) -> None:
    """Run a stage as a program: exit 0, or a message on stderr and exit 1.

    ctrl-C, and the SIGTERM of a scheduler, end it in order: the run is closed, checkpoints stay.
    """
    start = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    stage, status, interrupted = None, "FAILED", False
    try:
        stage = Stage(name, load_params(), file)
        main(stage)
        seconds = time.monotonic() - start
        stage.log({"duration_seconds": seconds})
        status = "FINISHED"
        note_run(name, seconds)
        stage.say(f"done in {seconds:.0f} s")
    except (ParamsError, DataError, ConversionError, StageError, OSError) as error:
        print(f"\nerror in stage {name}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        interrupted = True
        print(
            f"\nstage {name} was interrupted; dvc repro goes on from its last checkpoint",
            file=sys.stderr,
        )
        sys.exit(130)
    finally:
        if stage is not None:
            stage.tracker.end(status, interrupted)
            for lock in stage.locks:
                lock.release()


def datasets(params: Params, inputs: dict[str, str]) -> list[Dataset]:
    """The splits among a stage's inputs, as MLflow shows data sets."""
    summary = METRICS / "data.json"
    known = read_json(summary) if summary.exists() else {}
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
    known = read_json(RUNS) if RUNS.exists() else {}
    ended = time.strftime("%Y-%m-%d %H:%M:%S %z")
    known[name] = {"seconds": seconds, "ended": ended, "machine": socket.gethostname()}
    write_json(RUNS, known)


def _flatten(params: dict[str, Any], tracked: Sequence[str | dict[str, None]]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for entry in tracked:
        if isinstance(entry, dict):  # all of another file
            for file in entry:
                flat |= read_yaml(Path(file))
            continue
        value: Any = params
        for part in entry.split("."):
            value = value[part]
        if isinstance(value, dict):
            flat |= {f"{entry}.{key}": v for key, v in value.items()}
        else:
            flat[entry] = value
    return flat
