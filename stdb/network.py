"""The spiking network: presents images for T steps, a chunk of steps at a time, layer by layer.

Within a step a network is feed-forward; only membrane potentials and spikes cross time. So a chunk
of steps runs at once: one convolution over (chunk·B) images, then one scan over the chunk, layer
after layer (Algorithm 3). All that crosses time is in a :class:`Presentation`, nothing is left on
the modules. The backward pass (§2.2) walks over the chunks in reverse order and keeps of the past
no more than output spikes as bits; pooled and masked inputs, input spikes and, where the surrogate
asks for them, membrane potentials are computed again.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import bits
from .encoding import DROPOUT_STREAM, check_images, derive, sample_keys, uniform
from .layout import from_matrix, to_layout, to_matrix
from .neuron import SpikingNeuron, backpropagate, backpropagate_stdb, fire, fuses, latest, membranes
from .spikes import Spikes
from .surrogate import STDB
from .synapse import (
    DROPOUT,
    FLATTEN,
    INPUT,
    NEURON,
    OPERATORS,
    SUM,
    Gradient,
    Graph,
    Value,
    Windows,
    dense,
    events,
)

Encoder = Callable[[Tensor, int, int, Tensor], Tensor]
Observer = Callable[["Presentation", str, Value], None]

IMAGES_PER_CHUNK = 256  # chunk · B that the default chunk aims at
SMALLEST_THRESHOLD, SMALLEST_LEAK = 0.01, 0.01  # of what is learned
STEPS_PER_SNAPSHOT = 16  # last spike times are kept this often; those in between are found again


def default_chunk(batch_size: int) -> int:
    """Time steps computed at once where nobody says how many."""
    return max(8, IMAGES_PER_CHUNK // max(1, batch_size))


class SpikingNetwork(nn.Module):
    """An ANN's module tree with spiking neurons in the place of its ReLUs; see ``stdb.convert``.

    Attributes:
        net: the module tree; weights have the names that they had in the ANN.
        graph: the nodes in the order of a step.
        encoder: gives the input of each step.
        chunk: time steps that are computed at once; None chooses by batch size. It changes memory
            and time, not results.
        dropout_seed: chooses the dropout masks of training.
        precision: what dense convolutions and matrix products are made in, ``torch.bfloat16`` say,
            with membranes and sums in the type of the weights; None: in that type as well.
        observers: called with (presentation, layer, its value over the chunk) for every chunk; see
            ``record_spikes``.
    """

    def __init__(
        self,
        net: nn.Module,
        graph: Graph,
        encoder: Encoder,
        chunk: int | None = None,
        dropout_seed: int = 0,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk is {chunk}; allowed: 1 or more time steps, or None")
        self.net = net
        self.graph = graph
        self.encoder = encoder
        self.chunk = chunk
        self.dropout_seed = dropout_seed
        self.precision = precision
        self.observers: list[Observer] = []

    # -- presenting ----------------------------------------------------------------------------

    def present(
        self,
        images: Tensor,
        *,
        sample_ids: Tensor | None = None,
        epoch: int = 0,
        masks: Sequence[Tensor] | None = None,
        chunk: int | None = None,
    ) -> "Presentation":
        """Start a presentation at t = 0, every membrane at 0.

        Args:
            images: (B, C, H, W), pixels in [−1, 1].
            sample_ids: (B,) int64, which random stream each image draws from; 0 … B−1 by default.
            epoch: another epoch draws other spikes and masks.
            masks: one (B, …) mask for each dropout, in order, already scaled, in the place of
                drawn ones.
            chunk: time steps that are computed at once; the network's by default.

        Raises:
            ValueError: pixels out of range, a threshold that is not a positive number.
        """
        check_images(images)
        if sample_ids is None:
            sample_ids = torch.arange(len(images), device=images.device)
        if sample_ids.shape != images.shape[:1]:
            raise ValueError(
                f"sample_ids are {tuple(sample_ids.shape)} for {len(images)} images; "
                "allowed: one for each"
            )
        chunk = chunk or self.chunk or default_chunk(len(images))
        return Presentation(self, images, sample_keys(sample_ids, epoch), chunk, masks)

    def forward(
        self,
        images: "Tensor | Presentation",
        timesteps: int,
        *,
        sample_ids: Tensor | None = None,
        epoch: int = 0,
    ) -> Tensor:
        """Present images, or go on with a presentation, for ``timesteps`` steps.

        Returns:
            U_T of the output layer (Eq. 4), (B, classes), differentiable with respect to the
            weights over these steps. The steps of earlier calls are constants, so that
            ``for n in windows: loss(snn(presentation, n)).backward()`` is the truncated BPTT of
            §2.2.
        """
        if timesteps < 1:
            raise ValueError(f"timesteps is {timesteps}; allowed: 1 or more")
        if isinstance(images, Presentation):
            presentation = images
        else:
            presentation = self.present(images, sample_ids=sample_ids, epoch=epoch)
        # each once, also where layers share their weights
        parameters = list(dict.fromkeys(p for p in self._body_parameters() if p.requires_grad))
        if torch.is_grad_enabled() and parameters:
            counts = _Steps.apply(presentation, timesteps, parameters, *parameters)
        else:
            counts = presentation.advance(timesteps)
        return presentation.integrate(counts)

    @torch.no_grad()
    def logits_over_time(
        self, images: "Tensor | Presentation", timesteps: int, **options
    ) -> Tensor:
        """U_t of the output layer after every step at once: (T, B, classes).

        The output only accumulates, so one presentation gives the accuracy at every t.
        """
        if timesteps < 1:
            raise ValueError(f"timesteps is {timesteps}; allowed: 1 or more")
        presentation = (
            images if isinstance(images, Presentation) else self.present(images, **options)
        )
        logits: list[Tensor] = []
        while len(logits) < timesteps:
            steps = min(presentation.chunk, timesteps - len(logits))
            trains: list[list[Tensor]] = [[] for _ in self.graph.entries]
            presentation.advance(steps, trains=trains)
            for t in range(steps):
                inputs = [train[0][t % len(train[0])] for train in trains]
                logits.append(presentation.integrate(inputs))
        return torch.stack(logits)

    @torch.no_grad()
    def shapes(self, image_shape: tuple[int, int, int]) -> list[torch.Size]:
        """(C, H, W) or (n,) of every node's value, for images (C, H, W)."""
        like = next(self.net.parameters())
        values = [like.new_zeros(1, 1, *image_shape)]
        for node in self.graph.nodes[1:]:
            value = values[node.inputs[0]]
            if node.kind in OPERATORS:
                module = None if node.kind == FLATTEN else self.net.get_submodule(node.name)
                value = OPERATORS[node.kind].forward(module, value)
            values.append(value)
        return [value.shape[2:] for value in values]

    def _body_parameters(self) -> Iterator[nn.Parameter]:
        for i in self.graph.body:
            node = self.graph.nodes[i]
            if node.kind == NEURON or (node.kind in OPERATORS and OPERATORS[node.kind].learns):
                yield from self.net.get_submodule(node.name).parameters()

    # -- neurons -------------------------------------------------------------------------------

    @property
    def neurons(self) -> dict[str, SpikingNeuron]:
        """The spiking layers, in order, by the name of the weights that drive them."""
        neurons = {}
        for i, label in self.graph.labels.items():
            neuron = self.net.get_submodule(self.graph.nodes[i].name)
            assert isinstance(neuron, SpikingNeuron)
            neurons[label] = neuron
        return neurons

    @property
    def thresholds(self) -> dict[str, float]:
        """V of every spiking layer."""
        return {name: neuron.threshold.item() for name, neuron in self.neurons.items()}

    def set_thresholds(
        self, thresholds: dict[str, float], balanced: Iterable[str] | None = None
    ) -> None:
        """Set V of every spiking layer.

        Args:
            thresholds: layer name → V, for exactly the layers of this network.
            balanced: the layers whose V came out of Algorithm 1, which scaling refers to; all by
                default.

        Raises:
            ValueError: the names are another network's, or a V is not a positive number.
        """
        neurons = self.neurons
        if set(thresholds) != set(neurons):
            missing, unknown = set(neurons) - set(thresholds), set(thresholds) - set(neurons)
            raise ValueError(
                "these thresholds belong to another network: "
                f"missing {sorted(missing) or 'none'}, unknown {sorted(unknown) or 'none'}; "
                f"this network's layers are {', '.join(neurons)}"
            )
        for name, value in thresholds.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"the threshold of {name} is {value}; allowed: a positive number")
        chosen = set(neurons) if balanced is None else set(balanced)
        with torch.no_grad():
            for name, neuron in neurons.items():
                neuron.threshold.fill_(thresholds[name])
                neuron.balanced_threshold.fill_(
                    thresholds[name] if name in chosen else float("nan")
                )

    @torch.no_grad()
    def constrain(self) -> None:
        """Bring learned V and λ back to where they have a meaning; after an optimiser's step.

        V stays at ``SMALLEST_THRESHOLD`` of its balanced value or above, λ within (0, 1].
        """
        for neuron in self.neurons.values():
            if neuron.threshold.requires_grad:
                balanced = neuron.balanced_threshold.nan_to_num(nan=1.0)
                neuron.threshold.clamp_(min=SMALLEST_THRESHOLD * balanced)
            if neuron.leak.requires_grad:
                neuron.leak.clamp_(SMALLEST_LEAK, 1.0)

    @torch.no_grad()
    def scale_thresholds(self, factor: float) -> None:
        """V ← factor · V_balanced, for fewer time steps. Never cumulative.

        Layers that were not balanced, as in a ResNet's basic blocks, keep their V.
        """
        if not 0 < factor < float("inf"):
            raise ValueError(f"the threshold scale is {factor}; allowed: a positive number")
        for neuron in self.neurons.values():
            if not neuron.balanced_threshold.isnan():
                neuron.threshold.copy_(neuron.balanced_threshold * factor)

    @torch.no_grad()
    def scale_output(self, factor: float) -> None:
        """Multiply the output layer's weights, and so every U_t of Eq. 4; no decision changes.

        U_T grows with T, far beyond what an ANN's logits are: softmax(U_T) is then surer than it is
        right, and what lowers its cross-entropy most is to spike less. See :func:`logit_scale`.
        """
        if not 0 < factor < float("inf"):
            raise ValueError(f"the logit scale is {factor}; allowed: a positive number")
        scaled, waiting = set(), [self.graph.tail[-1]]
        while waiting:
            node = self.graph.nodes[waiting.pop()]
            if node.kind in OPERATORS and OPERATORS[node.kind].learns:
                scaled.add(node.name)
            elif node.kind == NEURON:
                raise ValueError("a branch reaches the output without weights; nothing to scale")
            else:
                waiting += node.inputs
        for name in scaled:
            weight = self.net.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight.mul_(factor)


