"""What stages hand on to each other as JSON, typed.

A file that is not what its stage writes is refused; the message names it, and the key.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field, RootModel, field_validator
from pydantic_core import PydanticCustomError

from pipeline.files import CONVERSION, METRICS
from pipeline.typed import Section, load_result

RUNS = Path(".results/runs.json")  # when and how long each stage ran here last; nobody's input

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Accuracy = Annotated[float, Field(ge=0, le=1)]


class LayerThreshold(Section):
    """A layer of models/thresholds.json."""

    layer: Annotated[str, Field(max_length=200)]
    """Name of the layer."""
    threshold: Positive
    """V."""
    balanced: bool
    """Whether it came out of Algorithm 1, so that the threshold scale applies to it."""


class Thresholds(Section):
    """models/thresholds.json."""

    architecture: str = ""
    """``network.architecture``."""
    layers: Annotated[list[LayerThreshold], Field(min_length=1)]
    """The spiking layers, each once."""

    @field_validator("layers")
    @classmethod
    def _each_once(cls, layers: list[LayerThreshold]) -> list[LayerThreshold]:
        names = [row.layer for row in layers]
        if twice := next((name for name in names if names.count(name) > 1), None):
            said = "each layer once, {name} stands twice"
            raise PydanticCustomError("twice", said, {"name": twice})
        return layers


class Conversion(Section):
    """models/conversion.json."""

    timesteps: Count
    """T that the scale was found at."""
    scale: Positive
    """The threshold scale that is best on validation."""


class SplitSummary(Section):
    """One split."""

    images: Count
    """Number of images."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Digest of its file."""
    own: bool = False
    """Whether the source has this split itself; else it was drawn."""


class DataSummary(Section):
    """metrics/data.json."""

    classes: Annotated[list[str], Field(min_length=1)]
    """Names of the classes."""
    shape: tuple[Count, Count, Count]
    """(C, H, W) of an image."""
    train: SplitSummary
    """The images to learn from."""
    validation: SplitSummary
    """The images that choose."""
    test: SplitSummary
    """The images that are read once."""


class Accuracies(Section):
    """Top-1 accuracies of a network, in [0, 1]."""

    validation: Accuracy
    """Accuracy on the validation split."""
    test: Accuracy
    """Accuracy on the test split."""


class TrainingLoss(Section):
    """Mean cross-entropy of an epoch."""

    train: NonNegative | None
    """Loss on the training split; None where nothing was trained."""


class AnnResults(Section):
    """metrics/train_ann.json."""

    accuracy: Accuracies
    """Accuracies of the best epoch."""
    epoch: Annotated[int, Field(ge=0)]
    """The best epoch; 0: a file of weights."""
    loss: TrainingLoss
    """Loss of the best epoch."""


class Run(Section):
    """A stage of .results/runs.json."""

    seconds: NonNegative
    """How long it took."""
    ended: str
    """When it ended: date, time, zone."""
    machine: str
    """Name of the machine."""


class Runs(RootModel[dict[str, Run]]):
    """.results/runs.json: name of the stage → its last run here."""


def read_thresholds(path: Path) -> Thresholds:
    """What balance_thresholds wrote."""
    return load_result(path, Thresholds)


def read_conversion(root: Path = Path()) -> Conversion:
    """What evaluate_converted wrote."""
    return load_result(root / CONVERSION, Conversion)


def read_ann_results() -> AnnResults:
    """What train_ann wrote of its network."""
    return load_result(METRICS / "train_ann.json", AnnResults)


def read_data_summary() -> DataSummary | None:
    """What prepare_data wrote of its splits; None where there is nothing yet."""
    path = METRICS / "data.json"
    return load_result(path, DataSummary) if path.exists() else None


def read_runs() -> dict[str, Run]:
    """When and how long each stage ran here last; empty where none did."""
    return dict(load_result(RUNS, Runs, "remove it").root) if RUNS.exists() else {}
