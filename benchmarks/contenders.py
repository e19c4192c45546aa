"""The engine and what it is compared with.

Every contender trains and presents the same network:

stdb           this project's engine
step-by-step   one time step after the other, autograd through everything, as the authors' code does
snntorch       ``snntorch.Leaky`` with subtractive reset, step after step
spikingjelly   ``IFNode`` with soft reset, multi-step, convolutions over all steps at once
spikingjelly-memopt  the same with its memory optimisation: blocks computed again from packed spikes
products       the bare convolutions and matrix products of a training step, no neurons: the floor
recorded       this project's engine with spike statistics, in turns with it without
ann            the ANN that the network is converted from

    python -m benchmarks.contenders CONTENDER WORKLOAD PHASE [REPEATS]

prints one JSON line: seconds of a step, those of all its cores together, and its peak memory over
the process with model, gradients and optimiser state. One process each, so that no contender finds
another's memory or caches.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stdb
from benchmarks.workloads import (
    QUICK,
    WORKLOADS,
    Workload,
    images,
    labels,
    network,
    neuron_steps,
    plain,
)

WEIGHTED = (nn.Conv2d, nn.Linear)
Work = Callable[[], Any]
Device = torch.device | str


def poisson(x: Tensor) -> Tensor:
    """One step of signed Poisson spikes."""
    return x.sign() * (torch.rand_like(x) < x.abs())


def one_step(snn: stdb.SpikingNetwork) -> Callable[[Tensor], Tensor]:
    """What gives the input of a step: Poisson spikes, or the pixels themselves."""
    return poisson if isinstance(snn.encoder, stdb.PoissonEncoder) else lambda x: x


class _Spike(torch.autograd.Function):
    """A spike with the STDB surrogate, for contenders that run on autograd."""

    @staticmethod
    def forward(ctx, membrane, threshold, age):
        spike = (membrane > threshold).to(membrane.dtype)
        ctx.save_for_backward(torch.where(spike > 0, 0.0, age + 1))
        return spike

    @staticmethod
    def backward(ctx, grad):
        (age,) = ctx.saved_tensors
        return grad * 0.3 * torch.exp(-0.01 * age), None, None


class StepByStep(nn.Module):
    """The authors' formulation: for every t, for every layer; autograd records it all."""

    def __init__(self, snn: stdb.SpikingNetwork, timesteps: int) -> None:
        super().__init__()
        self.layers, self.timesteps = nn.ModuleList(snn.net.children()), timesteps
        self.encode = one_step(snn)
        self.thresholds = list(snn.thresholds.values())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → logits."""
        membranes, spikes, ages = {}, {}, {}
        total: Tensor | None = None
        for _ in range(self.timesteps):
            value = self.encode(x)
            k = 0
            for layer in self.layers:
                if not isinstance(layer, stdb.SpikingNeuron):
                    value = layer(value)
                    continue
                if k not in membranes:
                    membranes[k] = spikes[k] = torch.zeros_like(value)
                    ages[k] = torch.full_like(value, 1e9)
                threshold = self.thresholds[k]
                membranes[k] = membranes[k] + value - threshold * spikes[k].detach()
                value = spikes[k] = _Spike.apply(membranes[k], threshold, ages[k])
                ages[k] = torch.where(value.detach() > 0, 0.0, ages[k] + 1)
                k += 1
            total = value if total is None else total + value
        assert total is not None
        return total


class SnnTorch(nn.Module):
    """snnTorch's neurons in a loop over time."""

    def __init__(self, snn: stdb.SpikingNetwork, timesteps: int) -> None:
        import snntorch
        from snntorch import surrogate

        super().__init__()
        thresholds = iter(snn.thresholds.values())
        self.timesteps, self.encode = timesteps, one_step(snn)
        self.layers = nn.ModuleList(
            snntorch.Leaky(
                beta=1.0,
                threshold=next(thresholds),
                reset_mechanism="subtract",
                spike_grad=surrogate.fast_sigmoid(),
            )
            if isinstance(layer, stdb.SpikingNeuron)
            else layer
            for layer in snn.net.children()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → logits."""
        membranes: dict[int, Tensor] = {}
        total: Tensor | float = 0.0
        for _ in range(self.timesteps):
            value = self.encode(x)
            for k, layer in enumerate(self.layers):
                if hasattr(layer, "spike_grad"):
                    if k not in membranes:
                        membranes[k] = torch.zeros_like(value)
                    value, membranes[k] = layer(value, membranes[k])
                else:
                    value = layer(value)
            total = total + value
        assert isinstance(total, Tensor)
        return total


class SpikingJelly(nn.Module):
    """SpikingJelly's multi-step neurons; other layers see all steps as one batch."""

    def __init__(self, snn: stdb.SpikingNetwork, timesteps: int) -> None:
        from spikingjelly.activation_based import functional, layer, neuron, surrogate

        super().__init__()
        self.timesteps, self.clear = timesteps, functional.reset_net
        self.encode = one_step(snn)
        thresholds = iter(snn.thresholds.values())
        self.layers = nn.Sequential(
            *(
                neuron.IFNode(
                    v_threshold=next(thresholds),
                    v_reset=None,
                    detach_reset=True,
                    surrogate_function=surrogate.ATan(),
                    step_mode="m",
                )
                if isinstance(module, stdb.SpikingNeuron)
                else layer.SeqToANNContainer(module)
                for module in snn.net.children()
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → logits."""
        self.clear(self)
        return self.layers(torch.stack([self.encode(x) for _ in range(self.timesteps)])).sum(0)


class Block(nn.Sequential):
    """Layers up to a neuron."""


class SpikingJellyMemopt(SpikingJelly):
    """The same with its memory optimisation at the highest level that a CPU has.

    Blocks that end in a neuron are computed again on the way back, from inputs that are kept as
    bits where they are spikes.
    """

    def __init__(self, snn: stdb.SpikingNetwork, timesteps: int) -> None:
        from spikingjelly.activation_based import memopt, neuron

        super().__init__(snn, timesteps)
        blocks, block = [], []  # type: tuple[list[nn.Module], list[nn.Module]]
        for layer in self.layers:
            block.append(layer)
            if isinstance(layer, neuron.IFNode):
                blocks.append(Block(*block))
                block = []
        self.layers = nn.Sequential(*blocks, *block)
        memopt.optimize_memory(
            self, Block, lambda model: model(images(1)), level=1, checkpoint_budget="memory"
        )
        self.clear(self)


class Engine(nn.Module):
    """This project's engine."""

    def __init__(self, snn: stdb.SpikingNetwork, timesteps: int) -> None:
        super().__init__()
        self.snn, self.timesteps = snn, timesteps

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → logits."""
        return self.snn(x, self.timesteps)


class Ann(nn.Module):
    """The ANN: the module tree with ReLUs, in one pass."""

    def __init__(self, snn: stdb.SpikingNetwork, _: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.ReLU() if isinstance(m, stdb.SpikingNeuron) else m for m in snn.net.children())
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → logits."""
        return self.layers(x)


CONTENDERS: dict[str, Callable[[stdb.SpikingNetwork, int], nn.Module]] = {
    "stdb": Engine,
    "step-by-step": StepByStep,
    "snntorch": SnnTorch,
    "spikingjelly": SpikingJelly,
    "spikingjelly-memopt": SpikingJellyMemopt,
    "ann": Ann,
}
PEERS = ("step-by-step", "snntorch", "spikingjelly", "spikingjelly-memopt")  # these keep much


def products(workload: Workload, batch: int, train: bool, device: Device = "cpu") -> Work:
    """The layers' bare products over T·B images, in pieces of 256, on random dense inputs.

    Those of an analogue input are the same at every step, and the last layer's input sums over
    time, so that they are made once, over B.
    """
    ann, timesteps = plain(workload).to(device), workload.timesteps
    inputs: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        m.register_forward_hook(lambda module, given, _: inputs.append((module, given[0].detach())))
        for m in ann.modules()
        if isinstance(m, WEIGHTED)
    ]
    count = min(256, timesteps * batch)
    with torch.no_grad():
        ann.eval()(images(count).to(device, memory_format=torch.channels_last))
    for hook in hooks:
        hook.remove()
    ann.to(workload.lowered)
    work: list[tuple[int, nn.Module, Tensor]] = []
    for k, (module, x) in enumerate(inputs):
        once = k == len(inputs) - 1 or (k == 0 and workload.few)
        whole, rest = divmod(batch if once else timesteps * batch, count)
        pieces = [x] * whole + [x[:rest]] * (rest > 0)
        work += [(k, module, piece.to(workload.lowered)) for piece in pieces]

    def run() -> None:
        for k, module, piece in work:
            x = piece.detach()
            if train:
                x.requires_grad_(k > 0)
                out = module(x)
                out.backward(torch.ones_like(out))
            else:
                with torch.no_grad():
                    module(x)

    return run


def balance(contender: str, snn: stdb.SpikingNetwork, workload: Workload) -> Work:
    """Threshold balancing: one pass over the layers, or every layer again from the input."""
    x = images(workload.batch)
    if contender == "stdb":
        return partial(stdb.balance_thresholds, snn, x, workload.timesteps)

    @torch.no_grad()
    def run() -> None:
        layers = list(snn.net.children())
        neurons = [k for k, m in enumerate(layers) if isinstance(m, stdb.SpikingNeuron)]
        thresholds: dict[int, float] = {}
        for stop in neurons:
            membranes: dict[int, Tensor] = {}
            largest = 0.0
            for _ in range(workload.timesteps):
                value = poisson(x)
                for k, layer in enumerate(layers[:stop]):
                    if k in thresholds:
                        u = membranes.get(k, torch.zeros_like(value)) + value
                        value = (u > thresholds[k]).float()
                        membranes[k] = u - thresholds[k] * value
                    else:
                        value = layer(value)
                largest = max(largest, float(value.max()))
            thresholds[stop] = largest

    return run


def recording(snn: stdb.SpikingNetwork, workload: Workload, repeats: int) -> tuple[float, float]:
    """Seconds of a presentation without and with spike statistics: medians, taking turns."""
    x, seconds = images(workload.batch), ([], [])  # type: tuple[Tensor, tuple[list, list]]
    snn.eval()
    for _ in range(1 + 2 * repeats):
        for with_statistics, found in enumerate(seconds):
            start = time.perf_counter()
            with torch.no_grad():
                if with_statistics:
                    with stdb.record_spikes(snn):
                        snn(x, workload.timesteps)
                else:
                    snn(x, workload.timesteps)
            found.append(time.perf_counter() - start)
    plain, recorded = (median(found[1:]) for found in seconds)
    return plain, recorded


def step(
    contender: str, workload: Workload, phase: str, batch: int, device: Device = "cpu"
) -> Work:
    """One training step, presentation or balancing, as a function."""
    if contender == "products":
        return products(workload, batch, phase == "train", device)
    snn = network(workload, device)
    if phase == "balance":
        snn.eval()
        return balance(contender, snn, workload)
    model = CONTENDERS[contender](snn, workload.timesteps)
    lowered = workload.lowered is not None and contender != "stdb"
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=lowered)
    x, y = images(batch).to(device), labels(batch).to(device)
    if phase == "infer":
        model.eval()
        return partial(torch.no_grad()(autocast(model)), x)
    model.train()
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], amsgrad=True, fused=True
    )
    for group in optimizer.param_groups:  # state and gradients belong to the base
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()

    def run() -> None:
        optimizer.zero_grad()  # gives the gradients' memory back, for the new ones
        F.cross_entropy(autocast(model)(x).float(), y).backward()
        optimizer.step()

    return run


def memory(key: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at its peak."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def main(contender: str, name: str, phase: str, repeats: int) -> None:
    """Measure one contender, and print a JSON line."""
    workload = next(w for w in [*WORKLOADS, *QUICK] if w.name == name and phase in w.phases)
    if phase == "record":
        plain, recorded = recording(network(workload), workload, repeats)
        print(json.dumps({"plain": plain, "seconds": recorded, "batch": workload.batch}))
        return
    batch = workload.peer_batch if contender in PEERS else workload.batch
    run = step(contender, workload, phase, batch)
    base = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts again here
    seconds, computing = [], []
    for _ in range(repeats):
        start, computed = time.perf_counter(), time.process_time()
        run()
        seconds.append(time.perf_counter() - start)
        computing.append(time.process_time() - computed)
    peak = memory("VmHWM") - base
    steps = neuron_steps(network(workload), workload, batch)
    found = {"seconds": min(seconds), "cpu_seconds": min(computing), "batch": batch}
    found |= {"peak_bytes": peak, "neuron_steps": steps}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]) if len(sys.argv) > 4 else 2)
