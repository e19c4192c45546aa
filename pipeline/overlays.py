"""Overlays: presets and a sweep's winner, written into params.yaml, comments kept.

An overlay is a YAML file with any part of params.yaml.
"""

import difflib
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq

from pipeline.errors import ParamsError
from pipeline.files import writing
from pipeline.params import PARAMS_FILE, load_params
from pipeline.typed import read_yaml


def apply(overlay: Path, target: Path = PARAMS_FILE) -> str:
    """Change in ``target`` what ``overlay`` says; returns the difference.

    Raises:
        ParamsError: a file is missing, or the result is not allowed; ``target`` stays as it is.
    """
    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 1000
    yaml.representer.add_representer(
        type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    if not overlay.exists():
        raise ParamsError(f"{overlay} is missing; make sweep makes it")
    before = target.read_text(encoding="utf-8")
    params = yaml.load(before)
    merge(params, read_yaml(overlay) or {}, str(overlay))
    with writing(target) as temporary:
        with temporary.open("w", encoding="utf-8") as file:
            yaml.dump(params, file)
        load_params(temporary)
        after = temporary.read_text(encoding="utf-8")
    lines = difflib.unified_diff(
        before.splitlines(True), after.splitlines(True), str(target), str(target), n=0
    )
    return "".join(lines)


def merge(into: Any, changes: dict[str, Any], overlay: str) -> None:
    """Write ``changes`` into a mapping of mappings, in place.

    Raises:
        ParamsError: a key that ``into`` lacks; the message names ``overlay`` and what is allowed.
    """
    for key, value in changes.items():
        if key not in into:
            raise ParamsError(f"{overlay} has {key}; allowed: {', '.join(into)}")
        if isinstance(value, dict):
            merge(into[key], value, overlay)
        elif value != into[key] or not isinstance(into[key], type(value)):  # else 1.0e-4 stays so
            into[key] = value
            if isinstance(value, list):
                into[key] = CommentedSeq(value)
                into[key].fa.set_flow_style()


def show(overlay: Path) -> int:
    """Apply an overlay to params.yaml and print what changed; the exit status."""
    try:
        changed = apply(overlay)
    except ParamsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(changed or f"params.yaml is already as {overlay} says")
    print("make repro runs it")
    return 0
