"""Write a preset into params.yaml, comments kept, and show what changed.

    python -m pipeline.preset NAME     # make preset NAME=cpu-vgg5-cifar10
    python -m pipeline.preset          # list them

A preset is a file of presets/: the parameters of a row of the paper, or of the same at a size that
a CPU can do. Seeds, and where it runs, stay as they are. NAME may be a file of your own, with any
part of params.yaml.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.command import command, parser
from pipeline.errors import ParamsError
from pipeline.overlays import show
from pipeline.reading import read_text

PRESETS = Path("presets")


@command
def main(arguments: Sequence[str]) -> None:
    """Apply, or list."""
    line = parser(__doc__, "preset")
    line.add_argument("name", nargs="?", default="", metavar="NAME")
    name = line.parse_args(arguments).name
    known = {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}
    if not name:
        for preset, path in known.items():
            print(f"{preset:24} {read_text(path).partition(chr(10))[0].removeprefix('# ')}")
        return
    chosen = known.get(name, Path(name))
    if not chosen.is_file():
        raise ParamsError(f"there is no preset {name!r}; allowed: a file, or {', '.join(known)}")
    show(chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
