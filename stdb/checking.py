"""The check of a rewriting: does the graph compute what the user's network computes?

Both run on an example in float64, the user's with its own code, hooks and all. What a rule got
wrong, or tracing did not see, shows in the first layer that differs. One copy in float64 is both,
one after the other, and a value is kept no longer than it is needed.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .activations import Clip, bounded
from .graph import Node
from .operators.table import is_operation, kind_of
from .rewriting import rewrite
from .traced import ConversionError, Rewriting
from .tracing import place, unwrapped
from .weights import inner_copies

TOLERANCE = 1e-9  # of a layer's largest value
IMAGES = 4  # of the example that are compared


@torch.no_grad()
def check_rewriting(ann: nn.Module, example: Tensor) -> None:
    """Compare the rewritten network with the user's, layer by layer, in float64.

    Args:
        ann: as its user wrote it.
        example: (B, …) images; the first few count.

    Raises:
        ConversionError: names the first layer whose value differs by more than ``TOLERANCE`` of the
            layer's largest, or the output.
    """
    own = copy.deepcopy(ann, inner_copies(ann)).double().eval()
    images = example[:IMAGES].to(next(own.parameters()).device, torch.float64)
    own = unwrapped(own)
    expected, result = _recorded(own, images)
    rewriting = rewrite(own, images)
    for module in rewriting.net.modules():
        module._forward_hooks.clear()  # an operator has none
    places = _places(rewriting)
    for i, value in activations(rewriting.nodes, rewriting.net, images):
        given = expected.pop(places[i], None) if i in places else None
        if given is not None:
            _compare(f"layer {places[i][0]}", value, given)
        if i == rewriting.result:
            last = next(c for c in rewriting.calls if c.op == "output").args[0]
            assert isinstance(last, fx.Node)
            _compare("the output", _ended(rewriting, last, value), result)


@torch.no_grad()
def activations(
    nodes: Sequence[Node],
    net: nn.Module,
    images: Tensor,
    fire: Callable[[int, Tensor], Tensor] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Every node and its value, (B, …), with the ANN's activations in the place of neurons.

    One after the other: a value that no node reads any more is let go. ``fire`` gives the value of
    a layer of neurons in their place, of its node and its current.
    """
    last_use = {j: i for i, node in enumerate(nodes) for j in node.inputs}
    values = {0: images}
    for i, node in enumerate(nodes):
        below = [values[j] for j in node.inputs]
        if fire is not None and node.operator.fires:
            values[i] = fire(i, below[0])
        elif node.inputs:
            values[i] = _activation(node, net, below)
        yield i, values[i]
        for j in {i, *node.inputs}:
            if last_use.get(j, i) == i:
                del values[j]


def _activation(node: Node, net: nn.Module, below: Sequence[Tensor]) -> Tensor:
    module: Any = None if node.path is None else net.get_submodule(node.path)
    if isinstance(module, Clip):  # with its levels
        y: Tensor = module(below[0])
        return y
    if node.operator.fires:
        bound = getattr(module, "bound", getattr(module, "max_val", None))
        levels = getattr(module, "levels", None)
        if levels is not None:
            x = below[0]
            like = torch.promote_types(x.dtype, torch.float32)
            return bounded(x, torch.tensor(bound, dtype=like, device=x.device), levels)
        return below[0].clamp(min=0, max=bound)
    return node.operator.plain(module, *below)


def _recorded(net: nn.Module, images: Tensor) -> tuple[dict[tuple[str, int], Tensor], Tensor]:
    """(path, which of its calls) → what an operation gave; and what the network gave."""
    seen: dict[tuple[str, int], Tensor] = {}
    calls: Counter[str] = Counter()

    def record(path: str) -> Any:
        def hook(_: nn.Module, __: Any, value: Any) -> None:
            if isinstance(value, Tensor):
                seen[path, calls[path]] = value.clone()
            calls[path] += 1

        return hook

    layers = {path: m for path, m in net.named_modules() if not isinstance(m, nn.Sequential)}
    handles = [
        module.register_forward_hook(record(path))
        for path, module in layers.items()
        if is_operation(kind_of(module))
    ]
    try:
        result: Tensor = net(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen, result


def _places(rewriting: Rewriting) -> dict[int, tuple[str, int]]:
    """Node → (path, which of its calls), of the modules whose value is a node's.

    Of several operations that became one node the last has its value: a norm, not the layer that it
    was folded into.
    """
    last = {i: call for call, i in rewriting.index.items()}
    counts: Counter[str] = Counter()
    found = {}
    for call in rewriting.calls:
        if call.op != "call_module":
            continue
        path = place(call)
        k, counts[path] = counts[path], counts[path] + 1
        i = rewriting.index.get(call)
        if i is not None and last[i] is call and call not in rewriting.left_out:
            found[i] = path, k
    return found


def _ended(rewriting: Rewriting, last: fx.Node, logits: Tensor) -> Tensor:
    """The logits as the user's network returns them, with the softmax that was left out."""
    if last not in rewriting.left_out:
        return logits
    made: Tensor
    if last.op == "call_module":
        made = rewriting.net.get_submodule(place(last))(logits)
    elif last.op == "call_method":
        made = getattr(logits, str(last.target))(*last.args[1:], **last.kwargs)
    else:
        assert callable(last.target)
        made = last.target(logits, *last.args[1:], **last.kwargs)
    return made


def _compare(name: str, actual: Tensor, expected: Tensor) -> None:
    largest = float(expected.abs().max())
    off = float((actual - expected).abs().max()) if actual.shape == expected.shape else float("inf")
    if not off <= TOLERANCE * max(largest, 1e-300):
        raise ConversionError(
            f"{name} of the converted network differs from the ANN's on the example, by {off:.3g} "
            f"(the largest value is {largest:.3g}): forward hooks, randomness or code that tracing "
            "does not see change it; allowed: what is the same at each call"
        )
