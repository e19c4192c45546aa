"""Class folders as people have them: where the splits, the classes and the images are.

One folder per class, or folders of splits with one folder per class in each. What is not plain is
refused: a guess would teach a network something else, and nobody would notice.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.checks import LISTED, Faults, check_classes, check_counts
from pipeline.errors import DataError
from stdb import printable as shown

SPLITS = {  # names of their folders, in any case
    "train": ("train", "training", "train_set", "training_set"),
    "validation": ("val", "valid", "validation", "dev", "val_set", "validation_set", "dev_set"),
    "test": ("test", "testing", "test_set", "testing_set"),
}
ALLOWED = "; ".join(f"{names[0]}/ (or {', '.join(names[1:])})" for names in SPLITS.values())
LEFT_BEHIND = {  # by systems and programs, beside what begins with a dot
    *("__macosx", "@eadir", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__pycache__"),
    *("$recycle.bin", "system volume information", "lost+found", "#recycle"),
}
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")


@dataclass(frozen=True)
class Found:
    """What is in a folder.

    Attributes:
        classes: their names.
        files: split → its images; at least ``train``.
        labels: split → (N,) indices of classes.
        notes: what a person should know.
    """

    classes: list[str]
    files: dict[str, list[Path]]
    labels: dict[str, np.ndarray]
    notes: list[str]

    @property
    def every_file(self) -> list[Path]:
        """Those of all splits."""
        return [file for files in self.files.values() for file in files]


def find_images(place: Path) -> Found:
    """The images of a folder, by split and class, in the order of their names.

    Raises:
        DataError: no class folders, an unclear mix, a class without images or with too few.
    """
    try:
        return _find(place)
    except OSError as error:
        raise DataError(f"{shown(place)} cannot be read ({shown(error)})") from error


def ignored(path: Path | os.DirEntry[str]) -> bool:
    """Hidden files, and what systems and programs leave behind."""
    return path.name.startswith(".") or path.name.lower() in LEFT_BEHIND


def is_split(name: str) -> bool:
    """Whether this is the name of a split's folder."""
    return _split_of(name) is not None


def _find(place: Path) -> Found:
    parts = _splits(place)
    found = Found([], {}, {}, _notes(parts) if parts["train"] != place else [])
    seen: dict[tuple[int, int], Path] = {}
    for name, part in parts.items():
        folders = _class_folders(part)
        classes = [folder.name for folder in folders]
        found.notes.extend(_not_used(part))
        found.classes.extend(classes if name == "train" else [])
        if classes != found.classes:
            alone = ", ".join(sorted(set(classes) ^ set(found.classes)))
            raise DataError(
                f"{shown(parts['train'])} and {shown(part)} have different classes: {shown(alone)} "
                "in only one of them"
            )
        found.files[name], found.labels[name] = _images(part, folders, seen)
    drawn = len(SPLITS) - len(parts)  # from the training images
    check_counts(found.labels["train"], found.classes, 1 + drawn, shown(parts["train"]))
    return found


# -- splits ----------------------------------------------------------------------------------------


def _splits(place: Path) -> dict[str, Path]:
    """Split → its folder; all is for training where there are only class folders."""
    folders = _folders(place)
    roles = [_split_of(folder.name) for folder in folders]
    if not any(roles):
        _refuse_likely_splits(place, folders)
        return {"train": place}
    found = {role: folder for role, folder in zip(roles, folders, strict=True) if role}
    if len(found) < len(folders) or "train" not in found:
        names = ", ".join(f"{shown(folder.name)}/" for folder in folders[:LISTED])
        raise DataError(
            f"{shown(place)} holds {names}, and which are splits and which are classes is not "
            f"clear; allowed: class folders alone, or {ALLOWED}, each once, the first of them "
            "always, and no other folder beside them"
        )
    if "validation" in found and "test" not in found:
        found["test"] = found.pop("validation")
    return {role: found[role] for role in ("train", "test", "validation") if role in found}


