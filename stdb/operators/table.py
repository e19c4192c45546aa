"""All operators, by the names that a saved network has for them: a table to add to."""

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from ..activations import QCFS, Clip
from . import Operator
from .boundary import Input, Neuron
from .convolution import Convolution, TransposedConvolution
from .cutting import Ordering, Padding, Slicing
from .diagonal import Scale
from .joining import Concat
from .linear import FullyConnected
from .maximum import MaxPool
from .pooling import AdaptiveAveragePool, AveragePool, SignalAveragePool
from .resizing import PixelShuffle, PixelUnshuffle, Upsampling
from .shaping import Dropout, Flatten, Sum

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        Input(),
        Convolution(),
        FullyConnected(),
        Neuron(),
        AveragePool(),
        AdaptiveAveragePool(),
        MaxPool(),
        Dropout(),
        Flatten(),
        Sum(),
        Scale(),
        Concat(),
        Slicing(),
        Ordering(),
        Padding(),
        TransposedConvolution(),
        SignalAveragePool(),
        Upsampling(),
        PixelShuffle(),
        PixelUnshuffle(),
    )
}


BATCHES: dict[tuple[type[nn.Module], ...], int] = {  # what takes batches of so many dimensions
    (nn.Conv2d, nn.ConvTranspose2d, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d): 4,
    (nn.Conv1d, nn.ConvTranspose1d, nn.AvgPool1d, nn.MaxPool1d, nn.AdaptiveAvgPool1d): 3,
    (nn.Linear,): 2,
}
COMPUTING = ("forward", "_conv_forward", "__call__")  # methods of which one makes another layer


def is_operation(kind: type) -> bool:
    """Whether what such a module does is one operation: torch's are, and our activations."""
    return kind.__module__.partition(".")[0] == "torch" or kind in (Clip, QCFS)


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The type of module that it computes as: of a subclass that changes nothing, its base."""
    own = type_before_parametrizations(module)
    for kind in own.__mro__:
        if is_operation(kind) and issubclass(kind, nn.Module):
            same = all(getattr(own, n, None) is getattr(kind, n, None) for n in COMPUTING)
            return kind if same else own
    return own


def dimensions_of(module: nn.Module | None) -> int | None:
    """How many dimensions a batch has that a module takes; None where it takes several."""
    return next((n for these, n in BATCHES.items() if isinstance(module, these)), None)


def kinds() -> list[type[nn.Module]]:
    """The types of modules that become an operator."""
    return [kind for operator in OPERATORS.values() for kind in operator.kinds]


def operator_for(kind: type[nn.Module]) -> Operator | None:
    """What a module of this type becomes; None where it has no operator."""
    return next((o for o in OPERATORS.values() if kind in o.kinds), None)
