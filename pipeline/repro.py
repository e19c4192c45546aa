"""`make repro`: dvc repro, on one Ray for all stages where their jobs have several workers.

    python -m pipeline.repro [ARGUMENTS OF dvc repro]

Plain `dvc repro` starts Ray for each stage and stops it after it; both make the same. All arguments
are those of `dvc repro`, whose --help follows.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from pipeline.command import command
from pipeline.errors import ParamsError, StageError
from pipeline.files import REPORT, SNN, SNNS
from pipeline.jobs.cluster import ray_cluster
from pipeline.jobs.plan import machine, plan_workers
from pipeline.params import load_params


@command
def main(arguments: Sequence[str]) -> int:
    """Run dvc repro; its exit status."""
    asks_for_help = not {"-h", "--help"}.isdisjoint(arguments)
    if asks_for_help:
        print(__doc__, flush=True)
    with ExitStack() as stack:
        environment = dict(os.environ)
        if not asks_for_help and several_workers():
            import ray

            stack.enter_context(ray_cluster(None))
            environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        try:
            status = subprocess.run(["dvc", "repro", *arguments], env=environment).returncode
        except KeyboardInterrupt:  # dvc and the stage got it, too
            return 130
    if status == 0 and not arguments:  # all of it was made
        print("\n".join(["", *closing()]), flush=True)
    return status


def closing() -> list[str]:
    """What came out, where it is, and what one may do next: five lines."""
    from pipeline.reporting.page import in_a_line
    from pipeline.reporting.results import read_results

    falling = load_params().stdb.falling
    others = f" (T = {falling[-1]}; others: --model {SNNS}/…)" if len(falling) > 1 else ""
    server = os.environ.get("MLFLOW_TRACKING_URI")
    return [
        in_a_line(load_params(), read_results()),
        f"{'the report':<12} {REPORT}/index.html, in any browser",
        f"{'all runs':<12} {server or 'make ui, MLflow on this machine'}",
        f"{'your images':<12} python -m pipeline.predict IMAGE…, with {SNN}{others}",
        f"{'next':<12} make sweep: how few steps do?  make preset: CIFAR-10, the paper's rows",
    ]


def several_workers() -> bool:
    """Whether jobs start a Ray of their own; stages say what is wrong with the parameters."""
    if os.environ.get("RAY_ADDRESS", "local") not in ("", "local"):
        return False
    try:
        return plan_workers(load_params().cluster, *machine()).workers > 1
    except (ParamsError, StageError):
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
