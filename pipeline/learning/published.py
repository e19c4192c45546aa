"""torchvision's classification networks, by name: ``torchvision:resnet18``."""

import difflib
from typing import Any

from torch import nn

PREFIX = "torchvision:"
WITH_AUXILIARY = ("googlenet", "inception_v3")  # have classifiers that only their training needs
CLOSE = 3  # names in a message


def unknown(architecture: str) -> str:
    """What is allowed in the place of a name that torchvision does not have; empty where it has."""
    names, name = _names(), architecture.removeprefix(PREFIX)
    if name in names:
        return ""
    close = difflib.get_close_matches(name[:80], names, CLOSE, cutoff=0.5)
    offered = [f"{PREFIX}{n}" for n in close or ("resnet18", "vgg16_bn", "mobilenet_v2")]
    more = "" if close else f" and {len(names) - len(offered)} other names of torchvision.models"
    return f"{', '.join(offered)}{more}"


def build(architecture: str, num_classes: int) -> nn.Module:
    """A network of torchvision's, weights drawn from torch's generator.

    Args:
        architecture: ``torchvision:NAME``.
        num_classes: number of logits.
    """
    from torchvision import models

    name = architecture.removeprefix(PREFIX)
    options: dict[str, Any] = {}
    if name in WITH_AUXILIARY:
        options = {"aux_logits": False, "init_weights": True}
    network: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
    return network


def head(network: nn.Module) -> str:
    """Name of the layer that gives the classes: the last with weights."""
    names = [n for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return str(names[-1])


def _names() -> list[str]:
    from torchvision import models

    return list(models.list_models(module=models))
