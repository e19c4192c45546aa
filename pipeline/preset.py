"""Write a preset into params.yaml, comments kept, and show what changed.

    python -m pipeline.preset NAME     # make preset NAME=cpu-vgg5-cifar10
    python -m pipeline.preset          # list them

A preset is a file of presets/: the parameters of a row of the paper, or of the same at a size that
a CPU can do. Seeds, and where it runs, stay as they are. NAME may be a file of your own, with any
part of params.yaml.
"""

import sys
from pathlib import Path

from pipeline.overlays import show

PRESETS = Path("presets")


def main(arguments: list[str]) -> int:
    """Apply, or list; the exit status."""
    known = {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}
    if not arguments or not arguments[0]:
        for name, path in known.items():
            print(f"{name:24} {path.read_text().splitlines()[0].removeprefix('# ')}")
        return 0
    chosen = known.get(arguments[0], Path(arguments[0]))
    if not chosen.is_file():
        text = f"there is no preset {arguments[0]!r}; allowed: a file, or {', '.join(known)}"
        print(f"error: {text}", file=sys.stderr)
        return 1
    return show(chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
