"""The epochs of a training, the same for ANN and SNN; runs inside a worker of a Ray Train job.

A global batch is drawn by (seed, epoch) and shared among the workers; DDP averages their gradients,
so the batch size is the parameter and the number of workers is not. After every epoch the
validation split is evaluated; the state is reported after an epoch, every few seconds where epochs
are short, and every ``cluster.checkpoint_steps`` within a long one. An interrupted job goes on from
there as if nothing had been: whatever is random is a function of seed, epoch and sample, so neither
a restart nor the number of workers changes it.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.data import Samples, Split, augment, normalise
from pipeline.distributed import checkpoint_due, report, report_due, resume, total
from pipeline.params import Schedule

# images (B, C, H, W), labels, ids, epoch → logits; several windows for truncated BPTT
Windows = Callable[[Tensor, Tensor, int], Iterator[Callable[[], Tensor]]]


EVERY, STEPS_EVERY = 2.0, 10.0  # seconds between progress lines of epochs, and of steps


class DivergenceError(ValueError):
    """The loss or a gradient is not a finite number."""


def learning_rate(params: Schedule, epoch: int) -> float:
    """Divided by ``decay`` at each milestone, a fraction of the epochs."""
    passed = sum(epoch - 1 >= round(m * params.epochs) for m in params.milestones)
    return params.learning_rate / params.decay**passed


def order(count: int, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """The epoch's global batches of positions. An incomplete last batch waits for another epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    batches = torch.randperm(count, generator=generator).split(min(batch_size, count))
    return [batch for batch in batches if len(batch) == len(batches[0])]


