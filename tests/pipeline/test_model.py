"""The registered model: what comes out of it in a process that knows nothing of this project."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import boto3
import mlflow
import numpy as np
import psutil
import pytest
import torch
import yaml
from moto.server import ThreadedMotoServer

import stdb
from pipeline.tracking import tracker as trackers
from pipeline.tracking.messages import About, End, Log, Model, Start
from pipeline.tracking.registry import REQUIREMENTS
from pipeline.tracking.tracker import Tracker
from tests.pipeline.support import free_port, mlflow_process

NETWORK = {"architecture": "vgg5", "in_channels": 1, "image_size": 8, "num_classes": 4,
           "width": 0.1, "hidden": 8}  # fmt: skip
ABOUT = About(accuracy=0.5, timesteps=6, classes=list("abcd"), architecture="vgg5")
NAME = "stdb-digits"
PIXELS = stdb.Normalisation()
LOAD = """
import sys, mlflow, numpy as np
assert not any("stdb" in name for name in sys.modules)
model = mlflow.pyfunc.load_model(f"models:/{sys.argv[1]}@champion")
images = np.load(sys.argv[2])
np.savez(sys.argv[3], whole=model.predict(images),
         one=model.predict(images[2:3]), short=model.predict(images, params={"timesteps": 2}))
"""


@pytest.fixture
def network(tmp_path):
    """A network, its file, images."""
    torch.manual_seed(0)
    snn = stdb.convert(stdb.build_network(**NETWORK), stdb.PoissonEncoder(1)).eval()
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    stdb.balance_thresholds(snn, PIXELS(images), 6, percentile=90)
    path = tmp_path / "snn.safetensors"
    stdb.save(snn, path, network=NETWORK, timesteps=6, classes=list("abcd"))
    return snn, path, images


def register(client, path: Path, images, accuracy: float, timesteps: int = 6):
    """As finetune_stdb does at its end."""
    process = mlflow_process(f"{accuracy}")
    about = ABOUT.model_copy(update={"accuracy": accuracy, "timesteps": timesteps})
    process.model(Model(path=str(path), name=NAME, example=images[:1].tolist(), about=about))
    assert client.get_run(process.run_id).info.status == "RUNNING"
    process.end(End(status="FINISHED"))
    return process


def elsewhere(folder: Path) -> dict[str, str]:
    """The environment of a process that does not find this project."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}", "PATH": path}


def test_a_clean_process_gets_probabilities(database, network, tmp_path):
    """By the alias alone: those of the network here, each image alike in any company."""
    snn, path, images = network
    register(database, path, images, 0.5)
    np.save(tmp_path / "images.npy", images.numpy())
    (tmp_path / "other").mkdir()
    subprocess.run(
        [sys.executable, "-c", LOAD, NAME, str(tmp_path / "images.npy"), str(tmp_path / "out.npz")],
        cwd=tmp_path / "other", env=elsewhere(tmp_path), check=True,
    )  # fmt: skip
    found = np.load(tmp_path / "out.npz")
    ids = torch.zeros(5, dtype=torch.int64)
    with torch.no_grad():
        expected = snn(PIXELS(images), 6, sample_ids=ids).softmax(1).numpy()
        short = snn(PIXELS(images), 2, sample_ids=ids).softmax(1).numpy()
    assert found["whole"].shape == (5, 4)
    assert np.ptp(expected, axis=0).max() > 0.01  # images differ, so the comparison says something
    np.testing.assert_allclose(found["whole"], expected, atol=1e-6)
    np.testing.assert_allclose(found["one"], expected[2:3], atol=1e-6)
    np.testing.assert_allclose(found["short"], short, atol=1e-6)


