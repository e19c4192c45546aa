"""How many workers a job has, and what each of them gets."""

from typing import NamedTuple

import torch

from pipeline.errors import StageError
from pipeline.params import ClusterParams


class Plan(NamedTuple):
    """The workers of a job: how many, whether each has a GPU, and the cores of each.

    On a cluster an elastic job has from ``least`` to ``workers`` of them. ``sharing`` jobs, this
    one counted, run at once on the memory that each of them finds free.
    """

    workers: int
    least: int
    use_gpu: bool
    cpus: int
    sharing: int = 1

    def __str__(self) -> str:
        several = f"{self.least} to {self.workers}" if self.elastic else str(self.workers)
        kind = "GPU worker(s)" if self.use_gpu else f"CPU worker(s) × {self.cpus} core(s)"
        return f"{several} {kind}"

    @property
    def elastic(self) -> bool:
        """Whether their number may change."""
        return self.least < self.workers


def machine() -> tuple[int, int]:
    """CPUs that this process may use (affinity and container limits counted) and GPUs."""
    import joblib

    return joblib.cpu_count(), torch.cuda.device_count()


def plan_workers(params: ClusterParams, cpus: int, gpus: int, *, elastic: bool = False) -> Plan:
    """The workers for what a machine or a cluster has.

    Args:
        params: what is asked for.
        cpus: there are.
        gpus: there are.
        elastic: a range stays one; otherwise it is as many as there is room for.

    Raises:
        StageError: ``cluster`` asks for more than there is.
    """
    if params.use_gpu is True and gpus == 0:
        raise StageError("cluster.use_gpu is true and there is no GPU; allowed here: auto, false")
    use_gpu = gpus > 0 if params.use_gpu == "auto" else params.use_gpu
    if isinstance(params.workers, list):
        least, workers = params.workers
    elif params.workers == "auto":
        workers = gpus if use_gpu else 1
        least = workers if elastic else 1
    else:
        least = workers = params.workers
    if use_gpu and least > gpus:
        raise StageError(
            f"cluster.workers is {params.workers}; there are {gpus} GPUs, one for each worker"
        )
    if not elastic:
        workers = max(least, min(workers, gpus if use_gpu else cpus))
    each = max(1, cpus // workers) if params.cpus_per_worker == "auto" else params.cpus_per_worker
    if least * each > cpus:
        raise StageError(
            f"cluster.workers is {params.workers}, with {each} core(s) each; there are {cpus} cores"
        )
    if not elastic:
        least = workers = min(workers, cpus // each)
    return Plan(workers, least, use_gpu, each)
