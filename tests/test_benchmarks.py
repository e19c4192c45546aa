"""The benchmarks run, with every contender; a row of Table 1 goes on where it was stopped."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from benchmarks import row

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.peer
def test_every_contender_runs():
    """A tiny network; times are not looked at."""
    pytest.importorskip("snntorch", reason="peers are missing: make setup-bench")
    pytest.importorskip("spikingjelly", reason="peers are missing: make setup-bench")
    before = (ROOT / "benchmarks/results.json").read_bytes()
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "--quick", "--rounds", "1"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "failed" not in result.stdout
    rows = [line for line in result.stdout.splitlines() if line.startswith("| vgg5")]
    assert len(rows) == 7 + 6 + 2 + 2  # train, infer, record, balance
    assert (ROOT / "benchmarks/results.json").read_bytes() == before


SMALL = [
    "data.validation_fraction=0.25", "network.width=0.2", "network.hidden=32",
    "train_ann.epochs=2", "train_ann.batch_size=8", "balance_thresholds.timesteps=20",
    "balance_thresholds.images=8", "evaluate_converted.timesteps=6",
    "evaluate_converted.scales=[0.5, 1.0]", "stdb.timesteps=4", "stdb.batch_size=8",
]  # fmt: skip


@pytest.fixture
def images(tmp_path):
    """Class folders of small pictures."""
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for label, name in enumerate(("cat", "dog", "owl")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = random.integers(0, 100, (8, 8, 3)) + 70 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k}.png")
    return tmp_path / "images"


def small_row(folder: Path, minutes: float) -> row.Row:
    folder.mkdir(exist_ok=True)
    params = yaml.safe_load((ROOT / "presets/cpu-vgg5-cifar10.yaml").read_text())
    row.override(params, SMALL)
    return row.Row(folder, minutes, 2, params)


def test_a_row_goes_on_where_it_was_stopped(images, tmp_path, capsys):
    """A step at a time, as if every call ran out of minutes at once: the same figures."""
    row.run(small_row(tmp_path / "whole", 60), images)
    calls = 0
    while not (tmp_path / "parts/results.json").exists():
        calls += 1
        try:
            row.run(small_row(tmp_path / "parts", 0), images)
        except row.OutOfTimeError:
            continue
    whole, parts = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "parts")
    )
    assert calls > 20
    assert whole.pop("seconds").keys() == parts.pop("seconds").keys()
    assert whole == parts
    assert len(whole["tuned"]) == 2
    head = (tmp_path / "whole/table.md").read_text().splitlines()[0]
    assert head == "| ANN, % | converted, T = 6 | T = 4 | STDB |"


def test_a_row_with_other_parameters_is_refused(images, tmp_path):
    """Instead of going on in what was made with others."""
    small_row(tmp_path / "row", 0).save()
    params = yaml.safe_load((ROOT / "presets/cpu-vgg5-cifar10.yaml").read_text())
    with pytest.raises(SystemExit, match="other parameters"):
        row.Row(tmp_path / "row", 0, 2, params)
    with pytest.raises(SystemExit, match=r"stdb.nothing is not in the preset"):
        row.override(params, ["stdb.nothing=1"])
