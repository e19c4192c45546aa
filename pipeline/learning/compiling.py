"""The ANN's training step compiled by torch.compile, where a compiler is there and it pays.

Only the forward method in training is compiled, with the hooks of its layers; evaluation and all
that looks at the network see it as it is. What is compiled rounds otherwise, so that whether it is
follows from the parameters and the machine, never from what is free.
"""

import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import stdb
from pipeline.data import Samples
from pipeline.errors import StageError
from pipeline.jobs.worker import Worker

# Multiply-accumulates of a training's forward passes from which on it pays. Measured, resnet9 at
# half width, QCFS, batch 128, bfloat16, one thread: 0.70 s a step, compiled 0.42 (with ReLU 0.41
# and 0.38), and up to 108 s for compiling: 4·10¹² are even.
PAYS = 2 * 10**13


@contextmanager
def compiled(worker: Worker, ann: nn.Module, train: Samples, work: float) -> Iterator[bool]:
    """Have a network's training steps compiled inside of the ``with``, as the parameters say.

    Args:
        worker: that this process is; ``params.train_ann.compile`` says whether.
        ann: the network.
        train: the images.
        work: multiply-accumulates of an image.

    Yields:
        Whether it is compiled. Dropout is not drawn by sample there; such a network never is.
    """
    if not settled(worker, ann, train, work):
        yield False
        return
    if reason := obstacle(worker, ann):
        worker.say(f"the training is not compiled: {reason}")
        yield False
        return
    from torch._dynamo.exc import TorchDynamoException  # seconds to import
    from torch._inductor.exc import InductorError

    worker.say("the training is compiled, which takes a minute or two at its first step")
    plain = ann.forward
    fast = torch.compile(plain, dynamic=False)
    works: bool | None = None  # not tried yet

    def forward(images: Tensor) -> Tensor:
        nonlocal works
        logits: Tensor
        if ann.training and works is not False:
            try:
                logits = fast(images)
            except Exception as error:
                if works:
                    raise
                works = False
                said = (str(error).strip() or type(error).__name__).splitlines()[0]
                worker.say(f"the training is not compiled: torch.compile failed: {said}")
            else:
                works = True
                return logits
        logits = plain(images)
        return logits

    ann.forward = forward
    try:
        yield True
    except (InductorError, TorchDynamoException) as error:  # of a backward pass, or another shape
        said = str(error).strip().splitlines()[0]
        raise StageError(
            f"torch.compile failed: {said}; train_ann.compile: false trains without it"
        ) from error
    finally:
        del ann.forward


def settled(worker: Worker, ann: nn.Module, train: Samples, work: float) -> bool:
    """Whether the training is to be compiled; ``auto`` is settled once, and goes on as it began."""
    params = worker.params.train_ann
    if params.compile != "auto":
        return params.compile
    bounded = any(isinstance(module, stdb.Clip) for module in ann.modules())
    pays = params.epochs * len(train) * work >= PAYS and worker.device.type == "cpu"
    if not (bounded and pays):
        return False
    begun = (worker.resume() or {}).get("choices", {}).get("compile")
    fast = not obstacle(worker, ann) if begun is None else begun == "true"
    worker.choices["compile"] = str(fast).lower()
    return fast or begun is None  # what is in its way is then said


def obstacle(worker: Worker, ann: nn.Module) -> str:
    """Why a network's training cannot be compiled; empty where it can."""
    if ":" in worker.params.network.architecture:
        return "train_ann.compile is for the built-in networks"
    if worker.world > 1:
        return "it is that of one worker alone"
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in ann.modules()):
        return (
            "its dropouts are drawn by sample; with network.dropout and classifier_dropout 0 it "
            "would be"
        )
    if worker.device.type != "cpu":
        return ""
    command = os.environ.get("CXX", "g++")
    if shutil.which(command) is None:
        return f"there is no C++ compiler, {command}"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's headers are not installed"
    return ""
