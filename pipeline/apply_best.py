"""Write a sweep's winner into params.yaml, comments kept, and show what changed.

    python -m pipeline.apply_best [sweep/best_params.yaml]     # make apply-best

Nothing is changed where the result would not be allowed.
"""

import difflib
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq

from pipeline.params import PARAMS_FILE, ParamsError, load_params
from pipeline.stage import writing


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
    before = target.read_text()
    params = yaml.load(before)
    _merge(params, YAML(typ="safe").load(overlay.read_text()) or {}, overlay)
    with writing(target) as temporary:
        with temporary.open("w") as file:
            yaml.dump(params, file)
        load_params(temporary)
        after = temporary.read_text()
    lines = difflib.unified_diff(
        before.splitlines(True), after.splitlines(True), str(target), str(target), n=0
    )
    return "".join(lines)


def _merge(into: Any, changes: dict[str, Any], overlay: Path) -> None:
    for key, value in changes.items():
        if key not in into:
            raise ParamsError(f"{overlay} has {key}; allowed: {', '.join(into)}")
        if isinstance(value, dict):
            _merge(into[key], value, overlay)
        elif value != into[key] or not isinstance(into[key], type(value)):  # else 1.0e-4 stays so
            into[key] = value
            if isinstance(value, list):
                into[key] = CommentedSeq(value)
                into[key].fa.set_flow_style()


def main(overlay: Path) -> int:
    """Apply, show; the exit status."""
    try:
        changed = apply(overlay)
    except ParamsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(changed or f"params.yaml is already as {overlay} says")
    print("make repro runs it")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "sweep/best_params.yaml")))