def test_the_champion_is_the_best_on_validation(database, network):
    """A worse network is registered and changes nothing; one as good or better takes over."""
    _, path, images = network
    champions = []
    for accuracy in (0.6, 0.5, 0.6, 0.7):
        register(database, path, images, accuracy)
        champions.append(database.get_model_version_by_alias(NAME, "champion").version)
    assert [int(version) for version in champions] == [1, 1, 3, 4]
    tags = database.get_model_version(NAME, "2").tags
    assert tags == {"accuracy.validation": "0.5", "timesteps": "6"}


def test_every_t_has_its_champion(database, network):
    """For which a better network for more steps, and one of an older version's, is no rival."""
    _, path, images = network
    found = []
    for accuracy, timesteps in ((0.8, 8), (0.5, 1), (0.7, 8), (0.6, 1)):
        register(database, path, images, accuracy, timesteps)
        aliases = ("champion", "champion-t8", "champion-t1")
        known = database.get_registered_model(NAME).aliases
        found.append([int(known.get(alias, 0)) for alias in aliases])
    assert found == [[1, 1, 0], [1, 1, 2], [1, 1, 2], [1, 1, 4]]
    database.delete_registered_model_alias(NAME, "champion-t8")  # which 0.2.0 did not give
    register(database, path, images, 0.75, 8)
    assert "champion-t8" not in database.get_registered_model(NAME).aliases


def test_the_networks_of_one_run_are_of_its_children(database, network):
    """Each is a version of its own, once; the execution leads to all of them."""
    _, path, images = network
    process = mlflow_process("a")
    for timesteps in (6, 3, 3):
        about = ABOUT.model_copy(update={"timesteps": timesteps})
        name = f"T={timesteps}"
        model = Model(path=str(path), name=NAME, example=images[:1].tolist(), about=about)
        process.model(model.model_copy(update={"child": name}))
        assert database.get_run(process.children[name]).info.status == "RUNNING"
    versions = database.search_model_versions(f"name = '{NAME}'")
    assert {v.run_id for v in versions} == {process.children["T=6"], process.children["T=3"]}
    assert len(versions) == 2
    shown = database.get_run(process.parent_id).outputs.model_outputs
    assert {f"models:/{model.model_id}" for model in shown} == {v.source for v in versions}
    assert database.get_run(process.run_id).info.status == "RUNNING"


def test_the_registry_says_what_a_model_is(database, network):
    """How to load it, how good each version is; the execution's own run leads to it.

    What somebody wrote there stays.
    """
    _, path, images = network
    process = register(database, path, images, 0.5)
    assert f"models:/{NAME}@champion" in database.get_registered_model(NAME).description
    version = database.get_model_version(NAME, "1")
    assert version.description.startswith("vgg5, T = 6: 50.00% on validation; commit ")
    assert f'load_model("models:/{NAME}/{version.version}")' in version.description
    made, shown = (
        [model.model_id for model in database.get_run(run).outputs.model_outputs]
        for run in (process.run_id, process.parent_id)
    )
    assert made == shown
    assert database.get_logged_model(made[0]).tags["mlflow.source.name"] == "dvc repro work"
    database.update_registered_model(NAME, "ours")
    register(database, path, images, 0.4)
    assert database.get_registered_model(NAME).description == "ours"


def test_a_model_says_what_it_takes_and_needs(database, network):
    """Signature, example, pinned requirements of its own."""
    _, path, images = network
    register(database, path, images, 0.5)
    info = mlflow.models.get_model_info(f"models:/{NAME}@champion")
    (given,) = info.signature.inputs.inputs
    assert (given.shape, given.type) == ((-1, 1, 8, 8), np.dtype("uint8"))
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{NAME}@champion"))
    needed = (folder / "requirements.txt").read_text().split()
    assert [line.partition("==")[0] for line in needed] == sorted(REQUIREMENTS)
    assert all("==" in line for line in needed)
    assert info.metadata["classes"] == list("abcd")
    assert (folder / "code" / "stdb" / "network.py").exists()


