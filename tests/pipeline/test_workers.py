"""One, two or three workers: the same thresholds, spikes, masks and counts, the same gradients."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import stdb
from pipeline import balance_thresholds, evaluate_converted, finetune_stdb, train_ann
from pipeline.data import Split
from pipeline.learning.fit import Task, backward
from pipeline.params import DistilParams
from tests.pipeline.support import (
    NETWORK,
    NORMED,
    PARAMS,
    STDB,
    KeptWorker,
    make_files,
    starting,
)

pytestmark = pytest.mark.slow

WORLDS = [1, 2, 3]
SEEDS = [0, 1, 2]
TRAINING = STDB.model_copy(update={"epochs": 3, "batch_size": 12, "dropout": 0.2})
BALANCING = PARAMS.balance_thresholds.model_copy(
    update={"timesteps": 10, "images": 40, "batch_size": 8}
)
ANN = PARAMS.train_ann.model_copy(update={"epochs": 3, "batch_size": 12})


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What jobs of one, two and three workers report: processes with gloo, as Ray starts them."""
    folder = tmp_path_factory.mktemp("workers")
    files = make_files(folder)
    for world in WORLDS:
        torch.multiprocessing.spawn(work, (world, files, folder), world)
    return {"train": files[1]["train"]} | {
        world: [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]
        for world in WORLDS
    }


def work(rank: int, world: int, files, folder) -> None:
    """All jobs, as one of ``world`` workers."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    results = {}

    def job(name: str, loop, **sections) -> None:
        params = PARAMS.model_copy(update={"network": NETWORK, "stdb": STDB, **sections})
        worker = GlooWorker(params, files[0], rank=rank, world=world)
        loop(worker)
        results[name] = worker.states[-1]

    for percentile in (100.0, 99.0):
        chosen = BALANCING.model_copy(update={"percentile": percentile})
        loop = balance_thresholds.balance_loop
        job(f"balance {percentile}", loop, balance_thresholds=chosen)
    evaluation = PARAMS.evaluate_converted.model_copy(
        update={"timesteps": 12, "scales": [0.3, 0.6], "batch_size": 64}
    )
    job("evaluate", evaluate_converted.evaluate_loop, evaluate_converted=evaluation)
    for seed in SEEDS if world == 1 else SEEDS[:1]:
        params = TRAINING.model_copy(update={"seed": seed})
        with recording() as drawn:
            job(f"finetune {seed}", finetune_stdb.train_loop, stdb=params)
        results[f"drawn {seed}"] = drawn
        ann = ANN.model_copy(update={"seed": seed})
        job(f"ann {seed}", train_ann.train_loop, train_ann=ann)
    teaching = {"distil": DistilParams(weight=0.7, temperature=2), "logit_scale": "auto"}
    job("distil", finetune_stdb.train_loop, stdb=TRAINING.model_copy(update=teaching))
    normed = ANN.model_copy(update={"norm_images": 4})
    job("norms", train_ann.train_loop, network=NORMED, train_ann=normed)
    still = normed.model_copy(update={"learning_rate": 1e-30})  # weights stay, to the last bit
    job("still norms", train_ann.train_loop, network=NORMED, train_ann=still)
    few = NORMED.model_copy(update={"activation": "qcfs", "levels": 4})
    recipe = {"schedule": "onecycle", "nesterov": True, "cutout": 3, "label_smoothing": 0.1}
    modern = normed.model_copy(update=recipe)
    job("few steps", train_ann.train_loop, network=few, train_ann=modern)
    still = still.model_copy(update=recipe)
    job("still few steps", train_ann.train_loop, network=few, train_ann=still)
    results["gradients"] = gradients(rank, world, files)
    torch.save(results, folder / f"{world}-{rank}.pt")
    dist.destroy_process_group()


def parallel(world: int, network):
    """DDP, as Ray Train's prepare_model makes it, where there are several workers."""
    return network if world == 1 else torch.nn.parallel.DistributedDataParallel(network)


class GlooWorker(KeptWorker):
    """A worker in a process that Ray did not start."""

    def data_parallel(self, network):
        return parallel(self.world, network)

    def resume(self):
        return None


