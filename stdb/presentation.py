"""A presentation: the state of a batch of images that is being shown, and its forward pass.

Within a step a network is feed-forward; only membrane potentials and spikes cross time. So a chunk
of steps runs at once: one convolution over (chunk·B) images, then one scan over the chunk, layer
after layer (Algorithm 3).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import kernels
from .constancy import ConstantValues
from .graph import INPUT
from .kernels.layout import channels_last, from_matrix, to_matrix
from .operators import Value, bias_apart, dense
from .operators.maximum import MaxPool
from .operators.shaping import Dropout
from .randomness import dropout_mask
from .spikes import Spikes
from .weights import bias_of, weight_of

if TYPE_CHECKING:
    from .network import SpikingNetwork

IMAGES_PER_CHUNK = 256  # chunk · B that the default chunk aims at on a CPU …
PIXELS_PER_CHUNK = 3200 * 32**2  # … and chunk · B · pixels on a GPU
LONGEST = 32_767  # steps whose spike times an int16 holds
STEPS_PER_SNAPSHOT = 16  # last spike times are kept this often; those in between are found again


def default_chunk(batch_size: int, image_shape: Sequence[int], device: torch.device) -> int:
    """Time steps computed at once where nobody says how many."""
    if device.type != "cuda":
        return max(8, IMAGES_PER_CHUNK // max(1, batch_size))
    pixels = max(256, torch.Size(image_shape).numel() // 3)  # layers are no smaller than that
    return min(255, max(8, PIXELS_PER_CHUNK // max(1, batch_size * pixels)))  # ages in a byte


@dataclass
class Chunk:
    """What the backward pass keeps of a chunk: spikes as bits, and the state that it started in.

    Attributes:
        start: the number of steps before it.
        steps: its length.
        snapshot: whether last spike times are kept here.
        bits: neuron node → its spikes.
        last_spike: neuron node → (M,) latest spike times before the chunk.
        membrane: neuron node → (M,) membrane potentials before the chunk.
        current: neuron node → its current and bias, where this chunk is all that was run at once,
            so that they need not be computed again.
        sums: max-pooling node → (B, …) currents summed over the steps before the chunk.
        alone: whether it is all that was run at once.
    """

    start: int
    steps: int
    snapshot: bool = True
    bits: dict[int, Tensor] = field(default_factory=dict)
    last_spike: dict[int, Tensor] = field(default_factory=dict)
    membrane: dict[int, Tensor] = field(default_factory=dict)
    current: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    sums: dict[int, Tensor] = field(default_factory=dict)
    alone: bool = False


@dataclass
class _Site:
    """An operator's place in a presentation; see :class:`stdb.operators.Site`."""

    module: Any
    precision: torch.dtype | None
    density_limit: float
    mask: Tensor | None = None
    steps: int = 1  # that a value of this node is the sum of
    _weight: Tensor | None = None  # of this run of steps
    _bias: Tensor | None = None
    _prepared: tuple[Any, Tensor] | None = None  # the state of the weights; what was made of them

    @property
    def weight(self) -> Tensor:
        self._take()
        assert self._weight is not None
        return self._weight

    def lowered(self, x: Tensor) -> Tensor:
        return x if self.precision is None else x.to(self.precision)

    @property
    def bias(self) -> Tensor | None:
        self._take()
        if self._bias is None or self.steps == 1:
            return self._bias
        return self._bias * self.steps

    def prepared(self, make: Callable[[Tensor], Tensor]) -> Tensor:
        state = (self.weight.data_ptr(), self.weight._version)
        if self._prepared is None or self._prepared[0] != state:
            self._prepared = state, make(self.weight)
        return self._prepared[1]

    def _take(self) -> None:
        """The weights as they are, where no run has said which."""
        if self._weight is None:
            self.use(weight_of(self.module), bias_of(self.module))

    def use(self, weight: Tensor, bias: Tensor | None) -> None:
        """Compute with these from now on."""
        if weight is not self._weight:
            self._weight, self._prepared = weight, None
        self._bias = bias

    def forget(self) -> None:
        """Make room: what was prepared is made again when it is wanted."""
        self._prepared = None


