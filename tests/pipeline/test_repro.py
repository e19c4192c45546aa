"""What `dvc repro` left behind, measured again from the files; what fails, fails cleanly."""

import csv
import json
import shutil

import mlflow
import pytest
import torch
import yaml
from safetensors.torch import load_file

from pipeline.data import load_split
from pipeline.evaluation import evaluate_ann, evaluate_snn
from pipeline.finetune_stdb import longest
from pipeline.network import build_ann, build_snn, load_weights
from pipeline.params import load_params
from pipeline.stage import digest


def metrics(finished, name):
    return json.loads((finished.root / f"metrics/{name}.json").read_text())


def rows(finished, name):
    with (finished.root / f"plots/{name}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def made(finished):
    """Parameters, splits and the networks of the files that were made."""
    params = load_params(finished.root / "params.yaml")
    parts = {
        name: load_split(finished.root / f"data/prepared/{name}.safetensors")
        for name in ("train", "validation", "test")
    }
    ann = build_ann(params.network, parts["train"])
    load_weights(ann, finished.root / "models/ann.safetensors")
    return params, parts, ann


def test_the_accuracy_of_the_ann_is_that_of_its_weights_file(finished, made):
    """What is written down is what the kept weights do, on test and on validation."""
    _, parts, ann = made
    said = metrics(finished, "train_ann")["accuracy"]
    for name in ("test", "validation"):
        assert evaluate_ann(ann, parts[name], 32, 0, 1) == said[name]


def test_the_accuracy_of_the_snn_is_that_of_its_weights_file(finished, made):
    """models/snn.safetensors alone, thresholds included, gives accuracy, spikes and energy."""
    params, parts, ann = made
    snn = build_snn(ann, params.stdb, params.stdb.seed)
    snn.net.load_state_dict(load_file(finished.root / "models/snn.safetensors"))
    found = evaluate_snn(snn, parts["test"], params.stdb.timesteps, 50, 0, 1)
    said = metrics(finished, "finetune_stdb")
    assert found.accuracy[-1] == said["accuracy"]["test"]
    assert found.spikes == pytest.approx(said["spikes_per_neuron"])
    assert found.energy == pytest.approx(said["energy_pj"])
    start = build_snn(ann, params.stdb, params.stdb.seed).net.state_dict()
    trained = snn.net.state_dict()["conv1.weight"]
    assert not torch.equal(trained, start["conv1.weight"]), "nothing has been trained"


def test_the_converted_networks_accuracy_is_that_of_the_thresholds_file(finished, made):
    """Both columns of Table 1, from thresholds.json and conversion.json."""
    params, parts, ann = made
    snn = build_snn(ann, params.stdb, params.stdb.seed)
    layers = json.loads((finished.root / "models/thresholds.json").read_text())["layers"]
    snn.set_thresholds({row["layer"]: row["threshold"] for row in layers})
    said = metrics(finished, "evaluate_converted")
    long = evaluate_snn(snn, parts["test"], said["long"]["timesteps"], 50, 0, 1)
    assert long.accuracy[-1] == said["long"]["accuracy"]
    scale = json.loads((finished.root / "models/conversion.json").read_text())["scale"]
    assert scale == said["reduced"]["threshold_scale"]
    assert scale in params.evaluate_converted.scales
    snn.scale_thresholds(scale)
    reduced = evaluate_snn(snn, parts["test"], params.stdb.timesteps, 50, 0, 1)
    assert reduced.accuracy[-1] == said["reduced"]["accuracy"]


def test_the_data_metrics_are_those_of_the_splits(finished, made):
    """Numbers, shape and hashes; the limit of training images holds."""
    said, (params, parts, _) = metrics(finished, "data"), made
    assert said["train"]["images"] + said["validation"]["images"] == params.data.train_limit
    for name, part in parts.items():
        assert said[name]["images"] == len(part)
        assert said[name]["sha256"] == digest(finished.root / f"data/prepared/{name}.safetensors")
        assert said["shape"] == list(part.shape)


def test_the_plots_have_a_row_for_every_epoch_layer_and_step(finished, made):
    """Each CSV has what dvc.yaml draws from it."""
    params, layers = made[0], ["conv1", "conv2", "conv3", "fc1", "fc2"]
    for name, epochs in (
        ("train_ann", params.train_ann.epochs),
        ("finetune_stdb", params.stdb.epochs),
    ):
        assert [int(row["epoch"]) for row in rows(finished, name)] == list(range(1, epochs + 1))
    for name in ("thresholds", "converted_spikes", "finetuned_spikes"):
        assert [row["layer"] for row in rows(finished, name)] == layers
    steps = [int(row["timesteps"]) for row in rows(finished, "finetuned_accuracy")]
    assert steps == list(range(1, longest(params.stdb.timesteps) + 1))
    curve = rows(finished, "finetuned_accuracy")[params.stdb.timesteps - 1]
    assert float(curve["accuracy"]) == metrics(finished, "finetune_stdb")["accuracy"]["test"]
    spec = yaml.safe_load((finished.root / "dvc.yaml").read_text())
    for plot in spec["plots"]:
        ((_, options),) = plot.items()
        for path, columns in options["y"].items():
            present = rows(finished, path.removeprefix("plots/").removesuffix(".csv"))[0]
            wanted = [columns] if isinstance(columns, str) else columns
            assert {*wanted, options.get("x", wanted[0])} <= set(present), path


def test_the_report_says_the_measured_numbers_and_shows_its_figures(finished):
    """All four accuracies of the row; every image it refers to exists and is a PNG."""
    text = (finished.root / "report/README.md").read_text()
    converted = metrics(finished, "evaluate_converted")
    for accuracy in (
        metrics(finished, "train_ann")["accuracy"]["test"],
        converted["long"]["accuracy"],
        converted["reduced"]["accuracy"],
        metrics(finished, "finetune_stdb")["accuracy"]["test"],
    ):
        assert f"{accuracy:.2%}" in text
    for name in ("accuracy_by_timestep", "spikes_per_layer", "training"):
        assert f"{name}.png" in text
        content = (finished.root / f"report/{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG")


def test_nothing_unfinished_is_left(finished):
    """No checkpoints of finished stages, no half-written files beside the outs."""
    storage = finished.root / ".results"
    left = [p.name for p in storage.iterdir() if "-" in p.name] if storage.is_dir() else []
    assert [name for name in left if name.split("-")[0] in ("train_ann", "finetune_stdb")] == []
    for folder in ("models", "metrics", "plots", "report", "data/prepared"):
        hidden = [p.name for p in (finished.root / folder).iterdir() if p.name.startswith(".")]
        assert set(hidden) <= {".gitignore"}, folder


def test_each_stage_ran_once_with_its_inputs_and_curves(finished):
    """One run a stage that came from the first repro; tags and metrics are those of the files."""
    client = mlflow.MlflowClient(f"sqlite:///{finished.root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("stdb")
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    stages = yaml.safe_load((finished.root / "dvc.yaml").read_text())["stages"]
    assert [run.info.run_name for run in found[: len(stages)]] == list(stages)
    for run in found[: len(stages)]:
        assert run.info.status == "FINISHED"
        tracked = {entry.split(".")[0] for entry in stages[run.info.run_name]["params"]}
        assert {key.split(".")[0] for key in run.data.params} == tracked
    runs = {run.info.run_name: run for run in found[: len(stages)]}
    tags = runs["evaluate_converted"].data.tags
    ann = digest(finished.root / "models/ann.safetensors")
    assert tags["input.models/ann.safetensors"] == ann
    assert "input.data/prepared/test.safetensors" in tags
    for name in ("train_ann", "finetune_stdb"):
        for key in ("loss/train", "accuracy/validation", "gradient_norm/conv1"):
            history = client.get_metric_history(runs[name].info.run_id, key)
            expected = [float(row[key]) for row in rows(finished, name)]
            assert [m.value for m in history] == pytest.approx(expected), (name, key)
    report = client.list_artifacts(runs["report"].info.run_id)
    assert {"README.md", "training.png"} <= {artifact.path for artifact in report}


def everything(repository) -> dict[str, str]:
    """Hashes of all outs, dvc.lock among them."""
    names = ("data", "models", "metrics", "plots", "report")
    files = [p for n in names for p in (repository.root / n).rglob("*") if p.is_file()]
    return {str(p): digest(p) for p in [*files, repository.root / "dvc.lock"]}


def test_dvc_repro_refuses_a_bad_parameter(changed):
    """The stage's message comes through DVC, the exit is not 0, every out is as it was."""
    before = everything(changed)
    changed.set("alpha: 0.3", "alpha: -3")
    result = changed.repro(check=False)
    assert result.returncode != 0
    assert "stdb.alpha is -3; allowed: greater than 0" in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert everything(changed) == before


def test_where_it_runs_makes_nothing_stale(changed):
    """Other workers, other storage: the same results, so nothing is to be run."""
    changed.set("workers: auto", "workers: 2")
    changed.set("storage: .results", "storage: elsewhere")
    assert "Running stage" not in changed.repro("--dry").stdout


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("alpha: 0.3", "alpha: 0.4", ["finetune_stdb"]),
        ("scales: [", "scales: [0.77, ", ["evaluate_converted"]),
        ("encoder: poisson", "encoder: direct", ["balance_thresholds"]),
        ("learning_rate: 0.05", "learning_rate: 0.06", ["train_ann"]),
        ("validation_fraction: 0.2", "validation_fraction: 0.3", ["prepare_data"]),
    ],
)
def test_the_first_stage_that_a_change_makes_stale(changed, before, after, expected):
    """Not an earlier one, whose work would be lost, nor a later one."""
    changed.set(before, after)
    planned = [
        line.split("'")[1]
        for line in changed.repro("--dry").stdout.splitlines()
        if line.startswith("Running stage")
    ]
    assert planned[:1] == expected


