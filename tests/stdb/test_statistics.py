"""Spike statistics: fan-out against brute force, everything else against numbers made by hand."""

import pytest
import torch
from torch import nn

import stdb


def conv(i, o, stride=1, kernel=3, padding=1, **options):
    """No bias."""
    return nn.Conv2d(i, o, kernel, stride, padding, bias=False, **options)


def linear(i, o):
    """No bias."""
    return nn.Linear(i, o, bias=False)


def convert(net, encoder=None):
    """With direct input, in evaluation."""
    return stdb.convert(net.eval(), encoder or stdb.DirectEncoder())


# -- fan-out -------------------------------------------------------------------------------------


class Probe(nn.Module):
    """In the place of a ReLU: keeps its input, gives a fresh leaf to what follows."""

    def forward(self, x):
        """Cut the network here."""
        self.current = x
        self.spikes = torch.ones_like(x, requires_grad=True)
        return self.spikes


def brute_force(net, names, shape):
    """Synapses that each neuron drives, as derivatives.

    All weights are 1 and pooling sums, so the derivative of the next layers' currents with respect
    to one spike is the number of synapses between them.
    """
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.ReLU):
            net.set_submodule(name, Probe())
        elif isinstance(module, nn.AvgPool2d):
            module.divisor_override = 1
    for weight in net.parameters():
        nn.init.ones_(weight)
    image = torch.ones(1, *shape, dtype=torch.float64, requires_grad=True)
    output = net.double().eval()(image)
    probes = [m for m in net.modules() if isinstance(m, Probe)]
    currents = [output, *(probe.current for probe in probes)]
    leaves = [image, *(probe.spikes for probe in probes)]
    total = sum(current.sum() for current in currents)
    counts = torch.autograd.grad(total, leaves)
    return dict(zip(["input", *names], [count[0] for count in counts], strict=True))


class Residual(nn.Module):
    """Two basic blocks, one with a projection; neurons also reach the output directly."""

    def __init__(self):
        """Odd sizes, so that strides and poolings leave borders."""
        super().__init__()
        self.first, self.relu = conv(2, 3), nn.ReLU()
        self.same, self.change = stdb.ResidualBlock(3, 3), stdb.ResidualBlock(3, 4, stride=2)
        self.out, self.direct = linear(64, 5), linear(147, 5)

    def forward(self, x):
        """Blocks one after the other, and a skip to the output."""
        x = self.relu(self.first(x))
        skip = torch.flatten(x, 1)
        return self.out(torch.flatten(self.change(self.same(x)), 1)) + self.direct(skip)


class AddedToOutput(nn.Module):
    """Spikes that are added to the logits without a weight."""

    def __init__(self):
        """Three neurons for three logits."""
        super().__init__()
        self.first, self.relu, self.out = linear(8, 3), nn.ReLU(), linear(3, 3)

    def forward(self, x):
        """Weighted and unweighted."""
        x = self.relu(self.first(torch.flatten(x, 1)))
        return self.out(x) + x


def plain(*layers):
    """A Sequential that makes a fresh network each time."""
    return lambda: nn.Sequential(*(layer() for layer in layers))


