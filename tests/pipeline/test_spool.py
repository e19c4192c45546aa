"""What MLflow does not take in time is kept on disk, and sent later, in order and once."""

import shutil
import socket
import threading
import time

import mlflow
import pytest
from werkzeug.serving import make_server

from pipeline.tracking import spool
from pipeline.tracking import tracker as trackers
from pipeline.tracking.delivery import Run, earlier_runs
from pipeline.tracking.messages import Child, ChildEnd, End, Figure, Log, Start
from pipeline.tracking.send_kept import main as send_kept
from pipeline.tracking.spool import Journal, Kept, make_room
from pipeline.tracking.tracker import Reporter, Tracker
from tests.pipeline.support import mlflow_process

DEAD = f"{socket.gethostname()} 1 1"  # a process that has ended


def start(**message) -> Start:
    """The first message of a stage that has ended."""
    here = {"process": DEAD, "execution": DEAD, "origin": {"git.commit": "none"} | ORIGIN}
    return Start(stage="work", job="work-k", **{"params": {"stdb.alpha": 0.3}, **here, **message})


ORIGIN = {"git.dirty": "false", "dvc.experiment": "workspace"}


def left(*messages, **first) -> Journal:
    """A journal of a stage that has ended, of which MLflow has taken nothing."""
    journal = Journal()
    for message in (start(journal=journal.name, time=1000, **first), *messages):
        journal.add(message)
    journal.close()
    return journal


def send_all() -> None:
    """What the next stage does."""
    for run in earlier_runs():
        while run.waiting:
            run.send()
        run.close()


def log(value: float, step: int) -> Log:
    return Log(entries=[("loss", value, 2000 + step, step)])


def runs(client, name="work"):
    (experiment,) = [e for e in client.search_experiments() if e.name == "stdb"]
    return client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")


def test_a_run_that_was_left_is_completed(database, tmp_path):
    """Metrics, figures as they were then, its end and when; nothing is left on disk."""
    journal = Journal()
    journal.add(start(journal=journal.name, time=1000))
    picture = tmp_path / "curve.png"
    picture.write_text("then")
    path = journal.keep(picture)
    picture.unlink()  # files are replaced, never written in place
    picture.write_text("now")
    for message in (log(0.5, 1), Figure(path=path), End(status="FINISHED", time=9000)):
        journal.add(message)
    assert not earlier_runs()  # its stage lives
    journal.close()
    send_all()
    (run,) = runs(database)
    assert (run.info.status, run.info.start_time, run.info.end_time) == ("FINISHED", 1000, 9000)
    assert run.data.metrics == {"loss": 0.5}
    kept = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/curve.png")
    assert kept == "then"
    above = database.get_run(run.data.tags["mlflow.parentRunId"])
    assert above.info.status == "FINISHED"
    assert not list(spool.spool().iterdir())


def test_what_was_taken_is_not_sent_again(database):
    """Where a process ends between MLflow's answer and its note of it, the same is there once."""
    journal = left(log(0.5, 1), log(0.25, 2), End(status="FAILED"))
    run = Run(journal.folder, Kept(journal.folder))
    for _ in range(3):
        run.send()
    run.close()
    noted = journal.folder / spool.TAKEN
    assert noted.read_text().split() == ["1", "2", "3"]
    noted.write_text("1\n2\n")
    assert [number for number, _ in Run(journal.folder, Kept(journal.folder)).waiting] == [1, 3, 4]
    send_all()
    (only,) = runs(database)
    history = database.get_metric_history(only.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 0.5), (2, 0.25)]
    assert only.info.status == "FAILED"


def test_runs_are_sent_in_the_order_in_which_they_were(database):
    """And by the MLflow that they were for only."""
    left(log(0.5, 1), End(status="FAILED"))
    elsewhere = left(End(status="FINISHED"), address="http://elsewhere")
    left(log(0.25, 2), End(status="FINISHED"))
    send_all()
    found = sorted(runs(database), key=lambda run: run.data.tags["journal"])
    assert [run.data.metrics["loss"] for run in found] == [0.5, 0.25]
    assert list(spool.spool().iterdir()) == [elsewhere.folder]


def test_a_stage_that_was_killed_with_its_process_goes_on_in_its_run(database):
    """What it had said is sent, and its run is not closed."""
    journal = left(log(0.5, 1))
    assert Kept(journal.folder).messages()
    send_all()
    (run,) = runs(database)
    assert run.info.status == "RUNNING"
    again = mlflow_process("k")
    assert again.run_id == run.info.run_id


def test_a_run_whose_end_waits_is_not_gone_on_in(database):
    """Nor closed as killed: its messages say how it ended."""
    journal = left(End(status="FINISHED"))
    run = Run(journal.folder, Kept(journal.folder))
    run.send()
    run.close()
    assert mlflow_process("k").run_id != run.process.run_id
    assert database.get_run(run.process.run_id).info.status == "RUNNING"
    send_all()
    assert database.get_run(run.process.run_id).info.status == "FINISHED"


