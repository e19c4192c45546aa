"""The comparison of surrogates: its parameters, searches, rows, picture and sentence."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from pipeline.errors import ParamsError
from pipeline.params import Params
from pipeline.sweeps.space import ResourceParams, SweepParams, settings
from pipeline.typed import Count, NonNegative, Section, Seed, Steps, load, one_of
from stdb import ENCODERS, SURROGATES

Row = dict[str, Any]  # a cell: surrogate, T, seed, and what it came to
Times = dict[int, dict[str, float]]  # T → of the converted network: its scale, its accuracy


class WidthParams(Section):
    """The values of β that are tried: exactly one of these."""

    beta: Annotated[list[NonNegative], Field(min_length=1)] | None = None
    """β as it is, 0 or more."""
    beta_100: Annotated[list[NonNegative], Field(min_length=1)] | None = None
    """β at T = 100; at T it is beta_100 · 100/T."""

    @model_validator(mode="after")
    def _one(self) -> "WidthParams":
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("says none or both; allowed: exactly one of beta, beta_100")
        return self


Name = Annotated[str, AfterValidator(one_of(SURROGATES))]
Encoder = Annotated[str, AfterValidator(one_of(ENCODERS))]


class KindParams(Section):
    """What is compared on networks of one kind."""

    timesteps: Annotated[list[Steps], Field(min_length=1)]
    """Numbers of time steps T, 1 to 32767."""
    beta_at: Steps
    """T at which β is searched, with the first seed."""
    over_threshold: bool | None
    """Whether all are over U/V; None: those that look at membranes."""
    surrogates: Annotated[dict[Name, WidthParams | None], Field(min_length=1)]
    """Name → values of β; None: its own, or it has none."""


class ComparisonParams(Section):
    """All of sweep/surrogates/params.yaml."""

    images: Count
    """Training images of a cell, drawn by ``draw``."""
    draw: Seed
    """Draws the images, the same for all cells."""
    epochs: Count
    """Number of epochs of a cell."""
    seeds: Annotated[list[Seed], Field(min_length=1)]
    """stdb.seed of the cells: order, spikes, dropout, augmentation."""
    resources: ResourceParams
    networks: Annotated[dict[Encoder, KindParams], Field(min_length=1)]
    """By ``stdb.encoder``: what is compared on such networks."""


def load_comparison(path: Path, base: Params) -> tuple[ComparisonParams, KindParams]:
    """Read and check a comparison's parameters; all of them, and those for this network.

    Raises:
        ParamsError: names keys, values, and what is allowed.
    """
    comparison = load(path, ComparisonParams)
    if base.stdb.from_scratch:
        raise ParamsError(
            "stdb.from_scratch is true, and what is compared starts from the converted network; "
            "allowed: false"
        )
    encoder = base.stdb.encoder
    kind = comparison.networks.get(encoder)
    if kind is None:
        raise ParamsError(
            f"{path} has nothing for stdb.encoder: {encoder}; allowed: "
            f"{', '.join(comparison.networks)}, or networks.{encoder} in it"
        )
    try:
        for name in kind.surrogates:
            for t in kind.timesteps:
                settings({"timesteps": t}, base_of(name, kind, base))
    except ParamsError as error:
        raise ParamsError(f"{path} cannot be used with params.yaml: {error}") from None
    return comparison, kind


def base_of(name: str, kind: KindParams, base: Params) -> Params:
    """The parameters with a surrogate as it is by itself."""
    own = {"surrogate": name, "alpha": None, "beta": None, "over_threshold": kind.over_threshold}
    return base.model_copy(update={"stdb": base.stdb.model_copy(update=own)})


def width_search(comparison: ComparisonParams, kind: KindParams, name: str) -> SweepParams | None:
    """The search of β, at one T with the first seed; None: there is nothing to choose."""
    name_of, values = width(kind, name)
    if len(values) < 2:
        return None
    return grid(comparison, name, {name_of: values}, [kind.beta_at], comparison.seeds[:1])


def cell_search(
    comparison: ComparisonParams, kind: KindParams, name: str, beta: float | None
) -> SweepParams:
    """The cells of a surrogate: every T with every seed."""
    fixed = {} if beta is None else {width(kind, name)[0]: [beta]}
    return grid(comparison, name, fixed, kind.timesteps, comparison.seeds)


def width(kind: KindParams, name: str) -> tuple[str, list[float]]:
    """The parameter that is β of a surrogate, and its values; none where it is its own."""
    given = kind.surrogates[name]
    if given is None:
        return "", []
    return next(iter(given.model_dump(exclude_none=True).items()))


def grid(
    comparison: ComparisonParams,
    name: str,
    fixed: dict[str, list[float]],
    timesteps: Sequence[int],
    seeds: Sequence[int],
) -> SweepParams:
    """A sweep over every combination."""
    values = {"surrogate": [name], **fixed, "timesteps": [*timesteps], "seed": [*seeds]}
    trials = len(timesteps) * len(seeds) * max(map(len, fixed.values()), default=1)
    return SweepParams.model_validate(
        {
            "method": "grid",
            "objectives": "accuracy",
            "floor": 0.0,
            "trials": trials,
            "epochs": comparison.epochs,
            "train_images": comparison.images,
            "seed": comparison.draw,
            "budget": {"neuron_steps": None, "seconds": None},
            "asha": None,
            "resources": comparison.resources,
            "space": {key: {"grid": found} for key, found in values.items()},
        }
    )


def cells(trials: Sequence[Row], converted: Times, ann: float) -> list[Row]:
    """The rows of a table: what each trial came to, beside the converted network at its T."""
    rows = []
    for trial in trials:
        t, found = int(trial["timesteps"]), trial["accuracy"]
        before = converted[t]["accuracy"]
        rows.append(
            {
                "surrogate": trial["surrogate"],
                "timesteps": t,
                "seed": trial["seed"],
                "alpha": trial["alpha"],
                "beta": trial["beta"],
                "threshold_scale": converted[t]["scale"],
                "ann": ann,
                "converted": before,
                "accuracy": found,
                "gain": None if found is None else found - before,
                "spikes": trial["spikes"],
                "error": trial["error"],
            }
        )
    return rows


def gains(rows: Sequence[Row]) -> dict[str, dict[int, tuple[float, float]]]:
    """Surrogate → T → mean and standard deviation of the gain over seeds, in points."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["gain"] not in (None, ""):  # it failed; in a file that is no text
            by_time = found.setdefault(row["surrogate"], {})
            by_time.setdefault(int(row["timesteps"]), []).append(100 * float(row["gain"]))
    return {
        name: {
            t: (mean(values), stdev(values) if len(values) > 1 else 0.0)
            for t, values in sorted(by_time.items())
        }
        for name, by_time in found.items()
    }


