"""One process at a time: a stage in a repository, a job in its storage."""

import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path

from pipeline.tracking.origin import this_process


class Lock:
    """A file that one process holds; the system lets go of it when the process ends, however.

    Args:
        path: the file. It may be removed while it is held; who waited makes it again.
        what: is done under it, for the person who watches.
        say: takes a line where another process holds it, or where the disk knows no locks.
    """

    def __init__(self, path: Path, what: str, say: Callable[[str], None]) -> None:
        self.path, self.waiting = path, path.with_name(f"{path.name}-waiting")
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a+", encoding="utf-8")
            try:
                self._take(what, say)
            except OSError as error:  # such as NFS without its lock service
                say(f"{path} cannot be locked ({error}); see that {what} runs once at a time")
                return
            if path.exists() and os.path.samestat(path.stat(), os.fstat(self.file.fileno())):
                break
            self.file.close()  # of a folder that was removed meanwhile
        self.file.truncate(0)
        self.file.write(this_process())
        self.file.flush()

    def _take(self, what: str, say: Callable[[str], None]) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with self.waiting.open("a", encoding="utf-8") as mark:
                fcntl.flock(mark, fcntl.LOCK_SH)
                say(f"{self._holder()} runs {what} already; waiting for it to end")
                fcntl.flock(self.file, fcntl.LOCK_EX)

    def _holder(self) -> str:
        self.file.seek(0)
        host, _, rest = self.file.read().partition(" ")
        process = rest.partition(" ")[0]
        if not process:
            return "another process"
        ends = f" (`kill {process}` ends it)" if host == socket.gethostname() else ""
        return f"process {process} on {host}{ends}"

    @property
    def awaited(self) -> bool:
        """Whether another process waits for it."""
        try:
            with self.waiting.open(encoding="utf-8") as mark:
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # there is no such file: nobody ever waited
            pass
        return False

    def release(self) -> None:
        """Let another process have it."""
        self.file.close()
