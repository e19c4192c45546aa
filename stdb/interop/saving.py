"""A spiking network as one safetensors file: weights, thresholds, leaks, and how to build it again.

The tensors have the names of the module tree: ``conv1.weight``, and for every spiking layer, such
as ``conv1_relu``: ``.threshold`` (V), ``.leak`` (λ), ``.balanced_threshold`` (V of Algorithm 1, NaN
where none was). The metadata are one JSON object under the key ``config``, with ``network``
(arguments of the builder), ``encoder``, ``surrogate``, ``timesteps`` (T it was made for),
``classes`` (names) and whatever else was given to :func:`save`.
"""

import json
from pathlib import Path
from typing import Any

from ..architectures import build_network
from ..conversion import convert
from ..encoding import ENCODERS
from ..network import SpikingNetwork
from ..surrogate import SURROGATES

NEEDED = ("network", "encoder", "surrogate", "timesteps", "classes")


def save(
    snn: SpikingNetwork,
    path: str | Path,
    *,
    network: dict[str, Any],
    timesteps: int,
    classes: list[str],
    **about: Any,
) -> None:
    """Write a network; the same bytes for the same values.

    Args:
        snn: with an encoder of ``stdb``.
        path: of the file.
        network: arguments of :func:`build_network` that build its ANN.
        timesteps: T that it is meant for.
        classes: their names, in the order of the logits.
        about: further metadata.
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
    config = {
        "network": network,
        "encoder": {"name": encoders[type(snn.encoder)], **vars(snn.encoder)},
        "surrogate": {"name": surrogates[type(neuron.surrogate)], **vars(neuron.surrogate)},
        "temporal_gradient": neuron.temporal_gradient,
        "timesteps": timesteps,
        "classes": classes,
        **about,
    }
    tensors = {k: v.detach().cpu().contiguous() for k, v in snn.net.state_dict().items()}
    save_file(tensors, path, {"config": json.dumps(config)})  # of several keys none orders them


def load(path: str | Path) -> tuple[SpikingNetwork, dict[str, Any]]:
    """The network that :func:`save` wrote, in evaluation mode, and its metadata.

    Raises:
        ValueError: the file is damaged, or not one of these.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {})["config"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a spiking network: {error}") from error
    if missing := [key for key in NEEDED if key not in config]:
        raise ValueError(f"{path} is no file of stdb.save: it does not say {', '.join(missing)}")
    encoder, surrogate = dict(config["encoder"]), dict(config["surrogate"])
    try:
        snn = convert(
            build_network(**config["network"]),
            ENCODERS[encoder.pop("name")](**encoder),
            SURROGATES[surrogate.pop("name")](**surrogate),
            temporal_gradient=config.get("temporal_gradient", True),
        )
        snn.net.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} does not describe its own weights: {error}") from error
    return snn.eval(), config
