"""Sums over calibration images that do not depend on how many workers share them.

Workers have whole batches. What is added up in floating point is added batch by batch, in the order
of the batches, so that one worker and several find the same to the last bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Reduce = Callable[[Tensor, str], Tensor]


@dataclass(frozen=True)
class Workers:
    """The workers that share the calibration images, seen from one of them.

    Args:
        rank: which it is: of all batches it has every ``world``-th, from this one on.
        world: how many there are.
        reduce: ``(tensor, "max" or "sum")`` → the same over all of them; None for a single one.
        device: where numbers that only count are made.
    """

    rank: int
    world: int
    reduce: Reduce | None
    device: torch.device

    def total(self, count: int) -> int:
        """The sum of a whole number."""
        return int(self.sum(torch.tensor(count, device=self.device)))

    def sum(self, counts: Tensor) -> Tensor:
        """The sums of whole numbers, in any order."""
        return counts if self.reduce is None else self.reduce(counts, "sum")

    def max(self, values: Tensor) -> Tensor:
        """The largest values."""
        return values if self.reduce is None else self.reduce(values, "max")

    def in_order(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """The sum of what each batch gives, in the order of all batches, in float64.

        Args:
            parts: of this worker's batches.
            like: of their shape.

        Raises:
            ValueError: the worker has other batches than its rank says.
        """
        whole = list(parts)
        if self.reduce is not None:
            count = self.total(len(parts))
            table = torch.zeros(count, *like.shape, dtype=torch.float64, device=self.device)
            if len(table[self.rank :: self.world]) != len(parts):
                raise ValueError(
                    f"worker {self.rank} of {self.world} has {len(parts)} of {count} batches; "
                    "allowed: share=(rank, number of workers) and every so many-th batch for each"
                )
            if parts:
                table[self.rank :: self.world] = torch.stack(whole)
            whole = list(self.reduce(table, "sum"))
        sum_of_all = torch.zeros(like.shape, dtype=torch.float64, device=self.device)
        for part in whole:
            sum_of_all += part
        return sum_of_all
