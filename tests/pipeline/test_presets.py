"""The presets: each is allowed, built, converted and presented; applying one shows what changed."""

import shutil

import pytest
import torch
import yaml

from pipeline.data import Split
from pipeline.learning.networks import build_ann, build_snn
from pipeline.params import load_params
from pipeline.preset import main
from pipeline.reporting.paper import TABLE_1
from tests.pipeline.support import ROOT

PRESETS = {path.stem: path for path in sorted((ROOT / "presets").glob("*.yaml"))}
SHAPES = {"cifar10": (3, 32, 10), "cifar100": (3, 32, 100), "folder": (3, 224, 1000)}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A copy of params.yaml and the presets."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_built_converted_and_presented(here, name, capsys):
    """Its parameters are allowed; its network takes its images for two steps."""
    assert main([name]) == 0
    assert "+  architecture:" in capsys.readouterr().out
    params = load_params()
    channels, size, classes = SHAPES[params.data.source]
    image = torch.zeros(1, channels, size, size, dtype=torch.uint8)
    names = [str(k) for k in range(classes)]
    split = Split(image, torch.zeros(1).long(), torch.zeros(1).long(), names)
    snn = build_snn(build_ann(params.network, split), params.stdb, 0).eval()
    with torch.no_grad():
        logits = snn(torch.rand(1, channels, size, size) * 2 - 1, 2)
    assert logits.shape == (1, classes)
    assert logits.isfinite().all()


def test_every_row_of_table_1_has_a_preset_with_its_t():
    """At full width, α = 0.3, β = 0.01, at most 20 epochs; its comment has the paper's accuracy."""
    for row in TABLE_1:
        preset = yaml.safe_load(PRESETS[f"{row.architecture}-{row.source}"].read_text())
        assert preset["stdb"]["timesteps"] == row.timesteps
        assert (preset["stdb"]["alpha"], preset["stdb"]["beta"]) == (0.3, 0.01)
        assert preset["stdb"]["epochs"] <= 20
        assert preset["network"]["width"] == 1
        assert preset["network"]["architecture"] == row.architecture
        text = PRESETS[f"{row.architecture}-{row.source}"].read_text()
        for number in (row.ann, row.converted, row.reduced, row.hybrid):
            assert f"{number} %" in text


def test_one_preset_after_another_leaves_nothing_of_the_first(here):
    """Nor of what was set by hand: all set all parameters, but seeds and where it runs."""
    presets = [yaml.safe_load(path.read_text()) for path in PRESETS.values()]
    keys = [{(name, key) for name, part in one.items() for key in part} for one in presets]
    whole = yaml.safe_load((ROOT / "params.yaml").read_text())
    settable = {(name, key) for name, part in whole.items() for key in part if name != "cluster"}
    assert all(one == settable - {(name, "seed") for name in whole} for one in keys)
    assert main(["resnet34-imagenet"]) == 0
    assert main(["vgg5-cifar10"]) == 0
    second = (here / "params.yaml").read_text()
    shutil.copy(ROOT / "params.yaml", here)
    assert main(["vgg5-cifar10"]) == 0
    assert (here / "params.yaml").read_text() == second


def test_a_preset_applies_to_a_file_of_0_1_0(here):
    """Which lacks keys that presets have; they are added."""
    path = here / "params.yaml"
    keys = (
        "normalisation",
        "pooling",
        "norm_images",
        "activation",
        "schedule",
        "distil",
        "events",
        "method",
        "per",
        "initial_membrane",
        "bias_correction",
    )
    new = tuple(f"  {key}: " for key in keys)
    lines = [line for line in path.read_text().splitlines(True) if not line.startswith(new)]
    path.write_text("".join(lines))
    assert main(["vgg5-cifar10"]) == 0
    assert load_params().network.normalisation == "none"
    assert "pooling: average" in path.read_text()
    (here / "mine.yaml").write_text("network: {poolings: max}")
    assert main(["mine.yaml"]) == 1


