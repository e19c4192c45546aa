"""docs/extend.md: every block of code is run, and does what its section says.

A block names its file in its first line. It is run as a part of that file: with the names that the
file has and against its registries, which are put back afterwards.
"""

import copy
import importlib
import json
import re
import shutil
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

import pipeline.network_params
import pipeline.preset
import stdb
import stdb.architectures
import stdb.operators.table
import stdb.rewriting
from pipeline.data import Split, load_split, worker_batches
from pipeline.data.sources import NEEDS_PATH, SOURCES, read_source
from pipeline.errors import DataError, ParamsError
from pipeline.files import METRICS, write_csv
from pipeline.learning.networks import build_ann, build_snn, recipe
from pipeline.overlays import apply
from pipeline.params import NetworkParams, Params, load_params
from pipeline.prepare_data import split
from pipeline.typed import read_yaml
from tests.pipeline import dependencies
from tests.pipeline.support import ROOT, STDB, KeptWorker, make_files, make_repository, worker
from tests.stdb.support import Literal, LiteralNeuron, relus

PAGE = ROOT / "docs/extend.md"
REGISTRIES = (
    stdb.SURROGATES,
    stdb.ENCODERS,
    stdb.architectures.VGG,
    stdb.operators.table.OPERATORS,
    stdb.rewriting.CALLS,
    SOURCES,
    NEEDS_PATH,
)
SECTIONS = {  # heading → files of its blocks
    "An architecture": ["stdb/architectures.py", "my_networks.py"],
    "A surrogate": ["stdb/surrogate.py"],
    "An encoder": ["stdb/encoding.py"],
    "An operator": ["stdb/operators/shuffling.py", "stdb/operators/table.py"],
    "A rewriting rule": ["stdb/rewriting.py"],
    "A data source": ["pipeline/data/sources.py"],
    "A stage": ["pipeline/measure_brightness.py", "dvc.yaml"],
    "A metric": ["pipeline/learning/finetuning.py", "pipeline/learning/finetuning.py"],
    "A preset": ["VGG9"],
}