class recording:  # noqa: N801
    """Keeps input spikes and dropout masks of a training, by the random stream of the sample."""

    def __enter__(self) -> dict:
        self.drawn: dict = {}
        self.encode, self.mask = stdb.PoissonEncoder.__call__, stdb.Presentation._draw_mask
        drawn, encode, mask = self.drawn, self.encode, self.mask

        def encoding(encoder, images, start, stop, keys):
            spikes = encode(encoder, images, start, stop, keys)
            for b, key in enumerate(keys.tolist()):
                for t in range(start, stop):
                    drawn[key, "input", t] = spikes[t - start, b].to(torch.int8)
            return spikes

        def masking(presentation, i, number, shape):
            masks = mask(presentation, i, number, shape)
            if masks is not None:
                for b, key in enumerate(presentation.keys.tolist()):
                    drawn[key, "mask", i] = masks[b] > 0
            return masks

        stdb.PoissonEncoder.__call__ = encoding
        stdb.Presentation._draw_mask = masking
        return drawn

    def __exit__(self, *_) -> None:
        stdb.PoissonEncoder.__call__, stdb.Presentation._draw_mask = self.encode, self.mask


def gradients(rank: int, world: int, files) -> dict:
    """Of the first step, where all products are exact: so all workers see the same spikes."""
    params = STDB.model_copy(update={"timesteps": 5, "dropout": 0.0})
    snn = starting(files, params)
    with torch.no_grad():
        for parameter in snn.net.parameters():
            parameter.copy_((parameter * 16).round() / 16)
    snn.set_thresholds({name: round(v * 8) / 8 for name, v in snn.thresholds.items()})
    train = files[1]["train"]
    pixels = (train.images > 100).to(torch.uint8) * 255  # ±1, so they fire at every step
    split = Split(pixels, train.labels, train.ids, train.classes)
    model = parallel(world, snn)

    def passes(images, ids, epoch):
        yield lambda: model(snn.present(images, sample_ids=ids, epoch=epoch), params.timesteps)

    snn.train()
    share = split.take(torch.arange(rank, 45, world))
    optimizer = torch.optim.SGD(snn.net.parameters(), lr=1.0)
    task = Task(snn.net, model, passes, optimizer, lambda epoch: {})
    backward(task, share.pixels(), share, 1, world / 45)
    return {name: p.grad for name, p in snn.net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("percentile", [100.0, 99.0])
def test_thresholds_are_those_of_one_worker(found, world, percentile):
    """To the last digit: workers take whole batches. Three workers have five of them."""
    one = found[1][0][f"balance {percentile}"]["thresholds"]
    assert len(one) == 5
    for report in found[world]:
        assert report[f"balance {percentile}"]["thresholds"] == pytest.approx(one, rel=1e-6)
        assert report[f"balance {percentile}"]["thresholds"] == one


@pytest.mark.parametrize("world", WORLDS[1:])
def test_accuracies_and_spike_counts_are_those_of_one_worker(found, world):
    """After every step, of every layer, at every threshold scale; no image counts twice."""
    one, several = found[1][0]["evaluate"], found[world][0]["evaluate"]
    assert several["scale"] == one["scale"]
    assert several["curves"] == one["curves"]
    for part in ("long", "reduced"):
        assert several[part]["accuracy"] == one[part]["accuracy"]
        assert several[part]["spikes"] == one[part]["spikes"]
        assert several[part]["energy"] == pytest.approx(one[part]["energy"], rel=1e-12)


@pytest.mark.parametrize("world", WORLDS[1:])
def test_input_spikes_and_dropout_masks_are_those_of_one_worker(found, world):
    """Of every image, step and layer of three epochs of training, bit for bit."""
    one, several = found[1][0]["drawn 0"], {}
    for report in found[world]:
        several |= report["drawn 0"]
    assert set(several) == set(one)
    assert any(kind == "mask" for _, kind, _ in one)
    assert [key for key, drawn in one.items() if not torch.equal(drawn, several[key])] == []


@pytest.mark.parametrize("world", WORLDS[1:])
def test_gradients_of_the_first_step_are_those_of_one_worker(found, world):
    """In an exactly representable case, to the rounding of the sum over images."""
    one = found[1][0]["gradients"]
    for report in found[world]:
        for name, gradient in report["gradients"].items():
            assert one[name].norm() > 0, name
            error = (gradient - one[name]).abs().max() / one[name].abs().max()
            assert error < 1e-5, name


def statistics(report) -> dict:
    """The running statistics that a training ended with."""
    return {n: v for n, v in report["network"].items() if "running" in n or "tracked" in n}


@pytest.mark.parametrize("world", WORLDS[1:])
def test_running_statistics_are_those_of_one_worker(found, world):
    """Bit for bit where the weights are: twelve images a step, in three groups that go whole."""
    one = statistics(found[1][0]["still norms"])
    assert len(one) == 3 * 3
    groups = 3 * (len(found["train"]) // 12) * found[1][0]["still norms"]["best_epoch"]
    assert int(one["conv1_norm.num_batches_tracked"]) == groups
    for report in found[world]:
        for name, value in statistics(report["still norms"]).items():
            assert torch.equal(value, one[name]), name


@pytest.mark.parametrize("world", WORLDS[1:])
def test_networks_with_norms_learn_as_with_one_worker(found, world):
    """Losses and statistics to the rounding of sums; all workers end with the same, bit for bit."""
    one, several = found[1][0]["norms"], [report["norms"] for report in found[world]]
    losses = [row["loss/train"] for row in one["history"]]
    for report in several:
        for name, value in several[0]["network"].items():
            assert torch.equal(report["network"][name], value), name
    assert [row["loss/train"] for row in several[0]["history"]] == pytest.approx(losses, rel=1e-3)
    assert one["network"]["conv1_norm.weight"].std() > 0
    for name, value in statistics(one).items():
        torch.testing.assert_close(several[0]["network"][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("world", WORLDS[1:])
def test_networks_for_few_steps_start_and_learn_as_with_one_worker(found, world):
    """Bounds start bit for bit the same; a level is a step, so losses differ by a few of them."""
    one, several = found[1][0]["few steps"], [report["few steps"] for report in found[world]]
    bounds = [name for name in one["network"] if name.endswith(".bound")]
    assert len(bounds) == 5
    for name in bounds:
        start = found[1][0]["still few steps"]["network"][name]
        assert float(start) != float(one["network"][name])
        for report in found[world]:
            assert torch.equal(report["still few steps"]["network"][name], start), name
    for report in several:
        for name, value in several[0]["network"].items():
            assert torch.equal(report["network"][name], value), name
    losses = [row["loss/train"] for row in one["history"]]
    assert [row["loss/train"] for row in several[0]["history"]] == pytest.approx(losses, rel=2e-2)


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("job", ["finetune", "ann"])
def test_losses_differ_less_than_seeds(found, world, job):
    """The same global batches: what is left is rounding."""
    seeds = [[row["loss/train"] for row in found[1][0][f"{job} {s}"]["history"]] for s in SEEDS]
    several = [row["loss/train"] for row in found[world][0][f"{job} 0"]["history"]]
    for epoch, loss in enumerate(several):
        values = [losses[epoch] for losses in seeds]
        spread = max(values) - min(values)
        assert abs(loss - values[0]) < 0.5 * spread, epoch
    assert several[0] == pytest.approx(seeds[0][0], rel=1e-3)


@pytest.mark.parametrize("world", WORLDS[1:])
def test_a_teacher_teaches_as_with_one_worker(found, world):
    """Each worker asks it about its share; the first epoch's loss is that of one worker."""
    one, several = found[1][0]["distil"], [report["distil"] for report in found[world]]
    loss = one["history"][0]["loss/train"]
    assert several[0]["history"][0]["loss/train"] == pytest.approx(loss, rel=1e-3)
    assert loss != pytest.approx(found[1][0]["finetune 0"]["history"][0]["loss/train"], rel=1e-2)
    for report in several[1:]:
        for name, value in several[0]["network"].items():
            assert torch.equal(report["network"][name], value), name


@pytest.mark.parametrize("world", WORLDS[1:])
def test_all_workers_end_with_the_same_weights(found, world):
    """DDP keeps them together."""
    first = found[world][0]["finetune 0"]["network"]
    for report in found[world][1:]:
        for name, value in report["finetune 0"]["network"].items():
            assert torch.equal(value, first[name]), name
