"""Weights of an ANN, from files that other people's training loops write.

A state dict may lie in a container, ``{"state_dict": …, "epoch": 3}``, and its names may have the
prefixes of wrappers, such as ``module.`` of DataParallel. Both are taken off where the names then
are the network's.
"""

import pickle
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..images import printable

CONTAINERS = (
    *("state_dict", "model_state_dict", "net_state_dict", "model", "net", "network", "module"),
    *("weights", "params", "ema", "ema_state_dict", "model_ema", "state_dict_ema", "state"),
)
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
BESIDE = ("n_averaged",)  # what torch's averaged models keep beside the weights
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # classifiers that only torchvision's training needs
COUNTS = ".num_batches_tracked"  # of batch norms, which older files lack
REALS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WIDEST = 80  # characters of a list in a message
NAMED = 4  # names or problems in a message, of each side

State = dict[str, Tensor]


class WeightsError(ValueError):
    """A file of weights that cannot be used; the message names it, and what is wrong in it."""


def load_weights(
    network: nn.Module,
    path: str | Path,
    head: str | None = None,
    kept: Collection[str] = (),
) -> int | None:
    """Load a state dict into a network of the same layers.

    Args:
        network: takes the weights.
        path: .safetensors, or a file of ``torch.save`` (read with ``weights_only=True``); in a
            container and with the prefixes of wrappers, too.
        head: name of the layer that gives the classes, which keeps its own weights where the
            file's is for another number of them; None: no layer may differ.
        kept: names of tensors of the network that the file does not have.

    Returns:
        The number of classes of the file's head, where the network kept its own; else None.

    Raises:
        WeightsError: the file cannot be read, belongs to another network (says which names each of
            them has), or holds what are no weights (says which tensor).
    """
    whole = network.state_dict()
    own = {name: tensor for name, tensor in whole.items() if name not in kept}
    content = _read(path)
    states = list(_states(content))
    if not states:
        kind = type(content).__name__
        of = f" of {printable(list(content), WIDEST)}" if isinstance(content, Mapping) else ""
        raise WeightsError(
            f"the weights file {path} holds a {kind}{of}; allowed: a state dict, name → "
            f"tensor, or one under a key such as {', '.join(CONTAINERS[:4])}"
        )
    stripped = [_with_own_names(state, own) for state in states]
    fits = [state for state in stripped if state.keys() == own.keys()]
    state = fits[0] if fits else max(stripped, key=lambda s: len(s.keys() & own.keys()))
    classes = None
    if head is not None and _has_other_classes(state, own, head):
        classes = len(state[f"{head}.weight"])
        state = state | {n: t for n, t in own.items() if n.startswith(f"{head}.")}
    if problems := _differences(state, own):
        more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise WeightsError(
            f"the weights in {path} belong to another network: "
            f"{'; '.join(problems[:NAMED])}{more}; the file has {_names(state)}, the network has "
            f"{_names(own)}"
        )
    for name, tensor in state.items():
        if problem := _problem(tensor, own[name]):
            raise WeightsError(f"the weights in {path} cannot be used: {name} {problem}")
    network.load_state_dict(whole | state)
    return classes


def _read(path: str | Path) -> Any:
    """What the file holds."""
    from safetensors import SafetensorError, safe_open

    try:
        if Path(path).suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        with warnings.catch_warnings(action="ignore"):  # of pickles that are refused below
            return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error):
            raise _unreadable(path, error) from error
        raise WeightsError(
            f"the weights file {path} holds Python objects, which are not loaded, since they could "
            "run any code; allowed: tensors alone, as torch.save(net.state_dict(), …) writes them"
        ) from error
    except (OSError, SafetensorError, RuntimeError, ValueError, LookupError, EOFError) as error:
        raise _unreadable(path, error) from error
    except (TypeError, AttributeError, pickle.PickleError) as error:  # of damaged pickles
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: Exception) -> WeightsError:
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return WeightsError(f"the weights file {path} cannot be read: {text}")


def _states(content: Any, depth: int = 3) -> Iterator[State]:
    """The state dicts that there are, the outermost and usual first."""
    if not isinstance(content, Mapping):
        return
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors and len(tensors) == len(content):
        yield tensors
    elif depth:
        for name in CONTAINERS:
            yield from _states(content.get(name), depth - 1)


def _with_own_names(state: State, own: Mapping[str, Tensor]) -> State:
    """The state with the network's names, in wrappers' prefixes or in older files' spelling."""
    for inner in _unwrapped(state, own):
        for spelt in (inner, {_renamed(name): tensor for name, tensor in inner.items()}):
            found = {
                name: tensor
                for name, tensor in spelt.items()
                if name in own or not name.startswith(AUXILIARY)
            }
            counts = {n: t for n, t in own.items() if n.endswith(COUNTS) and n not in found}
            if (found | counts).keys() == own.keys():
                return found | counts
    return state


def _renamed(name: str) -> str:
    """A tensor's name today, of the files of densenets that torchvision publishes."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name)


def _has_other_classes(state: State, own: Mapping[str, Tensor], head: str) -> bool:
    """Whether a file's head differs from the network's in its number of classes alone."""
    theirs, ours = state.get(f"{head}.weight"), own[f"{head}.weight"]
    if theirs is None or theirs.dim() != ours.dim():
        return False
    return len(theirs) != len(ours) and theirs.shape[1:] == ours.shape[1:]


def _unwrapped(state: State, own: Mapping[str, Tensor]) -> Iterator[State]:
    """The state as it is, then with one wrapper's prefix after the other taken off."""
    inner = {name: tensor for name, tensor in state.items() if name not in BESIDE or name in own}
    yield inner
    while prefix := next(
        (p for p in PREFIXES if inner and all(n.startswith(p) for n in inner)), ""
    ):
        inner = {name.removeprefix(prefix): tensor for name, tensor in inner.items()}
        yield inner


def _differences(state: State, own: Mapping[str, Tensor]) -> list[str]:
    """What keeps the state from being the network's."""
    return [
        *(f"{name} is missing" for name in own if name not in state),
        *(f"{name} is not known" for name in state if name not in own),
        *(
            f"{name} is {tuple(state[name].shape)}, the network's is {tuple(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ),
    ]


def _names(state: Mapping[str, Tensor]) -> str:
    """How many tensors there are, and the first few names."""
    more = ", …" if len(state) > NAMED else ""
    return f"{len(state)} tensors ({', '.join(list(state)[:NAMED])}{more})"


def _problem(tensor: Tensor, own: Tensor) -> str:
    """What is wrong with a tensor; empty where nothing is."""
    if tensor.is_quantized or tensor.layout != torch.strided or tensor.is_meta:
        return f"is {tensor.dtype}, {tensor.layout}; allowed: dense tensors that are not quantised"
    if not own.is_floating_point():
        return "" if tensor.dtype == own.dtype else f"is {tensor.dtype}; allowed: {own.dtype}"
    if tensor.dtype not in REALS:
        return f"is {tensor.dtype}; allowed: {', '.join(map(str, REALS))}"
    finite = tensor.to(own.dtype).isfinite()
    if not finite.all():
        return f"has {int((~finite).sum())} values that are not finite; allowed: finite numbers"
    return ""
