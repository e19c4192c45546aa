"""The report's figures. Each takes what is drawn and returns it as matplotlib's figure."""

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor

import stdb
from pipeline.params import StdbParams
from pipeline.reporting.literature import Row
from pipeline.reporting.results import (
    ConfusionRow,
    CurvePoint,
    EpochRow,
    LayerRow,
    Results,
    Spiking,
    at_scale,
)
from pipeline.reporting.tables import stdb_rows

CONVERTED, FINETUNED, ANN, PUBLISHED = "#8a8f98", "#c8452d", "#2a5d8f", "#9a8a60"
PUBLISHED_MARKERS = ("s", "^", "D", "v")
PUBLISHED_LABELS = (((6, 0), "left"), ((0, 9), "center"), ((0, 9), "center"), ((0, -9), "center"))
SLANTED: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
SHOWN_CLASSES = 30  # of a confusion matrix with numbers in it
RASTER, TRACES = 12, 4  # neurons shown of a layer


def surrogate(params: StdbParams, steps: int = 100) -> Figure:
    """Fig. 1: a neuron's input, membrane and spikes, and the surrogate gradient below them.

    A single neuron with V = 1 that gets input spikes of weight 0.35 at random.
    """
    generator = torch.Generator().manual_seed(1)
    rate = torch.where(torch.arange(steps) % 50 < 25, 0.5, 0.1)
    inputs = (torch.rand(steps, generator=generator) < rate).float()
    current, leak = 0.35 * inputs[:, None], params.leak
    kind = stdb.surrogate_of(
        params.surrogate, params.last_timesteps, params.alpha, params.beta, params.over_threshold
    )
    spikes, potential, gradient = stdb.simulate_neuron(current, kind, leak)
    t = range(1, steps + 1)
    figure, (above, middle, below) = _subplots(
        3, 1, figsize=(7, 5), sharex=True, height_ratios=[0.8, 2, 2]
    )
    for height, train, color in ((0, inputs, CONVERTED), (1, spikes[:, 0], FINETUNED)):
        at = [step for step, spike in zip(t, train.tolist(), strict=True) if spike]
        above.eventplot(at, lineoffsets=height, linelengths=0.8, colors=color)
    above.set_yticks([0, 1], ["input", "output"])
    above.set_title(f"One neuron (λ = {leak:g}) and its surrogate gradient")
    middle.plot(t, potential[:, 0].tolist(), color=ANN)
    middle.axhline(1, color="black", ls=":", lw=1)
    middle.set_ylabel("membrane U / V")
    below.plot(t, gradient[:, 0].tolist(), color=FINETUNED)
    beta = f", β = {kind.beta:g}" if kind.uses_beta else ""
    below.set_title(f"{kind.name}, α = {kind.alpha:g}{beta}", fontsize=10)
    below.set(xlabel="time step", ylabel="∂O/∂U", ylim=(0, 1.1 * kind.alpha))
    for axes in (above, middle, below):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def accuracy_by_timestep(results: Results, published: Sequence[Row] = ()) -> Figure:
    """Accuracy on the test split after every step, converted and fine-tuned, and at each T.

    Args:
        results: what the stages measured.
        published: networks of others on the same data set.
    """
    reduced, plots = results.converted.reduced, results.plots
    scale = reduced.threshold_scale
    figure, axes = _axes("Accuracy against T", "time steps", "test accuracy (%)")
    for each in dict.fromkeys(row.threshold_scale for row in plots.converted_accuracy):
        curve = at_scale(plots.converted_accuracy, each)
        label = "balanced thresholds" if each == 1 else f"thresholds × {each:g}"
        _curve(axes, curve, f"converted, {label}", CONVERTED, ":" if each != scale else "-")
    few = at_scale(plots.converted_quantised, scale)
    _curve(axes, few, "ANN with T levels", ANN, ":")
    *_, (name, _) = named = stdb_rows(results)
    _curve(axes, plots.finetuned_accuracy, name, FINETUNED, "-")
    axes.axhline(100 * results.ann.accuracy.test, color=ANN, lw=1.2, ls="--", label="ANN")
    axes.plot(reduced.timesteps, 100 * reduced.accuracy, "o", color=CONVERTED)
    at_each = [(one.timesteps, 100 * one.accuracy.test) for _, one in named]
    label = "STDB, at each T" if len(named) > 1 else ""  # which the legend leaves out
    axes.plot(*zip(*at_each, strict=True), "o--", color=FINETUNED, lw=1, label=label)
    _published(axes, published)
    _steps_axis(axes)
    axes.legend(frameon=False, loc="lower right", fontsize=8)
    return figure