class Presentation:
    """The state of a network that is being shown a batch of images.

    Attributes:
        chunk: time steps that are computed at once.
        real: the type of weights, membranes and sums.
        t: the number of steps so far.
        constants: what is computed once for all steps.
        logits: U_t of the output layer (B, classes), None before the first step.
        membrane: neuron node → (M,) U_t.
        sums: max-pooling node → (B, …) currents summed so far.
        last_spike: neuron node → (M,) int16, when each neuron spiked last; 0: never.
        threshold: neuron node → V.
        leak: neuron node → λ.
    """

    def __init__(
        self,
        network: "SpikingNetwork",
        images: Tensor,
        keys: Tensor,
        chunk: int,
        masks: Sequence[Tensor] | None = None,
    ) -> None:
        graph = network.graph
        self.network, self.images, self.keys, self.chunk = network, images, keys, chunk
        self.real = next(network.parameters()).dtype
        self.t = 0
        self.logits: Tensor | None = None
        limits = network.density_limits()
        self.sites = [_Site(network.module(i), network.precision, n) for i, n in enumerate(limits)]
        self.constants = ConstantValues(graph, network.encoder, self.sites, images)
        self.membrane: dict[int, Tensor] = {}
        self.sums: dict[int, Tensor] = {}
        self.last_spike: dict[int, Tensor] = {}
        self.ages_known = True  # steps without gradient don't note spike times
        self.shapes: dict[int, torch.Size] = {}  # (B, …) of every node's value
        self.labels = {0: INPUT, **graph.labels}
        self.threshold, self.leak = self._read_neurons()
        if self._learned_too_far():
            network.constrain()
            self.threshold, self.leak = self._read_neurons()
        self.undrawn: dict[int, int] = {}  # dropout node whose mask is not drawn yet → its number
        self._check_neurons()
        self._plan_masks(masks)

    def _read_neurons(self) -> tuple[dict[int, float], dict[int, float]]:
        """Neuron node → V, and → λ; one wait for a GPU."""
        nodes = self.network.graph.neurons
        neurons = [self.sites[i].module for i in nodes]
        scalars = torch.stack([torch.stack([n.threshold, n.leak]) for n in neurons]).tolist()
        thresholds, leaks = zip(*scalars, strict=True)
        return dict(zip(nodes, thresholds, strict=True)), dict(zip(nodes, leaks, strict=True))

    def _learned_too_far(self) -> bool:
        """Whether an optimiser's step has taken a V or λ that learns out of its range."""
        for i, threshold in self.threshold.items():
            neuron = self.sites[i].module
            if neuron.threshold.requires_grad and not threshold > 0:
                return True
            if neuron.leak.requires_grad and not 0 < self.leak[i] <= 1:
                return True
        return False

    def _check_neurons(self) -> None:
        for i, threshold in self.threshold.items():
            if not 0 < threshold < float("inf"):
                raise ValueError(
                    f"the threshold of {self.labels[i]} is {threshold}; allowed: a positive number"
                )
            if not 0 < self.leak[i] <= 1:
                raise ValueError(
                    f"the leak of {self.labels[i]} is {self.leak[i]}; allowed: in (0, 1]"
                )

    # -- evaluating nodes ----------------------------------------------------------------------

    def _plan_masks(self, masks: Sequence[Tensor] | None) -> None:
        """One mask per sample and dropout, given or drawn at its first use, kept for all t."""
        nodes = self.network.graph.nodes
        dropouts = [i for i, node in enumerate(nodes) if isinstance(node.operator, Dropout)]
        if masks is None:
            self.undrawn = {i: number for number, i in enumerate(dropouts)}
            return
        if len(masks) != len(dropouts):
            raise ValueError(f"{len(masks)} masks for {len(dropouts)} dropout layers")
        for i, mask in zip(dropouts, masks, strict=True):
            self.sites[i].mask = mask

    def _draw_mask(self, i: int, number: int, shape: torch.Size) -> Tensor | None:
        """(B, …): the inverted mask of a dropout; None in evaluation."""
        rate, seed = self.sites[i].module.p, self.network.dropout_seed
        if not self.network.training or rate == 0:
            return None
        drawn = shape
        if isinstance(self.sites[i].module, nn.Dropout1d | nn.Dropout2d):  # of whole channels
            drawn = torch.Size((*shape[:2], *[1] * len(shape[2:])))
        mask = dropout_mask(self.keys, seed, number, rate, drawn, self.images.dtype)
        return channels_last(mask.expand(shape))

    def apply(self, i: int, inputs: list[Value]) -> Value:
        """The value of a linear operator's node."""
        if i in self.undrawn:
            shape = inputs[0].shape[1:]
            self.sites[i].mask = self._draw_mask(i, self.undrawn.pop(i), shape)
        return self.network.graph.nodes[i].operator.forward(self.sites[i], inputs)

    def encode(self, start: int, stop: int) -> Tensor:
        """The input of the steps start < t ≤ stop; one step of it where it is constant."""
        images = self.network.encoder(self.images, start, stop, self.keys)
        return images[:1] if images.stride(0) == 0 or self.constants.nodes else images

    def integrate(self, counts: Sequence[Tensor], steps: int) -> Tensor:
        """The output layer's Eq. 4, given its inputs summed over the latest steps.

        Args:
            counts: the sums, one for each entry of the graph.
            steps: how many; every bias of the output layer is added as often.

        Returns:
            U_t (B, classes), differentiable with respect to these steps only.
        """
        graph = self.network.graph
        values: dict[int, Value] = {
            i: count[None] for i, count in zip(graph.entries, counts, strict=True)
        }
        for i in graph.tail:
            self.sites[i].steps = steps
            values[i] = self.apply(i, [values[j] for j in graph.nodes[i].inputs])
        logits = dense(values[graph.tail[-1]])[0]
        if self.logits is not None:
            logits = self.logits + logits
        self.logits = logits.detach()
        return logits

    # -- forward -------------------------------------------------------------------------------

    def take_weights(self) -> None:
        """The layers' weights as they are now, for the steps that follow."""
        known: dict[int, Any] = {}  # a layer that is called twice computes its own once
        for site, node in zip(self.sites, self.network.graph.nodes, strict=True):
            if node.operator.learns:
                if id(site.module) not in known:
                    known[id(site.module)] = weight_of(site.module), bias_of(site.module)
                site.use(*known[id(site.module)])

    def advance(
        self,
        steps: int,
        tape: list[Chunk] | None = None,
        trains: list[list[Tensor]] | None = None,
    ) -> list[Tensor]:
        """Run ``steps`` further steps; returns the summed values of the output layer's inputs.

        Args:
            steps: how many.
            tape: is given a record of each chunk for the backward pass.
            trains: one list per entry, each given the entry's values (T, B, …) of every chunk.
        """
        if tape is None:
            self.take_weights()
            self.ages_known = False
        elif any(self.sites[i].module.surrogate.needs_ages for i in self.network.graph.neurons):
            self._check_ages(self.t + steps)
        entries = self.network.graph.entries
        counts: list[Any] = [None] * len(entries)
        stop, last_snapshot = self.t + steps, self.t
        while self.t < stop:
            due = not tape or self.t - last_snapshot >= STEPS_PER_SNAPSHOT
            chunk = Chunk(self.t, min(self.chunk, stop - self.t), due)
            chunk.alone = chunk.steps == steps
            last_snapshot = self.t if due else last_snapshot
            values = self._forward_chunk(chunk, keep=tape is not None)
            for k, i in enumerate(entries):
                own = total(values[i], chunk.steps)
                counts[k] = own if counts[k] is None else counts[k] + own
                if trains is not None:
                    trains[k].append(dense(values[i]))
            if tape is not None:
                tape.append(chunk)
            self.t += chunk.steps
        return counts

    def _check_ages(self, stop: int) -> None:
        """Refuse steps with gradient up to ``stop`` whose ages would be unknown or wrong."""
        if not self.ages_known:
            raise RuntimeError(
                f"the first {self.t} steps of this presentation ran without gradient, so the ages "
                "that STDB needs are unknown; run them with gradient and drop the result"
            )
        if stop > LONGEST:
            raise ValueError(
                f"{stop} time steps with gradient; allowed with the STDB surrogate: up to "
                f"{LONGEST}, since spike times are kept as 16-bit numbers"
            )

    def _forward_chunk(self, chunk: Chunk, keep: bool) -> dict[int, Value]:
        """The values of the entries over a chunk; those of other nodes are dropped on the way."""
        graph = self.network.graph
        values: dict[int, Value] = {}
        for i in graph.body:
            node = graph.nodes[i]
            if not node.inputs:
                values[i] = self.encode(chunk.start, chunk.start + chunk.steps)
            elif isinstance(node.operator, MaxPool):
                values[i] = self._pool(i, node.operator, values[node.inputs[0]], chunk, keep)
            elif node.operator.fires:
                values[i] = self._fire(i, values[node.inputs[0]], chunk, keep)
            else:
                below = [values[j] for j in node.inputs]
                values[i] = self.constants.value(i, partial(self.apply, i, below))
            self.shapes[i] = values[i].shape[1:]
            self._show(i, values[i], chunk.steps)
            for j in node.inputs:
                if graph.last_use[j] == i and j not in graph.entries:
                    values.pop(j, None)
        return values

    def _pool(self, i: int, pool: MaxPool, value: Value, chunk: Chunk, keep: bool) -> Tensor:
        """What max-pooling passes on; the sums are updated."""
        x = dense(value)
        if i not in self.sums:
            self.sums[i] = torch.zeros_like(x[0])
        if keep:
            chunk.sums[i] = self.sums[i].clone()
        x = x.expand(chunk.steps, *x.shape[1:])
        return pool.accumulate(self.sites[i].module, x, self.sums[i])

    def _show(self, i: int, value: Value, steps: int) -> None:
        """Show the input or a layer's spikes to the network's observers."""
        if i not in self.labels:
            return
        for observer in self.network.observers:
            shown = value.expand(steps, *value.shape[1:]) if isinstance(value, Tensor) else value
            observer(self, self.labels[i], shown)

    def _fire(self, i: int, value: Value, chunk: Chunk, keep: bool) -> Spikes:
        """Spikes (T, B, …) of a layer, from its current; state and record are updated."""
        shape = torch.Size((chunk.steps, *value.shape[1:]))
        neuron, real = self.sites[i].module, self.real
        current, bias = bias_apart(value)
        matrix = to_matrix(current)
        before = self.membrane.get(i)
        if before is None:  # U_0 of all of them
            start = neuron.initial_membrane * self.threshold[i]
            before = matrix.new_full((1,), start, dtype=real).expand(matrix.shape[1])
        if keep and neuron.needs_membrane:
            chunk.membrane[i] = before
            if chunk.alone:
                chunk.current[i] = matrix, bias
        if i not in self.membrane or i in chunk.membrane:
            self.membrane[i] = torch.empty_like(before, memory_format=torch.contiguous_format)
        times = None
        if keep and neuron.surrogate.needs_ages:
            if i not in self.last_spike:
                self.last_spike[i] = torch.zeros_like(self.membrane[i], dtype=torch.int16)
            times = self.last_spike[i]
            if chunk.snapshot:
                chunk.last_spike[i] = times.clone()
        spikes, nodes = None, self.network.graph.nodes
        reads_numbers = any(n.operator.product for n in nodes if i in n.inputs)
        if reads_numbers and not kernels.works_on_bits(matrix.device):
            dtype = self.sites[i].precision or real
            spikes = matrix.new_empty(chunk.steps, matrix.shape[1], dtype=dtype)
        packed = kernels.fire(
            matrix, self.membrane[i], self.threshold[i], self.leak[i], last_spike=times,
            start=chunk.start, spikes=spikes, bias=bias, steps=chunk.steps,
            before=None if before is self.membrane[i] else before,
        )  # fmt: skip
        if keep:
            chunk.bits[i] = packed
        return Spikes(packed, shape, real, None if spikes is None else from_matrix(spikes, shape))


def total(value: Value, steps: int) -> Tensor:
    """A value (T, B, …) summed over the steps of its chunk; one for all of them counts as often."""
    whole = value.counts() if isinstance(value, Spikes) else dense(value).sum(0)
    return whole * steps if value.shape[0] == 1 else whole
