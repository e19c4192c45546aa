"""What balance_thresholds hands on of a network whose thresholds do not say it all: all of it.

A calibration may put units into weights (``stdb/units.py``), add diagonals and biases, correct
biases and set U_0, so that converting the ANN again does not give the same layers. The file is what
``stdb.save`` writes, in which weights that the ANN computes, such as weight norm's, are plain; what
is pruned stays 0 (:func:`keep_fixed`). Of a network of the paper's kind, which is the ANN's
weights and models/thresholds.json, the file has nothing.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils import prune

import stdb
from pipeline.data import Samples
from pipeline.errors import StageError
from pipeline.files import writing
from pipeline.learning.weights import save_weights

AGAIN = "run balance_thresholds for this network"
WRAPPERS = ("module", "_orig_mod")  # in the names of an ANN's layers, and in no converted one's


def is_whole(snn: stdb.SpikingNetwork) -> bool:
    """Whether thresholds alone do not say what a calibrated network computes."""
    return snn.has_units or any(neuron.initial_membrane for neuron in snn.neurons.values())


def balanced_state(
    snn: stdb.SpikingNetwork,
    data: Samples,
    network: dict[str, Any],
    timesteps: int,
    wanted: int | None,
) -> Tensor:
    """The bytes of models/balanced.safetensors, as a job's state; none: thresholds say it all.

    Args:
        snn: calibrated.
        data: the images that it is for.
        network: how its ANN is built (``pipeline.learning.networks.recipe``).
        timesteps: T of the calibration.
        wanted: the same where another T had given another network, else None.
    """
    if not is_whole(snn):
        return torch.empty(0, dtype=torch.uint8)
    # what the stage does not track, and who reads the file sets, stays out of it
    stdb.configure(snn, snn.encoder, leak=next(iter(snn.neurons.values())).leak.item())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        stdb.save(
            snn,
            path,
            timesteps=timesteps,
            classes=data.classes,
            normalisation=data.preparation.normalisation,
            network=network,
            calibrated_for=wanted,
        )
        return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def save_balanced(state: Tensor, path: Path) -> None:
    """Write what :func:`balanced_state` gave."""
    if not len(state):
        save_weights({}, path, units={}, initial_membranes={})
        return
    with writing(path) as temporary:
        temporary.write_bytes(state.cpu().numpy().tobytes())


def load_balanced(path: Path, network: dict[str, Any]) -> stdb.SpikingNetwork | None:
    """The whole network that was handed on; None where thresholds say it all.

    Args:
        path: of the file.
        network: how the ANN is built that it has to be of.

    Raises:
        StageError: the file cannot be read, or is another network's.
    """
    if not _has_tensors(path):
        return None
    try:
        snn, about = stdb.load(path)
    except ValueError as error:
        raise StageError(f"{' '.join(str(error).split())}; {AGAIN}") from error
    there, wanted = about.get("network"), json.loads(json.dumps(network))
    if there != wanted:
        there = there if isinstance(there, dict) else {}
        key = next(k for k in {**wanted, **there} if there.get(k) != wanted.get(k))
        raise StageError(
            f"{path} is of another network: its {key} is {there.get(key)}, this one's "
            f"{wanted.get(key)}; {AGAIN}"
        )
    return snn


def calibrated_for(path: Path) -> int | None:
    """T that a network was calibrated for, None where its T does not matter."""
    if not _has_tensors(path):
        return None
    with safe_open(path, framework="pt") as file:
        wanted = json.loads(file.metadata()["config"]).get("calibrated_for")
    return None if wanted is None else int(wanted)


def keep_fixed(ann: nn.Module, snn: stdb.SpikingNetwork, path: Path) -> None:
    """Let what does not learn in the ANN not learn: zeros of pruned weights, frozen parameters.

    Args:
        ann: as it was trained, with the masks of ``torch.nn.utils.prune``.
        snn: its spiking network.
        path: of the file that it comes from.

    Raises:
        StageError: a pruned layer is not there.
    """
    layers = dict(snn.net.named_modules())
    for name, pruned in ann.named_modules():
        mask = getattr(pruned, "weight_mask", None)
        if mask is None or not prune.is_pruned(pruned):
            continue
        layer = layers.get(name, layers.get(_own_name(name)))
        weight = getattr(layer, "weight", None)
        if layer is None or weight is None or weight.shape != mask.shape:
            raise StageError(f"{path} has no layer {name}, which is pruned; {AGAIN}")
        if not hasattr(layer, "weight_mask"):
            prune.custom_from_mask(layer, "weight", mask.to(weight))
    learned = dict(snn.net.named_parameters())
    for name, parameter in ann.named_parameters():
        same = learned.get(name, learned.get(_own_name(name)))
        if same is not None and not parameter.requires_grad:
            same.requires_grad_(False)


def _own_name(name: str) -> str:
    """A name without those of wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _has_tensors(path: Path) -> bool:
    """Whether the file has a network."""
    try:
        with safe_open(path, framework="pt") as file:
            return next(iter(file.keys()), None) is not None
    except (OSError, SafetensorError) as error:
        raise StageError(f"{path} cannot be read ({error}); run dvc repro") from error
