"""Batch norms in training: statistics of fixed groups of images, whatever the number of workers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline import train_ann
from pipeline.errors import StageError
from pipeline.jobs.checkpoints import Checkpoints
from pipeline.jobs.worker import Worker
from pipeline.learning.checks import check_norms
from pipeline.learning.fit import order
from pipeline.learning.networks import build_ann
from pipeline.learning.norms import GroupStatistics, group_sizes, has_norms
from tests.pipeline.support import NORMED, PARAMS, KeptWorker, make_files

MOMENTA = (0.1, 0.3, None)  # None: the mean of all batches


def normed() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=MOMENTA[0]), nn.ReLU(), nn.Flatten(),
        nn.BatchNorm1d(144, momentum=MOMENTA[1]), nn.Linear(144, 5),
        nn.BatchNorm1d(5, momentum=MOMENTA[2]),
    )  # fmt: skip


def alone(tmp_path, rank=0, world=1) -> Worker:
    checkpoints = Checkpoints(str(tmp_path), "a_stage", "test")
    return Worker(PARAMS, "a_stage", checkpoints, rank=rank, world=world)


def batches(count=3, size=13):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 1, 8, 8, generator=generator) for _ in range(count)]


def step(network, statistics, images) -> None:
    """A step of SGD over a worker's groups."""
    for group in images.split(statistics.mine):
        network(group).square().sum().backward()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter -= 1e-3 * parameter.grad
            parameter.grad = None


@pytest.mark.parametrize(
    ("count", "images", "sizes"),
    [(64, 32, [32, 32]), (65, 32, [22, 22, 21]), (33, 32, [17, 16]), (12, 32, [12]),
     (993, 32, [32] + [31] * 31), (5, 2, [3, 2]), (4, 2, [2, 2]), (3, 2, [3]), (1, 2, [1])],
)  # fmt: skip
def test_groups_are_as_equal_as_can_be(count, images, sizes):
    """No group is a remainder of a few images, whose statistics would say nothing."""
    assert group_sizes(count, images) == sizes


def test_running_statistics_are_torchs_own_group_after_group(tmp_path):
    """As if one process presented the groups one by one; momenta and counts as torch has them."""
    network = normed().train()
    expected = copy.deepcopy(network)
    statistics = GroupStatistics(network, alone(tmp_path), [5, 4, 4])
    plain = GroupStatistics(nn.Identity(), alone(tmp_path), [5, 4, 4])  # changes nothing
    for images in batches():
        step(network, statistics, statistics.share(images))
        statistics.apply()
        step(expected, plain, images)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert int(network[1].num_batches_tracked) == 9
    assert [network[k].momentum for k in (1, 4, 6)] == list(MOMENTA)


def test_evaluation_and_frozen_norms_change_no_statistics(tmp_path):
    """Neither a pass in evaluation mode, nor a norm that a person has set to it."""
    network = normed().train()
    network[4].eval()
    statistics = GroupStatistics(network, alone(tmp_path), [13])
    frozen = network[4].running_mean.clone()
    network(batches()[0])
    statistics.apply()
    assert torch.equal(network[4].running_mean, frozen)
    assert network[1].running_mean.abs().sum() > 0
    before = copy.deepcopy(network.state_dict())
    network.eval()(batches()[0])
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_a_network_whose_own_train_freezes_all_norms_is_trained(tmp_path):
    """The usual way of fine-tuning: none of them finds anything, and they stay as they are."""
    network = normed().train()
    for k in (1, 4, 6):
        network[k].eval()
    before = {name: value.clone() for name, value in network.named_buffers()}
    statistics = GroupStatistics(network, alone(tmp_path), [7, 6])
    for images in batches():
        step(network, statistics, statistics.share(images))
        statistics.apply()
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())
    assert statistics.found == []


