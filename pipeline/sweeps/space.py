"""A sweep's own parameters, sweep/params.yaml: what is searched, how, and for how long.

α and β depend on T: "if T is large, α and β are lowered" (paper §2.2), so searching them apart from
T would pair a T with another one's α. ``alpha_100`` and ``beta_100`` are their values at T = 100:

    α = alpha_100 · √(100 / T)        β = beta_100 · 100 / T

so that the surrogate decays by as much over a presentation, whatever its length. 0.3 and 0.01 are
the paper's. ``alpha`` and ``beta`` themselves can be searched, too. ``distil_weight`` is the weight
of ``distil`` alone.

What comes before the fine-tuning can be searched as well, and a trial then calibrates for itself:
the parameters of ``balance_thresholds`` in :data:`CALIBRATION`, and ``levels`` of the ANN's
activations, where there is a file of weights for each.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from pipeline.errors import ParamsError
from pipeline.params import Params, StdbParams
from pipeline.typed import Count, NonNegative, Positive, Section, Seed, load, problems, shown

Given = TypeVar("Given", bound=Section)
Scaled = tuple[str, Callable[[float, int], float]]
SCALED: dict[str, Scaled] = {  # name → what it stands for, and its value from this one's and T
    "alpha_100": ("alpha", lambda value, timesteps: value * math.sqrt(100 / timesteps)),
    "beta_100": ("beta", lambda value, timesteps: value * 100 / timesteps),
}
WEIGHT, TEMPERATURE = "distil_weight", 2.0
"""The weight of ``distil``, and its temperature where params.yaml has none."""
CALIBRATION = ("method", "per", "percentile", "initial_membrane", "bias_correction")
LEVELS = "levels"
SEARCHABLE = tuple(
    name
    for name in (*StdbParams.model_fields, *SCALED, WEIGHT, *CALIBRATION, LEVELS)
    if name != "epochs"
)
EXCLUDING = (  # a value of one may forbid another's
    ("distil", WEIGHT, "from_scratch", "logit_scale"),
    ("surrogate", "alpha", "beta", "over_threshold", *SCALED),
    (*CALIBRATION, "leak"),
)

Finite = Annotated[float, Field(allow_inf_nan=False)]
Bounds = Annotated[list[Finite], Field(min_length=2, max_length=2)]
Integers = Annotated[list[int], Field(min_length=2, max_length=2)]
Values = Annotated[list[Any], Field(min_length=1)]


class Range(Section):
    """The values of one parameter: exactly one of these."""

    choice: Values | None = None
    """One of these values, drawn."""
    grid: Values | None = None
    """Each of these values."""
    uniform: Bounds | None = None
    """Between two numbers."""
    log_uniform: Bounds | None = None
    """Between two numbers above 0, equally likely by order of magnitude."""
    integer: Integers | None = None
    """A whole number from the first to the last."""

    @model_validator(mode="after")
    def _one(self) -> "Range":
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            raise ValueError(
                f"says {sorted(given) or 'nothing'}; allowed: exactly one of "
                f"{', '.join(type(self).model_fields)}"
            )
        if self.kind not in ("choice", "grid") and not self.values[0] < self.values[1]:
            raise ValueError(f"{self.kind} is {self.values}; allowed: the smaller number first")
        if self.log_uniform is not None and self.log_uniform[0] <= 0:
            raise ValueError(f"log_uniform is {self.log_uniform}; allowed: numbers above 0")
        return self

    @property
    def kind(self) -> str:
        """Name of the one that is given."""
        return next(iter(self.model_dump(exclude_none=True)))

    @property
    def values(self) -> list[Any]:
        """The values, or first and last."""
        return next(iter(self.model_dump(exclude_none=True).values()))


Limit = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class BudgetParams(Section):
    """When a sweep ends, besides the number of trials; what runs then is stopped and counts."""

    neuron_steps: Limit | None
    """Neurons × time steps × images of all trials' training: a trial's cost, which grows with T."""
    seconds: Limit | None
    """Wall-clock time, over all attempts where a sweep was killed and goes on."""

    def __str__(self) -> str:
        limits = [f"{name} {value:g}" for name, value in self if value is not None]
        return f"the budget ({', '.join(limits) or 'no limit'})"


class AshaParams(Section):
    """Successive halving (Li et al. 2020): bad trials end early, compared at the same epoch.

    Trials are compared with those of about the same T, within a factor of 2, where there is a cost.
    """

    grace: Count
    """Number of epochs that every trial has."""
    reduction: Annotated[int, Field(ge=2)]
    """One of so many trials goes on, 2 or more."""


class ResourceParams(Section):
    """What a trial may use."""

    parallel: Count | Literal["auto"]
    """Number of trials at once; auto: as many as there is room for."""
    workers: Count
    """Number of workers of each; several are a Ray Train job of its own."""
    cpus: Positive
    """Number of cores of a worker, above 0."""
    gpus: NonNegative | Literal["auto"]
    """Number of GPUs of a worker; a fraction shares one; auto: one where there are any."""


class AnnParams(Section):
    """A trained ANN."""

    levels: Count
    """Number of levels of its activations, 1 or more."""
    weights: str
    """Its weights file."""


class SweepParams(Section):
    """All of sweep/params.yaml."""

    method: Literal["optuna", "random", "grid"]
    """TPE of Optuna, random values, or every combination."""
    objectives: Literal["accuracy", "accuracy, timesteps", "accuracy, energy_delay"]
    """Accuracy alone, or its Pareto front against time steps or energy-delay."""
    floor: NonNegative
    """The winner has the least time steps (energy-delay) at which accuracy is within so many points
    of the ANN's; accuracy alone: it is the most accurate."""
    trials: Count
    """Number of trials; of a grid: the number of combinations at most."""
    epochs: Count
    """Number of epochs of a trial."""
    train_images: Count | None
    """Training images of a trial, drawn by seed; None: as many as stdb.images says."""
    seed: Seed
    """Seed of the search."""
    budget: BudgetParams
    asha: AshaParams | None
    """None: every trial runs to its end."""
    resources: ResourceParams
    anns: list[AnnParams] = Field(default_factory=list)
    """The ANN of each number that ``levels`` may be, besides ``network.levels`` of params.yaml,
    whose ANN is the pipeline's."""
    space: Annotated[dict[str, Range], Field(min_length=1)]
    """Name → values: any parameter of ``stdb`` in params.yaml, alpha_100, beta_100, distil_weight;
    of ``balance_thresholds`` method, per, percentile, initial_membrane, bias_correction; levels."""

    @model_validator(mode="after")
    def _space_is_known(self) -> "SweepParams":
        for name, values in self.space.items():
            if name not in SEARCHABLE:
                allowed = ", ".join(SEARCHABLE)
                raise ValueError(f"space.{name} is nothing to search; allowed: {allowed}")
            if (self.method == "grid") != (values.kind == "grid"):
                raise ValueError(
                    f"space.{name} is {values.kind} and method is {self.method}; allowed: grid "
                    "with method: grid, anything else with optuna or random"
                )
        names = {name: base for name, (base, _) in SCALED.items()} | {WEIGHT: "distil"}
        for name, base in names.items():
            if name in self.space and base in self.space:
                raise ValueError(f"space has {name} and {base}; allowed: one of them")
        if self.method == "grid" and self.combinations > self.trials:
            raise ValueError(
                f"trials is {self.trials} and the grid has {self.combinations} combinations; "
                "allowed: trials of at least as many"
            )
        if self.asha is not None and self.asha.grace > self.epochs:
            raise ValueError(
                f"asha.grace is {self.asha.grace}; allowed: up to epochs, {self.epochs}"
            )
        return self

    @property
    def weights(self) -> dict[int, str]:
        """Number of levels → weights file."""
        return {ann.levels: ann.weights for ann in self.anns}

    @property
    def cost(self) -> str | None:
        """The metric that accuracy is weighed against."""
        return self.objectives.partition(", ")[2] or None

    @property
    def combinations(self) -> int:
        """Number of combinations of a grid."""
        return math.prod(len(values.values) for values in self.space.values())


