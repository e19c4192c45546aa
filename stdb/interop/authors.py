"""A door in: checkpoints of the authors' code (nitin-rathi/hybrid-snn-conversion, ann.py, snn.py).

Their files are dictionaries of ``torch.save``:

======================  ==========================================================================
key                     holds
======================  ==========================================================================
``state_dict``          the weights, with or without DataParallel's ``module.`` before each name.
                        VGG: ``features.{3k}.weight``, ``classifier.{0,3,6}.weight``. ResNet:
                        ``pre_process.{0,3,6}.weight``, ``layer{g}.{b}.residual.{0,3}.weight``,
                        ``layer{g}.{b}.identity.0.weight``, ``classifier.0.weight``
``thresholds``          V of each spiking layer, in order. In an ANN's file the balanced ones (of a
                        ResNet the first three), in an SNN's file already scaled
``timesteps``           T; it makes the file an SNN's
``leak``                λ; ``leak_mem`` in old files
``activation``          ``STDB`` or ``Linear``
``scaling_threshold``   in old files only: the thresholds are the balanced ones, to be scaled by it
======================  ==========================================================================

What their networks do otherwise, and an imported one does not:

* Theirs passes a spike on one step late, so of a VGG with L spiking layers ours has after T steps
  the logits that theirs has after T + L. In their basic blocks the shortcut is a step early as
  well, so a ResNet's logits differ.
* Their ResNets fire at 0.9 of the pixel's rate: give an imported one 0.9 · images.
* Their ANNs were trained on pixels normalised by the data set's mean and deviation, their SNNs, and
  everything here, on pixels in [−1, 1].
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import RESNET, VGG, A, build
from ..balancing import residual_layers
from ..conversion import convert
from ..encoding import Encoder, PoissonEncoder
from ..network import SpikingNetwork
from ..surrogate import STDB, Linear, Surrogate

SURROGATE = {"STDB": STDB(0.3, 0.01, True), "Linear": Linear(0.3, 0.01, True)}  # over U/V, theirs


@dataclass(frozen=True)
class AuthorsNetwork:
    """What a checkpoint of the authors held.

    Attributes:
        network: arguments of ``stdb.build_network``, as ``stdb.save`` wants them.
        ann: the network with the file's weights, in evaluation mode.
        snn: the same converted, with the file's thresholds and leak; None where it has none.
        timesteps: T of an SNN's file.
        accuracy: on their test set, as the file says.
    """

    network: dict[str, Any]
    ann: nn.Module
    snn: SpikingNetwork | None
    timesteps: int | None
    accuracy: float | None


def import_authors(
    checkpoint: str | Path | Mapping[str, Any],
    *,
    architecture: str | None = None,
    image_size: int | None = None,
    encoder: Encoder | None = None,
    surrogate: Surrogate | None = None,
) -> AuthorsNetwork:
    """Read a checkpoint of the authors' code; the module's text says what it may hold.

    Thresholds of an ANN's file are taken as Algorithm 1's: ``snn.scale_thresholds`` works on them.
    Those of an SNN's file are scaled already, so there it does nothing.

    Args:
        checkpoint: the file, or what ``torch.load`` made of it.
        architecture: one of ``ARCHITECTURES`` that the file has to be; found from the number and
            the channels of the layers by default. ``vgg11_ann`` is their ANN's VGG11 (and their
            later SNN's), ``vgg11`` that of the paper's SNN, ``resnet34_snn`` their SNN's ResNet-34.
        image_size: pixels of a side; 32, or 28 for grey images (MNIST), by default.
        encoder: of the spiking network; a Poisson encoder by default.
        surrogate: of the spiking network; the file's ``activation`` with their default α and β,
            over U/V, by default.

    Raises:
        ValueError: the file cannot be read, or layers are missing, unknown or of another shape;
            the message names them as the file does.
    """
    where, file = "the checkpoint", checkpoint  # type: str, Any
    if isinstance(checkpoint, str | Path):
        where = str(checkpoint)
        try:
            file = torch.load(checkpoint, weights_only=True, map_location="cpu")
        except Exception as error:
            raise ValueError(f"{where} cannot be read: {error}") from error
    state = file.get("state_dict") if isinstance(file, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(w, Tensor) for w in state.values()):
        raise ValueError(f"{where} is no checkpoint of the authors' code: it has no state_dict")
    weights = {name.removeprefix("module."): w for name, w in state.items()}
    try:
        network, ann = _ann(weights, architecture, image_size)
        snn = None
        if "thresholds" in file or "timesteps" in file:
            snn = _snn(ann, file, encoder or PoissonEncoder(0), surrogate)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    timesteps, accuracy = file.get("timesteps"), file.get("accuracy")
    return AuthorsNetwork(
        network,
        ann,
        snn,
        None if timesteps is None else int(timesteps),
        None if accuracy is None else float(accuracy),
    )


def _ann(
    weights: Mapping[str, Tensor], architecture: str | None, image_size: int | None
) -> tuple[dict[str, Any], nn.Module]:
    """The network that has these weights, and how it is built."""
    layers = sorted((name for name in weights if name.endswith(".weight")), key=_position)
    first = next((w for w in ("features.0.weight", "pre_process.0.weight") if w in weights), None)
    linear = [name for name in layers if name.startswith("classifier.")]
    if first is None or not linear:
        raise ValueError(
            "neither a VGG (features.0.weight, classifier.0.weight, …) nor a ResNet "
            f"(pre_process.0.weight, …): its layers are {', '.join(weights) or 'none'}"
        )
    for key in (first, linear[0], linear[-1]):
        if weights[key].dim() != (4 if key == first else 2):
            raise ValueError(f"{key} is {tuple(weights[key].shape)}, no weights of its kind")
    planes, in_channels = weights[first].shape[:2]
    name = architecture or _architecture(weights, layers)
    sizes: dict[str, Any] = {
        "in_channels": in_channels,
        "image_size": image_size or (28 if in_channels == 1 else 32),
        "num_classes": len(weights[linear[-1]]),
        "width": planes / 64,
    }
    if first == "features.0.weight":
        sizes["hidden"] = len(weights[linear[0]])
    with torch.device("meta"):  # no weights are drawn that the file's replace
        ann = build(name, **sizes).eval()
    names = _names(name)
    own = ann.state_dict()
    problems = [
        *(f"{key} is missing" for key in names if key not in weights),
        *(f"{key} is not known" for key in weights if key not in names),
        *(
            f"{key} is {tuple(weights[key].shape)}, allowed: {tuple(own[ours].shape)}"
            for key, ours in names.items()
            if key in weights and weights[key].shape != own[ours].shape
        ),
    ]
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        size = sizes["image_size"]
        raise ValueError(
            f"these are not the weights of a {name} for {in_channels}×{size}×{size} images: "
            + "; ".join(problems[:6])
            + more
        )
    state = {ours: weights[key].detach().clone() for key, ours in names.items()}
    ann.load_state_dict(state, assign=True)
    return {"architecture": name, **sizes}, ann


def _position(name: str) -> int:
    """3 of ``classifier.3.weight``."""
    number = re.search(r"\d+", name)
    return int(number[0]) if number else 0


def _architecture(weights: Mapping[str, Tensor], layers: list[str]) -> str:
    """Its name, by the channels of a VGG's convolutions or the number of a ResNet's blocks."""
    if "pre_process.0.weight" in weights:
        matches = (re.match(r"layer(\d)\.(\d+)\.", name) for name in layers)
        places = {(int(m[1]), m[2]) for m in matches if m}
        groups = [sum(group == g for group, _ in places) for g in (1, 2, 3, 4)]
        for name, blocks in RESNET.items():
            if blocks == groups:
                return name
        known = ", ".join(f"{name} {blocks}" for name, blocks in RESNET.items())
        raise ValueError(
            f"layer1 to layer4 have {groups} blocks; allowed: {known}. Say which one it should be "
            "(architecture=…) to learn which layers do not fit"
        )
    channels = {
        name.removesuffix(".weight"): len(weights[name])
        for name in layers
        if name.startswith("features.") and weights[name].dim() == 4
    }
    width = weights["features.0.weight"].shape[0] / 64
    for name, table in VGG.items():
        if [max(1, round(int(c) * width)) for c in table if c != A] == list(channels.values()):
            return name
    raise ValueError(
        "the convolutions' channels are none of the authors' VGGs: "
        + ", ".join(f"{name} {count}" for name, count in channels.items())
        + ". Say which one it should be (architecture=…) to learn which layers do not fit"
    )


def _names(architecture: str) -> dict[str, str]:
    """The authors' name of each weight → ours, in the order of a step."""
    if architecture in VGG:
        count = sum(entry != A for entry in VGG[architecture])
        names = {f"features.{3 * k}": f"conv{k + 1}" for k in range(count)}
        names |= {"classifier.0": "fc1", "classifier.3": "fc2", "classifier.6": "output"}
    else:
        names = {f"pre_process.{3 * k}": f"conv{k + 1}" for k in range(3)}
        for group, blocks in enumerate(RESNET[architecture], start=1):
            for block in range(blocks):
                theirs, ours = f"layer{group}.{block}", f"group{group}_block{block + 1}"
                names |= {f"{theirs}.residual.{3 * k}": f"{ours}.conv{k + 1}" for k in (0, 1)}
                if group > 1 and block == 0:
                    names[f"{theirs}.identity.0"] = f"{ours}.shortcut"
        names["classifier.0"] = "output"
    return {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in names.items()}


