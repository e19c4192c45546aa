"""A gradient below an average pooling or a dropout, not spread until someone has to."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import to_layout


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
        if self.size == 1:
            return to_layout(self.above if self.mask is None else self.above * self.mask)
        images = F.interpolate(self.above.flatten(0, 1), scale_factor=self.size) / self.size**2
        grad = images.unflatten(0, self.above.shape[:2])
        return to_layout(grad if self.mask is None else grad * self.mask)


def pooled_shape(shape: torch.Size, size: int) -> torch.Size:
    """(T, B, C, H, W) → that of averages over windows, which may leave a rest; the same for 1."""
    if size == 1:
        return shape
    *rest, height, width = shape
    return torch.Size((*rest, height // size, width // size))
