"""The check of a rewriting: does the graph compute what the user's network computes?

Both run on an example in float64, the user's with its own code, hooks and all. What a rule got
wrong, or tracing did not see, shows in the first layer that differs.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .graph import Node
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
    rewriting = rewrite(unwrapped(copy.deepcopy(own, inner_copies(own))), images)
    for module in rewriting.net.modules():
        module._forward_hooks.clear()  # an operator has none
    expected, result = _recorded(own, images)
    values = activations(rewriting.nodes, rewriting.net, images)
    for path, k, i in _places(rewriting):
        if len(expected.get(path, [])) > k:
            _compare(f"layer {path}", values[i], expected[path][k])
    if rewriting.result is not None:
        last = next(c for c in rewriting.calls if c.op == "output").args[0]
        assert isinstance(last, fx.Node)
        logits = values[rewriting.result]
        _compare("the output", _ended(rewriting, last, logits), result)


@torch.no_grad()
def activations(nodes: Sequence[Node], net: nn.Module, images: Tensor) -> list[Tensor]:
    """The value of every node, (B, …), with the ANN's activations in the place of neurons."""
    values = [images]
    for node in nodes[1:]:
        module: Any = None if node.path is None else net.get_submodule(node.path)
        below = [values[j] for j in node.inputs]
        if node.operator.fires:
            bound = getattr(module, "bound", getattr(module, "max_val", None))
            values.append(below[0].clamp(min=0, max=bound))
        else:
            values.append(node.operator.plain(module, *below))
    return values


def _recorded(net: nn.Module, images: Tensor) -> tuple[dict[str, list[Tensor]], Tensor]:
    """Path → what a module gave, call by call; and what the network gave."""
    seen: dict[str, list[Tensor]] = {}

    def record(path: str) -> Any:
        def hook(_: nn.Module, __: Any, value: Any) -> None:
            if isinstance(value, Tensor):
                seen.setdefault(path, []).append(value.clone())

        return hook

    inside = unwrapped(net)
    handles = [
        module.register_forward_hook(record(path))
        for path, module in inside.named_modules()
        if path
    ]
    try:
        result: Tensor = inside(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen, result


def _places(rewriting: Rewriting) -> list[tuple[str, int, int]]:
    """(path, which of its calls, node) of the modules whose value is a node's, in order.

    Of several operations that became one node the last has its value: a norm, not the layer that it
    was folded into.
    """
    last = {i: call for call, i in rewriting.index.items()}
    counts: dict[str, int] = {}
    found = []
    for call in rewriting.calls:
        if call.op != "call_module":
            continue
        path = place(call)
        k = counts[path] = counts.get(path, -1) + 1
        i = rewriting.index.get(call)
        if i is not None and last[i] is call and call not in rewriting.left_out:
            found.append((path, k, i))
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
