"""The engine's wheel: all packages below stdb/, and importable where nothing of the pipeline is."""

import os
import shutil
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


def interpreter(version: str) -> str | None:
    """A Python of this version that runs, or None; of pyenv's, too."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for path in [f"python{version}", *map(str, sorted(root.glob(f"{version}.*/bin/python")))]:
        if found := shutil.which(path):
            asked = subprocess.run([found, "-c", "print('runs')"], capture_output=True, text=True)
            if asked.stdout == "runs\n":
                return found
    return None


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_the_wheel_installs_on_other_pythons(wheel, tmp_path, version):
    """With what requirements.lock pins, into an environment of its own; converts and learns."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"this machine has no Python {version}")
    uv = shutil.which("uv") or str(ROOT / ".uv/bin/uv")
    subprocess.run([uv, "venv", "--quiet", "--python", python, tmp_path / "venv"], check=True)
    installed = [tmp_path / "venv/bin/python", "-m", "stdb", "--help"]
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--python", installed[0], f"{wheel}[images]",
         "--constraint", ROOT / "requirements.lock"],
        check=True,
    )  # fmt: skip
    helped = subprocess.run(installed, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "convert" in helped.stdout
    code = ALONE.replace("sys.path[:0] = [sys.argv[1]]", "")
    site = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    subprocess.run([installed[0], "-c", code, str(site)], cwd=tmp_path, check=True)
