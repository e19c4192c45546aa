"""What ``auto`` stands for in a job, where that depends on the machine.

Rank 0 decides it once for all workers, and the checkpoints keep it, so that a job that goes on
computes as it began, also on another machine: in which precision products are made, and whose
densities decide between events and the dense form (``SpikingNetwork.events``).
"""

from dataclasses import replace

import torch
import torch.distributed as dist

from pipeline.jobs.worker import Worker
from pipeline.params import Params
from stdb import instruction_set, multiplies_bfloat16

Choices = dict[str, str]  # key of the section → what was chosen


def with_choices(worker: Worker) -> Worker:
    """The worker with parameters in which ``auto`` has become what was chosen for its job."""
    params = worker.params
    name = "train_ann" if worker.stage == "train_ann" else "stdb"
    section = params.train_ann if name == "train_ann" else params.stdb
    wanted = [key for key in ("precision", "events") if getattr(section, key, None) == "auto"]
    if not wanted:
        return worker
    found: list[Choices | None] = [None]
    if worker.rank == 0:
        begun = (worker.checkpoints.load() or {}).get("choices", {})
        here = {"precision": precision(name, worker.device), "events": instruction_set()}
        found = [{key: begun.get(key, here[key]) for key in wanted}]
    if worker.world > 1:
        dist.broadcast_object_list(found)
    choices = found[0]
    assert choices is not None
    chosen: Params = params.model_copy(update={name: section.model_copy(update=choices)})
    return replace(worker, params=chosen, choices=choices)


def precision(section: str, device: torch.device) -> str:
    """Of products: bfloat16 where the device has it in hardware and no decision hangs on it.

    The ANN learns in it and is evaluated in float32. Spikes hang on it: at T = 4 the same network
    decides 4 % of the images otherwise (docs/speed.md), so that it is for who asks for it by name.
    """
    if section == "train_ann" and multiplies_bfloat16(device):
        return "bf16"
    return "tf32" if device.type == "cuda" else "float32"
