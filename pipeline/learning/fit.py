"""The epochs of a training, the same for ANN and SNN; runs inside a worker of a job.

A global batch is drawn by (seed, epoch) and shared among the workers; DDP averages their gradients,
so the batch size is the parameter and the number of workers is not. After every epoch the
validation split is evaluated; the state is kept after an epoch, every few seconds where epochs
are short, and every ``cluster.checkpoint_steps`` within a long one. An interrupted job goes on from
there as if nothing had been: whatever is random is a function of seed, epoch and sample, so neither
a restart nor the number of workers changes it. A network with batch norms gets its batches in
groups, see :mod:`pipeline.learning.norms`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.data import Samples, Split, augment, cut_out, trivial_augment
from pipeline.errors import DivergenceError, StageError
from pipeline.jobs.worker import Row, State, Worker
from pipeline.learning.norms import GroupStatistics, group_sizes, has_norms
from pipeline.learning.schedules import learning_rate
from pipeline.params import Schedule

# images (B, C, H, W), ids, epoch → a function that gives logits for each backward pass; several
# with truncated BPTT
BackwardPasses = Callable[[Tensor, Tensor, int], Iterator[Callable[[], Tensor]]]
# images (B, C, H, W) → a function of their logits and labels: the sum of their losses
Losses = Callable[[Tensor], Callable[[Tensor, Tensor], Tensor]]

SAY_EPOCH_EVERY = 2.0  # seconds, between progress lines of epochs


def cross_entropy(_: Tensor, label_smoothing: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of images that say nothing of it themselves.

    ``label_smoothing`` is the share of a label that all classes have in equal parts.
    """
    return partial(F.cross_entropy, reduction="sum", label_smoothing=label_smoothing)


@dataclass
class Task:
    """What is trained, and how it is presented and judged.

    Attributes:
        network: holds the weights.
        model: the same, wrapped by DDP where there are several workers.
        passes: presents images; gives one function for each backward pass.
        optimizer: of the network's parameters.
        validate: epoch → metrics, with ``accuracy/validation``.
        clip: largest norm of the gradient; None: any.
        micro_batch: images that a worker presents at once; None for its whole share.
        constrain: called after every step of the optimiser.
        norm_images: images in a group, where the network has batch norms.
        losses: gives the loss of images that are presented.
        cutout: side of the square that is made grey in every image; 0: none.
    """

    network: nn.Module
    model: nn.Module
    passes: BackwardPasses
    optimizer: torch.optim.Optimizer
    validate: Callable[[int], Row]
    clip: float | None = None
    micro_batch: int | None = None
    constrain: Callable[[], None] | None = None
    norm_images: int = 32
    losses: Losses = cross_entropy
    cutout: int = 0


