"""Augmentation: functions of (seed, epoch, sample), against torchvision's own transforms."""

import pytest
import torch
from torchvision.transforms.v2 import TrivialAugmentWide
from torchvision.transforms.v2.functional import erase

from pipeline.data import augment, augmentation, cut_out, trivial_augment


def test_augmentation_depends_on_the_sample_only():
    """Same (seed, epoch, id), same crop, whatever the batch; another epoch, another crop."""
    images = torch.arange(6 * 3 * 8 * 8).remainder(251).to(torch.uint8).view(6, 3, 8, 8)
    ids = torch.arange(6)
    whole = augment(images, ids, 0, 1)
    part = augment(images[2:4], ids[2:4], 0, 1)
    assert torch.equal(whole[2:4], part)
    assert not torch.equal(whole, augment(images, ids, 0, 2))
    assert not torch.equal(whole, augment(images, ids, 1, 1))
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    windows = [padded[0, :, r : r + 8, c : c + 8] for r in range(9) for c in range(9)]
    assert any(torch.equal(whole[0], w) or torch.equal(whole[0], w.flip(-1)) for w in windows)


@pytest.mark.parametrize("side", [1, 4, 5, 8, 30])
def test_a_cutout_is_torchvisions_erase_at_a_place_of_the_sample(side):
    """A grey square, its middle anywhere in the image; the same in any batch; another epoch's."""
    images = torch.randint(0, 100, (300, 2, 9, 7), generator=torch.Generator().manual_seed(0))
    images, ids = images.to(torch.uint8), torch.arange(300)
    found = cut_out(images, ids, 0, 1, side)
    assert torch.equal(cut_out(images[5:9], ids[5:9], 0, 1, side), found[5:9])
    for before, after in zip(images, found, strict=True):
        rows, columns = (after != before).any(0).nonzero().unbind(1)
        square = [int(rows.min()), int(columns.min())]
        sizes = [int(rows.max()) - square[0] + 1, int(columns.max()) - square[1] + 1]
        wanted = erase(before, *square, *sizes, torch.tensor(128, dtype=torch.uint8))
        assert torch.equal(after, wanted)
        for first, size, length in zip(square, sizes, (9, 7), strict=True):
            inside = first > 0 and first + size < length
            assert size == side if inside else size <= side
    if side < 9:
        assert not torch.equal(cut_out(images, ids, 0, 2, side), found)
        assert not torch.equal(cut_out(images, ids, 1, 1, side), found)


def test_the_middle_of_a_cutout_is_anywhere():
    """Each pixel as often."""
    images = torch.zeros(6300, 1, 9, 7, dtype=torch.uint8)
    counts = (cut_out(images, torch.arange(6300), 0, 1, 1) == 128).sum((0, 1))
    assert int(counts.sum()) == 6300
    assert counts.min() > 60
    assert counts.max() < 140


def test_photographs_are_cropped_at_any_size():
    """A gradient stays one; slope and place tell area, aspect ratio and position."""
    size, count = 128, 400
    ramp = torch.arange(size).to(torch.uint8)
    rows, columns = ramp[:, None].expand(size, size), ramp[None].expand(size, size)
    images = torch.stack([rows, columns]).expand(count, 2, size, size)
    ids = torch.arange(count)
    found = augment(images, ids, 0, 1)
    assert found.shape == images.shape
    assert found.dtype == torch.uint8
    assert torch.equal(found[5:7], augment(images[5:7], ids[5:7], 0, 1))
    assert not torch.equal(found, augment(images, ids, 0, 2))
    values = found.float()
    height = (values[:, 0, -9, 64] - values[:, 0, 8, 64]) / (
        size - 17
    )  # of 1, away from the border
    width = (values[:, 1, 64, -9] - values[:, 1, 64, 8]) / (size - 17)
    flipped = (width < 0).float().mean()
    area, ratio = height * width.abs(), width.abs() / height
    assert 0.4 < flipped < 0.6
    assert 0.07 < area.min() < 0.12
    assert 0.9 < area.max() < 1.01
    assert 0.45 < area.mean() < 0.6
    assert ratio.min() > 0.7
    assert ratio.max() < 1.45
    assert values[:, 0, 0].min() < 4  # some begin at the upper edge
    assert values[:, 0, -1].max() > size - 5


