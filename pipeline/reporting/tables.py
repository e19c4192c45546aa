"""The report's tables over T: accuracy by step, each T beside what others published, energy."""

from collections.abc import Sequence
from typing import Any

from scipy.stats import binomtest

from pipeline.params import Params
from pipeline.reporting.literature import literature, rows_for
from pipeline.reporting.results import Finetuned, Results, at_scale

ROWS = ("converted", "converted, scaled", "STDB")
MOST_COLUMNS = 10  # steps that a table shows one by one


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]], text: int = 1) -> str:
    """A table; the first ``text`` columns are words, the others numbers."""
    rule = ["---" if k < text else "---:" for k in range(len(head))]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, rule, *rows))


def with_interval(accuracy: float, images: int) -> str:
    """An accuracy with its 95 % interval (Wilson), for so many independent images."""
    interval = binomtest(round(accuracy * images), images).proportion_ci(method="wilson")
    return f"{accuracy:.2%} ({100 * interval.low:.1f}–{100 * interval.high:.1f})"


def stdb_rows(results: Results) -> list[tuple[str, Finetuned]]:
    """The fine-tuned networks by name: one for each T that there was."""
    tuned = results.finetuned
    return [
        (f"{ROWS[2]} for T = {one.timesteps}" if tuned.by_timesteps else ROWS[2], one)
        for one in tuned.at_each
    ]


def by_timestep(results: Results) -> str:
    """Accuracy after t = 1 … T, of the converted network at the best scale and the fine-tuned one.

    Below them the ANN's whose activations have t levels. Of a large T, powers of two and T itself.
    """
    reduced, plots = results.converted.reduced, results.plots
    last = max(reduced.timesteps, results.finetuned.timesteps)
    shown = [t for t in range(1, last + 1) if t & (t - 1) == 0 or t == last or last <= MOST_COLUMNS]
    rows = [
        (ROWS[1], at_scale(plots.converted_accuracy, reduced.threshold_scale)),
        (stdb_rows(results)[-1][0], plots.finetuned_accuracy),
        ("ANN with t levels", at_scale(plots.converted_quantised, reduced.threshold_scale)),
    ]
    cells = []
    for name, curve in rows:
        known = {row.timesteps: f"{row.accuracy:.2%}" for row in curve}
        cells.append([name, *(known.get(t, "") for t in shown)])
    return markdown_table(["t", *map(str, shown)], cells)


def each_t(params: Params, results: Results) -> str:
    """Each T that there was: accuracy, spikes and energy, beside the ANN and what others published.

    T counts steps of binary spikes.
    """
    reduced, images = results.converted.reduced, results.data.test.images
    curve = at_scale(results.plots.converted_quantised, reduced.threshold_scale)
    levels = {row.timesteps: f"{row.accuracy:.2%}" for row in curve}
    spiking = [(ROWS[1], reduced, reduced.accuracy)]
    spiking += [(name, one, one.accuracy.test) for name, one in stdb_rows(results)]  # type: ignore[misc]
    rows: list[list[Any]] = [
        [
            f"**{name}**", params.stdb.encoder, one.timesteps, with_interval(accuracy, images),
            levels.get(one.timesteps, ""), f"{one.mean_spikes:.2f}", f"{one.energy_pj / 1000:,.1f}",
        ]
        for name, one, accuracy in spiking
    ]  # fmt: skip
    papers = literature().papers
    rows += [
        [
            f"{row.paper}, {row.network}", papers[row.paper].input, row.timesteps,
            f"{row.accuracy:.2f}%", "", "", "",
        ]
        for row in rows_for(results.data.classes)
    ]  # fmt: skip
    head = ["", "input", "T", "accuracy", "ANN with T levels", "spikes a neuron", "nJ"]
    return markdown_table(head, rows, text=2)


def sources(results: Results) -> str:
    """Where the published rows come from; empty where there are none."""
    papers, rows = literature().papers, rows_for(results.data.classes)
    lines = [
        f"- {method}: {papers[method].authors}, *{papers[method].title}*, {papers[method].venue}"
        for method in dict.fromkeys(row.paper for row in rows)
    ]
    if not lines:
        return ""
    return "\n".join(["Published by others:", "", *lines])


def energy(results: Results) -> str:
    """Energy and energy–delay product of the ANN and the spiking networks."""
    converted = results.converted
    rows: list[list[Any]] = [["ANN", "", f"{converted.ann.energy_pj / 1000:,.1f}", "", ""]]
    spiking = [(ROWS[0], converted.long), (ROWS[1], converted.reduced), *stdb_rows(results)]
    for name, row in spiking:
        pj, delay = row.energy_pj / 1000, row.energy_delay / 1000
        share = f"{row.energy_pj / converted.ann.energy_pj:.0%}"
        rows.append([name, row.timesteps, f"{pj:,.1f}", share, f"{delay:,.1f}"])
    return markdown_table(["", "T", "nJ", "of the ANN's", "nJ · steps"], rows)
