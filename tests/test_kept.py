"""The table of the runs that are kept."""

import json

import pytest

from benchmarks.kept import BEGIN, END, main
from pipeline.reporting.literature import literature

CIFAR10 = literature().data_sets[0].classes


def run(test=0.92, seconds=3600, classes=CIFAR10, ann=0, ann_test=0.93):
    """What ``add`` writes of a run with one network."""
    energy = {"operations, float32": 400.0, "with memory, 32 bits": 2000.0}
    return {
        "data": classes, "images": 10_000, "network": "resnet11 ×0.5", "weights": 1_941_546,
        "encoder": "direct", "commit": "0123456789", "changed": False, "machine": "a machine",
        "seeds": {"data": 0, "ann": ann, "stdb": 1}, "seconds": {"train_ann": seconds, "report": 0},
        "ann": {
            "validation": 0.94, "test": ann_test, "energy": energy, "levels": {"1": 0.8, "4": 0.925}
        },
        "converted": {"4": 0.9},
        "networks": [{
            "timesteps": 4, "validation": 0.93, "test": test, "spikes": 0.5, "latency_ms": 7.0,
            "energy": {"operations, float32": 100.0, "with memory, 32 bits": 1500.0},
        }],
    }  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a page and no runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "RESULTS.md").write_text(f"# Results\n\n{BEGIN}\nold\n{END}\n\nMore.\n")
    return tmp_path


def keep(here, **runs):
    for name, one in runs.items():
        (here / f"results/{name.replace('_', '-')}.json").write_text(json.dumps(one))


def test_runs_of_several_seeds_are_a_row(here):
    """Mean and deviation of the accuracy; shares of the ANN's energy; what others published."""
    keep(here, few_s1=run(0.92), few_s2=run(0.93, 7200), other=run(0.9))
    assert main(["table"]) == 0
    text = (here / "RESULTS.md").read_text()
    assert text.startswith(f"# Results\n\n{BEGIN}\n\n**CIFAR-10**\n")
    assert text.endswith(f"{END}\n\nMore.\n")
    assert "old" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[2] == (
        "| **few** | resnet11 ×0.5 | 1.94 M | 4 | 92.50 ± 0.71 | 93.00 | 92.50 "
        "| 0.50 | 25% | 75% | 7.0 | 1.5 |"
    )
    assert rows[3].startswith("| **other** | resnet11 ×0.5 | 1.94 M | 4 | 90.00 | 93.00 | 92.50 |")
    assert any(row.startswith("| DIET-SNN | VGG16 |  | 5 | 92.70 |") for row in rows)
    assert "- few-s1: 10,000 test images; direct input; seeds: data 0, ann 0, stdb 1; " in text
    assert main(["table"]) == 0
    assert (here / "RESULTS.md").read_text() == text


def test_the_spread_of_anns_is_over_anns(here):
    """Two fine-tunings of one ANN do not count it twice."""
    keep(here, few_s1=run(), few_s2=run(), few_s3=run(ann=1, ann_test=0.92))
    assert main(["table"]) == 0
    assert "| 92.00 ± 0.00 | 92.50 ± 0.71 | 92.50 ± 0.00 |" in (here / "RESULTS.md").read_text()


def test_runs_on_other_data_have_a_table_of_their_own(here):
    """Nothing published stands beside them."""
    keep(here, digits=run(classes=["0", "1"]))
    assert main(["table"]) == 0
    text = (here / "RESULTS.md").read_text()
    assert "**Others**" in text
    assert "DIET-SNN" not in text


def test_what_is_missing_is_said(here, capsys):
    """Runs, the place of the table, a name."""
    assert main(["table"]) == 1
    assert "results has no runs" in capsys.readouterr().err
    keep(here, one=run())
    (here / "RESULTS.md").write_text("# Results\n")
    assert main(["table"]) == 1
    assert "RESULTS.md has no place for the table" in capsys.readouterr().err
    assert main(["add", "Two words"]) == 1
    assert "NAME is 'Two words'; allowed: " in capsys.readouterr().err
