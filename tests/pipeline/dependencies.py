"""What a stage's result depends on: the project's files that its script imports."""

import ast
from pathlib import Path

import stdb
from tests.pipeline.support import ROOT

# reports errors, writes files, logs, sets names; its values are tracked as params, section by
# section: none of it changes a result
PLUMBING = {
    *(f"pipeline/{name}.py" for name in ("__init__", "stage", "files", "errors", "environment")),
    *(f"pipeline/{name}.py" for name in ("params", "data_params", "network_params", "typed")),
    *(f"pipeline/{name}.py" for name in ("reading", "handed_on", "command")),
    "pipeline/tracking",
}


def files_of(module: str) -> set[str]:
    """The file of a module, as dvc.yaml would name it."""
    path = module.replace(".", "/")
    if (ROOT / f"{path}.py").is_file():
        return {f"{path}.py"}
    return {f"{path}/__init__.py"} if (ROOT / path).is_dir() else set()


def imports(file: str) -> set[str]:
    """The project's files that a file imports anywhere; of stdb those of the names it uses."""
    package = list(Path(file).parent.parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            names = [alias.name for alias in node.names]
            if module == "stdb" and not file.startswith("stdb/"):
                owners = (getattr(getattr(stdb, name), "__module__", "stdb") for name in names)
                found |= {f for owner in owners if owner != "stdb" for f in files_of(owner)}
            elif module.startswith(("stdb", "pipeline")):
                found |= files_of(module)
                found |= {f for name in names for f in files_of(f"{module}.{name}")}
        elif isinstance(node, ast.Attribute) and not file.startswith("stdb/"):
            of_stdb = isinstance(node.value, ast.Name) and node.value.id == "stdb"
            owner = getattr(getattr(stdb, node.attr), "__module__", "") if of_stdb else ""
            found |= files_of(owner) if owner.startswith("stdb") else set()
    return found


def needed(script: str) -> set[str]:
    """What a script imports, through all that changes results."""
    found, waiting = {script}, [script]
    while waiting:
        # of stdb/__init__.py those of the names that are used, see imports()
        new = imports(waiting.pop()) - found - {"stdb/__init__.py"}
        new = {file for file in new if not covered(file, PLUMBING)}
        found |= new
        waiting += new
    return found


def covered(file: str, deps: set[str]) -> bool:
    """Whether a file, or a folder that it is in, is among the dependencies."""
    return any(file == dep or file.startswith(f"{dep}/") for dep in deps)