def blocks(heading: str) -> list[str]:
    """The blocks of a section."""
    found = re.split(r"^## (.+)\n", PAGE.read_text(), flags=re.MULTILINE)
    section = dict(zip(found[1::2], found[2::2], strict=True))[heading]
    return re.findall(r"^```(?:python|yaml)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def file_of(block: str) -> str:
    """What the first line names."""
    return re.match(r"# ([\w./]+)", block)[1]


@pytest.fixture
def run(monkeypatch):
    """Runs a block as a part of its file, or as a new one; registries are put back."""
    before = [dict(registry) for registry in REGISTRIES]

    def run(block: str) -> ModuleType:
        path = file_of(block)
        name = path.removesuffix(".py").replace("/", ".")
        module = ModuleType(name)
        if (ROOT / path).exists():
            vars(module).update(vars(importlib.import_module(name)))
        else:
            monkeypatch.setitem(sys.modules, name, module)
        module.__package__ = name.rpartition(".")[0]
        exec(compile(block, path, "exec"), vars(module))
        return module

    yield run
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with params.yaml and the presets, in which one is."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return tmp_path


def params_with(folder: Path, **changes) -> Params:
    """params.yaml with changes, checked as the stages check it."""
    (folder / "changes.yaml").write_text(yaml.safe_dump(changes))
    apply(folder / "changes.yaml", folder / "params.yaml")
    return load_params(folder / "params.yaml")


def one_image(channels: int, size: int, classes: int) -> Split:
    """A split of one black image."""
    image = torch.zeros(1, channels, size, size, dtype=torch.uint8)
    return Split(image, torch.zeros(1).long(), torch.zeros(1).long(), list("abcdefghij")[:classes])


def saved_and_loaded(snn, path: Path, network: dict) -> stdb.SpikingNetwork:
    """What comes back from a file."""
    stdb.save(snn, path, network=network, timesteps=6, classes=["a", "b", "c"])
    return stdb.load(path)[0]


def presented(snn, channels=1, size=8, timesteps=6) -> torch.Tensor:
    """Logits of three images."""
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(3, channels, size, size, generator=generator) * 2 - 1
    with torch.no_grad():
        return snn.eval()(images, timesteps)


def small(*middle: nn.Module, features: int = 32) -> nn.Sequential:
    """A network for 1×4×4 images, float64, with other layers between its convolutions."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.ReLU(), *middle,
        nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(features, 3, bias=False),
    ).double()  # fmt: skip


def spike_train(steps: int = 7) -> torch.Tensor:
    """(T, 2, 1, 4, 4) of −1, 0 and 1."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(-1, 2, (steps, 2, 1, 4, 4), generator=generator).double()


def same_as_literal(ann, surrogate=stdb.STDB(), chunk=3, **literal):  # noqa: B008 (frozen)
    """One step of gradient descent gives the engine's network and a literal one equal weights."""
    train, labels = spike_train(), torch.tensor([0, 2])
    snn = stdb.convert(ann, stdb.SpikeTrain(train), surrogate, chunk=chunk)
    for place in relus(ann):
        snn.net.get_submodule(place).threshold.data.fill_(0.3)
    theirs = Literal(ann, dict.fromkeys(relus(ann), 0.3), **literal)
    logits, (expected,) = snn(torch.zeros_like(train[0]), len(train)), theirs.run(train)
    torch.testing.assert_close(logits, expected)
    assert all(0 < theirs.spikes(place).mean() < 1 for place in relus(ann))
    for net, result in ((snn.net, logits), (theirs.net, expected)):
        weights = [p for n, p in net.named_parameters() if n.endswith("weight")]
        optimizer = torch.optim.SGD(weights, lr=0.5)
        F.cross_entropy(result, labels).backward()
        optimizer.step()
    learned, before = dict(theirs.net.named_parameters()), dict(ann.named_parameters())
    for name, weight in before.items():
        assert not torch.equal(learned[name], weight), name
        torch.testing.assert_close(snn.net.get_parameter(name), learned[name])


# -- the page --------------------------------------------------------------------------------------


def test_every_section_has_its_blocks():
    """So that none of them is left out here."""
    headings = re.findall(r"^## (.+)$", PAGE.read_text(), re.MULTILINE)
    assert {name: [file_of(block) for block in blocks(name)] for name in headings} == SECTIONS
    assert PAGE.read_text().count("```") == 2 * sum(map(len, SECTIONS.values()))


# -- architectures ---------------------------------------------------------------------------------


def test_a_row_of_the_table_is_an_architecture(run, here, monkeypatch):
    """Refused before; then allowed, built with its layers, converted, saved and loaded."""
    row, _ = blocks("An architecture")
    network = {"architecture": "vgg6", "width": 0.125, "hidden": 8}
    with pytest.raises(ParamsError, match="architecture is 'vgg6'; allowed: vgg5, vgg9"):
        params_with(here, network=network)
    source = (ROOT / file_of(row)).read_text()
    with_row, times = re.subn(r"^(?=ARCHITECTURES\b)", row, source, flags=re.MULTILINE)
    assert times == 1
    edited = ModuleType("stdb.architectures")
    exec(compile(with_row, file_of(row), "exec"), vars(edited))
    for module in (stdb.architectures, pipeline.network_params):
        monkeypatch.setattr(module, "ARCHITECTURES", edited.ARCHITECTURES)
    params = params_with(here, network=network)

    run(row)
    data = one_image(1, 8, 3)
    ann = build_ann(params.network, data)
    assert [tuple(weight.shape[:2]) for weight in ann.parameters()] == [
        (8, 1), (16, 8), (16, 16), (32, 16), (8, 32 * 2 * 2), (8, 8), (3, 8)
    ]  # fmt: skip
    snn = build_snn(ann, params.stdb, 0)
    snn.set_thresholds(dict.fromkeys(snn.thresholds, 0.05))
    again = saved_and_loaded(snn, here / "snn", recipe(params.network, data))
    assert presented(snn).abs().sum() > 0
    assert torch.equal(presented(again), presented(snn))


def test_a_function_of_ones_own_is_an_architecture(here, monkeypatch):
    """Allowed, built, converted; a file names it and is read with it."""
    _, block = blocks("An architecture")
    (here / file_of(block)).write_text(block)
    monkeypatch.syspath_prepend(here)
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    params = params_with(here, network={"architecture": "my_networks:small"})
    data = one_image(2, 8, 3)
    ann = build_ann(params.network, data)
    torch.manual_seed(0)
    images = torch.randn(4, 2, 8, 8)
    maps = F.conv2d(images, ann[0].weight, padding=1).relu()
    expected = F.avg_pool2d(maps, 2).flatten(1) @ ann[4].weight.t()
    torch.testing.assert_close(ann(images), expected)
    snn = stdb.convert(ann, stdb.PoissonEncoder())
    snn.set_thresholds(dict.fromkeys(snn.thresholds, 0.2))
    again = saved_and_loaded(snn, here / "snn", recipe(params.network, data))
    assert presented(snn, 2).abs().sum() > 0
    assert torch.equal(presented(again, 2), presented(snn, 2))
    sys.modules.pop("my_networks")


# -- surrogates and encoders -----------------------------------------------------------------------


@pytest.mark.parametrize("over_threshold", [False, True])
def test_a_surrogate_learns_as_its_formula_says(run, here, monkeypatch, over_threshold):
    """One step of training, against autograd with the formula written out."""
    chosen = {"surrogate": "fast_sigmoid", "alpha": 0.4, "beta": 2.0}
    chosen["over_threshold"] = over_threshold
    with pytest.raises(ParamsError, match="surrogate is 'fast_sigmoid'; allowed: 'stdb'"):
        params_with(here, stdb=chosen)
    (block,) = blocks("A surrogate")
    module = run(block)
    params = params_with(here, stdb=chosen).stdb
    data = one_image(1, 8, 3)
    network = NetworkParams(
        architecture="vgg5", width=0.1, hidden=8, dropout=0.0, classifier_dropout=0.0
    )
    snn = build_snn(build_ann(network, data), params, 0)
    surrogate = next(iter(snn.neurons.values())).surrogate
    assert type(surrogate) is module.FastSigmoid

    def formula(neuron, membrane, threshold):
        x = membrane / threshold - 1 if over_threshold else membrane - threshold
        return 0.4 / (1 + 2 * x.abs()) ** 2

    monkeypatch.setattr(LiteralNeuron, "surrogate", formula)
    same_as_literal(small(), surrogate, over_threshold=over_threshold)
    again = saved_and_loaded(snn, here / "snn", recipe(network, data))
    assert next(iter(again.neurons.values())).surrogate == surrogate


def test_an_encoder_gives_its_train(run, here):
    """By hand; in one call and in several; named in params.yaml, saved and loaded."""
    with pytest.raises(ParamsError, match="encoder is 'regular'; allowed: 'poisson' or 'direct'"):
        params_with(here, stdb={"encoder": "regular"})
    (block,) = blocks("An encoder")
    module = run(block)
    params = params_with(here, stdb={"encoder": "regular"}).stdb
    encoder = stdb.encoder_of(params.encoder, 3)
    assert encoder == module.RegularEncoder(0.5)
    pixels = {  # pixel → its train
        0.25: [0, 1, 0, 0, 0, 1, 0, 0],
        -0.5: [-1, 0, -1, 0, -1, 0, -1, 0],
        1.0: [1, 1, 1, 1, 1, 1, 1, 1],
        0.0: [0, 0, 0, 0, 0, 0, 0, 0],
    }
    images = torch.tensor(list(pixels), dtype=torch.float64).view(2, 1, 1, 2)
    expected = torch.tensor(list(pixels.values()), dtype=torch.float64).t().view(8, 2, 1, 1, 2)
    keys = torch.zeros(2, dtype=torch.int64)
    whole = encoder(images, 0, 8, keys)
    assert whole.dtype == images.dtype
    assert torch.equal(whole, expected)
    parts = [encoder(images, a, b, keys) for a, b in ((0, 3), (3, 4), (4, 8))]
    assert torch.equal(torch.cat(parts), expected)

    network = {"architecture": "vgg5", "in_channels": 1, "image_size": 8, "num_classes": 3}
    network |= {"width": 0.1, "hidden": 8}
    torch.manual_seed(0)
    snn = stdb.convert(stdb.build_network(**network), module.RegularEncoder(0.25))
    snn.set_thresholds(dict.fromkeys(snn.thresholds, 0.05))
    again = saved_and_loaded(snn, here / "snn", network)
    assert again.encoder == module.RegularEncoder(0.25)
    assert presented(snn).abs().sum() > 0
    assert torch.equal(presented(again), presented(snn))


# -- operators and rules ---------------------------------------------------------------------------


def shuffled() -> nn.Sequential:
    """Six channels of three groups, between layers of neurons."""
    return small(
        nn.Conv2d(2, 6, 3, bias=False, padding=1), nn.ReLU(), nn.ChannelShuffle(3),
        nn.Conv2d(6, 2, 3, bias=False, padding=1), nn.ReLU(),
    )  # fmt: skip


def test_an_operator_runs_forward_and_backward(run):
    """As torch's own module does, step by step under autograd; refused before."""
    with pytest.raises(stdb.ConversionError, match="layer 4 is a ChannelShuffle, which has no"):
        stdb.convert(shuffled(), stdb.DirectEncoder())
    for block in blocks("An operator"):
        run(block)
    for chunk in (1, 3, 7):
        same_as_literal(shuffled(), chunk=chunk)
    same_as_literal(shuffled(), stdb.Linear(0.3), kind="linear")  # recomputes the current


def test_an_operator_counts_its_synapses_and_is_exported(run):
    """A neuron's synapses: the outputs in which autograd finds its spike, weights all one."""
    for block in blocks("An operator"):
        run(block)
    ann = shuffled()
    reach = stdb.fan_out(stdb.convert(ann, stdb.DirectEncoder()), (1, 4, 4))
    ones = copy.deepcopy(ann)
    for weight in ones.parameters():
        weight.data.fill_(1)
    for name, layers in {"input": ones[:1], "0": ones[2:3], "2": ones[4:6]}.items():
        below = torch.zeros(1, *reach[name].shape, dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad(layers(below).sum(), below)
        assert torch.equal(reach[name], expected[0]), name
    snn = stdb.convert(ann.float(), stdb.DirectEncoder()).eval()
    images = torch.rand(3, 1, 4, 4) * 2 - 1
    program = stdb.export_program(snn, 4, (1, 4, 4))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), snn(images, 4))


