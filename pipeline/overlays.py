"""Overlays: presets and a sweep's winner, written into params.yaml, comments kept.

An overlay is a YAML file with any part of params.yaml.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from pipeline.errors import ParamsError
from pipeline.files import writing
from pipeline.params import PARAMS_FILE, Params
from pipeline.reading import read_text
from pipeline.typed import read_yaml, shown, shown_key, validate


def apply(
    overlay: Path, target: Path = PARAMS_FILE, more: Mapping[str, Mapping[str, Any]] | None = None
) -> str:
    """Change in ``target`` what ``overlay`` says; returns the difference.

    Args:
        overlay: any part of params.yaml.
        target: the file that is changed.
        more: section → key → value, written after it.

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
    if not isinstance(read_yaml(target), dict):
        raise ParamsError(f"{target} is no file of parameters; git has one")
    before = read_text(target)
    params, changes = yaml.load(before), read_yaml(overlay)
    add_defaults(params, changes)
    merge(params, changes, str(overlay))
    for section, values in (more or {}).items():
        params[section].update(values)
    with writing(target) as temporary:
        with temporary.open("w", encoding="utf-8") as file:
            yaml.dump(params, file)
        validate(read_yaml(temporary), Params, f"{target} with {overlay} in it")
        after = temporary.read_text(encoding="utf-8")
    lines = difflib.unified_diff(
        before.splitlines(True), after.splitlines(True), str(target), str(target), n=0
    )
    return "".join(lines)


def add_defaults(into: Any, changes: Any) -> None:
    """Write keys that ``changes`` has, and a file of an earlier version lacks, with their default.

    Args:
        into: params.yaml's mapping of mappings, changed in place.
        changes: what will be written there.
    """
    for section, wanted in changes.items() if isinstance(changes, dict) else ():
        field = Params.model_fields.get(section) if isinstance(section, str) else None
        if field is None or not isinstance(wanted, dict) or not isinstance(into.get(section), dict):
            continue
        for key, inner in field.annotation.model_fields.items():  # type: ignore[union-attr]
            if key in wanted and key not in into[section] and not inner.is_required():
                into[section][key] = inner.default


def merge(into: Any, changes: Any, overlay: str, place: str = "") -> None:
    """Write ``changes`` into a mapping of sections, in place.

    Args:
        into: is changed.
        changes: a mapping of some of the same sections, with some of the same keys.
        overlay: names the file that they come from.
        place: the key that they stand under; empty at the top.

    Raises:
        ParamsError: a key that ``into`` lacks, or no mapping where ``into`` has a section; the
            message names ``overlay`` and what is allowed.
    """
    if not isinstance(changes, dict):
        what = f"has {place}: {shown(changes)}" if place else f"is {shown(changes)}"
        raise ParamsError(f"{overlay} {what}; allowed: a mapping of {', '.join(map(str, into))}")
    for key, value in changes.items():
        inside = f"{place}.{key}" if place else shown_key(key)
        if key not in into:
            allowed = ", ".join(map(str, into))
            raise ParamsError(f"{overlay} has {shown_key(key)}; allowed: {allowed}")
        if not place and isinstance(into[key], dict):
            merge(into[key], value, overlay, inside)
        elif value != into[key] or not isinstance(into[key], type(value)):  # else 1.0e-4 stays so
            into[key] = value
            if isinstance(value, list | dict):
                into[key] = CommentedSeq(value) if isinstance(value, list) else CommentedMap(value)
                into[key].fa.set_flow_style()


def show(overlay: Path, more: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Apply an overlay to params.yaml, and more as :func:`apply` does; print what changed."""
    changed = apply(overlay, more=more)
    print(changed or f"params.yaml is already as {overlay} says")
    print("make repro runs it")
