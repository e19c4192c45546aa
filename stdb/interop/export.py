"""A door out: a spiking network as one program of plain torch operators, at a fixed T.

For ``torch.export``, and so for ``torch.compile``, AOTInductor or ONNX.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..encoding import DirectEncoder, PoissonEncoder, SpikeTrain, check_timesteps
from ..network import SpikingNetwork
from ..randomness import sample_keys
from ..weights import plain_copy


def export_program(
    snn: SpikingNetwork,
    timesteps: int,
    image_shape: Sequence[int],
    *,
    spikes: bool = False,
) -> ExportedProgram:
    """The network at a fixed T as plain torch operators; ``torch.export.save`` makes it a file.

    The loops over time and layers are unrolled. Weights keep their names, V and λ are constants.
    What it takes follows from the network's encoder; the batch size is free everywhere:

    ===================  ===========================================================
    encoder              call, each gives U_T (B, classes)
    ===================  ===========================================================
    ``PoissonEncoder``   ``program.module()(images, sample_ids)``: the generator is in the graph,
                         integer arithmetic, so the spike trains are those of the engine
    ``DirectEncoder``    ``program.module()(images)``
    any, ``spikes``      ``program.module()(train)``, train (T, B, C, H, W)
    ``SpikeTrain``       the same
    ===================  ===========================================================

    Images (B, C, H, W) have to be in [−1, 1], which nothing checks there; sample_ids (B,) int64 are
    those of ``SpikingNetwork.present`` (epoch 0).

    Args:
        snn: the network; dropout is left out, products are in the type of the weights.
        timesteps: T.
        image_shape: (C, H, W) of an image, (C, L) of a signal or (n,) of a vector.
        spikes: the program takes a spike train, whatever the encoder.

    Raises:
        ValueError: T below 1, max-pooling, or an encoder of your own without ``spikes``.
    """
    check_timesteps(timesteps)
    for node in snn.graph.nodes:
        if node.operator.accumulates:
            raise ValueError(
                f"{node.name} is {node.operator.name}, which remembers sums over time; allowed in "
                "a program: layers that do not"
            )
    weight = next(p for p in snn.net.parameters() if p.dim())
    images = weight.new_zeros(2, *image_shape)  # of a batch of 1 it would take a batch of 1
    batch = Dim("batch")
    arguments: tuple[Tensor, ...] = (images,)
    dynamic: dict[str, Any] = {"x": {0: batch}}
    if spikes or isinstance(snn.encoder, SpikeTrain):
        arguments = (images.expand(timesteps, *images.shape).clone(),)
        dynamic, spikes = {"x": {1: batch}}, True
    elif isinstance(snn.encoder, PoissonEncoder):
        arguments = (images, torch.arange(2, device=images.device))
        dynamic["sample_ids"] = {0: batch}
    elif not isinstance(snn.encoder, DirectEncoder):
        raise ValueError(
            f"the encoder is a {type(snn.encoder).__name__}; allowed: PoissonEncoder, "
            "DirectEncoder, SpikeTrain, or spikes=True"
        )
    program = _Program(snn, timesteps, spikes)
    with torch.no_grad():
        return torch.export.export(program, arguments, dynamic_shapes=dynamic)


class _Program(nn.Module):
    """Algorithm 3 step by step: what the engine computes, for a tracer to read."""

    def __init__(self, snn: SpikingNetwork, timesteps: int, spikes: bool) -> None:
        super().__init__()
        self.net, self.graph = plain_copy(snn.net), snn.graph
        self.timesteps = timesteps
        self.encoder: Any = None if spikes else snn.encoder
        neurons = zip(snn.graph.neurons, snn.neurons.values(), strict=True)
        self.constants = {
            i: (n.threshold.item(), n.leak.item(), n.initial_membrane * n.threshold.item())
            for i, n in neurons
        }

    def forward(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        """U_T (B, classes) of images (B, C, H, W) or a spike train (T, B, C, H, W)."""
        membrane: dict[int, Tensor] = {}
        fired: dict[int, Tensor] = {}
        values: dict[int, Tensor] = {}
        counts: dict[int, Tensor] = {}
        keys = x if sample_ids is None else sample_keys(sample_ids, 0)
        for t in range(self.timesteps):
            if self.encoder is None:
                values = {0: x[t]}
            elif t == 0 or not isinstance(self.encoder, DirectEncoder):
                values = {0: self.encoder(x, t, t + 1, keys)[0]}
            else:  # what the input alone decides stays as it was
                values = {i: v for i, v in values.items() if not self._depends_on_neurons(i)}
            for i in self.graph.body:
                if i in values:
                    continue
                node = self.graph.nodes[i]
                if node.operator.fires:
                    current = values[node.inputs[0]]
                    u = self._membrane(i, current, membrane.get(i), fired.get(i))
                    membrane[i], fired[i] = u, (u > self.constants[i][0]).to(u.dtype)
                    values[i] = fired[i]
                else:
                    values[i] = self._operate(i, values)
            for i in self.graph.entries:
                counts[i] = counts[i] + values[i] if i in counts else values[i]
        for i in self.graph.tail:  # linear, so once, of the sum over time (Eq. 4)
            counts[i] = self._operate(i, counts, self.timesteps)
        return counts[self.graph.tail[-1]]

    def _membrane(
        self, i: int, current: Tensor, before: Tensor | None, fired: Tensor | None
    ) -> Tensor:
        """Eq. 2, in the engine's order, which rounding depends on."""
        threshold, leak, start = self.constants[i]
        if before is None or fired is None:
            return current + start * leak if start else current
        u = before if leak == 1 else before * leak
        return torch.sub(u, fired, alpha=threshold) + current

    def _depends_on_neurons(self, i: int) -> bool:
        node = self.graph.nodes[i]
        return node.operator.fires or any(self._depends_on_neurons(j) for j in node.inputs)

    def _operate(self, i: int, values: dict[int, Tensor], steps: int = 1) -> Tensor:
        """The value of a linear operator's node, of inputs that are summed over ``steps``."""
        node = self.graph.nodes[i]
        module = None if node.path is None else self.net.get_submodule(node.path)
        value = node.operator.plain(module, *(values[j] for j in node.inputs))
        bias = getattr(module, "bias", None) if node.operator.learns else None
        if bias is None or steps == 1:
            return value
        whole: Tensor = value + (steps - 1) * bias.view(-1, *[1] * (value.dim() - 2))
        return whole
