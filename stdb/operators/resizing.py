"""Images of another size: upsampling, and channels that become pixels."""

from typing import ClassVar

from torch import nn

from .fixed import Averaging, Fixed


class Upsampling(Averaging):
    """(T, B, C, H, W) → (T, B, C, h, w): each pixel one below, or a mean of those beside it."""

    name = "upsampling"
    kinds: ClassVar = {
        nn.Upsample: (
            "size",
            "scale_factor",
            "mode",
            "align_corners",
            "recompute_scale_factor",
        ),
        nn.UpsamplingNearest2d: ("size", "scale_factor"),
        nn.UpsamplingBilinear2d: ("size", "scale_factor"),
    }


class PixelShuffle(Fixed):
    """(T, B, C·r², H, W) → (T, B, C, H·r, W·r)."""

    name = "pixel shuffle"
    kinds: ClassVar = {nn.PixelShuffle: ("upscale_factor",)}


class PixelUnshuffle(Fixed):
    """(T, B, C, H·r, W·r) → (T, B, C·r², H, W)."""

    name = "pixel unshuffle"
    kinds: ClassVar = {nn.PixelUnshuffle: ("downscale_factor",)}
