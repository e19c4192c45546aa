"""Augmentation: crops, flips, TrivialAugment, cutouts, a function of (seed, epoch, sample)."""

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from stdb import derive, sample_keys, uniform

CROP_STREAM, FLIP_STREAM, CUTOUT_STREAM, TRIVIAL_STREAM = 0xC0, 0xF1, 0xCD, 0x7A
GREY = 128  # of uint8: 0 to a network, by the default normalisation
PHOTOGRAPH = 128  # pixels, from which on a network and its augmentation are ImageNet's
AREA, ASPECT = (0.08, 1.0), 4 / 3  # of a random crop of a photograph; the ratio is 1/ASPECT to that


Operation = Callable[[Tensor, float], Tensor]  # of an image and a magnitude of either sign
MAGNITUDES = 31  # of every operation, evenly from the first to the last


@cache
def operations() -> dict[str, tuple[Operation, float, float]]:
    """Those of TrivialAugment, torchvision's, each with its first and its last magnitude."""
    from torchvision.transforms.v2 import functional as transforms

    def moved(
        image: Tensor, across: float = 0, down: float = 0, shear: tuple[float, float] = (0, 0)
    ) -> Tensor:
        degrees = [math.degrees(math.atan(number)) for number in shear]
        centre = [0.0, 0.0] if any(shear) else None
        found: Tensor = transforms.affine(
            image, 0, [int(across), int(down)], 1, degrees, center=centre
        )
        return found

    return {
        "Identity": (lambda image, _: image, 0, 0),
        "ShearX": (lambda image, m: moved(image, shear=(m, 0)), 0, 0.99),
        "ShearY": (lambda image, m: moved(image, shear=(0, m)), 0, 0.99),
        "TranslateX": (lambda image, m: moved(image, across=m), 0, 32),
        "TranslateY": (lambda image, m: moved(image, down=m), 0, 32),
        "Rotate": (lambda image, m: transforms.rotate(image, m), 0, 135),
        "Brightness": (lambda image, m: transforms.adjust_brightness(image, 1 + m), 0, 0.99),
        "Color": (lambda image, m: transforms.adjust_saturation(image, 1 + m), 0, 0.99),
        "Contrast": (lambda image, m: transforms.adjust_contrast(image, 1 + m), 0, 0.99),
        "Sharpness": (lambda image, m: transforms.adjust_sharpness(image, 1 + m), 0, 0.99),
        "Posterize": (lambda image, m: transforms.posterize(image, round(abs(m))), 8, 2),
        "Solarize": (lambda image, m: transforms.solarize(image, 255 * abs(m)), 1, 0),
        "AutoContrast": (lambda image, _: transforms.autocontrast(image), 0, 0),
        "Equalize": (lambda image, _: transforms.equalize(image), 0, 0),
    }


def augment(images: Tensor, ids: Tensor, seed: int, epoch: int) -> Tensor:
    """Random crop and horizontal flip, as the authors': a function of (seed, epoch, sample).

    The crop is one of the image's size after padding by 4 with black; from 128 pixels on, as for
    ImageNet, one of 8 to 100 % of the area, whose shape is the image's by 3/4 to 4/3, brought to
    the image's size.

    Args:
        images: (B, C, H, W) uint8.
        ids: (B,) names of the samples.
        seed: of the training.
        epoch: of the training.
    """
    keys = derive(sample_keys(ids, epoch), seed)
    crop = _resized_crop if min(images.shape[-2:]) >= PHOTOGRAPH else _padded_crop
    flip = uniform(derive(keys, FLIP_STREAM), 1) < 0.5
    cropped = crop(images, keys)
    return torch.where(flip[:, :, None, None], cropped.flip(-1), cropped)


def trivial_augment(images: Tensor, ids: Tensor, seed: int, epoch: int) -> Tensor:
    """TrivialAugment (Müller and Hutter, 2021, its wide space): one operation on every image.

    Which of the fourteen, its magnitude and sign are drawn evenly, a function of (seed, epoch,
    sample). The operations are torchvision's; what they uncover is black.

    Args:
        images: (B, C, H, W) uint8, C = 1 or 3.
        ids: (B,) names of the samples.
        seed: of the training.
        epoch: of the training.
    """
    keys = derive(derive(sample_keys(ids, epoch), seed), TRIVIAL_STREAM)
    known = list(operations().values())
    choices = uniform(keys, 3) * torch.tensor([len(known), MAGNITUDES, 2], device=keys.device)
    changed = []
    for image, (number, step, sign) in zip(images, choices.long().tolist(), strict=True):
        operate, first, last = known[number]
        magnitude = float(torch.linspace(first, last, MAGNITUDES)[step])
        changed.append(operate(image, -magnitude if sign else magnitude))
    return torch.stack(changed)


def cut_out(images: Tensor, ids: Tensor, seed: int, epoch: int, side: int) -> Tensor:
    """Cutout (DeVries and Taylor, 2017): a square of every image, at a random place, made grey.

    Its middle is anywhere in the image, so that a part of it may lie outside. It is what
    torchvision.transforms.v2.functional.erase does, for all images at once.

    Args:
        images: (B, C, H, W) uint8.
        ids: (B,) names of the samples.
        seed: of the training.
        epoch: of the training.
        side: of the square, in pixels.
    """
    keys = derive(derive(sample_keys(ids, epoch), seed), CUTOUT_STREAM)
    within = []
    for length, number in zip(images.shape[-2:], uniform(keys, 2).unbind(1), strict=True):
        first = (number * length).long()[:, None] - side // 2  # (B, 1)
        pixel = torch.arange(length, device=images.device)  # (H,) or (W,)
        within.append((pixel >= first) & (pixel < first + side))
    rows, columns = within
    square = rows[:, None, :, None] & columns[:, None, None, :]  # (B, 1, H, W)
    return images.masked_fill(square, GREY)


def _padded_crop(images: Tensor, keys: Tensor) -> Tensor:
    padded = F.pad(images, (4, 4, 4, 4))
    height, width = images.shape[-2:]
    offset = (uniform(derive(keys, CROP_STREAM), 2) * 9).long()  # (N, 2) of 0 … 8
    down, across = (torch.arange(side, device=images.device) for side in (height, width))
    rows = (offset[:, 0, None] + down)[:, None, :, None]  # (N, 1, H, 1)
    columns = (offset[:, 1, None] + across)[:, None, None, :]  # (N, 1, 1, W)
    sample = torch.arange(len(images), device=images.device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return padded[sample, channel, rows, columns]


def _resized_crop(images: Tensor, keys: Tensor) -> Tensor:
    area, aspect, x, y = uniform(derive(keys, CROP_STREAM), 4).unbind(1)
    area = AREA[0] + (AREA[1] - AREA[0]) * area
    ratio = torch.exp((2 * aspect - 1) * math.log(ASPECT))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    affine = torch.zeros(len(images), 2, 3, device=images.device)
    affine[:, 0, 0], affine[:, 1, 1] = width, height
    affine[:, 0, 2], affine[:, 1, 2] = (2 * x - 1) * (1 - width), (2 * y - 1) * (1 - height)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    cropped = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return cropped.round().to(torch.uint8)