@dataclass
class _Chunk:
    """What the backward pass keeps of a chunk: spikes as bits, and the state that it started in."""

    start: int
    steps: int
    snapshot: bool = True  # whether last spike times are kept here
    bits: dict[int, Tensor] = field(default_factory=dict)
    last_spike: dict[int, Tensor] = field(default_factory=dict)
    membrane: dict[int, Tensor] = field(default_factory=dict)


class Presentation:
    """The state of a network that is being shown a batch of images.

    Attributes:
        chunk: time steps that are computed at once.
        t: the number of steps so far.
        logits: U_t of the output layer (B, classes), None before the first step.
    """

    def __init__(
        self,
        network: SpikingNetwork,
        images: Tensor,
        keys: Tensor,
        chunk: int,
        masks: Sequence[Tensor] | None = None,
    ) -> None:
        graph = network.graph
        self.network, self.images, self.keys, self.chunk = network, images, keys, chunk
        self.t = 0
        self.logits: Tensor | None = None
        self.modules: list[Any] = [
            network.net.get_submodule(node.name) if node.kind not in (INPUT, SUM, FLATTEN) else None
            for node in graph.nodes
        ]
        self.membrane: dict[int, Tensor] = {}
        self.last_spike: dict[int, Tensor] = {}
        self.ages_known = True  # steps without gradient don't note spike times
        self.shapes: dict[int, torch.Size] = {}  # (B, …) of every node's value
        self.prepared: dict[int, Any] = {}
        neurons = [self.modules[i] for i in graph.neurons]
        scalars = torch.stack([torch.stack([n.threshold, n.leak]) for n in neurons]).tolist()
        self.threshold = {i: v for i, (v, _) in zip(graph.neurons, scalars, strict=True)}
        self.leak = {i: leak for i, (_, leak) in zip(graph.neurons, scalars, strict=True)}
        labels = graph.labels
        for i in graph.neurons:
            if not 0 < self.threshold[i] < float("inf"):
                raise ValueError(
                    f"the threshold of {labels[i]} is {self.threshold[i]}; "
                    "allowed: a positive number"
                )
            if not 0 < self.leak[i] <= 1:
                raise ValueError(f"the leak of {labels[i]} is {self.leak[i]}; allowed: in (0, 1]")
        self.labels = {0: INPUT, **labels}
        # one mask per sample and layer, drawn once and kept for all t; None: no dropout
        self.masks: dict[int, Any] = {}
        if masks is not None:
            if len(masks) != len(graph.dropouts):
                raise ValueError(f"{len(masks)} masks for {len(graph.dropouts)} dropout layers")
            self.masks = dict(zip(graph.dropouts, masks, strict=True))

    # -- evaluating nodes ----------------------------------------------------------------------

    def mask(self, i: int, shape: torch.Size) -> Tensor | None:
        """(B, …): a node's inverted dropout mask, drawn at its first use; None in evaluation."""
        if i not in self.masks:
            rate = self.modules[i].p
            if not self.network.training or rate == 0:
                self.masks[i] = None
            else:
                index = self.network.graph.dropouts.index(i)
                keys = derive(derive(self.keys, self.network.dropout_seed), DROPOUT_STREAM + index)
                keep = uniform(keys, shape[1:].numel()) >= rate
                drawn = keep.to(self.images.dtype).div_(1 - rate or 1).view(shape)
                if drawn.dim() == 4:
                    drawn = drawn.contiguous(memory_format=torch.channels_last)
                self.masks[i] = drawn
        return self.masks[i]

    def apply(self, i: int, inputs: list[Value]) -> Value:
        """The value of a linear operator's node; of events where they are few."""
        kind, module = self.network.graph.nodes[i].kind, self.modules[i]
        if kind == SUM:
            first, *others = map(dense, inputs)
            return sum(others, first)
        x = inputs[0]
        if kind == DROPOUT:
            mask = self.mask(i, x.shape[1:])
            if mask is None:
                return x
            few = events(x)
            return few.masked(mask) if few is not None else dense(x) * mask
        operator = OPERATORS[kind]
        few = operator.events(module, x)
        if few is not None:
            return operator.of_events(module, few, self._prepared(i))
        return operator.forward(module, self._lowered(dense(x)) if operator.learns else dense(x))

    def _lowered(self, x: Tensor) -> Tensor:
        """In the precision of the network's products."""
        return x if self.network.precision is None else x.to(self.network.precision)

    def _prepared(self, i: int) -> Tensor | None:
        """What an operator makes of its weights for events, made again when they change."""
        operator = OPERATORS[self.network.graph.nodes[i].kind]
        if not operator.learns:
            return None
        weight = self.modules[i].weight
        state = (weight.data_ptr(), weight._version)
        if i not in self.prepared or self.prepared[i][0] != state:
            self.prepared[i] = (state, operator.prepare(self.modules[i]))
        return self.prepared[i][1]

    def integrate(self, counts: Sequence[Tensor]) -> Tensor:
        """The output layer's Eq. 4, given its inputs summed over the latest steps.

        Returns:
            U_t (B, classes), differentiable with respect to these steps only.
        """
        graph = self.network.graph
        values: dict[int, Any] = {
            i: count[None] for i, count in zip(graph.entries, counts, strict=True)
        }
        for i in graph.tail:
            values[i] = self.apply(i, [values[j] for j in graph.nodes[i].inputs])
        logits = values[graph.tail[-1]][0]
        if self.logits is not None:
            logits = self.logits + logits
        self.logits = logits.detach()
        return logits

    # -- forward -------------------------------------------------------------------------------

    def advance(
        self,
        steps: int,
        tape: list[_Chunk] | None = None,
        trains: list[list[Tensor]] | None = None,
    ) -> list[Tensor]:
        """Run ``steps`` further steps; returns the summed values of the output layer's inputs.

        Args:
            steps: how many.
            tape: is given a record of each chunk for the backward pass.
            trains: one list per entry, each given the entry's values (T, B, …) of every chunk.
        """
        if tape is None:
            self.ages_known = False
        elif not self.ages_known and any(
            isinstance(self.modules[i].surrogate, STDB) for i in self.network.graph.neurons
        ):
            raise RuntimeError(
                f"the first {self.t} steps of this presentation ran without gradient, so the ages "
                "that STDB needs are unknown; run them with gradient and drop the result"
            )
        counts: list[Any] = [None] * len(self.network.graph.entries)
        stop = self.t + steps
        last_snapshot = self.t
        while self.t < stop:
            due = not tape or self.t - last_snapshot >= STEPS_PER_SNAPSHOT
            chunk = _Chunk(self.t, min(self.chunk, stop - self.t), due)
            last_snapshot = self.t if due else last_snapshot
            values = self._forward_chunk(chunk, keep=tape is not None)
            for k, i in enumerate(self.network.graph.entries):
                value = values[i]
                total = value.counts() if isinstance(value, Spikes) else dense(value).sum(0)
                if value.shape[0] == 1:
                    total = total * chunk.steps
                counts[k] = total if counts[k] is None else counts[k] + total
                if trains is not None:
                    trains[k].append(dense(value))
            if tape is not None:
                tape.append(chunk)
            self.t += chunk.steps
        return counts

    def _forward_chunk(self, chunk: _Chunk, keep: bool) -> dict[int, Value]:
        graph = self.network.graph
        values: dict[int, Value] = {}
        for i in graph.body:
            node = graph.nodes[i]
            if node.kind == INPUT:
                values[i] = self._encode(chunk)
            elif node.kind == NEURON:
                source = node.inputs[0]
                values[i] = self._fire(i, dense(values[source]), chunk, keep, graph.shared(source))
            else:
                values[i] = self.apply(i, [values[j] for j in node.inputs])
            self.shapes[i] = values[i].shape[1:]
            if self.network.observers and node.kind in (INPUT, NEURON):
                value = values[i]
                if isinstance(value, Tensor):
                    value = value.expand(chunk.steps, *value.shape[1:])
                for observer in self.network.observers:
                    observer(self, self.labels[i], value)
            for j in node.inputs:
                if graph.last_use[j] == i and j not in graph.entries:
                    values.pop(j, None)
        return values

    def _encode(self, chunk: _Chunk) -> Tensor:
        images = self.network.encoder(
            self.images, chunk.start, chunk.start + chunk.steps, self.keys
        )
        return images[:1] if images.stride(0) == 0 else images

    def _fire(self, i: int, current: Tensor, chunk: _Chunk, keep: bool, shared: bool) -> Spikes:
        """Spikes (T, B, …) of a layer, from its current; state and record are updated."""
        shape = torch.Size((chunk.steps, *current.shape[1:]))
        on_cpu = current.device.type == "cpu"  # there the current is only read
        copy = (shared and not on_cpu) or len(current) == 1
        matrix = to_matrix(current.expand(shape), copy=copy)
        if i not in self.membrane:
            self.membrane[i] = torch.zeros_like(matrix[0])
            self.last_spike[i] = torch.zeros_like(matrix[0], dtype=torch.int16)
        neuron = self.modules[i]
        if keep and neuron.needs_membrane:
            chunk.membrane[i] = self.membrane[i].clone()
        times = self.last_spike[i] if keep and isinstance(neuron.surrogate, STDB) else None
        if times is not None and chunk.snapshot:
            chunk.last_spike[i] = times.clone()
        v, leak = self.threshold[i], self.leak[i]
        packed = fire(matrix, self.membrane[i], v, leak, times, chunk.start)
        if keep:
            chunk.bits[i] = packed
        spikes = None if on_cpu else from_matrix(matrix, shape)
        return Spikes(packed, shape, current.dtype, spikes)

    # -- backward ------------------------------------------------------------------------------

    def backward(
        self, tape: list[_Chunk], grad_counts: Sequence[Tensor], parameters: Sequence[nn.Parameter]
    ) -> list[Tensor]:
        """Gradients of ``parameters``, given those of the summed values of the entries.

        The output only accumulates: its gradient is the same at every t. Consumes ``tape``.
        """
        self.prepared.clear()  # makes room for the gradients
        # those of weights are made by their first product
        gradients = {id(p): None if p.dim() else torch.zeros_like(p) for p in parameters}
        carry: dict[int, Tensor] = {}
        while tape:
            chunk = tape.pop()
            self._find_last_spikes(chunk, tape)
            self._backward_chunk(chunk, grad_counts, carry, gradients)
        found = [gradients[id(p)] for p in parameters]
        return [_laid_out(g, p) for p, g in zip(parameters, found, strict=True)]

    def _find_last_spikes(self, chunk: _Chunk, tape: list[_Chunk]) -> None:
        """Last spike times before a chunk, from the latest snapshot and the spikes since."""
        if chunk.snapshot:
            return
        since = next(k for k in reversed(range(len(tape))) if tape[k].snapshot)
        for i, times in tape[since].last_spike.items():
            chunk.last_spike[i] = times.clone()
            for earlier in tape[since:]:
                latest(earlier.bits[i], chunk.last_spike[i], earlier.start)

    def _backward_chunk(
        self,
        chunk: _Chunk,
        grad_counts: Sequence[Tensor],
        carry: dict[int, Tensor],
        gradients: dict[int, Any],
    ) -> None:
        graph = self.network.graph
        values: dict[int, Value] = {}
        grads: dict[int, Gradient] = {}

        def pass_on(i: int, grad: Gradient) -> None:
            """Add to the gradient of a node's value; ``grad`` may be changed in place later."""
            if i not in grads:
                grads[i] = grad
                return
            first, second = dense(grads[i]), dense(grad)
            if len(first) == len(second):
                grads[i] = first.add_(second)
            else:  # a constant value: what is summed over time meets what is not
                grads[i] = first.sum(0, keepdim=True) + second.sum(0, keepdim=True)

        for i, count in zip(graph.entries, grad_counts, strict=True):
            if graph.reaches_weights[i]:
                pass_on(i, to_layout(count.expand(chunk.steps, *count.shape)))
        for i in reversed(graph.body):
            if i not in grads:
                values.pop(i, None)
                continue
            node = graph.nodes[i]
            grad: Any = grads.pop(i)
            if node.kind == NEURON:
                current = None
                if self.modules[i].needs_membrane:
                    source = dense(self._again(node.inputs[0], chunk, values))
                    current = to_matrix(
                        source.expand(grad.shape),
                        copy=len(source) == 1 or graph.shared(node.inputs[0]),
                    )
                    values.pop(node.inputs[0], None)
                shape = grad.shape
                matrix = self._backward_neuron(i, grad, current, chunk, carry, gradients)
                pass_on(node.inputs[0], from_matrix(matrix, shape))
            elif node.kind == DROPOUT:
                mask = self.masks[i]
                if mask is not None:
                    if isinstance(grad, Windows) and grad.mask is None:
                        grad = replace(grad, mask=mask)
                    else:
                        grad = dense(grad).mul_(mask)
                pass_on(node.inputs[0], grad)
            elif node.kind == SUM:
                grad = dense(grad)
                for k, j in enumerate(node.inputs):
                    if graph.reaches_weights[j]:
                        pass_on(j, grad if k == 0 else grad.clone())
            else:
                module, operator, below = self.modules[i], OPERATORS[node.kind], node.inputs[0]
                grad = self._lowered(dense(grad)) if operator.learns else dense(grad)
                weight = id(module.weight) if operator.learns else None
                if weight in gradients:
                    x = self._again(below, chunk, values)
                    if x.shape[0] == 1:  # constant input: the weights see the summed gradient
                        grad = grad.sum(0, keepdim=True)
                    gradients[weight] = operator.backward_weight(module, grad, x, gradients[weight])
                if graph.reaches_weights[below]:
                    shape = self.shapes[below][1:]
                    pass_on(below, operator.backward_input(module, grad, shape))
            values.pop(i, None)

    def _again(self, i: int, chunk: _Chunk, values: dict[int, Value]) -> Value:
        """The value of a node in a chunk, computed again from the spikes below it; kept."""
        if i not in values:
            node = self.network.graph.nodes[i]
            if node.kind == INPUT:
                values[i] = self._encode(chunk)
            elif node.kind == NEURON:
                shape = torch.Size((chunk.steps, *self.shapes[i]))
                values[i] = Spikes(chunk.bits[i], shape, self.membrane[i].dtype)
            else:
                below = [self._again(j, chunk, values) for j in node.inputs]
                values[i] = self.apply(i, below)
        return values[i]

    def _backward_neuron(
        self,
        i: int,
        above: Gradient,
        current: Tensor | None,
        chunk: _Chunk,
        carry: dict[int, Tensor],
        gradients: dict[int, Any],
    ) -> Tensor:
        """∂L/∂I (T, M) of a layer from ∂L/∂O, maybe in its place; gradients of V and λ too.

        ∂U_t/∂V = −O_{t−1}, ∂U_t/∂λ = U_{t−1}; ∂O/∂V = −s over U and −s·U/V² over U/V.
        """
        neuron, v, leak = self.modules[i], self.threshold[i], self.leak[i]
        surrogate, temporal = neuron.surrogate, neuron.temporal_gradient
        learn_v, learn_leak = id(neuron.threshold) in gradients, id(neuron.leak) in gradients
        packed = chunk.bits[i]
        if isinstance(surrogate, STDB) and fuses(packed.device) and not learn_v | learn_leak:
            if isinstance(above, Windows):
                windows, grad = (
                    above,
                    above.above.new_empty(above.shape[0], above.shape[1:].numel()),
                )
            else:
                windows, grad = None, to_matrix(above)
            grad = backpropagate_stdb(
                grad, packed, chunk.last_spike[i], chunk.start, surrogate, v, carry.get(i), leak,
                temporal, windows,
            )  # fmt: skip
            carry[i] = grad[0].clone()
            return grad
        grad = to_matrix(dense(above))
        spikes = bits.unpack(packed, grad.shape[1], grad.dtype)
        membrane: Any = None
        before: Any = None
        if current is not None:
            before = chunk.membrane[i]
            membrane = membranes(current, spikes, before, v, leak)
        if isinstance(surrogate, STDB):
            slope = surrogate.of_spikes(spikes, chunk.last_spike[i], chunk.start)
        else:
            slope = surrogate.of_membrane(membrane, v)
        if surrogate.over_threshold:
            slope /= v
        grad = grad.mul_(slope)  # ∂L/∂O · ∂O/∂U
        if learn_v:
            through = grad if not surrogate.over_threshold else grad * membrane / v
            gradients[id(neuron.threshold)] -= through.sum()
        grad = backpropagate(grad, carry.get(i), leak, temporal)
        carry[i] = grad[0].clone()
        if learn_v:
            gradients[id(neuron.threshold)] -= (grad[1:] * spikes[:-1]).sum()
            if chunk.start > 0:
                previous = self._previous_spikes(i, chunk)
                gradients[id(neuron.threshold)] -= (grad[0] * previous).sum()
        if learn_leak:
            gradients[id(neuron.leak)] += (grad[1:] * membrane[:-1]).sum()
            gradients[id(neuron.leak)] += (grad[0] * before).sum()
        return grad

    def _previous_spikes(self, i: int, chunk: _Chunk) -> Tensor:
        """(M,) whether each neuron spiked in the step before the chunk."""
        if i in chunk.membrane:
            return chunk.membrane[i] > self.threshold[i]
        return chunk.last_spike[i] == chunk.start


def _laid_out(grad: Tensor | None, parameter: nn.Parameter) -> Tensor:
    """A gradient (None: zero) in its parameter's memory layout, as optimisers and DDP want it."""
    if grad is None:
        return torch.zeros_like(parameter)
    if grad.stride() == parameter.stride():
        return grad
    return torch.empty_like(parameter).copy_(grad)


class _Steps(torch.autograd.Function):
    """The steps of a presentation as one differentiable function of the weights."""

    @staticmethod
    def forward(ctx, presentation, steps, parameters, *tensors):
        ctx.save_for_backward(*tensors)  # so that autograd notices weights changed in place
        ctx.presentation, ctx.parameters, ctx.tape = presentation, parameters, []
        return tuple(presentation.advance(steps, ctx.tape))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_counts):
        _ = ctx.saved_tensors
        if not ctx.tape:
            raise RuntimeError("the steps were already gone back through; add up losses first")
        presentation, ctx.presentation = ctx.presentation, None  # a loss that is kept keeps nothing
        gradients = presentation.backward(ctx.tape, grad_counts, ctx.parameters)
        return (None, None, None, *gradients)
