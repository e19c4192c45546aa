"""A stage that is killed or stopped and run again ends as if nothing had been."""

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pipeline.conftest import Started, copy_of

STAGE = [sys.executable, "-m", "pipeline.finetune_stdb"]
RESULTS = ("models/snn.safetensors", "metrics/finetune_stdb.json", "plots/finetune_stdb.csv")


@pytest.fixture(scope="module")
def long(finished, tmp_path_factory):
    """A fine-tuning of some seconds, with checkpoints within epochs."""
    repository = copy_of(finished, tmp_path_factory.mktemp("long") / "repository")
    repository.set("epochs: 1\n", "epochs: 30\n")
    repository.set("checkpoint_steps: 200", "checkpoint_steps: 3")
    return repository


@pytest.fixture(scope="module")
def undisturbed(long, tmp_path_factory) -> Callable[[int], dict[str, bytes]]:
    """How it ends with so many workers."""
    found: dict[int, dict[str, bytes]] = {}

    def of(workers: int) -> dict[str, bytes]:
        if workers not in found:
            whole = copy_of(long, tmp_path_factory.mktemp("whole") / "repository")
            whole.set("workers: auto", f"workers: {workers}")
            whole.run(*STAGE)
            found[workers] = results(whole)
        return found[workers]

    return of


def results(repository) -> dict[str, bytes]:
    return {name: (repository.root / name).read_bytes() for name in RESULTS}


def checkpoints(repository) -> list[str]:
    """The names of the states that there are, in order; later ones have greater numbers."""
    return sorted(p.name for p in (repository.root / ".results").glob("finetune_stdb-*/state-*.pt"))


def wait_for_progress(repository, before: list[str], started: Started) -> None:
    """Until the stage has written a state, or is done."""
    deadline = time.monotonic() + 600
    while checkpoints(repository)[-1:] == before[-1:]:
        if started.process.poll() is not None:
            assert started.process.returncode == 0, started.says()
            return
        assert time.monotonic() < deadline, started.says()
        time.sleep(0.02)


def kill(started: Started, whom: str) -> None:
    """SIGKILL to a worker, to the stage's own process, or to the whole group."""
    if whom == "worker":
        random.choice(started.workers()).kill()
    elif whom == "driver":
        started.process.kill()
    else:
        os.killpg(started.process.pid, signal.SIGKILL)


def test_killed_three_times_it_ends_with_the_same_bytes(long, undisturbed, tmp_path):
    """SIGKILL to the whole group, a random while after a training began or got further.

    MLflow has one run of it, which all attempts go on in.
    """
    repository = copy_of(long, tmp_path / "repository")
    before, runs = results(repository), repository.runs("finetune_stdb")
    moments = random.Random(0)
    for attempt in range(3):
        there = checkpoints(repository)
        started = Started(repository, tmp_path / f"{attempt}.log", STAGE)
        wait_for_progress(repository, there, started)
        time.sleep(moments.uniform(0.0, 0.3))
        assert started.process.poll() is None, started.says()
        kill(started, "group")
        started.wait_until_gone(30)
        assert ("goes on after epoch" in started.says()) == (attempt > 0)
        assert results(repository) == before
    last = repository.run(*STAGE).stdout
    assert "goes on after epoch" in last
    assert results(repository) == undisturbed(1)
    assert not list((repository.root / ".results").glob("finetune_stdb-*"))
    assert repository.runs("finetune_stdb") == ["FINISHED", *runs]


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kills"), [(1, 14), (2, 8)])
def test_a_soak_of_kills(long, undisturbed, tmp_path, workers, kills):
    """At random moments, also while it starts; to a worker, to the driver, to the group.

    Where it ends before all kills came, it ends as it should, and starts again.
    """
    repository = copy_of(long, tmp_path / "repository")
    repository.set("workers: auto", f"workers: {workers}")
    repository.set("restarts: 3", "restarts: 100")
    expected, moments, started, left = undisturbed(workers), random.Random(workers), None, kills
    while left:
        starting = left % 4 == 0
        if started is None:
            started, there = Started(repository, tmp_path / f"{left}.log", STAGE), None
        if not starting:
            wait_for_progress(repository, there or checkpoints(repository), started)
        time.sleep(moments.uniform(0.0, 8.0 if starting else 0.4))
        if started.process.poll() is not None:
            assert started.process.returncode == 0, started.says()
            assert results(repository) == expected
            started = None
            continue
        there = checkpoints(repository)
        whom = ("worker", "driver", "group")[left % 3] if workers > 1 else "group"
        if whom == "worker" and not started.workers():
            continue
        kill(started, whom)
        left -= 1
        if whom != "worker":
            started.wait_until_gone(60)
            started = None
    started = started or Started(repository, tmp_path / "last.log", STAGE)
    assert started.process.wait(600) == 0, started.says()
    assert ("a worker was lost" in "".join(p.read_text() for p in tmp_path.glob("*.log"))) == (
        workers > 1
    )
    assert results(repository) == expected
    assert set(repository.runs("finetune_stdb")) == {"FINISHED"}


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_one_ctrl_c_ends_it_and_leaves_nothing_but_the_checkpoint(long, tmp_path, workers):
    """Within 15 seconds: no process, no temporary folder, no run in state RUNNING."""
    repository = copy_of(long, tmp_path / "repository")
    repository.set("workers: auto", f"workers: {workers}")
    outs, folders = repository.bytes_of_outs(), set(Path(tempfile.gettempdir()).glob("ray-*"))
    command = ["dvc", "repro", "--single-item", "finetune_stdb"]
    started = Started(repository, tmp_path / "log", command)
    wait_for_progress(repository, [], started)
    begin = time.monotonic()
    os.killpg(started.process.pid, signal.SIGINT)
    started.wait_until_gone(15)
    assert time.monotonic() - begin < 15
    assert started.process.returncode != 0
    assert "was interrupted; dvc repro goes on from its last checkpoint" in started.says()
    assert "Traceback" not in started.says()
    assert checkpoints(repository)
    assert repository.bytes_of_outs() == outs
    assert repository.runs("finetune_stdb")[0] == "FAILED"
    assert "RUNNING" not in repository.runs("finetune_stdb")
    assert set(Path(tempfile.gettempdir()).glob("ray-*")) <= folders


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_ends_a_stage_in_order(long, tmp_path, workers):
    """What schedulers such as Slurm send before they kill."""
    repository = copy_of(long, tmp_path / "repository")
    repository.set("workers: auto", f"workers: {workers}")
    started = Started(repository, tmp_path / "log", STAGE)
    wait_for_progress(repository, [], started)
    started.process.terminate()
    assert started.process.wait(15) == 130
    assert checkpoints(repository)
    assert repository.runs("finetune_stdb")[0] == "FAILED"


@pytest.mark.slow
def test_a_changed_parameter_begins_afresh_and_a_finished_job_is_not_trained_again(long, tmp_path):
    """The checkpoints of one job are no other's; after its outs are made there are none."""
    repository = copy_of(long, tmp_path / "repository")
    started = Started(repository, tmp_path / "log", STAGE)
    wait_for_progress(repository, [], started)
    kill(started, "group")
    started.wait_until_gone(30)
    there = checkpoints(repository)
    repository.set("alpha: 0.3", "alpha: 0.4")
    repository.set("epochs: 30\n", "epochs: 1\n")
    output = repository.run("dvc", "repro", "finetune_stdb").stdout
    assert "goes on after" not in output
    assert checkpoints(repository) == there  # fresh ones of another job are left alone
    assert "Running stage" not in repository.run("dvc", "repro", "finetune_stdb").stdout