@pytest.fixture
def broken(finished, tmp_path):
    """A copy whose files may be broken."""
    folder = tmp_path / "copy"
    ignored = shutil.ignore_patterns("mlflow.db*", "mlartifacts", ".results")
    shutil.copytree(finished.root, folder, symlinks=True, ignore=ignored)
    copied = object.__new__(type(finished))
    copied.root = folder
    return copied


def replace(path, content: bytes) -> None:
    """Not through a link into DVC's cache."""
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("stage", "path", "said"),
    [
        pytest.param(
            "train_ann",
            "data/prepared/train.safetensors",
            "is no split of a data set",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "balance_thresholds",
            "models/ann.safetensors",
            "cannot be read",
            marks=pytest.mark.slow,
        ),
        ("finetune_stdb", "models/thresholds.json", "cannot be read"),
        pytest.param(
            "report", "metrics/finetune_stdb.json", "cannot be read", marks=pytest.mark.slow
        ),
    ],
)
def test_a_broken_input_is_refused_with_its_name(broken, stage, path, said):
    """Half a file: the message names it, no traceback, outs stay, the run is FAILED."""
    replace(broken.root / path, (broken.root / path).read_bytes()[:20])
    before = everything(broken)
    result = broken.run("python", "-m", f"pipeline.{stage}", check=False)
    assert result.returncode == 1
    assert path in result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert everything(broken) == before
    client = mlflow.MlflowClient(f"sqlite:///{broken.root / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("stdb").experiment_id])
    assert (run.info.run_name, run.info.status) == (stage, "FAILED")


def test_weights_of_another_network_are_refused_by_the_next_stage(broken):
    """network.* changed by hand without the ANN: layers and shapes are named."""
    hidden = load_params(broken.root / "params.yaml").network.hidden
    broken.set(f"hidden: {hidden}", f"hidden: {hidden + 8}")
    result = broken.run("python", "-m", "pipeline.balance_thresholds", check=False)
    assert result.returncode == 1
    assert "models/ann.safetensors belong to another network" in result.stderr
    assert f"({hidden}, " in result.stderr
    assert f"({hidden + 8}, " in result.stderr
