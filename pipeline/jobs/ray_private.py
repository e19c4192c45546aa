"""Private names of Ray, all of them, each with the reason that there is no public one."""

from typing import Any

# A resource of the head node alone, which a job's controller takes a little of: Ray has no public
# name for "not on a worker's core".
HEAD = "node:__internal_head__"


def in_folder(folder: str | None) -> dict[str, Any]:
    """Arguments of ``ray.init`` that put its session into a folder.

    The public way is an environment variable that other Ray programs would see, too; without it the
    sessions of all runs stay in one folder for good.
    """
    return {"_temp_dir": folder}


def wrapped_cause(error: BaseException) -> object:
    """What Ray wraps around a worker's error: ``cause`` of a task, ``_base_exc`` of a trainer.

    The latter has no public name, and ``__cause__`` is lost where the error crosses processes.
    """
    return getattr(error, "cause", None) or getattr(error, "_base_exc", None) or error.__cause__


def trials_of(results: Any) -> list[Any]:
    """Tune's trials, in the order of a ``ResultGrid``.

    A ``Result`` has neither the id nor the sample of a trial that never reported.
    """
    return list(results._experiment_analysis.trials)


def replace_callbacks(tuner: Any, callbacks: list[Any]) -> None:
    """Give a restored ``Tuner`` callbacks of this process.

    ``Tuner.restore`` takes none, and those in its file cannot hold what lives in a process.
    """
    tuner._local_tuner.get_run_config().callbacks = callbacks
