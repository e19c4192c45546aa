"""Batch norms whose statistics do not depend on the number of workers.

A batch is divided into groups of images that go whole to a worker, and each group is normalised by
its own mean and variance. The running statistics, which evaluation and conversion take, are changed
after the step, by every group's in the order of the groups, in every worker alike.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.jobs.worker import Worker

Norm = nn.modules.batchnorm._BatchNorm
Found = tuple[Norm, Tensor, Tensor]  # a norm, and the mean and the variance of a group there


def has_norms(network: nn.Module) -> bool:
    """Whether a network has batch norms with running statistics."""
    return bool(_norms(network))


def group_sizes(count: int, images: int) -> list[int]:
    """How many of a batch's images each group has: about ``images``, as equal as can be.

    One image has no variance, so that no group has one, unless that is all there is.
    """
    groups = min(-(-count // images), max(1, count // 2))
    least, more = divmod(count, groups)
    return [least + 1] * more + [least] * (groups - more)


class GroupStatistics:
    """The running statistics of a network's batch norms while it is trained, group by group.

    Each pass of the network in training mode is a group. What a norm finds, mean and (unbiased)
    variance, is kept aside; :meth:`apply` brings together what all workers found.

    Attributes:
        sizes: images of each group of a batch, over all workers.
    """

    def __init__(self, network: nn.Module, worker: Worker, sizes: list[int]) -> None:
        self.worker, self.sizes = worker, sizes
        self.found: list[list[Found]] = []  # by each of this worker's groups
        self.group: list[Found] = []  # the one that is presented
        self.hooks = [
            network.register_forward_pre_hook(self._begin),
            network.register_forward_hook(self._end),
        ]
        for norm in _norms(network):
            before: dict[str, Any] = {}
            self.hooks.append(norm.register_forward_pre_hook(partial(_set_aside, before)))
            self.hooks.append(norm.register_forward_hook(partial(self._note, before)))

    def remove(self) -> None:
        """Leave the network as it was."""
        for hook in self.hooks:
            hook.remove()

    @property
    def idle(self) -> bool:
        """Whether there is no group for this worker: it presents the first, which counts nothing.

        All workers have to take part in the sum of the gradients.
        """
        return self.worker.rank >= len(self.sizes)

    @property
    def mine(self) -> list[int]:
        """Images of each of this worker's groups."""
        return self._mine(self.sizes)

    def share(self, batch: Tensor) -> Tensor:
        """This worker's positions of a batch, one group after the other."""
        return torch.cat(self._mine(list(batch.split(self.sizes))))

    @torch.no_grad()
    def apply(self) -> None:
        """Change the running statistics by all groups of a step, in their order."""
        norms = [norm for norm, _, _ in self.found[0]]
        if not norms:  # a network's own train() leaves them all as in evaluation
            self.found = []
            return
        rows = [torch.cat([t for _, *pair in group for t in pair]) for group in self.found]
        every = rows[0].new_zeros(len(self.sizes), len(rows[0]))
        if not self.idle:
            every[self.worker.rank :: self.worker.world] = torch.stack(rows)
        self.worker.all_reduce(every)  # the others' rows are 0, so that the sum is exact
        self.found = []
        for row in every:
            parts = row.split([norm.num_features for norm in norms for _ in range(2)])
            for norm, mean, variance in zip(norms, parts[::2], parts[1::2], strict=True):
                _change(norm, mean, variance)

    def _mine(self, groups: list[Any]) -> list[Any]:
        return groups[self.worker.rank :: self.worker.world] or groups[:1]

    def _begin(self, *_: Any) -> None:
        self.group = []  # as short for each, so that what is compiled is so once

    def _end(self, network: nn.Module, *_: Any) -> None:
        if network.training:
            self.found.append(self.group)

    def _note(self, before: dict[str, Any], norm: Norm, *_: Any) -> None:
        """After a norm's pass: its buffers hold what it found; they become what they were."""
        if before:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            self.group.append((norm, norm.running_mean, norm.running_var))
            for name, value in before.items():
                setattr(norm, name, value)
            before.clear()


def _norms(network: nn.Module) -> list[Norm]:
    norms = (m for m in network.modules() if isinstance(m, Norm))
    return [norm for norm in norms if norm.running_mean is not None]


def _set_aside(before: dict[str, Any], norm: Norm, _: Any) -> None:
    """Before a norm's pass in training: buffers that will hold what it finds, and only that."""
    if norm.training:
        assert norm.running_mean is not None
        names = ("running_mean", "running_var", "num_batches_tracked", "momentum")
        before |= {name: getattr(norm, name) for name in names}
        norm.running_mean = torch.zeros_like(norm.running_mean)
        norm.running_var = torch.zeros_like(norm.running_mean)
        norm.num_batches_tracked, norm.momentum = None, 1.0


def _change(norm: Norm, mean: Tensor, variance: Tensor) -> None:
    """What torch does with the statistics of a batch."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    share = norm.momentum
    if share is None:
        share = 1 / float(norm.num_batches_tracked)
    norm.running_mean.mul_(1 - share).add_(share * mean)
    norm.running_var.mul_(1 - share).add_(share * variance)
