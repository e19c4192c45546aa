"""Networks as params.yaml and earlier stages' files say: built, loaded, saved, made spiking."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import stdb
from pipeline.data import Samples
from pipeline.errors import StageError
from pipeline.files import ANN, BALANCED, THRESHOLDS
from pipeline.handed_on import read_thresholds
from pipeline.jobs.worker import Worker
from pipeline.learning import published
from pipeline.learning.balanced import AGAIN, keep_fixed, load_balanced
from pipeline.learning.checks import build_own, check_room
from pipeline.learning.weights import load_weights, network_of, save_weights
from pipeline.params import NetworkParams, StdbParams

__all__ = [
    "build_ann",
    "build_snn",
    "configure",
    "described",
    "example_of",
    "load_converted",
    "load_given",
    "load_handed_on",
    "load_thresholds",
    "load_weights",
    "recipe",
    "save_weights",
    "surrogate_of",
    "use_surrogate",
    "use_threads",
]


def described(params: NetworkParams | StdbParams) -> dict[str, Any]:
    """A section as a file has it; what 0.1.0 did not know is there where it is chosen."""
    fields = type(params).model_fields
    optional = {n: f.default for n, f in fields.items() if not f.is_required()}
    return {n: v for n, v in params.model_dump().items() if n not in optional or v != optional[n]}


def recipe(params: NetworkParams, data: Samples) -> dict[str, Any]:
    """Arguments of ``stdb.build_network`` for a data set's images and classes."""
    channels, *size = data.shape
    fitting = {
        "in_channels": channels,
        "image_size": size[0] if size[0] == size[1] else tuple(size),
        "num_classes": len(data.classes),
    }
    return described(params) | fitting


def build_ann(params: NetworkParams, data: Samples) -> nn.Module:
    """The ANN for a data set's images and classes, weights drawn from torch's generator.

    Raises:
        StageError: it does not fit the memory, or the images; your own: anything that it raises.
    """
    arguments = recipe(params, data)
    if ":" in params.architecture:  # torchvision's, or a function
        return build_own(arguments, data.shape)
    try:
        check_room(arguments)
        return stdb.build_network(**arguments)
    except ValueError as error:
        raise StageError(f"network: {error}") from error


def load_given(ann: nn.Module, params: NetworkParams, path: Path) -> int | None:
    """Weights of a file of anyone's.

    Returns:
        The number of classes of the file, where it is another and the layer that gives them is left
        as it was drawn, as of ``torchvision:`` networks; else None.

    Raises:
        StageError: they are another network's, or were trained with another activation.
    """
    of_torchvision = params.architecture.startswith(published.PREFIX)
    classes = load_weights(ann, path, published.head(ann) if of_torchvision else None)
    for key, there in network_of(path).items():
        if key in ("activation", "levels") and there != (wanted := getattr(params, key)):
            raise StageError(
                f"the weights in {path} were trained with {key}: {there}, and network.{key} is "
                f"{wanted}; allowed: {there}"
            )
    return classes


def example_of(data: Samples) -> Tensor:
    """(B, C, H, W): the first images of a split, as networks see them, to check a conversion with.

    Two, since the check computes in float64. Zeros would hide what a rewriting does to pixels.
    """
    return data.take(torch.arange(min(2, len(data)))).pixels()


