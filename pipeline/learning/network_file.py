"""The spiking network's file: what stdb.save keeps, and how its images are prepared."""

from pathlib import Path
from typing import Any

import stdb
from pipeline.data import Samples
from pipeline.learning.networks import described, recipe
from pipeline.params import Params, StdbParams


def write_network(
    snn: stdb.SpikingNetwork, params: Params, train: Samples, path: Path, timesteps: int
) -> None:
    """The network's file, with its T and all that image files have to become for it."""
    prepared = train.preparation
    resize: dict[str, Any] = {} if prepared.resize is None else {"resize": prepared.resize}
    stdb.save(
        snn,
        path,
        network=recipe(params.network, train),
        timesteps=timesteps,
        classes=train.classes,
        normalisation=prepared.normalisation,
        stdb=described(params.stdb) | taken(snn, params.stdb),
        **resize,
    )


def taken(snn: stdb.SpikingNetwork, params: StdbParams) -> dict[str, Any]:
    """The surrogate that was learned with, where ``stdb`` leaves something of it open."""
    surrogate = next(iter(snn.neurons.values())).surrogate
    there = {
        "surrogate": surrogate.name,
        "alpha": surrogate.alpha,
        "beta": surrogate.beta,
        "over_threshold": surrogate.over_threshold,
    }
    return {name: v for name, v in there.items() if getattr(params, name) in (None, "auto")}