def test_the_champion_of_a_renamed_repository_is_found(tables, network, tmp_path, monkeypatch):
    """Its files are where the database lies now."""
    _, path, images = network
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    shutil.copyfile(tables, old / "mlflow.db")
    monkeypatch.setenv("DVC_ROOT", str(old))
    register(mlflow.MlflowClient(f"sqlite:///{old / 'mlflow.db'}"), path, images, 0.5)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # which MLflow has set
    old.rename(new)
    monkeypatch.setenv("DVC_ROOT", str(new))
    mlflow_process("next")
    mlflow.set_tracking_uri(f"sqlite:///{new / 'mlflow.db'}")
    monkeypatch.chdir(new)
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    assert model.predict({"images": images.numpy()}).shape == (5, 4)


def test_a_model_that_was_registered_is_not_registered_again(database, network, capfd):
    """Where MLflow took it and its answer was lost; the run keeps the status that it had."""
    _, path, images = network
    process = register(database, path, images, 0.5)
    about = ABOUT.model_copy(update={"accuracy": 0.5})
    message = Model(path=str(path), name=NAME, example=images[:1].tolist(), about=about)
    assert process.take(message)
    assert "did not take" not in capfd.readouterr().err
    assert len(database.search_model_versions(f"name = '{NAME}'")) == 1
    assert database.get_run(process.run_id).info.status == "FINISHED"


def test_a_served_model_holds_no_pickle(database, network):
    """Only code that is read as such, and files that are data; the network is stdb's."""
    _, path, images = network
    register(database, path, images, 0.5)
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{NAME}@champion"))
    about = yaml.safe_load((folder / "MLmodel").read_text())["flavors"]["python_function"]
    assert about["loader_module"] == "mlflow.pyfunc.loaders.code_model"
    assert Path(about["model_code_path"]).name == "served_model.py"
    assert "python_model" not in about
    files = [file for file in folder.rglob("*") if file.is_file()]
    data = {file for file in files if file.suffix not in (".py", ".pyc", ".so")}
    assert not [file.name for file in data if file.read_bytes()[:1] == b"\x80"]
    kinds = {"", ".txt", ".yaml", ".json", ".safetensors", ".typed"}
    assert {file.suffix for file in data} <= kinds


def test_a_registry_that_fails_is_said_and_the_run_goes_on(database, tmp_path, capfd):
    """Accuracy and figures are still logged."""
    process = mlflow_process("a")
    missing = str(tmp_path / "missing")
    assert process.take(Model(path=missing, name=NAME, example=[[[[0]]]], about=ABOUT))
    assert f"did not take '{missing}'" in capfd.readouterr().err
    process.log(Log(entries=[("accuracy/test", 0.5, 1, 0)]))
    process.end(End(status="FINISHED"))
    run = database.get_run(process.run_id)
    assert run.data.metrics["accuracy/test"] == 0.5
    assert run.info.status == "FINISHED"


@contextmanager
def running(command: list[str], folder: Path, address: str, **environment: str):
    """A server, from the moment it answers at ``address`` on; afterwards nothing is left of it."""
    log = folder / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            command, cwd=folder, env=elsewhere(folder) | environment, stdout=file, stderr=file
        )
    try:
        deadline = time.monotonic() + 180
        while True:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                urllib.request.urlopen(address, timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        yield
    finally:
        for process in [*psutil.Process(server.pid).children(recursive=True), server]:
            process.kill()
        server.wait()


@pytest.mark.slow
def test_a_server_answers_a_post_of_images(database, network, tmp_path):
    """`mlflow models serve` on the champion."""
    snn, path, images = network
    register(database, path, images, 0.5)
    port = free_port()
    command = ["mlflow", "models", "serve", "-m", f"models:/{NAME}@champion", "-p", str(port),
               "-h", "127.0.0.1", "--env-manager", "local"]  # fmt: skip
    with running(command, tmp_path, f"http://127.0.0.1:{port}/ping"):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps({"inputs": {"images": images.tolist()}}).encode(),
            {"Content-Type": "application/json"},
        )
        answer = json.load(urllib.request.urlopen(request, timeout=60))
    ids = torch.zeros(5, dtype=torch.int64)
    with torch.no_grad():
        expected = snn(PIXELS(images), 6, sample_ids=ids).softmax(1).numpy()
    np.testing.assert_allclose(np.array(answer["predictions"]), expected, atol=1e-5)