def _published(axes: Axes, rows: Sequence[Row]) -> None:
    """Networks of others, light: a marker for each method, and its name at the most accurate."""
    papers = dict.fromkeys(row.paper for row in rows)
    for paper, marker, (side, ha) in zip(papers, PUBLISHED_MARKERS, PUBLISHED_LABELS, strict=False):
        points = [(row.timesteps, row.accuracy) for row in rows if row.paper == paper]
        axes.plot(*zip(*points, strict=True), marker, color=PUBLISHED, ms=4, ls=":", lw=0.8)
        axes.annotate(
            paper, max(points, key=lambda point: point[1]), side, textcoords="offset points",
            fontsize=7, color=PUBLISHED, ha=ha, va="center",
        )  # fmt: skip


def _steps_axis(axes: Axes) -> None:
    """Powers of two with their numbers along x; along y what there is, to 10 points, up to 100."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    lowest = axes.dataLim.ymin
    axes.set_ylim(max(0, 10 * (lowest // 10)), 101)


def spikes_per_layer(converted: Spiking, tuned: Spiking, thresholds: dict[str, float]) -> Figure:
    """Fig. 3: average spikes per neuron of every layer, thresholds on the bars."""
    before, after = converted.spikes_per_neuron, tuned.spikes_per_neuron
    labels = f"converted, T = {converted.timesteps}", f"STDB, T = {tuned.timesteps}"
    figure, axes = _axes("Spikes per neuron", "layer", "spikes per image")
    x = range(len(before))
    axes.bar([i - 0.2 for i in x], list(before.values()), 0.4, color=CONVERTED, label=labels[0])
    axes.bar([i + 0.2 for i in x], list(after.values()), 0.4, color=FINETUNED, label=labels[1])
    for i, name in enumerate(before):
        top = max(before[name], after[name])
        text = f"V {thresholds[name]:.2g}"
        axes.annotate(
            text, (i, top), (0, 3), textcoords="offset points", ha="center", va="bottom",
            rotation=90 if len(before) > 8 else 0, fontsize=8,
        )  # fmt: skip
    axes.margins(y=0.18)
    axes.set_xticks(list(x), list(before), **(SLANTED if len(before) > 8 else {}))
    axes.legend(frameon=False)
    return figure


def diagnosis(converted: Sequence[LayerRow], tuned: Sequence[LayerRow]) -> Figure:
    """Layer by layer: correlation with the ANN; dead and saturated neurons."""
    figure, both = _subplots(1, 2, figsize=(10, 4))
    names, x = [row.layer for row in converted], range(len(converted))
    for rows, color, label in ((converted, CONVERTED, "converted"), (tuned, FINETUNED, "STDB")):
        values = [row.correlation for row in rows]
        both[0].plot(x, values, "o-", color=color, label=label)
        for key, style, word in (("dead", "o--", "silent"), ("saturated", "s:", "saturated")):
            shares = [100 * float(getattr(row, key)) for row in rows]
            both[1].plot(x, shares, style, color=color, label=f"{label}, {word}")
    both[0].set(title="Spike counts follow activations", ylabel="correlation", ylim=(0, 1.02))
    both[1].set(title="Silent and saturated neurons", ylabel="share (%)")
    for axes in both:
        axes.set_xticks(list(x), names, **SLANTED)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*both[1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def raster(snn: stdb.SpikingNetwork, image: Tensor, ids: Tensor, timesteps: int) -> Figure:
    """For one image, spikes of some neurons of every layer, and membranes of some of the last.

    Args:
        snn: the network.
        image: (1, C, H, W).
        ids: (1,) of the image.
        timesteps: T.
    """
    label = list(snn.graph.labels.items())[-1]
    potentials = []
    snn.eval()
    with torch.no_grad(), stdb.record_spikes(snn, trains=True) as statistics:
        presentation = snn.present(image, sample_ids=ids, chunk=1)
        for _ in range(timesteps):
            presentation.advance(1)
            potentials.append(presentation.membrane[label[0]].clone())
    figure, (above, below) = _subplots(2, 1, figsize=(7, 7), height_ratios=[2, 1])
    row, ticks = 0, []
    for name in snn.graph.labels.values():
        train = statistics.train(name).flatten(1)  # (T, neurons)
        fired = train.sum(0).nonzero()[:, 0].tolist()
        few = [fired[k] for k in _spread(len(fired), RASTER)] or [0]
        for neuron in few:
            steps = (train[:, neuron].nonzero()[:, 0] + 1).tolist()
            above.eventplot(steps, lineoffsets=row, linelengths=0.8, colors="black")
            row += 1
        ticks.append((row - len(few) / 2, name))
        above.axhline(row - 0.5, color="#dddddd", lw=0.8)
    above.set_yticks([tick[0] for tick in ticks], [tick[1] for tick in ticks])
    title = f"Spikes of up to {RASTER} neurons of each layer that fired, one image"
    above.set(title=title, xlim=(0, timesteps + 1))
    above.invert_yaxis()
    traces = torch.stack(potentials) / presentation.threshold[label[0]]
    busy = traces.amax(0).argsort(descending=True)[:TRACES]
    below.plot(range(1, timesteps + 1), traces[:, busy].tolist(), marker=".", lw=1)
    below.axhline(1, color="black", ls=":", lw=1)
    below.set(
        title=f"Membranes of {TRACES} neurons of {label[1]}", xlabel="time step", ylabel="U / V",
        xlim=(0, timesteps + 1),
    )  # fmt: skip
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def confusion(rows: Sequence[ConfusionRow], classes: Sequence[str]) -> Figure:
    """Images of the test split by class and by what was decided."""
    place = {name: i for i, name in enumerate(classes)}
    counts = torch.zeros(len(classes), len(classes))
    for row in rows:
        counts[place[row.actual], place[row.predicted]] = row.images
    size = min(9.0, 3 + 0.4 * len(classes))
    figure, axes = _subplots(figsize=(size, size))
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set(title="Decisions of the fine-tuned network", xlabel="decided", ylabel="class")
    if len(classes) <= SHOWN_CLASSES:
        axes.set_xticks(range(len(classes)), classes, **SLANTED)
        axes.set_yticks(range(len(classes)), classes)
        for (i, j), count in _entries(counts):
            color = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, f"{count:.0f}", ha="center", va="center", fontsize=8, color=color)
    return figure


def training(ann: Sequence[EpochRow], tuned: Sequence[EpochRow]) -> Figure:
    """Accuracy by epoch of both trainings."""
    figure, both = _subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axes, rows, title, color in (
        (both[0], ann, "ANN", ANN),
        (both[1], tuned, "STDB", FINETUNED),
    ):
        epochs = [int(row["epoch"]) for row in rows]
        for key, style in (("train", ":"), ("validation", "-")):
            if rows and f"accuracy/{key}" in rows[0]:
                values = [100 * row[f"accuracy/{key}"] for row in rows]
                axes.plot(epochs, values, style, color=color, label=key)
        axes.set(title=title, xlabel="epoch")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right")
    both[0].set_ylabel("accuracy (%)")
    return figure


def over_time(probabilities: Tensor, classes: Sequence[str], step: int, title: str) -> Figure:
    """Class probabilities (t, classes) of one image after every step; ``step`` is the decision."""
    figure, axes = _axes(title, "time steps", "probability")
    largest = probabilities.amax(0).argsort(descending=True)[:5].tolist()
    t = range(1, len(probabilities) + 1)
    for k in largest:
        axes.plot(t, probabilities[:, k].tolist(), marker=".", label=classes[k])
    axes.axvline(step, color="black", ls=":", lw=1)
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False)
    return figure


def energy(
    curves: dict[str, list[tuple[str, float, float, float]]], eight: dict[str, float]
) -> Figure:
    """Energy over spikes of a neuron, in shares of the ANN's: a panel for each model of the cost.

    Each network is a line from its share where nothing fires through a dot, what it really has.
    ``eight``: the share that the ANN has in integers of 8 bits, where it is another.
    """
    figure, panels = _subplots(1, len(curves), figsize=(4 * len(curves), 3.6), sharey=True)
    widest = 1.6 * max(spikes for rows in curves.values() for _, spikes, _, _ in rows) or 1.0
    highest = 1.1 * max(1.0, *(share for rows in curves.values() for _, _, share, _ in rows))
    for axes, (model, rows) in zip(panels, curves.items(), strict=True):
        for k, (name, spikes, share, silent) in enumerate(rows):
            end = silent + (share - silent) * (widest / spikes if spikes else 0.0)
            (line,) = axes.plot([0, widest], [silent, end], lw=1, color=f"C{k}", label=name)
            axes.plot([spikes], [share], "o", color=line.get_color())
        axes.axhline(1, color="black", ls=":", lw=1, label="the ANN")
        if model in eight:
            axes.axhline(eight[model], color="black", ls="--", lw=1, label="the ANN in 8 bits")
        axes.set(
            title=model, xlabel="spikes of a neuron, over T", xlim=(0, widest), ylim=(0, highest)
        )
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("energy / the ANN's")
    panels[0].legend(frameon=False)
    return figure


def _subplots(rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of its own, without pyplot's window and list of figures."""
    figure = Figure(figsize=options.pop("figsize"), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure, axes = _subplots(figsize=(7, 4))
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _curve(axes: Axes, rows: Sequence[CurvePoint], label: str, color: str, style: str) -> None:
    steps = [row.timesteps for row in rows]
    accuracy = [100 * row.accuracy for row in rows]
    axes.plot(steps, accuracy, style, color=color, label=label)


def _spread(count: int, wanted: int) -> list[int]:
    """So many positions, evenly spread."""
    wanted = min(count, wanted)
    return [k * count // wanted for k in range(wanted)]


def _entries(counts: Tensor) -> list[tuple[tuple[int, int], float]]:
    return [((int(i), int(j)), float(counts[i, j])) for i, j in counts.nonzero()]
