"""MLflow's address, database and experiment: found, made, refused, moved."""

import fcntl
import multiprocessing
import shutil
import sqlite3
import warnings
from pathlib import Path

import mlflow
import pytest

from pipeline.tracking import opening
from pipeline.tracking.address import fault_of, tracking_uri
from pipeline.tracking.database import adopt, alone
from pipeline.tracking.messages import End, Figure, Log, Start, key_of
from pipeline.tracking.opening import open_mlflow
from pipeline.tracking.outages import UnavailableError
from pipeline.tracking.tracker import Tracker
from tests.pipeline.support import mlflow_process


def begun(**message) -> Start:
    return Start(stage="work", job="work-k", **{"params": {}, **message})


@pytest.mark.parametrize(
    "uri",
    [
        *("http://127.0.0.1:5000", "https://me:s3cret@host/path", "sqlite:///mlflow.db"),
        *("sqlite:////a folder/ä.db", "postgresql+psycopg://me@host:5432/runs", "databricks"),
        *("mysql+pymysql://host/runs", "databricks://profile"),
    ],
)
def test_addresses_that_mlflow_knows_are_taken(uri):
    """Whoever listens there."""
    assert fault_of(uri) == ""


@pytest.mark.parametrize(
    "uri",
    [
        *("foo://x", "foo", "sqlite://", "sqlite:///", "sqlite:", "http://", "http://:80", "   "),
        *("http://host:port", "http://host:99999", "http://[bad", "file:///runs", "file:/runs"),
        *("./mlruns", "/mlruns", "s3://bucket", "postgresql://", "http://a b", "sqlite:///a\nb"),
        *("sqlite:///\0", "http://host\u2028", "http;//host"),
    ],
)
def test_an_address_of_nonsense_is_said_once_and_the_stage_goes_on(uri, monkeypatch, capfd):
    """In one line, with what is allowed, and no process is started for it."""
    if "\0" not in uri:  # which no environment variable can have
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        tracker = Tracker(begun())
        tracker.log({"loss": 0.5})
        tracker.figure(Path("missing.png"))
        assert tracker.run_id is None
        tracker.reporter()([{"epoch": 1, "loss": 0.5}])
        tracker.end("FINISHED")
        said = "".join(capfd.readouterr())
        assert said == f"warning: {fault_of(uri)}; MLflow gets nothing of this stage\n"
    fault = fault_of(uri)
    assert fault.startswith("MLFLOW_TRACKING_URI is ")
    assert "; allowed are http://HOST:PORT, " in fault
    assert fault.isprintable()


def test_no_password_of_a_wrong_address_is_shown():
    """However it is wrong."""
    assert "s3cret" not in fault_of("foo://me:s3cret@host")
    assert "s3cret" not in fault_of("http://me:s3@cret@host:port")


def test_a_folder_is_taken_where_mlflow_is_told_to_take_it(monkeypatch):
    """By its own variable."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert fault_of("file:///runs") == fault_of("./mlruns") == ""


def open_behind(barrier, uri: str, answers) -> None:
    """In a process of its own."""
    barrier.wait()
    try:
        answers.put(open_mlflow(begun())[1])
    except BaseException as error:
        answers.put(repr(error))
        raise


def open_at_once(uri: str, count: int) -> list[str]:
    """What processes that open MLflow at the same moment find."""
    context = multiprocessing.get_context("fork")  # MLflow is imported already
    barrier, answers = context.Barrier(count), context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        running = [
            context.Process(target=open_behind, args=(barrier, uri, answers)) for _ in range(count)
        ]
        for process in running:
            process.start()
    found = [answers.get(timeout=120) for _ in running]
    for process in running:
        process.join()
    return found


def test_processes_that_start_at_once_make_one_database(tmp_path, monkeypatch):
    """MLflow alone fails with "table … already exists"."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/new/shared.db")
    assert open_at_once(tracking_uri(), 4) == ["1"] * 4


def test_a_database_that_another_is_making_is_tried_again(database, monkeypatch):
    """Also one on a server, where there is no lock."""
    import sqlalchemy

    reach, failures = opening._reach, [1, 2]

    def busy(uri, message):
        if failures:
            failures.pop()
            raise sqlalchemy.exc.OperationalError("CREATE TABLE", {}, Exception("already exists"))
        return reach(uri, message)

    monkeypatch.setattr(opening, "_reach", busy)
    monkeypatch.setattr(opening, "AGAIN", (0.0, 0.0))
    assert open_mlflow(begun())[1] == "1"


