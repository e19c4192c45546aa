"""Tracing by torch.export, for what torch.fx cannot follow: as the same list of torch's operations.

torch.export runs the forward method on tensors without memory and notes what is computed, so that
assertions on types, data classes and other Python that a traced value is no part of are no
obstacle. Its operations are ATen's; each is put in the words that :mod:`stdb.rewriting` knows.
"""

import logging
import operator as python
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .tracing import Entry, TracingError, alive, first_line, images_for, without_memory

ATEN = torch.ops.aten
SAME: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((ATEN.conv2d.default, ATEN.conv2d.padding), F.conv2d),
    **dict.fromkeys((ATEN.conv1d.default, ATEN.conv1d.padding), F.conv1d),
    ATEN.conv_transpose2d.input: F.conv_transpose2d,
    ATEN.conv_transpose1d.default: F.conv_transpose1d,
    ATEN.linear.default: F.linear,
    ATEN.batch_norm.default: torch.batch_norm,
    ATEN.relu.default: F.relu,
    ATEN.hardtanh.default: F.hardtanh,
    ATEN.relu6.default: F.relu6,
    ATEN.clamp.default: torch.clamp,
    ATEN.clamp_min.default: torch.clamp,
    ATEN.add.Tensor: torch.add,
    ATEN.sub.Tensor: torch.sub,
    ATEN.mul.Tensor: torch.mul,
    ATEN.div.Tensor: torch.div,
    ATEN.cat.default: torch.cat,
    ATEN.mean.dim: torch.mean,
    ATEN.max_pool2d.default: F.max_pool2d,
    ATEN.max_pool1d.default: F.max_pool1d,
    ATEN.avg_pool2d.default: F.avg_pool2d,
    ATEN.avg_pool1d.default: F.avg_pool1d,
    ATEN.adaptive_avg_pool2d.default: F.adaptive_avg_pool2d,
    ATEN.adaptive_avg_pool1d.default: F.adaptive_avg_pool1d,
    ATEN.pixel_shuffle.default: F.pixel_shuffle,
    ATEN.pixel_unshuffle.default: F.pixel_unshuffle,
    ATEN.dropout.default: F.dropout,
    ATEN.constant_pad_nd.default: F.pad,
    ATEN.pad.default: F.pad,
    ATEN.softmax.int: torch.softmax,
    ATEN._softmax.default: torch.softmax,
    ATEN.log_softmax.int: F.log_softmax,
    ATEN._log_softmax.default: F.log_softmax,
    ATEN.flatten.using_ints: torch.flatten,
    ATEN.permute.default: torch.permute,
    ATEN.transpose.int: torch.transpose,
    ATEN.squeeze.dims: torch.squeeze,
    ATEN.squeeze.dim: torch.squeeze,
    ATEN.split.Tensor: torch.split,
    ATEN.split_with_sizes.default: torch.split,
    ATEN.chunk.default: torch.chunk,
    **dict.fromkeys((ATEN.view.default, ATEN.reshape.default), torch.reshape),
    **dict.fromkeys((ATEN.alias.default, ATEN.clone.default, ATEN.contiguous.default), torch.clone),
}


def trace_by_export(net: nn.Module, example: Tensor) -> list[fx.Node]:
    """The operations of a network, in order, as :func:`stdb.tracing.trace` gives them.

    Args:
        net: the network; it stays as it is.
        example: a batch of images, of which the shape counts.

    Raises:
        TracingError: torch.export cannot follow it either.
    """
    twin = without_memory(net).eval()
    images = images_for(net, twin, example)
    levels = [(logger, logger.level) for logger in map(logging.getLogger, ("torch", "torch.fx"))]
    try:
        for logger, _ in levels:
            logger.setLevel(logging.CRITICAL)  # what it cannot follow is said once, by us
        program = torch.export.export(Entry(twin), (images,), strict=False)
        graph = program.run_decompositions({}).module(check_guards=False).graph
    except Exception as error:
        raise TracingError(
            f"the forward method of {type(net).__name__} cannot be traced ({first_line(error)})"
        ) from error
    finally:
        for logger, level in levels:
            logger.setLevel(level)
    for node in list(graph.nodes):
        node.meta["value"] = node.meta.get("val")
        _translate(node)
    return alive(graph)


def _translate(node: fx.Node) -> None:
    """Put an operation of ATen in the words of torch."""
    if node.op == "output":
        node.args = tuple(node.args[0])  # type: ignore[arg-type]
    elif node.op != "call_function":
        return
    elif node.target is ATEN._native_batch_norm_legit_no_training.default:
        node.target = torch.batch_norm
        node.args = (*node.args[:5], False, *node.args[5:], False)
        node.meta["value"] = node.meta["value"][0]
        for reader in list(node.users):
            reader.replace_all_uses_with(node)
    elif node.target is ATEN.slice.Tensor:
        image, dim, *ends = node.args
        ends = [None if isinstance(end, int) and abs(end) >= 2**62 else end for end in ends]
        ends += [None] * (2 - len(ends))
        parts = [slice(None)] * node.meta["value"].dim()
        parts[dim] = slice(*ends)  # type: ignore[index]
        node.target, node.args = python.getitem, (image, tuple(parts))
    elif node.target is ATEN.upsample_nearest2d.vec:
        image, size, factors = node.args
        node.target, node.args = F.interpolate, (image, size, _tuple(factors), "nearest")
    elif node.target is ATEN.upsample_bilinear2d.vec:
        image, size, align, factors = node.args
        node.target, node.args = F.interpolate, (image, size, _tuple(factors), "bilinear", align)
    elif node.target in SAME:
        node.target = SAME[node.target]


def _tuple(factors: Any) -> tuple[float, ...] | None:
    return None if factors is None else tuple(factors)
