"""How Triton's kernels are launched, and what they share; ``triton`` is None where it is missing.

A program has whole bytes of spikes, eight neurons each, and takes them through all steps.
"""

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["BYTES_PER_PROGRAM", "OPTIONS", "are_alike", "launch", "triton"]

BYTES_PER_PROGRAM = 64  # 512 neurons
# Numbers are rounded as plain torch rounds them: no product and sum in one. A thread has a byte's
# eight neurons: it packs their spikes by itself, and reads 16 bytes of bfloat16 at once.
OPTIONS = {"enable_fp_fusion": False, "num_warps": BYTES_PER_PROGRAM // 32}

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

    @triton.jit
    def membranes_before(before, neuron, inside, alike: tl.constexpr):
        """Membrane potentials of the step before a chunk: one of each neuron, or one of all."""
        return tl.load(before + (neuron * 0 if alike else neuron), mask=inside, other=0.0)


def are_alike(before: Tensor | None) -> bool:
    """Whether the membrane potentials before a chunk are one number, expanded."""
    return before is not None and before.stride(0) == 0


def launch(kernel: Any, row_bytes: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel over all bytes of a row of spikes, on the GPU that its tensors are on."""
    grid = (triton.cdiv(row_bytes, BYTES_PER_PROGRAM),)
    where = next(x for x in arguments if isinstance(x, Tensor))
    with torch.cuda.device_of(where):  # Triton launches on the current one
        kernel[grid](*arguments, **constants, block=BYTES_PER_PROGRAM, **OPTIONS)
