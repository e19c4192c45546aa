"""The GPU's kernels where there is no GPU: in Triton's interpreter, and through its compiler.

The interpreter takes what the compiler refuses, so both are needed.
"""

import itertools
import multiprocessing
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")

import stdb  # noqa: E402
from stdb.kernels import gpu, gpu_gradients, gpu_random, launch  # noqa: E402

# membranes, and currents and gradients beside them
FLOATS = (("fp32", "fp32"), ("fp32", "bf16"), ("fp64", "fp64"))
INTEGERS = dict.fromkeys(("count", "steps", "start", "channels", "width", "height"), "i32")
INTEGERS |= dict.fromkeys(
    ("row", "column", "in_bytes", "channel_bytes", "numbers", "pixels", "source_count"), "i32"
)
KERNELS = {
    name: value
    for module in (gpu, gpu_gradients, gpu_random)
    for name, value in vars(module).items()
    if "block" in getattr(value, "arg_names", ())  # else it is called by one
}
# bytes that the compiler may put on the stack, for more threads at once, by the type of membranes
SPILLED = {"*fp32": 8, "*fp64": 64}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def specialisations():
    """(kernel, types of its arguments, constants) of all that the GPU's backend launches."""
    bits = {"packed": "*u8", "times": "*i16", "keys": "*i64", "rate": "fp32", "scale": "fp64"}
    for real, read in FLOATS:
        reals = ("bias", "membrane", "mask", "before", "membranes", "carry", "passed", "totals")
        types = bits | dict.fromkeys((*reals, "sums"), f"*{real}") | INTEGERS
        types |= dict.fromkeys(("current", "spikes", "averages", "above", "target"), f"*{read}")
        types |= dict.fromkeys(("alpha", "beta", "threshold", "leak"), "fp64")
        for constant, whole in itertools.product((False, True), repeat=2):
            flags = dict.fromkeys(("has_bias", "has_spikes", "notes", "alike"), whole)
            yield "_fire", types, {"constant": constant} | flags
        for constants in backward_forms():
            yield "_backpropagate", types | {"kept": "*u8"}, constants
        yield "_unpack", types, {}
        yield "_draw", types | {"out": f"*{real}", "numbers": "i32"}, {"masks": True}
        for size, has_mask in itertools.product((1, 2, 3), (False, True)):
            yield "_average", types, {"size": size, "has_mask": has_mask}
    other = types | {"kept": "*i16", "above": "*bf16", "mask": "*fp32", "target": "*fp32"}
    yield from (("_backpropagate", other, form) for form in backward_forms() if is_of_age(form))
    yield "_draw", types | {"out": "*fp32", "numbers": "i32"}, {"masks": False}
    yield "_derive", types | {"out": "*i64", "numbers": "*i64"}, {}
    yield "_note_last_spikes", bits | INTEGERS, {}


def is_of_age(constants):
    return constants["formula"] == "age"


def backward_forms():
    """The constants of a backward pass: each formula bare, and with all that it can have."""
    flags = ("over_threshold", "has_mask", "has_bias", "has_carry", "carries", "temporal")
    flags += ("sums_channels", "learns_threshold", "learns_leak", "alike")
    for formula, whole in itertools.product(stdb.surrogate.FORMULAS.values(), (False, True)):
        recalled = {"has_membrane": whole or formula != "age", "constant": False}
        recalled["keeps_membrane"] = whole or formula in ("linear", "exponential")
        yield (
            {"formula": formula, "size": 2 if whole else 1} | recalled | dict.fromkeys(flags, whole)
        )
        # what learns V over U/V, of a constant current, below a pool without a mask
        some = dict.fromkeys(flags, True) | {"has_mask": False, "learns_leak": False}
        recalled["keeps_membrane"] = formula in ("linear", "exponential")
        if not whole:
            some |= {"formula": formula, "size": 3} | recalled
            yield some | {"has_membrane": True, "constant": True}
            yield some | {"over_threshold": False, "size": 1}


