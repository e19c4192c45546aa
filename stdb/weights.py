"""The weights of a layer: a parameter, or what is computed from parameters.

Pruning, weight norm, spectral norm and other parametrisations compute a layer's weights anew from
leaves of their own each time the layer is called. A spiking network does the same at the start of
each run of steps, so that fine-tuning reaches the leaves and what is pruned stays zero.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

HOOKS = (BasePruningMethod, WeightNorm, SpectralNorm)  # they compute weights before each call


def is_computed(module: nn.Module, name: str = "weight") -> bool:
    """Whether a layer's weights, or its bias, are computed from other parameters."""
    attribute = vars(module).get(name)  # where hooks put what they compute
    return isinstance(attribute, Tensor) or parametrize.is_parametrized(module, name)


def weight_of(module: nn.Module) -> Tensor:
    """A layer's weights as they are now; if they are computed, autograd knows from what."""
    weight = _now(module, "weight")
    assert weight is not None
    return weight


def is_pruned(module: nn.Module) -> bool:
    """Whether a layer's weights are a leaf times a mask."""
    hooks = module._forward_pre_hooks.values()
    return any(isinstance(h, BasePruningMethod) and h._tensor_name == "weight" for h in hooks)


def weight_count(module: Any) -> int:
    """How many weights a layer has, without computing them."""
    if isinstance(module, nn.Linear):
        return int(module.in_features * module.out_features)
    channels: int = module.in_channels * module.out_channels // module.groups
    return channels * int(math.prod(module.kernel_size))


def bias_of(module: nn.Module) -> Tensor | None:
    """A layer's bias as it is now, None where it has none."""
    return _now(module, "bias") if hasattr(module, "bias") else None


def _now(module: nn.Module, name: str) -> Tensor | None:
    if is_computed(module, name) and not parametrize.is_parametrized(module, name):
        for hook in module._forward_pre_hooks.values():
            # pruning's hooks are for one tensor, those of the norms for the weights
            if isinstance(hook, HOOKS) and getattr(hook, "_tensor_name", "weight") == name:
                hook(module, None)
        value = getattr(module, name)
        assert isinstance(value, Tensor)
        setattr(module, name, value.detach())  # deepcopy refuses a module that holds another
        return value
    found = getattr(module, name)
    assert found is None or isinstance(found, Tensor)
    return found


@torch.no_grad()
def scale_weight(module: nn.Module, factor: float) -> None:
    """Multiply a layer's weights.

    Raises:
        ValueError: they are computed from leaves that cannot be scaled, as spectral norm's.
    """
    if not is_computed(module):
        weight_of(module).mul_(factor)
        return
    wanted = weight_of(module) * factor
    if parametrize.is_parametrized(module, "weight"):
        module.weight = wanted
    for leaf in ("weight_orig", "weight_g"):  # of pruning, of weight norm
        if leaf in module._parameters:
            module.get_parameter(leaf).mul_(factor)
    if not torch.allclose(weight_of(module), wanted, rtol=1e-4):
        raise ValueError(
            f"the weights of {module} are computed in a way that cannot be scaled; make them plain "
            "first: torch.nn.utils.parametrize.remove_parametrizations, remove_spectral_norm"
        )


@torch.no_grad()
def scale_bias(module: nn.Module, factor: float) -> None:
    """Multiply a layer's bias, where it has one."""
    if bias_of(module) is None:
        return
    if is_computed(module, "bias"):
        make_plain(module)
    module.get_parameter("bias").mul_(factor)


@torch.no_grad()
def fold(module: Any, scale: Tensor, shift: Tensor) -> None:
    """W ← g·W, b ← shift + g·b, for each output channel; computed weights become plain.

    Args:
        module: a layer.
        scale: g, (C,) float64.
        shift: (C,) float64.
    """
    make_plain(module)
    weight, bias = weight_of(module), bias_of(module)
    weight.copy_(weight.double() * _rows(module, weight, scale))
    whole = shift if bias is None else shift + scale * bias.double()
    if bias is None:
        module.register_parameter("bias", nn.Parameter(whole.to(weight)))
    else:
        bias.copy_(whole)


def leaf_of(module: nn.Module) -> Tensor:
    """What to scale of a layer's weights, in place: of what is pruned the leaf, masks stay."""
    pruned = is_pruned(module)
    if is_computed(module) and not pruned:
        make_plain(module)
    weight = module.weight_orig if pruned else module.weight
    assert isinstance(weight, Tensor)
    return weight


@torch.no_grad()
def scale_rows(module: Any, scale: Tensor) -> None:
    """Multiply a layer's weights and bias by a factor for each output channel, (C,) float64."""
    weight = leaf_of(module)
    weight.copy_(weight.double() * _rows(module, weight, scale))
    if is_computed(module, "bias"):
        make_plain(module)
    if module.bias is not None:
        module.bias.copy_(module.bias.double() * scale)


def _rows(module: Any, weight: Tensor, scale: Tensor) -> Tensor:
    """A factor for each output channel, in the shape of the weights."""
    ends = [1] * (weight.dim() - 2)
    if getattr(module, "transposed", False):  # weights are (C, C'/groups, …)
        rows = scale.view(module.groups, -1).repeat_interleave(len(weight) // module.groups, 0)
        return rows.view(*weight.shape[:2], *ends)
    return scale if weight.dim() == 1 else scale.view(-1, 1, *ends)


def inner_copies(net: nn.Module) -> dict[int, Any]:
    """Copies of the computed tensors that modules hold, a ``memo`` for ``copy.deepcopy``.

    It refuses those that autograd made, such as the weights of a pruned layer.
    """
    return {
        id(value): value.detach().clone()
        for module in net.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }


@torch.no_grad()
def plain_copy(net: nn.Module) -> nn.Module:
    """A copy whose computed weights are plain parameters, as files and other programs want them."""
    net = copy.deepcopy(net, inner_copies(net))
    for module in net.modules():
        make_plain(module)
    return net


@torch.no_grad()
def make_plain(module: nn.Module) -> None:
    """Make computed weights and biases of a layer plain parameters, in place."""
    values = {
        name: value.clone()
        for name in ("weight", "bias")
        if is_computed(module, name) and (value := _now(module, name)) is not None
    }
    if parametrize.is_parametrized(module):
        # torch's remove_parametrizations changes the class, which a copy's original shares
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
    for name, value in values.items():
        hooks = module._forward_pre_hooks
        for key in [k for k, hook in hooks.items() if isinstance(hook, HOOKS)]:
            del hooks[key]
        for table in (module._parameters, module._buffers):
            for leaf in [n for n in table if n.startswith(f"{name}_")]:
                del table[leaf]
        vars(module).pop(name, None)
        module.register_parameter(name, nn.Parameter(value))
