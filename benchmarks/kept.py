"""Runs whose figures are kept, in results/, and the table of all of them at the top of RESULTS.md.

    python -m benchmarks.kept add NAME      # where make repro has ended: writes results/NAME.json
    python -m benchmarks.kept table         # from results/*.json, between RESULTS.md's two markers

NAME is that of a row; runs that differ in their seeds alone are NAME-s1, NAME-s2 and so on, and
become one row with mean and standard deviation. Energy with memory is that of validation images
(:mod:`pipeline.energy`); latency is that of one image on this machine, the median of twenty.
"""

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from torch import nn

import stdb
from pipeline import energy
from pipeline.command import command, parser
from pipeline.data import Samples, load_split, subset
from pipeline.errors import StageError
from pipeline.files import ANN, DATA, read_json, write_json, write_text
from pipeline.handed_on import DataSummary, read_runs
from pipeline.learning.networks import build_ann
from pipeline.learning.weights import load_weights
from pipeline.params import Params, load_params
from pipeline.reading import read_text
from pipeline.reporting.literature import literature
from pipeline.reporting.page import machine
from pipeline.reporting.results import at_scale, read_results
from pipeline.reporting.tables import markdown_table, stdb_rows
from pipeline.tracking.origin import provenance

RESULTS, PAGE = Path("results"), Path("RESULTS.md")
BEGIN, END = "<!-- kept: begin -->", "<!-- kept: end -->"
IMAGES = 256  # that energy is counted over
WARMING, REPEATS = 3, 20

Kept = dict[str, Any]


@command
def main(arguments: Sequence[str]) -> None:
    """Keep a run, or write the table."""
    line = parser(__doc__, "kept")
    line.prog = "python -m benchmarks.kept"
    line.add_argument("what", choices=["add", "table"])
    line.add_argument("name", nargs="?", default="", metavar="NAME")
    given = line.parse_args(arguments)
    if given.what == "table":
        write_table()
        return
    path = place(given.name)
    write_json(path, kept())
    print(f"{path} is written; python -m benchmarks.kept table puts it into {PAGE}")


def place(name: str) -> Path:
    """Where a run's figures are kept."""
    if not re.fullmatch(r"[a-z0-9][\w.-]*", name):
        raise StageError(f"NAME is {name!r}; allowed: letters, digits, dots and dashes")
    RESULTS.mkdir(exist_ok=True)
    return RESULTS / f"{name}.json"


def kept() -> Kept:
    """The figures of the run that ended here."""
    params, results = load_params(), read_results()
    few = subset(load_split(DATA / "validation.safetensors"), IMAGES, params.data.seed)
    ann = build_ann(params.network, few)
    load_weights(ann, ANN)
    scale = results.converted.reduced.threshold_scale
    costs = dict(cost_of(path, few) for path in energy.network_files())
    levels = at_scale(results.plots.converted_quantised, scale)
    converted = at_scale(results.plots.converted_accuracy, scale)
    return {
        **origin_of(params, ann, results.data),
        "seconds": {name: round(run.seconds) for name, run in read_runs().items()},
        "ann": {
            **results.ann.accuracy.model_dump(),
            "energy": dense_energy(ann, few),
            "levels": {row.timesteps: row.accuracy for row in levels},
        },
        "converted": {row.timesteps: row.accuracy for row in converted},
        "networks": [
            {
                "timesteps": one.timesteps,
                **one.accuracy.model_dump(),
                "spikes": one.mean_spikes,
                **costs[one.timesteps],
            }
            for _, one in stdb_rows(results)
        ],
    }


def origin_of(params: Params, ann: nn.Module, data: DataSummary) -> Kept:
    """What network on what data, and where it was computed."""
    tags = provenance()
    return {
        "data": data.classes,
        "images": data.test.images,
        "network": f"{params.network.architecture} ×{params.network.width:g}",
        "weights": sum(p.numel() for p in ann.parameters()),
        "encoder": params.stdb.encoder,
        "commit": tags["git.commit"],
        "changed": tags["git.dirty"] == "true",
        "machine": machine(),
        "seeds": {"data": params.data.seed, "ann": params.train_ann.seed, "stdb": params.stdb.seed},
    }


def dense_energy(ann: nn.Module, images: Samples) -> dict[str, float]:
    """Picojoules an image of the ANN, in each model."""
    costs = stdb.ann_costs(ann.eval(), images.shape)
    return {name: sum(map(model, costs)) for name, model in energy.MODELS.items()}


