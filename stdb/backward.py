"""The backward pass (§2.2): exact BPTT from spike bits, over the chunks in reverse order.

It keeps of the past output spikes as bits; pooled and masked inputs, input spikes and, where the
surrogate asks for them, membrane potentials are computed again. Of a single chunk the currents that
these are made of are kept, too. The *tape* is the list of
a presentation's chunks; :class:`Steps` is where autograd comes in.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels
from .encoding import in_units, parameters_of
from .kernels.layout import from_matrix, to_layout, to_matrix
from .operators import Gradient, Value, bias_apart, dense
from .operators.maximum import Carry, MaxPool
from .operators.shaping import Sum
from .presentation import Chunk, Presentation
from .spikes import Spikes


class Steps(torch.autograd.Function):
    """The steps of a presentation as one differentiable function of images and weights."""

    @staticmethod
    def forward(
        ctx: Any,
        presentation: Presentation,
        steps: int,
        images: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        """Run the steps; the summed values of the output layer's inputs."""
        # so that autograd notices what is changed in place before the backward pass
        encoder = presentation.network.encoder
        own = getattr(encoder, "__dict__", {})  # such as the train of a SpikeTrain
        trains = [value for value in own.values() if isinstance(value, Tensor)]
        ctx.save_for_backward(images, *trains, *parameters)
        ctx.presentation, ctx.parameters, ctx.tape = presentation, parameters, []
        nodes = enumerate(presentation.network.graph.nodes)
        sites = presentation.sites
        ctx.weights = {i: (sites[i].weight, sites[i].bias) for i, n in nodes if n.operator.learns}
        return tuple(presentation.advance(steps, ctx.tape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_counts: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of images and weights."""
        _ = ctx.saved_tensors
        if not ctx.tape:
            raise RuntimeError(
                "backward() already ran over these steps; add up the losses first, and call it once"
            )
        presentation, ctx.presentation = ctx.presentation, None  # a loss that is kept keeps nothing
        for i, of_run in ctx.weights.items():
            presentation.sites[i].use(*of_run)
        walk = BackwardWalk(presentation, grad_counts, ctx.parameters, ctx.needs_input_grad[2])
        gradients = walk.run(ctx.tape)
        return (None, None, walk.images, *gradients)


class BackwardWalk:
    """One walk back over a tape.

    Args:
        presentation: whose steps they are.
        grad_counts: gradients of the summed values of the entries. The output only accumulates, so
            its gradient is the same at every t.
        parameters: whose gradients are wanted: weights, V, λ, what an encoder learns.
        of_images: whether that of the images is, too.

    Attributes:
        images: (B, C, H, W), the gradient of the images summed over time; None: not wanted.
    """

    def __init__(
        self,
        presentation: Presentation,
        grad_counts: Sequence[Tensor],
        parameters: Sequence[Tensor],
        of_images: bool,
    ) -> None:
        self.images: Any = torch.zeros_like(presentation.images) if of_images else None
        self.presentation, self.grad_counts = presentation, grad_counts
        self.graph, self.sites = presentation.network.graph, presentation.sites
        self.parameters = parameters
        # by the parameter's id; those of weights are made by their first product
        self.gradients: dict[int, Any] = {
            id(p): None if p.dim() else torch.zeros_like(p) for p in parameters
        }
        self.real = presentation.real
        # neuron node → nodes whose biases learn from its current's gradient; all such nodes
        self.biases = {i: self._biases_below(i) for i in self.graph.neurons}
        self.summed = {j for below in self.biases.values() for j in below}
        learned = parameters_of(presentation.network.encoder)
        self.of_encoder = [p for p in learned if id(p) in self.gradients]
        self.pooled: dict[int, Carry] = {}  # max-pooling node → what the chunk after it gave
        self.carry: dict[int, Tensor] = {}  # neuron node → ∂L/∂U of the step after the chunk

    def run(self, tape: list[Chunk]) -> list[Tensor]:
        """Gradients of the parameters; consumes ``tape``."""
        for site in self.sites:
            site.forget()  # makes room for the gradients
        while tape:
            chunk = tape.pop()
            _find_last_spikes(chunk, tape)
            self._walk_chunk(chunk)
        return [_laid_out(self.gradients[id(p)], p) for p in self.parameters]

    def _walk_chunk(self, chunk: Chunk) -> None:
        graph = self.graph
        values: dict[int, Value] = {}
        grads: dict[int, Gradient] = {}
        for i, count in zip(graph.entries, self.grad_counts, strict=True):
            if self._wanted(i):
                self._pass_on(grads, i, to_layout(count.expand(chunk.steps, *count.shape)))
        for i in reversed(graph.body):
            if i in grads:
                operator = graph.nodes[i].operator
                grad = grads.pop(i) if operator.lowered else self._raised(grads.pop(i))
                if operator.fires:
                    self._walk_neuron(i, grad, chunk, values, grads)
                elif isinstance(operator, MaxPool):
                    self._walk_max_pool(i, operator, dense(grad), chunk, values, grads)
                else:
                    self._walk_operator(i, grad, chunk, values, grads)
            values.pop(i, None)

    def _walk_operator(
        self,
        i: int,
        grad: Gradient,
        chunk: Chunk,
        values: dict[int, Value],
        grads: dict[int, Gradient],
    ) -> None:
        """Go on from the gradient of an operator's value to those of its weights and inputs."""
        node, site = self.graph.nodes[i], self.sites[i]
        if not node.inputs and self._wanted(i):
            self._walk_encoder(dense(grad), chunk)
        if node.operator.learns:
            whole = dense(grad)
            grad = site.lowered(whole) if node.operator.lowered else whole
            weight, bias = id(site.weight), id(site.bias)
            if weight in self.gradients:
                x = self._recompute(node.inputs[0], chunk, values)
                if x.shape[0] == 1:  # constant input: the weights see the summed gradient
                    grad = grad.sum(0, keepdim=True)
                self.gradients[weight] = node.operator.backward_weight(
                    site, grad, x, self.gradients[weight]
                )
            if bias in self.gradients and i not in self.summed:
                self.gradients[bias] = node.operator.backward_bias(
                    site, whole, self.gradients[bias]
                )
        for position, j in reversed(list(enumerate(node.inputs))):
            if self._wanted(j):
                shape = self.presentation.shapes[j][1:]
                self._pass_on(grads, j, node.operator.backward_input(site, grad, position, shape))

    def _walk_max_pool(
        self,
        i: int,
        pool: MaxPool,
        grad: Tensor,
        chunk: Chunk,
        values: dict[int, Value],
        grads: dict[int, Gradient],
    ) -> None:
        """Go on from the gradient of what max-pooling passed on to that of its currents."""
        (source,) = self.graph.nodes[i].inputs
        x = dense(self._recompute(source, chunk, values))
        x = x.expand(chunk.steps, *x.shape[1:])
        module, before = self.sites[i].module, chunk.sums[i]
        below, self.pooled[i] = pool.backpropagate(module, grad, x, before, self.pooled.get(i))
        self._pass_on(grads, source, below)

    def _walk_encoder(self, grad: Tensor, chunk: Chunk) -> None:
        """Go on from the gradient of the input, straight or by autograd, to those below it.

        They are the images', and those of the encoder's own parameters.
        """
        presentation, encoder = self.presentation, self.presentation.network.encoder
        pixels, wanted = presentation.images.detach(), list[Tensor](self.of_encoder)
        if self.images is not None and getattr(encoder, "straight_through", False):
            self.images = self.images + in_units(grad.sum(0), encoder)
        elif self.images is not None:
            wanted.append(pixels.requires_grad_())
        if not wanted:
            return
        with torch.enable_grad():
            stop = chunk.start + chunk.steps
            given = encoder(pixels, chunk.start, stop, presentation.keys)[: len(grad)]
        if not given.requires_grad:
            return
        # one of a constant input has the gradient of all steps
        for tensor, below in zip(
            wanted, torch.autograd.grad(given, wanted, grad, allow_unused=True), strict=True
        ):
            if tensor is pixels and below is not None:
                self.images = self.images + below
            elif below is not None:
                before = self.gradients[id(tensor)]
                self.gradients[id(tensor)] = below if before is None else before + below

    def _wanted(self, i: int) -> bool:
        """Whether a gradient has to reach a node: all lies above the images and the encoder."""
        below = self.images is not None or bool(self.of_encoder)
        return below or self.graph.reaches_weights[i]

    def _recompute(self, i: int, chunk: Chunk, values: dict[int, Value]) -> Value:
        """The value of a node in a chunk, computed again from the spikes below it; kept."""
        if i not in values:
            node, presentation = self.graph.nodes[i], self.presentation
            if not node.inputs:
                values[i] = presentation.encode(chunk.start, chunk.start + chunk.steps)
            elif isinstance(node.operator, MaxPool):
                x = dense(self._recompute(node.inputs[0], chunk, values))
                x = x.expand(chunk.steps, *x.shape[1:])
                total = chunk.sums[i].clone()
                values[i] = node.operator.accumulate(presentation.sites[i].module, x, total)
            elif node.operator.fires:
                shape = torch.Size((chunk.steps, *presentation.shapes[i]))
                values[i] = Spikes(chunk.bits[i], shape, presentation.membrane[i].dtype)
            else:
                below = [self._recompute(j, chunk, values) for j in node.inputs]
                compute = partial(presentation.apply, i, below)
                values[i] = presentation.constants.value(i, compute)
        return values[i]

    # -- neurons -------------------------------------------------------------------------------

    def _walk_neuron(
        self,
        i: int,
        grad: Gradient,
        chunk: Chunk,
        values: dict[int, Value],
        grads: dict[int, Gradient],
    ) -> None:
        """Go on from the gradient of a layer's spikes to that of its current."""
        (source,) = self.graph.nodes[i].inputs
        neuron, gradients = self.sites[i].module, self.gradients
        current, bias = self._current(i, source, chunk, values)
        threshold, leak = id(neuron.threshold), id(neuron.leak)
        layer = kernels.Layer(
            packed=chunk.bits[i],
            surrogate=neuron.surrogate,
            threshold=self.presentation.threshold[i],
            real=self.real,
            leak=self.presentation.leak[i],
            temporal=neuron.temporal_gradient,
            start=chunk.start,
            last_spike=chunk.last_spike.get(i),
            current=current,
            bias=bias,
            before=chunk.membrane.get(i),
            carry=self.carry.get(i),
            carries=chunk.start > 0,
            learns_threshold=threshold in gradients,
            learns_leak=leak in gradients,
            channels=grad.shape[2] if self.biases[i] else 0,
            lowered=self.sites[source].precision if self._read_by_products(source) else None,
        )
        shape = grad.shape
        found = kernels.backpropagate(grad, layer)
        if threshold in gradients:
            gradients[threshold] += found.threshold
            if chunk.start == 0 and neuron.temporal_gradient:  # U_0 = f·V
                share = layer.leak * neuron.initial_membrane
                gradients[threshold] += share * found.first
        if leak in gradients:
            gradients[leak] += found.leak
        if found.carry is not None:
            self.carry[i] = found.carry
        for j in self.biases[i]:
            assert found.channels is not None
            of_bias = id(self.sites[j].bias)
            before = gradients[of_bias]
            own = found.channels.clone()  # each bias has a gradient of its own
            gradients[of_bias] = own if before is None else before.add_(own)
        self._pass_on(grads, source, from_matrix(found.current, shape))

    def _current(
        self, i: int, source: int, chunk: Chunk, values: dict[int, Value]
    ) -> tuple[Tensor | None, Tensor | None]:
        """A layer's current (T, M) and its bias, where membranes are needed; kept or made again."""
        if not self.sites[i].module.needs_membrane:
            return None, None
        if i in chunk.current:
            return chunk.current.pop(i)
        current, bias = bias_apart(self._recompute(source, chunk, values))
        values.pop(source, None)
        return to_matrix(current), bias

    def _branches(self, i: int) -> list[int]:
        """What a neuron's current is the sum of and nobody else reads, with the same gradient."""
        (source,) = self.graph.nodes[i].inputs
        if isinstance(self.graph.nodes[source].operator, Sum) and not self.graph.shared(source):
            return [j for j in self.graph.nodes[source].inputs if not self.graph.shared(j)]
        return [] if self.graph.shared(source) else [source]

    def _biases_below(self, i: int) -> list[int]:
        """Nodes whose bias learns from the gradient of a neuron layer's current alone."""
        nodes, sites = self.graph.nodes, self.sites
        return [
            j
            for j in self._branches(i)
            if nodes[j].operator.learns and id(sites[j].bias) in self.gradients
        ]

    def _read_by_products(self, source: int) -> bool:
        """Whether a neuron's gradient goes to products, and nowhere else."""
        node = self.graph.nodes[source]
        branches = node.inputs if isinstance(node.operator, Sum) else [source]
        operators = [self.graph.nodes[j].operator for j in branches]
        alone = not any(map(self.graph.shared, (source, *branches)))
        return alone and all(operator.learns and operator.lowered for operator in operators)

    def _raised(self, grad: Gradient) -> Gradient:
        """A gradient in the type of the weights."""
        if isinstance(grad, Tensor):
            return grad.to(self.real)
        return replace(grad, above=grad.above.to(self.real))

    def _pass_on(self, grads: dict[int, Gradient], i: int, grad: Gradient) -> None:
        """Add to the gradient of a node's value; ``grad`` may be changed in place later."""
        if i not in grads:
            grads[i] = grad
            return
        second = grad if isinstance(grad, Tensor) else self._raised(grad).dense()  # type: ignore[union-attr]
        grads[i] = _sum(dense(self._raised(grads[i])), second)


def _sum(first: Tensor, second: Tensor) -> Tensor:
    """Two gradients of a value, maybe in the first's memory."""
    if len(first) == len(second):
        return first.add_(second)
    # a constant value: what is summed over time meets what is not
    return first.sum(0, keepdim=True) + second.sum(0, keepdim=True, dtype=first.dtype)


def _find_last_spikes(chunk: Chunk, tape: list[Chunk]) -> None:
    """Last spike times before a chunk, from the latest snapshot and the spikes since."""
    if chunk.snapshot:
        return
    since = next(k for k in reversed(range(len(tape))) if tape[k].snapshot)
    for i, times in tape[since].last_spike.items():
        chunk.last_spike[i] = times.clone()
        for earlier in tape[since:]:
            kernels.note_last_spikes(earlier.bits[i], chunk.last_spike[i], earlier.start)


def _laid_out(grad: Tensor | None, parameter: Tensor) -> Tensor:
    """A gradient (None: zero) in its parameter's memory layout, as optimisers and DDP want it."""
    if grad is None:
        return torch.zeros_like(parameter)
    if grad.stride() == parameter.stride():
        return grad
    return torch.empty_like(parameter).copy_(grad)
