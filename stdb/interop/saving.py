"""A spiking network as one safetensors file, which is data: no code is chosen by what it says.

The tensors have the names of the module tree: ``conv1.weight``, and for every spiking layer, such
as ``conv1_relu``: ``.threshold`` (V), ``.leak`` (λ), ``.balanced_threshold`` (V of Algorithm 1, NaN
where none was). The metadata are one JSON object under the key ``config``:

==================  =============================================================================
``format``          2; what 0.1.0 wrote has none
``graph``           the nodes in the order of a step: ``name``, ``operator`` (of the table in
                    :mod:`stdb.operators.table`), ``inputs`` (places in this list), ``path``
``modules``         path → ``type`` and settings, of the whole module tree: what the graph's nodes
                    have, containers, and ``Identity`` in the place of what no node has
``units``           whether weights hold what a spike stands for (:mod:`stdb.units`)
``correction``      what calibration has added to the output's bias, where it has
``tied``            name of a tensor → that of the one it shares its values with
``encoder``, ``surrogate``, ``temporal_gradient``
``products``        the type that products are made in, where it is not that of the weights
``timesteps``       T it was made for
``classes``         their names
``normalisation``   mean and std by channel (:mod:`stdb.normalisation`); x/127.5 − 1 has none
==================  =============================================================================

and whatever else was given to :func:`save`. Weights that are computed (pruned, normalised) are
plain there.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import ARCHITECTURES, ResidualBlock, build
from ..conversion import convert, spiking_graph
from ..encoding import ENCODERS, check_timesteps
from ..graph import Node
from ..network import PRECISIONS, REALS, SpikingNetwork
from ..neuron import EXTRA, SpikingNeuron
from ..normalisation import Normalisation, normalisation_of
from ..operators.table import OPERATORS, kind_of, kinds, operator_for
from ..surrogate import SURROGATES
from ..weights import plain_copy

FORMAT = 2
NEEDED = ("encoder", "surrogate", "timesteps", "classes")
CONTAINERS: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (ResidualBlock, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Module)
}
EMPTY = "Identity"  # what no node has
STORED_FROM = "stored_from"  # in the metadata: the type of weights that are kept in another one
PRODUCTS = "products"  # in the metadata: the type that they are made in


def save(
    snn: SpikingNetwork,
    path: str | Path,
    *,
    timesteps: int,
    classes: list[str],
    normalisation: Normalisation = Normalisation(),  # noqa: B008 (it is frozen)
    storage: torch.dtype | None = None,
    **about: Any,
) -> None:
    """Write a network; the same bytes for the same values.

    Args:
        snn: with an encoder of ``stdb``.
        path: of the file.
        timesteps: T that it is meant for.
        classes: their names, in the order of the logits.
        normalisation: what becomes of an image's pixels before the network sees them.
        storage: what weights are kept in, such as ``torch.float16``, for a smaller file; ``load``
            gives them their type again, rounded. None: as they are.
        about: further metadata, such as ``network``, how its ANN was built.
    """
    from safetensors.torch import save_file

    neuron = next(iter(snn.neurons.values()))
    encoders = {kind: name for name, kind in ENCODERS.items()}
    surrogates = {kind: name for name, kind in SURROGATES.items()}
    if type(snn.encoder) not in encoders:
        raise ValueError(
            f"the encoder is a {type(snn.encoder).__name__}; allowed: {', '.join(ENCODERS)}"
        )
    if type(neuron.surrogate) not in surrogates:
        raise ValueError(
            f"the surrogate is a {type(neuron.surrogate).__name__}; "
            f"allowed: {', '.join(SURROGATES)}"
        )
    tree = plain_copy(snn.net)
    modules = _describe(tree, {node.path for node in snn.graph.nodes})
    tensors, tied = _tensors(tree, modules)
    config = {
        "format": FORMAT,
        "graph": [
            {"name": n.name, "operator": n.operator.name, "inputs": n.inputs, "path": n.path}
            for n in snn.graph.nodes
        ],
        "modules": modules,
        "tied": tied,
        "units": snn.has_units,
        **_correction(snn),
        "encoder": {"name": encoders[type(snn.encoder)], **_given(snn.encoder)},
        "surrogate": {"name": surrogates[type(neuron.surrogate)], **vars(neuron.surrogate)},
        "temporal_gradient": neuron.temporal_gradient,
        "timesteps": timesteps,
        "classes": classes,
        **about,
    }
    if kept := normalisation.settings():
        config["normalisation"] = kept
    if snn.precision is not None:
        config[PRODUCTS] = _name(snn.precision)
    if storage is not None:
        if not storage.is_floating_point:
            raise ValueError(f"storage is {storage}; allowed: a floating-point type, or None")
        config[STORED_FROM] = _name(next(snn.parameters()).dtype)
        tensors = {n: x.to(storage) if x.dim() > 1 else x for n, x in tensors.items()}
        for name, stored in tensors.items():
            if not stored.isfinite().all():
                raise ValueError(
                    f"{name} is too large for {storage}; allowed: torch.bfloat16, or None"
                )
    save_file(tensors, path, {"config": json.dumps(config)})  # of several keys none orders them


def _name(kind: torch.dtype) -> str:
    """Of a type, in the metadata."""
    return str(kind).removeprefix("torch.")


def _correction(snn: SpikingNetwork) -> dict[str, Any]:
    """What a calibration has added to the output's bias, where it has."""
    added = snn.output_correction
    return {} if added is None else {"correction": added.tolist()}


