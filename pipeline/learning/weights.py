"""Weights files of our own; those of others load as they do (:func:`stdb.load_weights`)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.files import writing
from stdb import load_weights

__all__ = ["load_weights", "network_of", "save_weights"]


def save_weights(tensors: Mapping[str, Tensor], path: Path, **metadata: object) -> None:
    """Write a state dict as safetensors, the same bytes for the same values.

    The metadata are one JSON object under the key ``config``: the format does not order its keys.
    """
    with writing(path) as temporary:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary,
            metadata={"config": json.dumps(metadata)},
        )


def network_of(path: Path) -> dict[str, Any]:
    """What a file of :func:`save_weights` says of its network, as ``network`` in params.yaml.

    Empty of a file of others, which does not say it.
    """
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get("config", "{}"))
    except ValueError:  # others' metadata
        return {}
    network = found.get("network") if isinstance(found, dict) else None
    return network if isinstance(network, dict) else {}
