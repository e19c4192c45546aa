"""What a refusal advises is there, and works in the place of what was refused."""

import re

import pytest
import torch
from torch import nn

import stdb
from stdb.rules.remedies import CALL_REMEDIES, REMEDIES

ARGUMENTS = {  # of layers that need some; by the name without what it is of
    **dict.fromkeys(("Conv", "ConvTranspose"), (4, 4, 3)),
    **dict.fromkeys(("BatchNorm", "InstanceNorm"), (4,)),
    **dict.fromkeys(("MaxPool", "AvgPool"), (2,)),
    **dict.fromkeys(("AdaptiveMaxPool", "AdaptiveAvgPool"), (2,)),
    **{"FractionalMaxPool": (2, 3), "LPPool": (2, 2), "Threshold": (0.5, 0.0), "Softmin": (1,)},
    **{"LayerNorm": (6,), "GroupNorm": (1, 4), "RMSNorm": (6,), "LocalResponseNorm": (2,)},
}


def network(name):
    """The layer of torch.nn behind a convolution, which a ReLU follows; and an example."""
    torch.manual_seed(0)
    layer = getattr(nn, name)(*ARGUMENTS.get(re.sub("[123]d$", "", name), ()))
    signals = name.endswith("1d")
    conv, average = (nn.Conv1d, nn.AvgPool1d) if signals else (nn.Conv2d, nn.AvgPool2d)
    outputs = nn.AdaptiveAvgPool1d(1) if signals else nn.AdaptiveAvgPool2d(1)
    layers = conv(3, 4, 3, padding=1), nn.ReLU(), average(1), layer, outputs, nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(4, 5)), torch.rand(2, 3, *[6] * (2 - signals))


def names_in(remedy):
    return re.findall(r"nn\.(\w+)", remedy)


@pytest.mark.parametrize("kind", REMEDIES, ids=lambda kind: kind.__name__)
def test_a_layer_is_refused_with_its_remedy(kind):
    """Also where the network cannot be traced: a layer that takes volumes."""
    ann, example = network(kind.__name__)
    with pytest.raises(stdb.ConversionError) as error:
        stdb.convert(ann.eval(), stdb.DirectEncoder(), example=example)
    said = f"layer 3 is a {kind.__name__}, which has no spiking form; {REMEDIES[kind]}"
    assert said in str(error.value)
    assert names_in(said.partition("; ")[2]) or "leave it out" in said


@pytest.mark.parametrize("name", sorted({n for r in REMEDIES.values() for n in names_in(r)}))
def test_a_layer_that_a_remedy_names_converts(name):
    """In the place of the one that was refused."""
    ann, example = network(name)
    stdb.convert(ann.eval(), stdb.DirectEncoder(), example=example)


def test_what_a_remedy_of_a_call_names_is_there():
    """They are those of layers."""
    assert set(CALL_REMEDIES.values()) <= set(REMEDIES.values())