FAN_OUT = {
    "borders": (plain(lambda: conv(2, 3), nn.ReLU, nn.Flatten, lambda: linear(75, 4)), (2, 5, 5)),
    "no padding": (
        plain(lambda: conv(1, 2, padding=0), nn.ReLU, lambda: conv(2, 3, padding=0)),
        (1, 6, 5),
    ),
    "stride": (plain(lambda: conv(2, 3, 2), nn.ReLU, lambda: conv(3, 2, 3)), (2, 8, 6)),
    "groups and dilation": (
        plain(lambda: conv(4, 6, groups=2), nn.ReLU, lambda: conv(6, 3, dilation=2)),
        (4, 6, 6),
    ),
    "pooling before a convolution": (
        plain(
            lambda: conv(2, 3), nn.ReLU, lambda: nn.AvgPool2d(2), lambda: conv(3, 5), nn.ReLU,
            nn.Dropout, nn.Flatten, lambda: linear(45, 4),
        ),
        (2, 6, 6),
    ),
    "pooling that leaves a border out": (
        plain(lambda: conv(1, 2), nn.ReLU, lambda: nn.AvgPool2d(2), lambda: conv(2, 1)),
        (1, 7, 5),
    ),
    "overlapping and padded pooling": (
        plain(lambda: conv(1, 2), nn.ReLU, lambda: nn.AvgPool2d(3, 2, 1), lambda: conv(2, 1)),
        (1, 7, 5),
    ),
    "pooling that rounds up": (
        plain(
            lambda: conv(1, 2), nn.ReLU, lambda: nn.AvgPool2d(2, ceil_mode=True), lambda: conv(2, 1)
        ),
        (1, 7, 5),
    ),
    "pooling of the input": (
        plain(lambda: nn.AvgPool2d(2), lambda: conv(1, 2), nn.ReLU, lambda: conv(2, 1)),
        (1, 6, 6),
    ),
    "shortcuts": (Residual, (2, 7, 7)),
    "added to the output": (AddedToOutput, (2, 2, 2)),
}  # fmt: skip


@pytest.mark.parametrize("case", FAN_OUT)
def test_fan_out(case):
    """Borders, strides, poolings and shortcuts: each neuron's synapses are the real ones."""
    make, shape = FAN_OUT[case]
    snn = convert(make())
    found = stdb.fan_out(snn, shape)
    expected = brute_force(make(), list(snn.thresholds), shape)
    assert list(found) == list(expected)
    for name, count in expected.items():
        assert count.max() > 0
        assert torch.equal(found[name], count), name


MAPS = {  # between a layer of neurons with 4 channels and a convolution
    "max pooling": (nn.MaxPool2d(3, 2, 1, dilation=1), nn.Conv2d, (5, 6)),
    "dilated max pooling": (nn.MaxPool2d(2, 1, dilation=2), nn.Conv2d, (5, 6)),
    "adaptive average": (nn.AdaptiveAvgPool2d((3, 4)), nn.Conv2d, (5, 6)),
    "nearest": (nn.Upsample(scale_factor=2), nn.Conv2d, (3, 4)),
    "bilinear": (nn.Upsample(size=(7, 5), mode="bilinear"), nn.Conv2d, (3, 4)),
    "bilinear to corners": (nn.UpsamplingBilinear2d((5, 7)), nn.Conv2d, (3, 4)),
    "pixel shuffle": (nn.PixelShuffle(2), nn.Conv2d, (3, 4)),
    "pixel unshuffle": (nn.PixelUnshuffle(2), nn.Conv2d, (4, 6)),
    "reflection": (nn.ReflectionPad2d((1, 2, 0, 1)), nn.Conv2d, (3, 4)),
    "zeros": (nn.ZeroPad2d((1, -1, 0, 1)), nn.Conv2d, (3, 4)),
    "average of a signal": (nn.AvgPool1d(3, 2, 1, True, False), nn.Conv1d, (8,)),
    "max of a signal": (nn.MaxPool1d(3, 2), nn.Conv1d, (8,)),
    "linear": (nn.Upsample(scale_factor=1.5, mode="linear"), nn.Conv1d, (6,)),
    "channel dropout": (nn.Dropout1d(0.3), nn.Conv1d, (6,)),
    "transposed": (None, nn.ConvTranspose2d, (3, 4)),
    "transposed signal": (None, nn.ConvTranspose1d, (5,)),
    "signal": (None, nn.Conv1d, (7,)),
}


