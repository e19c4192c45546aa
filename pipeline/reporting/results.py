"""What the other stages measured, typed: their metrics files and the rows of their plots."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import StageError
from pipeline.files import METRICS, PLOTS, read_csv
from pipeline.handed_on import (
    Accuracies,
    Accuracy,
    AnnResults,
    Count,
    DataSummary,
    NonNegative,
    Positive,
)
from pipeline.typed import Section, load_result, problems


class _Record(BaseModel):
    """A row of a CSV file, whose values are text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


Loss = Annotated[float, Field(ge=-1, le=1)]
EpochRow = dict[str, float]  # the metrics of an epoch, by name


class Spiking(Section):
    """A spiking network on the test split."""

    timesteps: Count
    """T."""
    spikes_per_neuron: dict[str, NonNegative]
    """Layer → spikes per neuron and image (Fig. 3)."""
    synaptic_operations: NonNegative
    """Synaptic operations per image."""
    mean_spikes: NonNegative
    """Spikes per neuron and image, of all layers together."""
    energy_pj: NonNegative
    """Picojoules per image."""
    energy_delay: NonNegative
    """Picojoules per image × time steps."""


class Converted(Spiking):
    """The converted network."""

    accuracy: Accuracy
    """Test accuracy."""


class Scaled(Converted):
    """The converted network at the reduced T, thresholds scaled."""

    threshold_scale: Positive
    """The scale that is best on validation."""


class AnnOnTest(Section):
    """The ANN that was converted."""

    accuracy: Accuracy
    """Test accuracy."""
    energy_pj: NonNegative
    """Picojoules per image."""


class Losses(Section):
    """Accuracy of the ANN less that of the converted network."""

    long: Loss
    """Accuracy that is lost at the long T."""
    reduced: Loss
    """Accuracy that is lost at the reduced T."""


class Quantised(Section):
    """Accuracy of the ANN whose activations have T levels, what T steps can say of it."""

    long: Accuracy
    """At the long T, balanced thresholds."""
    reduced: Accuracy
    """At the reduced T, scaled thresholds."""


class ConversionResults(Section):
    """metrics/evaluate_converted.json."""

    ann: AnnOnTest
    """The ANN."""
    long: Converted
    """The network at the long T, balanced thresholds."""
    reduced: Scaled
    """The network at the reduced T, scaled thresholds."""
    loss_to_ann: Losses
    """What the conversion costs."""
    quantised: Quantised
    """The ANN with T levels."""


class Finetuned(Spiking):
    """The fine-tuned network at a T."""

    accuracy: Accuracies
    """Accuracies of the best epoch."""
    epoch: Annotated[int, Field(ge=0)]
    """The best epoch."""


class FinetunedResults(Finetuned):
    """metrics/finetune_stdb.json: the network at the last T."""

    by_timesteps: dict[str, Finetuned] = Field(default_factory=dict)
    """Where there were several T: T → the network at it."""

    @property
    def at_each(self) -> list[Finetuned]:
        """The network at each T, in turn, from the largest on."""
        each = self.by_timesteps.values() if self.by_timesteps else [self]
        return sorted(each, key=lambda one: -one.timesteps)


class CurvePoint(_Record):
    """Accuracy after a time step."""

    timesteps: int
    """The step."""
    accuracy: float
    """Test accuracy after it."""
    threshold_scale: float = 1.0
    """Scale of the thresholds."""


class LayerRow(_Record):
    """A layer's diagnosis; see ``stdb.LayerDiagnosis``."""

    layer: str
    """Name of the layer."""
    threshold: float
    """V."""
    rate: float
    """Spikes per neuron and step."""
    correlation: float
    """Correlation with the ANN's activations."""
    dead: float
    """Share of the neurons that never fired."""
    saturated: float
    """Share of (image, neuron) that fired in nearly every step."""
    residual: float
    """Spikes' worth of potential that was left."""
    hint: str
    """What helps; empty where the layer is well."""


class ConfusionRow(_Record):
    """Images of one class that were decided for another, or the same."""

    actual: str
    """Class."""
    predicted: str
    """Class decided for."""
    images: int
    """How many."""


class ExitRow(_Record):
    """Leaving early at a confidence."""

    confidence: float
    """The probability at which an image is left."""
    timesteps: float
    """Steps on average."""
    accuracy: float
    """Share of right decisions."""


class Plots(_Record):
    """The rows of plots/*.csv, by name of the file."""

    train_ann: list[EpochRow]
    """Epochs of the ANN."""
    finetune_stdb: list[EpochRow]
    """Epochs of the fine-tuning."""
    converted_accuracy: list[CurvePoint]
    """The converted network's accuracy by step."""
    finetuned_accuracy: list[CurvePoint]
    """The fine-tuned network's accuracy by step."""
    converted_quantised: list[CurvePoint]
    """The ANN's accuracy by number of levels."""
    converted_diagnosis: list[LayerRow]
    """Layers of the converted network."""
    finetuned_diagnosis: list[LayerRow]
    """Layers of the fine-tuned network."""
    finetuned_confusion: list[ConfusionRow]
    """Decisions of the fine-tuned network."""
    finetuned_exits: list[ExitRow]
    """Leaving early."""


