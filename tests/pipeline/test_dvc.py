"""DVC as the README shows it, on copies of the finished repository, with its results in git.

What a command prints is compared with what the stages wrote, and with git.
"""

import copy
import csv
import json
import os
import re
import shutil
import subprocess
import sys

import mlflow
import pytest
import vl_convert
import yaml

from pipeline.write_plots_page import PAGE, VEGA_LITE
from tests.pipeline.support import ROOT, copy_of

PLOTS = {  # title → names of the axes, where they differ from plot to plot
    "Accuracy after every time step": {"time steps", "test accuracy"},
    "Accuracy by epoch, ANN training": {"epoch", "accuracy"},
    "Accuracy by epoch, STDB fine-tuning": {"epoch", "accuracy"},
    "Spikes of each layer, converted and fine-tuned": {"spikes per neuron and image", "layer"},
    "Balanced thresholds": {"threshold V", "layer"},
}
EDGES = {  # of dvc.yaml's graph, by hand
    ("prepare_data", "train_ann"),
    ("prepare_data", "balance_thresholds"),
    ("prepare_data", "evaluate_converted"),
    ("prepare_data", "finetune_stdb"),
    ("prepare_data", "report"),
    ("train_ann", "balance_thresholds"),
    ("train_ann", "evaluate_converted"),
    ("train_ann", "finetune_stdb"),
    ("train_ann", "report"),
    ("balance_thresholds", "evaluate_converted"),
    ("balance_thresholds", "finetune_stdb"),
    ("evaluate_converted", "finetune_stdb"),
    ("evaluate_converted", "report"),
    ("finetune_stdb", "report"),
}
SHOW = ("dvc", "exp", "show", "--only-changed", "--drop", ".*/", "--csv")  # README, but for --csv


@pytest.fixture(scope="module")
def committed(finished, tmp_path_factory):
    """The finished repository with its results in git, and the page that `make setup` makes."""
    repository = copy_of(finished, tmp_path_factory.mktemp("committed") / "repository")
    repository.run("git", "add", "-A")
    repository.run("git", "commit", "-qm", "results")
    repository.run("python", "-m", "pipeline.write_plots_page")
    return repository


@pytest.fixture(scope="module")
def experiment(committed, tmp_path_factory):
    """The same, after an experiment at T = 5 instead of 3."""
    repository = copy_of(committed, tmp_path_factory.mktemp("experiment") / "repository")
    result = repository.run("dvc", "exp", "run", "-n", "five", "-S", "stdb.timesteps=5")
    repository.output = result.stdout
    return repository


# -- metrics, params -------------------------------------------------------------------------------


def test_metrics_show_has_what_the_stages_measured(committed):
    """One line, short enough to read: the four accuracies and the energy of both networks."""
    (row,) = table(committed.run("dvc", "metrics", "show").stdout)
    ann, converted, tuned = (
        read(committed, name) for name in ("train_ann", "evaluate_converted", "finetune_stdb")
    )
    assert row == {
        "Path": "metrics/summary.json",
        "accuracy.ann": rounded(ann["accuracy"]["test"]),
        "accuracy.converted": rounded(converted["long"]["accuracy"]),
        "accuracy.scaled": rounded(converted["reduced"]["accuracy"]),
        "accuracy.stdb": rounded(tuned["accuracy"]["test"]),
        "energy_nj.ann": rounded(converted["ann"]["energy_pj"] / 1000),
        "energy_nj.stdb": rounded(tuned["energy_pj"] / 1000),
    }


