"""Archives of images: tar, with any of Python's compressions, and zip."""

import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.data.folders import ignored, is_split
from pipeline.errors import DataError
from pipeline.files import root
from stdb import printable as shown

UNPACKED = Path("data/unpacked")
LONGEST, DEEPEST = 255, 100  # bytes of a file's name, folders around a file


class Unpacked:
    """An archive's contents in a folder that goes, unless it is kept.

    Attributes:
        folder: what is in the archive, without a single folder around everything.
    """

    def __init__(self, inside: Path, kept: Path) -> None:
        self._inside, self._kept = inside, kept
        self.folder = _skip_single_folders(inside)

    def keep(self) -> Path:
        """The folder, where it stays and is found the next time."""
        if self._inside != self._kept:
            self._inside.rename(self._kept)
        return _skip_single_folders(self._kept)


@contextmanager
def unpacked(archive: Path) -> Iterator[Unpacked]:
    """Unpack an archive; one that was kept before is not unpacked again.

    Raises:
        DataError: it is broken, empty, larger than the disk has room, or would write elsewhere.
    """
    state = archive.stat()
    place = root() / UNPACKED
    kept = place / f"{archive.name}-{state.st_size}-{state.st_mtime_ns}"
    if kept.exists():
        yield Unpacked(kept, kept)
        return
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as temporary:
        inside = Path(temporary) / "all"
        inside.mkdir()
        _unpack(archive, inside)
        try:
            yield Unpacked(inside, kept)
        except DataError as error:  # names in it are those of the archive
            raise DataError(str(error).replace(str(inside), shown(archive))) from error


def _unpack(archive: Path, folder: Path) -> None:
    try:
        if tarfile.is_tarfile(archive):
            _unpack_tar(archive, folder)
        elif zipfile.is_zipfile(archive):
            _unpack_zip(archive, folder)
        else:
            raise ValueError("it is neither a tar nor a zip file, or not all of one")
    except Exception as error:  # every compression has errors of its own for a broken file
        why = shown(error) or type(error).__name__
        raise DataError(
            f"{shown(archive)} cannot be unpacked ({why}); allowed: tar, tar.gz, zip"
        ) from error
    if not any(folder.iterdir()):
        raise DataError(f"{shown(archive)} is empty; allowed: an archive of class folders")


def _unpack_zip(archive: Path, folder: Path) -> None:
    room = _Room(folder)
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            member.filename = member.filename.replace("\\", "/")  # as some write it on Windows
            room.take(member.filename, member.file_size)
            file.extract(member, folder)


def _unpack_tar(archive: Path, folder: Path) -> None:
    room = _Room(folder)

    def check(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        room.take(member.name, member.size)
        return tarfile.data_filter(member, path)

    with tarfile.open(archive) as file:
        file.extractall(folder, filter=check)
        rest: Any = file.fileobj
        rest.seek(file.offset)  # tarfile takes a cut-off end for the end
        if not rest.read().startswith(bytes(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError("it ends before its end mark")


class _Room:
    """What may be unpacked into a folder: nothing outside it, no more than the disk has room."""

    def __init__(self, folder: Path) -> None:
        self.free = shutil.disk_usage(folder).free

    def take(self, name: str, size: int) -> None:
        """A member of the archive, before it is written."""
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts:
            raise ValueError(f"it would write to {shown(name)}, outside its folder")
        if len(parts) > DEEPEST or any(len(os.fsencode(part)) > LONGEST for part in parts):
            raise ValueError(
                f"a name in it has {len(name)} characters; allowed: {LONGEST} bytes and {DEEPEST} "
                "folders"
            )
        self.free -= size
        if self.free < 0:
            raise ValueError("its contents are larger than what is free on the disk")


def _skip_single_folders(folder: Path) -> Path:
    """Without a single folder around everything, unless that is a split's."""
    inside = [entry for entry in folder.iterdir() if not ignored(entry)]
    if len(inside) == 1 and inside[0].is_dir() and not inside[0].is_symlink():
        return folder if is_split(inside[0].name) else _skip_single_folders(inside[0])
    return folder
