"""`make ui`: MLflow's pages of all runs, on this machine only, until ctrl-C.

    python -m pipeline.ui [PORT]

Where MLFLOW_TRACKING_URI names a server that runs already, that one is shown and nothing started.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import urlopen

from pipeline.command import command, parser
from pipeline.errors import StageError
from pipeline.tracking.address import (
    experiment,
    experiment_id,
    fault_of,
    tracking_uri,
    without_secrets,
)
from pipeline.tracking.database import alone, file_of

HOST, PORT = "127.0.0.1", 5000
PATIENCE = 180.0  # seconds until the server answers
GOODBYE = 10.0  # and until it has ended


class UiError(StageError):
    """The pages cannot be shown; the message says why and what to do."""


@command
def main(arguments: Sequence[str]) -> int:
    """Show the pages until ctrl-C, SIGTERM or the end of the terminal; the exit status."""
    line = parser(__doc__, "ui")
    line.add_argument("port", nargs="?", default=str(PORT), metavar="PORT")
    wanted = line.parse_args(arguments).port
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, signal.default_int_handler)
    uri = tracking_uri()
    try:
        if fault := fault_of(uri):
            raise UiError(fault)
        if uri.startswith(("http://", "https://")):
            show(without_secrets(uri))
            return 0
        port = port_of(wanted)
        database = file_of(uri)
        if database is not None and not database.exists():
            print("no runs yet: make repro")
        with serving(uri, port) as server:
            address = f"http://{HOST}:{port}"
            show(address + page_of(address), " (ctrl-C ends it)")
            server.wait()
        raise UiError(f"MLflow's server ended by itself, with status {server.returncode}")
    except KeyboardInterrupt:
        return 0


def port_of(text: str) -> int:
    """The port that is wanted, which nobody else listens on."""
    if not text.isdecimal() or len(text) > 9 or not 0 < int(text) < 65536:
        raise UiError(f"PORT is {text!r}; allowed are 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, int(text)))
        except OSError as error:
            why = os.strerror(error.errno or 0)
            another = int(text) % 65535 + 1
            raise UiError(f"{HOST}:{text}: {why}; another: make ui PORT={another}") from error
    return int(text)


@contextmanager
def serving(uri: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """MLflow's server, from when it answers; nothing of it is left afterwards."""
    command = (
        *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port)),
        *("--workers", "1", "--uvicorn-opts", "--log-level warning"),
    )
    settings = {
        "MLFLOW_BACKEND_STORE_URI": uri,  # not an argument, which other users could read
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONWARNINGS": "ignore",
    }
    server = subprocess.Popen(
        command,
        env=os.environ | settings,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # a group of its own, which ends with this process
    )
    try:
        with alone(uri):  # it makes the database where there is none
            wait_for(server, f"http://{HOST}:{port}")
        yield server
    finally:
        end(server)


def wait_for(server: subprocess.Popen[bytes], address: str) -> None:
    """Until the server answers; an error where it ends before it does."""
    deadline = time.monotonic() + PATIENCE
    while server.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), urlopen(f"{address}/health", timeout=5):
            return
        time.sleep(0.2)
    if server.poll() is None:
        raise UiError(f"MLflow's server does not answer after {PATIENCE:.0f} s")
    raise UiError(f"MLflow's server did not start (status {server.returncode}); it says why above")


def end(server: subprocess.Popen[bytes]) -> None:
    """The server and all its processes."""
    try:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(GOODBYE)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def page_of(address: str) -> str:
    """Address of the page of the pipeline's runs; the start page where there are none yet."""
    number = experiment_id()
    if not number:
        name = quote(experiment(), safe="")
        call = f"{address}/api/2.0/mlflow/experiments/get-by-name?experiment_name={name}"
        try:
            with urlopen(call, timeout=30) as answer:
                found = json.load(answer)["experiment"]
        except HTTPError:  # there is none
            return ""
        if found["lifecycle_stage"] == "deleted":
            return ""
        number = found["experiment_id"]
    return f"/#/experiments/{number}/runs?workflowType=machine_learning"


def show(address: str, hint: str = "") -> None:
    """Print the address, and open a browser where there is a screen."""
    print(f"MLflow: {address}{hint}", flush=True)
    if sys.platform == "darwin" or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY"))):
        with suppress(webbrowser.Error):
            webbrowser.open(address)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
