"""The backward pass (§2.2): exact BPTT from spike bits, over the chunks in reverse order.

It keeps of the past no more than output spikes as bits; pooled and masked inputs, input spikes and,
where the surrogate asks for them, membrane potentials are computed again. The *tape* is the list of
a presentation's chunks; :class:`Steps` is where autograd comes in.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels
from .encoding import in_units, parameters_of
from .kernels import bits
from .kernels.layout import from_matrix, to_layout, to_matrix
from .operators import Gradient, Value, dense
from .operators.maximum import Carry, MaxPool
from .presentation import Chunk, Presentation
from .spikes import Spikes
from .surrogate import STDB


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
                _pass_on(grads, i, to_layout(count.expand(chunk.steps, *count.shape)))
        for i in reversed(graph.body):
            if i in grads:
                grad = grads.pop(i)
                operator = graph.nodes[i].operator
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
            grad = site.lowered(whole)
            weight, bias = id(site.weight), id(site.bias)
            if weight in self.gradients:
                x = self._recompute(node.inputs[0], chunk, values)
                if x.shape[0] == 1:  # constant input: the weights see the summed gradient
                    grad = grad.sum(0, keepdim=True)
                self.gradients[weight] = node.operator.backward_weight(
                    site, grad, x, self.gradients[weight]
                )
            if bias in self.gradients:
                self.gradients[bias] = node.operator.backward_bias(whole, self.gradients[bias])
        for position, j in enumerate(node.inputs):
            if self._wanted(j):
                shape = self.presentation.shapes[j][1:]
                _pass_on(grads, j, node.operator.backward_input(site, grad, position, shape))

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
        _pass_on(grads, source, below)

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
                values[i] = presentation.apply(i, below)
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
        current = None
        if self.sites[i].module.needs_membrane:
            below = dense(self._recompute(source, chunk, values))
            copy = len(below) == 1 or self.graph.shared(source)
            current = to_matrix(below.expand(grad.shape), copy=copy)
            values.pop(source, None)
        shape = grad.shape
        if self._fuses(i):
            matrix = self._backpropagate_fused(i, grad, chunk)
        else:
            matrix = self._backpropagate(i, to_matrix(dense(grad)), current, chunk)
        self.carry[i] = matrix[0].clone()
        _pass_on(grads, source, from_matrix(matrix, shape))

    def _fuses(self, i: int) -> bool:
        """Whether a kernel has the whole backward pass: Eq. 11, neither V nor λ learning."""
        neuron = self.sites[i].module
        learns = id(neuron.threshold) in self.gradients or id(neuron.leak) in self.gradients
        return type(neuron.surrogate) is STDB and not learns

    def _backpropagate_fused(self, i: int, grad: Gradient, chunk: Chunk) -> Tensor:
        """∂L/∂I (T, M) of a layer from ∂L/∂O, from bits."""
        neuron, v = self.sites[i].module, self.presentation.threshold[i]
        surrogate = neuron.surrogate
        return kernels.backpropagate_stdb(
            grad,
            chunk.bits[i],
            chunk.last_spike[i],
            chunk.start,
            surrogate.alpha / v if surrogate.over_threshold else surrogate.alpha,
            surrogate.beta,
            self.carry.get(i),
            self.presentation.leak[i],
            neuron.temporal_gradient,
        )

    def _backpropagate(self, i: int, grad: Tensor, current: Tensor | None, chunk: Chunk) -> Tensor:
        """∂L/∂I (T, M) of a layer from ∂L/∂O, maybe in its place; gradients of V and λ too.

        ∂U_t/∂V = −O_{t−1}, ∂U_t/∂λ = U_{t−1}; ∂O/∂V = −s over U and −s·U/V² over U/V.
        """
        neuron, gradients = self.sites[i].module, self.gradients
        v, leak = self.presentation.threshold[i], self.presentation.leak[i]
        surrogate = neuron.surrogate
        learn_v, learn_leak = id(neuron.threshold) in gradients, id(neuron.leak) in gradients
        spikes = bits.unpack(chunk.bits[i], grad.shape[1], grad.dtype)
        membrane: Any = None
        before: Any = None
        if current is not None:
            before = chunk.membrane[i]
            membrane = kernels.recompute_membranes(current, spikes, before, v, leak)
        if surrogate.needs_ages:
            slope = surrogate.of_spikes(spikes, chunk.last_spike[i], chunk.start)
        else:
            slope = surrogate.of_membrane(membrane, v)
        if surrogate.over_threshold:
            slope /= v
        grad = grad.mul_(slope)  # ∂L/∂O · ∂O/∂U
        if learn_v:
            through = grad if not surrogate.over_threshold else grad * membrane / v
            gradients[id(neuron.threshold)] -= through.sum()
        grad = kernels.backpropagate(grad, self.carry.get(i), leak, neuron.temporal_gradient)
        if learn_v:
            gradients[id(neuron.threshold)] -= (grad[1:] * spikes[:-1]).sum()
            if chunk.start == 0 and neuron.temporal_gradient:  # U_0 = f·V
                share = leak * neuron.initial_membrane
                gradients[id(neuron.threshold)] += share * grad[0].sum()
            if chunk.start > 0:
                previous = self._previous_spikes(i, chunk)
                gradients[id(neuron.threshold)] -= (grad[0] * previous).sum()
        if learn_leak:
            gradients[id(neuron.leak)] += (grad[1:] * membrane[:-1]).sum()
            gradients[id(neuron.leak)] += (grad[0] * before).sum()
        return grad

    def _previous_spikes(self, i: int, chunk: Chunk) -> Tensor:
        """(M,) whether each neuron spiked in the step before the chunk."""
        if i in chunk.membrane:
            return torch.gt(chunk.membrane[i], self.presentation.threshold[i])
        return torch.eq(chunk.last_spike[i], chunk.start)


def _pass_on(grads: dict[int, Gradient], i: int, grad: Gradient) -> None:
    """Add to the gradient of a node's value; ``grad`` may be changed in place later."""
    if i not in grads:
        grads[i] = grad
        return
    first, second = dense(grads[i]), dense(grad)
    if len(first) == len(second):
        grads[i] = first.add_(second)
    else:  # a constant value: what is summed over time meets what is not
        grads[i] = first.sum(0, keepdim=True) + second.sum(0, keepdim=True)


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
