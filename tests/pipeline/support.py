"""What the pipeline's tests share: a copy of the repository, commands in it, workers, MLflow."""

import copy
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path

import mlflow
import psutil
import torch
import yaml

from pipeline import balance_thresholds
from pipeline.data import save_split
from pipeline.data.sources import read_source
from pipeline.files import ANN, BALANCED, DATA, THRESHOLDS
from pipeline.jobs.checkpoints import Checkpoints
from pipeline.jobs.worker import Worker
from pipeline.learning.balanced import save_balanced
from pipeline.learning.networks import (
    build_ann,
    build_snn,
    load_converted,
    load_weights,
    save_weights,
)
from pipeline.overlays import apply
from pipeline.params import NetworkParams, StdbParams, load_params
from pipeline.prepare_data import split
from pipeline.tracking.messages import Start
from pipeline.tracking.mlflow_process import MlflowProcess
from pipeline.tracking.origin import provenance, this_process

ROOT = Path(__file__).parents[2]
STAGES = [
    "prepare_data",
    "train_ann",
    "balance_thresholds",
    "evaluate_converted",
    "finetune_stdb",
    "report",
]
TINY = {  # an overlay on params.yaml, with which the whole pipeline takes seconds
    "data": {"train_limit": 200},
    "network": {"architecture": "vgg5", "width": 0.1, "hidden": 16},
    "train_ann": {"epochs": 4},
    "balance_thresholds": {"timesteps": 10, "images": 32},
    "evaluate_converted": {"timesteps": 8, "scales": [0.2, 0.3]},
    "stdb": {"timesteps": 3, "epochs": 1},
}

KERNELS = Path("stdb/kernels/__pycache__")  # numba's, also where Python's own are elsewhere
MARK = "STARTED_BY_TEST"  # in the environment of all that a command starts
ELSEWHERE = ("MLFLOW_TRACKING_URI", "DVC_ROOT", "RAY_ADDRESS")  # would lead out of the copy
NO_SCREEN = {"DISPLAY": "", "WAYLAND_DISPLAY": "", "BROWSER": "true"}  # opens no browser
OF_MAKE = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL", "ARGS")  # of `make test ARGS=...`


class Repository:
    """A temporary repository and the commands that a person gives in it."""

    end: int  # of its first repro, in milliseconds

    def __init__(self, root: Path) -> None:
        self.root = root

    def commit(self) -> None:
        """All of it, as the first commit."""
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

    def set(self, **changes) -> None:
        """Change params.yaml through the project's own overlay: ``set(stdb={"timesteps": 4})``."""
        overlay = self.root.parent / f"{self.root.name}-overlay.yaml"
        overlay.write_text(yaml.safe_dump(changes))
        apply(overlay, self.root / "params.yaml")
        overlay.unlink()

    def write_wrong(self, before: str, after: str) -> None:
        """Replace text in params.yaml by what an overlay would refuse."""
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

    def listens_on(self) -> set[str]:
        """The addresses that any of them listens on."""
        found = set()
        for process in self.processes():
            with suppress(psutil.Error):
                sockets = process.net_connections("inet")
                found |= {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN}
        return found

    def says(self) -> str:
        return self.log.read_text()

    def wait_until_gone(self, seconds: float) -> None:
        """Fails where a process is left behind."""
        self.process.wait(seconds)
        deadline = time.monotonic() + seconds
        while left := self.processes():
            assert time.monotonic() < deadline, [p.cmdline() for p in left]
            time.sleep(0.1)


def make_repository(folder: Path, overlay: dict | None = TINY) -> Repository:
    """A copy of the sources, with an overlay on params.yaml."""
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    generated = ("dvc.lock", "metrics/", "plots/", "report/", "tests/")
    for name in files:
        if not name.startswith(generated) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for kernel in (ROOT / KERNELS).glob("*.nb[ci]"):  # compiled for these very files, in seconds
        (folder / KERNELS).mkdir(exist_ok=True)
        shutil.copy2(kernel, folder / KERNELS / kernel.name)
    repository = Repository(folder)
    if overlay:
        repository.set(**overlay)
    repository.commit()
    return repository


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# -- MLflow ----------------------------------------------------------------------------------------


def mlflow_process(
    key: str, *, stage: str = "work", execution: str = "", **message
) -> MlflowProcess:
    """What the process of a tracker does at its start, in this one."""
    process = MlflowProcess()
    start = Start(
        stage=stage,
        job=f"{stage}-{key}",
        **{"params": {}, "everything": {"stdb.alpha": 0.3}, **message},
        process=this_process(),
        execution=execution or this_process(),
        origin=provenance(),
    )
    process.start(start)
    return process


@contextmanager
def ui(repository, log, port=None):
    """The command of `make ui` in a repository; ctrl-C at the end, and nothing is left."""
    command = [sys.executable, "-m", "pipeline.ui", str(port or free_port())]
    started = Started(repository, log, command, **NO_SCREEN)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.send_signal(signal.SIGINT)
        started.wait_until_gone(60)


def address_of(started) -> str:
    """The address that it prints once the server answers."""
    deadline = time.monotonic() + 180
    while not (found := re.search(r"^MLflow: (\S+) \(ctrl-C ends it\)$", started.says(), re.M)):
        assert started.process.poll() is None, started.says()
        assert time.monotonic() < deadline, started.says()
        time.sleep(0.1)
    return found[1]