class Cast(nn.Module):
    """Says what type it wants before it flattens."""

    def __init__(self):
        super().__init__()
        net = small()
        self.below, self.output = net[:-2], net[-1]

    def forward(self, x):
        return self.output(torch.flatten(self.below(x).float(), 1))


def test_a_rule_converts_what_was_refused(run):
    """x.float() in a float32 network; in another it stays refused."""
    cast = Cast().float()
    with pytest.raises(stdb.ConversionError, match="calls float, which has no spiking form"):
        stdb.convert(cast, stdb.DirectEncoder())
    (block,) = blocks("A rewriting rule")
    run(block)
    ours, plain = (stdb.convert(net, stdb.DirectEncoder()) for net in (cast, small().float()))
    images = spike_train()[0].float() / 2
    assert torch.equal(ours(images, 60), plain(images, 60))
    assert ours(images, 60).abs().max() > 0
    with pytest.raises(stdb.ConversionError, match="changes the type; allowed: in a float32"):
        stdb.convert(Cast().double(), stdb.DirectEncoder())


# -- data ------------------------------------------------------------------------------------------


def test_a_source_is_split(run, here):
    """Each image of a split is the one that its id names; the name is refused before."""
    chosen = {"source": "npz", "path": "mine.npz", "validation_fraction": 0.25}
    with pytest.raises(ParamsError, match=r"data\.source is 'npz'; allowed: 'digits'"):
        params_with(here, data=chosen)
    (block,) = blocks("A data source")
    run(block)
    params = params_with(here, data=chosen).data
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (30, 5, 5), dtype=np.uint8)
    labels = np.arange(30) % 3
    parts = {"x_train": images[:24], "y_train": labels[:24]}
    np.savez(here / "mine.npz", **parts, x_test=images[24:], y_test=labels[24:])
    splits = split(params, *read_source(params))
    assert {name: len(part) for name, part in splits.items()} == {
        "train": 18, "validation": 6, "test": 6
    }  # fmt: skip
    for part in splits.values():
        assert part.classes == ["0", "1", "2"]
        assert torch.equal(part.images[:, 0], torch.from_numpy(images)[part.ids])
        assert torch.equal(part.labels, torch.from_numpy(labels)[part.ids])
    ids = torch.cat([part.ids for part in splits.values()])
    assert sorted(ids.tolist()) == list(range(30))
    with pytest.raises(DataError, match=r"data\.path is null; allowed with source: npz: a file"):
        read_source(params.model_copy(update={"path": None}))
    with pytest.raises(ParamsError, match=r"data\.path is null; allowed with source: npz: a file"):
        params_with(here, data=chosen | {"path": None})
    (here / "mine.npz").write_bytes(b"PK\3\4, and no more")
    with pytest.raises(DataError, match=r"mine\.npz cannot be read as an npz file"):
        read_source(params)


