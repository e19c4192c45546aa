"""Networks as params.yaml and earlier stages' files say: built, loaded, saved, made spiking."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import stdb
from pipeline.data import Samples
from pipeline.errors import StageError
from pipeline.files import ANN, THRESHOLDS, read_json, writing
from pipeline.jobs.worker import Worker
from pipeline.params import NetworkParams, StdbParams


def recipe(params: NetworkParams, data: Samples) -> dict[str, Any]:
    """Arguments of ``stdb.build_network`` for a data set's images and classes."""
    channels, _, size = data.shape
    fitting = {"in_channels": channels, "image_size": size, "num_classes": len(data.classes)}
    return params.model_dump() | fitting


def build_ann(params: NetworkParams, data: Samples) -> nn.Module:
    """The ANN for a data set's images and classes, weights drawn from torch's generator."""
    try:
        return stdb.build_network(**recipe(params, data))
    except ValueError as error:
        raise StageError(f"network: {error}") from error


def use_threads(worker: Worker, ann: nn.Module, data: Samples, batch_size: int) -> None:
    """Compute with as many threads as a network's batch is worth."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        image = torch.zeros(1, *data.shape, device=worker.device)
        training = ann.training
        ann.eval()(image)
        ann.train(training)
    operations = counter.get_total_flops() / 2  # a multiply-accumulate counts as two
    worker.use_threads(operations * batch_size / worker.world)


def build_snn(ann: nn.Module, params: StdbParams, seed: int) -> stdb.SpikingNetwork:
    """The ANN converted as ``stdb`` says: encoder, surrogate, leak."""
    surrogate = stdb.SURROGATES[params.surrogate](params.alpha, params.beta, params.over_threshold)
    return stdb.convert(
        ann,
        stdb.encoder_of(params.encoder, seed),
        surrogate,
        params.leak,
        temporal_gradient=params.temporal_gradient,
        learn_thresholds=params.learn_thresholds,
        learn_leaks=params.learn_leaks,
        chunk=params.chunk,
        dropout_seed=seed,
        precision=torch.bfloat16 if params.precision == "bf16" else None,
    )


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


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a state dict into a network of the same layers.

    Args:
        network: takes the weights.
        path: .safetensors, or a file of ``torch.save`` (read with ``weights_only=True``).

    Raises:
        StageError: the file cannot be read, or belongs to another network; says which layers.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            state = torch.load(path, weights_only=True, map_location="cpu")
            state = state.get("state_dict", state)
    except Exception as error:
        raise StageError(f"the weights file {path} cannot be read: {error}") from error
    own = network.state_dict()
    problems = [
        *(f"{name} is missing" for name in own if name not in state),
        *(f"{name} is not known" for name in state if name not in own),
        *(
            f"{name} is {tuple(state[name].shape)}, the network's is {tuple(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ),
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise StageError(
            f"the weights in {path} belong to another network than network.* describes: "
            + "; ".join(problems[:4])
            + more
        )
    network.load_state_dict(state)


def load_thresholds(snn: stdb.SpikingNetwork, path: Path) -> None:
    """Set a network's thresholds to the balanced ones; an error if they are another network's."""
    try:
        layers = read_json(path)["layers"]
        snn.set_thresholds(
            {row["layer"]: row["threshold"] for row in layers},
            balanced=[row["layer"] for row in layers if row["balanced"]],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StageError(f"{path}: {error}; run balance_thresholds for this network") from error


def load_converted(
    network: NetworkParams, params: StdbParams, data: Samples, root: Path = Path()
) -> tuple[nn.Module, stdb.SpikingNetwork]:
    """The trained ANN, and the spiking network that it is converted to, at its balanced thresholds.

    Args:
        network: params.yaml's.
        params: params.yaml's, of the spiking network.
        data: a split, whose images and classes the network is for.
        root: the repository, with weights and thresholds.

    Raises:
        StageError: weights or thresholds are another network's.
    """
    ann = build_ann(network, data)
    load_weights(ann, root / ANN)
    snn = build_snn(ann, params, params.seed)
    load_thresholds(snn, root / THRESHOLDS)
    return ann, snn
