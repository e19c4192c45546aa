"""Ray: the address of a cluster that is joined, and one that is started and cleared away."""

import os
import socket
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest
import ray

from pipeline.errors import StageError
from pipeline.jobs import address, start
from pipeline.jobs.address import cluster_address, is_loopback
from pipeline.tracking.origin import this_process
from tests.pipeline.support import free_port


@pytest.fixture
def sessions(tmp_path, monkeypatch):
    """Where Ray's folders are."""
    monkeypatch.setattr(start, "_short_folder", lambda: tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", ["", "local", None])
def test_without_an_address_a_job_starts_its_own_ray(monkeypatch, text):
    """As Ray has it: local, too."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if text is not None:
        monkeypatch.setenv("RAY_ADDRESS", text)
    assert cluster_address() is None


@pytest.mark.parametrize(
    "text",
    [
        *("foo", "foo:", ":6379", "foo:bar", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:-1"),
        *("http://127.0.0.1:8265", "127.0.0.1:6379/x", "a@127.0.0.1:6379", "1.2.3.4:6379 ", "\n"),
        *("ray://127.0.0.1:10001", "[::1", "\u0661:\u0661"),
    ],
)
def test_an_address_that_is_none_is_refused(monkeypatch, text):
    """Before anything waits for it, with what is allowed."""
    monkeypatch.setenv("RAY_ADDRESS", text)
    with pytest.raises(StageError, match=r"RAY_ADDRESS is .*; allowed: HOST:PORT .*or auto"):
        cluster_address()


def test_rays_client_is_named(monkeypatch):
    """A job has to be on a node of its cluster."""
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    with pytest.raises(StageError, match="ray://, Ray's client, does not do"):
        cluster_address()


def test_a_dead_cluster_is_noticed_at_once(monkeypatch):
    """Ray itself waits for a quarter of an hour."""
    place = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", place)
    with pytest.raises(StageError, match=rf"RAY_ADDRESS is {place} and no cluster.*refused.*unset"):
        cluster_address()


def test_what_is_no_cluster_is_noticed(monkeypatch):
    """Such as another program's port."""
    monkeypatch.setattr(address, "PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{other.getsockname()[1]}")
        with pytest.raises(StageError, match="what listens there is no Ray cluster"):
            cluster_address()


def test_auto_needs_a_cluster_on_this_machine(monkeypatch):
    """None, or one that died and left its address."""
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(address, "found_on_this_machine", lambda: None)
    with pytest.raises(StageError, match="auto and there is no Ray cluster on this machine"):
        cluster_address()
    place = f"127.0.0.1:{free_port()}"
    monkeypatch.setattr(address, "found_on_this_machine", lambda: place)
    with pytest.raises(StageError, match=f"RAY_ADDRESS is auto, {place}, and no cluster answers"):
        cluster_address()


def test_a_cluster_that_answers_is_joined(monkeypatch):
    """By the name that the user gave."""
    server = grpc.server(ThreadPoolExecutor(1))
    place = f"localhost:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    monkeypatch.setenv("RAY_ADDRESS", place)
    assert cluster_address() == place
    server.stop(None)


@pytest.mark.parametrize(
    ("place", "local"),
    [("127.0.0.1:1", True), ("[::1]:1", True), ("localhost:1", True), ("192.0.2.2:1", False)],
)
def test_loopback_is_known(place, local):
    """So are all addresses of one machine's Ray."""
    assert is_loopback(place) is local


class Late:
    """``ray.init`` that fails, with a process half started, before it succeeds."""

    def __init__(self, failures: int) -> None:
        self.failures, self.folders, self.children = failures, [], []

    def __call__(self, *, _temp_dir: str, **settings) -> None:
        self.folders.append(_temp_dir)
        if len(self.folders) <= self.failures:
            command = [sys.executable, "-c", "input()", _temp_dir]
            self.children.append(subprocess.Popen(command, stdin=subprocess.PIPE))
            raise Exception("The current node timed out during startup.\nMore.")  # as Ray does


@pytest.mark.parametrize("failures", [0, 1, 2, 3])
def test_a_start_that_is_late_is_tried_three_times(sessions, monkeypatch, failures):
    """Each in a folder of its own, with a line; nothing half started stays."""
    late, said = Late(failures), []
    monkeypatch.setattr(ray, "init", late)
    if failures == 3:
        with pytest.raises(StageError, match=r"did not start in 3 attempts.*timed out during"):
            start.start(sessions, said.append, dashboard=False, logs=False)
    else:
        start.start(sessions, said.append, dashboard=False, logs=False)
    assert len(set(late.folders)) == min(failures + 1, 3)
    why = "Ray did not start (The current node timed out during startup.)"
    assert said == [f"{why}; attempt {n} of 3" for n in range(2, min(failures, 2) + 2)]
    assert all(child.wait(60) is not None for child in late.children)
    for child in late.children:
        child.stdin.close()


def test_a_process_that_has_just_begun_is_ended_too(sessions, monkeypatch):
    """For a moment it shows no command line."""
    command = [sys.executable, "-c", "input()", str(sessions)]
    shown, asked = psutil.Process.cmdline, []

    def late(process):
        asked.append(process.pid)
        return [] if asked.count(process.pid) < 3 else shown(process)

    child = subprocess.Popen(command, stdin=subprocess.PIPE)
    monkeypatch.setattr(psutil.Process, "cmdline", late)
    start.end_processes(sessions)
    assert child.wait(60) is not None  # it waits for input that does not come
    child.stdin.close()


def test_a_session_has_a_folder_that_is_closed_and_goes(sessions):
    """Ray itself opens its folder to everybody."""
    with start.session_folder() as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert (folder / start.OWNER).read_text() == this_process()
    assert list(sessions.iterdir()) == []


def test_folders_of_processes_that_were_killed_are_removed(sessions):
    """Not those of living ones, of other machines, of other programs."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    owners = {
        "ray-dead": f"{host} {ended.pid} 1",
        "ray-reused": f"{host} {os.getpid()} 1",
        "ray-alive": this_process(),
        "ray-elsewhere": f"elsewhere-{host} {ended.pid} 1",
        "ray-strange": "what",
        "ray-unmarked": None,
        "other-dead": f"{host} {ended.pid} 1",
    }
    for name, owner in owners.items():
        (sessions / name).mkdir()
        if owner:
            (sessions / name / start.OWNER).write_text(owner)
    with start.session_folder() as folder:
        there = {path.name for path in sessions.iterdir()} - {folder.name}
    assert there == set(owners) - {"ray-dead", "ray-reused"}


def test_sockets_fit_into_the_folder(monkeypatch):
    """The system allows them a path of 107 characters."""
    for base in ("/tmp", "/a-longer-name-of-a-temporary-folder"):
        monkeypatch.setattr(start.tempfile, "tempdir", base)
        session = "session_2026-11-26_18-24-30_928269_4194304"
        assert len(str(Path(start._short_folder(), "ray-12345678/1", session))) < 107 - 21
