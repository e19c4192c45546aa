"""What every stage does around its work, and that dvc.yaml says what a result depends on."""

import json
import re
from pathlib import Path

import pytest
import yaml

import pipeline.stage
from pipeline.files import digest, read_json
from pipeline.params import load_params
from pipeline.stage import Stage, StageError, run_stage
from tests.pipeline.dependencies import covered, needed
from tests.pipeline.support import ROOT

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# Augmentation takes its random numbers from stdb/randomness.py, which prepare_data does not call.
# train_ann converts the network to see that it can be, and imports the evaluation of an ANN beside
# that of a spiking network; an edit of the engine shall not train the ANN again for that.
OF_THE_ENGINE = {
    "prepare_data": {"stdb/images.py", "stdb/normalisation.py"},
    "train_ann": {
        *("stdb/architectures.py", "stdb/normalisation.py", "stdb/randomness.py"),
        *("stdb/images.py", "stdb/interop/weights.py"),
    },
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_all_code_that_its_script_imports(name):
    """Also through other modules: an edit of code that a result comes from makes it stale."""
    deps = set(STAGES[name]["deps"])
    of_engine = OF_THE_ENGINE.get(name)
    for file in needed(f"pipeline/{name}.py"):
        if of_engine is not None and file.startswith("stdb/") and file not in of_engine:
            continue
        assert covered(file, deps), file


def test_the_imports_are_really_found():
    """The test above is worth nothing if it finds no imports."""
    found = needed("pipeline/finetune_stdb.py")
    assert {"pipeline/data/splits.py", "pipeline/learning/fit.py", "pipeline/jobs/run.py"} <= found
    assert {"stdb/backward.py", "stdb/kernels/neurons.py", "stdb/interop/saving.py"} <= found
    assert "pipeline/report.py" not in found


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_imports_no_stage(name):
    """A changed log line of one would make the others stale."""
    others = {f"pipeline/{other}.py" for other in [*STAGES, "sweep", "compare_surrogates"]}
    others -= {f"pipeline/{name}.py"}
    assert needed(f"pipeline/{name}.py") & others == set()


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_code_that_exists_and_that_it_uses(name):
    """A file that is not imported would make results stale for nothing."""
    code = {dep for dep in STAGES[name]["deps"] if dep.startswith(("pipeline/", "stdb"))}
    assert all((ROOT / dep).exists() for dep in code)
    used = needed(f"pipeline/{name}.py")
    assert [dep for dep in code if not any(covered(file, {dep}) for file in used)] == []


@pytest.mark.parametrize("name", STAGES)
def test_doors_and_logs_make_nothing_stale(name):
    """NIR, ``torch.export``, the authors' checkpoints, MLflow; and reporting only the report."""
    deps = set(STAGES[name]["deps"])
    for file in ("stdb/interop/nir.py", "stdb/interop/export.py", "stdb/interop/authors.py"):
        assert not covered(file, deps)
    assert not covered("pipeline/tracking/tracker.py", deps)
    assert covered("pipeline/reporting/page.py", deps) is (name == "report")


def test_a_file_that_a_stage_reads_is_another_stages_out():
    """data/, models/, metrics/ and plots/ come from stages, so that `dvc repro` can order them."""
    outs = {
        next(iter(out))
        for stage in STAGES.values()
        for group in ("outs", "metrics", "plots")
        for out in stage.get(group, [])
    }
    for name, stage in STAGES.items():
        for dep in stage["deps"]:
            if not dep.startswith(("pipeline/", "stdb")):
                assert dep in outs or str(Path(dep).parent) in outs, (name, dep)


def test_every_out_persists_and_every_metric_is_in_git():
    """persist: a run that fails keeps what was there; cache: false: git shows the numbers."""
    for name, stage in STAGES.items():
        for group in ("outs", "metrics", "plots"):
            for out in stage.get(group, []):
                ((path, options),) = out.items()
                assert options["persist"] is True, (name, path)
                small = path.startswith(("metrics", "plots", "report"))
                assert options.get("cache", True) is not small, (name, path)


# -- a stage of a project of one stage -------------------------------------------------------------


class Runs:
    """Stands in for MLflow."""

    def __init__(self) -> None:
        self.status: list[str] = []
        self.started: list[tuple] = []

    def tracker(self, *arguments):
        self.started.append(arguments)
        return self

    def log(self, metrics, step=None) -> None:
        pass

    def end(self, status: str, interrupted: bool = False) -> None:
        self.status.append(f"{status}, interrupted" if interrupted else status)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """dvc.yaml with one stage, the repository's params.yaml, an input; returns the MLflow runs."""
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "inputs" / "__pycache__").mkdir(parents=True)
    (tmp_path / "inputs" / "a.txt").write_text("a")
    stage = {
        "deps": ["inputs"],
        "params": ["network", "stdb.alpha"],
        "outs": [{"out/x.json": {"persist": True}}, "plain.json"],
        "metrics": [{"metrics/m.json": {"cache": False}}],
    }
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"work": stage}}))
    monkeypatch.chdir(tmp_path)
    runs = Runs()
    monkeypatch.setattr(pipeline.stage, "Tracker", runs.tracker)
    return runs