def test_the_lock_is_beside_the_database(tmp_path):
    """One process at a time; another database is another lock; servers have their own."""
    with alone(f"sqlite:///{tmp_path}/a.db"), (tmp_path / "a.db.lock").open() as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with alone(f"sqlite:///{tmp_path}/b.db"), alone("http://host"):
            pass
    with (tmp_path / "a.db.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_an_experiment_of_another_name_is_made_and_used(database, monkeypatch):
    """MLflow's own variables say which, by its name or by its number."""
    client, number = open_mlflow(begun(experiment="my ünit/1"))
    assert client.get_experiment(number).name == "my ünit/1"
    assert open_mlflow(begun(experiment="ignored", experiment_id=number))[1] == number
    with pytest.raises(UnavailableError, match="MLFLOW_EXPERIMENT_ID is '77', which MLflow at"):
        open_mlflow(begun(experiment_id="77"))


def test_the_experiment_of_the_environment_is_the_stages(database, monkeypatch):
    """Through to the run."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    tracker = Tracker(begun())
    tracker.end("FINISHED")
    run = database.get_run(tracker.run_id)
    assert database.get_experiment(run.info.experiment_id).name == "ours"
    assert database.get_experiment_by_name("stdb") is None


def test_a_deleted_experiment_is_named_with_its_remedy(database, tmp_path):
    """The command restores it."""
    _, number = open_mlflow(begun())
    database.delete_experiment(number)
    with pytest.raises(UnavailableError) as caught:
        open_mlflow(begun())
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    remedy = f"MLFLOW_TRACKING_URI={uri} mlflow experiments restore --experiment-id {number}"
    assert f"MLflow's experiment 'stdb' was deleted; it is restored by {remedy}, or" in str(
        caught.value
    )
    database.restore_experiment(number)
    assert open_mlflow(begun())[1] == number


def with_artefact(folder: Path, text: str) -> str:
    """A run with a file; its id."""
    (folder / "note.txt").write_text(text)
    process = mlflow_process(text)
    assert process.take(Figure(path=str(folder / "note.txt")))
    process.take(End(status="FINISHED"))
    return process.run_id


def artefact_of(folder: Path, run_id: str) -> Path:
    """Where a run's file lies, by the database in a folder."""
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    uri = client.get_run(run_id).info.artifact_uri
    assert mlflow.artifacts.load_text(f"{uri}/note.txt")
    return Path(uri.removeprefix("file://"))


@pytest.mark.parametrize("renamed", [True, False], ids=["renamed", "copied"])
def test_a_repository_elsewhere_has_its_artefacts_there(tables, tmp_path, monkeypatch, renamed):
    """New ones and those of old runs, which are still read."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    shutil.copyfile(tables, old / "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(old))
    first = with_artefact(old, "first")
    if renamed:
        old.rename(new)
    else:
        shutil.copytree(old, new)
    monkeypatch.setenv("DVC_ROOT", str(new))
    second = with_artefact(new, "second")
    for run_id in (first, second):
        assert artefact_of(new, run_id).is_relative_to(new / "mlartifacts")
    if not renamed:
        assert artefact_of(old, first).is_relative_to(old / "mlartifacts")
        assert not (old / "mlartifacts" / second).exists()
    assert adopt(tracking_uri()) == ""


def test_artefacts_that_were_not_copied_along_stay_where_they_are(tables, tmp_path, monkeypatch):
    """They are read there."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
    shutil.copyfile(tables, old / "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(old))
    first = with_artefact(old, "first")
    shutil.copyfile(old / "mlflow.db", new / "mlflow.db")
    monkeypatch.setenv("DVC_ROOT", str(new))
    assert artefact_of(new, with_artefact(new, "second")).is_relative_to(new)
    assert artefact_of(new, first).is_relative_to(old)


def test_a_store_of_the_users_own_is_left_alone(database, tmp_path, monkeypatch):
    """An address of an object store, or a folder that has no database of this name beside it."""
    own = [(tmp_path / "disk" / "mlartifacts").as_uri(), "s3://bucket/mlartifacts"]
    Path(tmp_path / "disk" / "mlartifacts").mkdir(parents=True)
    for number, place in enumerate(own):
        database.create_experiment(f"own{number}", artifact_location=place)
    assert adopt(tracking_uri()) == ""
    with sqlite3.connect(tmp_path / "mlflow.db") as found:
        places = [place for (place,) in found.execute("SELECT artifact_location FROM experiments")]
    assert set(own) <= set(places)


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("accuracy/test", "accuracy/test"),
        ("top(5)", "top_5_"),
        ("a//b/../c/.", "a/b/c"),
        ("größe", "größe"),
        ("", "_"),
        ("..", "_"),
        ("x" * 300, "x" * 250),
        ("\udcff\0", "__"),
    ],
)
def test_names_are_such_that_mlflow_takes_them(name, taken):
    """MLflow refuses the whole batch for one of them."""
    assert key_of(name) == taken


def test_whatever_is_in_it_is_taken(database):
    """Long values, values that are no number, names of any kind, many of each."""
    odd = {"path": "\udcff\0ä" + "x" * 9000, "top(5)": None, **{f"k{n}": n for n in range(150)}}
    process = mlflow_process(
        "a", params=odd, everything=odd, inputs={f"d/{n}(1) é.png": "0" for n in range(150)}
    )
    values = [("top(5)", float("nan"), 1, 1), ("up", float("inf"), 1, 1), ("a//b", 1e308, 1, 2**40)]
    assert process.take(Log(entries=values))
    assert not process.failed
    run = database.get_run(process.run_id)
    assert len(run.data.params) == 152
    assert run.data.params["path"].endswith("xxx")
    assert len([tag for tag in run.data.tags if tag.startswith("input.")]) == 150
    assert run.data.metrics["up"] > 1e308
    assert {"top_5_", "a/b"} <= set(run.data.metrics)