@pytest.mark.parametrize("case", MAPS)
def test_fan_out_by_one_spike_at_a_time(case):
    """Each neuron spikes alone: the values that it reaches, and the synapses that those drive."""
    middle, kind, pixels = MAPS[case]
    torch.manual_seed(0)
    one = nn.Conv1d if len(pixels) == 1 else nn.Conv2d
    first, middle = one(2, 4, 1), (middle or nn.Identity()).eval()
    channels = middle(torch.zeros(1, 4, *pixels)).shape[1]
    groups = 2 if channels % 2 == 0 else 1
    last = kind(channels, 2 * groups, 3, 2, 1, groups=groups).double()
    layers = [first, middle, nn.ReLU(), last] if "max" in case else [first, nn.ReLU(), middle, last]
    snn = convert(nn.Sequential(*layers).double())
    spikes = torch.eye(4 * torch.Size(pixels).numel()).view(-1, 4, *pixels).double()
    reached = middle(spikes) > 1e-9  # whatever pools: maxima of zeros and ones, too
    single = torch.eye(reached[0].numel()).view(-1, *reached.shape[1:]).double()
    synapses = (last(single) != last(0 * single[:1])).flatten(1).sum(1).double()
    expected = (reached.flatten(1).double() @ synapses).view(4, *pixels)
    if "max" in case:  # the currents that it pools are those of the layer below
        found = stdb.fan_out(snn, (2, *pixels))["0"]
        synapses = synapses.view(reached.shape[1:])
        assert torch.equal(found, synapses)
        driven = snn.graph.nodes[2].operator.fan_out(
            middle, torch.ones(reached.shape[1:]).double(), 0, torch.Size((4, *pixels))
        )
        assert torch.equal(driven, reached.flatten(1).sum(1).double().view(4, *pixels))
        return
    assert torch.equal(stdb.fan_out(snn, (2, *pixels))["0"], expected)


def test_fan_out_by_hand():
    """A corner of a 3×3 convolution reaches 4 places, an edge 6, the middle 9: × 5 channels."""
    found = stdb.fan_out(convert(nn.Sequential(conv(1, 1), nn.ReLU(), conv(1, 5))), (1, 3, 3))
    by_hand = torch.tensor([[4, 6, 4], [6, 9, 6], [4, 6, 4]], dtype=torch.float64)
    assert torch.equal(found["input"][0], by_hand)
    assert torch.equal(found["0"][0], 5 * by_hand)


# -- counting ------------------------------------------------------------------------------------


def counted():
    """Two inputs → three neurons → two logits: input 0 drives neuron 0 over V at every step.

    Neuron 1 gets half of V from input 1, and fires at every second step from the third on (U has
    to exceed V); neuron 2 never fires.
    """
    net = nn.Sequential(nn.Flatten(), linear(2, 3), nn.ReLU(), linear(3, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.5, 0], [0, 0.5], [0, -1]]))
    return net


TRAIN = torch.ones(7, 1, 1, 1, 2)  # seven steps, both inputs spike at each


def test_spikes_per_neuron_by_hand():
    """Neuron 0 fires 7 times, 1 at t = 3, 5 and 7, 2 never: 10 spikes ÷ 3 neurons."""
    snn = convert(counted(), stdb.SpikeTrain(TRAIN))
    with stdb.record_spikes(snn, trains=True) as statistics, torch.no_grad():
        snn(torch.zeros(1, 1, 1, 2), 7)
    train = statistics.train("1")[:, 0]
    assert train[:, 0].tolist() == [1] * 7
    assert train[:, 1].tolist() == [0, 0, 1, 0, 1, 0, 1]
    assert train[:, 2].tolist() == [0] * 7
    assert statistics.maps["1"].tolist() == [7, 3, 0]
    assert statistics.spikes_per_neuron() == {"1": pytest.approx(10 / 3)}


def test_operations_and_energy_by_hand():
    """14 input spikes × 3 + 10 spikes × 2 accumulates, 0.9 pJ each; × T for the delay."""
    snn = convert(counted(), stdb.SpikeTrain(TRAIN))
    with stdb.record_spikes(snn) as statistics, torch.no_grad():
        snn(torch.zeros(1, 1, 1, 2), 7)
    assert statistics.synaptic_operations() == {"input": 42, "1": 20}
    assert statistics.energy() == pytest.approx(0.9 * 62)
    assert statistics.energy_delay() == pytest.approx(0.9 * 62 * 7)


def test_signed_input_spikes_count_as_one():
    """A negative input spike is one operation, not minus one."""
    train = TRAIN.clone()
    train[:3] *= -1
    snn = convert(counted(), stdb.SpikeTrain(train))
    with stdb.record_spikes(snn) as statistics, torch.no_grad():
        snn(torch.zeros(1, 1, 1, 2), 7)
    assert statistics.synaptic_operations()["input"] == 42


