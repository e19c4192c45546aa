"""The engine from a shell: convert a trained CNN, look at it, classify images, hand it on.

    python -m stdb convert cnn.pth --network models:resnet --images photos --timesteps 8 -o snn.safetensors
    python -m stdb info snn.safetensors
    python -m stdb predict snn.safetensors cat.jpg dog.jpg
    python -m stdb export snn.safetensors --onnx snn.onnx

python -m stdb COMMAND --help says more of each.
"""  # noqa: E501 (a command stands in one line)

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .classifier import Classifier
from .encoding import ENCODERS
from .few_steps import METHODS
from .from_files import Asked, check_output, convert_files, written
from .interop.export import export_program
from .interop.nir import to_nir
from .interop.saving import load
from .traced import ConversionError

MOST_STEPS = 32767  # spike times are 16 bits
MISTAKE, INTERRUPTED = 1, 130  # exit statuses
KNOWN = (ValueError, ImportError, OSError, MemoryError, ConversionError)  # that a person can mend

CONVERT = """Convert a trained CNN, calibrated for T time steps.

    python -m stdb convert cnn.pth --network models:resnet --images photos --timesteps 8 -o snn.safetensors

models:resnet is a function in models.py of this folder that returns the network (an nn.Module). Of
the arguments in_channels, image_size and num_classes it is given those that it takes. The images
calibrate: some hundred of those that it was trained on. Two or more folders in the folder are taken
for classes, and the result is then told in accuracy, too, on images that did not calibrate.

Pixels become x/127.5 - 1, unless --normalise says what the CNN was trained with.
"""  # noqa: E501
INFO = """Tell what a file of a spiking network holds.

Layers, thresholds, leaks, classes, what images it takes. V is 1 where weights hold what a spike
stands for, as after a calibration for few steps.
"""
PREDICT = """Classify image files; how each decision came about over time.

Images are brought to what the network was trained on, size and normalisation, as its file says.
"""
EXPORT = """Hand a network on, to what knows nothing of this package.

NIR is a graph for other simulators and chips (pip install nir). ONNX and pt2 are T steps unrolled,
a program of plain operators, for onnxruntime (pip install onnxscript) and torch.export.load.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)  # a test's stream has none
        if reconfigure is not None:
            reconfigure(errors="replace")  # what a terminal has no letters for
    options = parse(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `… | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return MISTAKE
    except KNOWN as error:
        print(f"error: {error or type(error).__name__}", file=sys.stderr)
        return MISTAKE
    return 0


def parse(arguments: Sequence[str] | None) -> Any:
    """The command line."""
    line = argparse.ArgumentParser(
        "python -m stdb", description=__doc__, allow_abbrev=False, formatter_class=_Formatter
    )
    commands = line.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[Any], None], doc: str) -> argparse.ArgumentParser:
        first = doc.partition("\n")[0]
        one = commands.add_parser(
            name, help=first, description=doc, allow_abbrev=False, formatter_class=_Formatter
        )
        one.set_defaults(run=run)
        return one

    one = command("convert", convert, CONVERT)
    one.add_argument("checkpoint", type=Path, help="weights: .safetensors, or of torch.save")
    one.add_argument("--network", required=True, metavar="MODULE:FUNCTION", help="builds the CNN")
    one.add_argument("--images", required=True, type=Path, help="a folder of image files")
    one.add_argument("--timesteps", required=True, type=_count, metavar="T", help="that are wanted")
    one.add_argument("-o", "--output", required=True, type=Path, help="the file to write")
    one.add_argument("--classes", type=Path, metavar="FILE", help="names of classes, one a line")
    one.add_argument(
        "--image-size", type=_size, metavar="N", help="pixels, or HxW; that of the images"
    )
    one.add_argument("--resize", type=_count, metavar="N", help="the shorter side first (256)")
    one.add_argument("--grayscale", action="store_true", help="read images as one grey channel")
    one.add_argument(
        "--normalise", metavar="HOW", help="imagenet, cifar10, cifar100, or 0.5,0.5,0.5/0.2,0.2,0.2"
    )
    one.add_argument("--count", type=_count, default=256, help="images that calibrate (256)")
    one.add_argument("--method", default="auto", choices=METHODS, help="of the calibration (auto)")
    one.add_argument("--encoder", default="direct", choices=ENCODERS, help="direct: analogue input")
    one.add_argument("--seed", type=_seed, default=0, help="chooses the images (0)")

    one = command("info", info, INFO)
    one.add_argument("file", type=Path, help="of stdb.save")

    one = command("predict", predict, PREDICT)
    one.add_argument("file", type=Path, help="of stdb.save")
    one.add_argument("images", nargs="+", type=Path, help="image files")
    one.add_argument("--timesteps", type=_count, metavar="T", help="that of the file by default")
    one.add_argument(
        "--confidence", type=_share, help="leave when the largest probability reaches this"
    )

    one = command("export", export, EXPORT)
    one.add_argument("file", type=Path, help="of stdb.save")
    form = one.add_mutually_exclusive_group(required=True)
    for name in FORMS:
        form.add_argument(f"--{name}", type=Path, metavar="FILE", help="the file to write")
    one.add_argument("--timesteps", type=_count, metavar="T", help="that of the file by default")
    return line.parse_args(arguments)


def convert(options: Any) -> None:
    """Convert, calibrate, tell, write."""
    values = {name: getattr(options, name) for name in Asked.__dataclass_fields__}
    progress = _Progress()
    try:
        for line in convert_files(Asked(**values), progress):
            progress.end()
            print(line, flush=True)
    finally:
        progress.end()


def info(options: Any) -> None:
    """Print what a file holds."""
    snn, about = load(options.file)
    weights = sum(p.numel() for p in snn.net.parameters() if p.dim() > 1)
    surrogate = next(iter(snn.neurons.values())).surrogate
    network = about.get("network")
    said = network if isinstance(network, dict) else {}
    shape = [said.get("in_channels"), *_sides(said.get("image_size"))]
    names = about["classes"]
    listed = [*map(str, names[:8]), *(["…"] if len(names) > 8 else [])]
    lines = {
        "file": f"{options.file}, {options.file.stat().st_size / 2**20:.1f} MiB",
        "time steps": about["timesteps"],
        "weights": f"{weights:,}",
        "input": f"{type(snn.encoder).__name__}, images "
        + ("not said" if None in shape else "×".join(map(str, shape))),
        "pixels become": _pixels(about),
        "classes": f"{len(names)}: {', '.join(listed)}",
        "surrogate": surrogate,
    }
    for name, value in lines.items():
        print(f"{name:<14} {value}")
    print(f"\n{'spiking layer':<30} {'V':>10} {'leak':>6} {'U_0/V':>6}")
    for name, neuron in snn.neurons.items():
        print(
            f"{name:<30} {float(neuron.threshold):>10.4f} {float(neuron.leak):>6.3f} "
            f"{float(neuron.initial_membrane):>6.2f}"
        )


def predict(options: Any) -> None:
    """Classify, print."""
    network, steps = Classifier(options.file), []
    shown = network.decisions(options.images, options.timesteps, options.confidence)
    for files, decision in shown:
        for lines in network.described(files, decision):
            print(lines, flush=True)
        steps += decision.steps.tolist()
    if options.confidence is not None:
        print(network.saved(steps, options.timesteps))


def export(options: Any) -> None:
    """Write what is asked for."""
    name = next(form for form in FORMS if getattr(options, form) is not None)
    path = getattr(options, name)
    check_output(path, options.file)
    network = Classifier(options.file, "cpu")
    with written(path) as temporary:
        FORMS[name](network, options.timesteps or network.timesteps, temporary)
    print(f"{path} is written, {path.stat().st_size / 2**20:.1f} MiB")


def _nir(network: Classifier, _: int, path: Path) -> None:
    graph = to_nir(network.snn, network.shape)
    import nir

    nir.write(path, graph)


def _onnx(network: Classifier, timesteps: int, path: Path) -> None:
    try:
        import onnxscript  # noqa: F401 (torch needs it)
    except ImportError as error:
        raise ImportError("--onnx needs the package onnxscript: pip install onnxscript") from error
    program = export_program(network.snn, timesteps, network.shape)
    torch.onnx.export(program, dynamo=True, verbose=False).save(str(path))  # type: ignore[union-attr]


def _pt2(network: Classifier, timesteps: int, path: Path) -> None:
    torch.export.save(export_program(network.snn, timesteps, network.shape), path)


FORMS: dict[str, Callable[[Classifier, int, Path], None]] = {
    "nir": _nir,
    "onnx": _onnx,
    "pt2": _pt2,
}


class _Progress:
    """One line that is written over on a terminal, a line each elsewhere."""

    def __call__(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Nothing is left of it on a terminal."""
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are; options in a column that fits them."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)


def _sides(size: Any) -> list[Any]:
    return size if isinstance(size, list) else [size, size]


def _pixels(about: dict[str, Any]) -> str:
    kept = about["normalisation"].settings()
    scaled = f"(x/255 − {kept['mean']}) / {kept['std']}" if kept else "x/127.5 − 1"
    return f"{scaled}, the shorter side at {about['resize']}" if about.get("resize") else scaled


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= MOST_STEPS:
        raise argparse.ArgumentTypeError(f"{text}; allowed: 1 to {MOST_STEPS}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text}; allowed: 0 to 999999999")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) not in (1, 2) or not all(n.isdecimal() and 0 < int(n) <= 4096 for n in parts):
        raise argparse.ArgumentTypeError(f"{text}; allowed: 1 to 4096, or HxW of that")
    return int(parts[0]), int(parts[-1])


def _share(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}; allowed: above 0, at most 1")


if __name__ == "__main__":
    sys.exit(main())
