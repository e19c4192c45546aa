"""A Ray of one's own, on this machine: started, again where it did not start, and cleared away."""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from pipeline.errors import StageError
from pipeline.jobs.ray_private import in_folder, on_loopback
from pipeline.tracking.origin import is_gone, this_process

TRIES = 3
OWNER = "owner"  # in a session's folder: the process that it belongs to


@contextmanager
def own_ray(say: Callable[[str], None], *, dashboard: bool, logs: bool) -> Iterator[None]:
    """Ray, listening on 127.0.0.1 only, in a folder that nobody else may look into.

    Raises:
        StageError: it did not start.
    """
    import ray

    with session_folder() as folder:
        try:
            start(folder, say, dashboard=dashboard, logs=logs)
            yield
        finally:
            ray.shutdown()
            end_processes(folder)


@contextmanager
def session_folder() -> Iterator[Path]:
    """A new folder for Ray's files; those of processes that were killed are removed."""
    base = _short_folder()
    for owner in base.glob(f"ray-*/{OWNER}"):
        with suppress(OSError, ValueError):  # it is no owner's, or was removed just now
            if owner.stat().st_uid == os.getuid() and is_gone(owner.read_text(encoding="utf-8")):
                shutil.rmtree(owner.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir=base))  # its mode is 0700
    try:
        (folder / OWNER).write_text(this_process(), encoding="utf-8")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _short_folder() -> Path:
    """Where Ray's sockets can be: the system allows them a path of 107 characters."""
    folder = tempfile.gettempdir()
    return Path(folder if len(folder) < 24 else "/tmp")


def start(folder: Path, say: Callable[[str], None], *, dashboard: bool, logs: bool) -> None:
    """Start Ray, up to three times: on a busy machine its processes may be late for each other."""
    import ray

    for attempt in range(1, TRIES + 1):
        try:
            with on_loopback():
                ray.init(
                    address="local",
                    include_dashboard=dashboard,
                    logging_level=logging.ERROR,
                    log_to_driver=logs,
                    # Ray opens its folder to everybody; the one around it is closed
                    **in_folder(str(folder / str(attempt))),
                )
            return
        except Exception as error:
            ray.shutdown()
            end_processes(folder)
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            if attempt == TRIES:
                raise StageError(
                    f"Ray did not start in {TRIES} attempts, the last one with: {why}; a machine "
                    "that is too busy or has no memory left is the usual cause"
                ) from error
            say(f"Ray did not start ({why}); attempt {attempt + 1} of {TRIES}")


def end_processes(folder: Path) -> None:
    """End what is left of the processes that this one started for a session."""
    left: list[psutil.Process] = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if any(str(folder) in part for part in _line_of(child)):
                left += [child, *child.children(recursive=True)]
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=10)


def _line_of(process: psutil.Process) -> list[str]:
    """Its command line, which one that has just begun does not show for a moment."""
    deadline = time.monotonic() + 1
    line: list[str] = process.cmdline()
    while not line and time.monotonic() < deadline:
        time.sleep(0.01)
        line = process.cmdline()
    return line
