"""`make ui`: what it says, what it refuses, and that nothing of it is left."""

import re
import socket
import subprocess
import sys
import urllib.request
from types import SimpleNamespace

import pytest

from pipeline.ui import UiError, wait_for
from tests.pipeline.support import NO_SCREEN, ROOT, Repository, address_of, free_port, ui


def refused(*arguments: str, folder, **environment: str) -> str:
    """What it says where it ends with an error at once."""
    result = subprocess.run(
        [sys.executable, "-m", "pipeline.ui", *arguments], cwd=folder, text=True,
        capture_output=True, env=Repository.environment() | {"PYTHONPATH": str(ROOT)} | environment,
    )  # fmt: skip
    assert result.returncode == 1, result.stdout
    assert "Traceback" not in result.stderr
    return result.stderr


def test_before_the_first_run_and_after_ctrl_c(tmp_path):
    """It says that there are no runs and what makes one; ctrl-C ends it as it should."""
    environment = lambda: Repository.environment() | {"PYTHONPATH": str(ROOT)}  # noqa: E731
    folder = SimpleNamespace(root=tmp_path, environment=environment)
    with ui(folder, tmp_path / "log") as started:
        address = address_of(started)
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address)
        assert started.says().startswith("no runs yet: make repro\n")
        assert b"<title>MLflow</title>" in urllib.request.urlopen(address).read()
    assert started.process.returncode == 0
    assert "Traceback" not in started.says()


def test_a_port_in_use_is_refused(tmp_path):
    """With another one to try, before MLflow starts."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused(str(port), folder=tmp_path)
    assert said == f"error: 127.0.0.1:{port}: Address already in use; another: " \
                   f"make ui PORT={port + 1}\n"  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1"])
def test_a_port_that_is_none_is_refused(tmp_path, port):
    """It says what is allowed."""
    assert refused(port, folder=tmp_path) == f"error: PORT is {port!r}; allowed are 1 to 65535\n"


def test_a_server_that_ends_at_its_start_is_not_waited_for():
    """The error has its status; what it wrote stands above."""
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as server:
        address = f"http://127.0.0.1:{free_port()}"
        with pytest.raises(UiError, match=r"did not start \(status 3\)"):
            wait_for(server, address)


def test_a_server_elsewhere_is_shown_and_none_started(tmp_path):
    """Its address without a password."""
    result = subprocess.run(
        [sys.executable, "-m", "pipeline.ui"], cwd=tmp_path, capture_output=True, text=True,
        env=Repository.environment() | NO_SCREEN
        | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "https://me:s3cret@mlflow.example"},
    )  # fmt: skip
    assert result.returncode == 0
    assert result.stdout == "MLflow: https://***@mlflow.example\n"
    assert not list(tmp_path.iterdir())


def test_an_address_of_nonsense_is_refused(tmp_path):
    """In one line, with what is allowed."""
    said = refused(folder=tmp_path, MLFLOW_TRACKING_URI="foo://me:s3cret@x")
    assert said.startswith("error: MLFLOW_TRACKING_URI is 'foo://***@x', ")
    assert said.count("\n") == 1
    assert "allowed are http://HOST:PORT" in said
