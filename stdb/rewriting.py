"""What becomes of each operation of a traced ANN: an operator of the graph, nothing, or a refusal.

Modules are looked up in the table of operators, calls in ``CALLS``; what neither has is refused
with the layer's name and the remedy of :mod:`stdb.rules.remedies`.
"""

import contextlib
import operator as python
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .activations import QCFS, Clip
from .exported import trace_by_export
from .graph import INPUT, Node
from .operators import Operator
from .operators.boundary import Input
from .operators.diagonal import Diagonal
from .operators.table import kind_of, kinds, operator_for
from .rules import arithmetic, functional, layers, neurons, products, resizing, shapes
from .rules.remedies import CALL_REMEDIES, REMEDIES
from .traced import ConversionError, Rewrite, Rewriting, shape_of, where
from .tracing import TracingError, place, trace

Rule = Callable[[Rewriting, fx.Node], Node | int]


CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, fx.GraphModule)


def rewrite(net: nn.Module, example: Tensor | None = None, *, limited: bool = False) -> Rewriting:
    """The graph of a module tree, shapes and identities left out.

    Args:
        net: the tree; modules may be put into it.
        example: a batch of images, of which the shape counts.
        limited: whether the input comes in units of an encoder's limits.

    Raises:
        ConversionError: names every operation that has no spiking form, and the remedy.
    """
    rewriting = Rewriting(net, _traced(net, example), limited=limited)
    result: fx.Node | None = None
    made: list[tuple[fx.Node, str, int]] = []  # with what it was, and the nodes before it
    for call in rewriting.calls:
        if call.op == "placeholder":
            rewriting.add(call, Node(INPUT, Input()))
        elif call.op == "output":
            if not isinstance(call.args[0], fx.Node):
                rewriting.problems.append("the network returns several values; allowed: the logits")
            else:
                result = call.args[0]
        elif call.op != "get_attr":
            made.append((call, _kind(net, call), len(rewriting.nodes)))
            _rewrite_one(rewriting, call)
    if result in rewriting.waiting:
        rewriting.note(_no_shape(rewriting, result))
    rewriting.refuse()
    if result is None:
        return rewriting
    rewriting.result = rewriting.index[result]
    _end_with_weights(rewriting, result)
    kept = _alive(rewriting)
    rewriting.rewrites = [_row(rewriting, kept, *one) for one in _with_ends(made, rewriting)]
    rewriting.removed(kept)
    rewriting.result = kept[rewriting.result]
    return rewriting


def _traced(net: nn.Module, example: Tensor | None) -> list[fx.Node]:
    """The operations; where torch.fx cannot follow, and there is an example, torch.export's."""
    try:
        return trace(net, example)
    except TracingError as error:
        if example is not None:
            with contextlib.suppress(TracingError):  # what torch.fx said is what the user reads
                return trace_by_export(net, example)
        Rewriting(net, (), problems=[*_refused_modules(net), str(error)]).refuse()
        raise


def _rewrite_one(rewriting: Rewriting, call: fx.Node) -> None:
    """Apply the rule of an operation, or note why there is none."""
    try:
        _check_shapes(rewriting, call)
        rewriting.add(call, _rewrite_call(rewriting, call))
    except ConversionError as error:
        rewriting.note(error)
        rewriting.add(call, next(iter(rewriting.sources(call)), 0))


def _kind(net: nn.Module, call: fx.Node) -> str:
    """What an operation is, as its users call it."""
    if call.op == "call_module":
        return kind_of(net.get_submodule(place(call))).__name__
    return str(getattr(call.target, "__name__", call.target))


def _with_ends(
    made: list[tuple[fx.Node, str, int]], rewriting: Rewriting
) -> Iterator[tuple[fx.Node, str, range]]:
    """Each operation with the nodes that were made for it."""
    starts = [start for _, _, start in made] + [len(rewriting.nodes)]
    for (call, found, start), end in zip(made, starts[1:], strict=True):
        yield call, found, range(start, end)


def _row(
    rewriting: Rewriting, kept: dict[int, int], call: fx.Node, found: str, own: range
) -> Rewrite:
    """What became of an operation, in words."""
    layer = place(call) if call.op == "call_module" else where(call)
    nodes = [rewriting.nodes[i] for i in own if i in kept]
    if nodes:
        return Rewrite(layer, found, ", ".join(f"{n.operator.name} {n.name}" for n in nodes))
    if any(rewriting.nodes[i].operator.fires for i in own):
        return Rewrite(layer, found, "neurons behind the max-pooling that reads it")
    if found.startswith(("BatchNorm", "SyncBatchNorm", "batch_norm")):
        return Rewrite(layer, found, f"folded into {rewriting.nodes[rewriting.index[call]].name}")
    return Rewrite(layer, found, "nothing")


