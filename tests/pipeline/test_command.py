"""The boundary: one line for a mistake, a file with the traceback for a fault of ours."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import command
from pipeline.command import is_known, message, parser, status_of
from pipeline.errors import DataError, DivergenceError, ParamsError, StageError
from stdb import ConversionError
from tests.pipeline.support import ROOT

ON_TOP = sorted(p.stem for p in (ROOT / "pipeline").glob("*.py") if "__main__" in p.read_text())
NO_MEMORY = "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you"


def raising(error):
    def work():
        raise error

    return work


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")


@pytest.mark.parametrize(
    "error",
    [
        *(kind("no room") for kind in (StageError, DataError, ParamsError, DivergenceError)),
        *(kind("no room") for kind in (ConversionError, OSError, MemoryError)),
        *(torch.OutOfMemoryError("CUDA: no room"), RuntimeError(f"{NO_MEMORY} no room")),
    ],
    ids=repr,
)
def test_a_mistake_is_one_line(capsys, error):
    """Exit status 1, no traceback, and no file."""
    assert status_of(raising(error)) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: .*no room.*\n", said)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "error", [KeyError("x"), ValueError("x"), RuntimeError("x\ny"), AssertionError()], ids=repr
)
def test_a_fault_of_ours_is_one_line_and_a_file(capsys, error):
    """Exit status 70; the file has the traceback, and that of its cause."""

    def work():
        try:
            raise OSError("the cause")
        except OSError as cause:
            raise error from cause

    assert status_of(work) == 70
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"error: this is a fault of ours, not of yours: \w+:.*please report it\n", said
    )
    told = Path(re.search(r"in (\.results/fault-\S+\.txt),", said)[1]).read_text()
    assert "raise error from cause" in told
    assert "the cause" in told


def test_a_traceback_that_cannot_be_kept_is_shown(capsys):
    """It is the only trace of the fault."""
    Path(".results").write_text("in the way")
    assert status_of(raising(KeyError("a bug"))) == 70
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.endswith("its traceback is above, please report it\n")


def test_an_interruption_has_the_status_of_ctrl_c(capsys):
    """And says what becomes of the work."""
    assert status_of(raising(KeyboardInterrupt()), interrupted="goes on later") == 130
    assert capsys.readouterr().err == "goes on later\n"


def test_what_goes_well_has_its_own_status():
    """None is 0."""
    assert status_of(lambda: None) == 0
    assert status_of(lambda: 3) == 3


def test_no_memory_has_a_remedy():
    """The allocator's own words have none."""
    assert "a smaller batch_size" in message(MemoryError())
    assert not is_known(RuntimeError("shapes cannot be multiplied"))


def test_unknown_arguments_are_refused(capsys):
    """Also those that begin as a known one."""
    line = parser("What it does.", "name")
    line.add_argument("--number")
    for wrong in (["more"], ["--fast"], ["--num", "3"]):
        with pytest.raises(SystemExit) as caught:
            line.parse_args(wrong)
        assert caught.value.code == 2
        assert "python -m pipeline.name: error: " in capsys.readouterr().err


def test_an_ascii_terminal_gets_question_marks(monkeypatch):
    """Nothing that is said may end a stage; processes that are started do alike."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    command.print_on_any_terminal()
    print("λ = 1, café", flush=True)
    assert written.getvalue() == b"? = 1, caf?\n"
    told = subprocess.run([sys.executable, "-c", "print('λ')"], capture_output=True, check=True)
    assert told.stdout == b"?\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_TOP)
def test_help_says_what_a_command_does_and_does_nothing(name):
    """In a terminal that has ASCII only."""
    before = {p: p.stat().st_mtime for p in (ROOT / "report").iterdir()}
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    result = subprocess.run(
        [sys.executable, "-m", f"pipeline.{name}", "--help"],
        cwd=ROOT, env=ascii_only | {"PATH": path, "HOME": str(Path.home())},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"python -m pipeline.{name}" in result.stdout
    assert "Traceback" not in result.stderr
    assert {p: p.stat().st_mtime for p in (ROOT / "report").iterdir()} == before
