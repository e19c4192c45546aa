"""The real pipeline, run by `dvc repro` in a temporary repository."""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import mlflow
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

import stdb
from tests.pipeline.support import STAGES, Started, copy_of, make_repository


def test_every_out_is_made_and_tracked(finished):
    """`dvc repro` makes all outs, records them, and leaves nothing else in git's eyes."""
    stages = yaml.safe_load((finished.root / "dvc.yaml").read_text())["stages"]
    assert list(stages) == STAGES
    for stage in stages.values():
        for group in ("outs", "metrics", "plots"):
            for out in stage.get(group, []):
                assert (finished.root / next(iter(out))).exists(), out
    assert finished.run("dvc", "status", "-q", "dvc.yaml", check=False).returncode == 0
    shown = finished.run("git", "status", "--porcelain").stdout.splitlines()
    expected = {"dvc.lock", "metrics/", "plots/", "report/"}
    assert {line.split()[-1] for line in shown} == expected


def test_metrics_say_what_was_measured(finished):
    """The four columns of Table 1 are in the metrics, and DVC shows them."""
    read = lambda name: json.loads((finished.root / f"metrics/{name}.json").read_text())  # noqa: E731
    ann, converted, tuned = map(read, ("train_ann", "evaluate_converted", "finetune_stdb"))
    for accuracy in (
        ann["accuracy"]["test"],
        converted["long"]["accuracy"],
        converted["reduced"]["accuracy"],
        tuned["accuracy"]["test"],
    ):
        assert accuracy * read("data")["test"]["images"] == pytest.approx(
            round(accuracy * read("data")["test"]["images"]), abs=1e-6
        )
    assert converted["reduced"]["timesteps"] == tuned["timesteps"] == 3
    assert list(tuned["spikes_per_neuron"]) == ["conv1", "conv2", "conv3", "fc1", "fc2"]
    shown = json.loads(finished.run("dvc", "metrics", "show", "--json").stdout)
    (summary,) = shown[""]["data"].values()
    assert summary["data"]["accuracy"]["stdb"] == tuned["accuracy"]["test"]