class Results(_Record):
    """All that the report is made of."""

    data: DataSummary
    """prepare_data's."""
    ann: AnnResults
    """train_ann's."""
    converted: ConversionResults
    """evaluate_converted's."""
    finetuned: FinetunedResults
    """finetune_stdb's."""
    plots: Plots
    """Rows of the plots."""


def read_results() -> Results:
    """What the other stages wrote.

    Raises:
        StageError: a file is missing or is not theirs; names it, and what is wrong in it.
    """
    return Results(
        data=load_result(METRICS / "data.json", DataSummary),
        ann=load_result(METRICS / "train_ann.json", AnnResults),
        converted=load_result(METRICS / "evaluate_converted.json", ConversionResults),
        finetuned=load_result(METRICS / "finetune_stdb.json", FinetunedResults),
        plots=read_plots(),
    )


def read_plots() -> Plots:
    """The rows of plots/*.csv; raises as :func:`read_results` does."""
    rows = {name: read_csv(PLOTS / f"{name}.csv") for name in Plots.model_fields}
    try:
        return Plots.model_validate(rows)
    except ValidationError as error:
        name, _, what = problems(error, Plots)[0].partition(".")
        path = PLOTS / f"{name}.csv"
        raise StageError(
            f"{path} is not what its stage writes: row {what}; run dvc repro"
        ) from error


# -- the few figures of a whole execution ----------------------------------------------------------


def by_timestep(results: Results) -> list[tuple[int, dict[str, float]]]:
    """Test accuracy after each number of steps, for MLflow's charts, where T is the step.

    ``converted`` at the reduced threshold scale, ``levels`` the ANN with as many; ``stdb`` the
    network that was fine-tuned last; ``stdb_each`` those that were fine-tuned at that T.
    """
    scale, plots = results.converted.reduced.threshold_scale, results.plots
    each = [(one.timesteps, one.accuracy.test) for one in results.finetuned.at_each]
    curves = {
        "converted": at_scale(plots.converted_accuracy, scale),
        "levels": at_scale(plots.converted_quantised, scale),
        "stdb": plots.finetuned_accuracy,
    }
    points = {n: {row.timesteps: row.accuracy for row in rows} for n, rows in curves.items()}
    points["stdb_each"] = dict(each)
    steps = sorted({t for curve in points.values() for t in curve})
    return [
        (t, {f"by_timestep/{name}": curve[t] for name, curve in points.items() if t in curve})
        for t in steps
    ]


def at_scale(curve: Sequence[CurvePoint], scale: float) -> list[CurvePoint]:
    """The points of a curve at one threshold scale."""
    return [row for row in curve if row.threshold_scale == scale]


def headline(results: Results) -> dict[str, float]:
    """The figures of an execution, grouped as MLflow groups them; names as in :func:`summary`."""
    long, reduced, tuned = results.converted.long, results.converted.reduced, results.finetuned
    return {
        "accuracy/ann": results.ann.accuracy.test,
        "accuracy/quantised": results.converted.quantised.reduced,
        "accuracy/converted": long.accuracy,
        "accuracy/scaled": reduced.accuracy,
        "accuracy/stdb": tuned.accuracy.test,
        "accuracy/stdb_validation": tuned.accuracy.validation,
        "timesteps/converted": long.timesteps,
        "timesteps/scaled": reduced.timesteps,
        "timesteps/stdb": tuned.timesteps,
        "energy/ann_pj": results.converted.ann.energy_pj,
        "energy/converted_pj": long.energy_pj,
        "energy/scaled_pj": reduced.energy_pj,
        "energy/stdb_pj": tuned.energy_pj,
        **{f"accuracy/{name}": one.accuracy.test for name, one in progressive(tuned).items()},
        **{f"energy/{name}_pj": one.energy_pj for name, one in progressive(tuned).items()},
        "spikes/mean": tuned.mean_spikes,
        **{f"spikes/{name}": value for name, value in tuned.spikes_per_neuron.items()},
    }


def summary(results: Results) -> dict[str, Any]:
    """The few numbers that runs are compared by: test accuracy, nanojoules per image.

    ``converted`` is the converted network at the long T, ``scaled`` at the reduced one, ``stdb_t8``
    the fine-tuned one at the T of 8 of several.
    """
    converted, tuned = results.converted, results.finetuned
    return {
        "accuracy": {
            "ann": results.ann.accuracy.test,
            "converted": converted.long.accuracy,
            "scaled": converted.reduced.accuracy,
            "stdb": tuned.accuracy.test,
            **{name: one.accuracy.test for name, one in progressive(tuned).items()},
        },
        "energy_nj": {
            "ann": converted.ann.energy_pj / 1000,
            "stdb": tuned.energy_pj / 1000,
            **{name: one.energy_pj / 1000 for name, one in progressive(tuned).items()},
        },
    }


def progressive(tuned: FinetunedResults) -> dict[str, Finetuned]:
    """The network at each of several T, as ``stdb_t8``; none where there was one T."""
    return {f"stdb_t{one.timesteps}": one for one in tuned.at_each if tuned.by_timesteps}