def test_rectangles_are_cropped_from_black():
    """Every crop is a window of the padded image, and black stays 0 whatever it becomes later."""
    images = torch.arange(1, 1 + 40 * 6 * 10).remainder(250).add(1).to(torch.uint8)
    images = images.view(40, 1, 6, 10)
    found = augment(images, torch.arange(40), 0, 1)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    for k in range(40):
        windows = [padded[k, :, r : r + 6, c : c + 10] for r in range(9) for c in range(9)]
        assert any(torch.equal(found[k], w) or torch.equal(found[k], w.flip(-1)) for w in windows)
    assert (found == 0).any()
    assert augment(torch.ones(2, 1, 128, 160, dtype=torch.uint8), torch.arange(2), 0, 1).eq(1).all()


def coloured(count: int, size: tuple[int, ...] = (3, 32, 32)) -> torch.Tensor:
    """Smooth images of many colours: no two operations make the same of them."""
    coarse = torch.rand(count, size[0], 5, 5, generator=torch.Generator().manual_seed(0)) * 255
    return torch.nn.functional.interpolate(coarse, size[1:], mode="bicubic").clamp(0, 255).byte()


def test_trivial_augment_does_all_that_torchvisions_does_and_nothing_else():
    """Every operation at every magnitude of either sign, pixel for pixel."""
    image, count = coloured(1), 12_000
    images, torchvisions = image.expand(count, -1, -1, -1), TrivialAugmentWide()
    ours = {found.numpy().tobytes() for found in trivial_augment(images, torch.arange(count), 0, 1)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = {torchvisions(image[0]).numpy().tobytes() for _ in range(count)}
    assert len(ours) > 550
    assert ours == theirs


def test_trivial_augment_draws_operations_magnitudes_and_signs_evenly(monkeypatch):
    drawn = []

    def note(name):
        return lambda image, magnitude: drawn.append((name, magnitude)) or image

    names = list(augmentation.operations())
    noted = {name: (note(name), 1, 31) for name in names}
    monkeypatch.setattr(augmentation, "operations", lambda: noted)
    count = 14 * 31 * 20
    trivial_augment(torch.zeros(count, 1, 1, 1, dtype=torch.uint8), torch.arange(count), 0, 1)
    operations = [sum(name == of for of, _ in drawn) for name in names]
    assert min(operations) > 500  # of 620 each, σ = 24
    assert max(operations) < 740
    magnitudes = [sum(abs(m) == k for _, m in drawn) for k in range(1, 32)]
    assert sum(magnitudes) == count
    assert min(magnitudes) > 200  # of 280 each, σ = 16.5
    assert max(magnitudes) < 360
    assert 0.47 < sum(m > 0 for _, m in drawn) / count < 0.53


@pytest.mark.parametrize("size", [(3, 32, 32), (1, 9, 7)], ids=str)
def test_trivial_augment_depends_on_the_sample_only(size):
    images, ids = coloured(60, size), torch.arange(60)
    found = trivial_augment(images, ids, 0, 1)
    assert (found.shape, found.dtype) == (images.shape, torch.uint8)
    assert torch.equal(trivial_augment(images[5:9], ids[5:9], 0, 1), found[5:9])
    assert not torch.equal(trivial_augment(images, ids, 0, 2), found)
    assert not torch.equal(trivial_augment(images, ids, 1, 1), found)
    changed = (found != images).flatten(1).any(1).float().mean()
    assert 0.5 < changed < 1  # the identity, and magnitudes of 0