def test_a_preset_takes_back_what_the_paper_does_without(here):
    """Batch norm and max-pooling of an earlier experiment; levels and their schedule."""
    (here / "mine.yaml").write_text("network: {normalisation: batch, pooling: max}")
    assert main(["mine.yaml"]) == 0
    assert main(["vgg5-cifar10"]) == 0
    network = load_params().network
    assert (network.normalisation, network.pooling) == ("none", "average")
    assert main(["cpu-fewsteps-cifar10"]) == 0
    params = load_params()
    assert (params.network.activation, params.network.levels) == ("qcfs", 4)
    assert (params.train_ann.schedule, params.stdb.schedule) == ("onecycle", "cosine")
    assert main(["vgg5-cifar10"]) == 0
    params = load_params()
    assert (params.network.activation, params.network.levels) == ("relu", None)
    assert (params.train_ann.schedule, params.stdb.schedule) == ("milestones", "milestones")


def test_presets_are_listed_and_an_unknown_one_is_refused(here, capsys):
    """With their first line; params.yaml stays as it is."""
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in PRESETS)
    before = (here / "params.yaml").read_text()
    assert main(["vgg4"]) == 1
    assert "there is no preset 'vgg4'; allowed: " in capsys.readouterr().err
    assert (here / "params.yaml").read_text() == before


def test_a_file_of_ones_own_is_a_preset(here, capsys):
    """Lists stay on their line, what is equal stays as it is written, and so do comments."""
    mine = "stdb: {learning_rate: 1.0e-4, timesteps: 9, milestones: [0.5, 0.9]}\n"
    (here / "mine.yaml").write_text(mine)
    assert main(["mine.yaml"]) == 0
    added = [line for line in capsys.readouterr().out.splitlines() if line.startswith("+  ")]
    assert [" ".join(line.split()) for line in added] == [
        "+ timesteps: 9 # T of the network that is wanted, or of several, one after the other",
        "+ milestones: [0.5, 0.9]",
    ]


def test_a_value_may_be_a_mapping(here, capsys):
    """On its line, in the place of a name and the other way round; a wrong one is refused."""
    for value in ("{mean: [0.4], std: [0.2]}", "cifar10", "{mean: [0.5, 0.5], std: [0.2, 1.0]}"):
        (here / "mine.yaml").write_text(f"data: {{normalise: {value}}}\n")
        assert main(["mine.yaml"]) == 0
        assert f"  normalise: {value} " in (here / "params.yaml").read_text()
    (here / "mine.yaml").write_text("data: {normalise: {mean: [0.4]}}\n")
    before = (here / "params.yaml").read_text()
    assert main(["mine.yaml"]) == 1
    assert "data.normalise is {'mean': [0.4]}; allowed: null, imagenet" in capsys.readouterr().err
    assert (here / "params.yaml").read_text() == before


def test_the_images_are_where_the_user_has_them(here, capsys):
    """An archive or class folders take the place of the source; torchvision's downloads do not."""
    (here / "cifar10.tar.gz").touch()
    (here / "downloads/cifar-10-batches-py").mkdir(parents=True)
    assert main(["cpu-fewsteps-cifar10", "--data", "cifar10.tar.gz"]) == 0
    assert "+  path: cifar10.tar.gz" in capsys.readouterr().out
    data = load_params().data
    assert (data.source, data.path, data.validation_fraction) == ("folder", "cifar10.tar.gz", 0.04)
    assert main(["cpu-fewsteps-cifar10", "--data", "downloads"]) == 0
    data = load_params().data
    assert (data.source, data.path) == ("cifar10", "downloads")
    (here / "downloads/cifar-10-python.tar.gz").touch()
    assert main(["cpu-fewsteps-cifar10", "--data", "downloads/cifar-10-python.tar.gz"]) == 0
    assert (load_params().data.source, load_params().data.path) == ("cifar10", "downloads")
    assert main(["cpu-fewsteps-cifar100", "--data", "downloads"]) == 0  # another data set's
    assert (load_params().data.source, load_params().data.path) == ("folder", "downloads")
    before = (here / "params.yaml").read_text()
    for arguments, error in (
        (["cpu-fewsteps-cifar10", "--data", "no.zip"], "DATA is no.zip, which does not exist"),
        (["--data", "downloads"], "DATA is downloads, of no preset"),
    ):
        assert main(arguments) == 1
        assert error in capsys.readouterr().err
    assert (here / "params.yaml").read_text() == before
