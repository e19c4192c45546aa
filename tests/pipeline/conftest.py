"""A copy of the repository with tiny parameters, in which the real pipeline runs once."""

import copy
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import mlflow
import psutil
import pytest

ROOT = Path(__file__).parents[2]
TINY = {
    "train_limit: null": "train_limit: 200",
    "width: 0.25": "width: 0.1",
    "hidden: 128": "hidden: 16",
    "epochs: 50": "epochs: 4",
    "architecture: resnet12": "architecture: vgg5",
    "timesteps: 8 ": "timesteps: 3 ",
    "epochs: 10": "epochs: 1",
    "timesteps: 100": "timesteps: 10",
    "images: 256": "images: 32",
    "timesteps: 200": "timesteps: 8",
    "scales: [0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 1.0]": "scales: [0.2, 0.3]",
}

MARK = "STARTED_BY_TEST"  # in the environment of all that a command starts
ELSEWHERE = ("MLFLOW_TRACKING_URI", "DVC_ROOT", "RAY_ADDRESS")  # would lead out of the copy
OF_MAKE = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL", "ARGS")  # of `make test ARGS=...`


class Repository:
    """A temporary repository and the commands that a person gives in it."""

    end: int  # of its first repro, in milliseconds

    def __init__(self, root: Path) -> None:
        self.root = root
        for command in (
            ["git", "init", "-q"],
            ["git", "config", "user.email", "test@example.invalid"],
            ["git", "config", "user.name", "test"],
            ["git", "add", "-A"],
            ["git", "commit", "-qm", "start"],
        ):
            self.run(*command)

    @staticmethod
    def environment() -> dict[str, str]:
        """This process's, with its commands, without what leads out of the copy or is of make."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        without = {k: v for k, v in os.environ.items() if k not in (*ELSEWHERE, *OF_MAKE)}
        return without | {"PATH": path}

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            command, cwd=self.root, env=self.environment(), capture_output=True, text=True
        )
        assert not check or result.returncode == 0, result.stdout + result.stderr
        return result

    def runs(self, name: str) -> list[str]:
        """How the MLflow runs of a stage ended, the newest first."""
        client = mlflow.MlflowClient(f"sqlite:///{self.root / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("stdb")
        runs = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
        return [run.info.status for run in runs]

    def repro(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("dvc", "repro", *arguments, check=check)

    def set(self, before: str, after: str) -> None:
        path = self.root / "params.yaml"
        text = path.read_text()
        assert before in text, f"{before!r} is not in params.yaml"
        path.write_text(text.replace(before, after, 1))

    def bytes_of_outs(self) -> dict[str, bytes]:
        outs = [*self.root.glob("models/*"), *self.root.glob("metrics/*"), self.root / "dvc.lock"]
        return {str(p.relative_to(self.root)): p.read_bytes() for p in outs if p.is_file()}


def copy_of(repository, folder):
    """The repository with all that was made in it."""
    shutil.copytree(repository.root, folder, symlinks=True)
    copied = copy.copy(repository)
    copied.root = folder
    return copied


def listen_to_ctrl_c() -> None:
    """As a command of an interactive shell does; one of a script in the background ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Started:
    """A command in a process group of its own, and all that comes from it."""

    def __init__(self, repository, log: Path, command, **environment) -> None:
        self.log, self.mark = log, uuid.uuid4().hex
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=repository.root, stdout=file, stderr=file, start_new_session=True,
                env=repository.environment() | {MARK: self.mark} | environment,
                preexec_fn=listen_to_ctrl_c,
            )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        """All that are alive."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark:
                    found.append(process)
            except psutil.Error:
                pass
        return [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def workers(self) -> list[psutil.Process]:
        """Ray Train's."""
        return [p for p in self.processes() if "RayTrainWorker" in " ".join(p.cmdline())]

    def says(self) -> str:
        return self.log.read_text()

    def wait_until_gone(self, seconds: float) -> None:
        """Fails where a process is left behind."""
        self.process.wait(seconds)
        deadline = time.monotonic() + seconds
        while left := self.processes():
            assert time.monotonic() < deadline, [p.cmdline() for p in left]
            time.sleep(0.1)


def make_repository(folder: Path, changes: dict[str, str] = TINY) -> Repository:
    """A copy of the sources, with these changes in params.yaml."""
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    generated = ("dvc.lock", "metrics/", "plots/", "report/", "tests/")
    for name in files:
        if not name.startswith(generated) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    text = (folder / "params.yaml").read_text()
    for before, after in changes.items():
        assert before in text, f"{before!r} is not in params.yaml"
        text = text.replace(before, after, 1)
    (folder / "params.yaml").write_text(text)
    return Repository(folder)


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