# -- stages ----------------------------------------------------------------------------------------


class Share(KeptWorker):
    """One of several workers, on smaller batches; nobody adds up their sums."""

    def batches(self, count, size):
        return worker_batches(count, 7, self.rank, self.world)

    def all_reduce(self, value, op="sum"):
        return value


def test_a_loop_measures_the_same_with_two_workers(run, tmp_path):
    """The mean pixel of the training images; two workers' shares add up to it."""
    folder, parts = make_files(tmp_path)
    module = run(blocks("A stage")[0])
    mean = parts["train"].images.numpy().astype(np.float64).mean()
    alone = worker(folder)
    module.loop(alone)
    assert alone.states == [{"brightness": pytest.approx(mean)}]
    shares = []
    for rank in range(2):
        one = Share(alone.params, folder, rank=rank, world=2)
        module.loop(one)
        shares.append(one.states[0]["brightness"])
    assert min(shares) > 0
    assert sum(shares) == pytest.approx(mean)


@pytest.mark.slow
def test_a_stage_runs(tmp_path, monkeypatch):
    """Its file and its entry in dvc.yaml, in a copy of the repository, by `dvc repro`."""
    repository = make_repository(tmp_path / "repository")
    script, entry = blocks("A stage")
    (repository.root / file_of(script)).write_text(script)
    dvc = repository.root / file_of(entry)
    dvc.write_text(dvc.read_text().replace("\nstages:\n", f"\nstages:\n{entry}\n", 1))
    said = repository.repro("measure_brightness").stdout
    assert "python -m pipeline.measure_brightness" in said
    train = load_split(repository.root / "data/prepared/train.safetensors")
    mean = train.images.numpy().astype(np.float64).mean()
    written = json.loads((repository.root / METRICS / "brightness.json").read_text())
    assert written == {"brightness": pytest.approx(mean)}
    assert repository.runs("measure_brightness") == ["FINISHED"]
    assert not list((repository.root / ".results").glob("measure_brightness-*"))
    monkeypatch.setattr(dependencies, "ROOT", repository.root)
    deps = set(read_yaml(dvc)["stages"]["measure_brightness"]["deps"])
    needed = dependencies.needed(file_of(script))
    assert [file for file in needed if not dependencies.covered(file, deps)] == []


