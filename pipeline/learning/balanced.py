"""What balance_thresholds hands on of a network with biases or batch norm: the whole of it.

Its spikes stand for something, which the weights above them hold (``stdb/units.py``), so that
thresholds alone do not say what it computes. The file has the tensors of the module tree, and as
metadata by layer what its spikes stand for, ``units``, and U_0/V, ``initial_membranes``. Of a
network of the paper's kind, which is the ANN's weights and models/thresholds.json, it has nothing.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

import stdb
from pipeline.errors import StageError
from pipeline.learning.weights import load_weights, save_weights

ELSEWHERE = ("balanced_threshold", "leak")  # of neurons: models/thresholds.json and stdb.leak say


def balanced_state(snn: stdb.SpikingNetwork) -> dict[str, Any]:
    """What :func:`save_balanced` writes, as a job's state."""
    if not snn.has_units:
        return {"tensors": {}, "units": {}, "initial_membranes": {}}
    known = _known_elsewhere(snn)
    return {
        "tensors": {n: t for n, t in snn.net.state_dict().items() if n not in known},
        "units": {name: neuron.unit for name, neuron in snn.neurons.items()},
        "initial_membranes": {n: neuron.initial_membrane for n, neuron in snn.neurons.items()},
    }


def save_balanced(state: dict[str, Any], path: Path) -> None:
    """Write what :func:`balanced_state` gave."""
    about = {name: state[name] for name in ("units", "initial_membranes")}
    save_weights(state["tensors"], path, **about)


def load_balanced(snn: stdb.SpikingNetwork, path: Path) -> None:
    """Weights, biases, V, units and U_0 of a network, which has the thresholds already.

    Raises:
        StageError: the file cannot be read, or is another network's.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["config"])
        units, starts = dict(about["units"]), dict(about["initial_membranes"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise StageError(f"{path} is not what balance_thresholds writes; run dvc repro") from error
    if units.keys() != snn.neurons.keys() or starts.keys() != units.keys():
        raise StageError(
            f"{path} is of another network: its layers are {', '.join(units) or 'none'}; allowed: "
            f"{', '.join(snn.neurons)}; run balance_thresholds for this network"
        )
    load_weights(snn.net, path, kept=_known_elsewhere(snn))
    try:
        for name, neuron in snn.neurons.items():
            neuron.unit, neuron.initial_membrane = float(units[name]), float(starts[name])
    except (TypeError, ValueError) as error:
        raise StageError(f"{path} is not what balance_thresholds writes: {error}") from error


def _known_elsewhere(snn: stdb.SpikingNetwork) -> set[str]:
    """Names of the tensors that the file does not have."""
    paths = [snn.graph.nodes[i].path for i in snn.graph.neurons]
    return {f"{path}.{name}" for path in paths for name in ELSEWHERE}