def use_threads(worker: Worker, ann: nn.Module, data: Samples, batch_size: int) -> float:
    """Compute with as many threads as a network's batch is worth.

    Returns:
        Multiply-accumulates of an image.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        image = torch.zeros(1, *data.shape, device=worker.device)
        training = ann.training
        ann.eval()(image)
        ann.train(training)
    operations = float(counter.get_total_flops()) / 2  # a multiply-accumulate counts as two
    worker.use_threads(operations * batch_size / worker.world)
    return operations


def build_snn(
    ann: nn.Module, params: StdbParams, seed: int, data: Samples | None = None
) -> stdb.SpikingNetwork:
    """The ANN converted as ``stdb`` says: encoder, surrogate, leak.

    Poisson spikes of pixels beyond ±1 stand for the largest that their normalisation allows.

    Args:
        ann: stays as it is.
        params: params.yaml's, of the spiking network.
        seed: of its spikes and dropout masks.
        data: whose images it is for; None: of a usual size, and within ±1.
    """
    example = None if data is None else example_of(data)
    snn = stdb.convert(ann, **_rules(params, seed, data), example=example)
    _set_computation(snn, params, seed)
    for name, module in list(snn.net.named_modules()):  # what is folded has no gradient any more
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            snn.net.set_submodule(name, nn.Identity())
    return snn


def configure(
    snn: stdb.SpikingNetwork, params: StdbParams, seed: int, data: Samples | None = None
) -> None:
    """Set all that ``stdb`` says of a network that was not converted here, as of a file.

    Weights, V and U_0 stay. Arguments as for :func:`build_snn`.
    """
    stdb.configure(snn, **_rules(params, seed, data))
    _set_computation(snn, params, seed)


def _rules(params: StdbParams, seed: int, data: Samples | None) -> dict[str, Any]:
    """Arguments of ``stdb.convert`` and ``stdb.configure``."""
    encoder = stdb.encoder_of(params.encoder, seed)
    if data is not None and isinstance(encoder, stdb.PoissonEncoder):
        limits = data.preparation.normalisation.largest
        if max(limits) > 1:
            encoder = replace(encoder, limits=limits)
    return {
        "encoder": encoder,
        "surrogate": surrogate_of(params),
        "leak": params.leak,
        "temporal_gradient": params.temporal_gradient,
        "learn_thresholds": params.learn_thresholds,
        "learn_leaks": params.learn_leaks,
    }


def _set_computation(snn: stdb.SpikingNetwork, params: StdbParams, seed: int) -> None:
    """How it is computed, and the seed of its dropout masks."""
    snn.chunk, snn.dropout_seed = params.chunk, seed
    snn.precision = torch.bfloat16 if params.precision == "bf16" else None  # auto: no job's
    snn.events = None if params.events == "auto" else params.events


def surrogate_of(params: StdbParams) -> stdb.Surrogate:
    """The surrogate that ``stdb`` asks for, at its first T."""
    return stdb.surrogate_of(
        params.surrogate, params.first_timesteps, params.alpha, params.beta, params.over_threshold
    )


def use_surrogate(snn: stdb.SpikingNetwork, params: StdbParams) -> None:
    """Give a network the surrogate of another T."""
    for neuron in snn.neurons.values():
        neuron.surrogate = surrogate_of(params)


def load_thresholds(snn: stdb.SpikingNetwork, path: Path) -> None:
    """Set a network's thresholds to the balanced ones.

    Raises:
        StageError: they are another network's, or no thresholds; names file and key.
    """
    layers = read_thresholds(path).layers
    try:
        snn.set_thresholds(
            {row.layer: row.threshold for row in layers},
            balanced=[row.layer for row in layers if row.balanced],
        )
    except ValueError as error:
        raise StageError(f"{path}: {error}; {AGAIN}") from error


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
        StageError: weights or thresholds are another network's, or the encoder cannot fire at the
            images.
    """
    ann = build_ann(network, data)
    load_weights(ann, root / ANN)
    return ann, load_handed_on(ann, network, params, data, root)


def load_handed_on(
    ann: nn.Module, network: NetworkParams, params: StdbParams, data: Samples, root: Path
) -> stdb.SpikingNetwork:
    """The spiking network of a trained ANN as balance_thresholds left it.

    It is read as a whole, or converted and given its thresholds where they say it all. What
    ``stdb`` says of it is set here: encoder, surrogate, leak, and what learns.

    Raises:
        StageError: its files are another network's; names file and key.
    """
    path = root / BALANCED
    whole = load_balanced(path, recipe(network, data))
    if whole is not None:
        configure(whole, params, params.seed, data)
        keep_fixed(ann, whole, path)
        return whole.to(next(ann.parameters()).device)
    snn = build_snn(ann, params, params.seed, data)
    if snn.has_units:
        raise StageError(
            f"{path} is of another network, one without biases or batch norm: it has no weights; "
            f"{AGAIN}"
        )
    load_thresholds(snn, root / THRESHOLDS)
    return snn
