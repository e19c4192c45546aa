"""MLflow is a view: what is logged, where from, and that its absence stops nothing."""

import json
import math
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import mlflow
import pytest

from pipeline.tracking import tracker as trackers
from pipeline.tracking.address import without_secrets
from pipeline.tracking.messages import (
    About,
    Child,
    ChildEnd,
    Dataset,
    End,
    Entry,
    Figure,
    Log,
    Message,
    Model,
    Start,
    Summary,
    Tags,
    entries,
    from_line,
    logs_of_rows,
    to_line,
)
from pipeline.tracking.mlflow_process import MlflowProcess
from pipeline.tracking.origin import GENERATED, execution, provenance, this_process
from pipeline.tracking.tracker import Reporter, Tracker
from tests.pipeline.support import free_port, mlflow_process


def begun(**message) -> Start:
    """The first message of a stage."""
    return Start(stage="work", job="work-k", **{"params": {}, **message})


SET = Dataset(name="digits", digest="ab", path="x", context="test", profile={"shape": [1, 8, 8]})
ABOUT = About(accuracy=0.5, timesteps=3, classes=["a", "b"], architecture="vgg5")
ENTRIES: list[Entry] = [("accuracy/test", 0.1 + 0.2, 1_700_000_000_123, 7), ("loss", 5e-324, 0, 0)]
MESSAGES = [
    begun(
        params={"stdb.clip": None, "stdb.milestones": [0.6, 0.8], "network.architecture": "vgg5"},
        inputs={"a.txt": "0123"},
        everything={"stdb.learn_leaks": False},
        datasets=[SET],
        searches=True,
        process="here 1 1",
        execution="here 2 2",
    ),
    Log(entries=ENTRIES),
    Log(entries=ENTRIES, child="trial-1"),
    Tags(tags={"precision": "bf16"}),
    Figure(path="plots/ä.png"),
    Summary(entries=ENTRIES, text="**T = 3**\n\n| a |\r\n\u2028", path="index.html"),
    Model(path="snn.safetensors", name="stdb-digits", example=[[[[0, 255]]]], about=ABOUT),
    Model(path="t4", name="stdb-digits", example=[[[[0]]]], about=ABOUT, child="T=4"),
    Child(name="trial-1", params={"alpha": 0.3}),
    ChildEnd(name="trial-1", status="FAILED"),
    End(status="FAILED", interrupted=True),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.kind)
def test_a_message_is_the_same_behind_the_pipe(message):
    """Of every kind, on one line, whatever is in it."""
    line = to_line(message)
    assert line.index("\n") == len(line) - 1
    assert from_line(line) == message


def test_every_kind_of_message_goes_through_the_pipe():
    """So that a new one is among those above."""
    assert {type(message) for message in MESSAGES} == set(get_args(Message))


