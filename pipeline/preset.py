"""Write a preset into params.yaml, comments kept, and show what changed.

    python -m pipeline.preset NAME     # make preset NAME=cpu-vgg5-cifar10
    python -m pipeline.preset          # list them

A preset is a file of presets/: the parameters of a row of the paper, or of the same at a size that
a CPU can do. Seeds, and where it runs, stay as they are.
"""

import sys
from pathlib import Path

from pipeline.apply_best import apply
from pipeline.params import ParamsError

PRESETS = Path("presets")


def main(arguments: list[str]) -> int:
    """Apply, or list; the exit status."""
    known = {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}
    if not arguments or not arguments[0]:
        for name, path in known.items():
            print(f"{name:24} {path.read_text().splitlines()[0].removeprefix('# ')}")
        return 0
    try:
        if arguments[0] not in known:
            raise ParamsError(f"there is no preset {arguments[0]!r}; allowed: {', '.join(known)}")
        changed = apply(known[arguments[0]])
    except ParamsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(changed or f"params.yaml is already as preset {arguments[0]} says")
    print("make repro runs it")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
