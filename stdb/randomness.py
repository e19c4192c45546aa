"""Counter-based random numbers: a function of (seed, epoch, sample, t, pixel) and nothing else.

So a sample's spike train and its dropout masks do not depend on the batch it sits in, on the number
of workers, or on a restart. A *key* is an int64 word that names a stream of numbers.
"""

import torch
from torch import Tensor

from .kernels import gpu, gpu_random
from .kernels.gpu_random import FACTORS, GOLDEN

_DROPOUT_STREAM = 1 << 40  # no step t of an encoder with the same seed comes here


def _shift(word: Tensor, bits: int) -> Tensor:
    """Logical right shift of signed 64-bit words."""
    return (word >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def mix(word: Tensor) -> Tensor:
    """Hash int64 words: the output function of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    word = (word ^ _shift(word, 30)).mul_(FACTORS[0])
    word = word.bitwise_xor_(_shift(word, 27)).mul_(FACTORS[1])
    return word.bitwise_xor_(_shift(word, 31))


def derive(keys: Tensor, number: int | Tensor) -> Tensor:
    """Derive stream keys from ``keys`` and a further coordinate (seed, epoch, sample, t, layer)."""
    if isinstance(number, int):
        number = torch.full((), number, device=keys.device)
    if gpu.available(keys.device):
        return gpu_random.derive(keys, number)
    return mix((keys + GOLDEN) ^ mix(number + GOLDEN))


def uniform(keys: Tensor, count: int) -> Tensor:
    """The first ``count`` numbers of each stream: ``(*keys.shape, count)`` float32 in [0, 1)."""
    if gpu.available(keys.device):
        return gpu_random.uniform(keys, count)
    counter = torch.arange(1, count + 1, device=keys.device).mul_(GOLDEN)
    return _shift(mix(keys[..., None] + counter), 40).float().mul_(2.0**-24)


def sample_keys(sample_ids: Tensor, epoch: int) -> Tensor:
    """(B,) int64: the random streams of these samples in this epoch."""
    return derive(derive(torch.zeros_like(sample_ids), epoch), sample_ids)


def dropout_mask(
    keys: Tensor, seed: int, layer: int, rate: float, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """An inverted dropout mask: 0 with probability ``rate``, else 1/(1 − rate).

    Args:
        keys: (B,) int64, the samples' random streams.
        seed: of the network.
        layer: number of the dropout layer.
        rate: in [0, 1].
        shape: (B, …).
        dtype: of the mask.
    """
    keys = derive(derive(keys, seed), _DROPOUT_STREAM + layer)
    if gpu.available(keys.device):
        return gpu_random.dropout_mask(keys, rate, shape, dtype)
    keep = uniform(keys, shape[1:].numel()) >= rate
    return keep.to(dtype).div_(1 - rate or 1).view(shape)
