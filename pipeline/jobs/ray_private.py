"""Private names of Ray, all of them, each with the reason that there is no public one."""

import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

# A resource of the head node alone, which a job's controller takes a little of: Ray has no public
# name for "not on a worker's core".
HEAD = "node:__internal_head__"


def in_folder(folder: str) -> dict[str, Any]:
    """Arguments of ``ray.init`` that put its session into a folder.

    The public way is an environment variable that other Ray programs would see, too; without it the
    sessions of all runs stay in one folder for good.
    """
    return {"_temp_dir": folder}


@contextmanager
def on_loopback() -> Iterator[None]:
    """Within it, ``ray.init`` takes 127.0.0.1 for this machine's address.

    So all of a Ray that is started listens there only, and one that listens there is found. It is
    what Ray does on macOS and Windows; on Linux even ``_node_ip_address="127.0.0.1"`` becomes an
    address that other machines reach, and the environment variable is read at import only.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def found_on_this_machine() -> str | None:
    """HOST:PORT of the cluster that ``address="auto"`` is; None where there is none.

    The public way to learn it is to join it, and to wait for minutes where it is dead.
    """
    from ray._private.services import get_ray_address_from_environment

    try:
        address: str = get_ray_address_from_environment("auto", None)
    except ConnectionError:
        return None
    return address


def file_group(backend: str) -> Any:
    """A ``TorchConfig`` for workers of one machine, which find each other through a file.

    Ray's own has them meet at a port of torch, which listens on all addresses whatever host it is
    given. The folder of the session has no public name either.
    """
    import ray
    from ray.train.torch import TorchConfig, config

    node: Any = ray._private.worker._global_node
    folder = node.get_session_dir_path()

    class FileBackend(config._TorchBackend):
        """Ray's, but for the place where workers meet."""

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            """Every worker joins; a worker group that starts again has a file of its own."""
            store, count = f"{folder}/store-{uuid.uuid4().hex}", len(worker_group)
            worker_group.execute(config._set_torch_distributed_env_vars)
            joined = [
                worker_group.execute_single_async(
                    rank, join_group, backend, rank, count, store, backend_config.timeout_s
                )
                for rank in range(count)
            ]
            ray.get(joined)

    class FileConfig(TorchConfig):
        """What Ray Train's controller starts the group with."""

        @property
        def backend_cls(self) -> type:
            """The backend above."""
            return FileBackend

    return FileConfig(backend=backend)


def join_group(backend: str, rank: int, count: int, store: str, seconds: int) -> None:
    """Make this process a worker of a group on one machine, which talks over loopback."""
    import torch.distributed as dist

    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback)
    place, patience = f"file://{store}", timedelta(seconds=seconds)
    dist.init_process_group(backend, place, patience, count, rank)


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
