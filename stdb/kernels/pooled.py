"""A gradient below an average pooling or a dropout, not spread until someone has to."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import from_matrix, to_layout, to_matrix


@dataclass(frozen=True)
class PooledGradient:
    """∂L/∂O (T, B, C, H, W) below an average pooling, not yet spread over the windows.

    With a size of 1 it is that below a dropout, of any shape, not yet masked.

    Attributes:
        above: ∂L/∂ of the pooled values, (T, B, C, H/size, W/size).
        size: of a window; windows fill the image.
        mask: (B, …) of a dropout between, or None.
    """

    above: Tensor
    size: int
    mask: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense form."""
        if self.size == 1:
            return self.above.shape
        *rest, height, width = self.above.shape
        return torch.Size((*rest, height * self.size, width * self.size))

    @property
    def row(self) -> int:
        """Pixels of an image's row."""
        return self.shape[-1] if len(self.shape) > 3 else 1

    def dense(self) -> Tensor:
        """Spread: every pixel of a window gets 1/size² of its gradient."""
        if self.size == 1 and self.mask is None:
            return to_layout(self.above)
        grad = self.above
        if self.size > 1:
            images = F.interpolate(grad.flatten(0, 1), scale_factor=self.size) / self.size**2
            grad = images.unflatten(0, grad.shape[:2])
        if self.mask is not None:
            grad = grad * self.mask
        return from_matrix(to_matrix(grad), grad.shape)


def pooled_shape(shape: torch.Size, size: int) -> torch.Size:
    """(T, B, C, H, W) → that of averages over windows, which may leave a rest; the same for 1."""
    if size == 1:
        return shape
    *rest, height, width = shape
    return torch.Size((*rest, height // size, width // size))
