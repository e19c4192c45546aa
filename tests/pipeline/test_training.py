"""The epochs of a training, run in this process: what is learned, reported, resumed and refused."""

import copy
import io
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from pipeline.data import Files, Split, augment, cut_out, trivial_augment
from pipeline.errors import DivergenceError, StageError
from pipeline.jobs.checkpoints import Checkpoints
from pipeline.jobs.worker import Worker
from pipeline.learning.dropout import SampleDropout
from pipeline.learning.fit import Task, backward, cross_entropy, fit, order
from pipeline.learning.schedules import learning_rate
from pipeline.params import Schedule
from stdb import sample_keys
from tests.pipeline.support import PARAMS


def schedule(**changes) -> Schedule:
    values = {
        "epochs": 4,
        "batch_size": 8,
        "learning_rate": 0.1,
        "weight_decay": 0.0,
        "milestones": [0.5],
        "decay": 10,
        "augment": False,
        "seed": 0,
    }
    return Schedule(**values | changes)


def images(count=20) -> Split:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (count,), generator=generator)
    return Split(pixels, labels, torch.arange(100, 100 + count), ["a", "b", "c"])


def tiny() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8, bias=False), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
    )


class Job(Worker):
    """A worker that keeps what is reported, and is given what is to be resumed."""

    def __init__(self, folder, world=1, checkpoint_steps=None, report_every=0.0) -> None:
        cluster = PARAMS.cluster.model_copy(update={"checkpoint_steps": checkpoint_steps})
        params = PARAMS.model_copy(update={"cluster": cluster})
        checkpoints = Checkpoints(str(folder), "a_stage", "test")
        super().__init__(params, "a_stage", checkpoints, world=world, report_every=report_every)
        self.reports: list[dict] = []
        self.rows: list[list[dict]] = []
        self.start: dict | None = None

    def resume(self):
        return self.start

    def checkpoint(self, state, rows=()) -> None:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        self.reports.append(torch.load(file, weights_only=True))
        self.rows.append(list(rows))


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path)


def half(epoch):
    """A validation that finds nothing."""
    return {"accuracy/validation": 0.0}


def train(
    job, network, params, *, split=None, passes=None, validate=None, clip=None, micro_batch=None
):
    """fit() with Adam, whose state has to survive too."""
    optimizer = torch.optim.Adam(network.parameters(), lr=params.learning_rate)

    def simple(pixels, ids, epoch):
        def present():
            with SampleDropout(params.seed, sample_keys(ids, epoch)):
                return network(pixels)

        yield present

    passes = passes or simple
    validate = validate or (lambda epoch: {"accuracy/validation": epoch / 100})
    task = Task(network, network, passes, optimizer, validate, clip, micro_batch)
    return fit(job, task, split or images(), params)


def weights(network) -> dict:
    return {name: value.clone() for name, value in network.state_dict().items()}


def test_nan_weights_are_a_divergence_at_the_first_step(job):
    """The error names epoch, step and what may help; nothing is reported that could be resumed."""
    network = tiny()
    with torch.no_grad():
        network[1].weight[0, 0] = math.nan
    with pytest.raises(DivergenceError, match=r"loss nan.* in epoch 1, step 1: .*learning_rate"):
        train(job, network, schedule())
    assert job.reports == []


def test_a_divergence_later_names_its_epoch_and_step_and_leaves_the_weights(job):
    """The step that diverges is not taken, and the message says which it was."""
    network, steps, before = tiny(), [], {}

    def passes(pixels, ids, epoch):
        steps.append(epoch)
        broken = epoch == 2 and steps.count(2) == 2
        before.clear()
        before.update(weights(network))
        yield lambda: network(pixels) * (math.inf if broken else 1.0)

    with pytest.raises(DivergenceError, match="in epoch 2, step 2:"):
        train(job, network, schedule(), passes=passes)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_a_gradient_that_is_not_finite_is_a_divergence_although_the_loss_is(job):
    """√0 has a finite value and an infinite gradient; the optimiser must not see it."""
    network = tiny()

    def passes(pixels, ids, epoch):
        yield lambda: network(pixels) + (network[1].weight[0, 0] * 0).abs().sqrt()

    with pytest.raises(DivergenceError, match=r"loss \d.*, gradient norm nan"):
        train(job, network, schedule(), passes=passes)


