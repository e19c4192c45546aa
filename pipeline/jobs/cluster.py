"""Ray: joined or started, and what its nodes see."""

import logging
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.environment import RAY, set_default_environment
from pipeline.errors import StageError
from pipeline.jobs.checkpoints import Checkpoints
from pipeline.jobs.ray_private import in_folder


@contextmanager
def ray_cluster(
    address: str | None, *, dashboard: bool = False, logs: bool = True
) -> Iterator[tuple[int, int]]:
    """Ray, joined or started; gives its CPUs and GPUs. What was started leaves nothing behind."""
    import ray

    set_default_environment(RAY)
    with tempfile.TemporaryDirectory(
        prefix="ray-", dir=_short_folder(), ignore_cleanup_errors=True
    ) as folder:
        handler = signal.getsignal(signal.SIGTERM)  # Ray's own would end the process
        ray.init(
            address=address or "local",
            include_dashboard=None if address else dashboard,
            logging_level=logging.ERROR,
            log_to_driver=logs,
            **in_folder(None if address else folder),
        )
        signal.signal(signal.SIGTERM, handler)
        try:
            available = ray.cluster_resources()
            yield int(available.get("CPU", 0)), int(available.get("GPU", 0))
        finally:
            ray.shutdown()


def _short_folder() -> str:
    """Where Ray's sockets can be: the system allows them a path of 107 characters."""
    folder = tempfile.gettempdir()
    return folder if len(folder) < 24 else "/tmp"


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
