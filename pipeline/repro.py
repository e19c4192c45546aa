"""`make repro`: dvc repro, on one Ray for all stages where their jobs have several workers.

    python -m pipeline.repro [ARGUMENTS OF dvc repro]

Plain `dvc repro` starts Ray for each stage and stops it after it; both make the same.
"""

import os
import subprocess
import sys
from contextlib import ExitStack

from pipeline.errors import ParamsError, StageError
from pipeline.jobs.cluster import ray_cluster
from pipeline.jobs.plan import machine, plan_workers
from pipeline.params import load_params


def main(arguments: list[str]) -> int:
    """Run dvc repro; its exit status."""
    with ExitStack() as stack:
        environment = dict(os.environ)
        if several_workers():
            import ray

            stack.enter_context(ray_cluster(None))
            environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        try:
            return subprocess.run(["dvc", "repro", *arguments], env=environment).returncode
        except KeyboardInterrupt:  # dvc and the stage got it, too
            return 130


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