def test_the_best_epoch_is_kept_as_it_was(job):
    """The first of the best epochs wins, and its weights do not change as training goes on."""
    network, seen = tiny(), {}
    accuracies = {1: 0.5, 2: 0.9, 3: 0.9, 4: 0.7}

    def validate(epoch):
        seen[epoch] = weights(network)
        return {"accuracy/validation": accuracies[epoch]}

    state = train(job, network, schedule(), validate=validate)
    assert (state["best"], state["best_epoch"]) == (0.9, 2)
    assert [row["accuracy/validation"] for row in state["history"]] == list(accuracies.values())
    for name, value in state["best_network"].items():
        assert torch.equal(value, seen[2][name])
    assert not torch.equal(seen[2]["1.weight"], seen[4]["1.weight"])


@pytest.mark.parametrize("every", [-1.0, 1e9])
def test_every_epoch_is_reported_once(tmp_path, every):
    """Whether reports come each epoch or share a wait, no row is lost or doubled."""
    job = Job(tmp_path, report_every=every)
    state = train(job, tiny(), schedule())
    assert len(job.reports) == (4 if every < 0 else 1)
    rows = [row for part in job.rows for row in part]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert rows == state["history"] == job.reports[-1]["history"]


@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupted_training_ends_where_a_whole_one_ends(tmp_path, after):
    """Resumed after any epoch: weights, optimiser, dropout, rates and history are bit for bit."""
    job = Job(tmp_path, report_every=-1.0)
    whole = copy.deepcopy(train(job, tiny(), schedule()))
    job.start = job.reports[after - 1]
    assert job.start["epoch"] == after
    assert_ends_as(whole, job, after, schedule())


@pytest.mark.parametrize("report", range(5))
def test_an_epoch_that_was_interrupted_goes_on_at_its_step(tmp_path, report):
    """Checkpoints after every second step: the same end, and the log of the epoch is whole."""
    params = schedule(batch_size=4)  # five steps an epoch
    whole = copy.deepcopy(train(Job(tmp_path), tiny(), params))
    job = Job(tmp_path, checkpoint_steps=2)
    train(job, tiny(), params)
    within = [state for state in job.reports if "step" in state]
    assert len(within) == 2 * 4
    job.start = within[report * len(within) // 5]
    assert_ends_as(whole, job, job.start["epoch"], params)


def assert_ends_as(whole, job, after, params):
    """A training that goes on from ``job.start`` ends as the whole one did."""
    job.rows.clear()
    network = tiny()
    with torch.no_grad():
        network[1].weight.zero_()  # whatever it was, the checkpoint wins
    resumed = train(job, network, params)
    assert [row["epoch"] for part in job.rows for row in part] == list(range(after + 1, 5))
    assert resumed["history"] == whole["history"]
    for key in ("network", "best_network"):
        for name, value in whole[key].items():
            assert torch.equal(value, resumed[key][name]), (key, name)


def test_the_learning_rate_of_an_epoch_reaches_the_optimiser(job, monkeypatch):
    """Milestones are what SGD steps with, not only what is logged."""
    network = tiny()
    optimizer = torch.optim.SGD(network.parameters(), lr=99.0)
    used = []
    step = optimizer.step
    monkeypatch.setattr(
        optimizer, "step", lambda: (used.append(optimizer.param_groups[0]["lr"]), step())
    )

    def passes(pixels, ids, epoch):
        yield lambda: network(pixels)

    params = schedule(milestones=[0.75, 0.5], batch_size=10)
    state = fit(job, Task(network, network, passes, optimizer, half), images(), params)
    assert used == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)
    assert [row["learning_rate"] for row in state["history"]] == pytest.approx(used[::2])


def test_without_milestones_the_learning_rate_stays():
    """An empty list is allowed and divides nothing."""
    params = schedule(milestones=[])
    assert {learning_rate(params, epoch) for epoch in range(1, 5)} == {0.1}


