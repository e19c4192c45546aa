"""What every stage does around its work: check parameters, open a run, report errors, write outs.

dvc.yaml is the one place that says what a stage reads and writes; its parameters, inputs and outs
are looked up there, so that what MLflow shows and what resumes a job is what DVC tracks.
"""

import csv
import hashlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from pipeline.data import DataError
from pipeline.params import Params, ParamsError, load_params
from pipeline.tracking import Tracker
from stdb import ConversionError

DATA = Path("data/prepared")  # what the stages hand on to each other
ANN = Path("models/ann.safetensors")
THRESHOLDS = Path("models/thresholds.json")
CONVERSION = Path("models/conversion.json")
SNN = Path("models/snn.safetensors")
RUNS = Path(".results/runs.json")  # when and how long each stage ran here last; nobody's input
ROOM = 64 * 2**20  # bytes that have to be free where outs are written


class StageError(RuntimeError):
    """A stage cannot go on; the message says why and what to do."""


class Stage:
    """One execution of a stage.

    Attributes:
        name: as in dvc.yaml, or in another ``file`` of its kind.
        params: all parameters; the stage uses those that it tracks, and ``cluster``.
        tracked: the tracked parameters, ``section.key`` → value.
        inputs: path → sha256 of every file that the stage depends on.
        key: hash of both; names the checkpoints of the stage's job.
        tracker: its MLflow run.
    """

    def __init__(self, name: str, params: Params, file: Path = Path("dvc.yaml")) -> None:
        self.name, self.params = name, params
        spec = yaml.safe_load(file.read_text())["stages"][name]
        self.outs = [
            Path(next(iter(o)) if isinstance(o, dict) else o)
            for group in ("outs", "metrics", "plots")
            for o in spec.get(group, [])
        ]
        check_outs(self.outs)
        self.tracked = _flatten(params.model_dump(), spec.get("params", []))
        self.inputs = {str(f): digest(f) for d in spec["deps"] for f in _files(Path(d))}
        identity = json.dumps([name, self.tracked, self.inputs], sort_keys=True)
        self.key = hashlib.sha256(identity.encode()).hexdigest()[:16]
        sections = list(Params.model_fields)
        everything = _flatten(params.model_dump(), sections)
        splits = datasets(params, self.inputs)
        searches = file != Path("dvc.yaml")  # T and more: the execution is not one of this T
        self.tracker = Tracker(
            name, self.tracked, self.inputs, self.key, everything, splits, searches
        )

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


def datasets(params: Params, inputs: dict[str, str]) -> list[dict[str, Any]]:
    """The splits among a stage's inputs, as MLflow shows data sets."""
    summary = Path("metrics/data.json")
    known = json.loads(summary.read_text()) if summary.exists() else {}
    contexts = {"train": "training", "validation": "validation", "test": "test"}
    return [
        {
            "name": f"{params.data.source} {name}",
            "digest": inputs[path],
            "path": path,
            "context": context,
            "profile": {k: known.get(k) for k in ("shape", "classes")} | known.get(name, {}),
        }
        for name, context in contexts.items()
        if (path := str(DATA / f"{name}.safetensors")) in inputs
    ]


def note_run(name: str, seconds: float) -> None:
    """For the report: when, where and how long a stage ran; no out, since it differs each time."""
    known = json.loads(RUNS.read_text()) if RUNS.exists() else {}
    ended = time.strftime("%Y-%m-%d %H:%M:%S %z")
    known[name] = {"seconds": seconds, "ended": ended, "machine": socket.gethostname()}
    write_json(RUNS, known)


def check_outs(outs: list[Path]) -> None:
    """Find out before the work, not after it, that an out cannot be written."""
    for out in outs:
        probe = out.parent / f".{out.name}.probe"
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise StageError(f"{out} cannot be written: {error}") from error
        state = os.statvfs(out.parent)
        if state.f_bavail * state.f_frsize < ROOM:
            raise StageError(
                f"there is no room for {out}: {state.f_bavail * state.f_frsize >> 20} MiB free, "
                f"{ROOM >> 20} MiB needed"
            )


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A path to write to that replaces ``path`` when all went well, and leaves it alone else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, atomically, the same bytes for the same value."""
    with writing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with the same keys as CSV, atomically."""
    with writing(path) as temporary, temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def read_json(path: Path) -> Any:
    """Read what an earlier stage wrote."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise StageError(f"{path} cannot be read ({error}); run dvc repro") from error


def digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from sorted(
            p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts
        )
    else:
        raise StageError(f"{path} is missing; run dvc repro, which makes it")


def _flatten(params: dict[str, Any], tracked: Sequence[str | dict[str, None]]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for entry in tracked:
        if isinstance(entry, dict):  # all of another file
            for file in entry:
                flat |= yaml.safe_load(Path(file).read_text())
            continue
        value: Any = params
        for part in entry.split("."):
            value = value[part]
        if isinstance(value, dict):
            flat |= {f"{entry}.{key}": v for key, v in value.items()}
        else:
            flat[entry] = value
    return flat
