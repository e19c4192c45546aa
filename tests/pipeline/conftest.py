"""A copy of the repository with tiny parameters, in which the real pipeline runs once."""

import resource
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pytest
import torch

from tests.pipeline.support import FINETUNE, Repository, copy_of, make_repository, results


@pytest.fixture(autouse=True)
def same_threads():
    """A job chooses the threads of its process; the next test has those that there were."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Repository:
    """The repository after one `dvc repro`."""
    repository = make_repository(tmp_path_factory.mktemp("repository"))
    repository.repro()
    repository.end = int(time.time() * 1000)
    return repository


@pytest.fixture
def changed(finished):
    """The finished repository, put back afterwards as it was."""
    params = (finished.root / "params.yaml").read_text()
    yield finished
    (finished.root / "params.yaml").write_text(params)


@pytest.fixture(scope="session")
def tables(tmp_path_factory) -> Path:
    """A database with MLflow's tables, which take seconds to make."""
    file = tmp_path_factory.mktemp("tables") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def database(tables, tmp_path, monkeypatch):
    """An empty MLflow of its own."""
    shutil.copyfile(tables, tmp_path / "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")


@pytest.fixture
def full_disk():
    """A context in which no file gets longer than 64 KiB."""

    @contextmanager
    def full():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    return full


@pytest.fixture(scope="session")
def long(finished, tmp_path_factory):
    """A fine-tuning of some seconds, with checkpoints within epochs."""
    repository = copy_of(finished, tmp_path_factory.mktemp("long") / "repository")
    repository.set(stdb={"epochs": 30}, cluster={"checkpoint_steps": 3})
    return repository


@pytest.fixture(scope="session")
def undisturbed(long, tmp_path_factory) -> Callable[[int], dict[str, bytes]]:
    """How it ends with so many workers."""
    found: dict[int, dict[str, bytes]] = {}

    def of(workers: int) -> dict[str, bytes]:
        if workers not in found:
            whole = copy_of(long, tmp_path_factory.mktemp("whole") / "repository")
            whole.set(cluster={"workers": workers})
            whole.run(*FINETUNE)
            found[workers] = results(whole)
        return found[workers]

    return of
