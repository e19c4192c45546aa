"""The engine's wheel: all packages below stdb/, and importable where nothing of the pipeline is."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pipeline", "ray", "mlflow", "dvc", "torchvision", "pydantic"):
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Refuse())
sys.path[:0] = [sys.argv[1]]
import torch
import stdb
assert stdb.__file__.startswith(sys.argv[1]), stdb.__file__
ann = stdb.build("resnet8", 1, 8, 3, width=0.1)
snn = stdb.convert(ann, stdb.PoissonEncoder(0))
stdb.balance_thresholds(snn, torch.rand(4, 1, 8, 8), 4)
snn(torch.rand(4, 1, 8, 8), 4).sum().backward()
print(len(stdb.__all__))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources, without a network: the environment has setuptools."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    wanted = ("stdb", "pyproject.toml", "LICENSE", "README.md")
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *wanted],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_holds_every_package(wheel):
    """Each module of stdb/, and nothing else of the repository."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [path for kind in ("*.py", "*.json") for path in (ROOT / "stdb").rglob(kind)]
    assert names == {str(path.relative_to(ROOT)) for path in files}


def test_the_wheel_works_alone(wheel, tmp_path):
    """Outside the repository, without the pipeline and what it needs."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    result = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "site")],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
