"""Memory order: values are kept channels last, so a chunk is a matrix (T, M) as it lies.

(T, B, C, H, W), (T, B, C, L) and (T, B, n) alike.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_layout(x: Tensor) -> Tensor:
    """A (T, B, …) tensor of its own, images in channels-last order."""
    return from_matrix(to_matrix(x, copy=True), x.shape)


def to_matrix(x: Tensor, copy: bool = False) -> Tensor:
    """(T, B, …) → (T, M) in memory order: channels last."""
    if x.dim() > 3:
        x = x.movedim(2, -1)
    matrix = x.reshape(x.shape[0], -1)
    return matrix.clone(memory_format=torch.contiguous_format) if copy else matrix.contiguous()


def from_matrix(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo :func:`to_matrix`, as a view."""
    if len(shape) <= 3:
        return matrix.view(*shape)
    steps, batch, channels, *pixels = shape
    return matrix.view(steps, batch, *pixels, channels).movedim(-1, 2)


def channels_last(images: Tensor) -> Tensor:
    """(N, C, …) in that order; a copy where it is in another."""
    if images.dim() == 4:
        return images.contiguous(memory_format=torch.channels_last)
    return images.movedim(1, -1).contiguous().movedim(-1, 1)