def _split_of(name: str) -> str | None:
    plain = re.sub(r"[-\s]", "_", name.strip().lower())
    return next((role for role, names in SPLITS.items() if plain in names), None)


def _refuse_likely_splits(place: Path, folders: list[Path]) -> None:
    """Such as seg_train and seg_test, train2017 and val2017, trainA and testA."""
    roles = [
        {
            role
            for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", folder.name)
            if (role := _split_of(word))
        }
        for folder in folders
    ]
    named = [role for role in roles if role]
    if {"train"} < set().union(*named) and 2 * len(named) >= len(folders):
        names = ", ".join(f"{shown(folder.name)}/" for folder in folders[:LISTED])
        raise DataError(
            f"{shown(place)} holds {names}, which look like splits; allowed names of splits: "
            f"{ALLOWED}"
        )


def _notes(found: dict[str, Path]) -> list[str]:
    own = [f"{shown(folder.name)}/ is the {role} split" for role, folder in found.items()]
    drawn = [role for role in SPLITS if role not in found]
    rest = [f"{' and '.join(drawn)} will be drawn from {shown(found['train'].name)}/"]
    return [", ".join(own + rest * bool(drawn))]


# -- classes ---------------------------------------------------------------------------------------


def _folders(place: Path) -> list[Path]:
    return sorted(p for p in place.iterdir() if p.is_dir() and not ignored(p))


def _class_folders(place: Path) -> list[Path]:
    folders = _folders(place)
    if len(folders) < 2:
        packed = sorted(p.name for p in place.iterdir() if p.suffix.lower() in ARCHIVES)
        unpack = f"; unpack {', '.join(map(shown, packed[:LISTED]))} first" if packed else ""
        raise DataError(
            f"{shown(place)} has {len(folders)} class folders; allowed: one folder per class, two "
            f"or more{unpack}"
        )
    check_classes([folder.name for folder in folders], shown(place))
    return folders


def _not_used(place: Path) -> list[str]:
    """A note on files beside the class folders."""
    names = sorted(p.name for p in place.iterdir() if p.is_file() and not ignored(p))
    listed = ", ".join(map(shown, names[:LISTED])) + ", …" * (len(names) > LISTED)
    count = f"{len(names)} file{'s' * (len(names) > 1)} beside the class folders"
    return [f"not used: {count} of {shown(place.name)}/ ({listed})"] if names else []


def _images(
    place: Path, folders: list[Path], seen: dict[tuple[int, int], Path]
) -> tuple[list[Path], np.ndarray]:
    """Files of the classes, and their labels (N,)."""
    faults = Faults()
    files, labels = list[Path](), list[int]()
    for label, folder in enumerate(folders):
        before = faults.count
        inside = sorted(_files(folder, seen, faults))
        if not inside and faults.count == before:
            faults.add(f"class folder {shown(folder)} is empty; fill it or delete it")
        files += inside
        labels += [label] * len(inside)
    faults.refuse(shown(place))
    return files, np.asarray(labels, np.int64)


def _files(top: Path, seen: dict[tuple[int, int], Path], faults: Faults) -> Iterator[Path]:
    """All files below a class folder, also behind links; each folder once, so links may turn back.

    A folder that another class has as well is a fault: its images would have two labels.
    """
    above = {_identity(folder) for folder in top.resolve().parents}
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        try:
            identity = _identity(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            faults.add(f"{shown(folder)} cannot be read ({shown(error)})")
            continue
        if identity in above or seen.get(identity) == top:
            continue
        if identity in seen:
            faults.add(f"{shown(folder)} is also in {shown(seen[identity])}; allowed: one of them")
            continue
        seen[identity] = top
        for entry in entries:
            if ignored(entry):
                continue
            if entry.is_dir():
                waiting.append(Path(entry.path))
            elif entry.is_file():
                yield Path(entry.path)
            else:
                faults.add(f"{shown(entry.path)} is no file, or a link to nothing")


def _identity(folder: Path) -> tuple[int, int]:
    state = folder.stat()
    return state.st_dev, state.st_ino
