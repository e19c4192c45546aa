"""The section ``network`` of params.yaml."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from pipeline.learning.published import PREFIX, unknown
from pipeline.typed import Rate, Section, one_of, shown
from stdb import ACTIVATIONS, ARCHITECTURES


class NetworkParams(Section):
    """The network; see ``stdb.build``."""

    architecture: str
    """A name of ``stdb.ARCHITECTURES``, ``torchvision:NAME`` for one of its classification
    networks, or ``module:function`` of your own, called with (in_channels, image_size,
    num_classes)."""
    width: Annotated[float, Field(gt=0, le=100)]
    """Factor of the channels of every convolution, above 0, up to 100; the paper's is 1."""
    hidden: Annotated[int, Field(ge=1, le=2**20)]
    """Neurons of each of a VGG's hidden linear layers; the paper's is 4096."""
    dropout: Rate
    """Dropout probability after convolutions, in [0, 1)."""
    classifier_dropout: Rate
    """Dropout probability after hidden linear layers, in [0, 1)."""
    normalisation: Literal["none", "batch"] = "none"
    """What follows every convolution of a name of ``stdb.ARCHITECTURES``: nothing, the paper's way,
    or a batch norm, which the conversion folds into the weights."""
    pooling: Literal["average", "max"] = "average"
    """The pooling of a name of ``stdb.ARCHITECTURES``; the paper's is the average."""
    activation: Annotated[str, AfterValidator(one_of(ACTIVATIONS))] = "relu"
    """The activation of a name of ``stdb.ARCHITECTURES``: ``relu``, the paper's, or for few steps
    one whose bound A learns, one for each layer: ``clip``, y = clamp(x, 0, A), or ``qcfs``, the
    same in as many steps as ``levels`` says."""
    levels: Annotated[int, Field(ge=1, le=65536)] | None = None
    """L of ``qcfs``, 1 to 65536: 4 for T of 1 to 4, 8 for T from 8 on; None for the others."""

    @model_validator(mode="after")
    def _known(self) -> "NetworkParams":
        name = self.architecture
        if name.startswith(PREFIX):
            if said := unknown(name):
                raise ValueError(f"architecture is {shown(name)}; allowed: {said}")
        elif name not in ARCHITECTURES and not re.fullmatch(r"[\w.]+:\w+", name):
            raise ValueError(
                f"architecture is {shown(name)}; allowed: {', '.join(ARCHITECTURES)}, "
                f"{PREFIX}NAME, or your_module:function"
            )
        return self

    @model_validator(mode="after")
    def _levels_are_of_qcfs(self) -> "NetworkParams":
        if self.activation == "qcfs" and self.levels is None:
            raise ValueError("levels is null with activation: qcfs; allowed: 1 to 65536")
        if self.activation != "qcfs" and self.levels is not None:
            raise ValueError(
                f"levels is {self.levels} with activation: {self.activation}; allowed: null, or "
                "a number with activation: qcfs"
            )
        if self.activation != "relu" and self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"activation is {self.activation} with architecture {shown(self.architecture)}; "
                f"allowed: relu, or one of {', '.join(ARCHITECTURES)}; a network of your own may "
                "hold stdb.Clip and stdb.QCFS"
            )
        return self
