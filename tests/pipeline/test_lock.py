"""Locks: one process at a time; who waits is known, who is killed holds nobody up."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading

import pytest

from pipeline.jobs.lock import Lock

HOLD = """
import sys
from pathlib import Path
from pipeline.jobs.lock import Lock
lock = Lock(Path(sys.argv[1]), "this", print)
print("held", flush=True)
input()
"""


class Waiter(threading.Thread):
    """Takes a lock that another holds."""

    def __init__(self, path) -> None:
        super().__init__(daemon=True)
        self.path, self.said, self.waits = path, [], threading.Event()
        self.lock = None
        self.start()

    def say(self, text: str) -> None:
        self.said.append(text)
        self.waits.set()

    def run(self) -> None:
        self.lock = Lock(self.path, "this stage", self.say)


def never(text):
    raise AssertionError(text)


def test_a_second_one_waits_and_says_for_whom(tmp_path):
    """The holder knows that somebody waits."""
    first = Lock(tmp_path / "folder" / "lock", "this stage", never)
    assert not first.awaited
    waiter = Waiter(first.path)
    assert waiter.waits.wait(10)
    assert first.awaited
    assert waiter.lock is None
    first.release()
    waiter.join(10)
    (text,) = waiter.said
    assert text.startswith(f"process {os.getpid()} on ")
    assert f"(`kill {os.getpid()}` ends it) runs this stage already; waiting for it" in text
    assert not waiter.lock.awaited
    waiter.lock.release()
    Lock(first.path, "this stage", never).release()


def test_the_folder_of_a_lock_may_be_removed_under_it(tmp_path):
    """As a job's is when its outs are written: who waited has a lock that others respect."""
    first = Lock(tmp_path / "job" / "lock", "this", never)
    waiter = Waiter(first.path)
    assert waiter.waits.wait(10)
    shutil.rmtree(tmp_path / "job")
    first.release()
    waiter.join(10)
    third = Waiter(first.path)
    assert third.waits.wait(10)
    assert waiter.lock.awaited
    waiter.lock.release()
    third.join(10)
    assert third.lock is not None


def test_a_killed_process_holds_nobody_up(tmp_path):
    """The system takes its lock."""
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        waiter = Waiter(path)
        assert waiter.waits.wait(10)
        assert f"process {holder.pid} on " in waiter.said[0]
        holder.kill()
        waiter.join(10)
    assert waiter.lock is not None


def test_a_disk_without_locks_is_no_end(tmp_path, monkeypatch):
    """Such as NFS without its lock service: it is said, and the work goes on."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    said = []
    lock = Lock(tmp_path / "lock", "this stage", said.append)
    assert "cannot be locked" in said[0]
    assert "see that this stage runs once at a time" in said[0]
    assert not lock.awaited
    lock.release()


@pytest.mark.parametrize("content", ["", "\x00", "half"])
def test_a_strange_lock_file_is_a_lock_nonetheless(tmp_path, content):
    """Of a process that was killed while it wrote its name."""
    (tmp_path / "lock").write_text(content)
    Lock(tmp_path / "lock", "this stage", never).release()