@pytest.mark.parametrize(("count", "size"), [(20, 8), (16, 8), (7, 8), (9, 1)])
def test_an_epoch_is_full_batches_of_different_images(count, size):
    """Equal batches, no image twice, as many as fit; over the epochs every image is seen."""
    seen = set()
    for epoch in range(1, 21):
        batches = order(count, size, 0, epoch)
        assert {len(batch) for batch in batches} == {min(size, count)}
        assert len(batches) == max(1, count // size)
        positions = torch.cat(batches).tolist()
        assert len(positions) == len(set(positions))
        assert set(positions) <= set(range(count))
        seen |= set(positions)
    assert seen == set(range(count))


def test_neighbouring_seeds_and_epochs_have_orders_of_their_own():
    """(seed, epoch) → order has no collisions such as seed + epoch would have."""
    orders = {tuple(order(50, 50, s, e)[0].tolist()) for s in range(4) for e in range(1, 6)}
    assert len(orders) == 20


def test_training_sees_the_images_of_its_order_with_their_ids(job):
    """Pixels, ids and epoch belong together; each step has the batch that order() says."""
    split, network, seen = images(), tiny(), []

    def passes(pixels, ids, epoch):
        seen.append((pixels, ids, epoch))
        yield lambda: network(pixels)

    train(job, network, schedule(epochs=2), split=split, passes=passes)
    expected = [(batch, e) for e in (1, 2) for batch in order(20, 8, 0, e)]
    assert len(seen) == len(expected) == 4
    for (pixels, ids, epoch), (batch, e) in zip(seen, expected, strict=True):
        assert epoch == e
        assert torch.equal(ids, split.ids[batch])
        assert torch.equal(pixels, split.take(batch).pixels())


def test_a_batch_norm_is_not_trained_on_single_images(job):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3))
    with pytest.raises(StageError, match="of which a batch norm finds no variance; allowed: "):
        train(job, network, schedule(batch_size=1))


def test_augmentation_reaches_the_training(job):
    """With augment the images are those of augment() for this seed and epoch."""
    split, network, seen = images(), tiny(), []

    def passes(pixels, ids, epoch):
        seen.append(pixels)
        yield lambda: network(pixels)

    train(job, network, schedule(epochs=1, augment=True, seed=5), split=split, passes=passes)
    batch = split.take(order(20, 8, 5, 1)[0])
    cropped = replace(batch, images=augment(batch.images, batch.ids, 5, 1))
    assert torch.equal(seen[0], cropped.pixels())
    assert not torch.equal(seen[0], batch.pixels())


@pytest.mark.parametrize("trivial", [False, True])
def test_cutout_reaches_the_training_behind_what_else_is_done_to_images(job, trivial):
    """The images are those of augment(), trivial_augment() and cut_out() for seed and epoch."""
    split, network, seen = images(), tiny(), []

    def passes(pixels, ids, epoch):
        seen.append(pixels)
        yield lambda: network(pixels)

    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    task = Task(network, network, passes, optimizer, half, cutout=3)
    fit(job, task, split, schedule(epochs=1, augment="trivial" if trivial else True, seed=5))
    batch = split.take(order(20, 8, 5, 1)[0])
    cropped = augment(batch.images, batch.ids, 5, 1)
    changed = trivial_augment(cropped, batch.ids, 5, 1) if trivial else cropped
    expected = replace(batch, images=cut_out(changed, batch.ids, 5, 1, 3))
    assert torch.equal(seen[0], expected.pixels())
    assert not torch.equal(expected.images, changed)
    assert torch.equal(changed, cropped) != trivial


def test_smoothed_labels_are_what_is_learned():
    """The loss by hand: a share of the label is spread over all classes."""
    network, split = tiny().eval(), images(6)

    def passes(pixels, ids, epoch):
        yield lambda: network(pixels)

    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    task = Task(
        network,
        network,
        passes,
        optimizer,
        half,
        losses=partial(cross_entropy, label_smoothing=0.3),
    )
    loss, _ = backward(task, split.pixels(), split, 1, 1 / 6)
    found = network[1].weight.grad.clone()
    network.zero_grad()
    target = F.one_hot(split.labels, 3) * 0.7 + 0.3 / 3
    expected = -(target * network(split.pixels()).log_softmax(1)).sum(1).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(found, network[1].weight.grad)


def test_a_rate_of_every_step_reaches_the_optimiser(job, monkeypatch):
    """And the last of an epoch its row."""
    network = tiny()
    optimizer = torch.optim.SGD(network.parameters(), lr=99.0)
    used = []
    step = optimizer.step
    monkeypatch.setattr(
        optimizer, "step", lambda: (used.append(optimizer.param_groups[0]["lr"]), step())
    )

    def passes(pixels, ids, epoch):
        yield lambda: network(pixels)

    params = schedule(schedule="cosine", batch_size=4)
    state = fit(job, Task(network, network, passes, optimizer, half), images(), params)
    expected = [learning_rate(params, e, s, 5) for e in range(1, 5) for s in range(1, 6)]
    assert used == expected
    assert len(set(used)) == 20
    assert [row["learning_rate"] for row in state["history"]] == expected[4::5]