def cost_of(path: Path, images: Samples) -> tuple[int, Kept]:
    """T of a saved network; its energy in each model, and milliseconds for one image."""
    one = energy.measured(path, images)
    snn, pixels, taken = stdb.load(path)[0].eval(), images.take(torch.arange(1)).pixels(), []
    for _ in range(WARMING + REPEATS):
        start = time.perf_counter()
        with torch.no_grad():
            snn(pixels, one.timesteps)
        taken.append(1000 * (time.perf_counter() - start))
    picojoules = {name: one.pj(model) for name, model in energy.MODELS.items()}
    return one.timesteps, {"energy": picojoules, "latency_ms": median(taken[WARMING:])}


# -- the table -------------------------------------------------------------------------------------


def write_table() -> None:
    """Put the table between the markers of RESULTS.md."""
    runs = {path.stem: read_json(path) for path in sorted(RESULTS.glob("*.json"))}
    if not runs:
        raise StageError(f"{RESULTS} has no runs; python -m benchmarks.kept add NAME keeps one")
    text = read_text(PAGE)
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise StageError(f"{PAGE} has no place for the table: {BEGIN} and {END}, once each")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    write_text(PAGE, f"{before}{BEGIN}\n\n{tables(runs)}\n\n{END}{after}")
    print(f"{PAGE} has the figures of {', '.join(runs)}")


def tables(runs: dict[str, Kept]) -> str:
    """One for each data set that there are runs on."""
    groups: dict[str, list[Kept]] = {}
    for name, run in runs.items():
        groups.setdefault(re.sub(r"-s\d+$", "", name), []).append(run)
    parts = []
    for data in literature().data_sets:
        own = {name: of for name, of in groups.items() if of[0]["data"] == data.classes}
        if own:
            parts.append(f"**{data.name}**\n\n{table(own, data)}")
    known = [data.classes for data in literature().data_sets]
    other = {name: of for name, of in groups.items() if of[0]["data"] not in known}
    if other:
        parts.append(f"**Others**\n\n{table(other, None)}")
    lines = [f"- {name}: {origin(run)}" for name, run in runs.items()]
    return "\n\n".join([*parts, "\n".join(lines)])


def origin(run: Kept) -> str:
    """Where a run comes from."""
    seeds = ", ".join(f"{name} {seed}" for name, seed in run["seeds"].items())
    changed = ", with changes" if run["changed"] else ""
    return (
        f"{run['images']:,} test images; {run['encoder']} input; seeds: {seeds}; "
        f"commit {run['commit'][:7]}{changed}; {run['machine']}"
    )


def table(groups: dict[str, list[Kept]], data: Any) -> str:
    """A row for each network and T, and what others published on the same data."""
    models = list(energy.MODELS)
    head = ["", "network", "weights", "T", "test, %", "its ANN, %", "ANN with T levels, %"]
    head += ["spikes a neuron", "energy by operations / the ANN's", "with memory, 32 bits"]
    head += ["ms an image", "hours"]
    rows: list[list[Any]] = []
    for name, of in groups.items():
        for k, snn in enumerate(of[0]["networks"]):
            each, ann = [run["networks"][k] for run in of], [run["ann"] for run in of]
            shares = [
                mean(t["energy"][m] / a["energy"][m] for t, a in zip(each, ann, strict=True))
                for m in models[:2]
            ]
            levels = [a["levels"].get(str(snn["timesteps"])) for a in ann]
            rows.append([
                f"**{name}**", of[0]["network"], f"{of[0]['weights'] / 1e6:.2f} M",
                snn["timesteps"], percent([t["test"] for t in each]),
                percent(by_ann(of, [a["test"] for a in ann])),
                percent(by_ann(of, levels)) if None not in levels else "",
                f"{mean(t['spikes'] for t in each):.2f}", *(f"{s:.0%}" for s in shares),
                f"{mean(t['latency_ms'] for t in each):.1f}",
                f"{mean(sum(run['seconds'].values()) for run in of) / 3600:.1f}",
            ])  # fmt: skip
    for row in data.rows if data else ():
        rows.append([row.paper, row.network, "", row.timesteps, f"{row.accuracy:.2f}", *[""] * 7])
    return markdown_table(head, rows, text=3)


def by_ann(of: Sequence[Kept], shares: Sequence[float]) -> list[float]:
    """One value for an ANN: the mean over the runs that fine-tuned it."""
    anns: dict[tuple[int, int], list[float]] = {}
    for run, share in zip(of, shares, strict=True):
        anns.setdefault((run["seeds"]["data"], run["seeds"]["ann"]), []).append(share)
    return [mean(of_one) for of_one in anns.values()]


def percent(shares: Sequence[float]) -> str:
    """Accuracies in %; of several their mean and standard deviation."""
    found = f"{100 * mean(shares):.2f}"
    return found if len(shares) == 1 else f"{found} ± {100 * stdev(shares):.2f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
