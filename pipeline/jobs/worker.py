"""A worker of a job: what a stage's loop is given, and all that it needs.

A plain ``Worker(params, "train_ann", checkpoints)`` is the only worker of a job in this process.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.data import Samples, load_split, worker_batches
from pipeline.files import DATA
from pipeline.jobs.checkpoints import Checkpoints
from pipeline.params import Params

WORK_PER_THREAD = 1 << 28  # multiply-accumulates of a batch; the digits' network has 46 million

LOG_EVERY, TERMINAL_EVERY = 10.0, 0.3  # seconds between two lines of progress
CLEAR = "\r\033[K"  # to the beginning of the line, which is emptied

Row = dict[str, float]  # the metrics of an epoch
State = dict[str, Any]  # what a job goes on from, and ends with


@dataclass
class Worker:
    """One of the processes that share a job.

    Attributes:
        params: all parameters.
        stage: name of the stage, which lines and messages begin with.
        checkpoints: of the job.
        root: the repository, which the files that stages hand on are in.
        rank: 0 … world − 1.
        world: number of workers.
        device: what it computes on.
        readers: processes that read image files for it.
        report_every: seconds between two reports where epochs are short.
        choices: what ``auto`` stands for in this job; its checkpoints keep it.
        sharing: jobs that run at once on this memory, this one counted.
        send: takes the metrics of epochs, a row each, for whoever watches the job.
    """

    params: Params
    stage: str
    checkpoints: Checkpoints
    root: Path = field(default_factory=Path)
    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    readers: int = 0
    report_every: float = 0.0
    choices: dict[str, str] = field(default_factory=dict)
    sharing: int = 1
    send: Callable[[list[Row]], None] = lambda _: None
    _said: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        """A line for the person who watches, once for all workers."""
        if self.rank == 0:
            print(f"{CLEAR if sys.stdout.isatty() else ''}[{self.stage}] {text}", flush=True)

    def progress(self, text: str) -> None:
        """How far long work is; may be called often.

        On a terminal one line that is written over, which the next line of :meth:`say` takes away;
        in a log a line now and then.
        """
        terminal, now = sys.stdout.isatty(), time.monotonic()
        if now - self._said < (TERMINAL_EVERY if terminal else LOG_EVERY):
            return
        self._said = now
        if terminal and self.rank == 0:
            print(f"{CLEAR}[{self.stage}] {text}", end="", flush=True)
        elif not terminal:
            self.say(text)

    def use_threads(self, work: float) -> None:
        """Compute with as many threads as a batch's work is worth, up to this worker's cores.

        The layers of a small network are done before a second thread has begun, and on a busy
        machine each of them waits for a thread that is not running. It follows from the work alone
        and not from what is free: torch's sums depend on the number of threads in their last bits.

        Args:
            work: multiply-accumulates of a forward pass over a batch.
        """
        if self.device.type == "cpu":
            wanted = max(1, round(work / WORK_PER_THREAD))
            torch.set_num_threads(min(wanted, torch.get_num_threads()))

    # -- files and data ------------------------------------------------------------------------

    def path(self, file: Path) -> Path:
        """Where a file of the repository is."""
        return self.root / file

    def split(self, name: str) -> Samples:
        """A split that prepare_data wrote, on this worker's device."""
        return load_split(self.path(DATA) / f"{name}.safetensors", self.readers).to(self.device)

    def batches(self, count: int, size: int) -> list[Tensor]:
        """Positions of this worker's batches of an evaluation of ``count`` samples."""
        return worker_batches(count, size, self.rank, self.world)

    # -- with the other workers ----------------------------------------------------------------

    def all_reduce(self, value: Tensor, op: str = "sum") -> Tensor:
        """Sum ("sum") or maximum ("max") over all workers, in place."""
        if self.world > 1:
            dist.all_reduce(value, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
        return value

    def data_parallel(self, network: nn.Module) -> nn.Module:
        """The network wrapped by DDP where there are several workers."""
        if self.world == 1:
            return network
        from ray.train.torch import prepare_model

        wrapped: nn.Module = prepare_model(network, move_to_device=False)
        return wrapped

    # -- state ---------------------------------------------------------------------------------

    def resume(self) -> State | None:
        """The state that an interrupted run of this job kept last, or None."""
        return self.checkpoints.load(self.device)

    def checkpoint(self, state: State, rows: Sequence[Row] = ()) -> None:
        """Keep the state to go on from, and send metrics, a row an epoch. All workers call it."""
        if self.rank == 0:
            self.checkpoints.save(state | {"choices": self.choices})
        self.send(list(rows))

    def checkpoint_due(self, step: int) -> bool:
        """Whether the state is to be kept after this step of an epoch."""
        steps = self.params.cluster.checkpoint_steps
        return steps is not None and step % steps == 0

    def report_due(self, seconds: float) -> bool:
        """Whether so long after the last report there is to be one; short epochs share one."""
        return seconds > self.report_every
