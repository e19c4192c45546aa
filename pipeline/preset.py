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
from pipeline.typed import read_yaml

PRESETS = Path("presets")
DOWNLOADED = {  # source → what torchvision keeps of it
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
    "mnist": ("MNIST",),
    "fashion_mnist": ("FashionMNIST",),
}


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
    show(chosen, {"data": images_at(given.data, source_of(chosen))} if given.data else None)


def source_of(overlay: Path) -> str:
    """The source of the images that a preset names; empty where it names none."""
    preset = read_yaml(overlay)
    data = preset.get("data") if isinstance(preset, dict) else None
    return str(data.get("source", "")) if isinstance(data, dict) else ""


def images_at(place: str, source: str) -> dict[str, str]:
    """What to say of ``data`` where the images are in a folder or an archive.

    Args:
        place: of the images.
        source: that the preset names.

    Raises:
        ParamsError: there is neither.
    """
    path = Path(place)
    if not path.exists():
        raise ParamsError(
            f"DATA is {place}, which does not exist; allowed: a folder or an archive of class "
            "folders, or a folder with torchvision's downloads"
        )
    downloads = path.parent if path.name in DOWNLOADED.get(source, ()) else path
    if any((downloads / name).exists() for name in DOWNLOADED.get(source, ())):
        return {"path": str(downloads)}  # of the preset's source
    return {"source": "folder", "path": place}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
