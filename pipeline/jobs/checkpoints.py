"""Where a job's state lives until its stage has written its outs.

A job's folder in ``cluster.storage`` (a path, or a URL that pyarrow knows) is named by the stage
and the hash of its parameters and inputs: a job that was interrupted goes on when it is run again,
and a changed parameter starts afresh. The newest two states are kept; each begins with its digest,
so that a torn or damaged one is noticed and the one before it is taken.
"""

import hashlib
import io
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.errors import StageError

if TYPE_CHECKING:
    from pyarrow import fs

KEPT = 2
STALE = 7 * 24 * 3600  # seconds after which a stage's other unfinished jobs are given up


class Checkpoints:
    """The states of one job.

    Args:
        storage: ``cluster.storage``.
        stage: its name.
        key: hash of its parameters and inputs.
    """

    def __init__(self, storage: str, stage: str, key: str) -> None:
        self.storage = storage if "://" in storage else str(Path(storage).resolve())
        self.stage, self.job = stage, f"{stage}-{key}"
        self.folder = f"{self.storage.rstrip('/')}/{self.job}"

    def save(self, state: dict[str, Any]) -> None:
        """Write a state, whole or not at all, and remove the one before the last.

        Raises:
            StageError: it cannot be written, such as onto a full disk; the one before it stays.
        """
        system, root = self._open()
        folder = f"{root}/{self.job}"
        try:
            self._save(system, folder, state)
        except OSError as error:
            with suppress(OSError):
                _remove_parts(system, folder)
            raise StageError(
                f"a checkpoint cannot be written into {self.folder}: {error}; dvc repro goes on "
                "from the last one that was"
            ) from error

    def _save(self, system: "fs.FileSystem", folder: str, state: dict[str, Any]) -> None:
        system.create_dir(folder, recursive=True)
        _remove_parts(system, folder)  # of a process that was killed while it wrote
        there = self._numbers(system, folder)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getbuffer()
        path = f"{folder}/state-{(there[-1] if there else 0) + 1:06d}.pt"
        with system.open_output_stream(f"{path}.part") as file:
            file.write(hashlib.sha256(content).hexdigest().encode())
            file.write(content)
        if "://" not in self.storage:
            _flush(f"{path}.part")
        system.move(f"{path}.part", path)
        for number in there[: 1 - KEPT]:
            system.delete_file(f"{folder}/state-{number:06d}.pt")

    def load(self, device: torch.device | str = "cpu") -> dict[str, Any] | None:
        """The newest state that is whole; None where there is none.

        Raises:
            StageError: it holds something other than a stage writes; no code of it has run.
        """
        system, root = self._open()
        folder = f"{root}/{self.job}"
        for number in reversed(self._numbers(system, folder)):
            path = f"{folder}/state-{number:06d}.pt"
            with system.open_input_stream(path) as file:
                digest, content = file.read(64), file.read()
            if hashlib.sha256(content).hexdigest().encode() == digest:
                return self._state(content, path, device)
            print(f"[{self.stage}] {path} is damaged; trying the one before it", flush=True)
        return None

    def _state(self, content: bytes, path: str, device: torch.device | str) -> dict[str, Any]:
        try:
            state = torch.load(io.BytesIO(content), weights_only=True, map_location=device)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:  # of strange bytes torch's unpickler raises errors of any kind
            raise self._strange(path) from error
        if not isinstance(state, dict):
            raise self._strange(path)
        return state

    def _strange(self, path: str) -> StageError:
        return StageError(
            f"{path} is no checkpoint of this project: allowed are tensors, numbers, texts, lists "
            f"and dictionaries, and nothing else is read from it; find out who wrote it, and "
            f"remove {self.folder}: the job then begins afresh"
        )

    @contextmanager
    def mark(self) -> Iterator[str]:
        """A file in the storage while the block runs, for other nodes to look for; its address."""
        system, root = self._open()
        system.create_dir(root, recursive=True)
        name = f"mark-{uuid.uuid4().hex}"
        with system.open_output_stream(f"{root}/{name}") as file:
            file.write(b"")
        try:
            yield f"{self.storage.rstrip('/')}/{name}"
        finally:
            system.delete_file(f"{root}/{name}")

    def remove(self) -> None:
        """Remove this job's states, and those of other jobs of the stage that nobody finished."""
        from pyarrow import fs

        system, root = self._open()
        for entry in system.get_file_info(fs.FileSelector(root, allow_not_found=True)):
            files = fs.FileSelector(entry.path, allow_not_found=True, recursive=True)
            if entry.base_name == self.job or (
                entry.base_name.startswith(f"{self.stage}-")
                and all(_age(f) > STALE for f in system.get_file_info(files))
            ):
                system.delete_dir(entry.path)

    def _open(self) -> tuple["fs.FileSystem", str]:
        from pyarrow import fs

        if "://" in self.storage:
            system, path = fs.FileSystem.from_uri(self.storage)
            return system, str(path)
        return fs.LocalFileSystem(), self.storage

    @staticmethod
    def _numbers(system: "fs.FileSystem", folder: str) -> list[int]:
        from pyarrow import fs

        files = system.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        names = [f.base_name for f in files]
        return sorted(int(n[6:12]) for n in names if n.startswith("state-") and n.endswith(".pt"))


def _remove_parts(system: "fs.FileSystem", folder: str) -> None:
    """Remove states that were not written to their end."""
    from pyarrow import fs

    for file in system.get_file_info(fs.FileSelector(folder, allow_not_found=True)):
        if file.base_name.startswith("state-") and file.extension == "part":
            system.delete_file(file.path)


def _flush(path: str) -> None:
    """Onto the disk, so that a rename never names a file whose content was lost with the power."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _age(file: "fs.FileInfo") -> float:
    return time.time() - file.mtime.timestamp() if file.mtime else 0.0
