"""forward methods as people write them: what converts, what is refused, and with what words."""

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stdb


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu = nn.Conv2d(1, 4, 3, bias=False), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.ReLU(inplace=True)
        self.fc, self.aux = nn.Linear(144, 3, bias=False), nn.Linear(144, 2, bias=False)

    def features(self, x):
        return torch.flatten(self.relu(self.conv(x)), 1)

    def forward(self, x):
        return self.fc(self.features(x))


class Flag(Base):
    def forward(self, x, features=False, scale=1.0, *more, **named):
        x = self.features(x)
        return x if features else self.fc(x)


class Check(Base):
    def forward(self, x):
        assert x.dim() == 4
        assert x.ndim == len(x.shape)
        if x.shape[1] != 1 or x.size(0) < 1 or x.dtype == torch.int64:
            raise ValueError("not an image")
        return super().forward(x)


class Unused(Base):
    def forward(self, x):
        x = self.features(x)
        self.auxiliary = self.aux(x).softmax(1)
        return self.fc(x)


class Loop(Base):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"a": self.conv}), nn.Sequential(self.relu)])

    def forward(self, x):
        for k in range(x.shape[-1] // x.shape[-1]):
            x = self.layers[k]["a"](x)
        (x,) = (self.layers[1](x),)
        return self.fc(x.flatten(1))


class OwnConvolution(nn.Conv2d):
    """As people subclass a layer, with another default."""

    def extra_repr(self):
        return "own"


class Subclass(Base):
    def __init__(self):
        super().__init__()
        own = OwnConvolution(1, 4, 3, bias=False)
        own.load_state_dict(self.conv.state_dict())
        self.conv = own


def spikes_of(ann):
    """Logits and spikes of all layers."""
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1
    snn = stdb.convert(ann.eval(), stdb.PoissonEncoder(1))
    snn.set_thresholds(dict.fromkeys(snn.thresholds, 0.2))
    with torch.no_grad(), stdb.record_spikes(snn) as seen:
        return snn(images, 7), list(seen.spikes_per_neuron().values())


def same(one, other):
    (logits, spikes), (others, theirs) = spikes_of(one), spikes_of(other)
    assert logits.abs().max() > 0
    assert spikes == theirs
    return torch.equal(logits, others)


@pytest.mark.parametrize("kind", [Flag, Check, Unused, Loop, Subclass])
def test_what_only_looks_at_shapes_converts(kind):
    """Flags, assertions, helpers whose result nobody uses, loops, subclasses that add nothing."""
    assert same(kind(), Base())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.compile,
        lambda net: nn.Sequential(nn.DataParallel(net)),
        lambda net: torch.compile(nn.DataParallel(net)),
    ],
    ids=["DataParallel", "compile", "inside", "both"],
)
def test_what_wraps_a_network_is_taken_off(wrap):
    """Wherever it is."""
    assert same(wrap(Base()), Base())


