"""The house: floors and rooms, and what never happens in them (docs/architecture.md)."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import stdb
from tests.pipeline.support import ROOT, STAGES

ENGINE = sorted((ROOT / "stdb").rglob("*.py"))
PIPELINE = sorted((ROOT / "pipeline").rglob("*.py"))
ABOVE = [*PIPELINE, *sorted((ROOT / "benchmarks").glob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
OF_THE_ENGINE = {"torch", "numba", "numpy", "llvmlite", "safetensors", "triton"}
IF_THEY_ARE_THERE = {"nir", "onnxscript", "PIL"}  # of the extras; where missing, they are named


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def modules(path: Path) -> set[str]:
    """What a file imports, anywhere in it; relative imports made absolute."""
    package = list(path.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found.add(".".join([*base, *([node.module] if node.module else [])]))
    return found


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in modules(path)}


@pytest.mark.parametrize("path", ENGINE, ids=name_of)
def test_the_engine_knows_nothing_of_what_is_above_it(path):
    """Torch, numba and safetensors; for GPUs, NIR, ONNX and image files their packages."""
    assert tops(path) - set(sys.stdlib_module_names) - {"stdb"} <= OF_THE_ENGINE | IF_THEY_ARE_THERE


@pytest.mark.parametrize("path", PIPELINE, ids=name_of)
def test_the_pipeline_knows_nothing_of_benchmarks_and_tests(path):
    """No arrow upward."""
    assert not tops(path) & {"benchmarks", "tests"}


@pytest.mark.parametrize("path", ABOVE, ids=name_of)
def test_only_public_names_of_the_engine_are_used_above_it(path):
    """Whoever has the engine alone can do all that the pipeline does with it."""
    assert {name for name in modules(path) if name.startswith("stdb.")} == set()
    public = {*stdb.__all__, "__file__"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "stdb":
            assert {alias.name for alias in node.names} <= public
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id != "stdb" or node.attr in public, node.attr


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_no_test_module_imports_another(path):
    """What they share is in a support.py for each half, or in a file of its own subject."""
    shared = {"tests.pipeline.support", "tests.stdb.support", "tests", "tests.browser"}
    shared |= {"tests.pipeline.archives", "tests.pipeline.dependencies"}
    if re.search("import (dependencies|malformed)", path.read_text()):
        shared |= {"tests.pipeline"}
    assert {name for name in modules(path) if name.startswith("tests")} <= shared


def test_operators_say_what_they_are_by_themselves():
    """Nobody compares kinds."""
    for path in ENGINE:
        assert not re.search(r"\.kind\b", path.read_text()), path


def test_private_names_of_ray_are_in_one_file():
    """Each with the reason that there is no public one."""
    private = r"_temp_dir|_experiment_analysis|_base_exc|_local_tuner|ray\.\S*\._|_internal"
    for path in PIPELINE:
        if path.name != "ray_private.py":
            assert not re.search(private, path.read_text()), path


def test_an_import_sets_nothing():
    """But the one variable that torch reads before its first tensor (stdb/__init__.py)."""
    names = [
        name_of(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for path in [*ENGINE, *PIPELINE]
        if path.name != "served_model.py"  # MLflow runs it
    ]
    libraries = "torch, torchvision, numba, sklearn, matplotlib, pydantic, psutil, ray.tune, mlflow"
    program = f"""
import json, os, sys
import {libraries}, ray.tune.search.basic_variant, ray.tune.schedulers, vl_convert
before = dict(os.environ)
for name in {names!r}:
    __import__(name)
print(json.dumps([key for key in os.environ if os.environ[key] != before.get(key)]))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == ["THP_MEM_ALLOC_ENABLE"]


def test_a_stage_starts_without_what_it_may_not_need():
    """These take seconds to import, and are where they are used; so is torch's compiler."""
    heavy = {"ray", "mlflow", "sklearn", "torchvision", "pandas", "torch._dynamo"}
    program = f"""
import sys
for name in {STAGES!r}:
    __import__(f"pipeline.{{name}}")
import torch, stdb
with torch.device("meta"):
    stdb.build("resnet12")
print(*({heavy!r} & sys.modules.keys()))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "\n", "")


def test_what_make_starts_keeps_its_bytecode():
    """Also in a container image that tells Python otherwise; what else is set stays."""
    show = 'show: ; @echo "$$PYTHONDONTWRITEBYTECODE-$$PYTHONHASHSEED"'
    result = subprocess.run(
        ["make", "--eval", show, "show"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "3"},
    )  # fmt: skip
    assert result.stdout == "-3\n", result.stderr


def test_a_file_is_one_idea():
    """Of at most 400 lines."""
    long = [name_of(p) for p in [*ENGINE, *ABOVE] if len(p.read_text().splitlines()) > 400]
    assert long == []


def test_the_readme_is_read_in_one_go():
    """The rest is in docs/."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