def fit(
    name: str,
    network: nn.Module,
    model: nn.Module,
    windows: Windows,
    optimizer: torch.optim.Optimizer,
    train: Samples,
    params: Schedule,
    validate: Callable[[int], dict[str, float]],
    rank: int,
    world: int,
    clip: float | None = None,
    micro_batch: int | None = None,
    constrain: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Train, epoch by epoch, and report the state after each.

    Args:
        name: of the stage, for the progress lines.
        network: holds the weights.
        model: the same, wrapped by DDP where there are several workers.
        windows: presents images; gives one function for each backward pass (several with truncated
            BPTT), each returning logits.
        optimizer: of the network's parameters.
        train: the whole training split.
        params: epochs, batch size, learning rate.
        validate: epoch → metrics, with ``accuracy/validation``.
        rank: of this worker.
        world: number of workers.
        clip: largest norm of the gradient.
        micro_batch: images that a worker presents at once; None for its whole share.
        constrain: called after every step of the optimiser.

    Returns:
        The state: ``history`` (metrics by epoch), ``best`` (validation accuracy), ``best_epoch``,
        ``best_network`` (state dict), and what a resumed job needs.

    Raises:
        DivergenceError: loss or gradient is not finite; names epoch and step.
    """
    if params.batch_size < world:
        raise ValueError(
            f"{name}.batch_size is {params.batch_size}; allowed: at least one image for each of "
            f"the {world} workers"
        )
    device = next(network.parameters()).device
    state = resume(device) or {"epoch": 0, "best": -1.0, "history": []}
    if "network" in state:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        if rank == 0 and state["epoch"] < params.epochs:
            within = f", step {state['step']} of the next" if state.get("step") else ""
            where = f"after epoch {state['epoch']}{within}"
            print(f"[{name}] goes on {where}, {world} worker(s)", flush=True)
    start, first = time.monotonic(), state["epoch"]
    said, reported = start - EVERY, start
    unreported: list[dict[str, float]] = []
    for epoch in range(first + 1, params.epochs + 1):
        rate = learning_rate(params, epoch)
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()  # all of it: a spiking network is more than its layers
        batches = order(len(train), params.batch_size, params.seed, epoch)
        done = state.pop("step", 0)  # of an epoch that was interrupted
        sums = state.pop("sums", torch.zeros(2, dtype=torch.float64, device=device))
        if rank > 0:  # the state is rank 0's
            sums = torch.zeros_like(sums)
        norm = 0.0
        weight = world / len(batches[0])
        mine = train.stream([batch[rank::world] for batch in batches[done:]], device)
        for step, share in enumerate(mine, start=done + 1):
            images = share.images
            if params.augment:
                images = augment(images, share.ids, params.seed, epoch)
            optimizer.zero_grad(set_to_none=True)
            loss, correct = _backward(
                model, windows, normalise(images), share, epoch, weight, micro_batch
            )
            norm = float(nn.utils.clip_grad_norm_(network.parameters(), clip or float("inf")))
            if not (torch.isfinite(loss) and norm < float("inf")):
                raise DivergenceError(
                    f"loss {float(loss):.4g}, gradient norm {norm:.4g} in epoch {epoch}, "
                    f"step {step}: the training diverged; a smaller learning_rate, clip, or "
                    "fewer timesteps may help"
                )
            optimizer.step()
            if constrain is not None:
                constrain()
            sums += torch.stack([loss.double() * len(share), correct.double()])
            if checkpoint_due(step) and step < len(batches):
                so_far = total(sums.clone())
                report(
                    state
                    | {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
                    | {"step": step, "sums": so_far},
                    unreported,
                )
                unreported = []
            if rank == 0 and time.monotonic() - said > STEPS_EVERY:
                said = time.monotonic()
                print(f"[{name}] epoch {epoch}: step {step}/{len(batches)}", flush=True)
        sums = total(sums)
        seen = sum(len(batch) for batch in batches)
        metrics = {
            "epoch": epoch,
            "learning_rate": rate,
            "loss/train": sums[0].item() / seen,
            "accuracy/train": sums[1].item() / seen,
            "gradient_norm/all": norm,
            **_gradient_norms(network),
            **validate(epoch),
        }
        accuracy = metrics["accuracy/validation"]
        metrics["accuracy/best"] = max(accuracy, state["best"])
        state |= {"epoch": epoch, "history": [*state["history"], metrics]}
        if accuracy > state["best"]:
            state |= {"best": accuracy, "best_epoch": epoch}
            state["best_network"] = {k: v.clone() for k, v in network.state_dict().items()}
        state |= {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        if rank == 0 and (time.monotonic() - said > EVERY or epoch == params.epochs):
            said = time.monotonic()
            left = (time.monotonic() - start) / (epoch - first) * (params.epochs - epoch)
            print(
                f"[{name}] epoch {epoch}/{params.epochs}  loss {metrics['loss/train']:.3f}  "
                f"train {metrics['accuracy/train']:.1%}  validation {accuracy:.1%}  "
                f"{left:.0f} s left",
                flush=True,
            )
        unreported.append(metrics)
        due = rank == 0 and report_due(time.monotonic() - reported)
        if epoch == params.epochs or total(torch.tensor(int(due), device=device)):
            report(state, unreported)
            unreported, reported = [], time.monotonic()
    return state


def _backward(
    model: nn.Module,
    windows: Windows,
    images: Tensor,
    share: Split,
    epoch: int,
    weight: float,
    micro_batch: int | None,
) -> tuple[Tensor, Tensor]:
    """Forward and backward; the gradient is ``weight`` times the sum of the images' losses.

    Returns:
        The last window's mean loss over this worker's share, and the number of correct predictions.
    """
    size = micro_batch or len(images)
    parts = list(
        zip(images.split(size), share.labels.split(size), share.ids.split(size), strict=True)
    )
    losses = torch.zeros((), device=images.device, dtype=images.dtype)
    correct = torch.zeros((), device=images.device, dtype=torch.int64)
    for number, (images_, labels_, ids_) in enumerate(parts, start=1):
        presentations = list(windows(images_, ids_, epoch))
        for position, present in enumerate(presentations, start=1):
            if isinstance(model, DistributedDataParallel):  # average once, after all else
                last = number == len(parts) and position == len(presentations)
                model.require_backward_grad_sync = last
            logits = present()
            loss = F.cross_entropy(logits, labels_, reduction="sum")
            (loss * weight).backward()
        losses += loss.detach()
        correct += (logits.argmax(1) == labels_).sum()
    return losses / len(images), correct


def _gradient_norms(network: nn.Module) -> dict[str, float]:
    """Of every layer's weights at the epoch's last step: they grow with depth and T."""
    return {
        f"gradient_norm/{name.removesuffix('.weight')}": parameter.grad.norm().item()
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }
