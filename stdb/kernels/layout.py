"""Memory order: (T, B, C, H, W) is kept channels last, so a chunk is a matrix (T, M) as it lies."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_layout(x: Tensor) -> Tensor:
    """A (T, B, …) tensor of its own, images in channels-last order."""
    return from_matrix(to_matrix(x, copy=True), x.shape)


def to_matrix(x: Tensor, copy: bool = False) -> Tensor:
    """(T, B, …) → (T, M) in memory order: channels last for images."""
    if x.dim() == 5:
        x = x.permute(0, 1, 3, 4, 2)
    matrix = x.reshape(x.shape[0], -1)
    return matrix.clone(memory_format=torch.contiguous_format) if copy else matrix.contiguous()


def from_matrix(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo :func:`to_matrix`, as a view."""
    if len(shape) == 5:
        t, b, c, h, w = shape
        return matrix.view(t, b, h, w, c).permute(0, 1, 4, 2, 3)
    return matrix.view(*shape)
