"""Write a preset into params.yaml, comments kept, and show what changed.

    python -m pipeline.preset NAME                # make preset NAME=cpu-vgg5-cifar10
    python -m pipeline.preset NAME --data PATH    # make preset NAME=… DATA=…: the images are there
    python -m pipeline.preset                     # list them

A preset is a file of presets/: the parameters of a row of the paper, or of the same at a size that
a CPU can do. Seeds, and where it runs, stay as they are. NAME may be a file of your own, with any
part of params.yaml. PATH is a folder of class folders or an archive of one, or where torchvision's
downloads of the preset's data set are.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.command import command, parser
from pipeline.errors import ParamsError
from pipeline.overlays import show
from pipeline.reading import read_text

PRESETS = Path("presets")
DOWNLOADED: tuple[str, ...] = ("cifar-10-batches-py", "cifar-100-python", "MNIST", "FashionMNIST")
DOWNLOADED += ("cifar-10-python.tar.gz", "cifar-100-python.tar.gz")


@command
def main(arguments: Sequence[str]) -> None:
    """Apply, or list."""
    line = parser(__doc__, "preset")
    line.add_argument("name", nargs="?", default="", metavar="NAME")
    line.add_argument("--data", metavar="PATH", help="where the images are")
    given = line.parse_args(arguments)
    name = given.name
    known = {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}
    if not name and given.data:
        raise ParamsError(f"DATA is {given.data}, of no preset; allowed: with NAME")
    if not name:
        for preset, path in known.items():
            print(f"{preset:24} {read_text(path).partition(chr(10))[0].removeprefix('# ')}")
        return
    chosen = known.get(name, Path(name))
    if not chosen.is_file():
        raise ParamsError(f"there is no preset {name!r}; allowed: a file, or {', '.join(known)}")
    show(chosen, {"data": images_at(given.data)} if given.data else None)


def images_at(place: str) -> dict[str, str]:
    """What to say of ``data`` where the images are in a folder or an archive.

    Raises:
        ParamsError: there is neither.
    """
    path = Path(place)
    if not path.exists():
        raise ParamsError(
            f"DATA is {place}, which does not exist; allowed: a folder or an archive of class "
            "folders, or a folder with torchvision's downloads"
        )
    if path.is_dir() and any((path / name).exists() for name in DOWNLOADED):
        return {"path": place}  # of the preset's source
    return {"source": "folder", "path": place}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
