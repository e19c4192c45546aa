"""Files: what stages hand on to each other, reading and writing them, whole or not at all."""

import csv
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipeline import reading
from pipeline.errors import StageError

DATA = Path("data/prepared")  # of the repository, as all of these
ANN = Path("models/ann.safetensors")
THRESHOLDS = Path("models/thresholds.json")
BALANCED = Path("models/balanced.safetensors")
CONVERSION = Path("models/conversion.json")
SNN = Path("models/snn.safetensors")
ZOO = Path("models/zoo")
SNNS = Path("models/snn")
METRICS = Path("metrics")
PLOTS = Path("plots")
REPORT = Path("report")

ROOM = 64 * 2**20  # bytes that have to be free where outs are written


def root() -> Path:
    """The repository, also from within the temporary copy of a queued DVC experiment."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


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
    """A path to write to that replaces ``path`` when all went well, and leaves it alone else.

    The file gets the mode of any new one, also from a writer that would hide it from others.

    Raises:
        StageError: it cannot be written, such as onto a full disk; names ``path``.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise StageError(f"{path} cannot be written: {error}") from error
    except RuntimeError as error:
        if "inline_container" not in str(error):  # torch.save's only name for a failed write
            raise
        raise StageError(f"{path} cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text, atomically."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON, atomically, the same bytes for the same value."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with the same keys as CSV, atomically."""
    with writing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def read_json(path: Path) -> Any:
    """Read what an earlier stage wrote."""
    try:
        return reading.read_json(path)
    except (OSError, ValueError) as error:
        raise StageError(f"{path} cannot be read ({error}); run dvc repro") from error


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read rows that an earlier stage wrote; values are text."""
    try:
        return reading.read_csv(path)
    except (OSError, ValueError) as error:
        raise StageError(f"{path} cannot be read ({error}); run dvc repro") from error


def digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(path: Path) -> Iterator[Path]:
    """A file itself, or all files of a folder in order; Python's caches left out."""
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from sorted(
            p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts
        )
    else:
        raise StageError(f"{path} is missing; run dvc repro, which makes it")
