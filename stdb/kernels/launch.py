"""How Triton's kernels are launched, and what they share; ``triton`` is None where it is missing.

A program has whole bytes of spikes, eight neurons each, and takes them through all steps.
"""

from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["BYTES_PER_PROGRAM", "OPTIONS", "launch", "triton"]

BYTES_PER_PROGRAM = 64  # 512 neurons
# numbers are rounded as plain torch rounds them: no product and sum in one
OPTIONS = {"enable_fp_fusion": False}

if triton is not None:

    @triton.jit
    def spikes_at(packed, t, row_bytes, byte, inside):
        """Whether each of eight neurons of each byte ``inside`` has its bit set in row ``t``."""
        row = packed + tl.cast(t, tl.int64) * row_bytes
        value = tl.load(row + byte, mask=inside, other=0).to(tl.int32)
        return ((value[:, None] >> tl.arange(0, 8)[None, :]) & 1) > 0

    @triton.jit
    def store_bits(packed, t, row_bytes, byte, values):
        """Write row ``t``: a bit of each of eight neurons of each byte."""
        weight = (1 << tl.arange(0, 8))[None, :]
        value = tl.sum(tl.where(values, weight, 0), axis=1)
        row = packed + tl.cast(t, tl.int64) * row_bytes
        tl.store(row + byte, value.to(tl.uint8), mask=byte < row_bytes)


def launch(kernel: Any, row_bytes: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel over all bytes of a row of spikes."""
    grid = (triton.cdiv(row_bytes, BYTES_PER_PROGRAM),)
    kernel[grid](*arguments, **constants, block=BYTES_PER_PROGRAM, **OPTIONS)
