"""A stage that is killed or stopped and run again ends as if nothing had been."""

import os
import random
import signal
import stat
import tempfile
import time
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest

from tests.pipeline.support import (
    FINETUNE,
    Started,
    checkpoints,
    copy_of,
    results,
    wait_for_progress,
)

LOST = "a worker was lost"


def kill(started: Started, whom: str) -> None:
    """SIGKILL to a worker, to the stage's own process, or to the whole group."""
    if whom == "worker":
        with suppress(psutil.NoSuchProcess, IndexError):  # it was about to end
            started.workers()[0].kill()
    elif whom == "driver":
        started.process.kill()
    else:
        os.killpg(started.process.pid, signal.SIGKILL)


def noticed(started: Started) -> bool:
    """Whether the stage lost the killed worker; one that had done its part isn't missed."""
    deadline = time.monotonic() + 180
    while LOST not in started.says():
        if started.process.poll() is not None:
            return LOST in started.says()
        assert time.monotonic() < deadline, started.says()
        time.sleep(0.05)
    return True


@pytest.mark.slow
def test_killed_three_times_it_ends_with_the_same_bytes(long, undisturbed, tmp_path):
    """SIGKILL to the whole group, a random while after a training began or got further.

    MLflow has one run of it, which all attempts go on in.
    """
    repository = copy_of(long, tmp_path / "repository")
    before, runs = results(repository), repository.runs("finetune_stdb")
    moments = random.Random(0)
    for attempt in range(3):
        there = checkpoints(repository)
        started = Started(repository, tmp_path / f"{attempt}.log", FINETUNE)
        wait_for_progress(repository, there, started)
        time.sleep(moments.uniform(0.0, 0.3))
        assert started.process.poll() is None, started.says()
        kill(started, "group")
        started.wait_until_gone(30)
        assert ("goes on after epoch" in started.says()) == (attempt > 0)
        assert results(repository) == before
    last = repository.run(*FINETUNE).stdout
    assert "goes on after epoch" in last
    assert results(repository) == undisturbed(1)
    assert not list((repository.root / ".results").glob("finetune_stdb-*"))
    assert repository.runs("finetune_stdb") == ["FINISHED", *runs]


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kills"), [(1, 8), (2, 4)])
def test_a_soak_of_kills(long, undisturbed, tmp_path, workers, kills):
    """At random moments, also while it starts; to a worker, to the driver, to the group.

    Where it ends before all kills came, it ends as it should, and starts again. A kill that came
    when all was done is not one.
    """
    repository = copy_of(long, tmp_path / "repository")
    repository.set(cluster={"workers": workers, "restarts": 100})
    expected, moments, started, left = undisturbed(workers), random.Random(workers), None, kills
    while left:
        starting = left % 4 == 0
        if started is None:
            started, there = Started(repository, tmp_path / f"{left}.log", FINETUNE), None
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
        kill(started, whom)
        if whom == "worker" and not noticed(started):
            continue
        left -= 1
        if whom != "worker":
            started.wait_until_gone(60)
            started = None
    started = started or Started(repository, tmp_path / "last.log", FINETUNE)
    assert started.process.wait(600) == 0, started.says()
    assert results(repository) == expected
    assert set(repository.runs("finetune_stdb")) == {"FINISHED"}


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_one_ctrl_c_ends_it_and_leaves_nothing_but_the_checkpoint(long, tmp_path, workers):
    """Within 15 seconds: no process, no temporary folder, no run in state RUNNING.

    Meanwhile nobody outside this machine reaches Ray, and nobody else looks into its folder.
    """
    repository = copy_of(long, tmp_path / "repository")
    repository.set(cluster={"workers": workers})
    outs, folders = repository.bytes_of_outs(), set(Path(tempfile.gettempdir()).glob("ray-*"))
    command = ["dvc", "repro", "--single-item", "finetune_stdb"]
    started = Started(repository, tmp_path / "log", command)
    wait_for_progress(repository, [], started)
    assert all(ip_address(a.removeprefix("::ffff:")).is_loopback for a in started.listens_on())
    made = set(Path(tempfile.gettempdir()).glob("ray-*")) - folders
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in made] == [0o700] * (workers - 1)
    assert (len(started.listens_on()) > 0) == (workers > 1)
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
    repository.set(cluster={"workers": workers})
    started = Started(repository, tmp_path / "log", FINETUNE)
    wait_for_progress(repository, [], started)
    started.process.terminate()
    assert started.process.wait(15) == 130
    assert checkpoints(repository)
    assert repository.runs("finetune_stdb")[0] == "FAILED"


@pytest.mark.slow
def test_a_stage_that_outlives_its_dvc_is_waited_for(long, undisturbed, tmp_path):
    """The next `dvc repro` names it, and ends with its work: nothing is trained twice."""
    repository = copy_of(long, tmp_path / "repository")
    command = ["dvc", "repro", "--single-item", "finetune_stdb"]
    first = Started(repository, tmp_path / "first", command)
    wait_for_progress(repository, [], first)
    (orphan,) = [p for p in first.processes() if p.cmdline()[1:] == FINETUNE[1:]]
    first.process.kill()
    first.process.wait()
    second = Started(repository, tmp_path / "second", command)
    assert second.process.wait(600) == 0, second.says()
    assert f"process {orphan.pid} on " in second.says()
    assert "runs this stage already; waiting for it to end" in second.says()
    first.wait_until_gone(30)
    assert "[finetune_stdb] done in" in first.says()
    assert "  loss " in first.says()
    assert "  loss " not in second.says()
    assert results(repository) == undisturbed(1)
    assert not list((repository.root / ".results").glob("finetune_stdb-*"))
    assert "Running stage" not in repository.run("dvc", "repro", "finetune_stdb").stdout


@pytest.mark.slow
def test_a_stage_that_ends_after_its_dvc_is_not_run_again(long, undisturbed, tmp_path):
    """The next `dvc repro` takes what it found; so does each of three that run at once."""
    repository = copy_of(long, tmp_path / "repository")
    first = Started(repository, tmp_path / "log", ["dvc", "repro", "finetune_stdb"])
    wait_for_progress(repository, [], first)
    first.process.kill()
    first.wait_until_gone(300)
    assert "its checkpoint stays" in first.says()
    several = [Started(repository, tmp_path / f"{n}", FINETUNE) for n in range(3)]
    for one in several:
        assert one.process.wait(600) == 0, one.says()
    assert sum("runs this stage already; waiting" in one.says() for one in several) == 2
    assert not any("  loss " in one.says() for one in several)
    assert results(repository) == undisturbed(1)


@pytest.mark.slow
def test_a_changed_parameter_begins_afresh_and_a_finished_job_is_not_trained_again(long, tmp_path):
    """The checkpoints of one job are no other's; after its outs are made there are none."""
    repository = copy_of(long, tmp_path / "repository")
    started = Started(repository, tmp_path / "log", FINETUNE)
    wait_for_progress(repository, [], started)
    kill(started, "group")
    started.wait_until_gone(30)
    there = checkpoints(repository)
    repository.set(stdb={"alpha": 0.4, "epochs": 1})
    output = repository.run("dvc", "repro", "finetune_stdb").stdout
    assert "goes on after" not in output
    assert checkpoints(repository) == there  # fresh ones of another job are left alone
    assert "Running stage" not in repository.run("dvc", "repro", "finetune_stdb").stdout
