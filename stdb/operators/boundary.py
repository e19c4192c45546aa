"""Where the linear operators begin and end: the network's input, and the neurons."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..activations import QCFS, Clip
from . import Operator


class Input(Operator):
    """What the encoder gives; the first node, and the only one without inputs."""

    name = "input"


class Neuron(Operator):
    """A layer of spiking neurons (Eq. 2). It has a state, so the presentation runs it."""

    name = "neuron"
    kinds: ClassVar = {
        **{nn.ReLU: (), nn.ReLU6: (), nn.Hardtanh: ("min_val", "max_val")},
        **{Clip: (), QCFS: ("levels",)},
    }
    fires = True
    lowered = True

    def fan_out(self, module: Any, targets: Tensor, position: int, shape: torch.Size) -> Tensor:
        """A current drives its neuron."""
        return torch.ones_like(targets)
