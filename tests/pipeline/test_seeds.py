"""`make seeds`: experiments over seeds, and the table of their means."""

import json
import re
import sys

import pytest

from pipeline.seeds import main, table
from tests.pipeline.support import copy_of


def test_the_table_has_mean_and_standard_deviation():
    """By hand: 1, 2, 3 has mean 2 and deviation 1; one seed has none."""
    rows = {"seed-0": {"a": 1.0}, "seed-1": {"a": 2.0}, "seed-2": {"a": 3.0}}
    assert table(rows).splitlines()[-1] == "| mean ± sd | 2.00 ± 1.00 |"
    assert table({"seed-0": {"a": 1.0}}).splitlines()[-1] == "| mean ± sd | 1.00 |"


@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_an_impossible_number_of_seeds_is_refused(count, capsys):
    """Before anything runs."""
    assert main([count]) == 1
    assert f"N is {count}; allowed: 1 to 1000 seeds" in capsys.readouterr().err


@pytest.mark.slow
def test_each_seed_is_an_experiment_and_the_workspace_stays(finished, tmp_path):
    """Two seeds: seed 0 is what the workspace has already; their accuracies are in the table."""
    repository = copy_of(finished, tmp_path / "repository")
    repository.run("git", "add", "-A")
    repository.run("git", "commit", "-qm", "results")
    before = repository.bytes_of_outs()
    output = repository.run(sys.executable, "-m", "pipeline.seeds", "2").stdout
    assert repository.bytes_of_outs() == before
    assert repository.run("git", "status", "--porcelain").stdout == ""
    rows = [re.findall(r"[\d.]+(?= )", line) for line in output.splitlines() if "| seed-" in line]
    tuned = json.loads((repository.root / "metrics/finetune_stdb.json").read_text())
    assert f"{100 * tuned['accuracy']['test']:.2f}" == rows[0][-1]
    shown = json.loads(repository.run("dvc", "exp", "show", "--json").stdout)
    names = {e["name"] for row in shown if row["experiments"] for e in row["experiments"]}
    assert {"seed-0", "seed-1"} <= names
    assert rows[0] != rows[1]
