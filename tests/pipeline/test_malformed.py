"""Malformed inputs: each is refused by one line that says what is wrong; nothing is damaged.

The inputs are those of tests/pipeline/malformed.py, drawn by seed; a door is opened here as its
stage opens it, or by the command itself.
"""

import contextlib
import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import stdb
from pipeline.errors import DataError, ParamsError, StageError
from pipeline.files import digest
from pipeline.handed_on import read_conversion, read_data_summary, read_runs
from pipeline.learning import published
from pipeline.learning.networks import build_ann, load_thresholds, load_weights
from pipeline.overlays import apply
from pipeline.params import load_params
from pipeline.prepare_data import split
from pipeline.reporting.results import read_results
from pipeline.stage import read_spec
from pipeline.sweeps.space import load_sweep
from tests.pipeline import malformed
from tests.pipeline.support import NETWORK, PARAMS, ROOT, make_repository

KNOWN = (ParamsError, StageError, DataError, stdb.ConversionError, stdb.WeightsError)
LONGEST = 600  # characters of a line
PATIENCE = 10  # seconds, of which most take none
CASES = list(malformed.cases())
NUMBERS = itertools.count()


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fails where it takes longer."""

    def late(*_):
        raise TimeoutError(f"not refused within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def small() -> torch.nn.Module:
    return stdb.build("vgg5", 1, 8, 10, width=0.1, hidden=16)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Files of all kinds that are right, and the params.yaml of this repository."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("metrics", "plots"):
        shutil.copytree(ROOT / name, folder / name)
    for name, good in malformed.JSON_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(good))
    shutil.copy(ROOT / "params.yaml", folder / "params.yaml")
    torch.save(small().state_dict(), folder / "weights.pt")
    published.unknown("torchvision:resnet18")  # importing it takes seconds, once
    return folder


@pytest.fixture(scope="module")
def images():
    """A few digits, for a network that is built."""
    from pipeline.data.sources import read_source

    data = PARAMS.data.model_copy(update={"train_limit": 60})
    return split(data, *read_source(data))["train"]


def with_network(path: Path, images) -> None:
    build_ann(NETWORK.model_copy(update={"architecture": f"{path.stem}:build"}), images)


def with_thresholds(path: Path, _) -> None:
    load_thresholds(stdb.convert(small(), stdb.PoissonEncoder()), path)


OPENED = {  # door → as its stage opens it; all others are the report's
    "params.yaml": lambda path, _: load_params(path),
    "sweep.yaml": lambda path, _: load_sweep(path, PARAMS),
    "overlay.yaml": lambda path, _: apply(path, Path("params.yaml")),
    "dvc.yaml": lambda path, _: read_spec(path, "train_ann"),
    "network.py": with_network,
    "weights.safetensors": lambda path, _: load_weights(small(), path),
    "weights.pt": lambda path, _: load_weights(small(), path),
    "models/thresholds.json": with_thresholds,
    "models/conversion.json": lambda *_: read_conversion(),
    ".results/runs.json": lambda *_: read_runs(),
    "metrics/data.json": lambda *_: read_data_summary(),
}


def opened(door: str, path: Path, images) -> None:
    """Open a door as its stage does."""
    OPENED.get(door, lambda *_: read_results())(path, images)


def refusal(door: str, path: Path, images) -> str:
    """The line that a malformed input is refused with."""
    with within(PATIENCE), pytest.raises(KNOWN) as caught:
        opened(door, path, images)
    said = str(caught.value)
    assert said.isprintable(), said
    assert 10 < len(said) <= LONGEST, said
    return said


def state(folder: Path) -> dict[str, str]:
    """The files of a folder, by digest."""
    return {str(p): digest(p) for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"}


def test_there_are_enough_of_them():
    """And none is there twice."""
    assert len(CASES) >= 300
    assert len({(door, name) for door, name, _ in CASES}) == len(CASES)


@pytest.fixture(scope="module")
def good(project) -> dict[str, str]:
    """The state of its files."""
    return state(project)


@pytest.mark.parametrize(("door", "name", "content"), CASES, ids=lambda x: str(x)[:40])
def test_a_malformed_file_is_refused_by_one_line(
    project, good, monkeypatch, images, door, name, content
):
    """The line names the file (the function, of a network), and no other file has changed."""
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(project)
    path = Path(f"network_{next(NUMBERS)}.py" if door == "network.py" else door)
    kept = path.read_bytes() if path.exists() else None
    try:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        wrong = digest(path)
        assert path.stem in refusal(door, path, images)
        assert digest(path) == wrong
    finally:
        path.unlink() if kept is None else path.write_bytes(kept)
    assert state(project) == good


def weights():
    torch.manual_seed(0)
    return list(malformed.weights_files(small().state_dict()))


@pytest.mark.parametrize(("name", "content"), weights(), ids=lambda x: str(x)[:40])
def test_a_file_of_no_weights_is_refused_by_one_line(tmp_path, name, content):
    """Of another network, of no numbers, of Python's objects."""
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert "weights.pt" in refusal("weights.pt", path, None)