@pytest.fixture(scope="module")
def processes():
    """What compiles keeps Python's lock; each of them imports torch, so they are few."""
    count = min(4, os.cpu_count() or 1)
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize(
    ("form", "architecture"),
    [*itertools.product(("any", "multiples"), (80, 90, 100)), ("ones", 90), ("long", 90)],
)
def test_the_compiler_takes_every_kernel(form, architecture, tmp_path, processes):
    """Ahead of time, for GPUs that are not here; what they compute with stays in registers.

    Triton makes forms of numbers: whole ones that are 1 are constants, multiples of 16 are known to
    be, and more than 2³¹ is long.
    """
    made = partial(compile_for, form=form, architecture=architecture, folder=tmp_path)
    for (name, types, constants), (used, ptx) in zip(
        specialisations(), processes.map(made, specialisations(), chunksize=4), strict=True
    ):
        stack, local = re.findall(r"(?:STACK|LOCAL):(\d+)", used)
        assert int(stack) <= SPILLED[types.get("bias", "*fp32")], (name, types, constants, used)
        assert int(local) == 0, (name, types, constants, used)
        if form == "multiples":
            narrow = narrow_accesses(ptx)
            assert narrow <= narrow_ones(name, constants), (name, types, constants, narrow)


def compile_for(special, form, architecture, folder):
    """What a compiled kernel takes, as cuobjdump says it, and its PTX."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    name, given, constants = special
    kernel = KERNELS[name]
    looked_at = {p.name for p in kernel.params if not p.do_not_specialize}
    small = {"count", "source_count", "channels", "channel_bytes"} & set(kernel.arg_names)
    ones = small if form == "ones" else ()
    fixed = constants | {"block": launch.BYTES_PER_PROGRAM} | dict.fromkeys(ones, 1)
    types = given | dict.fromkeys(fixed, "constexpr")
    if form == "long":
        types["count"] = types["source_count"] = "i64"
    multiples = [
        (place,)
        for place, argument in enumerate(kernel.arg_names)
        if form == "multiples" and types[argument][0] in "*i" and argument in looked_at
    ]
    source = ASTSource(
        fn=kernel,
        signature={argument: types[argument] for argument in kernel.arg_names},
        constexprs=fixed,
        attrs={place: [["tt.divisibility", 16]] for place in multiples},
    )
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options=launch.OPTIONS)
    cubin = folder / f"{os.getpid()}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    used = subprocess.run(
        [CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    return used, compiled.asm["ptx"]


def narrow_accesses(ptx):
    """Reads and writes of global memory by less than 16 bytes at once, beside spikes' bits."""
    found = re.findall(r"(ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
    assert found
    wide = [(kind, int(many or 1) * int(bits) // 8) for kind, many, bits in found]
    return Counter((kind, size) for kind, size in wide if 1 < size < 16)


def narrow_ones(name, constants):
    """Those that a kernel may have: what is read once a program, sums, and ages, of one byte."""
    some = Counter()
    for size in (4, 8):
        some["ld", size] += 8 * (constants.get("has_bias", False) or name in ("_draw", "_derive"))
        some["st", size] += 3 * constants.get("learns_threshold", False)
    for kind in ("ld", "st"):
        some[kind, 8] += constants.get("formula") == "age"
    return some


def test_what_changes_at_every_call_makes_no_other_kernel():
    """Steps, their start and numbers that are learned are not looked at by the compiler."""
    for name, kernel in KERNELS.items():
        changing = {"steps", "start"} & set(kernel.arg_names)
        assert changing == {p.name for p in kernel.params if p.do_not_specialize} & changing, name
        learned = {"threshold", "leak", "alpha", "beta"} & set(kernel.arg_names)
        fixed = {p.name for p in kernel.params if p.annotation_type == "fp64"}
        assert learned <= fixed, name


def test_all_kernels_are_compiled_here():
    """A kernel that is added to the backend is added to this test."""
    assert set(KERNELS) == {name for name, _, _ in specialisations()}
    for name, types, constants in specialisations():
        arguments = set(KERNELS[name].arg_names)
        assert arguments <= {*types, *constants, "block"}
        assert set(constants) <= arguments


def test_the_interpreter_agrees_with_the_reference():
    """The tests of all backends, with the GPU's in the place of the CPU's."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # read when Triton is imported
    here = Path(__file__).parent
    devices = f"{here.parent / 'test_devices.py'}::test_a_network_whose_products_do_not_read_bits"
    files = ("test_backends.py", "test_gpu_random.py", "test_gpu_workers.py")
    tests = [*(str(here / name) for name in files), devices]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *tests],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "stdb.kernels.gpu] PASSED" in result.stdout
