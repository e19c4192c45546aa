"""Messages to MLflow on disk, until MLflow has taken them: a folder for each run.

.results/mlflow/<when>-<process>/
    messages.jsonl   a line each: its number, a blank, the message; locked while its stage,
                     or the process that talks to MLflow for it, is alive
    taken            numbers of those that MLflow has taken
    reports.jsonl    metrics of a job with several workers that MLflow did not take
    files/           figures and models as they were, links where the file system has them
"""

import errno
import fcntl
import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from pipeline.files import root
from pipeline.tracking.messages import Log, Message, Start, from_line, to_line

MESSAGES, TAKEN, REPORTS, FILES = "messages.jsonl", "taken", "reports.jsonl", "files"
LIMIT = 64 * 2**20  # bytes of a run's messages; metrics beyond it are not kept
ROOM = 2**30  # bytes of all runs that wait; the oldest give way


def spool() -> Path:
    """Where messages are kept, also for the temporary copy of a queued DVC experiment."""
    return root() / ".results" / "mlflow"


class Journal:
    """The messages of a stage that runs, kept as it sends them.

    Where they cannot be kept, that is said once, and they go to MLflow all the same.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.file: IO[bytes] | None = None
        self.count = self.size = 0
        self.full = False  # whether metrics were left out
        self.whole = True  # whether everything else is kept
        name = f"{time.time_ns()}-{os.getpid()}"
        new = spool() / f".{name}"  # which nobody sends before it is locked
        try:
            new.mkdir(parents=True, mode=0o700)
            self.file = (new / MESSAGES).open("ab", buffering=0)
            fcntl.flock(self.file, fcntl.LOCK_EX)
            self.folder = new.rename(spool() / name)
        except OSError as error:
            self._give_up(error)

    @property
    def name(self) -> str:
        """Names the run; "" where nothing is kept."""
        return self.folder.name if self.folder else ""

    def add(self, message: Message) -> str:
        """Keep a message; the line that it is."""
        self.count += 1
        line = f"{self.count} {to_line(message)}"
        kept = line.encode()
        full = isinstance(message, Log) and self.size + len(kept) > LIMIT
        self.full = self.full or full
        if self.file is not None and self.whole and not full:
            try:
                if self.file.write(kept) < len(kept):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.size += len(kept)
            except OSError as error:
                with suppress(OSError):
                    os.truncate(self.file.fileno(), self.size)
                self._give_up(error)
        return line

    def keep(self, path: Path) -> str:
        """Keep a file as it is now; where it is found again, relative to the folder."""
        if self.folder is not None and self.whole and path.is_file():
            kept = Path(FILES) / str(self.count + 1) / path.name
            with suppress(OSError):
                (self.folder / kept).parent.mkdir(parents=True, exist_ok=True)
                _link(path.resolve(), self.folder / kept)
                return str(kept)
        return str(path.absolute())

    def close(self) -> None:
        """Leave it to whoever sends it."""
        if self.file is not None:
            self.file.close()
            self.file = None

    def _give_up(self, error: OSError) -> None:
        print(
            f"warning: {spool()} cannot be written ({error.strerror or error}); "
            "what MLflow does not take at once is lost",
            file=sys.stderr,
        )
        self.whole = False


class Kept:
    """The messages of a stage that has ended, which MLflow has not taken.

    Attributes:
        address: whose they are; None where the stage was killed before it said anything.

    Raises:
        BlockingIOError: its stage, or somebody who sends it, is alive.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = (folder / MESSAGES).open("rb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise
        try:
            first = self._message(self._lock.readline().decode(errors="replace"))[1]
            self.address = first.address if isinstance(first, Start) else None
        except ValueError:
            self.address = None

    def messages(self) -> list[tuple[int, Message]]:
        """The first one, which opens the run, and those that were not taken, in order."""
        done = taken(self.folder)
        lines = (self.folder / MESSAGES).read_text(encoding="utf-8", errors="replace").splitlines()
        found = []
        for line in lines:
            with suppress(ValueError):  # the last one, where a kill or a full disk cut it
                number, message = self._message(line)
                if number == 1 or number not in done:
                    found.append((number, message))
        return found

    @staticmethod
    def _message(line: str) -> tuple[int, Message]:
        number, _, message = line.partition(" ")
        return int(number), from_line(message)

    def close(self) -> None:
        """Leave it to others."""
        self._lock.close()


def waiting(where: Path) -> list[Kept]:
    """What is left of stages that have ended, the oldest first; each is locked."""
    found = []
    for folder in sorted(where.glob("[0-9]*-*")):
        try:
            kept = Kept(folder)
            if kept.address is not None:
                found.append(kept)
            else:
                remove(folder)
        except FileNotFoundError:  # half removed
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue
    return found


def make_room(kept: list[Kept], room: int = ROOM) -> list[Kept]:
    """Remove the oldest where all of them are more than there is room for; those that stay."""
    sizes = [sum(p.stat().st_size for p in k.folder.rglob("*") if p.is_file()) for k in kept]
    first = 0
    while sum(sizes[first:]) > room:
        remove(kept[first].folder)
        kept[first].close()
        first += 1
    return kept[first:]


def mark(folder: Path | None, number: int) -> None:
    """Note that MLflow has taken a message."""
    if folder is not None:
        with suppress(OSError), (folder / TAKEN).open("a") as file:  # else it is sent again
            file.write(f"{number}\n")


def taken(folder: Path) -> set[int]:
    """Numbers of the messages that MLflow has taken."""
    try:
        lines = (folder / TAKEN).read_text().splitlines()
    except OSError:
        return set()
    return {int(line) for line in lines if line.isdecimal()}


def keep_report(folder: Path, message: Log) -> None:
    """Keep metrics that a job's workers reported."""
    with (folder / REPORTS).open("a", encoding="utf-8") as file:
        file.write(to_line(message))


def reports(folder: Path | None) -> list[Message]:
    """Metrics that a job's workers reported and MLflow did not take."""
    if folder is None or not (folder / REPORTS).exists():
        return []
    return [from_line(line) for line in (folder / REPORTS).read_text("utf-8").splitlines()]


def remove(folder: Path | None) -> None:
    """Forget a run of which MLflow has taken everything."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    """A second name of a file that is only ever replaced; a copy across file systems."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
