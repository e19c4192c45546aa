"""What became of a job that failed: a lost worker, or a worker's own error."""

import torch.distributed as dist

from pipeline.command import is_known, message
from pipeline.errors import StageError
from pipeline.jobs.ray_private import wrapped_cause


def worker_lost(error: Exception) -> bool:
    """Whether a job failed since a worker, its node or a connection was lost, not by an error."""
    failures = getattr(error, "worker_failures", None) or {}
    return bool(failures) and _is_loss(_cause(error))


def _is_loss(cause: BaseException) -> bool:
    from ray.exceptions import RayError

    broken = isinstance(cause, RuntimeError) and any(
        word in str(cause).lower() for word in ("gloo", "nccl", "connection")
    )
    ray_trains = type(cause).__module__.startswith("ray.train")
    return broken or ray_trains or isinstance(cause, RayError | dist.DistError)


def _cause(error: Exception) -> BaseException:
    """A worker's own exception, out of what Ray wraps around it; a lost worker's where all are."""
    failures = getattr(error, "worker_failures", None)
    causes = [_inner(failure) for failure in (failures.values() if failures else [error])]
    # a worker that failed takes the others' connections with it
    return next((cause for cause in causes if not _is_loss(cause)), causes[0])


def _inner(error: BaseException) -> BaseException:
    while isinstance(cause := wrapped_cause(error), BaseException):
        error = cause
    return error


def reason(error: Exception) -> str:
    """The message of a worker's own exception."""
    cause = _cause(error)
    text = str(cause).strip() or type(cause).__name__
    return text if isinstance(cause, ValueError | StageError) else f"{type(cause).__name__}: {text}"


def worker_error(error: Exception) -> BaseException:
    """What a stage ends with: the worker's message, or its own error where that is a fault of ours.

    Ray's error, which holds the worker's traceback, is to be its cause.
    """
    cause = _cause(error)
    return StageError(message(cause)) if is_known(cause) else cause