def test_mlflow_and_dvc_call_an_accuracy_the_same(finished):
    """Same name, same number; MLflow's run has the one that networks were chosen by, too."""
    client = mlflow.MlflowClient(f"sqlite:///{finished.root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("stdb").experiment_id
    first = f"tags.kind = 'execution' and attributes.start_time <= {finished.end}"
    (above,) = client.search_runs([experiment], first)
    logged = {
        key.removeprefix("accuracy/"): value
        for key, value in above.data.metrics.items()
        if key.startswith("accuracy/")
    }
    assert (
        logged.pop("stdb_validation") == read(finished, "finetune_stdb")["accuracy"]["validation"]
    )
    quantised = read(finished, "evaluate_converted")["quantised"]["reduced"]
    assert logged.pop("quantised") == quantised
    assert logged == read(finished, "summary")["accuracy"]
    energy = {
        name: above.data.metrics[f"energy/{name}_pj"] / 1000
        for name in read(finished, "summary")["energy_nj"]
    }
    assert energy == pytest.approx(read(finished, "summary")["energy_nj"])


def test_metrics_diff_compares_with_the_commit(experiment):
    """Old value, new value and change of what changed, and nothing else."""
    rows = table(experiment.run("dvc", "metrics", "diff").stdout)
    before = flat(json.loads(experiment.run("git", "show", "HEAD:metrics/summary.json").stdout))
    after = flat(read(experiment, "summary"))
    changed = {key for key in before if before[key] != after[key]}
    assert "energy_nj.stdb" in changed
    assert {row["Metric"] for row in rows} == changed
    for row in rows:
        old, new = before[row["Metric"]], after[row["Metric"]]
        assert (row["HEAD"], row["workspace"]) == (rounded(old), rounded(new))
        assert float(row["Change"]) == pytest.approx(new - old, abs=6e-6)


def test_params_diff_shows_what_was_set(experiment):
    """The one parameter, before and after."""
    (row,) = table(experiment.run("dvc", "params", "diff").stdout)
    assert row == {
        "Path": "params.yaml", "Param": "stdb.timesteps", "HEAD": "3", "workspace": "5"
    }  # fmt: skip


# -- plots -----------------------------------------------------------------------------------------


def test_plots_show_draws_every_plot_from_the_files(committed):
    """Each once, with title and axes; curves and bars have the values of the files."""
    drawn = pictures(committed, "show")
    assert set(drawn) == set(PLOTS)
    for title, names in PLOTS.items():
        assert names <= words(drawn[title]), title
    steps = marks(drawn["Accuracy after every time step"])
    networks = {mark["network"] for mark in steps}
    assert networks == {"fine-tuned", "converted", "converted, thresholds scaled"}
    for title, file, value in (
        ("Balanced thresholds", "thresholds.csv", "threshold"),
        ("Spikes of each layer, converted and fine-tuned", "converted_spikes.csv", "spikes"),
        ("Spikes of each layer, converted and fine-tuned", "finetuned_spikes.csv", "spikes"),
    ):
        found = {
            mark["layer"]: float(mark[value])
            for mark in marks(drawn[title])
            if mark.get("filename", file) == file
        }
        expected = {row["layer"]: float(row[value]) for row in rows_of(committed, file)}
        assert found == pytest.approx(expected), (title, file)


def test_layers_stand_in_the_order_of_the_network(committed, tmp_path):
    """Not in that of the alphabet, which has conv10 before conv2."""
    copied = copy_of(committed, tmp_path / "copy")
    names = ["conv1", "conv2", "conv10", "b", "a"]
    for file, value in (
        ("thresholds.csv", "threshold"),
        ("converted_spikes.csv", "spikes"),
        ("finetuned_spikes.csv", "spikes"),
    ):
        lines = [f"layer,{value}", *(f"{name},{n}" for n, name in enumerate(names, start=1))]
        (copied.root / "plots" / file).write_text("\n".join(lines))
    drawn = pictures(copied, "show")
    for title in ("Balanced thresholds", "Spikes of each layer, converted and fine-tuned"):
        assert [word for word in texts(drawn[title]) if word in names] == names, title


def test_plots_diff_draws_both_revisions(experiment):
    """The commit's and the workspace's values, in two colours, where they differ."""
    drawn = pictures(experiment, "diff")
    assert set(drawn) == set(PLOTS)
    for title, svg in drawn.items():
        assert {"HEAD", "workspace"} <= words(svg), title
    before = experiment.run("git", "show", "HEAD:plots/finetuned_spikes.csv").stdout
    for revision, rows in (
        ("HEAD", list(csv.DictReader(before.splitlines()))),
        ("workspace", rows_of(experiment, "finetuned_spikes.csv")),
    ):
        found = {
            mark["layer"]: float(mark["spikes"])
            for mark in marks(drawn["Spikes of each layer, converted and fine-tuned"])
            if (mark["rev"], mark["filename"]) == (revision, "finetuned_spikes.csv")
        }
        expected = {row["layer"]: float(row["spikes"]) for row in rows}
        assert found == pytest.approx(expected), revision


def test_plots_need_no_net(committed):
    """Vega is in the page; nothing in it is fetched from anywhere; git sees nothing of it."""
    committed.run("dvc", "plots", "show")
    html = (committed.root / "dvc_plots/index.html").read_text()
    tags = re.sub(r"(<script[^>]*>).*?(</script>)", r"\1\2", html, flags=re.DOTALL)
    assert re.findall(r"src|href|url|@import", tags) == []
    bundle, *others = re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL)
    assert "window.vegaEmbed=" in bundle
    assert len(bundle) > 500_000
    assert len(others) == len(PLOTS)
    assert "<DVC_METRIC" not in html
    assert committed.run("git", "status", "--porcelain").stdout == ""