def test_a_network_is_left_as_it_was(tmp_path):
    """After the training a norm does what torch's does."""
    network = normed().train()
    expected = copy.deepcopy(network)
    GroupStatistics(network, alone(tmp_path), [13]).remove()
    for images in batches():
        assert torch.equal(network(images), expected(images))
    for name, value in expected.state_dict().items():
        assert torch.equal(network.state_dict()[name], value)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_number_of_workers_ends_with_the_same_statistics(tmp_path, world):
    """Bit for bit; one that has no group presents the first, which counts nothing."""
    sizes, images = [5, 4, 4], batches(1)[0]
    single = normed().train()
    statistics = GroupStatistics(single, alone(tmp_path), sizes)
    step(single, statistics, statistics.share(images))
    statistics.apply()
    sent: list[torch.Tensor] = []

    def presented(rank, reduce):
        one = alone(tmp_path, rank, world)
        one.all_reduce = reduce
        network = normed().train()
        statistics = GroupStatistics(network, one, sizes)
        assert statistics.idle is (rank >= 3)
        share = statistics.share(images)
        first = list(images.split(sizes))[rank % 3]
        assert torch.equal(share[: len(first)], first)
        step(network, statistics, share)
        statistics.apply()
        return network

    for rank in range(world):
        presented(rank, lambda value: sent.append(value.clone()))
    for rank in range(world):
        network = presented(rank, lambda value: value.copy_(torch.stack(sent).sum(0)))
        for name, value in single.named_buffers():
            assert torch.equal(network.get_buffer(name), value), name


def test_a_sync_batch_norm_is_refused_by_name():
    """It needs GPUs, and shares in its own way."""
    network = nn.SyncBatchNorm.convert_sync_batchnorm(normed())
    with pytest.raises(StageError, match=r"layer 1 is a SyncBatchNorm; allowed: nn.BatchNorm2d"):
        check_norms(network)
    check_norms(normed())


def test_what_has_statistics_of_its_own_is_what_is_grouped():
    """Others are presented as before."""
    assert has_norms(normed())
    assert not has_norms(
        nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    )


# -- the loop of train_ann -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


def loop(worker: KeptWorker) -> dict:
    train_ann.train_loop(worker)
    return worker.states[-1]


def worker_of(files, **changes) -> KeptWorker:
    ann = PARAMS.train_ann.model_copy(
        update={"epochs": 3, "batch_size": 12, "norm_images": 4, **changes}
    )
    cluster = PARAMS.cluster.model_copy(update={"checkpoint_steps": 2})
    sections = {"network": NORMED, "train_ann": ann, "cluster": cluster}
    return KeptWorker(PARAMS.model_copy(update=sections), files[0])


@pytest.fixture(scope="module")
def whole(files) -> KeptWorker:
    """A training that nothing interrupted."""
    worker = worker_of(files)
    loop(worker)
    return worker


@pytest.mark.parametrize("place", range(4))
def test_an_interrupted_training_ends_with_the_same_statistics(files, whole, place):
    """Resumed within an epoch or after one: running statistics, too, are bit for bit."""
    end = whole.states[-1]
    again = worker_of(files)
    again.states = whole.states[place : place + 1]
    resumed = loop(again)
    names = [name for name in end["network"] if "running" in name or "tracked" in name]
    assert len(names) == 3 * 3
    for name, value in end["network"].items():
        assert torch.equal(value, resumed["network"][name]), name
    assert resumed["history"] == end["history"]
    steps = int(end["network"]["conv1_norm.num_batches_tracked"])
    assert steps == 3 * (len(files[1]["train"]) // 12) * end["best_epoch"]


def test_the_number_of_images_has_an_effect(files, whole):
    """A parameter that is tracked and then not used would be a lie."""
    other = loop(worker_of(files, norm_images=12))
    name = "conv1_norm.running_mean"
    assert not torch.equal(other["network"][name], whole.states[-1]["network"][name])


def test_the_loss_is_that_of_groups(files):
    """The first step's, written out: every group by its own mean and variance."""
    still = NORMED.model_copy(update={"dropout": 0.0, "classifier_dropout": 0.0})
    size = len(files[1]["train"])
    worker = worker_of(files, epochs=1, batch_size=size, norm_images=20, seed=2)
    worker.params = worker.params.model_copy(update={"network": still})
    found = loop(worker)["history"][0]["loss/train"]
    torch.manual_seed(2)
    ann, train = build_ann(still, files[1]["train"]).train(), files[1]["train"]
    batch = train.take(order(size, size, 2, 1)[0])
    groups = group_sizes(size, 20)
    assert groups == [16, 16, 16]
    losses = [
        F.cross_entropy(ann(x), y, reduction="sum")
        for x, y in zip(batch.pixels().split(groups), batch.labels.split(groups), strict=True)
    ]
    assert found == pytest.approx(float(sum(losses)) / size, rel=1e-5)
