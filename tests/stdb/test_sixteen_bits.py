"""Products in bfloat16: everything else stays in the type of the weights, whatever the operator."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stdb


class Branches(nn.Module):
    """What a product's value meets: sums, concatenation, poolings, scales, slices, flattening."""

    def __init__(self, bias):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=bias)
        self.left = nn.Conv2d(8, 8, 3, padding=1, bias=bias)
        self.right = nn.Conv2d(8, 8, 1, bias=not bias)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2, bias=bias)
        self.fc1 = nn.Linear(8 * 4 * 4, 16, bias=bias)
        self.fc2 = nn.Linear(16, 5, bias=bias)
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        y = self.norm(self.left(x) + self.right(x) + x)
        z = torch.cat([F.relu(y), F.relu(F.max_pool2d(self.left(x), 3, 1, 1))], 1)
        z = F.relu(self.up(self.drop(F.avg_pool2d(z, 2))))
        z = F.relu(F.adaptive_avg_pool2d(z, 4)).flatten(1)
        return self.fc2(F.relu(self.fc1(z)))


def network(bias, surrogate, precision=None):
    """A converted network at thresholds that spikes reach, and its images."""
    torch.manual_seed(0)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    net = Branches(bias).eval()
    snn = stdb.convert(
        net, stdb.DirectEncoder(), surrogate, precision=precision, learn_thresholds=True
    )
    stdb.balance_thresholds(snn, images, 8, percentile=99)
    for neuron in snn.neurons.values():
        neuron.initial_membrane = 0.5
    return snn.train(), images


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [stdb.STDB, stdb.Rectangle])
def test_close_to_float32(kind, bias, steps):
    """Thresholds, logits and gradients are of float32, and alike: some spikes differ."""
    found = {}
    for precision in (None, torch.bfloat16):
        snn, images = network(bias, kind(0.5, 0.1, True), precision)
        logits = snn(images, steps)
        assert logits.dtype == torch.float32
        F.cross_entropy(logits / steps, torch.arange(3)).backward()
        learned = [p for p in snn.parameters() if p.requires_grad]
        assert all(p.grad.dtype == torch.float32 for p in learned)
        grads = torch.cat([p.grad.flatten() for p in learned])
        found[precision] = (torch.tensor(list(snn.thresholds.values())), logits.detach(), grads)
    for exact, lowered, least in zip(*found.values(), (0.99, 0.8, 0.6), strict=True):
        assert torch.cosine_similarity(exact.flatten(), lowered.flatten(), 0) > least
    thresholds = [values[0] for values in found.values()]
    torch.testing.assert_close(*thresholds, rtol=0.05, atol=0)


def test_logits_are_not_rounded():
    """The output layer's sums are those of float32, beyond what bfloat16 can tell apart."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(12, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)
    )
    snn = stdb.convert(net, stdb.DirectEncoder(), precision=torch.bfloat16)
    with torch.no_grad():
        over_time = snn.logits_over_time(torch.rand(2, 3, 2, 2), 40)
    assert (over_time != over_time.bfloat16()).any()


def test_other_types_are_refused():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"precision is torch.float16; allowed: None, torch.bfl"):
        stdb.convert(net, stdb.DirectEncoder(), precision=torch.float16)


class TwoReaders(nn.Module):
    """Spikes that a pooling of 3×3 and a convolution read, in either order."""

    def __init__(self, pooled_first):
        super().__init__()
        self.pooled_first = pooled_first
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.pool, self.second = nn.AvgPool2d(3), nn.Conv2d(8, 8, 3, 3)
        self.relu, self.out = nn.ReLU(), nn.Linear(32, 4)
        self.of_pool = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.first(x)
        if self.pooled_first:
            pooled = self.of_pool(self.pool(x))
            both = pooled + self.second(x)
        else:
            both = self.second(x)
            both = both + self.of_pool(self.pool(x))
        return self.out(self.relu(both).flatten(1))


def test_gradients_of_branches_are_added_exactly():
    """A gradient that is spread over windows is so in float32, whichever branch comes first."""
    found = []
    for pooled_first in (False, True):
        torch.manual_seed(0)
        snn = stdb.convert(
            TwoReaders(pooled_first).eval(), stdb.DirectEncoder(), stdb.Linear(1.0, 1.0, True),
            precision=torch.bfloat16,
        )  # fmt: skip
        snn.events = "never"
        x = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1
        snn.set_thresholds(dict.fromkeys(snn.thresholds, 0.3))
        F.cross_entropy(snn(x, 4), torch.arange(4)).backward()
        found.append({n: p.grad for n, p in snn.named_parameters() if p.grad is not None})
    one, other = found
    assert one.keys() == other.keys()
    assert one["net.first.0.weight"].abs().max() > 0
    assert torch.equal(one["net.first.0.weight"], other["net.first.0.weight"])