def test_metrics_that_are_no_number_go_through_the_pipe():
    """A loss that diverged is what somebody wants to see."""
    values = {"nan": math.nan, "up": math.inf, "down": -math.inf}
    read = from_line(to_line(Log(entries=entries(values, 3))))
    assert isinstance(read, Log)
    found = {key: value for key, value, _, _ in read.entries}
    assert math.isnan(found.pop("nan"))
    assert found == {"up": math.inf, "down": -math.inf}


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    """A root of its own, where messages to MLflow are kept."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))


@pytest.fixture
def nobody(monkeypatch):
    """A tracking server that does not answer."""
    uri = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def test_a_server_that_does_not_answer_is_said_once_and_soon(nobody, capfd):
    """The work goes on without MLflow after seconds, with one line for all that is not logged."""
    start = time.monotonic()
    tracker = Tracker(begun(params={"stdb.alpha": 0.3}))
    tracker.log({"accuracy": 0.5})
    tracker.figure(Path("x.png"))
    assert time.monotonic() - start < 1  # nobody waits for it
    tracker.end("FINISHED")
    assert time.monotonic() - start < 30
    assert capfd.readouterr().err.count(f"warning: MLflow at {nobody} does not answer") == 1
    assert tracker.run_id is None


def test_a_job_goes_on_where_the_server_is_gone(nobody, capfd):
    """A report that MLflow does not take is said once; later ones do not wait for it."""
    reporter = Reporter("some-run")
    rows = [{"epoch": 1, "accuracy": 0.5}]
    reporter(rows)
    start = time.monotonic()
    reporter(rows)
    assert time.monotonic() - start < 0.5
    assert capfd.readouterr().out.count("did not take a report") == 1


def test_a_run_has_parameters_origin_and_metrics_by_epoch(tmp_path, monkeypatch):
    """Into a database at the root, MLFLOW_TRACKING_URI unset; more rows than one batch takes."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("DVC_STAGE", "work")
    tracker = Tracker(
        begun(params={"stdb.alpha": 0.3, "data.path": None}, inputs={"a.txt": "0123"})
    )
    rows = [{"epoch": e, "loss": 1 / e, "accuracy": e / 600} for e in range(1, 601)]
    Reporter(tracker.run_id)(rows[:1])
    Reporter(tracker.run_id)(rows[1:])
    tracker.log({"accuracy/test": 0.75})
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert client.get_run(tracker.run_id).info.status == "RUNNING"
    tracker.end("FAILED")
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FAILED"
    assert run.data.params == {"stdb.alpha": "0.3", "data.path": "None"}
    assert run.data.metrics["accuracy/test"] == 0.75
    assert run.data.tags["input.a.txt"] == "0123"
    assert run.data.tags["dvc.stage"] == "work"
    history = client.get_metric_history(tracker.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(row["epoch"], row["loss"]) for row in rows]
    assert "epoch" not in run.data.metrics


