"""Shapes: flatten in every spelling, channels in another order, parts and padding."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from ..graph import Graph, Node
from ..operators.cutting import Channels, Pad, Padding, Slice
from ..operators.shaping import Flatten
from ..operators.table import kind_of
from ..traced import ConversionError, Rewriting, settings_of, shape_of, where
from ..tracing import BATCH, place
from ..units import origins
from .arithmetic import unit_one


def rearrange(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """Another shape or order: nothing, all but the batch flat, or channels in another order.

    What is none of them yet, such as the view before a shuffle's transpose, waits for what follows.
    """
    source, value = call.all_input_nodes[0], call.meta["value"]
    base = rewriting.waiting.get(source, source)
    given = base.meta["value"]
    images = isinstance(given, Tensor) and given.dim() > 1 and len(given) == BATCH
    if not images:  # of what was refused
        return rewriting.index[base]
    places = _run(rewriting, call, base)
    if isinstance(value, Tensor) and isinstance(places, Tensor):
        if places.dim() == value.dim() - 1:  # squeeze() took the batch, which is one image here
            places = places[None]
        before = base.meta["value"].shape[1:]
        whole = torch.arange(before.numel()).view(1, *before)
        if places.shape == whole.shape and bool((places == whole).all()):
            return rewriting.index[base]
        flat = whole.flatten(1)
        if places.shape == flat.shape and bool((places == flat).all()):
            return Node(call.name, Flatten(), (rewriting.index[base],))
        behind = places.dim() > 2 and places.shape[2:] == whole.shape[2:]
        if behind and len(value) == BATCH:
            pixels = before[1:].numel()
            order = places.flatten(2)[0, :, 0] // pixels
            if bool((places == whole[:, order]).all()):
                return rewriting.put(call, Channels(order.tolist()), (rewriting.index[base],))
    rewriting.waiting[call], rewriting.places[call] = base, places
    return rewriting.index[base]


def _run(rewriting: Rewriting, call: fx.Node, base: fx.Node) -> Any:
    """What an operation, and those before it back to ``base``, does to the places of one image."""

    def here(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            if argument in rewriting.waiting:
                return rewriting.places[argument]
            shape = base.meta["value"].shape[1:]
            return torch.arange(shape.numel()).view(1, *shape)
        if isinstance(argument, int) and not isinstance(argument, bool) and argument % BATCH == 0:
            return argument // BATCH
        return argument

    args, kwargs = map_aggregate((call.args, dict(call.kwargs)), here)
    try:
        if call.op == "call_method":
            return getattr(args[0], str(call.target))(*args[1:], **kwargs)
        if call.op == "call_module":
            return rewriting.net.get_submodule(str(call.target).removeprefix("net."))(*args)
        return call.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, IndexError, TypeError) as error:
        made = f"{shape_of(base.meta['value'].shape)}"
        raise ConversionError(
            f"{where(call)} rearranges {made} across the batch; allowed: all but the batch flat, "
            "as torch.flatten(x, 1), or channels in another order"
        ) from error


def pick(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """x[:, a:b, ::2, ::2]: a part of the channels, of the rows, of the columns."""
    if not isinstance(call.all_input_nodes[0].meta["value"], Tensor):  # of what chunk gave
        return rearrange(rewriting, call)
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
    return rewriting.put(call, Slice(parts), (_channels_known(rewriting, call),))


def _channels_known(rewriting: Rewriting, call: fx.Node) -> int:
    """The source; where it is flat, without units of channels, which it has no more."""
    source, value = rewriting.source(call), call.all_input_nodes[0].meta["value"]
    several = len(origins(Graph(rewriting.nodes), rewriting.net, source)) > 1
    if value.dim() == 2 and (several or rewriting.limited):
        return unit_one(rewriting, call, source, value)
    return source


def pad(rewriting: Rewriting, call: fx.Node) -> Node | int:
    """F.pad with zeros, or with copies: reflect, replicate, circular."""
    settings = settings_of(call, "pad", "mode", "value")
    if settings.get("value"):
        raise ConversionError(
            f"{where(call)} pads with {settings['value']}; allowed: zeros, or copies (reflect, "
            "replicate, circular)"
        )
    widths = settings["pad"]
    if len(widths) > 2 * (call.meta["value"].dim() - 1):
        raise ConversionError(f"{where(call)} pads the batch; allowed: channels, rows, columns")
    made = Pad(widths, settings.get("mode", "constant"))
    return rewriting.put(call, made, (_channels_known(rewriting, call),))


PADS: dict[type[nn.Module], str] = {
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ConstantPad1d, nn.ConstantPad2d), "constant"),
    **dict.fromkeys((nn.ReflectionPad1d, nn.ReflectionPad2d), "reflect"),
    **dict.fromkeys((nn.ReplicationPad1d, nn.ReplicationPad2d), "replicate"),
    **dict.fromkeys((nn.CircularPad1d, nn.CircularPad2d), "circular"),
}


def pad_layer(rewriting: Rewriting, call: fx.Node) -> Node:
    """nn.ZeroPad2d and its kind."""
    name = place(call)
    module: Any = rewriting.net.get_submodule(name)
    if getattr(module, "value", 0):
        raise ConversionError(f"layer {name} pads with {module.value}; allowed: 0")
    rewriting.net.set_submodule(name, Pad(module.padding, PADS[kind_of(module)]))
    return Node(name, Padding(), (rewriting.source(call),), path=name)
