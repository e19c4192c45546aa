"""Several nodes: what they have to see, and a node that dies in the middle of a training."""

import os
import signal
import time
from contextlib import contextmanager

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.environment import RAY
from pipeline.errors import StageError
from pipeline.jobs.checkpoints import Checkpoints
from pipeline.jobs.cluster import check_nodes
from tests.pipeline.support import (
    FINETUNE,
    Started,
    checkpoints,
    copy_of,
    results,
    wait_for_progress,
)

pytestmark = pytest.mark.slow

# A dead node is noticed after seconds, not minutes.
SOON = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_failure_threshold": "2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_AUTH_MODE": "disabled",
}


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes of one core each, on this machine."""
    for key, value in {**RAY, **SOON}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.second = made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made
    made.shutdown()


@pytest.fixture
def joined(cluster):
    """This process, connected to them."""
    ray.init(cluster.address, logging_level="ERROR")
    yield
    ray.shutdown()


def test_a_folder_that_all_nodes_see_is_a_storage(joined, tmp_path):
    """The check leaves nothing behind."""
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    check_nodes([str(inputs)], Checkpoints(str(tmp_path / "storage"), "work", "0"))
    check_nodes([str(inputs)], Checkpoints((tmp_path / "storage").as_uri(), "work", "0"))
    assert list((tmp_path / "storage").iterdir()) == []


def test_what_a_node_does_not_see_is_refused(joined, tmp_path, monkeypatch):
    """With the node, the place and what is allowed."""
    storage = Checkpoints(str(tmp_path), "work", "0")
    with pytest.raises(StageError, match=r"node [\d.]+ does not see /nowhere; on 2 nodes the repo"):
        check_nodes(["/nowhere"], storage)
    create = Checkpoints.mark.__wrapped__

    def elsewhere(self):  # as if the file were on this node's own disk
        for mark in create(self):
            yield mark + "-elsewhere"

    monkeypatch.setattr(Checkpoints, "mark", contextmanager(elsewhere))
    with pytest.raises(StageError, match=r"does not see cluster\.storage, .*allowed on 2 nodes: a"):
        check_nodes([], storage)


def start(repository, cluster, log) -> Started:
    started = Started(repository, log, FINETUNE, RAY_ADDRESS=cluster.address, **SOON)
    wait_for_progress(repository, [], started)
    return started


def wait_for(started: Started, text: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while text not in started.says():
        assert started.process.poll() is None, started.says()
        assert time.monotonic() < deadline, started.says()
        time.sleep(0.1)


def test_a_lost_node_is_replaced(cluster, long, undisturbed, tmp_path):
    """The job waits for another one and ends with the same bytes as an undisturbed run."""
    repository = copy_of(long, tmp_path / "repository")
    repository.set(cluster={"workers": 2})
    expected = undisturbed(2)
    started = start(repository, cluster, tmp_path / "log")
    cluster.remove_node(cluster.second, allow_graceful=False)
    wait_for(started, "a worker was lost", 180)
    cluster.add_node(num_cpus=1)
    assert started.process.wait(600) == 0, started.says()
    assert results(repository) == expected
    assert checkpoints(repository) == []


def test_an_elastic_job_goes_on_with_fewer_workers_and_grows_again(cluster, long, tmp_path):
    """From two to one when a node dies, and to two when there is another."""
    repository = copy_of(long, tmp_path / "repository")
    repository.set(stdb={"epochs": 3000}, cluster={"workers": [1, 2]})
    started = start(repository, cluster, tmp_path / "log")
    cluster.remove_node(cluster.second, allow_graceful=False)
    wait_for(started, ", 1 worker(s)", 300)
    there = checkpoints(repository)
    wait_for_progress(repository, there, started)
    cluster.add_node(num_cpus=1)
    wait_for(started, ", 2 worker(s)", 300)
    there = checkpoints(repository)
    wait_for_progress(repository, there, started)
    os.killpg(started.process.pid, signal.SIGINT)
    started.wait_until_gone(20)