def _snn(
    ann: nn.Module, file: Mapping[str, Any], encoder: Encoder, surrogate: Surrogate | None
) -> SpikingNetwork:
    """The network with the file's thresholds and leak."""
    activation = file.get("activation", "STDB")
    if activation not in SURROGATE:
        raise ValueError(f"activation is {activation!r}; allowed: {', '.join(SURROGATE)}")
    leak = file.get("leak_mem", file.get("leak", 1.0))
    snn = convert(ann, encoder, surrogate or SURROGATE[activation], float(leak)).eval()
    layers = list(snn.neurons)
    preprocessing = [name for name in layers if name not in residual_layers(snn)]
    values = [float(v) for v in file.get("thresholds", ())]
    scaling = file.get("scaling_threshold")
    if scaling is not None:
        values = values[: len(layers)]  # those of old files may go on with the output layer's
    if len(values) not in (len(layers), len(preprocessing)):
        allowed = dict.fromkeys((len(layers), len(preprocessing)))
        raise ValueError(
            f"it has {len(values)} thresholds; allowed: {' or '.join(map(str, allowed))}, for "
            f"{', '.join(layers)}"
        )
    named = layers if len(values) == len(layers) else preprocessing
    thresholds = dict.fromkeys(layers, 1.0) | dict(zip(named, values, strict=True))
    scaled = "timesteps" in file and scaling is None
    snn.set_thresholds(thresholds, balanced=() if scaled else named)
    if scaling is not None:
        snn.scale_thresholds(float(scaling))
    return snn
