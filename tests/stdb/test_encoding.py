"""Poisson input and dropout: right statistics, from numbers that depend on their place only."""

import math
from itertools import combinations

import pytest
import torch
from torch import nn

import stdb
from stdb import randomness

T = 400


def keys(count, epoch=0):
    """Streams of samples 0 … count − 1."""
    return randomness.sample_keys(torch.arange(count), epoch)


def encode(images, steps=T, seed=0, epoch=0, ids=None, start=0):
    """A Poisson train (T, B, C, H, W)."""
    ids = torch.arange(len(images)) if ids is None else ids
    streams = randomness.sample_keys(ids, epoch)
    return stdb.PoissonEncoder(seed)(images, start, start + steps, streams)


def grey(batch=2, level=0.5, size=12):
    """Images of one level."""
    return torch.full((batch, 1, size, size), level)


def correlation(a, b):
    """Of two equally long sequences."""
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])


def uncorrelated(a, b):
    """Whether it is within 4.5 standard errors of 0 (7 in a million by chance)."""
    return abs(correlation(a, b)) < 4.5 / math.sqrt(a.numel())


# -- the generator -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "outputs"),
    [
        # the vectors that implementations of SplitMix64 are commonly checked with
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423]),
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]),
    ],
)
def test_splitmix64(seed, outputs):
    """The published outputs, bit for bit; a stream's uniform numbers are their top 24 bits."""
    golden = 0x9E3779B97F4A7C15 - (1 << 64)
    state = torch.tensor([seed]) + golden * torch.arange(1, 4)
    assert [int(word) % (1 << 64) for word in randomness.mix(state)] == outputs
    drawn = randomness.uniform(torch.tensor([seed]), 3)[0]
    assert drawn.tolist() == [(word >> 40) / (1 << 24) for word in outputs]


def test_uniform_distribution():
    """Mean, variance and a χ² of 100 bins fit U[0, 1); 0 is possible, 1 is not."""
    drawn = randomness.uniform(keys(100), 10_000)
    assert drawn.shape == (100, 10_000)
    n = drawn.numel()
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    assert float(drawn.double().mean()) == pytest.approx(0.5, abs=4 / math.sqrt(12 * n))
    assert float(drawn.double().var()) == pytest.approx(1 / 12, abs=4 / math.sqrt(180 * n))
    counts = torch.histc(drawn, 100, 0, 1).double()
    chi_square = float(((counts - n / 100) ** 2 / (n / 100)).sum())
    assert 99 - 4 * math.sqrt(198) < chi_square < 99 + 4 * math.sqrt(198)


def test_streams_are_independent():
    """Numbers of adjacent streams, and neighbours within a stream, are uncorrelated."""
    drawn = randomness.uniform(keys(200), 1000)
    assert uncorrelated(drawn[:-1], drawn[1:])
    assert uncorrelated(drawn[:, :-1], drawn[:, 1:])
    assert uncorrelated(drawn[:-1, 1:], drawn[1:, :-1])  # shifted by one: overlapping streams


def test_no_two_streams_coincide():
    """Samples × epochs × seeds × steps give as many different keys."""
    samples = torch.cat([keys(100, epoch) for epoch in range(10)])
    seeded = torch.cat([randomness.derive(samples, seed) for seed in range(5)])
    steps = randomness.derive(seeded[None], torch.arange(20)[:, None])
    assert len(steps.unique()) == 100 * 10 * 5 * 20


# -- Poisson -------------------------------------------------------------------------------------


def test_rates_and_signs():
    """A pixel x spikes with probability |x| and the sign of x, within a binomial's 4.5 σ."""
    levels = torch.tensor([-1, -0.75, -0.5, -0.1, -0.01, 0, 0.01, 0.1, 0.3, 0.5, 0.9, 1])
    images = levels[:, None, None, None].expand(-1, 1, 10, 10).contiguous()
    train = encode(images)
    assert set(train.unique().tolist()) == {-1.0, 0.0, 1.0}
    for level, spikes in zip(levels.tolist(), train.unbind(1), strict=True):
        p, n = abs(level), spikes.numel()
        assert float(spikes.mean()) == pytest.approx(
            level, abs=4.5 * math.sqrt(p * (1 - p) / n) + 1e-6
        )
        assert (spikes * math.copysign(1, level) >= 0).all()


def test_rare_spikes():
    """A faint pixel spikes as rarely as it should: no constant is added to its probability."""
    train = encode(grey(1, 0.001, 200), 25)
    assert float(train.mean()) == pytest.approx(0.001, abs=4.5 * math.sqrt(0.001 / train.numel()))