def load_sweep(path: Path, base: Params) -> SweepParams:
    """Read and check a sweep's parameters; every value that can be drawn is allowed in params.yaml.

    Raises:
        ParamsError: names keys, values, and what is allowed.
    """
    sweep = load(path, SweepParams)
    if base.stdb.progressive and "timesteps" not in sweep.space:
        raise ParamsError(
            f"{path} cannot be used: stdb.timesteps is {base.stdb.timesteps}, and a trial has one "
            "T; allowed: one in params.yaml, or timesteps in the space"
        )
    try:
        _check_levels(sweep, base.network.levels)
        for sample in samples(sweep.space, base.stdb):
            settings(sample, base, sweep.weights)
    except ParamsError as error:
        raise ParamsError(f"{path} cannot be used: space: {error}") from None
    return sweep


def _check_levels(sweep: SweepParams, own: int | None) -> None:
    """Refuse levels that no ANN was trained with.

    Raises:
        ParamsError: says which.
    """
    levels = sweep.space.get(LEVELS)
    if levels is None:
        if sweep.anns:
            raise ParamsError("levels is not there, and anns are; allowed: anns: []")
        return
    if levels.kind not in ("choice", "grid"):
        raise ParamsError(f"levels is {levels.kind}; allowed: choice, grid")
    unused = [ann.levels for ann in sweep.anns if ann.levels not in levels.values]
    if unused:
        raise ParamsError(f"anns has levels {unused[0]}, and levels has not; allowed: none such")
    if own in sweep.weights or len(sweep.weights) < len(sweep.anns):
        raise ParamsError(
            f"anns has several of the same levels, or {own}, which network.levels is and the "
            "pipeline's ANN has; allowed: one of each other"
        )
    there = {own, *sweep.weights}
    missing = [shown(n) for n in levels.values if type(n) is not int or n not in there]
    if missing:
        raise ParamsError(
            f"levels is {', '.join(missing)}; allowed: {own}, which network.levels is, and those "
            "of anns"
        )


