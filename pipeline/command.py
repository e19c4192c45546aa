"""The boundary between what one runs, ``python -m pipeline.…``, and the person who runs it.

An error of a known kind, one that a person can mend, is a line on stderr. Any other is a fault of
this project: a line, and its traceback in a file. Exit statuses:

    0 done    1 a mistake, or something that is missing    2 an unknown argument
    70 a fault of ours    130 interrupted
"""

import argparse
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import DataError, DivergenceError, ParamsError, StageError
from stdb import ConversionError, WeightsError

MISTAKE, FAULT, INTERRUPTED = 1, 70, 130  # exit statuses; 70 is sysexits.h's "internal error"
KNOWN = (
    *(StageError, DataError, ParamsError, DivergenceError, ConversionError, WeightsError),
    *(OSError, MemoryError),
)
FOLDER = Path(".results")  # of tracebacks
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # in torch's words

Main = Callable[[Sequence[str]], int | None]


def command(main: Main) -> Callable[[Sequence[str]], int]:
    """A command's ``main`` that gives its exit status, whatever happens in it."""

    @wraps(main)
    def bounded(arguments: Sequence[str]) -> int:
        return status_of(lambda: main(arguments))

    return bounded


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """A command line whose ``--help`` is the module's docstring; unknown arguments are refused."""
    return argparse.ArgumentParser(
        prog=f"python -m pipeline.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def status_of(
    work: Callable[[], int | None], where: str = "error", interrupted: str = "interrupted"
) -> int:
    """Do the work; its exit status, or that of the error that it ended with, which is said.

    Args:
        work: gives an exit status; None is 0.
        where: what the line begins with.
        interrupted: what is said after ctrl-C.
    """
    print_on_any_terminal()
    try:
        return work() or 0
    except KeyboardInterrupt:
        complain(interrupted)
        return INTERRUPTED
    except BrokenPipeError:  # `… | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return MISTAKE
    except Exception as error:
        known = is_known(error)
        complain(f"{where}: {message(error) if known else fault(error)}")
        return MISTAKE if known else FAULT


def is_known(error: BaseException) -> bool:
    """Whether it is an error that a person can mend."""
    return isinstance(error, KNOWN) or is_out_of_memory(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was not enough: a GPU's, or this machine's, which torch has no type for."""
    said = str(error).lower()
    of_torch = isinstance(error, RuntimeError) and any(words in said for words in OUT_OF_MEMORY)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or of_torch


def message(error: BaseException) -> str:
    """What a known error says, or its kind where it says nothing."""
    text = str(error).strip() or type(error).__name__
    if not is_out_of_memory(error):
        return text
    return (
        f"there is not enough memory ({' '.join(text.split())[:200]}); a smaller batch_size, "
        "stdb.micro_batch, network.width or data.image_size needs less"
    )


def fault(error: BaseException) -> str:
    """A line on an unknown error; its traceback goes into a file."""
    said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    told = "".join(traceback.format_exception(error))
    head = f"{' '.join(sys.argv)}\nPython {platform.python_version()}, {platform.platform()}\n\n"
    path = FOLDER / f"fault-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    try:
        FOLDER.mkdir(exist_ok=True)
        path.write_text(head + told, encoding="utf-8", errors="backslashreplace")
    except OSError:
        complain(told)
        where = "its traceback is above"
    else:
        where = f"its traceback is in {path}"
    return f"this is a fault of ours, not of yours: {said}; {where}, please report it"


def complain(text: str) -> None:
    """A line on stderr, where there is one."""
    print(text, file=sys.stderr, flush=True)


def print_on_any_terminal() -> None:
    """What a terminal has no letters for is printed as ``?``; so do processes that are started."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)  # a test's stream has none
        if reconfigure is not None:
            reconfigure(errors="replace")
    encoding = os.environ.get("PYTHONIOENCODING", "").partition(":")[0]
    os.environ["PYTHONIOENCODING"] = f"{encoding}:replace"
