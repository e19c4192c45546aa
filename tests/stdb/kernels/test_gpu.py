"""The GPU's kernels where there is no GPU: in Triton's interpreter, and through its compiler.

The interpreter takes what the compiler refuses, so both are needed.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")

import stdb  # noqa: E402
from stdb.kernels import gpu  # noqa: E402

FLOATS = ("fp32", "fp64")
# whole numbers that are 1 are constants, multiples of 16 are known to be, and more than 2³¹ is long
FORMS = ("any", "ones", "multiples", "long")
SCAN = {"count": "i32", "row_bytes": "i32", "steps": "i32"}


def specialisations():
    """(kernel, signature, constants) of all that :mod:`stdb.kernels.gpu` launches."""
    for real in FLOATS:
        for has_spikes in (False, True):
            pointers = {"current": f"*{real}", "membrane": f"*{real}", "packed": "*u8"}
            numbers = {"threshold": "fp32", "leak": "fp32"}
            signature = pointers | {"spikes": f"*{real}"} | SCAN | numbers
            yield "_fire", signature, {"has_spikes": has_spikes}
        pointers = {"grad": f"*{real}", "packed": "*u8", "times": "*i16"}
        reals = ("current", "before", "membranes", "carry", "sums")
        numbers = dict.fromkeys(("alpha", "beta", "decay", "threshold", "leak"), "fp32")
        signature = pointers | dict.fromkeys(reals, f"*{real}") | SCAN | {"start": "i32"} | numbers
        yield from (("_backpropagate", signature, constants) for constants in backward_forms())
    yield "_note_last_spikes", {"packed": "*u8", "times": "*i16"} | SCAN | {"start": "i32"}, {}


def backward_forms():
    """The constants of a backward pass: each formula bare, and with all that it can have."""
    flags = ("over_threshold", "has_carry", "temporal", "learns_threshold", "learns_leak")
    for formula, whole in itertools.product(stdb.surrogate.FORMULAS.values(), (False, True)):
        recalled = {"has_membrane": whole or formula != "age", "constant": False}
        yield {"formula": formula} | recalled | dict.fromkeys(flags, whole)
    of_age = {"formula": "age", "has_membrane": False, "constant": False, "learns_leak": False}
    few = {"has_carry": True, "temporal": True, "learns_threshold": True, "over_threshold": False}
    yield of_age | few
    yield of_age | few | {"has_membrane": True, "constant": True, "over_threshold": True}


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(
    ("name", "signature", "constants"),
    list(specialisations()),
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_compiler_takes_every_kernel(name, signature, constants, architecture):
    """Ahead of time, for GPUs that are not here, in the forms that Triton makes of numbers."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(gpu, name)
    for form in FORMS:
        ones = [n for n, kind in signature.items() if form == "ones" and kind == "i32"]
        fixed = constants | {"block": gpu.BYTES_PER_PROGRAM} | dict.fromkeys(ones, 1)
        types = signature | dict.fromkeys(fixed, "constexpr")
        if form == "long":
            types["count"] = "i64"
        multiples = [
            (place,)
            for place, argument in enumerate(kernel.arg_names)
            if form == "multiples" and types[argument][0] in "*i"
        ]
        source = ASTSource(
            fn=kernel,
            signature={argument: types[argument] for argument in kernel.arg_names},
            constexprs=fixed,
            attrs={place: [["tt.divisibility", 16]] for place in multiples},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
        assert compiled.asm["cubin"], form


def test_all_kernels_are_compiled_here():
    """A kernel that is added to the file is added to this test."""
    kernels = {name for name, value in vars(gpu).items() if hasattr(value, "arg_names")}
    assert kernels == {name for name, _, _ in specialisations()}
    for name, signature, constants in specialisations():
        assert set(getattr(gpu, name).arg_names) == {*signature, *constants, "block"}


def test_the_interpreter_agrees_with_the_reference():
    """The tests of all backends, with the GPU's in the place of the CPU's."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # read when Triton is imported
    tests = Path(__file__).with_name("test_backends.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "stdb.kernels.gpu" in subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", str(tests)],
        env=environment, capture_output=True, text=True,
    ).stdout  # fmt: skip
