"""Ray: joined or started, and what its nodes see."""

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from pipeline.environment import OWN_RAY, RAY, set_default_environment
from pipeline.errors import StageError
from pipeline.jobs.address import WAY_OUT, is_loopback, place_of
from pipeline.jobs.checkpoints import Checkpoints
from pipeline.jobs.ray_private import on_loopback
from pipeline.jobs.start import own_ray


@contextmanager
def ray_cluster(
    address: str | None,
    say: Callable[[str], None] = print,
    *,
    dashboard: bool = False,
    logs: bool = True,
) -> Iterator[tuple[int, int]]:
    """Ray, joined or started; gives its CPUs and GPUs. What was started leaves nothing behind.

    Args:
        address: of a cluster that answers, see :func:`cluster_address`; None: one is started, which
            nobody outside this machine reaches.
        say: takes a line where it does not start at once.
        dashboard: whether one that is started has one.
        logs: whether what workers print is shown.

    Raises:
        StageError: it cannot be joined, or did not start.
    """
    set_default_environment(RAY if address else RAY | OWN_RAY)
    handler = signal.getsignal(signal.SIGTERM)  # Ray's own would end the process
    with _joined(address, logs) if address else own_ray(say, dashboard=dashboard, logs=logs):
        import ray

        signal.signal(signal.SIGTERM, handler)
        available = ray.cluster_resources()
        yield int(available.get("CPU", 0)), int(available.get("GPU", 0))


@contextmanager
def _joined(address: str, logs: bool) -> Iterator[None]:
    import ray

    try:
        # Ray looks for a cluster of 127.0.0.1 at this machine's other address
        with on_loopback() if is_loopback(place_of(address)) else nullcontext():
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=logs)
    except (RuntimeError, OSError, ValueError, ray.exceptions.RayError) as error:
        ray.shutdown()
        raise StageError(
            f"the cluster of RAY_ADDRESS, {address}, cannot be joined: {error}; start the stage on "
            f"one of its nodes, with its Ray and RAY_AUTH_MODE, {WAY_OUT}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def on_one_machine() -> bool:
    """Whether all nodes of the Ray that is joined are reached from this machine only."""
    import ray

    return all(is_loopback(f"{node['NodeManagerAddress']}:1") for node in ray.nodes())


def check_nodes(inputs: list[str], checkpoints: Checkpoints) -> None:
    """On several nodes, each has to see the repository's files and the checkpoints.

    Raises:
        StageError: names a node and what it does not see.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return

    def unseen(places: list[str]) -> list[str]:  # sent by value: a node may not have this code
        from pyarrow import fs

        def there(place: str) -> bool:
            here = fs.LocalFileSystem(), place
            system, path = fs.FileSystem.from_uri(place) if "://" in place else here
            return bool(system.get_file_info(path).type != fs.FileType.NotFound)

        return [place for place in places if not there(place)]

    with checkpoints.mark() as mark:
        task = ray.remote(num_cpus=0)(unseen)
        answers = [
            task.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote([mark, *inputs])
            for node in nodes
        ]
        for node, missing in zip(nodes, ray.get(answers), strict=True):
            for place in missing:
                name = node["NodeManagerAddress"]
                if place == mark:
                    raise StageError(
                        f"node {name} does not see cluster.storage, {checkpoints.storage}; allowed "
                        f"on {len(nodes)} nodes: a folder on a disk that all of them mount, such "
                        "as NFS, or a URL such as s3://bucket/folder"
                    )
                raise StageError(
                    f"node {name} does not see {place}; on {len(nodes)} nodes the repository has "
                    "to be on a disk that all of them mount at the same path, such as NFS"
                )