def test_a_constant_input_is_multiplied_once():
    """4.6 pJ a synapse for all steps together, and its current is added at every step."""
    snn = convert(counted())
    with stdb.record_spikes(snn) as statistics, torch.no_grad():
        snn(torch.full((1, 1, 1, 2), 0.75), 5)
    # neuron 0 gets 1.125 a step and fires at all 5; neuron 1 gets 0.375 and fires at t = 3 only
    assert statistics.maps["1"].tolist() == [5, 1, 0]
    assert statistics.synaptic_operations() == {"input": 5 * 2 * 3, "1": 6 * 2}
    assert statistics.energy() == pytest.approx(4.6 * 6 + 0.9 * (12 + 5 * 3))
    assert statistics.energy_delay() == pytest.approx(5 * statistics.energy())


class Noise:
    """Other currents at every step, which are no spikes."""

    analogue = True

    def __call__(self, images, start, stop, keys):
        steps = torch.arange(start, stop) / 10
        return images + steps.view(-1, 1, 1, 1, 1)


def test_another_analogue_input_is_multiplied_at_every_step():
    """What an encoder of one's own says of itself counts, not what its values look like."""
    snn = convert(counted(), Noise())
    with stdb.record_spikes(snn) as statistics, torch.no_grad():
        snn(torch.zeros(1, 1, 1, 2), 5)
    spikes = float(statistics.maps["1"].sum())
    assert statistics.energy() == pytest.approx(4.6 * 5 * 6 + 0.9 * 2 * spikes)
    snn = convert(counted(), stdb.SpikeTrain(TRAIN / 2))
    with stdb.record_spikes(snn) as statistics, torch.no_grad():
        snn(torch.zeros(1, 1, 1, 2), 5)
    spikes = float(statistics.maps["1"].sum())
    assert statistics.energy() == pytest.approx(0.9 * (5 * 6 + 2 * spikes))


class Biased(nn.Module):
    """Everything that costs without a spike: biases, a layer behind a layer, sums with currents."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 3, bias=False)
        self.relu, self.norm = nn.ReLU(), nn.BatchNorm1d(3)
        self.out, self.last = nn.Linear(3, 6, bias=False), nn.Linear(6, 2)

    def forward(self, x):
        x = self.relu(self.first(torch.flatten(x, 1)))
        y = self.second(x) + x
        return self.last(self.out(self.relu(self.norm(y))))


def test_what_costs_without_spikes_by_hand():
    """A bias is added at each step; what follows no neurons multiplies; the tail does it once."""
    torch.manual_seed(0)
    snn = convert(Biased(), stdb.SpikeTrain(torch.ones(7, 1, 1, 2, 2)))
    with stdb.record_spikes(snn) as statistics, torch.no_grad():
        snn(torch.zeros(1, 1, 2, 2), 7)
    spikes = {name: float(count.sum()) for name, count in statistics.maps.items()}
    # a spike of the first layer: 3 of second, 1 of the shortcut's unit; of the other: 6 of out
    first, other = list(spikes)[1:]
    accumulates = spikes["input"] * 3 + spikes[first] * 4 + spikes[other] * 6
    assert sum(statistics.synaptic_operations().values()) == accumulates
    biases = 7 * 3 + 7 * 3 + 2  # first, norm behind the sum; last, once
    multiplies = 7 * 3 + 6 * 2  # norm at every step, last once
    assert statistics.energy() == pytest.approx(4.6 * multiplies + 0.9 * (accumulates + biases))


class Part(nn.Module):
    """A network of parts, as a function of them."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run, self.relu = run, nn.ReLU()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.run(self, x)


def biased(i, o, kernel=3, padding=1):
    """A convolution with a bias."""
    return nn.Conv2d(i, o, kernel, 1, padding)