def test_a_second_run_does_nothing(finished):
    """Nothing changed, nothing runs, in under five seconds of a core that others use as well."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = finished.repro().stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "Running stage" not in output
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


def test_mlflow_has_a_run_for_the_execution_and_one_below_it_per_stage(finished):
    """Each stage is one finished run with parameters, metrics by epoch, and its origin.

    The run above them has all parameters, the final figures, the data sets and the report.
    """
    client = mlflow.MlflowClient(f"sqlite:///{finished.root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("stdb")
    first = f"attributes.start_time <= {finished.end}"
    found = client.search_runs([experiment.experiment_id], first)
    runs = {run.info.run_name: run for run in found}
    commit = finished.run("git", "rev-parse", "HEAD").stdout.strip()
    name = f"vgg5 T=3 {commit[:7]}"
    assert sorted(run.info.run_name for run in found) == sorted([*STAGES, name])
    above = runs.pop(name)
    assert above.info.status == "FINISHED"
    params = yaml.safe_load((finished.root / "params.yaml").read_text())
    assert set(above.data.params) == {
        f"{s}.{key}" for s, section in params.items() for key in section
    }
    tuned = json.loads((finished.root / "metrics/finetune_stdb.json").read_text())
    assert above.data.metrics["accuracy/stdb"] == tuned["accuracy"]["test"]
    assert {"accuracy/ann", "energy/stdb_pj", "spikes/conv1"} <= set(above.data.metrics)
    curve = client.get_metric_history(above.info.run_id, "by_timestep/stdb")
    assert [point.step for point in curve] == list(range(1, len(curve) + 1))  # T is the step
    assert curve[tuned["timesteps"] - 1].value == tuned["accuracy"]["test"]
    described = above.data.tags["mlflow.note.content"]
    assert described.startswith("**vgg5** (width 0.1) on digits, 450 test images: ANN ")
    assert "| **vgg5** (width 0.1) | digits |" in described
    sets = {row.dataset.name for row in above.inputs.dataset_inputs}
    assert sets == {"digits train", "digits validation", "digits test"}
    assert [f.path for f in client.list_artifacts(above.info.run_id)] == ["index.html"]
    version = client.get_model_version_by_alias("stdb-digits", "champion")
    assert version.run_id == runs["finetune_stdb"].info.run_id
    for name, run in runs.items():
        assert run.info.status == "FINISHED", name
        assert run.data.tags["mlflow.parentRunId"] == above.info.run_id
        assert run.data.tags["git.commit"] == commit
        assert run.data.tags["git.dirty"] == "false"
        assert run.data.tags["dvc.stage"] == name
        assert "duration_seconds" in run.data.metrics
    tuned = runs["finetune_stdb"]
    assert tuned.data.params["stdb.alpha"] == "0.3"
    assert "input.models/ann.safetensors" in tuned.data.tags
    assert {"spikes/conv1", "accuracy/validation", "learning_rate", "loss/train"} <= set(
        tuned.data.metrics
    )
    history = client.get_metric_history(runs["train_ann"].info.run_id, "accuracy/validation")
    assert [m.step for m in history] == [1, 2, 3, 4]
    assert "thresholds/conv1" in runs["balance_thresholds"].data.metrics


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("alpha: 0.3", "alpha: -1", "stdb.alpha is -1; allowed: greater than 0"),
        ("architecture: vgg5", "architecture: vgg7", "architecture is 'vgg7'"),
        ("leak: 1.0", "leak: 1.5", "stdb.leak is 1.5"),
        ("workers: auto", "workers: 99\n  unknown: 1", "cluster.unknown is no known key"),
    ],
)
def test_a_bad_parameter_is_refused_before_anything_starts(changed, before, after, message):
    """The message names key, value and what is allowed; earlier outs are untouched."""
    outs = changed.bytes_of_outs()
    changed.write_wrong(before, after)
    start = time.monotonic()
    result = changed.run("python", "-m", "pipeline.finetune_stdb", check=False)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert time.monotonic() - start < 20
    assert changed.bytes_of_outs() == outs


def test_diverging_training_is_an_error(changed):
    """A loss that is not finite: message, non-zero exit, earlier outs untouched, run FAILED."""
    outs = changed.bytes_of_outs()
    changed.set(train_ann={"learning_rate": 1.0e30})
    result = changed.repro(check=False)
    assert result.returncode != 0
    assert "the training diverged" in result.stdout + result.stderr
    assert changed.bytes_of_outs() == outs
    assert changed.runs("train_ann")[0] == "FAILED"


def test_more_workers_than_cores_is_an_error(changed):
    """The message says how many there are."""
    changed.set(cluster={"workers": 99}, train_ann={"batch_size": 128}, stdb={"batch_size": 128})
    result = changed.run("python", "-m", "pipeline.balance_thresholds", check=False)
    assert result.returncode == 1
    assert "cluster.workers is 99" in result.stderr


@pytest.mark.slow
def test_two_runs_from_scratch_are_equal(finished, tmp_path):
    """The same commands give the same metrics and weights, bit for bit."""
    again = make_repository(tmp_path)
    again.repro()
    ours, theirs = finished.bytes_of_outs(), again.bytes_of_outs()
    names = [name for name in ours if name.startswith(("metrics", "models"))]
    assert len(names) >= 8
    assert [name for name in names if ours[name] != theirs[name]] == []


@pytest.mark.slow
def test_only_what_depends_on_a_change_runs_again(finished, tmp_path):
    """α reaches the fine-tuning and nothing before it."""
    changed = copy_of(finished, tmp_path / "changed")
    changed.set(stdb={"alpha": 0.4})
    ran = [
        line.split("'")[1]
        for line in changed.repro().stdout.splitlines()
        if line.startswith("Running stage")
    ]
    assert ran == ["finetune_stdb", "report"]


@pytest.mark.slow
def test_two_workers_learn_what_one_learns(finished, tmp_path, monkeypatch):
    """Two processes with DDP find the thresholds and the weights of one, same global batch.

    With Ray's authentication by token, and without: that is the user's to choose.
    """
    two = copy_of(finished, tmp_path / "two")
    two.set(cluster={"workers": 2})
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    output = two.run("python", "-m", "pipeline.balance_thresholds").stdout
    assert "2 CPU worker(s)" in output
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))  # where there is no token yet
    for a, b in zip(thresholds(finished), thresholds(two), strict=True):
        assert a["threshold"] == pytest.approx(b["threshold"], rel=1e-6)
    two.run("python", "-m", "pipeline.finetune_stdb")
    start = load_file(finished.root / "models/ann.safetensors")
    ours, theirs = (load_file(r.root / "models/snn.safetensors") for r in (finished, two))
    for name, before in start.items():
        step = (ours[name] - before).norm()
        assert step > 1e-4, f"{name} has not been trained"
        # Adam moves a weight whose gradient is rounding noise either way, hence the norm
        assert (ours[name] - theirs[name]).norm() < 0.1 * step, name


@pytest.mark.slow
def test_make_repro_has_one_ray_for_all_stages_and_leaves_nothing(finished, tmp_path):
    """Both stages join it; afterwards there is no process and no folder of Ray's."""
    copied = copy_of(finished, tmp_path / "copy")
    copied.set(balance_thresholds={"percentile": 99.9}, cluster={"workers": 2})
    folders = set(Path(tempfile.gettempdir()).glob("ray-*"))
    started = Started(
        copied, tmp_path / "log", [sys.executable, "-m", "pipeline.repro", "evaluate_converted"]
    )
    assert started.process.wait(600) == 0, started.says()
    started.wait_until_gone(20)
    assert started.says().count("Ray Train job on 2 CPU worker(s)") == 2
    assert set(Path(tempfile.gettempdir()).glob("ray-*")) <= folders


