"""The spiking network's file: what stdb.save keeps, and how its images are prepared."""

from pathlib import Path

import stdb
from pipeline.data import Samples
from pipeline.learning.networks import described, recipe
from pipeline.params import Params


def write_network(
    snn: stdb.SpikingNetwork, params: Params, train: Samples, path: Path, timesteps: int
) -> None:
    """The network's file, with its T and all that image files have to become for it."""
    prepared = train.preparation
    resize = {} if prepared.resize is None else {"resize": prepared.resize}
    stdb.save(
        snn,
        path,
        network=recipe(params.network, train),
        timesteps=timesteps,
        classes=train.classes,
        normalisation=prepared.normalisation,
        stdb=described(params.stdb),
        **resize,
    )
