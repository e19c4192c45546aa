"""Images as people have them, a tensor or a DataLoader's batches; and the accuracy on such."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .network import SpikingNetwork


@torch.no_grad()
def evaluate(
    snn: SpikingNetwork, batches: Iterable[Any], timesteps: int, *, sample_ids: Tensor | None = None
) -> Tensor:
    """(T,) float64: the share of images that the network decides rightly after every step t.

    The output layer only accumulates (Eq. 4), so one presentation of T steps gives all of them. The
    network is in evaluation mode meanwhile.

    Args:
        snn: the network.
        batches: (images, labels) each, as of a DataLoader; they are brought to its device and type.
        timesteps: T.
        sample_ids: (N,) int64, the images' random streams; by default their places.

    Raises:
        ValueError: there is no image, or a batch has no labels.
    """
    like = next(snn.parameters())
    right, seen = torch.zeros(timesteps, dtype=torch.int64, device=like.device), 0
    was_training = snn.training
    snn.eval()
    try:
        for batch in batches:
            if not isinstance(batch, list | tuple) or len(batch) != 2:
                raise ValueError(
                    f"a batch is a {type(batch).__name__}; allowed: (images, labels), as a "
                    "DataLoader gives"
                )
            images, labels = batch[0].to(like), batch[1].to(like.device)
            ids = torch.arange(seen, seen + len(images), device=like.device)
            if sample_ids is not None:
                ids = sample_ids.to(like.device)[seen : seen + len(images)]
            logits = snn.logits_over_time(images, timesteps, sample_ids=ids)
            right += (logits.argmax(2) == labels).sum(1)
            seen += len(images)
    finally:
        snn.train(was_training)
    if not seen:
        raise ValueError("there are no images to evaluate on")
    return right.cpu().double() / seen


def all_images(images: Tensor | Iterable[Any]) -> Tensor:
    """Images as one tensor (N, C, H, W).

    Args:
        images: that tensor, or batches: tensors, or (images, labels) as of a DataLoader.
    """
    if isinstance(images, Tensor):
        return images
    batches = list(_images(images))
    if not batches:
        raise ValueError("there are no images")
    return torch.cat(batches)


def _images(batches: Iterable[Any]) -> Iterator[Tensor]:
    for batch in batches:
        images = batch[0] if isinstance(batch, list | tuple) and batch else batch
        if not isinstance(images, Tensor):
            raise ValueError(
                f"a batch is a {type(batch).__name__}; allowed: a tensor of images, or (images, "
                "labels) as a DataLoader gives"
            )
        yield images