@pytest.mark.slow
def test_make_repro_ends_with_what_came_out_and_what_to_do_next(finished, tmp_path):
    """Five lines, when all of the pipeline was asked for; the first has the table's figures."""
    copied = copy_of(finished, tmp_path / "copy")
    said = copied.run(sys.executable, "-m", "pipeline.repro").stdout.rstrip().splitlines()[-5:]
    tuned = json.loads((copied.root / "metrics/finetune_stdb.json").read_text())
    assert said[0].startswith("vgg5 on digits, 450 test images: ANN ")
    assert said[0].endswith(f"STDB {tuned['accuracy']['test']:.2%} at T = 3")
    starts = ("the report", "all runs", "your images", "next")
    assert all(line.startswith(start) for line, start in zip(said[1:], starts, strict=True))
    one = copied.run(sys.executable, "-m", "pipeline.repro", "prepare_data").stdout
    assert "the report" not in one


OWN_NETWORK = """
from torch import nn
def small(in_channels, image_size, num_classes):
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2),
        nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * (image_size // 4) ** 2, num_classes),
    )
"""


@pytest.mark.slow
def test_a_network_with_norms_biases_and_max_pooling_runs_through_all_stages(tmp_path):
    """One epoch of each; every out is made, the network is handed on whole, and classifies.

    At T = 4 and then at T = 2, each with its network, its figures, and its run in MLflow.
    """
    repository = make_repository(tmp_path / "own")
    (repository.root / "my_networks.py").write_text(OWN_NETWORK)
    repository.set(
        network={"architecture": "my_networks:small"},
        train_ann={"epochs": 1},
        stdb={"timesteps": [4, 2], "epochs": 1, "logit_scale": "auto"},
    )
    repository.repro()
    read_t_by_t(repository)
    ann, balanced, snn = (
        load_file(repository.root / f"models/{name}.safetensors")
        for name in ("ann", "balanced", "snn")
    )
    assert int(ann["1.num_batches_tracked"]) > 0
    assert {"0.bias", "5.bias", "10.bias"} <= set(balanced)  # the second is the batch norm's
    for name in ("0.weight", "5.weight", "10.bias"):
        assert not snn[name].equal(balanced[name]), name
    loaded, about = stdb.load(repository.root / "models/snn.safetensors")
    assert [n.unit for n in loaded.neurons.values()] == pytest.approx([*loaded.thresholds.values()])
    assert about["network"]["architecture"] == "my_networks:small"
    measured = json.loads((repository.root / "metrics/evaluate_converted.json").read_text())
    assert measured["reduced"]["spikes_per_neuron"].keys() == loaded.neurons.keys()
    assert (repository.root / "report/index.html").exists()
    Image.new("L", (8, 8), 90).save(repository.root / "image.png")
    said = repository.run("python", "-m", "pipeline.predict", "image.png").stdout
    assert said.startswith("image.png: ")
    said = repository.run("python", "-m", "pipeline.convert", "-o", "converted").stdout
    assert "converted: 2 spiking layers" in said
    assert stdb.load(repository.root / "converted")[0].thresholds.keys() == loaded.neurons.keys()


def read_t_by_t(repository) -> None:
    """What a fine-tuning at T = 4 and T = 2 leaves."""
    models = repository.root / "models"
    assert sorted(p.name for p in (models / "snn").iterdir()) == [
        "t2.safetensors",
        "t4.safetensors",
    ]
    last = (models / "snn.safetensors").read_bytes()
    assert (models / "snn/t2.safetensors").read_bytes() == last
    tuned = json.loads((repository.root / "metrics/finetune_stdb.json").read_text())
    assert tuned["timesteps"] == 2
    client = mlflow.MlflowClient(f"sqlite:///{repository.root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("stdb").experiment_id
    (above,) = client.search_runs([experiment], "attributes.run_name = 'finetune_stdb'")
    for steps in (4, 2):
        (run,) = client.search_runs([experiment], f"attributes.run_name = 'T={steps}'")
        assert run.data.tags["mlflow.parentRunId"] == above.info.run_id
        assert run.info.status == "FINISHED"
        figures = tuned["by_timesteps"][str(steps)]
        assert run.data.metrics["accuracy/test"] == figures["accuracy"]["test"]
        (epoch,) = client.get_metric_history(run.info.run_id, "accuracy/validation")
        assert epoch.step == figures["epoch"]
        (version,) = client.search_model_versions(f"run_id = '{run.info.run_id}'")
        best = client.get_model_version_by_alias("stdb-digits", f"champion-t{steps}")
        assert best.version == version.version


def thresholds(repository):
    return json.loads((repository.root / "models/thresholds.json").read_text())["layers"]
