"""Tracing: what a network's forward method does to an image, as a list of torch's operations.

The method runs once, on tensors without memory (torch's meta device), whose shapes are real: what
depends on shapes alone, such as sizes, assertions, loops and flags, is plain Python, and only what
is computed from pixels is traced. The list is functional: what reads a value that was changed in
place reads what it was changed to. What the result does not depend on is left out.
"""

import copy
import inspect
import math
import operator as python
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg

from .architectures import ResidualBlock
from .operators.table import is_operation, kind_of

BATCH = 499  # images that are traced: no network's width, so it is known again in a shape
SIZES = (32, 28, 224, 64, 8, 16, 96, 128, 48, 256, 299, *range(1, 225))  # tried in this order

LENGTHS = (128, 1024, 256, 512, 1000, 2048, 4096, 8000, 16000, *range(1, 513))  # of signals

WRAPPERS = ("DataParallel", "DistributedDataParallel", "AveragedModel")  # torch's, of a module
ONE_AT_A_TIME = threading.Lock()  # torch.fx changes nn.Module while it traces
ROOT = "net."  # the network's place in what is traced


class TracingError(ValueError):
    """A forward method that cannot be traced; the message says why."""


def trace(net: nn.Module, example: Tensor | None = None) -> list[fx.Node]:
    """The operations of a network, in order; ``value`` of a node's ``meta`` has its shape.

    Args:
        net: the network; it stays as it is. Modules of torch, and the activations here, are
            operations of their own, all others are traced into.
        example: a batch of images, of which the shape counts; None tries usual sizes.

    Raises:
        TracingError: it depends on pixels, fails, or takes or returns something else.
    """
    _check_arguments(net)
    twin = without_memory(net).eval()
    images = images_for(net, twin, example)
    tracer = _Tracer(images)
    try:
        with torch.no_grad(), ONE_AT_A_TIME:
            graph = tracer.trace(Entry(twin))
    except fx.proxy.TraceError as error:
        raise TracingError(
            f"the forward method of {type(net).__name__} cannot be traced ({error}); write it "
            "without control flow that depends on the data"
        ) from error
    except Exception as error:
        raise TracingError(
            f"the forward method of {type(net).__name__} cannot be traced ({first_line(error)})"
        ) from error
    _make_functional(graph)
    return alive(graph)


def place(node: fx.Node) -> str:
    """The path in the module tree that an operation's target names."""
    return str(node.target).removeprefix(ROOT)