def sentence(rows: Sequence[Row]) -> str:
    """At which T STDB is behind, level with and ahead of the best of the others.

    Level: by no more than the two standard deviations over seeds together.
    """
    found = gains(rows)
    groups: dict[str, list[int]] = {"behind": [], "level with": [], "ahead of": []}
    for t, (own, spread) in found.get("stdb", {}).items():
        others = [by_time[t] for name, by_time in found.items() if name != "stdb" and t in by_time]
        if others:
            best, other_spread = max(others)
            least = spread + other_spread
            key = "behind" if own < best - least else "ahead of" if own > best + least else ""
            groups[key or "level with"].append(t)
    said = [f"{key} at T = {', '.join(map(str, ts))}" for key, ts in groups.items() if ts]
    return f"STDB against the best of the others: {'; '.join(said)}" if said else "nothing to tell"


def draw_gains(tables: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Accuracy gained over the converted network against T; a panel a kind of network.

    Args:
        tables: the encoder's name → its cells.
        path: a PNG.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    drawn = Figure(figsize=(6.5 * len(tables), 4.5), layout="constrained")
    (panels,) = drawn.subplots(1, len(tables), squeeze=False)
    for axes, (encoder, rows) in zip(panels, tables.items(), strict=True):
        for name, by_time in gains(rows).items():
            means, spreads = zip(*by_time.values(), strict=True)
            axes.errorbar(list(by_time), means, spreads, marker="o", capsize=3, label=name)
        left = dict(_left_to_win(rows))
        axes.plot(list(left), list(left.values()), "k:", label="ANN")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(left))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_xlabel("time steps T")
        axes.set_ylabel("gained over the converted network, points")
        axes.set_title(f"stdb.encoder: {encoder}")
        axes.legend()
    drawn.savefig(path, dpi=110, format="png")


def _left_to_win(rows: Sequence[Row]) -> Iterator[tuple[int, float]]:
    """By T, what the ANN is ahead of the converted network, in points."""
    for row in sorted(rows, key=lambda row: int(row["timesteps"])):
        yield int(row["timesteps"]), 100 * (float(row["ann"]) - float(row["converted"]))