def log_one_of_each(folder: Path, path: Path, images) -> Tracker:
    """As a stage does: a metric, a figure, a model."""
    (folder / "curve.png").write_bytes(b"picture")
    tracker = Tracker(
        Start(stage="finetune_stdb", job="finetune_stdb-k", params={"stdb.alpha": 0.3})
    )
    tracker.log({"accuracy/test": 0.75})
    tracker.figure(folder / "curve.png")
    tracker.model(path, NAME, images[:1].tolist(), ABOUT)
    tracker.end("FINISHED")
    return tracker


def check_one_of_each(client, run_id: str) -> None:
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["accuracy/test"] == 0.75
    assert [file.path for file in client.list_artifacts(run_id)] == ["curve.png"]
    assert client.get_model_version_by_alias(NAME, "champion").run_id == run_id
    assert client.get_run(run.data.tags["mlflow.parentRunId"]).info.status == "FINISHED"


def server_command(folder: Path, port: int, *more: str) -> list[str]:
    return ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{folder / 'server.db'}", *more]  # fmt: skip


@pytest.mark.slow
def test_a_tracking_server_gets_runs_figures_and_the_model(network, tmp_path, monkeypatch):
    """All over HTTP, artefacts too, with nothing but MLflow's own MLFLOW_TRACKING_URI."""
    _, path, images = network
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    command = server_command(tmp_path, port, "--artifacts-destination", str(tmp_path / "store"))
    with running(command, tmp_path, f"{uri}/health", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        tracker = log_one_of_each(tmp_path, path, images)
        check_one_of_each(mlflow.MlflowClient(uri), tracker.run_id)
    assert not (tmp_path / "mlflow.db").exists()


@pytest.fixture
def bucket(monkeypatch):
    """An empty S3 bucket on this machine, and the variables that lead to it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1", "MLFLOW_S3_ENDPOINT_URL": endpoint,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    store = boto3.client("s3", endpoint_url=endpoint)
    store.create_bucket(Bucket="team")
    yield store
    server.stop()


@pytest.mark.slow
def test_a_server_with_passwords_and_artefacts_in_s3(network, tmp_path, monkeypatch, bucket, capfd):
    """MLflow's own variables are all there is to say; a wrong password is said, without it."""
    _, path, images = network
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    (tmp_path / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = READ\n"
        f"database_uri = sqlite:///{tmp_path / 'auth.db'}\n"
        "admin_username = admin\nadmin_password = a-long-password\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    command = server_command(
        tmp_path, port, "--app-name", "basic-auth", "--no-serve-artifacts",
        "--default-artifact-root", "s3://team/runs",
    )  # fmt: skip
    environment = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "key",
        "MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "auth.ini"),
    }
    for limit in ("PATIENCE", "BEHIND", "OPENING"):  # a busy machine
        monkeypatch.setattr(trackers, limit, 300.0)
    with running(command, tmp_path, f"{uri}/health", **environment):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-wrong-password")
        tracker = Tracker(Start(stage="finetune_stdb", job="finetune_stdb-k", params={}))
        tracker.end("FINISHED")
        assert tracker.run_id is None
        said = capfd.readouterr().err
        assert "going on without" in said
        assert "a-wrong-password" not in said
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-long-password")
        tracker = log_one_of_each(tmp_path, path, images)
        check_one_of_each(mlflow.MlflowClient(uri), tracker.run_id)
    kept = [entry["Key"] for entry in bucket.list_objects_v2(Bucket="team")["Contents"]]
    assert any(key.endswith(f"{tracker.run_id}/artifacts/curve.png") for key in kept)
    assert any(key.endswith("snn.safetensors") for key in kept)
