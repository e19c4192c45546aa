"""The benchmarks run, with every contender."""

import subprocess
import sys
from pathlib import Path

import pytest

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
