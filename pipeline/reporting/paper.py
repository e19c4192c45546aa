"""Table 1 of the paper, to stand beside what comes out here."""

from dataclasses import dataclass

from pipeline.params import NetworkParams
from pipeline.reporting.literature import data_set_of


@dataclass(frozen=True)
class PaperRow:
    """A row of Table 1: top-1 accuracies in %.

    Attributes:
        architecture: of ``stdb.build``.
        source: the data set, as its torchvision class is called in lower case.
        ann: of the ANN.
        converted: ANN–SNN conversion, T = 2500.
        reduced: the conversion at the reduced T.
        hybrid: after STDB at the reduced T.
        timesteps: the reduced T.
    """

    architecture: str
    source: str
    ann: float
    converted: float
    reduced: float
    hybrid: float
    timesteps: int


TABLE_1 = [
    PaperRow("vgg5", "cifar10", 87.88, 87.64, 84.56, 86.91, 75),
    PaperRow("vgg9", "cifar10", 91.45, 90.98, 87.31, 90.54, 100),
    PaperRow("vgg16", "cifar10", 92.81, 92.48, 90.2, 91.13, 100),
    PaperRow("resnet8", "cifar10", 91.35, 91.12, 89.5, 91.35, 200),
    PaperRow("resnet20", "cifar10", 93.15, 92.94, 91.12, 92.22, 250),
    PaperRow("vgg11", "cifar100", 71.21, 70.94, 65.52, 67.87, 125),
    PaperRow("resnet34", "imagenet", 70.2, 65.1, 56.87, 61.48, 250),
    PaperRow("vgg16", "imagenet", 69.35, 68.12, 62.73, 65.19, 250),
]


IMAGENET = 1000  # classes


def nearest(network: NetworkParams, classes: list[str]) -> PaperRow:
    """The paper's row of the same architecture and data, else of the most alike.

    Args:
        network: of the run.
        classes: their names, by which a data set is known from wherever it was read.
    """
    known = data_set_of(classes)
    source = known.name.lower().replace("-", "") if known else ""
    if len(classes) == IMAGENET:
        source = "imagenet"

    def likeness(row: PaperRow) -> tuple[bool, bool, bool]:
        family = row.architecture[:3] == network.architecture[:3]
        return row.architecture == network.architecture, family, row.source == source

    return max(TABLE_1, key=likeness)
