"""The benchmarks run, with every contender; a row of Table 1 goes on where it was stopped."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
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
    assert len(rows) == 7 + 6 + 2 + 2 + 6 + 5  # train, infer, record, balance; few steps: two
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


def small_row(images, folder: Path, minutes: float, *more: str) -> row.Row:
    folder.mkdir(exist_ok=True)
    preset = ROOT / "presets/cpu-vgg5-cifar10.yaml"
    return row.Row(folder, minutes, 2, row.parameters(preset, images, [*SMALL, *more]))


def test_a_row_goes_on_where_it_was_stopped(images, tmp_path):
    """A step at a time, as if every call ran out of minutes at once: the same figures."""
    small_row(images, tmp_path / "whole", 60).run()
    calls = 0
    while not (tmp_path / "parts/results.json").exists():
        calls += 1
        try:
            small_row(images, tmp_path / "parts", 0).run()
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


def test_every_parameter_reaches_a_row(images, tmp_path):
    """Those that an earlier driver ignored without a word have an effect, each."""
    changes = (
        *("stdb.images=8", "stdb.temporal_gradient=false", "stdb.from_scratch=true"),
        *("stdb.threshold_scale=0.3", "data.grayscale=true"),
    )
    fast = "stdb.learning_rate=0.01"
    plain = small_row(images, tmp_path / "plain", 60, fast)
    plain.run()
    for change in changes:
        other = small_row(images, tmp_path / change.partition("=")[0], 60, fast, change)
        other.run()
        assert other.done["stdb 0"] != plain.done["stdb 0"], change


def test_a_row_with_other_parameters_is_refused(images, tmp_path, capsys):
    """Instead of going on in what was made with others; and what one process cannot do."""
    small_row(images, tmp_path / "row", 60).once("images", dict)
    command = ["cpu-vgg5-cifar10", str(images), "--out", str(tmp_path / "row")]
    for more, message in (
        ([], "has other parameters"),
        (["--set", "stdb.nothing=1"], "--set has nothing; allowed: timesteps"),
        (["--set", "stdb.alpha=-1"], "stdb.alpha is -1; allowed: greater than 0"),
        (["--set", "data.stream=true"], "data.stream is true; allowed here"),
        (["--set", "cluster.workers=2"], "cluster.workers is 2; allowed here: auto, 1"),
    ):
        assert row.main([*command, *more]) == 1
        assert message in capsys.readouterr().err