@pytest.mark.parametrize("report", [0, 3, 7])
def test_an_interrupted_cosine_goes_on_at_its_step(tmp_path, report):
    """Within an epoch: the rate is the step's, whatever the optimiser was left with."""
    params = schedule(batch_size=4, schedule="cosine")
    whole = copy.deepcopy(train(Job(tmp_path), tiny(), params))
    job = Job(tmp_path, checkpoint_steps=2)
    train(job, tiny(), params)
    job.start = [state for state in job.reports if "step" in state][report]
    assert_ends_as(whole, job, job.start["epoch"], params)


def test_clip_bounds_the_gradient_and_the_log_has_it_unclipped(job):
    """One step of SGD with rate 1 moves the weights by the clip."""
    norms = {}
    for clip in (None, 1e-3):
        network = tiny()
        before = weights(network)
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0)

        def passes(pixels, ids, epoch, network=network):
            yield lambda: network(pixels)

        params = schedule(epochs=1, batch_size=20, learning_rate=1.0, milestones=[])
        state = fit(job, Task(network, network, passes, optimizer, half, clip), images(), params)
        moved = torch.cat([(v - before[k]).flatten() for k, v in network.state_dict().items()])
        norms[clip] = (moved.norm().item(), state["history"][0]["gradient_norm/all"])
    assert norms[None][0] == pytest.approx(norms[None][1], rel=1e-4)
    assert norms[1e-3][0] == pytest.approx(1e-3, rel=1e-3)
    assert norms[1e-3][1] == pytest.approx(norms[None][1], rel=1e-6)
    layers = [v for k, v in state["history"][0].items() if k.startswith("gradient_norm/1")]
    whole = [v for k, v in state["history"][0].items() if k.startswith("gradient_norm/")]
    assert len(layers) == 1
    assert max(whole[1:]) > 100 * 1e-3  # of the layers, too