def test_a_late_end_closes_no_execution_that_goes_on(database):
    """Its next stage runs."""
    now = mlflow_process("other", execution="here 2 2")
    left(End(status="FAILED"), execution="here 2 2")
    send_all()
    assert database.get_run(now.parent_id).info.status == "RUNNING"


def test_a_figure_that_finds_no_room_is_kept_and_the_rest_goes_on(database, tmp_path, monkeypatch):
    """A full disk under mlartifacts: the run is closed, and the figure is sent later."""
    (tmp_path / "x.png").write_text("picture")
    journal = Journal()
    journal.add(start(journal=journal.name))
    for message in (Figure(path=journal.keep(tmp_path / "x.png")), End(status="FINISHED")):
        journal.add(message)
    journal.close()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "log_artifact", full)
        send_all()
    (run,) = runs(database)
    assert run.info.status == "FINISHED"
    assert journal.folder.is_dir()
    send_all()
    (run,) = runs(database)
    assert run.info.status == "FINISHED"
    assert [file.path for file in database.list_artifacts(run.info.run_id)] == ["x.png"]
    assert not journal.folder.exists()


def test_a_line_that_was_cut_is_left_out(database):
    """A kill or a full disk in the middle of it."""
    journal = left(log(0.5, 1))
    with (journal.folder / spool.MESSAGES).open("a") as file:
        file.write('3 {"kind": "log", "entr')
    send_all()
    assert runs(database)[0].data.metrics == {"loss": 0.5}


def test_a_full_disk_under_the_journal_is_said_once(database, capfd, monkeypatch):
    """Nothing is half there, and messages still go to MLflow."""
    journal = Journal()
    journal.add(start(journal=journal.name))
    size = (journal.folder / spool.MESSAGES).stat().st_size
    real = journal.file

    class Full:
        fileno = real.fileno
        close = real.close

        @staticmethod
        def write(data):
            return real.write(data[:5])

    journal.file = Full()
    for step in (1, 2):
        assert journal.add(log(0.5, step)).startswith(f"{step + 1} ")
    assert (journal.folder / spool.MESSAGES).stat().st_size == size
    said = capfd.readouterr().err
    assert said.count("warning: ") == 1
    assert "No space left on device" in said


def test_a_folder_that_cannot_be_written_stops_nothing(database, tmp_path, capfd):
    """Messages go to MLflow, and it is said that they are not kept."""
    (tmp_path / ".results").write_text("a file, where a folder would be")
    tracker = Tracker(start())
    tracker.log({"loss": 0.5})
    tracker.end("FINISHED")
    said = capfd.readouterr().err
    assert said.count("warning: ") == 1
    assert "what MLflow does not take at once is lost" in said
    assert database.get_run(tracker.run_id).data.metrics == {"loss": 0.5}


def test_what_waits_is_bounded(database, capfd, monkeypatch):
    """The oldest runs give way, and a run's metrics beyond a size; its end never does."""
    old, new = left(log(0.5, 1)), left(log(0.25, 1))
    size = (new.folder / spool.MESSAGES).stat().st_size
    kept = make_room(spool.waiting(spool.spool()), room=size + 10)
    assert [one.folder for one in kept] == [new.folder]
    assert not old.folder.exists()
    monkeypatch.setattr(spool, "LIMIT", 600)
    journal = left(*[log(0.5, step) for step in range(20)], End(status="FINISHED"))
    assert journal.full
    assert journal.whole
    kinds = [message.kind for _, message in Kept(journal.folder).messages()]
    assert kinds[-1] == "end"
    assert 1 <= kinds.count("log") < 20 or kinds == ["start", "end"]


def test_reports_of_workers_are_kept_too(database, capfd, monkeypatch):
    """Beside the journal, and sent before the run's end."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/none/mlflow.db")
    journal = Journal()
    reporter = Reporter("some-run", journal.folder)
    reporter([{"epoch": 1, "loss": 0.5}])
    reporter([{"epoch": 2, "loss": 0.25}])
    assert capfd.readouterr().out.count("is kept and sent later") == 1
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    journal.add(start(journal=journal.name))
    journal.add(End(status="FINISHED"))
    journal.close()
    send_all()
    (run,) = runs(database)
    history = database.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 0.5), (2, 0.25)]


def test_reports_of_several_t_are_kept_for_the_runs_of_each(database):
    """They come behind the end of those runs, which stay ended."""
    journal = Journal()
    reporter = Reporter(None, journal.folder)
    reporter(
        [{"epoch": 1, "timesteps": 4, "loss": 0.5}, {"epoch": 2, "timesteps": 2, "loss": 0.25}]
    )
    ends = [ChildEnd(name=f"T={steps}", status="FINISHED") for steps in (4, 2)]
    begins = [Child(name=f"T={steps}", params={}) for steps in (4, 2)]
    for message in (start(journal=journal.name), *begins, *ends, End(status="FINISHED")):
        journal.add(message)
    journal.close()
    send_all()
    for name, step, value in (("T=4", 1, 0.5), ("T=2", 2, 0.25)):
        (run,) = runs(database, name)
        (found,) = database.get_metric_history(run.info.run_id, "loss")
        assert (found.step, found.value) == (step, value)
        assert run.info.status == "FINISHED"


def test_a_command_sends_what_waits(database, capfd):
    """Without a stage; its status says whether something waits on."""
    left(log(0.5, 1), End(status="FINISHED"))
    assert send_kept([]) == 0
    assert capfd.readouterr().out == "MLflow: 1 of 1 runs that waited are there\n"
    assert runs(database)[0].info.status == "FINISHED"


class Gate:
    """Stands before MLflow's server: lets calls through, slowly, or not at all."""

    def __init__(self, app) -> None:
        self.app, self.open, self.seconds = app, True, 0.0
        self.asked = threading.Event()

    def __call__(self, environ, respond):
        self.asked.set()
        time.sleep(self.seconds)
        if not self.open:
            respond("503 Service Unavailable", [("Content-Type", "text/plain")])
            return [b"down"]
        return self.app(environ, respond)


