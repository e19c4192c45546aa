"""Upsampling and pixel shuffles, in every spelling."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from ..graph import Graph, Node
from ..operators.table import kind_of, operator_for
from ..traced import ConversionError, Rewriting, settings_of, where
from ..tracing import place
from ..units import origins
from .arithmetic import unit_one

MODES = ("nearest", "nearest-exact", "linear", "bilinear", "area")  # of means, never negative


def upsample(rewriting: Rewriting, call: fx.Node) -> Node:
    """nn.Upsample; means of pixels only."""
    name = place(call)
    module: Any = rewriting.net.get_submodule(name)
    _check_mode(call, str(module.mode))
    operator = operator_for(kind_of(module))
    assert operator is not None
    return Node(name, operator, (rewriting.source(call),), path=name)


def interpolate(rewriting: Rewriting, call: fx.Node) -> Node:
    """F.interpolate."""
    resizing = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
    settings = settings_of(call, *resizing, "antialias")
    if settings.pop("antialias", False):
        raise ConversionError(f"{where(call)} has antialias=True; allowed: without it")
    _check_mode(call, str(settings.get("mode", "nearest")))
    if isinstance(settings.get("size"), Sequence):
        settings["size"] = tuple(int(n) for n in settings["size"])
    return rewriting.put(call, nn.Upsample(**settings), (rewriting.source(call),))


def _check_mode(call: fx.Node, mode: str) -> None:
    if mode not in MODES:
        raise ConversionError(
            f"{where(call)} interpolates with mode={mode!r}; allowed: {', '.join(MODES)}"
        )


def shuffle(rewriting: Rewriting, call: fx.Node) -> Node:
    """nn.PixelShuffle, nn.PixelUnshuffle and their functions.

    Where channels stand for different things, those that become one are brought to the same first.
    """
    if call.op == "call_module":
        module: Any = rewriting.net.get_submodule(place(call))
    else:
        (factor,) = [a for a in (*call.args, *call.kwargs.values()) if isinstance(a, int)]
        kind = nn.PixelUnshuffle if call.target is F.pixel_unshuffle else nn.PixelShuffle
        module = kind(factor)
    source = rewriting.source(call)
    if isinstance(module, nn.PixelShuffle):
        of = origins(Graph(rewriting.nodes), rewriting.net, source)
        if len(of) > 1 or rewriting.limited:
            source = unit_one(rewriting, call, source, call.all_input_nodes[0].meta["value"])
    if call.op != "call_module":
        return rewriting.put(call, module, (source,))
    operator = operator_for(kind_of(module))
    assert operator is not None
    return Node(place(call), operator, (source,), path=place(call))