@pytest.mark.parametrize(("count", "world"), [(8, 2), (7, 2), (5, 4)])
def test_the_mean_of_the_workers_gradients_is_that_of_the_global_batch(count, world):
    """Also with unequal shares: DDP's average over ranks is the gradient of the mean loss."""
    network, split = tiny().eval(), images(count)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)

    def passes(pixels, ids, epoch):
        yield lambda: network(pixels)

    def gradients(rank, of):
        share = split.take(torch.arange(rank, count, of))
        optimizer.zero_grad()
        task = Task(network, network, passes, optimizer, half)
        backward(task, share.pixels(), share, 1, of / count)
        return torch.cat([p.grad.flatten() for p in network.parameters()])

    mean = torch.stack([gradients(rank, world) for rank in range(world)]).mean(0)
    torch.testing.assert_close(mean, gradients(0, 1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("micro_batch", [1, 5, 8, 100])
def test_gradients_of_micro_batches_add_up_to_that_of_the_batch(job, micro_batch):
    """A training in little memory learns the same, to rounding; loss and accuracy too."""
    torch.manual_seed(0)
    whole = tiny().eval()
    parts = copy.deepcopy(whole)
    one = train(job, whole, schedule())
    other = train(job, parts, schedule(), micro_batch=micro_batch)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    for a, b in zip(one["history"], other["history"], strict=True):
        assert a["loss/train"] == pytest.approx(b["loss/train"], rel=1e-4)
        assert a["accuracy/train"] == b["accuracy/train"]


@pytest.mark.parametrize(("stage", "section"), [("train_ann", "train_ann"), ("trial 3", "stdb")])
def test_fewer_images_in_a_batch_than_workers_is_refused(tmp_path, stage, section):
    """A worker without an image would have no gradient; the message names key and value."""
    job = Job(tmp_path, world=9)
    job.stage = stage
    told = rf"^{section}\.batch_size is 8; allowed: .*the 9 workers"
    with pytest.raises(StageError, match=told):
        train(job, tiny(), schedule())
    assert job.reports == []


def test_train_metrics_are_means_over_the_images_that_were_seen(job):
    """Loss and accuracy of the log, with weights that do not move, are those of the network."""
    network, split = tiny().eval(), images()
    network[3].p = 0.0
    params = schedule(epochs=1, learning_rate=1e-30, milestones=[])
    row = train(job, network, params, split=split)["history"][0]
    seen = torch.cat(order(20, 8, 0, 1))
    logits = network(split.take(seen).pixels())
    labels = split.labels[seen]
    assert row["loss/train"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item())
    assert row["accuracy/train"] == (logits.argmax(1) == labels).double().mean().item()


def test_a_training_from_files_is_one_from_memory(job, tmp_path):
    """The same weights, also when it goes on within an epoch."""
    split = images()
    for k, pixels in enumerate(split.images):
        Image.fromarray(pixels[0].numpy()).save(tmp_path / f"{k}.png")
    names = np.array([str(tmp_path / f"{k}.png") for k in range(len(split))])
    files = Files(names, split.labels, split.ids, split.classes, (1, 8, 8), readers=2)
    torch.manual_seed(7)
    memory = tiny().eval()
    streamed = copy.deepcopy(memory)
    one = train(job, memory, schedule(batch_size=4, augment=True), split=split)
    other = train(job, streamed, schedule(batch_size=4, augment=True), split=files)
    for name, value in memory.state_dict().items():
        assert torch.equal(value, streamed.state_dict()[name]), name
    assert [row["loss/train"] for row in one["history"]] == [
        row["loss/train"] for row in other["history"]
    ]


def test_dropout_of_an_ann_is_a_function_of_the_sample():
    """The same activations are dropped in any batch; another epoch or seed drops others."""
    pixels, ids = torch.ones(6, 3, 4, 4), torch.arange(6)

    def drop(pixels, ids, epoch=1, seed=0, training=True):
        network = nn.Sequential(nn.Dropout(0.3), nn.Dropout(0.3)).train(training)
        with SampleDropout(seed, sample_keys(ids, epoch)):
            return network[0](pixels), network[1](pixels)

    first, second = drop(pixels, ids)
    assert torch.equal(drop(pixels[2:4], ids[2:4])[0], first[2:4])
    assert not torch.equal(first, second)
    assert not torch.equal(first, drop(pixels, ids, epoch=2)[0])
    assert not torch.equal(first, drop(pixels, ids, seed=1)[0])
    assert not torch.equal(first[0], first[1])
    assert first.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    assert torch.equal(drop(pixels, ids, training=False)[0], pixels)
    many = drop(torch.ones(200, 3, 16, 16), torch.arange(200))[0]
    assert (many > 0).double().mean().item() == pytest.approx(0.7, abs=0.005)


class Functional(nn.Module):
    """Dropouts that are called as functions; or, for comparison, layers of the same rates."""

    def __init__(self, layers):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Conv2d(1, 6, 3), nn.Linear(216, 3)
        self.channels, self.single, self.layers = nn.Dropout2d(0.4), nn.Dropout(0.3), layers

    def forward(self, x):
        x = F.relu(self.first(x))
        if self.layers:
            return self.second(self.single(self.single(self.channels(x)).flatten(1)))
        x = F.dropout(F.dropout2d(x, 0.4, self.training), 0.3, training=self.training)
        return self.second(F.dropout(x.flatten(1), p=0.3, training=self.training, inplace=True))


def test_dropouts_that_are_called_as_functions_are_those_of_layers(job):
    """Bit for bit, numbered by order, and whatever torch's generator drew before."""
    torch.manual_seed(3)
    layers = train(job, Functional(True), schedule())
    torch.manual_seed(4)
    functions = train(job, Functional(False), schedule())
    assert layers["history"] == functions["history"]
    for name, value in layers["network"].items():
        assert torch.equal(value, functions["network"][name]), name


def test_functional_dropouts_of_a_resumed_run_and_of_half_batches_are_the_same(tmp_path):
    """A mask is its sample's: resumed bit for bit; in parts to rounding."""
    whole = Job(tmp_path)
    train(whole, Functional(False), schedule())
    for k in range(len(whole.reports) - 1):
        resumed = Job(tmp_path)
        resumed.start = whole.reports[k]
        torch.manual_seed(9)
        train(resumed, Functional(False), schedule())
        for name, value in whole.reports[-1]["network"].items():
            assert torch.equal(resumed.reports[-1]["network"][name], value), name
    parts = Job(tmp_path)
    train(parts, Functional(False), schedule(), micro_batch=2)
    for row, other in zip(whole.reports[-1]["history"], parts.reports[-1]["history"], strict=True):
        assert other["loss/train"] == pytest.approx(row["loss/train"], rel=1e-4)


def test_a_whole_channel_is_dropped():
    """With the probability that is given; in evaluation none."""
    ones, keys = torch.ones(50, 8, 5, 5), sample_keys(torch.arange(50), 1)
    with SampleDropout(0, keys) as dropout:
        dropped = F.dropout2d(ones, 0.25)
        assert F.dropout(ones, 0.5, training=False) is ones
    assert dropout.calls == 2
    assert dropped.amax((2, 3)).equal(dropped.amin((2, 3)))
    assert (dropped > 0).double().mean().item() == pytest.approx(0.75, abs=0.05)