class Entry(nn.Module):
    """The network with the image as its only argument; others have their defaults."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        """What the network gives."""
        return self.net(x)


def _check_arguments(net: nn.Module) -> None:
    """Refuse a forward method that takes more than an image."""
    try:
        inspect.signature(net.forward).bind(None)
    except TypeError as error:  # "missing a required argument: 'y'"
        name = str(error).rpartition("'")[0].rpartition("'")[2]
        raise TracingError(
            f"the network has a second input, {name}; allowed: one, and arguments with a default, "
            "which is taken"
        ) from error


# -- what is traced on -----------------------------------------------------------------------------


def without_memory(net: nn.Module) -> nn.Module:
    """A copy on the meta device."""
    memo: dict[int, Any] = {}
    for module in net.modules():
        for tables in (module._parameters, module._buffers, vars(module)):
            for tensor in tables.values():
                if isinstance(tensor, Tensor) and id(tensor) not in memo:
                    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
                    parameter = isinstance(tensor, nn.Parameter)
                    memo[id(tensor)] = nn.Parameter(empty, False) if parameter else empty
    return copy.deepcopy(net, memo)


def images_for(net: nn.Module, twin: nn.Module, example: Tensor | None) -> Tensor:
    """Images that the network takes, on the meta device."""
    weights = (p for p in net.parameters() if p.is_floating_point())
    dtype = next((p.dtype for p in weights), torch.float32)
    shapes = [example.shape[1:]] if example is not None else list(_shapes(net))
    causes: list[str] = []
    for shape in shapes:
        images = torch.empty(BATCH, *shape, dtype=dtype, device="meta")
        try:
            with torch.no_grad():
                result = twin(images)
        except Exception as error:
            causes.append(first_line(error))
        else:
            if not isinstance(result, Tensor) or result.shape[:1] == (BATCH,):
                return images
            causes.append(f"it returns {tuple(result.shape)} for a batch of {BATCH}")
    tried = tuple(shapes[0])
    several = f" and {len(shapes) - 1} other sizes" if len(shapes) > 1 else ""
    raise TracingError(
        f"the forward method of {type(net).__name__} cannot be traced: it fails on images of "
        f"{tried}{several} ({causes[0]}){_hint(causes[0], example)}"
    )


def _shapes(net: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes that a network may take, of images, signals or vectors, by its first layer."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            yield from dict.fromkeys((module.in_channels, size, size) for size in SIZES)
            return
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            yield from dict.fromkeys((module.in_channels, length) for length in LENGTHS)
            return
        if isinstance(module, nn.Linear):
            n = module.in_features
            for channels in (1, 3):
                side = math.isqrt(n // channels)
                if channels * side * side == n:
                    yield channels, side, side
            yield n, 1, 1
            yield (n,)
            return
    yield 3, 32, 32
    yield 1, 28, 28


def _hint(cause: str, example: Tensor | None) -> str:
    if "meta tensors" in cause:
        return "; write it without control flow that depends on the data"
    if "device meta" in cause:
        return "; keep tensors of its own as buffers, register_buffer(), or write them as numbers"
    return "" if example is not None else "; give a batch of images: example="


def first_line(error: Exception) -> str:
    """What an error says, for a message of our own."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# -- tracing ---------------------------------------------------------------------------------------


