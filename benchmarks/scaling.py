"""Two workers with one thread each, and as many processes that know nothing of each other.

    python -m benchmarks.scaling [ROUNDS]

STDB fine-tuning of VGG5 at T = 20 on CIFAR-sized images, with the pipeline's own step; the workers
average their gradients (DDP over gloo). Both ways take turns in the same processes. Prints one JSON
line: seconds per image of all workers together, medians over the rounds.
"""

import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import stdb
from benchmarks.workloads import Workload, images, labels, network
from pipeline.data import Split
from pipeline.learning.fit import Task, backward

WORKERS, STEPS = 2, 2
WORKLOAD = Workload("vgg5", 20, 32, 32, phases=("scale",))


def training(model: nn.Module, snn: stdb.SpikingNetwork) -> Callable[[], None]:
    """A step of the pipeline's training, on a worker's share of the global batch."""
    optimizer = torch.optim.Adam(snn.parameters(), 1e-4, amsgrad=True, fused=True)
    x, y = images(WORKLOAD.batch), labels(WORKLOAD.batch)
    share = Split(x, y, torch.arange(len(y)), [])

    def passes(pixels: Tensor, ids: Tensor, epoch: int) -> Iterator[Callable[[], Tensor]]:
        presentation = snn.present(pixels, sample_ids=ids, epoch=epoch)
        yield partial(model, presentation, WORKLOAD.timesteps)

    task = Task(snn, model, passes, optimizer, lambda _: {})

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        backward(task, x, share, 1, 1 / len(y))
        nn.utils.clip_grad_norm_(snn.parameters(), float("inf"))
        optimizer.step()

    return step


def work(rank: int, rounds: int, folder: str) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORKERS)
    alone = network(WORKLOAD).train()
    together = copy.deepcopy(alone)
    ways = {
        "independent": training(alone, alone),
        "stdb": training(DistributedDataParallel(together), together),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + rounds):
        for name, step in ways.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(STEPS):
                step()
            took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(took, dist.ReduceOp.MAX if name == "stdb" else dist.ReduceOp.AVG)
            seconds[name].append(float(took) / (STEPS * WORKERS * WORKLOAD.batch))
    if rank == 0:
        found = {name: median(values[1:]) for name, values in seconds.items()}
        print(
            json.dumps({"workload": f"{WORKLOAD.name}, 2 workers", "batch": WORKLOAD.batch} | found)
        )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as place:
        given = int(sys.argv[1]) if len(sys.argv) > 1 else 3
        torch.multiprocessing.spawn(work, (given, place), WORKERS)
