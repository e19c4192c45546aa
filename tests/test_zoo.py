"""What the card of a network that comes with the repository says of it."""

import torch

import stdb
from benchmarks.zoo import BATCH, CONFIDENCE, probabilities, shares
from pipeline.data import Split


def test_accuracies_after_each_step_and_of_leaving_early():
    """Those of deciding for the images one by one, at each step, with the same confidence."""
    torch.manual_seed(3)
    ann = stdb.build_network(
        "vgg5", in_channels=1, image_size=8, num_classes=3, width=0.1, hidden=8
    )
    snn = stdb.convert(ann, stdb.PoissonEncoder(1)).eval()
    stdb.balance_thresholds(snn, torch.rand(8, 1, 8, 8) * 2 - 1, 10, percentile=90)
    snn.scale_output(20.0)
    count = BATCH + 10
    pixels = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8)
    images = Split(pixels, torch.arange(count) % 3, torch.arange(count), ["a", "b", "c"])
    after, early = shares(probabilities(snn, images, 6), images.labels)
    whole = stdb.decide(snn, images.pixels(), 6, sample_ids=images.ids)
    expected = [(p.argmax(1) == images.labels).double().mean().item() for p in whole.probabilities]
    assert after == expected
    left = stdb.decide(snn, images.pixels(), 6, CONFIDENCE, sample_ids=images.ids)
    assert 1 <= left.steps.min() < left.steps.max() <= 6
    assert early == (left.final.argmax(1) == images.labels).double().mean().item()
