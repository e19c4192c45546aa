"""The random numbers of :mod:`stdb.randomness` on a GPU, in Triton: the same, a launch each."""

import torch
from torch import Tensor

from .launch import launch, triton

# of SplitMix64, as signed 64-bit integers
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
FACTORS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))

if triton is not None:
    import triton.language as tl

    _GOLDEN = tl.constexpr(GOLDEN)
    _FIRST, _SECOND = tl.constexpr(FACTORS[0]), tl.constexpr(FACTORS[1])

    @triton.jit
    def _mix(word):
        """The output function of SplitMix64, of signed words."""
        word = (word ^ ((word >> 30) & ((1 << 34) - 1))) * _FIRST
        word = (word ^ ((word >> 27) & ((1 << 37) - 1))) * _SECOND
        return word ^ ((word >> 31) & ((1 << 33) - 1))

    @triton.jit
    def _derive(keys, numbers, out, count, block: tl.constexpr):
        place = tl.program_id(0).to(tl.int64) * block * 8 + tl.arange(0, block * 8)
        inside = place < count
        word = tl.load(keys + place, mask=inside, other=0) + _GOLDEN
        number = tl.load(numbers + place, mask=inside, other=0) + _GOLDEN
        tl.store(out + place, _mix(word ^ _mix(number)), mask=inside)

    @triton.jit
    def _draw(
        keys, out, count, numbers, channels, pixels, rate, scale: tl.float64, masks: tl.constexpr,
        block: tl.constexpr,
    ):  # fmt: skip
        place = tl.program_id(0).to(tl.int64) * block * 8 + tl.arange(0, block * 8)
        inside = place < count
        number = place % numbers
        if masks:  # channels last, drawn channels first
            number = number % channels * pixels + number // channels
        word = tl.load(keys + place // numbers, mask=inside, other=0)
        word = _mix(word + (number + 1).to(tl.int64) * _GOLDEN)
        value = ((word >> 40) & ((1 << 24) - 1)).to(tl.float32) * (1.0 / (1 << 24))
        if masks:
            kept = tl.full([], scale, out.dtype.element_ty)
            tl.store(out + place, tl.where(value >= rate, kept, 0.0), mask=inside)
        else:
            tl.store(out + place, value, mask=inside)


def derive(keys: Tensor, numbers: Tensor) -> Tensor:
    """See :func:`stdb.randomness.derive`."""
    both = torch.broadcast_tensors(keys, numbers.to(keys.device))
    keys, numbers = (x.contiguous() for x in both)
    out = torch.empty_like(keys)
    launch(_derive, -(-out.numel() // 8), keys, numbers, out, out.numel())
    return out


def uniform(keys: Tensor, count: int) -> Tensor:
    """See :func:`stdb.randomness.uniform`."""
    out = torch.empty(*keys.shape, count, dtype=torch.float32, device=keys.device)
    _launch(keys, out, count, 1, count, 0.0, 1.0, masks=False)
    return out


def dropout_mask(keys: Tensor, rate: float, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """(B, …) in channels-last order: that of :func:`stdb.randomness.dropout_mask` of these keys."""
    batch, channels, *sides = shape
    out = torch.empty(batch, *sides, channels, dtype=dtype, device=keys.device)
    scale = torch.ones((), dtype=dtype).div_(1 - rate or 1).item()
    count = shape[1:].numel()
    _launch(keys, out, count, channels, count // channels, rate, scale, masks=True)
    return out.movedim(-1, 1)


def _launch(
    keys: Tensor, out: Tensor, numbers: int, channels: int, pixels: int, rate: float, scale: float,
    masks: bool,
) -> None:  # fmt: skip
    launch(
        _draw, -(-out.numel() // 8), keys.contiguous(), out, out.numel(), numbers, channels, pixels,
        rate, scale, masks=masks,
    )  # fmt: skip