# network → MACs once, MACs at every step, places that are added to at every step and once; of an
# image of 1×4×4. A 3×3 convolution with padding has (3·4 − 2)² = 100 synapses for each pair of
# channels at 4×4, (3·2 − 2)² = 16 at 2×2; the output layer, of spikes, has accumulates only.
FIRST, OUT = 2 * 100, 3  # of conv(1, 2), and the places of the output
CLOSED = {
    "a bias": (
        lambda: nn.Sequential(biased(1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)),
        (FIRST, 0, 32, OUT),
    ),
    "pooled pixels": (
        lambda: nn.Sequential(
            nn.AvgPool2d(2), conv(1, 2), nn.ReLU(), nn.Flatten(), linear(8, 3)
        ),
        (2 * 16, 0, 8, 0),
    ),
    "a layer behind a layer": (
        lambda: nn.Sequential(
            biased(1, 2), nn.AvgPool2d(2), conv(2, 5), nn.ReLU(), nn.Flatten(), linear(20, 3)
        ),
        (FIRST + 10 * 16, 0, 20, 0),
    ),
    "branches": (
        lambda: Part(
            lambda net, x: net.out(net.relu(net.one(x) + net.two(x)).flatten(1)),
            one=biased(1, 2), two=biased(1, 2, 1, 0), out=linear(32, 3),
        ),
        (FIRST + 2 * 16, 0, 32, 0),
    ),
    "a bias that is pooled": (
        lambda: nn.Sequential(
            conv(1, 2), nn.ReLU(), biased(2, 3), nn.AvgPool2d(2), nn.ReLU(), nn.Flatten(),
            linear(12, 3),
        ),
        (FIRST, 0, 32 + 12, 0),
    ),
    "a bias that is max-pooled": (
        lambda: nn.Sequential(
            conv(1, 2), nn.ReLU(), biased(2, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(),
            linear(12, 3),
        ),
        (FIRST, 0, 32 + 48, 0),
    ),
    "a bias below another layer": (
        lambda: nn.Sequential(
            conv(1, 2), nn.ReLU(), biased(2, 3), biased(3, 2), nn.ReLU(), nn.Flatten(),
            linear(32, 3),
        ),
        (FIRST, 6 * 100, 32 + 48 + 32, 0),
    ),
    "pixels to neurons": (
        lambda: nn.Sequential(nn.ReLU(), nn.Flatten(), linear(16, 5), nn.Linear(5, 3)),
        (5 * 3, 0, 16, OUT),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CLOSED)
def test_energy_in_closed_form(case):
    """4.6 pJ a multiply-accumulate, 0.9 pJ an accumulate: what a direct input computes once."""
    make, (once, always, places, last) = CLOSED[case]
    torch.manual_seed(0)
    snn = convert(make())
    with stdb.record_spikes(snn) as statistics, torch.no_grad():
        snn(torch.rand(2, 1, 4, 4), 7)
    spikes = statistics.synaptic_operations()
    del spikes["input"]
    expected = 4.6 * (once + 7 * always) + 0.9 * (sum(spikes.values()) + 7 * places + last)
    assert statistics.energy() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("case", ["a bias", "branches", "pooled pixels"])
def test_energy_of_other_inputs_in_closed_form(case):
    """Of spikes only biases are added; a changing analogue input multiplies at every step."""
    make, (multiplied, _, places, last) = CLOSED[case]
    added = 0 if case == "pooled pixels" else places
    for encoder, factor in ((stdb.PoissonEncoder(), 0), (Noise(), 7)):
        snn = convert(make(), encoder)
        with stdb.record_spikes(snn) as statistics, torch.no_grad():
            snn(torch.rand(2, 1, 4, 4), 7)
        spikes = statistics.synaptic_operations()
        if factor:
            del spikes["input"]
        adds = sum(spikes.values()) + 7 * added + last
        expected = 4.6 * factor * multiplied + 0.9 * adds
        assert statistics.energy() == pytest.approx(expected, rel=1e-12)


def test_an_anns_energy_counts_each_of_its_synapses():
    """Also behind a sum and behind another layer; the unit of the shortcut is one, too."""
    synapses = 4 * 3 + 3 * 3 + 3 + 3 + 3 * 6 + 6 * 2
    assert stdb.ann_energy(Biased(), (1, 2, 2)) == pytest.approx(4.6 * synapses)


def test_several_batches():
    """Averages are over all images of all presentations, also of unequal batches and in chunks."""
    snn = convert(counted())
    images = torch.tensor([0.75, 0.25, 1.0, 0.1, 0.6]).view(5, 1, 1, 1).expand(5, 1, 1, 2)
    with stdb.record_spikes(snn) as whole, torch.no_grad():
        snn(images, 9)
    snn.chunk = 2
    with stdb.record_spikes(snn) as parts, torch.no_grad():
        snn(images[:2], 9)
        presentation = snn.present(images[2:])
        for steps in (4, 5):
            snn(presentation, steps)
    assert parts.images == whole.images == 5
    assert parts.timesteps == whole.timesteps == 9
    assert torch.equal(parts.maps["1"], whole.maps["1"])
    assert parts.spikes_per_neuron() == whole.spikes_per_neuron()
    assert parts.synaptic_operations() == whole.synaptic_operations()
    assert parts.energy_delay() == whole.energy_delay()
    assert whole.spikes_per_neuron()["1"] == float(whole.maps["1"].sum()) / 3 / 5


def test_recording_ends_with_the_block():
    """Nothing is counted after the block, also where it ends in an error."""
    snn = convert(counted())
    image = torch.full((1, 1, 1, 2), 0.75)

    def fail():
        with stdb.record_spikes(snn) as statistics, torch.no_grad():
            snn(image, 5)
            raise KeyError
        return statistics

    with stdb.record_spikes(snn) as statistics, torch.no_grad():
        snn(image, 5)
    with pytest.raises(KeyError):
        fail()
    assert snn.observers == []
    snn(image, 5)
    assert statistics.images == 1


def test_trains_only_where_asked():
    """Asking for a train that was not recorded says how to record it."""
    snn = convert(counted())
    with stdb.record_spikes(snn) as statistics, torch.no_grad():
        snn(torch.full((1, 1, 1, 2), 0.75), 5)
    with pytest.raises(ValueError, match="trains=True"):
        statistics.train("1")


def test_recording_changes_nothing():
    """Logits and gradients are the same with and without a recording."""
    gradients = []
    for record in (False, True):
        torch.manual_seed(0)
        snn = convert(counted())
        if record:
            with stdb.record_spikes(snn, trains=True):
                logits = snn(torch.full((1, 1, 1, 2), 0.75), 5)
        else:
            logits = snn(torch.full((1, 1, 1, 2), 0.75), 5)
        logits.sum().backward()
        gradients.append((logits.detach(), snn.net[1].weight.grad))
    for plain_value, recorded in zip(*gradients, strict=True):
        assert torch.equal(plain_value, recorded)


# -- logits over time ----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 1, 4, 12])
@pytest.mark.parametrize("encoder", [stdb.PoissonEncoder(), stdb.DirectEncoder()])
def test_logits_over_time(encoder, chunk):
    """Entry t is what a presentation of t + 1 steps gives, the last one what forward gives."""
    torch.manual_seed(0)
    snn = convert(Residual(), encoder)
    snn.chunk = chunk
    snn.set_thresholds(dict.fromkeys(snn.thresholds, 0.2))
    images = torch.rand(3, 2, 7, 7)
    logits = snn.logits_over_time(images, 12)
    assert logits.shape == (12, 3, 5)
    assert not logits.requires_grad
    for t in range(12):
        torch.testing.assert_close(logits[t], snn(images, t + 1).detach(), rtol=1e-5, atol=1e-5)
    assert (logits[1:] != logits[:-1]).any(2).all()


def test_logits_over_time_of_given_samples():
    """Sample ids and epoch choose the same trains as in forward."""
    torch.manual_seed(0)
    snn = convert(Residual(), stdb.PoissonEncoder())
    snn.set_thresholds(dict.fromkeys(snn.thresholds, 0.2))
    images, ids = torch.rand(3, 2, 7, 7), torch.tensor([7, 3, 11])
    last = snn.logits_over_time(images, 6, sample_ids=ids, epoch=4)[-1]
    torch.testing.assert_close(last, snn(images, 6, sample_ids=ids, epoch=4).detach())
    assert not torch.allclose(last, snn(images, 6).detach())