class _Proxy(fx.Proxy):
    """A value that is traced; what its shape says is known."""

    @property
    def _value(self) -> Any:
        return self.node.meta["value"]

    def __getattr__(self, name: str) -> Any:
        if isinstance(self._value, Tensor) and name in KNOWN:
            return getattr(self._value, name)
        return super().__getattr__(name)

    def size(self, dim: int | None = None) -> Any:
        return self._value.size() if dim is None else self._value.size(dim)

    def dim(self) -> int:
        return int(self._value.dim())

    def numel(self) -> int:
        return int(self._value.numel())

    def __iadd__(self, other: Any) -> Any:
        return self._in_place(python.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._in_place(python.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._in_place(python.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._in_place(python.itruediv, other)

    def _in_place(self, change: Callable[..., Any], other: Any) -> Any:
        """Which torch.fx would take for the operation that makes a new value."""
        return self.tracer.create_proxy("call_function", change, (self, other), {})

    def __len__(self) -> int:
        return len(self._value)

    def __iter__(self) -> Iterator[fx.Proxy]:
        if isinstance(self._value, Tensor):
            raise fx.proxy.TraceError("images cannot be iterated over")
        return iter([self.__getitem__(i) for i in range(len(self._value))])


KNOWN = {"shape", "ndim", "dtype", "device", "layout", "is_cuda", "requires_grad"}


class _Tracer(fx.Tracer):
    """Runs what it traces, on the meta device; notes what is changed in place."""

    proxy_buffer_attributes = True  # torch.fx would make them constants

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = images
        self.called: Callable[..., Any] = lambda: None  # the module that is called
        self.running = False  # what is inside of an operation is not traced

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Whether what a module does is one operation; the whole network is none."""
        if isinstance(module, nn.Sequential | ResidualBlock | Entry | fx.GraphModule):
            return False
        return f"{name}." != ROOT and is_operation(kind_of(module))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A parameter that is used is traced, but not inside of an operation."""
        if self.running:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module that is given no traced value just runs."""
        if self.running or not _proxies((args, kwargs)):
            return forward(*args, **kwargs)
        self.called = forward
        return super().call_module(m, forward, args, kwargs)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **named: Any
    ) -> Any:
        """Trace an operation, and run it for its shape."""
        proxy = super().create_proxy(kind, target, args, kwargs, *more, **named)
        if kind == "placeholder":
            proxy.node.meta["value"] = self.images
            return proxy
        given = _proxies((args, kwargs))
        versions = [_version(p) for p in given]
        values = map_aggregate((args, kwargs), _value_of)
        self.running = True
        try:
            proxy.node.meta["value"] = self._run(kind, target, *values)
        finally:
            self.running = False
        changed = [p.node for p, v in zip(given, versions, strict=True) if _version(p) != v]
        proxy.node.meta["changes"] = changed
        return proxy

    def _run(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "call_module":
            return self.called(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if kind == "call_function":
            return target(*args, **kwargs)
        value: Any = self.root
        for name in target.split("."):
            value = getattr(value, name)
        return value


def _value_of(argument: Any) -> Any:
    return argument.node.meta["value"] if isinstance(argument, fx.Proxy) else argument


def _proxies(arguments: Any) -> list[fx.Proxy]:
    found: list[fx.Proxy] = []
    map_aggregate(arguments, lambda a: found.append(a) if isinstance(a, fx.Proxy) else None)
    return found


def _version(proxy: fx.Proxy) -> int:
    value = proxy.node.meta["value"]
    return value._version if isinstance(value, Tensor) else 0


# -- afterwards ------------------------------------------------------------------------------------


def _make_functional(graph: fx.Graph) -> None:
    """What reads a value, or an alias of it, after a change in place reads the changed one."""
    now: dict[fx.Node, fx.Node] = {}  # node → what its memory holds by now
    torn: dict[fx.Node, fx.Node] = {}  # node → what changed its memory in another shape
    seen: list[fx.Node] = []
    for node in graph.nodes:
        for read in node.all_input_nodes:
            if read in torn and read not in now:
                raise TracingError(
                    f"{_called(node)} reads {_called(read)}, a part or another shape of what "
                    f"{_called(torn[read])} changed in place; write it without the change in place"
                )
        node.args = map_arg(node.args, lambda n: now.get(n, n))
        node.kwargs = map_arg(node.kwargs, lambda n: now.get(n, n))
        for changed in node.meta.get("changes", []):
            for other in seen:
                if not _share_memory(other, changed):
                    continue
                if _same_view(other, changed):
                    now[other] = node
                else:
                    torn[other] = node
                    now.pop(other, None)
        seen.append(node)


def _called(node: fx.Node) -> str:
    return place(node) if node.op in ("call_module", "get_attr") else node.name


def _share_memory(one: fx.Node, other: fx.Node) -> bool:
    a, b = one.meta.get("value"), other.meta.get("value")
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def _same_view(one: fx.Node, other: fx.Node) -> bool:
    a, b = one.meta["value"], other.meta["value"]
    where = (a.storage_offset(), a.stride()) == (b.storage_offset(), b.stride())
    return bool(where and a.shape == b.shape)


def alive(graph: fx.Graph) -> list[fx.Node]:
    """The operations that the result depends on, the images and the output among them."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("output", "placeholder") or node in needed:
            needed.add(node)
            needed.update(node.all_input_nodes)
    return [node for node in graph.nodes if node in needed]


def unwrapped(net: nn.Module) -> nn.Module:
    """The network inside what DataParallel, DDP and torch.compile make of it, anywhere in it."""
    net = inner(net)
    for path, module in list(net.named_modules(remove_duplicate=False)):
        if path and inner(module) is not module:
            net.set_submodule(path, inner(module))
    return net


def inner(module: nn.Module) -> nn.Module:
    """The module inside what DataParallel, DDP, AveragedModel and torch.compile make of it."""
    while True:
        if any(kind.__name__ in WRAPPERS for kind in type(module).__mro__):
            module = module.get_submodule("module")
        elif isinstance(original := getattr(module, "_orig_mod", None), nn.Module):
            module = original
        else:
            return module
