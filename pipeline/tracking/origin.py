"""Where runs come from: code, DVC, processes."""

import os
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil

# What a run itself changes in git's eyes
GENERATED = (
    *("**/dvc.lock", "metrics/**", "plots/**", "report/**"),
    *("sweep/**/trials.csv", "sweep/**/best_params.yaml", "sweep/**/*.png"),
)


def provenance() -> dict[str, str]:
    """Tags that lead from a run to the code and to DVC."""

    def git(*command: str) -> str:
        result = subprocess.run(["git", *command], capture_output=True, text=True, check=False)
        return result.stdout.strip()

    changed = git(
        "status", "--porcelain", "--", ".", *(f":(exclude,glob){path}" for path in GENERATED)
    )
    return {
        "git.commit": git("rev-parse", "HEAD") or "none",
        "git.dirty": str(bool(changed)).lower(),
        "dvc.stage": os.environ.get("DVC_STAGE", "none"),
        "dvc.experiment": os.environ.get("DVC_EXP_NAME", "workspace"),
    }


def execution() -> str:
    """Names what runs this stage: the `dvc` above it; itself where there is none."""
    for process in [psutil.Process(), *psutil.Process().parents()]:
        with suppress(psutil.Error):
            if any(Path(part).name == "dvc" for part in process.cmdline()[:3]):
                return _named(process)
    return this_process()


def this_process() -> str:
    """Names this process on this machine, also against a later one with the same number."""
    return _named(psutil.Process())


def _named(process: psutil.Process) -> str:
    return f"{socket.gethostname()} {process.pid} {process.create_time():.0f}"


def is_gone(process: str) -> bool:
    """Whether a process of this machine has ended; of another machine nobody knows."""
    host, _, rest = process.partition(" ")
    number, _, created = rest.partition(" ")
    if host != socket.gethostname():
        return False
    try:
        return f"{psutil.Process(int(number)).create_time():.0f}" != created
    except psutil.NoSuchProcess:
        return True