def edit(before: str, after: str) -> None:
    text = Path("params.yaml").read_text()
    assert before in text
    Path("params.yaml").write_text(text.replace(before, after, 1))


def key() -> str:
    return Stage("work", load_params()).key


def test_a_stage_knows_what_dvc_yaml_says(project):
    """Outs of all groups; tracked parameters by full name; inputs by sha256, caches left out."""
    Path("inputs/__pycache__/a.pyc").write_text("x")
    stage = Stage("work", load_params())
    assert [str(out) for out in stage.outs] == ["out/x.json", "plain.json", "metrics/m.json"]
    assert stage.tracked == {
        "network.architecture": "resnet12",
        "network.width": 0.25,
        "network.hidden": 128,
        "network.dropout": 0.2,
        "network.classifier_dropout": 0.5,
        "network.normalisation": "none",
        "network.pooling": "average",
        "network.activation": "relu",
        "network.levels": None,
        "stdb.alpha": 0.3,
    }
    assert stage.inputs == {"inputs/a.txt": digest(Path("inputs/a.txt"))}
    ((start,),) = project.started
    assert (start.stage, start.job) == ("work", f"work-{stage.key}")
    assert (start.params, start.inputs) == (stage.tracked, stage.inputs)
    assert stage.tracked.items() < start.everything.items()
    assert start.everything["data.source"] == "digits"
    assert start.datasets == []
    assert not start.searches


def test_the_splits_that_a_stage_reads_are_its_data_sets(project):
    """By name, digest and size; what else it reads is none."""
    folder = Path("data/prepared")
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        (folder / f"{name}.safetensors").write_text(name)
    Path("metrics").mkdir()
    part = {"images": 7, "sha256": "0" * 64}
    parts = dict.fromkeys(("train", "validation", "test"), part)
    summary = {"classes": ["a"], "shape": [1, 8, 8], **parts}
    Path("metrics/data.json").write_text(json.dumps(summary))
    spec = yaml.safe_load(Path("dvc.yaml").read_text())
    spec["stages"]["work"]["deps"].append("data/prepared")
    Path("dvc.yaml").write_text(yaml.safe_dump(spec))
    stage = Stage("work", load_params())
    ((start,),) = project.started
    train, test = start.datasets
    assert (train.name, train.context) == ("digits train", "training")
    assert (test.name, test.context) == ("digits test", "test")
    assert test.digest == digest(folder / "test.safetensors")
    assert test.profile == {"shape": (1, 8, 8), "classes": ["a"], **part}
    assert stage.handed_on == [folder.resolve()]


