"""A gradient below an average pooling, not spread over the windows until someone has to."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import to_layout


@dataclass(frozen=True)
class PooledGradient:
    """∂L/∂O (T, B, C, H, W) below an average pooling, not yet spread over the windows.

    Attributes:
        above: ∂L/∂ of the pooled values, (T, B, C, H/size, W/size).
        size: of a window; windows fill the image.
        mask: (B, C, H, W) of a dropout between, or None.
    """

    above: Tensor
    size: int
    mask: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense form."""
        *rest, height, width = self.above.shape
        return torch.Size((*rest, height * self.size, width * self.size))

    def dense(self) -> Tensor:
        """Spread: every pixel of a window gets 1/size² of its gradient."""
        images = F.interpolate(self.above.flatten(0, 1), scale_factor=self.size) / self.size**2
        grad = images.unflatten(0, self.above.shape[:2])
        return to_layout(grad if self.mask is None else grad * self.mask)