# -- metrics and presets ---------------------------------------------------------------------------


def test_a_metric_is_in_every_epoch(tmp_path):
    """In the rows that go to MLflow and to the CSV, as counted from the spike trains."""
    function, line = blocks("A metric")
    folder, parts = make_files(tmp_path)
    source = (ROOT / file_of(function)).read_text()
    last = re.compile(r"^ +\*\*extra\(epoch, evaluation\),\n", re.MULTILINE)
    assert len(last.findall(source)) == 1
    added = line.partition("\n")[2]
    source = last.sub(lambda found: added + found[0], source)
    module = ModuleType("pipeline.learning.finetuning")
    exec(compile(source + function, file_of(function), "exec"), vars(module))
    one, rows = worker(folder, STDB.model_copy(update={"epochs": 1})), []
    one.send = rows.extend
    snn, state = module.fine_tune(one, 0.5, parts["train"], parts["validation"])
    validation = parts["validation"]
    snn.eval()
    with stdb.record_spikes(snn, trains=True) as statistics, torch.no_grad():
        snn(validation.pixels(), STDB.timesteps, sample_ids=validation.ids)
    means = [float(statistics.train(name).sum(0).mean()) for name in snn.neurons]
    assert len(set(means)) > 1
    assert rows[-1]["quietest/validation"] == pytest.approx(min(means))
    write_csv(tmp_path / "finetune_stdb.csv", state["history"])
    assert "quietest/validation" in (tmp_path / "finetune_stdb.csv").read_text()


def test_a_preset_sets_what_it_names(here, capsys):
    """As a file of one's own and by its name; all else stays, comments too."""
    (block,) = blocks("A preset")
    before = read_yaml(here / "params.yaml")
    (here / "presets/mine.yaml").write_text(block)
    assert pipeline.preset.main([]) == 0
    assert re.search(r"^mine +VGG9 on CIFAR-10 as DIET-SNN", capsys.readouterr().out, re.MULTILINE)
    assert pipeline.preset.main(["mine"]) == 0
    after = read_yaml(here / "params.yaml")
    expected = copy.deepcopy(before)
    expected["data"]["source"] = "cifar10"
    expected["network"] |= {"architecture": "vgg9", "width": 1}
    expected["stdb"] |= {"timesteps": 5, "encoder": "direct"}
    expected["stdb"] |= {"learn_thresholds": True, "learn_leaks": True}
    assert after == expected
    text = (here / "params.yaml").read_text()
    assert text.count("#") == (ROOT / "params.yaml").read_text().count("#")
    shutil.copy(ROOT / "params.yaml", here)
    (here / "own.yaml").write_text(textwrap.dedent(block))
    assert pipeline.preset.main(["own.yaml"]) == 0
    assert (here / "params.yaml").read_text() == text
    assert load_params().stdb.learn_leaks