def _end_with_weights(rewriting: Rewriting, result: fx.Node) -> None:
    """Append a scale of 1 where no weights follow the last neurons: the logits need their units."""
    last = rewriting.result
    if last is None or _ends_with_weights(rewriting.nodes, last):
        return
    end = arithmetic.like_weights(rewriting, Diagonal(result.meta["value"].shape[1], bias=False))
    rewriting.nodes.append(rewriting.put(result, end, (last,), "_output"))
    rewriting.result = len(rewriting.nodes) - 1


def _ends_with_weights(nodes: list[Node], last: int) -> bool:
    """Whether some layer with weights follows the last neurons, which the logits need for units."""
    waiting, seen = [last], set()
    while waiting:
        i = waiting.pop()
        if i in seen or nodes[i].operator.learns or not nodes[i].inputs:
            continue
        if nodes[i].operator.fires:
            return False
        seen.add(i)
        waiting += nodes[i].inputs
    return True


def _check_shapes(rewriting: Rewriting, call: fx.Node) -> None:
    """Refuse what is done to a shape that no image has, such as within a channel shuffle."""
    for source in call.all_input_nodes:
        if source in rewriting.waiting and CALLS.get(call.target) not in SHAPES:
            raise _no_shape(rewriting, source)


def _no_shape(rewriting: Rewriting, source: fx.Node) -> ConversionError:
    made, of = (n.meta["value"] for n in (source, rewriting.waiting[source]))
    shape = shape_of(made.shape) if isinstance(made, Tensor) else "parts"
    return ConversionError(
        f"{where(source)} makes {shape} of {shape_of(of.shape)}; allowed: all but the "
        "batch flat, as torch.flatten(x, 1), or channels in another order"
    )


def _alive(rewriting: Rewriting) -> dict[int, int]:
    """The nodes that the result depends on → their new places: some relus moved behind poolings."""
    assert rewriting.result is not None
    alive = {0, rewriting.result}
    for i in reversed(range(len(rewriting.nodes))):
        if i in alive:
            alive.update(rewriting.nodes[i].inputs)
    return {i: k for k, i in enumerate(sorted(alive))}


def _allowed() -> str:
    """What there is a rule for, in a message's words."""
    return f"{', '.join(kind.__name__ for kind in kinds())}, Identity and sums of branches"


def _rewrite_call(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """One traced operation as a node, or the node that it passes on."""
    if call.op == "call_module":
        return _rewrite_module(rewriting, call)
    if call.target in CALLS:
        rule = CALLS[call.target]
        given = [n for n in call.all_input_nodes if n.op == "get_attr" or n not in rewriting.index]
        if given and rule not in TAKE_PARAMETERS:
            name = place(given[0])
            what = "constant tensor" if name.startswith("_tensor_constant") else "parameter"
            raise ConversionError(
                f"{where(call)}: {name} is a {what} used outside a layer; allowed: numbers, "
                f"{_allowed()}"
            )
        return rule(rewriting, call)
    name = getattr(call.target, "__name__", str(call.target))
    raise ConversionError(
        f"{where(call)} calls {name}, which has no spiking form; "
        f"{CALL_REMEDIES.get(call.target, f'allowed: {_allowed()}')}"
    )


# -- modules ---------------------------------------------------------------------------------------


def _refused_modules(net: nn.Module) -> list[str]:
    """What can be said of a network that cannot be traced: its layers of torch without a rule."""
    problems = []
    for name, module in net.named_modules():
        kind = kind_of(module)
        of_torch = kind.__module__.partition(".")[0] == "torch"
        if name and of_torch and not isinstance(module, CONTAINERS):
            try:
                if kind not in MODULES:
                    _operator_of(name, module)
            except ConversionError as error:
                problems.append(str(error))
    return problems


def _rewrite_module(rewriting: Rewriting, call: fx.Node) -> Node | int:
    name = place(call)
    module = rewriting.net.get_submodule(name)
    if kind_of(module) in MODULES:
        return MODULES[kind_of(module)](rewriting, call)
    operator = _operator_of(name, module)
    if operator is None:
        return rewriting.sources(call)[0]
    return Node(name, operator, rewriting.sources(call), path=name)


def _operator_of(name: str, module: nn.Module) -> Operator | None:
    """What a module becomes; None where it does nothing."""
    kind = kind_of(module)
    if kind is nn.Identity:
        return None
    operator = operator_for(kind)
    if operator is not None:
        check_module(name, module, operator)
        return operator
    remedy = next(
        (r for t, r in REMEDIES.items() if isinstance(module, t)), f"allowed: {_allowed()}"
    )
    if kind.__module__.startswith("torch.ao."):
        remedy = "convert the network as it was before quantisation"
    of_torch = kind.__module__.startswith("torch.nn.")
    named = kind.__name__ if of_torch else f"{kind.__module__}.{kind.__name__}"
    raise ConversionError(f"layer {name} is a {named}, which has no spiking form; {remedy}")


def check_module(name: str, module: nn.Module, operator: Operator) -> None:
    """Refuse a module that is not the operator's, or holds what a spike cannot carry.

    Raises:
        ConversionError: names the module, and what is allowed.
    """
    if kind_of(module) not in operator.kinds:
        allowed = ", ".join(kind.__name__ for kind in operator.kinds)
        raise ConversionError(
            f"layer {name} is a {type(module).__name__}; allowed in its place: {allowed}"
        )
    if getattr(module, "padding_mode", "zeros") != "zeros":
        raise ConversionError(
            f"layer {name} pads with {module.padding_mode!r}; allowed behind a conversion: "
            "padding_mode='zeros'"
        )
    if isinstance(getattr(module, "padding", 0), str):
        raise ConversionError(
            f"layer {name} has padding={module.padding!r}; allowed behind a conversion: a number "
            "of pixels"
        )
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1):
        raise ConversionError(f"layer {name} flattens only some dimensions; allowed: nn.Flatten()")


MODULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.Hardtanh, Clip, QCFS), neurons.relu),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm), layers.batch_norm),
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax), neurons.softmax),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d), neurons.max_pool),
    **dict.fromkeys(
        (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear), products.weights
    ),
    **dict.fromkeys((nn.Dropout1d, nn.Dropout2d), layers.channel_dropout),
    **dict.fromkeys(
        (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), resizing.upsample
    ),
    **dict.fromkeys((nn.PixelShuffle, nn.PixelUnshuffle), resizing.shuffle),
    **dict.fromkeys(shapes.PADS, shapes.pad_layer),
}
CALLS: dict[Any, Rule] = {
    **dict.fromkeys((python.add, python.iadd, torch.add, "add", "add_"), arithmetic.add),
    **dict.fromkeys((python.sub, python.isub, torch.sub, "sub", "sub_"), arithmetic.subtract),
    **dict.fromkeys(
        (
            *(python.mul, python.imul, torch.mul, "mul", "mul_"),
            *(python.truediv, python.itruediv, torch.div, "div", "div_"),
        ),
        arithmetic.multiply,
    ),
    **dict.fromkeys(
        (
            *(torch.flatten, "flatten", "unflatten", "view", "reshape", torch.reshape),
            *(torch.squeeze, "squeeze", "unsqueeze", "contiguous", "clone", "detach"),
            *(torch.transpose, "transpose", "swapaxes", torch.permute, "permute"),
            *(torch.chunk, "chunk", torch.split, "split"),
        ),
        shapes.rearrange,
    ),
    **dict.fromkeys(neurons.RELUS, neurons.relu),
    **dict.fromkeys(
        (torch.clamp, "clamp", "clamp_", "clamp_min", F.hardtanh, F.hardtanh_, F.relu6),
        neurons.clamp,
    ),
    **dict.fromkeys(
        (F.softmax, F.log_softmax, torch.softmax, "softmax", "log_softmax"), neurons.softmax
    ),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), layers.concatenate),
    **dict.fromkeys((torch.mean, "mean"), layers.mean),
    **dict.fromkeys(
        (F.max_pool2d, torch.max_pool2d, F.max_pool1d, torch.max_pool1d), neurons.max_pool
    ),
    **dict.fromkeys((F.pixel_shuffle, F.pixel_unshuffle), resizing.shuffle),
    F.interpolate: resizing.interpolate,
    python.getitem: shapes.pick,
    **dict.fromkeys((F.conv2d, torch.conv2d, F.conv1d, torch.conv1d), functional.convolve),
    **dict.fromkeys(
        (
            *(F.conv_transpose2d, torch.conv_transpose2d),
            *(F.conv_transpose1d, torch.conv_transpose1d),
        ),
        functional.convolve_transposed,
    ),
    F.linear: functional.connect,
    **dict.fromkeys((F.batch_norm, torch.batch_norm), functional.normalise),
    F.pad: shapes.pad,
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d), layers.dropout),
    **dict.fromkeys((F.avg_pool2d, F.avg_pool1d), layers.average_pool),
    **dict.fromkeys((F.adaptive_avg_pool2d, F.adaptive_avg_pool1d), layers.adaptive_average),
}
SHAPES = (shapes.rearrange, shapes.pick)
TAKE_PARAMETERS = (
    arithmetic.add,
    arithmetic.subtract,
    functional.convolve,
    functional.convolve_transposed,
    functional.connect,
    functional.normalise,
)