def test_extremes():
    """|x| = 1 spikes at every step, 0 at none."""
    images = torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1).expand(50, 3, 20, 20)
    train = encode(images, 50)
    assert torch.equal(train, images.expand(50, -1, -1, -1, -1))


def test_every_pixel_has_its_rate():
    """The rate is right in each place of the image, not on average only."""
    images = torch.linspace(0, 1, 48).view(1, 3, 4, 4)
    counts = encode(images, 4000).sum(0)[0]
    sigma = (4000 * images[0] * (1 - images[0])).sqrt()
    assert ((counts - 4000 * images[0]).abs() <= 4.5 * sigma + 1e-3).all()


def test_train_does_not_depend_on_the_batch():
    """Alone, in another order, among others: a sample's train is its own."""
    images = torch.rand(5, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together = encode(images, 20)
    for i in range(5):
        alone = encode(images[i : i + 1], 20, ids=torch.tensor([i]))
        assert torch.equal(alone[:, 0], together[:, i])
    order = torch.tensor([3, 0, 4])
    assert torch.equal(encode(images[order], 20, ids=order), together[:, order])


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_train_does_not_depend_on_the_chunk(chunk):
    """Steps start … stop are the same numbers however they are asked for."""
    images = grey()
    whole = encode(images, 20)
    parts = [encode(images, min(chunk, 20 - t), start=t) for t in range(0, 20, chunk)]
    assert torch.equal(torch.cat(parts), whole)


def test_dtype_does_not_change_the_spikes():
    """Float64 images give the spikes of float32 ones, in their own dtype."""
    images = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    single, double = encode(images, 20), encode(images.double(), 20)
    assert double.dtype == torch.float64
    assert torch.equal(single.double(), double)


TRAINS = {
    "base": {},
    "another seed": {"seed": 1},
    "another epoch": {"epoch": 1},
    "seed and epoch swapped in value": {"seed": 1, "epoch": 1},
    "other samples": {"ids": torch.tensor([2, 3])},
    "later steps": {"start": T},
    "one step later": {"start": 1},
}


@pytest.mark.parametrize(("one", "other"), list(combinations(TRAINS, 2)))
def test_trains_are_uncorrelated(one, other):
    """Seed, epoch, sample and step each draw new numbers."""
    trains = [encode(grey(), **TRAINS[name]) for name in (one, other)]
    assert uncorrelated(*trains)


def test_neighbours_are_uncorrelated():
    """So do samples of a batch, steps, channels and pixels of one image."""
    train = encode(grey(4).expand(4, 3, 12, 12), 100)
    for dim in range(5):
        n = train.shape[dim]
        assert uncorrelated(train.narrow(dim, 0, n - 1), train.narrow(dim, 1, n - 1)), dim


# -- what a presentation checks ------------------------------------------------------------------


def tiny(rate=0.5, **options):
    """One dropout behind a spiking layer of 400 neurons that fire at every step."""
    net = nn.Sequential(
        nn.Conv2d(1, 4, 1, bias=False), nn.ReLU(), nn.Dropout(rate), nn.Flatten(),
        nn.Linear(400, 400, bias=False),
    )  # fmt: skip
    with torch.no_grad():
        net[0].weight.fill_(2.0)
        net[4].weight.copy_(torch.eye(400))
    snn = stdb.convert(net.train(), stdb.DirectEncoder(), **options)
    snn.set_thresholds({"0": 1.0})
    return snn


@pytest.mark.parametrize("bad", [1.25, -1.5, float("nan"), float("inf")])
def test_pixel_out_of_range(bad):
    """A pixel that is no probability is refused, with its size and what is allowed."""
    images = grey(3, 0.5, 10)
    images[2, 0, 7, 3] = bad
    snn = tiny()
    snn.encoder = stdb.PoissonEncoder(0)
    with pytest.raises(ValueError, match=rf"{abs(bad)}.*allowed: −1 to 1"):
        snn.present(images)


@pytest.mark.parametrize(
    "images", [torch.ones(1, 10, 10), torch.ones(1, 1, 10, 10, dtype=torch.uint8)]
)
def test_not_a_batch_of_images(images):
    """Bytes, or an image without a batch, are refused."""
    with pytest.raises(ValueError, match=r"allowed: a floating-point batch \(B, C, H, W\)"):
        tiny().present(images)


def test_sample_ids_for_each_image():
    """Too few or too many streams are refused."""
    with pytest.raises(ValueError, match=r"sample_ids are \(3,\) for 2 images"):
        tiny().present(grey(2, 0.5, 10), sample_ids=torch.arange(3))


def test_spike_train_too_short():
    """Replaying past the end is an error, not a silence."""
    snn = tiny().eval()
    snn.encoder = stdb.SpikeTrain(torch.ones(4, 1, 1, 10, 10))
    snn(grey(1, 0.5, 10), 4)
    with pytest.raises(ValueError, match="has 4 steps; asked for 5"):
        snn(grey(1, 0.5, 10), 5)


# -- dropout -------------------------------------------------------------------------------------


def drawn_masks(snn, batch=8, steps=1, **options):
    """The mask of each image, read off the output: (B, 400), what a constant spike arrives as."""
    images = grey(batch, 1.0, 10)
    with torch.no_grad():
        return snn(images, steps, **options)


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_dropout_scales_inversely(rate):
    """A fraction of ``rate`` is dropped, the rest counts 1/(1 − rate): the mean is kept."""
    masks = drawn_masks(tiny(rate), 50)
    torch.testing.assert_close(masks.unique(), torch.tensor([0, 1 / (1 - rate)]))
    sigma = math.sqrt(rate * (1 - rate) / masks.numel())
    assert float((masks == 0).float().mean()) == pytest.approx(rate, abs=4.5 * sigma)


@pytest.mark.parametrize("chunk", [1, 4, 30])
def test_dropout_mask_is_fixed_over_time(chunk):
    """After T steps each output is T times its mask: never a mixture."""
    snn = tiny(chunk=chunk)
    masks = drawn_masks(snn)
    torch.testing.assert_close(drawn_masks(snn, steps=30), 30 * masks)
    presentation = snn.present(grey(8, 1.0, 10))
    with torch.no_grad():
        for steps in (3, 7, 20):  # truncated BPTT's windows are one presentation
            logits = snn(presentation, steps)
    torch.testing.assert_close(logits, 30 * masks)


def test_dropout_mask_belongs_to_the_sample():
    """Alone or among others, a sample keeps its mask; samples, epochs and seeds differ."""
    together = drawn_masks(tiny(), 8)
    alone = drawn_masks(tiny(), 1, sample_ids=torch.tensor([5]))
    assert torch.equal(alone[0], together[5])
    assert uncorrelated(together[:-1], together[1:])
    assert uncorrelated(together, drawn_masks(tiny(), 8, epoch=1))
    assert uncorrelated(together, drawn_masks(tiny(dropout_seed=1), 8))


def test_dropout_layers_differ():
    """Two dropouts of one shape draw two masks."""
    net = nn.Sequential(
        nn.Conv2d(1, 4, 1, bias=False), nn.ReLU(), nn.Dropout(0.5), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(400, 400, bias=False),
    )  # fmt: skip
    with torch.no_grad():
        net[0].weight.fill_(2.0)
        net[5].weight.copy_(torch.eye(400))
    snn = stdb.convert(net, stdb.DirectEncoder())
    kept = (drawn_masks(snn, 50) == 4).float().mean()
    assert float(kept) == pytest.approx(0.25, abs=4.5 * math.sqrt(0.25 * 0.75 / 20_000))


def test_dropout_draws_other_numbers_than_the_encoder():
    """With equal seeds a mask uses none of the numbers that make the input spikes of a step."""
    images = torch.full((8, 4, 10, 10), 0.5)
    masks = (drawn_masks(tiny()) > 0).view(8, 4, 10, 10)
    for train in encode(images, T):
        assert abs(correlation(train, masks)) < 0.12  # 6.8 σ, for 400 steps


def test_no_dropout_in_evaluation():
    """In evaluation, and at rate 0, every spike arrives whole."""
    assert (drawn_masks(tiny().eval()) == 1).all()
    assert (drawn_masks(tiny(0.0)) == 1).all()


def test_all_dropped():
    """At rate 1 nothing arrives, rather than 0/0."""
    assert (drawn_masks(tiny(1.0)) == 0).all()


def test_given_masks():
    """Masks of the user's own replace the drawn ones; their number has to fit."""
    snn = tiny()
    mask = torch.arange(800.0).view(2, 4, 10, 10)
    with torch.no_grad():
        logits = snn(snn.present(grey(2, 1.0, 10), masks=[mask]), 1)
    assert torch.equal(logits, mask.flatten(1))
    with pytest.raises(ValueError, match="2 masks for 1 dropout layers"):
        snn.present(grey(2, 1.0, 10), masks=[mask, mask])
