"""The tutorial's commands, run one after the other as a reader would."""

import os
import re
import subprocess
import sys

import pytest

from tests.pipeline.support import ROOT, Repository, make_repository


@pytest.mark.slow
def test_the_tutorial_runs_as_it_is_written(tmp_path):
    """In a fresh copy, in one shell that ends with the first command that fails."""
    text = (ROOT / "docs/tutorial.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 8
    folder = tmp_path / "stdb"
    folder.mkdir()
    repository = make_repository(folder, {})
    environment = os.path.dirname(os.path.dirname(sys.executable))
    (folder / ".venv").symlink_to(environment)  # else `make setup` makes one: tested by hand
    if (ROOT / ".uv").exists():
        (folder / ".uv").symlink_to(ROOT / ".uv")
    (folder / ".git/info/exclude").write_text(".venv\n.uv\n")
    result = subprocess.run(
        ["bash", "-euo", "pipefail"], input="\n".join(blocks), cwd=folder, text=True,
        capture_output=True, env=Repository.environment(),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    said = result.stdout
    assert "accuracy.stdb" in said
    assert said.count("energy_nj.stdb") >= 2  # dvc metrics show, diff: another T takes another
    assert "digit-3" in said  # predict
    assert "make apply-best writes it into params.yaml" in said
    assert "Data and pipelines are up to date." in said  # the colleague's
    assert (folder / "colleague/models/snn.safetensors").stat().st_size > 0
    subjects = repository.run("git", "log", "--format=%s").stdout.splitlines()
    assert subjects == ["A remote", "The T that the sweep found", "My images, T = 8", "start"]
