"""An ANN's dropout as a function of (seed, epoch, sample), as the SNN's is."""

from functools import partial

import torch
from torch import Tensor, nn

from stdb import dropout_mask


class SampleDropout:
    """Makes a network's dropout a function of (seed, epoch, sample), as the SNN's is.

    So an image drops the same activations whatever batch and worker it comes to.

    Attributes:
        keys: (B,) int64, the random streams of the images that are presented next.
    """

    def __init__(self, network: nn.Module, seed: int) -> None:
        self.seed, self.keys = seed, torch.zeros(0, dtype=torch.int64)
        dropouts = [m for m in network.modules() if isinstance(m, nn.Dropout)]
        for number, module in enumerate(dropouts):
            module.forward = partial(self._drop, module, number)  # type: ignore[method-assign]

    def _drop(self, module: nn.Dropout, number: int, x: Tensor) -> Tensor:
        if not module.training or module.p == 0:
            return x
        return x * dropout_mask(self.keys, self.seed, number, module.p, x.shape, x.dtype)