def samples(space: dict[str, Range], base: StdbParams) -> Iterator[dict[str, Any]]:
    """Values that a trial may have, such that what is allowed for each is allowed for all.

    Every T alone; every other value at the least and the largest T, together with those that it
    depends on (a line of :data:`EXCLUDING`), in up to 4096 combinations; then the corners, as many.
    """
    steps = space["timesteps"].values if "timesteps" in space else [base.last_timesteps]
    yield from ({"timesteps": value} for value in steps)
    together = [[n for n in names if n in space] for names in EXCLUDING]
    alone = [[n] for n in space if n != "timesteps" and n not in itertools.chain(*together)]
    for names in [*alone, *filter(None, together)]:
        first = {name: space[name].values[0] for name in names}
        each = ({**first, name: value} for name in names for value in space[name].values)
        pairs = [[(name, value) for value in space[name].values] for name in names]
        several = map(dict, itertools.islice(itertools.product(*pairs), 4096))
        for chosen in itertools.chain(each, several if len(names) > 1 else ()):
            yield from ({**chosen, "timesteps": t} for t in sorted({min(steps), max(steps)}))
    ends = [[(name, r.values[0]), (name, r.values[-1])] for name, r in space.items()]
    yield from map(dict, itertools.islice(itertools.product(*ends), 4096))


def settings(
    sample: dict[str, Any], base: Params, weights: Mapping[int, str] | None = None
) -> Params:
    """The parameters of a trial: params.yaml's, with what was drawn.

    A T that was drawn takes the place of several, and the epochs at the last of them stay.

    Args:
        sample: name → value, of the names of a space.
        base: params.yaml's.
        weights: number of levels → weights file.

    Raises:
        ParamsError: a value is not allowed.
    """
    calibration = {name: value for name, value in sample.items() if name in CALIBRATION}
    changed: dict[str, Section] = {
        "stdb": _with(base.stdb, _of_stdb(sample, base.stdb)),
        "balance_thresholds": _with(base.balance_thresholds, calibration),
    }
    if LEVELS in sample and (levels := sample[LEVELS]) != base.network.levels:
        changed["network"] = _with(base.network, {LEVELS: levels})
        changed["train_ann"] = _with(base.train_ann, {"weights": (weights or {})[levels]})
    return base.model_copy(update=changed)


def _of_stdb(sample: dict[str, Any], base: StdbParams) -> dict[str, Any]:
    """What a sample says of ``stdb``, in its own names."""
    values = {name: value for name, value in sample.items() if name in StdbParams.model_fields}
    if isinstance(steps := sample.get("timesteps"), list):
        raise ParamsError(f"timesteps is {shown(steps)}; allowed: one T, since a trial has one")
    if steps is not None and isinstance(base.epochs, list):
        values["epochs"] = base.epochs[-1]
    for name in (name for name in (*SCALED, WEIGHT) if name in sample):
        if type(sample[name]) not in (int, float):
            raise ParamsError(f"{name} is {shown(sample[name])}; allowed: a number")
    for name, (stands_for, of) in SCALED.items():
        if name in sample:
            steps = base.last_timesteps if steps is None else steps
            values[stands_for] = of(sample[name], steps)
    if WEIGHT in sample:
        temperature = TEMPERATURE if base.distil is None else base.distil.temperature
        values["distil"] = {"weight": sample[WEIGHT], "temperature": temperature}
    return values


def _with(base: Given, values: dict[str, Any]) -> Given:
    """A section with other values, checked."""
    try:
        return type(base)(**base.model_dump() | values)
    except ValidationError as error:
        raise ParamsError(problems(error, type(base))[0]) from None


def short(value: Any) -> str:
    """A searched value as people read it: three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