# -- loops -----------------------------------------------------------------------------------------

_DEFAULT = load_params(ROOT / "params.yaml")
PARAMS = _DEFAULT.model_copy(  # of one T, as a trial has it
    update={"stdb": _DEFAULT.stdb.model_copy(update={"timesteps": 8})}
)


def based(section="stdb", **values):
    """params.yaml's parameters with others of one section."""
    changed = getattr(PARAMS, section).model_copy(update=values)
    return PARAMS.model_copy(update={section: changed})


NETWORK = NetworkParams(
    architecture="vgg5", width=0.1, hidden=16, dropout=0.3, classifier_dropout=0.5
)
NORMED = NETWORK.model_copy(update={"normalisation": "batch", "pooling": "max"})
STDB = PARAMS.stdb.model_copy(
    update={
        **{"timesteps": 3, "epochs": 1, "batch_size": 24, "learning_rate": 1e-3, "milestones": []},
        **{"logit_scale": 1.0, "threshold_scale": 0.5},
    }
)
DIRECT = STDB.model_copy(update={"encoder": "direct", "timesteps": 12, "threshold_scale": 0.2})
BALANCING = PARAMS.balance_thresholds.model_copy(
    update={"timesteps": 10, "images": 20, "method": "maximum"}
)
MSE = BALANCING.model_copy(update={"method": "mse", "batch_size": 7})
RESNET = NORMED.model_copy(update={"architecture": "resnet8", "width": 0.1})
LAYER_THRESHOLDS = {"conv1": 2.0, "conv2": 0.7, "conv3": 0.6, "fc1": 0.5, "fc2": 0.4}


def make_files(folder: Path):
    """Prepared splits, an ANN and thresholds, where earlier stages leave them; and the splits."""
    data = PARAMS.data.model_copy(update={"train_limit": 60})
    parts = split(data, *read_source(data))
    for place in (DATA, ANN.parent):
        (folder / place).mkdir(parents=True)
    for name, part in parts.items():
        save_split(part, folder / DATA / f"{name}.safetensors")
    torch.manual_seed(3)
    ann = build_ann(NETWORK, parts["train"])
    save_weights(ann.state_dict(), folder / ANN)
    rows = [{"layer": n, "threshold": v, "balanced": True} for n, v in LAYER_THRESHOLDS.items()]
    (folder / THRESHOLDS).write_text(json.dumps({"layers": rows}))
    save_balanced(torch.empty(0, dtype=torch.uint8), folder / BALANCED)
    return folder, parts


class KeptWorker(Worker):
    """A worker whose states are kept in a list instead of in files."""

    def __init__(self, params, root: Path, stage: str = "work", **settings) -> None:
        checkpoints = Checkpoints(str(root / ".results"), stage, "test")
        super().__init__(params, stage, checkpoints, root, **settings)
        self.states: list[dict] = []

    def checkpoint(self, state, rows=()) -> None:
        self.states.append(copy.deepcopy(state))
        self.send(list(rows))

    def resume(self):
        return copy.deepcopy(self.states[-1]) if self.states else None


def worker(root: Path, stdb_params=STDB, **sections) -> KeptWorker:
    """The one worker of a job on the files of :func:`make_files`."""
    params = PARAMS.model_copy(update={"network": NETWORK, "stdb": stdb_params, **sections})
    return KeptWorker(params, root)


def starting(files, params: StdbParams, scale=0.5):
    """The spiking network that fine-tuning begins with, built by hand."""
    folder, parts = files
    ann = build_ann(NETWORK, parts["train"])
    load_weights(ann, folder / ANN)
    for module in ann.modules():
        if isinstance(module, torch.nn.Dropout) and params.dropout is not None:
            module.p = params.dropout
    snn = build_snn(ann, params, params.seed)
    snn.set_thresholds(LAYER_THRESHOLDS)
    snn.scale_thresholds(scale)
    return snn


def hand_on(state, folder) -> None:
    """What the stage's main writes."""
    rows = [{"layer": n, "threshold": v, "balanced": True} for n, v in state["thresholds"].items()]
    (folder / THRESHOLDS).write_text(json.dumps({"layers": rows}))
    save_balanced(state["balanced"], folder / BALANCED)


def seen(network, train) -> torch.nn.Module:
    """An ANN whose norms know the images."""
    torch.manual_seed(3)
    ann = build_ann(network, train).train()
    for _ in range(20):
        ann(train.pixels())
    return ann


def handed_on(folder, parts, network, balancing=MSE, params=DIRECT):
    """An ANN that has seen the images, calibrated; what is loaded of it, and the state."""
    ann = seen(network, parts["train"])
    save_weights(ann.state_dict(), folder / ANN)
    one = worker(folder, params, network=network, balance_thresholds=balancing)
    balance_thresholds.balance_loop(one)
    hand_on(one.states[-1], folder)
    _, snn = load_converted(network, params, parts["train"], folder)
    return snn, one.states[-1], ann.eval()


# -- stages that are interrupted -------------------------------------------------------------------

FINETUNE = [sys.executable, "-m", "pipeline.finetune_stdb"]
RESULTS = ("models/snn.safetensors", "metrics/finetune_stdb.json", "plots/finetune_stdb.csv")


def results(repository) -> dict[str, bytes]:
    """What the fine-tuning ended with."""
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
