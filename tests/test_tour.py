"""docs/tour.py runs from its first line to its last, and the site of the documents builds."""

import os
import re
import subprocess
import sys

from tests.pipeline.support import ROOT

PATIENCE = 600  # seconds, on the busiest machine


def test_the_tour_ends_with_a_network_of_four_steps(tmp_path):
    """As it says: as accurate as its CNN, with pictures and a file."""
    environment = os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, ROOT / "docs/tour.py"], cwd=tmp_path, env=environment,
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    cnn = float(re.search(r"^CNN: ([\d.]+)%", ended.stdout, re.MULTILINE)[1])
    tuned = re.search(r"^fine-tuned .* ([\d.]+)% at T = 4", ended.stdout, re.MULTILINE)[1]
    assert cnn > 97
    assert float(tuned) > cnn - 1
    for name in ("tour-curve.png", "tour-raster.png", "tour.safetensors"):
        assert (tmp_path / name).stat().st_size > 5000


def test_the_site_builds_without_a_warning(tmp_path):
    """Links and headings of all pages, the API's docstrings; nothing comes from another host."""
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going"]
    built = subprocess.run(
        [*command, "-c", "docs", "-d", tmp_path / "trees", ".", tmp_path / "site"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 25
    loads = re.compile(r"<(?:link|script|img|iframe)[^>]*(?:src|href)=\"(?:https?:)?//")
    for page in pages:
        assert not loads.search(page.read_text(encoding="utf-8")), page