class Later(Base):
    """A change in place, and a read of what was changed."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        x = self.relu(self.conv(x))
        y = self.conv2(x)
        return self.fc(torch.flatten(self.change(self, x, y), 1))


def through_a_name(m, _, y):
    m.relu2(y)  # in place, its result not used
    return y


def read_again(m, _, y):
    z = m.relu2(y)
    return z + y  # both are what it was changed to


def add_in_place(m, x, y):
    y += x
    again = y
    m.relu2(y)
    return again


def chained(m, x, y):
    y.add_(x)
    z = m.relu2(y)
    z += x
    return y


@pytest.mark.parametrize(
    ("change", "plain"),
    [
        (through_a_name, lambda m, _, y: m.relu2(y.clone())),
        (read_again, lambda m, _, y: (lambda z: z + z)(m.relu2(y.clone()))),
        (add_in_place, lambda m, x, y: m.relu2((x + y).clone())),
        (chained, lambda m, x, y: m.relu2((y + x).clone()) + x),
    ],
    ids=["through a name", "read again", "add", "chained"],
)
def test_a_change_in_place_is_seen_by_all_that_read_later(change, plain):
    """The SNN is that of the same network written without it; and the ANNs are the same."""
    one, other = Later(change), Later(plain)
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(one(images), other(images))
    assert same(one, other)


def a_part(m, _, y):
    m.relu2(y[:, :2])
    return y


def test_a_change_of_a_part_in_place_is_refused():
    """With both names; it was computed as if nothing had changed."""
    with pytest.raises(stdb.ConversionError, match=r"reads conv2, a part or another shape of what"):
        stdb.convert(Later(a_part), stdb.DirectEncoder())


class Usual(nn.Module):
    """A network with much that cannot spike."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 4, 5, padding=2), nn.GroupNorm(2, 4)
        self.pool1, self.tanh = nn.LPPool2d(2, 2), nn.Tanh()
        self.fc1, self.fc2 = nn.Linear(784, 16), nn.Linear(16, 10)

    def forward(self, x):
        x = self.pool1(F.gelu(self.norm(self.conv1(x))))
        x = x.reshape([x.shape[0], -1])
        return self.fc2(F.relu(self.tanh(self.fc1(x)) * x[:, :16]))


def test_all_places_are_refused_in_one_message():
    """With the remedy for each, so that one trains again once."""
    with pytest.raises(stdb.ConversionError) as error:
        stdb.convert(Usual(), stdb.PoissonEncoder(0))
    first, *places = str(error.value).splitlines()
    assert first == "5 places have no spiking form:"
    for place, what in zip(places, ["norm", "gelu", "pool1", "tanh", "mul"], strict=True):
        assert what in place
        assert "; " in place


class Standardised(nn.Conv2d):
    """A layer with a forward method of its own."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean())


class Scalar(nn.Sequential):
    """Returns one number for the whole batch."""

    def forward(self, x):
        return super().forward(x).mean()


class Looks(Base):
    def forward(self, x):
        return super().forward(x) if x.max() > 0 else self.fc(self.features(-x))


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(Base())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Looks, "control flow that depends on the data"),
        (lambda: nn.Sequential(Standardised(1, 2, 3, bias=False)), r"forward of 0\)|0.weight is a"),
        (lambda: Scalar(nn.Conv2d(1, 2, 3, bias=False)), r"it returns \(\) for a batch of"),
        (scripted, "scripted by torch.jit; allowed: the nn.Module that it was made from"),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.Linear(999, 3)),
            "it fails on im",
        ),
    ],
    ids=["pixels", "own forward", "a number", "scripted", "fails"],
)
def test_what_cannot_be_traced_is_refused_with_the_cause(make, message):
    """Not with another one."""
    with pytest.raises(stdb.ConversionError, match=message):
        stdb.convert(make(), stdb.PoissonEncoder(0))


def test_an_example_says_what_images_are():
    """Where usual sizes do not fit, as 300 pixels in a network that takes nothing else."""
    net = nn.Sequential(
        nn.Conv2d(3, 2, 3, 4, bias=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(2 * 75 * 100, 3, bias=False),
    )  # fmt: skip
    with pytest.raises(stdb.ConversionError, match=r"give a batch of images: example="):
        stdb.convert(net, stdb.DirectEncoder())
    snn = stdb.convert(net, stdb.DirectEncoder(), example=torch.zeros(1, 3, 300, 400))
    assert snn(torch.rand(1, 3, 300, 400), 2).shape == (1, 3)
    with pytest.raises(stdb.ConversionError, match=r"it fails on images of \(3, 8, 8\) \("):
        stdb.convert(net, stdb.DirectEncoder(), example=torch.zeros(1, 3, 8, 8))


def test_conversions_in_several_threads():
    """torch.fx changes nn.Module while it traces; two at once did not work."""
    converted, expected = [], ["conv"]

    def convert():
        converted.append(list(stdb.convert(Base(), stdb.PoissonEncoder(0)).thresholds))

    threads = [threading.Thread(target=convert) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert converted == [expected] * 6