def test_plots_of_a_fresh_clone(committed, tmp_path):
    """No page was made there and no setting names one: DVC shows its own, without an error."""
    clone = clone_of(committed, tmp_path / "clone")
    assert not (clone.root / PAGE).exists()
    clone.run("dvc", "plots", "show")
    assert "vegaEmbed(" in (clone.root / "dvc_plots/index.html").read_text()


def test_the_page_replaces_no_setting(committed, tmp_path):
    """What a person has in .dvc/config.local stays."""
    clone = clone_of(committed, tmp_path / "clone")
    clone.run("dvc", "config", "--local", "core.autostage", "true")
    for _ in range(2):
        clone.run("python", "-m", "pipeline.write_plots_page")
    assert clone.run("dvc", "config", "core.autostage").stdout.strip() == "true"
    assert clone.run("dvc", "config", "plots.html_template").stdout.strip() == "plots/page.html"


# -- experiments -----------------------------------------------------------------------------------


def test_an_experiment_runs_what_its_parameter_touches(experiment):
    """Only these stages, with the value; the commit stays as it was."""
    ran = re.findall(r"Running stage '(\w+)'", experiment.output)
    assert ran == ["balance_thresholds", "evaluate_converted", "finetune_stdb", "report"]
    assert read(experiment, "finetune_stdb")["timesteps"] == 5
    params = yaml.safe_load((experiment.root / "params.yaml").read_text())
    before = yaml.safe_load(experiment.run("git", "show", "HEAD:params.yaml").stdout)
    assert before["stdb"]["timesteps"] == 3
    before["stdb"]["timesteps"] = 5
    assert params == before


def test_exp_show_has_the_columns_that_differ(experiment):
    """Experiment, when, metrics and parameters; no hashes of files, nothing that is equal."""
    (workspace, commit, five), columns = shown(experiment)
    summary = flat(read(experiment, "summary"))
    before = flat(json.loads(experiment.run("git", "show", "HEAD:metrics/summary.json").stdout))
    differ = {key for key in summary if summary[key] != before[key]}
    assert columns - {"Experiment", "rev", "typ", "Created", "parent"} == differ | {
        "stdb.timesteps"
    }
    assert [row["stdb.timesteps"] for row in (workspace, commit, five)] == ["5", "3", "5"]
    assert five["Experiment"] == "five"
    for row, values in ((workspace, summary), (commit, before), (five, summary)):
        assert {key: float(row[key]) for key in differ} == {key: values[key] for key in differ}


def test_exp_diff_compares_two_experiments(experiment):
    """Metrics and parameters of a commit and an experiment."""
    metrics, params = experiment.run("dvc", "exp", "diff", "HEAD", "five").stdout.split("\n\n")
    (row,) = table(params)
    assert (row["Param"], row["HEAD"], row["five"]) == ("stdb.timesteps", "3", "5")
    summary = flat(read(experiment, "summary"))
    energy = {row["Metric"]: row for row in table(metrics)}["energy_nj.stdb"]
    assert float(energy["five"]) == pytest.approx(summary["energy_nj.stdb"], rel=1e-4)