def order(count: int, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """The epoch's global batches of positions. An incomplete last batch waits for another epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    batches = torch.randperm(count, generator=generator).split(min(batch_size, count))
    return [batch for batch in batches if len(batch) == len(batches[0])]


def fit(
    worker: Worker, task: Task, train: Samples, params: Schedule, start: State | None = None
) -> State:
    """Train, epoch by epoch, and keep the state after each.

    Args:
        worker: that this process is.
        task: what is trained.
        train: the whole training split.
        params: epochs, batch size, learning rate.
        start: the state to begin with; None: what an interrupted run of the job kept. ``epoch``
            is that of an earlier training that this one follows, and its epochs are counted on.

    Returns:
        The state: ``history`` (metrics by epoch), ``best`` (validation accuracy), ``best_epoch``,
        ``best_network`` (state dict), what a resumed job needs, and anything else that ``start``
        has.

    Raises:
        DivergenceError: loss or gradient is not finite; names epoch and step.
        StageError: there is not an image for each worker in a batch.
    """
    if min(params.batch_size, len(train)) < worker.world:
        section = "train_ann" if worker.stage == "train_ann" else "stdb"
        raise StageError(
            f"{section}.batch_size is {params.batch_size}; allowed: at least one image for "
            f"each of the {worker.world} workers, of {len(train)} training images"
        )
    return _Fit(worker, task, train, params, worker.resume() if start is None else start).run()


class _Fit:
    """A training under way."""

    def __init__(
        self, worker: Worker, task: Task, train: Samples, params: Schedule, start: State | None
    ) -> None:
        self.worker, self.task, self.train, self.params = worker, task, train, params
        self.device = next(task.network.parameters()).device
        self.norms: GroupStatistics | None = None
        if has_norms(task.network):
            sizes = group_sizes(min(params.batch_size, len(train)), task.norm_images)
            if sizes == [1]:
                raise StageError(
                    "a batch has one image, of which a batch norm finds no variance; allowed: "
                    "train_ann.batch_size of 2 or more, and as many training images"
                )
            self.norms = GroupStatistics(task.network, worker, sizes)
        beginning: State = {"epoch": 0, "best": -1.0, "history": []}
        self.state = beginning | (start or {})
        self.before = self.state["epoch"] - len(self.state["history"])  # epochs
        self.last = self.before + params.epochs
        if "network" in self.state:
            self._go_on()
        self.start, self.first = time.monotonic(), int(self.state["epoch"])
        self.said, self.reported = self.start - SAY_EPOCH_EVERY, self.start
        self.unreported: list[Row] = []

    def _go_on(self) -> None:
        """Take up the weights and the optimiser of an interrupted job."""
        state = self.state
        self.task.network.load_state_dict(state["network"])
        self.task.optimizer.load_state_dict(state["optimizer"])
        if state["epoch"] < self.last:
            within = f", step {state['step']} of the next" if state.get("step") else ""
            where = f"after epoch {state['epoch']}{within}"
            self.worker.say(f"goes on {where}, {self.worker.world} worker(s)")

    def run(self) -> State:
        """The epochs that are left."""
        try:
            return self._run()
        finally:
            if self.norms is not None:
                self.norms.remove()

    def _run(self) -> State:
        for epoch in range(self.first + 1, self.last + 1):
            metrics = self._epoch(epoch)
            self._keep_best(epoch, metrics)
            self._say_epoch(epoch, metrics)
            self.unreported.append(metrics)
            due = self.worker.rank == 0 and self.worker.report_due(time.monotonic() - self.reported)
            asked = self.worker.all_reduce(torch.tensor(int(due), device=self.device))
            if epoch == self.last or asked:
                self._checkpoint(self.state)
                self.reported = time.monotonic()
        return self.state

    def _epoch(self, epoch: int) -> Row:
        """All steps of an epoch, or those that are left of it; its metrics."""
        worker, params, task = self.worker, self.params, self.task
        rate = 0.0
        task.model.train()  # all of it: a spiking network is more than its layers
        batches = order(len(self.train), params.batch_size, params.seed, epoch)
        done = self.state.pop("step", 0)  # of an epoch that was interrupted
        nothing = torch.zeros(2, dtype=torch.float64, device=self.device)
        sums = self.state.pop("sums", nothing)
        if worker.rank > 0:  # the state is rank 0's
            sums = torch.zeros_like(sums)
        norm = 0.0
        weight = worker.world / len(batches[0])
        if self.norms is None:
            mine = [batch[worker.rank :: worker.world] for batch in batches[done:]]
        else:
            mine = [self.norms.share(batch) for batch in batches[done:]]
        idle = self.norms is not None and self.norms.idle
        for step, share in enumerate(self.train.stream(mine, self.device), start=done + 1):
            rate = learning_rate(params, epoch - self.before, step, len(batches))
            for group in task.optimizer.param_groups:
                group["lr"] = rate
            loss, correct, norm = self._step(share, epoch, step, weight * (not idle))
            if not idle:
                sums += torch.stack([loss.double() * len(share), correct.double()])
            if worker.checkpoint_due(step) and step < len(batches):
                so_far = worker.all_reduce(sums.clone())
                self._checkpoint(self.state | self._weights() | {"step": step, "sums": so_far})
            worker.progress(f"epoch {epoch}: step {step}/{len(batches)}")
        sums = worker.all_reduce(sums)
        seen = sum(len(batch) for batch in batches)
        return {
            "epoch": epoch,
            "learning_rate": rate,
            "loss/train": sums[0].item() / seen,
            "accuracy/train": sums[1].item() / seen,
            "gradient_norm/all": norm,
            **_gradient_norms(task.network, norm, task.clip),
            **task.validate(epoch),
        }

    def _augmented(self, share: Split, epoch: int) -> Split:
        """What is learned from in this epoch instead of these images."""
        images, ids, seed = share.images, share.ids, self.params.seed
        if self.params.augment:
            images = augment(images, ids, seed, epoch)
        if self.params.augment == "trivial":
            images = trivial_augment(images, ids, seed, epoch)
        if self.task.cutout:
            images = cut_out(images, ids, seed, epoch, self.task.cutout)
        return replace(share, images=images)

    def _step(
        self, share: Split, epoch: int, step: int, weight: float
    ) -> tuple[Tensor, Tensor, float]:
        """One step of the optimiser; mean loss, correct predictions, and norm of the gradient."""
        task = self.task
        share = self._augmented(share, epoch)
        task.optimizer.zero_grad(set_to_none=True)
        sizes = None if self.norms is None else self.norms.mine
        loss, correct = backward(task, share.pixels(), share, epoch, weight, sizes)
        largest = task.clip or float("inf")
        norm = float(nn.utils.clip_grad_norm_(task.network.parameters(), largest))
        if not (torch.isfinite(loss) and norm < float("inf")):
            raise DivergenceError(
                f"loss {float(loss):.4g}, gradient norm {norm:.4g} in epoch {epoch}, "
                f"step {step}: the training diverged; a smaller learning_rate, clip, or "
                "fewer timesteps may help"
            )
        task.optimizer.step()
        if self.norms is not None:
            self.norms.apply()
        if task.constrain is not None:
            task.constrain()
        return loss, correct, norm

    # -- state ---------------------------------------------------------------------------------

    def _weights(self) -> State:
        return {
            "network": self.task.network.state_dict(),
            "optimizer": self.task.optimizer.state_dict(),
        }

    def _keep_best(self, epoch: int, metrics: Row) -> None:
        """Into the state: the epoch's metrics, and its weights where it is the best so far."""
        state, accuracy = self.state, metrics["accuracy/validation"]
        metrics["accuracy/best"] = max(accuracy, state["best"])
        state |= {"epoch": epoch, "history": [*state["history"], metrics]}
        if accuracy > state["best"]:
            state |= {"best": accuracy, "best_epoch": epoch}
            weights = self.task.network.state_dict()
            state["best_network"] = {name: value.clone() for name, value in weights.items()}
        state |= self._weights()

    def _checkpoint(self, state: State) -> None:
        self.worker.checkpoint(state, self.unreported)
        self.unreported = []

    def _say_epoch(self, epoch: int, metrics: Row) -> None:
        now = time.monotonic()
        if now - self.said <= SAY_EPOCH_EVERY and epoch < self.last:
            return
        self.said = now
        left = (now - self.start) / (epoch - self.first) * (self.last - epoch)
        self.worker.say(
            f"epoch {epoch}/{self.last}  loss {metrics['loss/train']:.3f}  "
            f"train {metrics['accuracy/train']:.1%}  "
            f"validation {metrics['accuracy/validation']:.1%}  {left:.0f} s left"
        )


def backward(
    task: Task,
    images: Tensor,
    share: Split,
    epoch: int,
    weight: float,
    sizes: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward and backward; the gradient is ``weight`` times the sum of the images' losses.

    Args:
        task: what is trained.
        images: (B, C, H, W), pixels in [−1, 1].
        share: the images' labels and ids.
        epoch: of the training.
        weight: of the gradient.
        sizes: images of the parts that are presented one by one; None: as the task says.

    Returns:
        The last pass's mean loss over this worker's share, and the number of correct predictions.
    """
    size = list(sizes) if sizes is not None else task.micro_batch or len(images)
    parts = list(
        zip(images.split(size), share.labels.split(size), share.ids.split(size), strict=True)
    )
    losses = torch.zeros((), device=images.device, dtype=images.dtype)
    correct = torch.zeros((), device=images.device, dtype=torch.int64)
    for number, (images_, labels_, ids_) in enumerate(parts, start=1):
        loss_of = task.losses(images_)
        passes = list(task.passes(images_, ids_, epoch))
        for position, present in enumerate(passes, start=1):
            if isinstance(task.model, DistributedDataParallel):  # average once, after all else
                last = number == len(parts) and position == len(passes)
                task.model.require_backward_grad_sync = last
            logits = present()
            loss = loss_of(logits, labels_)
            (loss * weight).backward()
        losses += loss.detach()
        correct += (logits.argmax(1) == labels_).sum()
    return losses / len(images), correct


def _gradient_norms(network: nn.Module, norm: float, clip: float | None) -> Row:
    """Norms of every layer's gradient at the epoch's last step, before they were clipped.

    They grow with depth and T.
    """
    clipped = 1.0 if clip is None else max(1.0, norm / clip)
    return {
        f"gradient_norm/{name.removesuffix('.weight')}": clipped * parameter.grad.norm().item()
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }
