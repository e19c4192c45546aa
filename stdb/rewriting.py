"""What becomes of each operation of a traced ANN: an operator of the graph, nothing, or a refusal.

Modules are looked up in the table of operators, calls in ``CALLS``; what neither has is refused
with the layer's name and the remedy of ``REMEDIES`` or ``CALL_REMEDIES``.
"""

import copy
import operator as python
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .graph import INPUT, Graph, Node
from .operators import Operator, pair
from .operators.boundary import Input
from .operators.cutting import Pad, Slice
from .operators.diagonal import Diagonal
from .operators.joining import Concat, Concatenation
from .operators.shaping import Dropout, Flatten, Sum
from .operators.table import kind_of, kinds, operator_for
from .traced import ConversionError, Rewriting, shape_of, where
from .tracing import BATCH, TracingError, place, trace
from .units import ONE, origins
from .weights import fold

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
    nn.Dropout2d: "use nn.Dropout",
}
_FLATTEN = "allowed: all but the batch flat, as torch.flatten(x, 1)"
CALL_REMEDIES: dict[Any, str] = {}


Rule = Callable[[Rewriting, fx.Node], Node | int]


def rewrite(net: nn.Module, example: Tensor | None = None) -> tuple[list[Node], int | None]:
    """The nodes of a module tree, shapes and identities left out, and which of them is returned.

    Raises:
        ConversionError: names every operation that has no spiking form, and the remedy.
    """
    try:
        calls = trace(net, example)
    except TracingError as error:
        Rewriting(net, (), problems=[*_refused_modules(net), str(error)]).refuse()
        raise
    rewriting = Rewriting(net, calls)
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
                rewriting.add(call, _rewrite_call(rewriting, call))
            except ConversionError as error:
                if str(error) not in rewriting.problems:
                    rewriting.problems.append(str(error))
                rewriting.add(call, next(iter(rewriting.sources(call)), 0))
    rewriting.refuse()
    return _alive(rewriting.nodes, None if result is None else rewriting.index.get(result))


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
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros":
            raise ConversionError(
                f"layer {name} pads with {module.padding_mode!r}; allowed: padding_mode='zeros'"
            )
        if isinstance(module.padding, str):
            raise ConversionError(
                f"layer {name} has padding={module.padding!r}; give it as a number of pixels"
            )
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1):
        raise ConversionError(f"layer {name} flattens only some dimensions; allowed: nn.Flatten()")


# -- calls -----------------------------------------------------------------------------------------


def _add(rewriting: Rewriting, call: fx.Node) -> Node:
    """A sum of branches."""
    sources = rewriting.sources(call)
    if call.kwargs.get("alpha", 1) != 1:
        raise ConversionError(f"{where(call)} adds with alpha; allowed: a plain sum of branches")
    if len(sources) != 2:
        raise ConversionError(f"{where(call)} adds a constant; allowed: a bias of a layer")
    if rewriting.has_units:
        sources = tuple(_in_unit_one(rewriting, call, k, j) for k, j in enumerate(sources))
    return Node(call.name, Sum(), sources)


def _in_unit_one(rewriting: Rewriting, call: fx.Node, position: int, source: int) -> int:
    """A branch of spikes, such as an identity shortcut, behind a diagonal that holds their unit."""
    graph = Graph(rewriting.nodes)
    if bool((origins(graph, rewriting.net, source) == ONE).all()):
        return source
    value = call.all_input_nodes[min(position, len(call.all_input_nodes) - 1)].meta["value"]
    like = next(p for p in rewriting.net.parameters() if p.is_floating_point())
    diagonal = Diagonal(value.shape[1], bias=False).to(like.device, like.dtype)
    rewriting.nodes.append(rewriting.put(call, diagonal, (source,), "_unit"))
    return len(rewriting.nodes) - 1


def _reshape(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """Another shape, in any spelling: nothing where it is the same, or all but the batch flat."""
    source = call.all_input_nodes[0]
    before, after = source.meta["value"].shape, call.meta["value"].shape
    if before == after:
        return rewriting.index[source]
    if after == (BATCH, before[1:].numel()):
        return Node(call.name, Flatten(), (rewriting.index[source],))
    raise ConversionError(
        f"{where(call)} makes {shape_of(after)} of {shape_of(before)}; {_FLATTEN}"
    )


def _concatenate(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """torch.cat(branches, 1)."""
    branches = call.args[0] if call.args else call.kwargs["tensors"]
    dim = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else 0)
    values = [b.meta["value"] for b in branches]  # type: ignore[union-attr]
    if not isinstance(dim, int) or dim % values[0].dim() != 1:
        raise ConversionError(f"{where(call)} joins along dimension {dim}; allowed: the channels")
    sources = tuple(rewriting.index[b] for b in branches)  # type: ignore[union-attr,index]
    return rewriting.put(call, Concatenation([v.shape[1] for v in values]), sources)


# -- neurons ---------------------------------------------------------------------------------------


def _relu(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """A relu: a layer of neurons for each call; nothing on what cannot be negative."""
    source = rewriting.source(call)
    if _is_positive(rewriting, source):
        return source
    if call.op == "call_module":
        name = place(call)
        first = next(c for c in rewriting.calls if c.op == "call_module" and place(c) == name)
        if first is call:
            return Node(name, _neuron(), (source,), path=name)
    return rewriting.put(call, nn.ReLU(), (source,))


def _neuron() -> Operator:
    operator = operator_for(nn.ReLU)
    assert operator is not None
    return operator


def _is_positive(rewriting: Rewriting, i: int) -> bool:
    """Whether a value is never negative: spikes, and their averages, side by side or summed."""
    node = rewriting.nodes[i]
    if node.operator.fires:
        return True
    keeps = not node.operator.learns and bool(node.inputs)
    return keeps and all(_is_positive(rewriting, j) for j in node.inputs)


def _max_pool(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """Max-pooling: of the currents of the relus below it, whose neurons come after it.

    relu(max x) is max relu(x), so it moves up through concat, max-pooling and dropout to every
    relu; on another value that cannot be negative it gets neurons of its own.
    """
    module = _pooling(rewriting, call)
    source = rewriting.source(call)
    readers = rewriting.readers(call)
    if readers and all(_is_relu(rewriting, reader) for reader in readers):
        return rewriting.put(call, module, (source,))
    if not _is_positive(rewriting, source):
        raise ConversionError(
            f"{where(call)} takes the maximum of what can be negative; allowed: of a ReLU's "
            "values, or with a ReLU behind it"
        )
    return _pooled(rewriting, call, module, source)


def _pooled(rewriting: Rewriting, call: fx.Node, module: nn.MaxPool2d, source: int) -> int:
    """The node of max-pooled spikes: neurons behind the pooling of a source's currents."""
    node = rewriting.nodes[source]

    def append(new: Node) -> int:
        rewriting.nodes.append(new)
        return len(rewriting.nodes) - 1

    own, free = copy.deepcopy(module), f"{call.name}_{len(rewriting.nodes)}"
    if node.operator.fires:
        current = node.inputs[0]
    elif isinstance(node.operator, Dropout):
        below = _pooled(rewriting, call, module, node.inputs[0])
        return append(
            Node(f"{call.name}_{len(rewriting.nodes)}", node.operator, (below,), node.path)
        )
    elif isinstance(node.operator, Concat):
        below_all = tuple(_pooled(rewriting, call, module, j) for j in node.inputs)
        return append(
            Node(f"{call.name}_{len(rewriting.nodes)}", node.operator, below_all, node.path)
        )
    else:
        current = _in_unit_one(rewriting, call, 0, source) if rewriting.has_units else source
    pool = append(rewriting.put(call, own, (current,)))
    return append(rewriting.put(call, nn.ReLU(), (pool,), "_relu"))


def _pooling(rewriting: Rewriting, call: fx.Node) -> nn.MaxPool2d:
    """The pooling of a module, or of F.max_pool2d."""
    if call.op == "call_module":
        module = rewriting.net.get_submodule(place(call))
        assert isinstance(module, nn.MaxPool2d)
        return nn.MaxPool2d(
            module.kernel_size, module.stride, module.padding, module.dilation,
            ceil_mode=module.ceil_mode,
        )  # fmt: skip
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    settings: Any = dict(zip(names, call.args[1:], strict=False)) | dict(call.kwargs)
    for name in ("input", "return_indices"):
        settings.pop(name, None)
    return nn.MaxPool2d(**settings)


def _is_relu(rewriting: Rewriting, call: fx.Node) -> bool:
    if call.op == "call_module":
        return kind_of(rewriting.net.get_submodule(place(call))) is nn.ReLU
    return CALLS.get(call.target) is _relu


def _softmax(rewriting: Rewriting, call: fx.Node) -> int:
    """Left out at the end: what it is of is what is compared."""
    if any(reader.op != "output" for reader in rewriting.readers(call)):
        raise ConversionError(f"{where(call)} is a softmax inside; {_OUTPUT}")
    return rewriting.source(call)


# -- layers ----------------------------------------------------------------------------------------


def _batch_norm(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """A batch norm: folded into the layer below it, or a scale and shift in its place.

    From the running statistics: g = γ/√(σ² + ε), W' = g·W, b' = β + g·(b − μ).
    """
    name = place(call)
    norm: Any = rewriting.net.get_submodule(name)
    if norm.running_mean is None:
        raise ConversionError(
            f"layer {name} keeps no running statistics; train it with track_running_stats=True"
        )
    with torch.no_grad():
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = -scale * norm.running_mean.double()
        if norm.bias is not None:
            shift = shift + norm.bias.double()
    below = call.all_input_nodes[0]
    if below.op == "call_module" and rewriting.readers(below) == [call]:
        module = rewriting.net.get_submodule(place(below))
        operator = operator_for(kind_of(module))
        if operator is not None and operator.learns and rewriting.called(place(below)) == 1:
            fold(module, scale, shift)
            return rewriting.index[below]
    like = norm.running_mean
    diagonal = Diagonal(len(scale)).to(like.device, like.dtype)
    with torch.no_grad():
        diagonal.weight.copy_(scale)
        diagonal.bias.copy_(shift)  # type: ignore[union-attr]
    rewriting.net.set_submodule(name, diagonal)
    operator = operator_for(Diagonal)
    assert operator is not None
    return Node(name, operator, (rewriting.source(call),), path=name)


def _dropout(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """F.dropout, with the rate that it has in training."""
    rate = call.kwargs.get("p", call.args[1] if len(call.args) > 1 else 0.5)
    return rewriting.put(call, nn.Dropout(float(rate)), (rewriting.source(call),))  # type: ignore[arg-type]


def _average_pool(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """F.avg_pool2d."""
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
    settings: Any = dict(zip(names, call.args[1:], strict=False)) | dict(call.kwargs)
    settings.pop("input", None)
    return rewriting.put(call, nn.AvgPool2d(**settings), (rewriting.source(call),))


def _mean(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """x.mean((2, 3)): a global average, and flat where the dimensions go."""
    before, after = call.all_input_nodes[0].meta["value"].shape, call.meta["value"].shape
    if len(before) != 4 or after[:2] != before[:2] or after[2:].numel() != 1:
        raise ConversionError(
            f"{where(call)} makes {shape_of(after)} of {shape_of(before)}; allowed: the mean of "
            "height and width"
        )
    node = rewriting.put(call, nn.AdaptiveAvgPool2d(1), (rewriting.source(call),))
    if len(after) == 4:
        return node
    rewriting.nodes.append(node)
    return Node(f"{node.name}_flat", Flatten(), (len(rewriting.nodes) - 1,))


def _adaptive_average(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """F.adaptive_avg_pool2d."""
    size: Any = call.kwargs.get("output_size", call.args[1] if len(call.args) > 1 else None)
    return rewriting.put(call, nn.AdaptiveAvgPool2d(pair(size)), (rewriting.source(call),))


def _slice(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """x[:, a:b, ::2, ::2]: a part of the channels, of the rows, of the columns."""
    index: Any = call.args[1]
    index = index if isinstance(index, tuple) else (index,)
    value = call.all_input_nodes[0].meta["value"]
    if Ellipsis in index:
        k = index.index(Ellipsis)
        missing = value.dim() - len(index) + 1
        index = (*index[:k], *[slice(None)] * missing, *index[k + 1 :])
    index = (*index, *[slice(None)] * (value.dim() - len(index)))
    if not all(isinstance(part, slice) for part in index) or index[0] != slice(None):
        raise ConversionError(f"{where(call)} picks {index}; allowed: slices behind the batch")
    parts = [(part.start, part.stop, part.step) for part in index[1:]]
    return rewriting.put(call, Slice(parts), (rewriting.source(call),))


def _pad(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """F.pad with zeros."""
    names = ("input", "pad", "mode", "value")
    settings: Any = dict(zip(names, call.args, strict=False)) | dict(call.kwargs)
    if settings.get("mode", "constant") != "constant" or settings.get("value"):
        raise ConversionError(f"{where(call)} pads with other than zeros; allowed: zeros")
    widths = settings["pad"]
    if len(widths) > 2 * (call.meta["value"].dim() - 1):
        raise ConversionError(f"{where(call)} pads the batch; allowed: channels, rows, columns")
    return rewriting.put(call, Pad(widths), (rewriting.source(call),))


MODULES: dict[type[nn.Module], Rule] = {
    nn.ReLU: _relu,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.SyncBatchNorm: _batch_norm,
    nn.MaxPool2d: _max_pool,
    nn.Softmax: _softmax,
    nn.LogSoftmax: _softmax,
}
CALLS: dict[Any, Rule] = {
    **dict.fromkeys((python.add, python.iadd, torch.add, "add", "add_"), _add),
    **dict.fromkeys((torch.flatten, "flatten", "view", "reshape", torch.reshape), _reshape),
    **dict.fromkeys((torch.squeeze, "squeeze", "contiguous", "clone"), _reshape),
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), _relu),
    **dict.fromkeys((F.softmax, F.log_softmax, torch.softmax, "softmax", "log_softmax"), _softmax),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _concatenate),
    **dict.fromkeys((torch.mean, "mean"), _mean),
    python.getitem: _slice,
    F.pad: _pad,
    F.max_pool2d: _max_pool,
    torch.max_pool2d: _max_pool,
    F.dropout: _dropout,
    F.avg_pool2d: _average_pool,
    F.adaptive_avg_pool2d: _adaptive_average,
}