@pytest.mark.slow
def test_a_queue_runs_a_grid(committed, tmp_path):
    """Every combination, in copies of the tree; the workspace stays, all are in one MLflow.

    The combinations differ in their results, so that a wrong row shows.
    """
    queue = copy_of(committed, tmp_path / "queue")
    before = queue.bytes_of_outs()
    runs = len(queue.runs("finetune_stdb"))
    queue.run(
        "dvc", "exp", "run", "--queue",
        "-S", "stdb.timesteps=2,4", "-S", "stdb.learning_rate=0.0001,0.01",
    )  # fmt: skip
    waiting = queue.run("dvc", "queue", "status").stdout
    assert waiting.count("Queued") == 4
    queue.run("dvc", "exp", "run", "--run-all")
    assert queue.bytes_of_outs() == before
    assert queue.run("git", "status", "--porcelain").stdout == ""
    rows, columns = shown(queue)
    assert {"accuracy.stdb", "energy_nj.stdb", "stdb.timesteps", "stdb.learning_rate"} <= columns
    made = [row for row in rows if row["Experiment"] and row["typ"].startswith("branch")]
    grid = {(row["stdb.timesteps"], row["stdb.learning_rate"]) for row in made}
    assert grid == {(t, rate) for t in ("2", "4") for rate in ("0.0001", "0.01")}
    for row in made:
        ref = queue.run("git", "rev-parse", row["rev"]).stdout.strip()
        tuned = json.loads(queue.run("git", "show", f"{ref}:metrics/finetune_stdb.json").stdout)
        assert tuned["timesteps"] == int(row["stdb.timesteps"])
        assert float(row["accuracy.stdb"]) == tuned["accuracy"]["test"]
        assert float(row["energy_nj.stdb"]) == pytest.approx(tuned["energy_pj"] / 1000)
    assert len({row["energy_nj.stdb"] for row in made}) == 4
    assert queue.runs("finetune_stdb")[:4] == ["FINISHED"] * 4
    assert len(queue.runs("finetune_stdb")) == runs + 4
    client = mlflow.MlflowClient(f"sqlite:///{queue.root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("stdb").experiment_id
    tags = {
        run.data.tags["dvc.experiment"]
        for run in client.search_runs([experiment], "attributes.run_name = 'finetune_stdb'")
    }
    assert {row["Experiment"] for row in made} <= tags


# -- remotes, graph --------------------------------------------------------------------------------


def test_pull_brings_back_what_push_sent(committed, tmp_path):
    """A colleague's clone has every out, byte for byte, and runs no stage for it."""
    mine = copy_of(committed, tmp_path / "mine")
    outs = files_of_outs(mine)
    mine.run("dvc", "remote", "add", "-d", "team", str(tmp_path / "remote"))
    assert "file" in mine.run("dvc", "push").stdout
    mine.run("git", "commit", "-qam", "remote")
    theirs = clone_of(mine, tmp_path / "theirs")
    missing = {name for name in outs if not (theirs.root / name).exists()}
    assert {"models/ann.safetensors", "models/snn.safetensors"} <= missing
    assert "data/prepared/train.safetensors" in missing
    theirs.run("dvc", "pull")
    assert files_of_outs(theirs) == outs
    assert "Running stage" not in theirs.repro("dvc.yaml").stdout
    assert not (theirs.root / "mlflow.db").exists()


def test_pull_after_a_loss(committed, tmp_path):
    """Outs and cache deleted, the remote still there."""
    mine = copy_of(committed, tmp_path / "mine")
    outs = files_of_outs(mine)
    mine.run("dvc", "remote", "add", "-d", "team", str(tmp_path / "remote"))
    mine.run("dvc", "push")
    for folder in ("models", "data/prepared", ".dvc/cache"):
        shutil.rmtree(mine.root / folder)
    mine.run("dvc", "pull")
    assert files_of_outs(mine) == outs


def test_dag_is_the_pipeline(committed):
    """Every stage and every arrow of it, as text and as Mermaid."""
    text = committed.run("dvc", "dag").stdout
    assert all(f"| {stage} |" in text for edge in EDGES for stage in edge)
    mermaid = committed.run("dvc", "dag", "--md", "report").stdout
    names = dict(re.findall(r'(node\d+)\["(\w+)"\]', mermaid))
    arrows = re.findall(r"(node\d+)-->(node\d+)", mermaid)
    assert {(names[a], names[b]) for a, b in arrows} == EDGES


# -- readers ---------------------------------------------------------------------------------------


def table(text: str) -> list[dict[str, str]]:
    """What DVC prints in columns."""
    header, *rows = (
        re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip()
    )
    return [dict(zip(header, row, strict=True)) for row in rows]


def shown(repository) -> tuple[list[dict[str, str]], set[str]]:
    """The rows of `dvc exp show`, and its columns."""
    rows = list(csv.DictReader(repository.run(*SHOW).stdout.splitlines()))
    return rows, set(rows[0])


def flat(values: dict, prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in values.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


def rounded(value: float) -> str:
    """As DVC's tables have it."""
    return str(round(value, 5))


def read(repository, name: str) -> dict:
    return json.loads((repository.root / f"metrics/{name}.json").read_text())


def rows_of(repository, name: str) -> list[dict[str, str]]:
    with (repository.root / "plots" / name).open() as file:
        return list(csv.DictReader(file))


def files_of_outs(repository) -> dict[str, bytes]:
    """All files of all outs of dvc.yaml that are there."""
    stages = yaml.safe_load((repository.root / "dvc.yaml").read_text())["stages"].values()
    outs = [next(iter(o)) for s in stages for g in ("outs", "metrics") for o in s.get(g, [])]
    paths = [repository.root / out for out in outs]
    files = [f for path in paths for f in (path, *path.rglob("*")) if f.is_file()]
    return {str(f.relative_to(repository.root)): f.read_bytes() for f in files}


def clone_of(repository, folder):
    """What git has of the repository."""
    repository.run("git", "clone", "-q", ".", str(folder))
    cloned = copy.copy(repository)
    cloned.root = folder
    return cloned


def pictures(repository, command: str) -> dict[str, str]:
    """Title → SVG of every plot of the page, drawn by Vega itself."""
    repository.run("dvc", "plots", command)
    html = (repository.root / "dvc_plots/index.html").read_text()
    specs = [json.loads(spec) for spec in re.findall(r"var spec = (\{.*\});", html)]
    drawn = {s["title"]["text"]: vl_convert.vegalite_to_svg(s, VEGA_LITE) for s in specs}
    assert len(drawn) == len(specs)
    return drawn


def texts(svg: str) -> list[str]:
    """What stands in a picture, in its order."""
    return re.findall(r">([^<>]+)</text>", svg)


def words(svg: str) -> set[str]:
    return set(texts(svg))


def marks(svg: str) -> list[dict[str, str]]:
    """The data of a picture's lines and bars, from the labels that Vega gives them."""
    labels = re.findall(r'<path aria-label="([^"]+)" role="graphics-symbol"', svg)
    return [dict(part.split(": ", 1) for part in label.split("; ")) for label in labels]


def test_results_are_pulled_from_a_teams_remote(tmp_path):
    """`make pull-results` says what is missing without a remote, and fetches with one."""
    here = tmp_path / "here"
    here.mkdir()
    shutil.copy(ROOT / "Makefile", here)
    (here / ".venv").symlink_to(sys.prefix)

    # a make that runs the tests hands its own arguments on
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "ARGS")}

    def run(*command):
        return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)

    pull = ("make", "-o", ".venv/.ready", "pull-results")  # the environment is there
    assert run("git", "init", "-q").returncode == run("dvc", "init", "-q").returncode == 0
    refused = run(*pull)
    assert refused.returncode != 0
    assert "There is no DVC remote to pull from" in refused.stderr
    (here / "model").write_text("weights")
    for command in (
        ("dvc", "add", "-q", "model"),
        ("dvc", "remote", "add", "-q", "--default", "team", str(tmp_path / "remote")),
        ("dvc", "push", "-q"),
    ):
        assert run(*command).returncode == 0
    (here / "model").unlink()
    shutil.rmtree(here / ".dvc/cache")
    result = run(*pull)
    assert result.returncode == 0, result.stderr
    assert (here / "model").read_text() == "weights"
