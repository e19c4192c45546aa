"""All operators, by the names that a saved network has for them: a table to add to."""

from torch import nn

from . import Operator
from .boundary import Input, Neuron
from .convolution import Convolution
from .linear import FullyConnected
from .pooling import AveragePool
from .shaping import Dropout, Flatten, Sum

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        Input(),
        Convolution(),
        FullyConnected(),
        Neuron(),
        AveragePool(),
        Dropout(),
        Flatten(),
        Sum(),
    )
}


def kinds() -> list[type[nn.Module]]:
    """The types of modules that become an operator."""
    return [kind for operator in OPERATORS.values() for kind in operator.kinds]


def operator_for(kind: type[nn.Module]) -> Operator | None:
    """What a module of this type becomes; None where it has no operator."""
    return next((o for o in OPERATORS.values() if kind in o.kinds), None)