def test_the_commit_is_dirty_where_the_code_is_and_not_where_results_are(tmp_path, monkeypatch):
    """What a run itself writes does not make its own origin doubtful; an edit of code does."""
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.email=test@example.invalid", "-c", "user.name=test"]
    Path("code.py").write_text("1")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "start"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    for name in GENERATED:
        path = Path(name.replace("**/", "ablation/").replace("**", "x.json").replace("*", "x"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("new")
    assert provenance()["git.commit"] == head.stdout.strip()
    assert provenance()["git.dirty"] == "false"
    Path("code.py").write_text("2")
    assert provenance()["git.dirty"] == "true"


def test_without_git_the_origin_is_none(tmp_path, monkeypatch):
    """An unpacked archive of the repository still runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance()["git.commit"] == "none"


def killed(client, run_id: str) -> None:
    """As if the process had been killed: another one may have its number now."""
    host, number, _ = client.get_run(run_id).data.tags["process"].split(" ")
    client.set_tag(run_id, "process", f"{host} {number} 1")


def test_an_interrupted_run_is_gone_on_in_by_its_own_job_and_closed_by_others(database):
    """A kill leaves a run RUNNING; the next stage that starts finds out that nobody runs it."""
    mine, others, alive = (mlflow_process(key).run_id for key in ("a", "b", "c"))
    killed(database, mine)
    killed(database, others)
    again = mlflow_process("a")
    assert again.run_id == mine
    assert database.get_run(others).info.status == "KILLED"
    assert database.get_run(alive).info.status == "RUNNING"
    again.end(End(status="FAILED", interrupted=True))
    assert database.get_run(mine).info.status == "FAILED"
    third = mlflow_process("a")
    assert third.run_id == mine
    assert database.get_run(mine).info.status == "RUNNING"
    third.end(End(status="FINISHED"))
    assert mlflow_process("a").run_id != mine


def test_a_trial_is_not_taken_for_its_sweep(database):
    """Both have the job; the trials of a sweep that was killed are closed until they go on."""
    first = mlflow_process("a")
    first.take(Child(name="trial-1", params={}))
    for run_id in (first.children["trial-1"], first.run_id):
        killed(database, run_id)
    assert mlflow_process("a").run_id == first.run_id
    assert database.get_run(first.children["trial-1"]).info.status == "KILLED"


def rows_of(timesteps: int, *epochs: int) -> list[dict[str, float]]:
    """What a fine-tuning at several T reports."""
    return [{"epoch": e, "timesteps": timesteps, "loss": e / 8} for e in epochs]


def children(client, run_id: str) -> dict[str, str]:
    """Name → id of the runs below one; no name twice."""
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{run_id}'")
    names = {run.info.run_name: run.info.run_id for run in found}
    assert len(names) == len(found)
    return names


def losses(client, run_id: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client.get_metric_history(run_id, "loss")]


def test_each_t_has_a_run_below_its_stages(database):
    """Opened with its first epoch; gone on in after a kill, in the stage's own run."""
    first = mlflow_process("a")
    for message in logs_of_rows([*rows_of(8, 1, 2), *rows_of(4, 3), {"epoch": 9, "loss": 1.0}]):
        first.take(message)
    there = children(database, first.run_id)
    assert set(there) == {"T=8", "T=4"}
    assert losses(database, there["T=8"]) == [(1, 0.125), (2, 0.25)]
    assert losses(database, first.run_id) == [(9, 1.0)]
    assert set(database.get_run(there["T=8"]).data.metrics) == {"loss"}
    assert database.get_run(there["T=8"]).data.tags["git.commit"] == provenance()["git.commit"]
    first.child_end(ChildEnd(name="T=8", status="FINISHED"))
    for run_id in (there["T=4"], first.run_id):
        killed(database, run_id)
    again = mlflow_process("a")
    assert again.run_id == first.run_id
    assert database.get_run(there["T=4"]).info.status == "KILLED"
    for message in logs_of_rows(rows_of(4, 4)):
        again.take(message)
    assert database.get_run(there["T=4"]).info.status == "RUNNING"
    mlflow_process("b")  # of another stage, which closes what nobody runs
    assert database.get_run(there["T=4"]).info.status == "RUNNING"
    again.take(Child(name="T=4", params={"stdb.timesteps": 4}))
    again.take(ChildEnd(name="T=4", status="FINISHED"))
    again.end(End(status="FINISHED"))
    assert children(database, first.run_id) == there
    assert losses(database, there["T=4"]) == [(3, 0.375), (4, 0.5)]
    assert {database.get_run(run).info.status for run in there.values()} == {"FINISHED"}


def test_workers_report_to_the_run_of_their_t(database):
    """From their own process, also again after one of them was lost; the stage then finds it."""
    process = mlflow_process("a")
    Reporter(process.run_id)([*rows_of(8, 1), *rows_of(4, 2)])
    Reporter(process.run_id)(rows_of(4, 3))
    there = children(database, process.run_id)
    process.take(Child(name="T=4", params={}))
    process.take(ChildEnd(name="T=4", status="FINISHED"))
    assert process.take(logs_of_rows(rows_of(4, 4))[0])  # a report that waited
    process.end(End(status="FINISHED"))
    assert children(database, process.run_id) == there
    assert losses(database, there["T=4"]) == [(2, 0.25), (3, 0.375), (4, 0.5)]
    assert database.get_run(there["T=4"]).info.status == "FINISHED"


def parent(client, run_id: str):
    return client.get_run(client.get_run(run_id).data.tags["mlflow.parentRunId"])


def commit() -> str:
    origin = provenance()
    return origin["git.commit"][:7] + "-dirty" * (origin["git.dirty"] == "true")


def test_the_stages_of_one_execution_lie_below_one_run(database):
    """Which has all parameters and ends as its last stage does; another execution has its own."""
    first = mlflow_process("a", execution="here 1 1")
    above = parent(database, first.run_id)
    assert above.info.status == "RUNNING"
    assert above.data.params == {"stdb.alpha": "0.3"}
    assert above.info.run_name == commit()
    first.end(End(status="FINISHED"))
    assert parent(database, first.run_id).info.status == "FINISHED"
    second = mlflow_process("b", execution="here 1 1")
    assert second.parent_id == first.parent_id
    assert parent(database, second.run_id).info.status == "RUNNING"
    second.end(End(status="FAILED"))
    assert parent(database, second.run_id).info.status == "FAILED"
    assert mlflow_process("a", execution="here 2 2").parent_id != first.parent_id


def stage_of(execution: str, name: str, searches: bool, timesteps=8) -> MlflowProcess:
    params = {"network.architecture": "vgg5", "stdb.timesteps": timesteps}
    return mlflow_process(
        "a", stage=name, execution=execution, everything=params, searches=searches
    )


def test_an_execution_is_named_after_network_t_and_commit(database):
    """What tells runs apart comes first; MLflow's columns Source and Version say where from."""
    process = stage_of("here 1 1", "work", searches=False)
    above = parent(database, process.run_id)
    assert above.info.run_name == f"vgg5 T=8 {commit()}"
    several = stage_of("here 2 2", "work", searches=False, timesteps=[8, 4])
    assert parent(database, several.run_id).info.run_name == f"vgg5 T=8,4 {commit()}"
    assert above.data.tags["mlflow.source.name"] == "dvc repro"
    tags = database.get_run(process.run_id).data.tags
    assert tags["mlflow.source.name"] == "dvc repro work"
    assert tags["mlflow.source.git.commit"] == provenance()["git.commit"]


def test_an_execution_that_searches_t_is_not_named_after_one(database):
    """Also where stages above the sweep, which do not know of it, opened the run."""
    stages = [stage_of("here 1 1", name, name == "sweep") for name in ("train_ann", "sweep")]
    assert stages[0].parent_id == stages[1].parent_id
    assert parent(database, stages[1].run_id).info.run_name == f"vgg5 sweep {commit()}"


def test_the_experiment_says_how_to_read_it(database):
    """To somebody who sees the pages for the first time."""
    mlflow_process("a")
    tags = database.get_experiment_by_name("stdb").tags
    assert "Select two to compare" in tags["mlflow.note.content"]


def test_an_execution_is_named_after_its_dvc_experiment(database, monkeypatch):
    """As `dvc exp show` names it."""
    monkeypatch.setenv("DVC_EXP_NAME", "brave-newt")
    assert parent(database, mlflow_process("a").run_id).info.run_name == "brave-newt"


def test_an_execution_that_goes_on_after_a_kill_is_the_same(database):
    """`dvc repro` again goes on in the interrupted stage's run and in the run above it."""
    first = mlflow_process("a", execution=f"{socket.gethostname()} 1 1")  # a process that has ended
    killed(database, first.run_id)
    second = mlflow_process("a", execution="here 2 2")
    assert (second.run_id, second.parent_id) == (first.run_id, first.parent_id)
    assert database.get_run(second.parent_id).info.status == "RUNNING"
    third = mlflow_process("b", execution="here 2 2")
    assert third.parent_id == first.parent_id


def test_the_execution_is_the_dvc_above_a_stage(tmp_path):
    """However many shells lie between; a stage that runs alone is its own."""
    assert execution() == this_process()
    script = tmp_path / "dvc"  # stands in for dvc: a Python script of that name
    script.write_text(
        "import os, subprocess, sys\n"
        "print(os.getpid(), flush=True)\n"
        "code = 'from pipeline.tracking.origin import execution; print(execution())'\n"
        "subprocess.run(f'true; {sys.executable} -c \"{code}\"', shell=True)\n"
    )
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    pid, found = ran.stdout.splitlines()
    assert found.split()[1] == pid


def test_data_sets_are_logged_with_their_digests(database):
    """To the stage and to the execution; MLflow's pages list them."""
    row = Dataset(
        name="digits test",
        digest="ab" * 32,
        path="data/prepared/test.safetensors",
        context="test",
        profile={"images": 450},
    )
    process = mlflow_process("a", datasets=[row])
    for run_id in (process.run_id, process.parent_id):
        (used,) = database.get_run(run_id).inputs.dataset_inputs
        assert used.dataset.name == "digits test"
        assert used.dataset.digest == "ab" * 6
        assert json.loads(used.dataset.profile) == {"images": 450}
        assert [(tag.key, tag.value) for tag in used.tags] == [("mlflow.data.context", "test")]


def test_the_machine_is_watched(database, monkeypatch):
    """Processor and memory by time, as MLflow does it."""
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
    process = mlflow_process("a")
    deadline = time.monotonic() + 30
    found: dict = {}
    while "system/cpu_utilization_percentage" not in found and time.monotonic() < deadline:
        time.sleep(0.5)
        found = database.get_run(process.run_id).data.metrics
    process.end(End(status="FINISHED"))
    assert 0 <= found["system/cpu_utilization_percentage"] <= 100
    assert "system/system_memory_usage_megabytes" in found


def test_a_run_is_closed_also_where_something_was_not_taken(database, tmp_path, capfd):
    """It does not stay RUNNING because a picture was missing."""
    tracker = Tracker(begun())
    tracker.figure(tmp_path / "missing.png")
    tracker.log({"accuracy/test": 0.5})
    tracker.end("FINISHED")
    said = capfd.readouterr().err
    assert said.count("warning: ") == 1
    assert "missing.png" in said
    assert database.get_run(tracker.run_id).info.status == "FINISHED"


def test_an_error_of_our_own_is_no_outage(database, capfd):
    """Its traceback is shown, once; what comes after it is logged, and the run is closed."""
    tracker = Tracker(begun())
    for _ in range(3):
        tracker.model(Path(__file__), "stdb-digits", [[0], [0, 1]], ABOUT)  # no array
    tracker.log({"accuracy/test": 0.5})
    tracker.end("FINISHED")
    said = capfd.readouterr().err
    assert said.count("warning: ") == said.count("Traceback (most recent call last)") == 1
    assert "ValueError: setting an array element with a sequence" in said
    assert "does not answer" not in said
    run = database.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["accuracy/test"] == 0.5


def test_a_run_of_another_machine_or_experiment_is_left_alone(database, monkeypatch):
    """Nobody here knows whether it is alive; an experiment's run is no other's."""
    first = mlflow_process("a").run_id
    database.set_tag(first, "process", "elsewhere 1 1")
    second = mlflow_process("a").run_id
    assert second != first
    assert database.get_run(first).info.status == "RUNNING"
    killed(database, second)
    monkeypatch.setenv("DVC_EXP_NAME", "another")
    assert mlflow_process("a").run_id != second


def test_no_password_of_an_address_is_shown(monkeypatch, capfd):
    """Neither in what is said nor in what is kept."""
    assert without_secrets("at https://me:s3cret@host/x, a@b") == "at https://***@host/x, a@b"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s3cret@127.0.0.1:9")
    tracker = Tracker(begun())
    Reporter("some-run")([{"epoch": 1, "accuracy": 0.5}])
    assert tracker.run_id is None
    said = "".join(capfd.readouterr())
    assert said.count("warning: MLflow at http://***@127.0.0.1:9 d") == 2
    assert "s3cret" not in said
    assert "s3cret" not in str(provenance())


def test_a_stage_that_dies_takes_its_tracker_with_it(database):
    """The process ends when nobody can tell it anything any more; the run stays RUNNING."""
    tracker = Tracker(begun())
    run_id = tracker.run_id
    tracker._lines.put(None)  # as the end of this process would
    assert tracker._process.wait(20) == 0
    assert database.get_run(run_id).info.status == "RUNNING"


def test_a_slow_mlflow_is_not_waited_for(nobody, monkeypatch, capfd):
    """Only so long, and it is said."""
    with socket.socket() as server:  # takes connections and never answers
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(trackers, "PATIENCE", 0.5)
        tracker = Tracker(begun())
        for step in range(20_000):  # more than a pipe holds
            tracker.log({"accuracy": 0.5}, step)
        start = time.monotonic()
        tracker.end("FINISHED")
        assert time.monotonic() - start < 5
    assert "is slow; what it has not taken by now is kept in" in capfd.readouterr().err
