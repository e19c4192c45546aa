"""What a sweep found: the front of accuracy against cost, the winner, and the pictures."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from pipeline.sweeps.space import short

Row = dict[str, Any]  # a trial, as in trials.csv


@dataclass(frozen=True)
class Candidate:
    """Trials that differ in their seed alone."""

    trials: list[Row]
    accuracy: float
    cost: float  # time steps, or energy-delay

    @property
    def spread(self) -> float:
        """Standard deviation of the accuracy over the seeds."""
        return float(pstdev(row["accuracy"] for row in self.trials))


def candidates(rows: Sequence[Row], names: Sequence[str], cost: str | None) -> list[Candidate]:
    """The trials that learned something, seeds taken together."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["accuracy"] is not None:
            key = tuple(number_or_text(row[name]) for name in names if name != "seed")
            groups.setdefault(key, []).append(row)
    return [
        Candidate(
            group,
            mean(row["accuracy"] for row in group),
            mean(row[cost or "timesteps"] for row in group),
        )
        for group in groups.values()
    ]


def front(tried: Sequence[Candidate]) -> list[Candidate]:
    """The Pareto front: each more accurate than all that are as cheap or cheaper."""
    best: list[Candidate] = []
    for one in sorted(tried, key=lambda c: (c.cost, -c.accuracy)):
        if not best or one.accuracy > best[-1].accuracy:
            best.append(one)
    return best


def choose(tried: Sequence[Candidate], cost: str | None, floor: float) -> Candidate:
    """The cheapest one on the front with at least the accuracy ``floor``; else the most accurate.

    Without a cost it is the most accurate.
    """
    best = front(tried)
    enough = [one for one in best if one.accuracy >= floor]
    if cost is not None and enough:
        return enough[0]
    return max(tried, key=lambda one: (one.accuracy, -one.cost))


def draw_front(
    tried: Sequence[Candidate],
    winner: Candidate,
    cost: str | None,
    ann: float,
    floor: float,
    path: Path,
) -> None:
    """Accuracy against cost: all trials, the front, the ANN, the floor, the winner."""
    drawn, axes = _figure(7, 4.5)
    costs, accuracies = zip(*((c.cost, 100 * c.accuracy) for c in tried), strict=True)
    axes.scatter(costs, accuracies, s=22, color="#8a8a8a", label="trials", zorder=2)
    best = front(tried)
    axes.step(
        [c.cost for c in best], [100 * c.accuracy for c in best], where="post",
        marker="o", color="#4c72b0", label="Pareto front", zorder=3,
    )  # fmt: skip
    axes.axhline(100 * ann, color="black", linestyle=":", label="ANN")
    if cost is not None:
        axes.axhline(100 * floor, color="#c44e52", linestyle="--", label="accuracy floor")
    axes.scatter(
        [winner.cost], [100 * winner.accuracy], marker="*", s=220, color="#dd8452",
        label="chosen", zorder=4,
    )  # fmt: skip
    if cost == "timesteps":  # down to T = 1, an octave as wide as the next
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    names = {"energy_delay": "energy × time steps, pJ"}
    axes.set_xlabel(names.get(cost or "", "time steps T"))
    axes.set_ylabel("validation accuracy, %")
    axes.set_title("Accuracy against cost, after STDB")
    axes.legend(loc="lower right")
    _save(drawn, path)


def number_or_text(value: Any) -> float | str:
    """What a setting is told apart and put in order by, such as ``null`` or a mapping."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number or isinstance(value, str) else json.dumps(value, sort_keys=True)


def draw_parallel(rows: Sequence[Row], names: Sequence[str], path: Path) -> None:
    """Parallel coordinates: a line a trial, an axis a parameter, coloured by accuracy."""
    from matplotlib import colormaps

    shown = [row for row in rows if row["accuracy"] is not None]
    axes_of = [*names, "accuracy"]
    drawn, axes = _figure(max(6, 1.5 * len(axes_of)), 4)
    places: dict[str, dict[float | str, float]] = {}
    for name in axes_of:
        found = {number_or_text(row[name]) for row in shown}
        values = sorted(found, key=lambda v: (isinstance(v, str), v))
        numbers = [v for v in values if not isinstance(v, str)]
        if len(numbers) == len(values):
            low, high = numbers[0], numbers[-1]
            places[name] = {v: (v - low) / ((high - low) or 1) for v in numbers}
        else:
            places[name] = {v: k / max(1, len(values) - 1) for k, v in enumerate(values)}
        ends = [values[0], values[-1]] if values[0] != values[-1] else [values[0]]
        for value in ends:
            text = short(value)
            axes.annotate(text, (axes_of.index(name) + 0.04, places[name][value]), fontsize=8)
        axes.axvline(axes_of.index(name), color="black", linewidth=0.8)
    for row in sorted(shown, key=lambda row: row["accuracy"]):
        height = [places[name][number_or_text(row[name])] for name in axes_of]
        axes.plot(height, color=colormaps["viridis"](height[-1]), alpha=0.8)
    axes.set_xticks(range(len(axes_of)), axes_of)
    axes.set_yticks([])
    axes.set_title("Trials: parameters and validation accuracy")
    _save(drawn, path)


def draw_curves(epochs: Sequence[Row], names: Sequence[str], path: Path) -> None:
    """Validation accuracy by epoch: a line a setting, the mean over seeds, its spread around it."""
    drawn, axes = _figure(7, 4.5)
    settings: dict[tuple[Any, ...], dict[int, list[float]]] = {}
    others = [name for name in names if name != "seed"]
    for row in epochs:
        key = tuple(number_or_text(row[name]) for name in others)
        settings.setdefault(key, {}).setdefault(row["epoch"], []).append(row["accuracy"])
    for key, by_epoch in settings.items():
        x = sorted(by_epoch)
        middle = [100 * mean(by_epoch[e]) for e in x]
        spread = [100 * pstdev(by_epoch[e]) for e in x]
        label = ", ".join(f"{n} {short(v)}" for n, v in zip(others, key, strict=True))
        (line,) = axes.plot(x, middle, marker="o", label=label)
        low = [m - s for m, s in zip(middle, spread, strict=True)]
        high = [m + s for m, s in zip(middle, spread, strict=True)]
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15)
    axes.set_xlabel("epoch of STDB")
    axes.set_ylabel("validation accuracy, %")
    axes.set_title("Training from the converted network")
    if len(settings) <= 12:
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.15))  # below: it is wide
    _save(drawn, path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    return drawn, drawn.subplots()


def _save(drawn: Any, path: Path) -> None:
    drawn.savefig(path, dpi=110, format="png")