def test_damaged_bytes_are_refused_or_harmless(project, tmp_path, monkeypatch):
    """Drawn by seed: a file is read, or refused by a known error, and nothing else happens."""
    draw = random.Random(malformed.SEED)
    for name in ("params.yaml", "weights.pt", "models/thresholds.json", "plots/train_ann.csv"):
        whole = (project / name).read_bytes()
        folder = tmp_path / Path(name).stem
        shutil.copytree(project, folder)
        monkeypatch.chdir(folder)
        for _ in range(40):
            broken = bytearray(whole)
            for _ in range(draw.randint(1, 3)):
                position = draw.randrange(len(broken))
                broken[position : position + draw.randint(0, 3)] = draw.randbytes(
                    draw.randint(0, 3)
                )
            Path(name).write_bytes(broken)
            with within(PATIENCE), contextlib.suppress(*KNOWN):
                opened(name, Path(name), None)


# -- real commands ---------------------------------------------------------------------------------

OVERLAY = {"params.yaml": "stdb: [", "sweep/params.yaml": "space: ["}
COMMANDS = {  # name → arguments, files that are broken before; exit status
    "an unknown argument of a stage": (["train_ann", "--epochs", "3"], {}, 2),
    "a word for a stage": (["report", "now"], {}, 2),
    "an unknown argument of a command": (["predict", "--fast", "x.png"], {}, 2),
    "an unknown argument of the sweep": (["sweep", "sweep", "more"], {}, 2),
    "a sweep of no folder": (["sweep", "nowhere"], {}, 1),
    "half a params.yaml": (["prepare_data"], {"params.yaml": "stdb: ["}, 1),
    "laughs": (["train_ann"], {"params.yaml": malformed.LAUGHS}, 1),
    "brackets": (["train_ann"], {"params.yaml": "[" * 5000}, 1),
    "NUL": (["report"], {"params.yaml": "a: \0"}, 1),
    "no UTF-8": (["finetune_stdb"], {"params.yaml": b"a: \xff"}, 1),
    "half a dvc.yaml": (["train_ann"], {"dvc.yaml": "stages: {train_ann: ["}, 1),
    "runs.json of nothing": (["train_ann"], {".results/runs.json": "{"}, 1),
    "a preset that is none": (["preset", "none"], {}, 1),
    "a preset that is a list": (["preset", "mine.yaml"], {"mine.yaml": "[1]"}, 1),
    "a winner that is none": (["apply_best"], {"sweep/best_params.yaml": "stdb: 3"}, 1),
    "no winner": (["apply_best", "nowhere.yaml"], {}, 1),
    "no seeds": (["seeds", "0"], {}, 1),
    "a port of nonsense": (["ui", "99999"], {}, 1),
    "no model": (["predict", "--model", "nowhere", "x.png"], {}, 1),
    "a model of nonsense": (["predict", "x.png"], {"models/snn.safetensors": "model"}, 1),
    "no confidence": (["predict", "--confidence", "nan", "x.png"], {}, 2),
    "no arguments of a command": (["write_plots_page", "now"], {}, 2),
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """The sources, and outs that earlier runs made."""
    repository = make_repository(tmp_path_factory.mktemp("commands"))
    for out in ("models/ann.safetensors", "models/thresholds.json", "report/index.html"):
        (repository.root / out).parent.mkdir(exist_ok=True)
        (repository.root / out).write_text("made by an earlier run")
    return repository


def run(repository, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in a terminal that has ASCII only."""
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    return subprocess.run(
        [sys.executable, "-m", f"pipeline.{arguments[0]}", *arguments[1:]],
        cwd=repository.root, env=repository.environment() | ascii_only,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_one_line_and_damages_nothing(repository, name):
    """Its exit status, no traceback, and all files as they were."""
    arguments, files, status = COMMANDS[name]
    kept = {}
    for place, content in files.items():
        path = repository.root / place
        kept[path] = path.read_bytes() if path.exists() else None
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = state(repository.root)
    start = time.monotonic()
    try:
        result = run(repository, *arguments)
        assert state(repository.root) == before
    finally:
        for path, content in kept.items():
            path.unlink() if content is None else path.write_bytes(content)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert "error" in lines[-1]
    assert status == 2 or len(lines) == 1
    assert len(lines[-1]) <= LONGEST
    assert time.monotonic() - start < 60