@pytest.fixture(scope="module")
def server(tables, tmp_path_factory):
    """MLflow's server behind a gate; its address and database."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copyfile(tables, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{folder / 'mlflow.db'}")
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", (folder / "store").as_uri())
        from mlflow.server import app

        gate = Gate(app.wsgi_app)
        listening = make_server("127.0.0.1", 0, gate, threaded=True)
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        gate.uri = f"http://127.0.0.1:{listening.server_port}"
        gate.client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
        yield gate
        listening.shutdown()
        thread.join()


@pytest.fixture
def gate(server, tmp_path, monkeypatch):
    """The server, open and quick, and the stages' way to it."""
    server.open, server.seconds = True, 0.0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", tmp_path.name)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(trackers, "BEHIND", 60.0)  # a busy machine
    return server


def logged(client, name: str) -> list:
    number = client.get_experiment_by_name(name).experiment_id
    return client.search_runs([number], "attributes.run_name = 'work'")


def a_stage(steps: int) -> Tracker:
    tracker = Tracker(start())
    for step in range(steps):
        tracker.log({"loss": 1 / (1 + step)}, step)
    return tracker


def steps_of(client, run) -> list[int]:
    return [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")]


def test_a_dead_server_loses_nothing(gate, tmp_path, capfd):
    """One line; the next stage sends it once the server is back, before its own."""
    gate.open = False
    tracker = a_stage(5)
    tracker.end("FINISHED")
    said = capfd.readouterr().err
    assert said.count("warning: ") == 1
    assert f"is kept in {tmp_path}/.results/mlflow and sent by the next stage" in said
    assert tracker.run_id is None
    gate.open = True
    a_stage(2).end("FINISHED")
    said = capfd.readouterr().err
    assert "warning" not in said
    assert "1 earlier run(s) that waited on disk are there" in said
    first, second = sorted(logged(gate.client, tmp_path.name), key=lambda r: r.info.start_time)
    assert steps_of(gate.client, first) == [0, 1, 2, 3, 4]
    assert steps_of(gate.client, second) == [0, 1]
    assert first.info.status == second.info.status == "FINISHED"
    assert not list(spool.spool().iterdir())


def test_a_slow_server_loses_nothing(gate, tmp_path, monkeypatch, capfd):
    """The stage waits only so long; the rest is sent by the next one, in the same run."""
    monkeypatch.setattr(trackers, "PATIENCE", 0.5)
    tracker = a_stage(60)
    assert tracker.run_id
    gate.seconds = 0.3
    began = time.monotonic()
    tracker.end("FINISHED")
    assert time.monotonic() - began < 5
    assert "is slow; what it has not taken by now is kept in" in capfd.readouterr().err
    gate.seconds = 0.0
    assert send_kept([]) == 0
    (run,) = logged(gate.client, tmp_path.name)
    assert run.info.run_id == tracker.run_id
    assert steps_of(gate.client, run) == list(range(60))
    assert run.info.status == "FINISHED"


def test_a_server_that_comes_back_gets_all_in_the_same_stage(gate, tmp_path, capfd):
    """Attempts go on while the stage runs."""
    gate.open = False
    tracker = a_stage(3)
    assert tracker.run_id is None  # said by now
    gate.open = True
    gate.asked.clear()
    assert gate.asked.wait(30)
    tracker.end("FINISHED")
    said = capfd.readouterr().err
    assert said.count("warning: ") == 1
    assert "answers again" in said
    (run,) = logged(gate.client, tmp_path.name)
    assert steps_of(gate.client, run) == [0, 1, 2]


def test_the_death_of_mlflows_process_loses_nothing(gate, tmp_path, capfd):
    """By the system's lack of memory, say: it is told, and the run is completed later."""
    tracker = a_stage(3)
    assert tracker.run_id
    tracker._process.kill()
    tracker.log({"loss": 0.125}, 7)
    tracker.end("FINISHED")
    assert "lost its process (status -9)" in capfd.readouterr().err
    send_kept([])
    (run,) = logged(gate.client, tmp_path.name)
    assert steps_of(gate.client, run) == [0, 1, 2, 7]
    assert run.info.status == "FINISHED"
