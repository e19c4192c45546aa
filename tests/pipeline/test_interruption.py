"""A stage that is killed and run again ends as if nothing had been."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.pipeline.test_pipeline import copy_of

STAGE = [sys.executable, "-m", "pipeline.finetune_stdb"]
RESULTS = ("models/snn.safetensors", "metrics/finetune_stdb.json", "plots/finetune_stdb.csv")


@pytest.fixture(scope="module")
def long(finished, tmp_path_factory):
    """A fine-tuning of some seconds, with checkpoints within epochs; and how it ends."""
    repository = copy_of(finished, tmp_path_factory.mktemp("long") / "repository")
    repository.set("epochs: 1\n", "epochs: 30\n")
    repository.set("checkpoint_steps: 200", "checkpoint_steps: 3")
    whole = copy_of(repository, tmp_path_factory.mktemp("whole") / "repository")
    whole.run(*STAGE)
    return repository, results(whole)


def results(repository) -> dict[str, bytes]:
    return {name: (repository.root / name).read_bytes() for name in RESULTS}


def start(repository, log: Path) -> subprocess.Popen:
    """The stage, in a process group of its own."""
    with log.open("w") as file:
        return subprocess.Popen(
            STAGE, cwd=repository.root, env=repository.environment(), stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip


def checkpoints(repository) -> list[str]:
    """The names of the states that there are, in order; later ones have greater numbers."""
    return sorted(p.name for p in (repository.root / ".results").glob("finetune_stdb-*/state-*.pt"))


def wait_for_progress(repository, before: list[str], log: Path, process: subprocess.Popen) -> None:
    """Until the stage has written a state."""
    deadline = time.monotonic() + 120
    while checkpoints(repository)[-1:] == before[-1:]:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def test_killed_three_times_it_ends_with_the_same_bytes(long, tmp_path):
    """SIGKILL to the whole group, a random while after a training began or got further."""
    repository, expected = long
    before = results(repository)
    moments = random.Random(0)
    for attempt in range(3):
        log = tmp_path / f"{attempt}.log"
        there = checkpoints(repository)
        process = start(repository, log)
        wait_for_progress(repository, there, log, process)
        time.sleep(moments.uniform(0.0, 0.3))
        assert process.poll() is None, log.read_text()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert ("goes on after epoch" in log.read_text()) == (attempt > 0)
        assert results(repository) == before
    last = repository.run(*STAGE).stdout
    assert "goes on after epoch" in last
    assert results(repository) == expected
    assert not list((repository.root / ".results").glob("finetune_stdb-*"))
