"""What an interrupted job goes on from: whole or not at all, never another job's."""

import hashlib
import os
import pickle
import time
from pathlib import Path

import pytest
import torch

from pipeline.errors import StageError
from pipeline.jobs.checkpoints import STALE, Checkpoints


@pytest.fixture(params=["a path", "a URL"])
def storage(request, tmp_path):
    """A folder, named in either way."""
    return str(tmp_path) if request.param == "a path" else tmp_path.as_uri()


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("work-1/*"))


def test_the_newest_state_comes_back_and_two_are_kept(storage, tmp_path):
    """Tensors bit for bit; nothing half written lies about."""
    job = Checkpoints(storage, "work", "1")
    assert job.load() is None
    for epoch in range(1, 5):
        job.save({"epoch": epoch, "network": {"w": torch.full((3,), epoch / 7)}})
        assert job.load()["epoch"] == epoch
    found = Checkpoints(storage, "work", "1").load()
    assert torch.equal(found["network"]["w"], torch.full((3,), 4 / 7))
    assert states(tmp_path) == ["state-000003.pt", "state-000004.pt"]


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
def test_a_damaged_state_is_noticed_and_skipped(tmp_path, capsys, damage):
    """The one before it is taken, and the next one written is newer than both."""
    job = Checkpoints(str(tmp_path), "work", "1")
    for epoch in (1, 2):
        job.save({"epoch": epoch})
    newest = tmp_path / "work-1/state-000002.pt"
    content = bytearray(newest.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 4
    newest.write_bytes(content[: {"cut": 200, "empty": 0, "flipped": None}[damage]])
    assert job.load()["epoch"] == 1
    assert f"{newest} is damaged" in capsys.readouterr().out
    job.save({"epoch": 3})
    assert job.load()["epoch"] == 3


def test_a_write_that_was_interrupted_is_no_state(tmp_path):
    """Only a whole file gets its name."""
    job = Checkpoints(str(tmp_path), "work", "1")
    job.save({"epoch": 1})
    (tmp_path / "work-1/state-000002.pt.part").write_bytes(b"half")
    assert job.load()["epoch"] == 1
    job.save({"epoch": 2})
    assert states(tmp_path) == ["state-000001.pt", "state-000002.pt"]


def test_a_job_has_no_part_in_another(storage, tmp_path):
    """Other parameters, another key; removing leaves others' fresh states, not forgotten ones."""
    one, two = Checkpoints(storage, "work", "1"), Checkpoints(storage, "work", "2")
    other = Checkpoints(storage, "working", "1")
    for job in (one, two, other):
        job.save({"epoch": 1})
    assert Checkpoints(storage, "work", "3").load() is None
    one.remove()
    assert one.load() is None
    assert two.load() is not None
    past = time.time() - STALE - 60
    for path in tmp_path.glob("*/*"):
        os.utime(path, (past, past))
    one.remove()
    assert two.load() is None
    assert other.load() is not None


def test_a_state_with_code_in_it_is_refused(tmp_path, monkeypatch):
    """Also one that has the right digest."""
    monkeypatch.chdir(tmp_path)
    job = Checkpoints(str(tmp_path), "work", "1")
    job.save({"epoch": Payload()})
    with pytest.raises(StageError, match=r"state-000001\.pt is no checkpoint.*remove .*work-1: "):
        job.load()
    assert not Path("touched").exists()


@pytest.mark.parametrize("content", [pickle.dumps({"a": 1}), b"", b"text", pickle.dumps(print)])
def test_what_is_no_state_is_refused(tmp_path, content):
    """Under a right digest; torch's own message would advise to trust it."""
    path = tmp_path / "work-1/state-000001.pt"
    path.parent.mkdir()
    path.write_bytes(hashlib.sha256(content).hexdigest().encode() + content)
    with pytest.raises(StageError, match="is no checkpoint of this project: allowed are tensors"):
        Checkpoints(str(tmp_path), "work", "1").load()


def test_a_state_that_is_no_dictionary_is_refused(tmp_path):
    """Though it holds tensors alone."""
    job = Checkpoints(str(tmp_path), "work", "1")
    job.save([torch.zeros(1)])
    with pytest.raises(StageError, match="is no checkpoint of this project"):
        job.load()


def test_a_full_disk_is_named_and_leaves_nothing_half_written(storage, tmp_path, full_disk):
    """The state before it stays."""
    job = Checkpoints(storage, "work", "1")
    job.save({"epoch": 1})
    with full_disk(), pytest.raises(StageError, match=f"cannot be written into {storage}/work-1: "):
        job.save({"epoch": 2, "network": torch.zeros(100_000)})
    assert states(tmp_path) == ["state-000001.pt"]
    assert job.load()["epoch"] == 1


class Payload:
    """Pickles to a call."""

    def __reduce__(self):
        return (Path.touch, (Path("touched"),))
