"""How many workers a job gets, which failures are a lost worker's, and one Ray for all stages."""

import pytest
import torch

import pipeline.repro
from pipeline.data import Split
from pipeline.errors import DivergenceError, StageError
from pipeline.jobs.checkpoints import Checkpoints
from pipeline.jobs.failures import reason, worker_error, worker_lost
from pipeline.jobs.plan import plan_workers
from pipeline.jobs.worker import Worker
from pipeline.learning.networks import build_ann, use_threads
from pipeline.params import ClusterParams, load_params
from tests.pipeline.support import ROOT

CLUSTER = load_params(ROOT / "params.yaml").cluster


def plan(cpus, gpus, elastic=False, **changes):
    cluster = ClusterParams(**(CLUSTER.model_dump() | changes))
    *workers, sharing = plan_workers(cluster, cpus, gpus, elastic=elastic)
    assert sharing == 1  # a stage's job has the memory to itself
    return tuple(workers)


@pytest.mark.parametrize(
    ("there", "asked", "expected"),
    [
        ((2, 0), {}, (1, 1, False, 2)),
        ((16, 8), {}, (8, 8, True, 2)),
        ((4, 8), {}, (4, 4, True, 1)),
        ((16, 8), {"use_gpu": False}, (1, 1, False, 16)),
        ((16, 8), {"use_gpu": True, "workers": 2}, (2, 2, True, 8)),
        ((7, 0), {"workers": 3}, (3, 3, False, 2)),
        ((7, 0), {"workers": 3, "cpus_per_worker": 1}, (3, 3, False, 1)),
        ((2, 0), {"workers": [1, 4]}, (2, 2, False, 1)),
        ((8, 0), {"workers": [1, 4]}, (4, 4, False, 2)),
        ((8, 0), {"workers": [1, 4], "cpus_per_worker": 3}, (2, 2, False, 3)),
        ((8, 2), {"workers": [1, 4]}, (2, 2, True, 4)),
        ((8, 2), {"workers": [1, 4], "use_gpu": False}, (4, 4, False, 2)),
    ],
)
def test_workers_are_those_that_are_asked_for_and_there(there, asked, expected):
    """(workers, least, GPU, cores of each); a range on one machine is as many as fit."""
    assert plan(*there, **asked) == expected


def test_a_range_stays_one_on_a_cluster():
    """It may have one node now and more later."""
    assert plan(2, 0, elastic=True, workers=[1, 4]) == (4, 1, False, 1)
    assert plan(16, 1, elastic=True, workers=[1, 4]) == (4, 1, True, 4)
    assert plan(2, 0, elastic=True, workers=2) == (2, 2, False, 1)


@pytest.mark.parametrize(
    ("there", "asked", "message"),
    [
        ((2, 0), {"use_gpu": True}, "use_gpu is true and there is no GPU; allowed here: auto, fa"),
        ((2, 0), {"workers": 3}, r"workers is 3, with 1 core\(s\) each; there are 2 cores"),
        ((2, 0), {"workers": 2, "cpus_per_worker": 2}, "there are 2 cores"),
        ((16, 2), {"workers": 3}, "workers is 3; there are 2 GPUs, one for each worker"),
        ((2, 0), {"workers": [3, 4]}, r"workers is \[3, 4\], with 1 core"),
        ((16, 2), {"workers": [3, 4]}, r"workers is \[3, 4\]; there are 2 GPUs"),
    ],
)
@pytest.mark.parametrize("elastic", [False, True])
def test_more_than_there_is_is_refused(there, asked, message, elastic):
    """With what is asked for and what there is."""
    with pytest.raises(StageError, match=message):
        plan(*there, elastic=elastic, **asked)


class Failed(Exception):  # noqa: N818
    """As Ray Train's error of a job."""

    def __init__(self, *failures) -> None:
        super().__init__("failed")
        self.worker_failures = dict(enumerate(failures))


def died():
    from ray.exceptions import ActorDiedError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    return WorkerHealthCheckFailedError("a check failed", ActorDiedError())


CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")


@pytest.mark.parametrize(
    ("failures", "lost"),
    [
        ([died()], True),
        ([CLOSED], True),
        ([CLOSED, died()], True),
        ([torch.distributed.DistBackendError("a socket broke")], True),
        ([ValueError("the training diverged")], False),
        ([CLOSED, ValueError("the training diverged")], False),
        ([RuntimeError("mat1 and mat2 shapes cannot be multiplied")], False),
        ([torch.OutOfMemoryError("CUDA out of memory")], False),
        ([KeyError("a bug")], False),
        ([], False),
    ],
    ids=repr,
)
def test_a_job_starts_again_where_a_worker_was_lost_and_not_where_it_failed(failures, lost):
    """An error of its own would come again."""
    assert worker_lost(Failed(*failures)) is lost


def test_the_message_is_the_workers_own():
    """Out of what wraps it; of other errors than ours with the type."""
    assert reason(Failed(ValueError("the training diverged"))) == "the training diverged"
    assert reason(Failed(KeyError("a bug"))) == "KeyError: 'a bug'"


def test_a_fault_of_ours_in_a_worker_stays_one():
    """What a person can mend is a message; any other error reaches the stage's boundary."""
    mistake = worker_error(Failed(DivergenceError("the training diverged")))
    assert isinstance(mistake, StageError)
    assert str(mistake) == "the training diverged"
    bug = KeyError("a bug")
    assert worker_error(Failed(bug)) is bug


def test_of_several_failures_the_one_that_is_no_loss_is_the_cause():
    """A worker that fails takes the connections of the others with it."""
    assert reason(Failed(CLOSED, died(), ValueError("it diverged"))) == "it diverged"
    assert "Connection closed" in reason(Failed(CLOSED, CLOSED))


@pytest.mark.parametrize(
    ("address", "workers", "several"),
    [(None, "auto", False), (None, "2", True), ("127.0.0.1:1", "2", False), (None, "99", False)],
)
def test_make_repro_owns_a_ray_where_jobs_would_start_one_each(
    tmp_path, monkeypatch, address, workers, several
):
    """Not where a cluster is joined; impossible parameters are for the stage to refuse."""
    text = (ROOT / "params.yaml").read_text().replace("workers: auto", f"workers: {workers}", 1)
    (tmp_path / "params.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline.repro, "machine", lambda: (2, 0))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert pipeline.repro.several_workers() is several


@pytest.fixture
def threads():
    """Four, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("architecture", "width", "size", "batch", "world", "expected"),
    [
        ("resnet12", 0.25, 8, 64, 1, 1),  # the digits' default
        ("vgg5", 1.0, 32, 64, 1, 4),
        ("resnet8", 0.25, 32, 80, 1, 2),
        ("resnet8", 0.25, 32, 80, 2, 1),
        ("vgg5", 1.0, 32, 1, 1, 1),
    ],
)
def test_threads_follow_the_work(tmp_path, architecture, width, size, batch, world, expected):
    """A small network has one, a large one all of the worker's cores; whatever the load is."""
    params = load_params(ROOT / "params.yaml")
    network = params.network.model_copy(update={"architecture": architecture, "width": width})
    images = torch.zeros(1, 1, size, size, dtype=torch.uint8)
    data = Split(images, torch.zeros(1, dtype=torch.int64), torch.arange(1), list("abcdefghij"))
    ann = build_ann(network, data).train()
    worker = Worker(params, "work", Checkpoints(str(tmp_path), "work", "key"), world=world)
    use_threads(worker, ann, data, batch)
    assert torch.get_num_threads() == expected
    assert ann.training