def _given(encoder: Any) -> dict[str, Any]:
    """An encoder's settings, without those that are None."""
    return {name: value for name, value in vars(encoder).items() if value is not None}


def load(
    path: str | Path, *, network: nn.Module | None = None
) -> tuple[SpikingNetwork, dict[str, Any]]:
    """The network that :func:`save` wrote, in evaluation mode, and its metadata.

    ``normalisation`` among them is a :class:`stdb.Normalisation`, also of a file without one.
    Products are made in the precision that they were made in when it was saved: in another, some
    neurons that are close to their thresholds fire otherwise. ``snn.precision`` sets it.

    Args:
        path: of the file.
        network: the ANN that a file of version 0.1.0 was made from, where it is none of
            ``stdb.build``; a file that names a function of yours does not have it called.

    Raises:
        ValueError: the file is damaged, not one of these, or does not hold its own network.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {})["config"])
            tensors = {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118 (aligned)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a spiking network: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no file of stdb.save: its metadata are no JSON object")
    if missing := [key for key in NEEDED if key not in config]:
        raise ValueError(f"{path} is no file of stdb.save: it does not say {', '.join(missing)}")
    written = config.get("format", 1)
    if written not in (1, FORMAT):
        raise ValueError(
            f"{path} has format {written}; this version of stdb reads {FORMAT} and that of 0.1.0: "
            "install a newer one"
        )
    if not isinstance(config["classes"], list) or not config["classes"]:
        raise ValueError(f"{path}: classes are {config['classes']!r}; allowed: a list of names")
    try:
        config["normalisation"] = normalisation_of(config.get("normalisation"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if written == 1 and network is None:
        network = _named(path, config)
    weights = _type(path, config, STORED_FROM, REALS)
    products = _type(path, config, PRODUCTS, PRECISIONS)
    if weights is not None:
        tensors = {name: x.to(weights) if x.dim() > 1 else x for name, x in tensors.items()}
    try:
        check_timesteps(config["timesteps"])
        snn = _of_version_1(network, config, tensors) if network else _of_graph(config, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} does not describe its own weights: {error}") from error
    snn.precision = products
    return snn.eval(), config


def _type(
    path: str | Path, config: dict[str, Any], key: str, allowed: Sequence[torch.dtype | None]
) -> torch.dtype | None:
    """The type that is taken out of the metadata; None where it is not there."""
    kept, named = config.pop(key, None), {_name(kind): kind for kind in allowed if kind}
    if kept is None:
        return None
    if not isinstance(kept, str) or kept not in named:
        raise ValueError(f"{path}: {key} is {kept!r}; allowed: {', '.join(named)}")
    return named[kept]


def _rules(config: dict[str, Any]) -> dict[str, Any]:
    """Encoder and surrogate, as arguments of ``convert``."""
    encoder, surrogate = dict(config["encoder"]), dict(config["surrogate"])
    return {
        "encoder": ENCODERS[encoder.pop("name")](**encoder),
        "surrogate": SURROGATES[surrogate.pop("name")](**surrogate),
        "temporal_gradient": bool(config.get("temporal_gradient", True)),
    }


# -- the tree --------------------------------------------------------------------------------------


def _describe(tree: nn.Module, used: set[str | None]) -> dict[str, dict[str, Any]]:
    """Path → type and settings of every module, containers before what they contain."""
    described: dict[str, dict[str, Any]] = {}
    for path, module in tree.named_modules(remove_duplicate=False):
        kind = kind_of(module)
        operator = operator_for(kind)
        if isinstance(module, SpikingNeuron):
            described[path] = {"type": SpikingNeuron.__name__, **_of_neuron(module)}
        elif path in used and operator is not None:
            settings = {name: getattr(module, name) for name in operator.kinds[kind]}
            described[path] = {"type": kind.__name__, **settings}
            if operator.learns:
                described[path]["bias"] = getattr(module, "bias", None) is not None
        elif next(module.children(), None) is None:
            described[path] = {"type": EMPTY}
        else:
            described[path] = {
                "type": next(name for name, kind in CONTAINERS.items() if isinstance(module, kind))
            }
    return described


def _of_neuron(neuron: SpikingNeuron) -> dict[str, Any]:
    """The settings of a spiking layer that are not those of all."""
    amplitude = neuron.amplitude
    settings = {
        "initial_membrane": neuron.initial_membrane or None,
        "bound": neuron.bound,
        "levels": neuron.levels,
        "channels": None if amplitude is None else len(amplitude),
        "unit": neuron.unit if neuron.unit != 1 else None,
    }
    return {name: value for name, value in settings.items() if value is not None}


def _build(described: Mapping[str, dict[str, Any]]) -> nn.Module:
    """The module tree, without memory for its weights."""
    types = {kind.__name__: kind for kind in (*kinds(), SpikingNeuron, nn.Identity)}
    tree = None
    for path, entry in described.items():
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
        name = str(settings.pop("type"))
        if name in CONTAINERS:  # empty: a ResidualBlock's own constructor would fill it
            module = CONTAINERS[name].__new__(CONTAINERS[name])
            nn.Module.__init__(module)
        else:
            with torch.device("meta"):
                module = types[name](**settings)
        if tree is None:
            tree = module
        else:
            parent, _, own = path.rpartition(".")
            tree.get_submodule(parent).add_module(own, module)
    if tree is None:
        raise ValueError("it has no modules")
    return tree


def _tensors(
    tree: nn.Module, described: Mapping[str, dict[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a file keeps, and which names share their values with another."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for path in described:
        if described[path]["type"] in CONTAINERS or described[path]["type"] == EMPTY:
            continue
        own = tree.get_submodule(path).state_dict(keep_vars=True, prefix=f"{path}." if path else "")
        for name, tensor in own.items():
            if name.endswith(EXTRA):  # a module's settings have it
                continue
            if id(tensor) in first:
                tied[name] = first[id(tensor)]
            else:
                first[id(tensor)] = name
                tensors[name] = tensor.detach().cpu().contiguous()
    return tensors, tied


def _of_graph(config: dict[str, Any], tensors: dict[str, Tensor]) -> SpikingNetwork:
    """The network of a file that has a graph."""
    rules = _rules(config)
    tree = _build(config["modules"])
    nodes = [
        Node(str(n["name"]), OPERATORS[n["operator"]], tuple(n["inputs"]), n["path"])
        for n in config["graph"]
    ]
    for i, node in enumerate(nodes):
        if not all(isinstance(j, int) and 0 <= j < i for j in node.inputs):
            raise ValueError(f"node {node.name} takes {node.inputs}; allowed: nodes before it")
        if (node.operator.name == "input") != (i == 0) or (i > 0 and not node.inputs):
            raise ValueError(f"node {node.name} is out of place: the first is the input, no other")
    graph = spiking_graph(nodes, len(nodes) - 1)
    tied = config["tied"]
    tree.load_state_dict(tensors | {n: tensors[o] for n, o in tied.items()}, assign=True)
    for name, other in tied.items():
        place, _, own = name.rpartition(".")
        setattr(tree.get_submodule(place), own, tree.get_parameter(other))
    for i in graph.neurons:
        neuron = tree.get_submodule(str(nodes[i].path))
        if not isinstance(neuron, SpikingNeuron):
            raise ValueError(f"{nodes[i].path} is a {type(neuron).__name__}, not a SpikingNeuron")
        neuron.surrogate, neuron.temporal_gradient = rules["surrogate"], rules["temporal_gradient"]
    snn = SpikingNetwork(tree, graph, rules["encoder"])
    snn.has_units = bool(config["units"])
    if "correction" in config:
        snn.output_correction = next(snn.parameters()).new_tensor(config["correction"])
    snn.check(values=True)
    return snn


# -- files of 0.1.0 --------------------------------------------------------------------------------


def _named(path: str | Path, config: dict[str, Any]) -> nn.Module:
    """The ANN of a file of 0.1.0, which names how it is built."""
    recipe = dict(config.get("network") or {})
    name = recipe.pop("architecture", None)
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{path} was written by version 0.1.0 for a network built by {name!r}, and no code is "
            "run that a file names; build it yourself and pass it: stdb.load(path, network=ann)"
        )
    try:
        return build(name, **recipe)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} does not describe its own weights: {error}") from error


def _of_version_1(
    network: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]
) -> SpikingNetwork:
    snn = convert(network, **_rules(config))
    snn.net.load_state_dict(tensors)
    return snn
