"""What becomes of each operation of a traced ANN: an operator of the graph, nothing, or a refusal.

Modules are looked up in the table of operators, calls in ``CALLS``; what neither has is refused
with the layer's name and the remedy of ``REMEDIES`` or ``CALL_REMEDIES``.
"""

import operator as python
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .graph import INPUT, Node
from .operators import Operator
from .operators.boundary import Input
from .operators.diagonal import Diagonal
from .operators.table import kind_of, kinds, operator_for
from .rules import arithmetic, layers, neurons, products, resizing, shapes
from .traced import ConversionError, Rewriting, shape_of, where
from .tracing import TracingError, place, trace

Rule = Callable[[Rewriting, fx.Node], Node | int]

_NORM = "train without it (stdb.build gives networks that do), or fold it into the weights"
_POOL = "use nn.AvgPool2d and train again"
_NEURON = "use nn.ReLU: the firing rate of an IF neuron approximates that one"
_OUTPUT = "leave it out: the membrane potential of the output layer is the logit"
REMEDIES: dict[type[nn.Module], str] = {
    nn.modules.batchnorm._BatchNorm: _NORM,
    nn.LayerNorm: _NORM,
    nn.GroupNorm: _NORM,
    nn.AdaptiveAvgPool2d: "use nn.AvgPool2d with the kernel size that your image size gives",
    nn.AdaptiveMaxPool2d: _POOL,
    **dict.fromkeys(
        (
            nn.LeakyReLU,
            nn.PReLU,
            nn.RReLU,
            nn.ELU,
            nn.CELU,
            nn.SELU,
            nn.GELU,
            nn.SiLU,
            nn.Mish,
            nn.Hardswish,
            nn.Hardsigmoid,
            nn.Hardtanh,
            nn.ReLU6,
            nn.Softplus,
            nn.Softsign,
            nn.Softshrink,
            nn.Hardshrink,
            nn.Tanhshrink,
            nn.Threshold,
            nn.LogSigmoid,
            nn.Sigmoid,
            nn.Tanh,
        ),
        _NEURON,
    ),
    nn.Softmax: _OUTPUT,
    nn.LogSoftmax: _OUTPUT,
    nn.Dropout3d: "use nn.Dropout2d, which drops channels of an image",
}
_FLATTEN = "allowed: all but the batch flat, as torch.flatten(x, 1)"
CALL_REMEDIES: dict[Any, str] = {}


def rewrite(
    net: nn.Module, example: Tensor | None = None, *, limited: bool = False
) -> tuple[list[Node], int | None]:
    """The nodes of a module tree, shapes and identities left out, and which of them is returned.

    Args:
        net: the tree; modules may be put into it.
        example: a batch of images, of which the shape counts.
        limited: whether the input comes in units of an encoder's limits.

    Raises:
        ConversionError: names every operation that has no spiking form, and the remedy.
    """
    try:
        calls = trace(net, example)
    except TracingError as error:
        Rewriting(net, (), problems=[*_refused_modules(net), str(error)]).refuse()
        raise
    rewriting = Rewriting(net, calls, limited=limited)
    result: fx.Node | None = None
    for call in calls:
        if call.op == "placeholder":
            rewriting.add(call, Node(INPUT, Input()))
        elif call.op == "output":
            if not isinstance(call.args[0], fx.Node):
                rewriting.problems.append("the network returns several values; allowed: the logits")
            else:
                result = call.args[0]
        else:
            try:
                _check_shapes(rewriting, call)
                rewriting.add(call, _rewrite_call(rewriting, call))
            except ConversionError as error:
                if str(error) not in rewriting.problems:
                    rewriting.problems.append(str(error))
                rewriting.add(call, next(iter(rewriting.sources(call)), 0))
    rewriting.refuse()
    nodes, last = _alive(rewriting.nodes, None if result is None else rewriting.index.get(result))
    if last is not None and result is not None and not _ends_with_weights(nodes, last):
        width = result.meta["value"].shape[1]
        rewriting.nodes = nodes
        end = arithmetic.like_weights(rewriting, Diagonal(width, bias=False))
        nodes.append(rewriting.put(result, end, (last,), "_output"))
        last = len(nodes) - 1
    return nodes, last


def _ends_with_weights(nodes: list[Node], last: int) -> bool:
    """Whether some layer with weights follows the last neurons, which the logits need for units."""
    node = nodes[last]
    if node.operator.learns or not node.inputs:
        return True
    if node.operator.fires:
        return False
    return all(_ends_with_weights(nodes, j) for j in node.inputs)


def _check_shapes(rewriting: Rewriting, call: fx.Node) -> None:
    """Refuse what is done to a shape that no image has, such as within a channel shuffle."""
    for source in call.all_input_nodes:
        if source in rewriting.waiting and CALLS.get(call.target) not in SHAPES:
            made, of = (n.meta["value"] for n in (source, rewriting.waiting[source]))
            shape = shape_of(made.shape) if isinstance(made, Tensor) else "parts"
            raise ConversionError(
                f"{where(source)} makes {shape} of {shape_of(of.shape)}; allowed: all but the "
                "batch flat, as torch.flatten(x, 1), or channels in another order"
            )


def _alive(nodes: list[Node], result: int | None) -> tuple[list[Node], int | None]:
    """The nodes that the result depends on: a relu that moved behind a pooling is no more."""
    if result is None:
        return nodes, None
    alive = {0, result}
    for i in reversed(range(len(nodes))):
        if i in alive:
            alive.update(nodes[i].inputs)
    kept = sorted(alive)
    place_of = {i: k for k, i in enumerate(kept)}
    moved = [replace(nodes[i], inputs=tuple(place_of[j] for j in nodes[i].inputs)) for i in kept]
    return moved, place_of[result]


def _allowed() -> str:
    """What there is a rule for, in a message's words."""
    return f"{', '.join(kind.__name__ for kind in kinds())}, Identity and sums of branches"


def _rewrite_call(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """One traced operation as a node, or the node that it passes on."""
    if call.op == "call_module":
        return _rewrite_module(rewriting, call)
    if call.op == "get_attr":
        raise ConversionError(
            f"{place(call)} is a parameter used outside a layer; allowed: {_allowed()}"
        )
    if call.target in CALLS:
        return CALLS[call.target](rewriting, call)
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
        if of_torch and not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
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
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.Hardtanh), neurons.relu),
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
    F.pad: shapes.pad,
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d), layers.dropout),
    **dict.fromkeys((F.avg_pool2d, F.avg_pool1d), layers.average_pool),
    **dict.fromkeys((F.adaptive_avg_pool2d, F.adaptive_avg_pool1d), layers.adaptive_average),
}
SHAPES = (shapes.rearrange, shapes.pick)
