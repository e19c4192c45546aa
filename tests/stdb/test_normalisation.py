"""What pixels become before a network sees them."""

import pytest
import torch
from torchvision.transforms import v2

import stdb

LEVELS = torch.arange(256, dtype=torch.uint8)
COLOURS = torch.stack([LEVELS, LEVELS.flip(0), LEVELS.roll(7)]).view(1, 3, 16, 16)


def test_by_default_black_is_minus_one_and_white_one():
    """Exactly, which the encoder fires at with certainty; of any type, which stays as it is."""
    normalise = stdb.Normalisation()
    assert normalise(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]
    floats = LEVELS.float()
    expected = torch.tensor([level / 127.5 for level in range(256)]).sub(1.0)
    assert torch.equal(normalise(LEVELS), expected)
    assert torch.equal(normalise(floats), expected)
    assert torch.equal(floats, LEVELS.float())


@pytest.mark.parametrize("name", stdb.NORMALISATIONS)
def test_named_ones_are_torchvisions_to_the_last_bit(name):
    """So that published weights see what they learned from."""
    normalisation = stdb.NORMALISATIONS[name]
    theirs = v2.Normalize(normalisation.mean, normalisation.std)(COLOURS.float().div(255))
    assert torch.equal(normalisation(COLOURS), theirs)
    largest = theirs.abs().amax((0, 2, 3))
    assert torch.allclose(torch.tensor(normalisation.largest), largest, rtol=1e-6)


def test_the_default_stays_within_one():
    """What Poisson spikes can be drawn for."""
    assert stdb.Normalisation().largest == (1.0,)


@pytest.mark.parametrize(
    ("mean", "std", "said"),
    [
        ([0.5], [0.5, 0.5], "mean has 1 channels and std 2; allowed: a number for each channel in"),
        ([0.5], [], "mean has 1 channels and std 0"),
        ([0.5], [0], "std has 0; allowed: 1e-06 to 1, in units where black is 0 and white 1"),
        ([0.5], [-0.1], "std has -0.1; allowed: 1e-06 to 1"),
        ([0.5], [58.4], "std has 58.4"),
        ([0.5], [float("nan")], "std has nan"),
        ([123.7], [0.2], "mean has 123.7; allowed: 0 to 1"),
        ([-0.1], [0.2], "mean has -0.1"),
        ([float("inf")], [0.2], "mean has inf"),
        ([True], [0.2], "mean has True"),
        (["0.5"], [0.2], "mean has '0.5'"),
        ([10**400], [0.2], "mean has 1000"),
        (0.5, [0.2], "mean is 0.5; allowed: a list, a number for each channel"),
        ("imagenet", [0.2], "mean is 'imagenet'"),
    ],
)
def test_what_no_channel_has_is_refused(mean, std, said):
    """Naming which, and what is allowed; values of 0 … 255 are the most likely mistake."""
    with pytest.raises(ValueError, match="allowed") as caught:
        stdb.Normalisation(mean, std)
    assert said in str(caught.value)


def test_images_of_other_channels_are_refused():
    """Broadcasting would make three channels of one."""
    with pytest.raises(ValueError, match=r"have 1 channel and the normalisation 3; allowed: as"):
        stdb.NORMALISATIONS["imagenet"](COLOURS[:, :1])
    assert stdb.Normalisation()(COLOURS[:, :2]).shape == (1, 2, 16, 16)


@pytest.mark.parametrize("kept", [3, "imagenet", [], {"mean": [0.5]}, {"mean": [], "x": []}])
def test_a_file_with_another_normalisation_is_refused(kept):
    """What settings() never gives."""
    with pytest.raises(ValueError, match=r"normalisation is .*; allowed: mean and std"):
        stdb.normalisation_of(kept)


def test_what_a_file_keeps_gives_it_again():
    """Nothing for the default."""
    for normalisation in (stdb.Normalisation(), *stdb.NORMALISATIONS.values()):
        assert stdb.normalisation_of(normalisation.settings()) == normalisation
    assert stdb.Normalisation().settings() == {}
    assert stdb.normalisation_of(None) == stdb.Normalisation()
