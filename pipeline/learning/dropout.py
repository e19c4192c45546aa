"""An ANN's dropout as a function of (seed, epoch, sample), as the SNN's is."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from stdb import dropout_mask

DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d)  # what nn.Dropout and its kind call, too
CHECKPOINTED = (
    "a dropout within torch.utils.checkpoint would have another mask in the backward pass; "
    "allowed: dropouts outside of it"
)


class SampleDropout(TorchFunctionMode):
    """Makes the dropout of a forward pass a function of (seed, epoch, sample), as the SNN's is.

    So an image drops the same activations whatever batch and worker it comes to. Dropouts are
    numbered in the order in which ``with SampleDropout(seed, keys): network(images)`` calls them,
    layers and functions alike.

    Args:
        seed: of the training.
        keys: (B,) int64, the random streams of the images.

    Attributes:
        calls: how many dropouts have been called.

    Raises:
        RuntimeError: a dropout is called within torch.utils.checkpoint, which calls it again.
    """

    def __init__(self, seed: int, keys: Tensor) -> None:
        super().__init__()
        self.seed, self.keys, self.calls = seed, keys, 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Called in the place of each function of torch."""
        if func not in DROPOUTS:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._drop(func is not F.dropout, *args, **(kwargs or {}))

    def _drop(
        self,
        channels: bool,
        input: Tensor,  # named as torch does
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Tensor:
        """Times the mask of this call, of single activations or of whole channels."""
        if not training or p == 0:
            return input
        drawn = input.shape
        if channels:
            drawn = torch.Size((*drawn[:2], *[1] * len(drawn[2:])))
        mask = dropout_mask(self.keys, self.seed, self.calls - 1, p, drawn, input.dtype)
        with disable_saved_tensors_hooks(CHECKPOINTED):
            return input.mul_(mask) if inplace else input * mask