def test_a_job_is_resumed_only_with_the_same_parameters_and_inputs(project):
    """The key of the checkpoints changes with what is tracked, and with nothing else."""
    first = key()
    edit("workers: auto", "workers: 2")
    edit("beta: 0.01", "beta: 0.02")
    assert key() == first
    edit("alpha: 0.3", "alpha: 0.4")
    second = key()
    assert second != first
    edit("width: 0.25", "width: 0.5")
    third = key()
    assert third not in (first, second)
    Path("inputs/a.txt").write_text("b")
    fourth = key()
    assert fourth not in (first, second, third)
    Path("inputs/a.txt").rename("inputs/b.txt")
    assert key() != fourth


def test_a_missing_input_is_refused_before_the_work(project, capsys):
    """The message names it and says what makes it."""
    Path("inputs/a.txt").unlink()
    Path("inputs/__pycache__").rmdir()
    Path("inputs").rmdir()
    assert failing(lambda stage: pytest.fail("the stage has run")) == 1
    assert "error in stage work: inputs is missing; run dvc repro" in capsys.readouterr().err
    assert project.started == []


def failing(main) -> int:
    with pytest.raises(SystemExit) as caught:
        run_stage("work", main)
    return caught.value.code


def raising(error):
    def main(stage):
        raise error

    return main


def test_a_stage_that_ends_well_is_finished(project, capsys):
    """No exit, and the run is FINISHED."""
    run_stage("work", lambda stage: stage.say("hello"))
    assert project.status == ["FINISHED"]
    assert "[work] hello" in capsys.readouterr().out


@pytest.mark.parametrize("error", [StageError("no room"), OSError("no room")], ids=repr)
def test_an_error_with_a_message_is_shown_without_a_traceback(project, capsys, error):
    """Exit 1, the message on stderr, the run FAILED."""
    assert failing(raising(error)) == 1
    assert capsys.readouterr().err == "\nerror in stage work: no room\n"
    assert project.status == ["FAILED"]


def test_a_bug_is_no_success(project, capsys):
    """A line of its own, the traceback in a file, and the run is FAILED."""
    assert failing(raising(KeyError("a bug"))) == 70
    said = capsys.readouterr().err
    assert re.fullmatch(r"\nerror in stage work: this is a fault of ours.*'a bug'.*\n", said)
    path = Path(re.search(r"in (\.results/fault-\S+\.txt)", said)[1])
    assert "raise error" in path.read_text()
    assert project.status == ["FAILED"]


def test_an_interruption_is_said_and_is_no_success(project, capsys):
    """The exit status is that of ctrl-C, the run is FAILED."""
    assert failing(raising(KeyboardInterrupt())) == 130
    assert "goes on from its last checkpoint" in capsys.readouterr().err
    assert project.status == ["FAILED, interrupted"]


def test_a_bad_parameter_starts_no_run(project, capsys):
    """Nothing is looked at or made before the parameters are right."""
    edit("alpha: 0.3", "alpha: -1")
    assert failing(lambda stage: pytest.fail("the stage has run")) == 1
    assert "stdb.alpha is -1; allowed: greater than 0" in capsys.readouterr().err
    assert project.started == []
    assert not Path("out").exists()


def test_an_out_that_cannot_be_written_starts_no_run(project, capsys):
    """A file where the out's folder has to be: found at the start, and no probe is left."""
    Path("metrics").write_text("in the way")
    assert failing(lambda stage: pytest.fail("the stage has run")) == 1
    assert "metrics/m.json cannot be written" in capsys.readouterr().err
    assert project.started == []
    assert list(Path().rglob("*.probe")) == []


def test_a_broken_result_of_an_earlier_stage_is_refused(tmp_path):
    """The message names the file and what makes it again."""
    path = tmp_path / "x.json"
    with pytest.raises(StageError, match=r"x\.json cannot be read .*run dvc repro"):
        read_json(path)
    path.write_text('{"half": ')
    with pytest.raises(StageError, match=r"x\.json cannot be read .*run dvc repro"):
        read_json(path)
