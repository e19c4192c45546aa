"""Networks that cannot work are refused before they are built or trained."""

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

import stdb
from pipeline.errors import StageError
from pipeline.learning import published
from pipeline.learning.dropout import SampleDropout

TRAINING = 4 * 5  # bytes a weight: itself, its gradient, three of Adam with amsgrad; float32
OURS = (  # and Python's: folders of code that is not a person's own
    str(Path(str(stdb.__file__)).parent),
    str(Path(__file__).parents[1]),
    sysconfig.get_path("stdlib"),
)


def check_room(arguments: dict[str, Any]) -> None:
    """Find out how large a network would be before any of it is allocated.

    Args:
        arguments: of ``stdb.build_network``.

    Raises:
        StageError: its training needs more memory than is free; names what makes it large.
        ValueError: there is no such network.
    """
    try:
        with torch.device("meta"):
            network = stdb.build_network(**arguments)
        weights = sum(parameter.numel() for parameter in network.parameters())
    except (RuntimeError, OverflowError, TypeError):  # not even its size is a number for torch
        weights = 2**63
    needed, there = weights * TRAINING, psutil.virtual_memory().available
    if needed > there:
        raise StageError(
            f"{arguments['architecture']} with network.width {arguments['width']:g}, "
            f"network.hidden {arguments['hidden']} and data.image_size "
            f"{arguments['image_size']} needs {needed / 2**30:,.3g} GiB for weights and "
            f"optimiser; there are {there / 2**30:,.3g} GiB free; allowed: smaller ones"
        )


def build_own(arguments: dict[str, Any], shape: tuple[int, int, int]) -> nn.Module:
    """The network of a function of one's own, or of torchvision, called once, on two images.

    Args:
        arguments: of ``stdb.build_network``, with ``module:function`` as architecture, or
            ``torchvision:NAME``.
        shape: (C, H, W) of an image.

    Raises:
        StageError: it cannot be built or called, or does not give a logit for each class; names
            the function, its own exception, and where that was raised.
    """
    name, classes = arguments["architecture"], arguments["num_classes"]
    try:
        if name.startswith(published.PREFIX):
            network = published.build(name, classes)
        else:
            network = stdb.build_network(**arguments)
    except (Exception, SystemExit) as error:
        raise StageError(f"network.architecture is {name}, which {_raised(error)}") from error
    if not isinstance(network, nn.Module):
        raise StageError(
            f"network.architecture is {name}, which returns a {type(network).__name__}; allowed: "
            "an nn.Module"
        )
    _check_channels(name, network, shape[0])
    logits = _call(name, network, shape)
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        gives = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise StageError(
            f"network.architecture is {name}, whose network gives {gives} for two images; allowed: "
            f"a tensor of (2, {classes}), a logit for each of the {classes} classes"
        )
    if not logits.is_floating_point() or not logits.isfinite().all():
        raise StageError(
            f"network.architecture is {name}, whose logits of two grey images are {logits.dtype}, "
            "not all of them finite; allowed: finite floating point numbers"
        )
    return network


def _check_channels(name: str, network: nn.Module, channels: int) -> None:
    """Refuse torchvision's networks for grey images, in plainer words than torch's."""
    convolutions = (m for m in network.modules() if isinstance(m, nn.Conv2d))
    taken = next((m.in_channels for m in convolutions), channels)
    if name.startswith(published.PREFIX) and taken != channels:
        raise StageError(
            f"network.architecture is {name}, which takes images of {taken} channels; the data "
            f"set's have {channels}; allowed: colour images, or another network"
        )


def check_norms(network: nn.Module) -> None:
    """Refuse batch norms that share their statistics among processes in a way of their own.

    Raises:
        StageError: names the layer, and what is allowed.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise StageError(
                f"layer {name} is a SyncBatchNorm; allowed: nn.BatchNorm2d, whose statistics are "
                "the same for any number of workers here (train_ann.norm_images)"
            )


def check_randomness(network: nn.Module, shape: tuple[int, int, int]) -> None:
    """Refuse a training whose random numbers are no function of seed, epoch and sample.

    Args:
        network: is called once as in training; stays as it is.
        shape: (C, H, W) of an image.

    Raises:
        StageError: it draws others than the masks that
            :class:`pipeline.learning.dropout.SampleDropout` knows, or cannot be called.
    """
    statistics = {name: buffer.clone() for name, buffer in network.named_buffers()}
    images = torch.zeros(2, *shape)
    try:
        with _as_it_was(network):
            before = torch.random.get_rng_state()
            with SampleDropout(0, torch.arange(2)):
                torch.func.functional_call(network.train(), statistics, images)
            drawn = not torch.equal(torch.random.get_rng_state(), before)
    except Exception as error:
        raise StageError(
            f"the network in training is given images of {tuple(shape)} (C, H, W) and "
            f"{_raised(error)}"
        ) from error
    if drawn:
        raise StageError(
            "the network in training draws random numbers that depend on batches, workers and "
            "restarts; allowed: nn.Dropout, nn.Dropout1d, nn.Dropout2d, and F.dropout, "
            "F.dropout1d, F.dropout2d"
        )


def _call(name: str, network: nn.Module, shape: tuple[int, int, int]) -> Any:
    """The logits of two images of grey; leaves the network and torch's generator as they are."""
    try:
        with _as_it_was(network), torch.no_grad():
            return network.eval()(torch.zeros(2, *shape))
    except (Exception, SystemExit) as error:
        raise StageError(
            f"network.architecture is {name}, whose network is given images of "
            f"{tuple(shape)} (C, H, W) and {_raised(error)}"
        ) from error


@contextmanager
def _as_it_was(network: nn.Module) -> Iterator[None]:
    """Gives modules their modes back afterwards, and torch's generator its state."""
    modes = {module: module.training for module in network.modules()}
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _raised(error: BaseException) -> str:
    """An exception of a person's own code, and the line of it."""
    cause = error
    while isinstance(cause.__cause__, BaseException):  # the engine's words for it come on top
        cause = cause.__cause__
    text = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
    if isinstance(cause, SyntaxError):
        return f"raises {text}"  # the message has the line
    frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if _is_own(frame)]
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"raises {text}{where}"


def _is_own(frame: traceback.FrameSummary) -> bool:
    """Whether a line is of a person's own code: not of a package, Python or this project."""
    elsewhere = ("site-packages", "<frozen")
    return not frame.filename.startswith(OURS) and not any(p in frame.filename for p in elsewhere)


def check_calibration(labels: Tensor, classes: int) -> None:
    """Refuse calibration images that all show the same.

    Args:
        labels: (N,) of the images.
        classes: how many the data set has.

    Raises:
        StageError: they are of one class, and there are more; names the class and what is allowed.
    """
    shown = labels.unique().tolist()
    if len(shown) == 1 and classes > 1:
        raise StageError(
            f"balance_thresholds.images draws {len(labels)} calibration images, all of class "
            f"{shown[0]} of {classes}, on which layers may be silent that others need; allowed: "
            f"more images{', or another balance_thresholds.seed' if len(labels) > 1 else ''}"
        )
