"""A sqlite database of MLflow's: made by one process at a time, its artefacts beside it."""

import fcntl
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

ARTIFACTS = "mlartifacts"
PATIENCE = 30.0  # seconds that another process may hold the database
# columns of MLflow's tables that say where artefacts lie
PLACES = (
    *(("experiments", "artifact_location"), ("runs", "artifact_uri")),
    *(("logged_models", "artifact_location"),),
    *(("model_versions", "source"), ("model_versions", "storage_location")),
)


def file_of(uri: str) -> Path | None:
    """The file of a sqlite database; None for any other address."""
    head, found, path = uri.partition(":///")
    if not found or head.partition("+")[0] != "sqlite":
        return None
    return Path(path.partition("?")[0]).absolute()


def artifacts_of(uri: str) -> str | None:
    """Where artefacts of a sqlite database go; other servers and databases know it themselves."""
    file = file_of(uri)
    return None if file is None else (file.parent / ARTIFACTS).as_uri()


@contextmanager
def alone(uri: str) -> Iterator[None]:
    """One process at a time, on a sqlite database: MLflow makes its tables without a lock."""
    file = file_of(uri)
    lock = None
    if file is not None:
        with suppress(OSError):  # MLflow then says why the folder cannot be written
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = file.with_name(f"{file.name}.lock").open("w")
    if lock is None:
        yield
        return
    with lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def adopt(uri: str) -> str:
    """Let a database that was copied or renamed with its folder name the artefacts beside it.

    MLflow keeps absolute locations. Those of a folder ``mlartifacts`` that is gone, or beside which
    lies another copy of the database, become those beside this one; an artefact that was not
    copied along stays where it is.

    Returns:
        The place that was named before, "" where nothing changed.
    """
    file, here = file_of(uri), artifacts_of(uri)
    if file is None or here is None or not file.exists():
        return ""
    with closing(sqlite3.connect(file, timeout=PATIENCE)) as database, database:
        found = database.execute("SELECT DISTINCT artifact_location FROM experiments")
        outdated = [place for (place,) in found if place and _is_outdated(place, here, file)]
        for place in outdated:
            for table, column in PLACES:
                _move(database, table, column, (place, here))
    return str(_path(outdated[0])) if outdated else ""


def _is_outdated(place: str, here: str, file: Path) -> bool:
    if place == here or not place.startswith("file:") or not place.endswith(f"/{ARTIFACTS}"):
        return False
    folder = _path(place)
    return not folder.exists() or (folder.parent / file.name).exists()


def _move(database: sqlite3.Connection, table: str, column: str, places: tuple[str, str]) -> None:
    old, new = places
    rows = database.execute(f"SELECT rowid, {column} FROM {table}").fetchall()
    for row, value in rows:
        if value != old and not (value or "").startswith(f"{old}/"):
            continue
        moved = new + value[len(old) :]
        if value == old or _path(moved).exists() or not _path(value).exists():
            database.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (moved, row))


def _path(uri: str) -> Path:
    return Path(unquote(urlsplit(uri).path))
