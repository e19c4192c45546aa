"""Stage report: Table 1's row, Figs. 1 and 3, accuracy against T, and how the network came about.

    python -m pipeline.report

Reads what the other stages wrote, and presents one image. Out: report/index.html, which needs no
other file, report/README.md with PNGs, and metrics/summary.json, which `dvc metrics` and
`dvc exp show` show.
"""

import base64
import csv
import json
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import psutil
import torch
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from scipy.stats import binomtest

import stdb
from pipeline import figures
from pipeline.data import load_split, normalise
from pipeline.paper import nearest
from pipeline.params import Params
from pipeline.stage import (
    DATA,
    RUNS,
    SNN,
    Stage,
    read_json,
    run_stage,
    write_json,
    writing,
)
from pipeline.tracking import provenance

OUT = Path("report")
STYLE = """
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222;
       font: 16px/1.5 system-ui, sans-serif; }
img { max-width: 100%; } table { border-collapse: collapse; margin: 1rem 0; display: block;
overflow-x: auto; } th, td { padding: .25rem .75rem; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #888; } code { font-size: .9em; }
"""
PLOTS = (
    *("train_ann", "finetune_stdb", "converted_accuracy", "finetuned_accuracy"),
    *("converted_diagnosis", "finetuned_diagnosis", "finetuned_confusion", "finetuned_exits"),
)
ROWS = ("converted", "converted, scaled", "STDB")  # of the tables


def main(stage: Stage) -> None:
    """Draw the figures, write the pages."""
    found = read_results()
    drawn = draw(stage.params, found)
    for name, figure in drawn.items():
        with writing(OUT / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})
        plt.close(figure)
        stage.tracker.figure(OUT / f"{name}.png")
    text = page(stage, found)
    with writing(OUT / "README.md") as temporary:
        temporary.write_text(text)
    with writing(OUT / "index.html") as temporary:
        temporary.write_text(as_html(text))
    for name in ("README.md", "index.html"):
        stage.tracker.figure(OUT / name)
    write_json(Path("metrics/summary.json"), summary(found))
    row = table(stage.params, found)
    about = f"{gist(stage.params, found)}\n\n{row}"
    stage.tracker.summary(headline(found), about, OUT / "index.html")
    stage.say(row)
    stage.say(f"see {OUT}/index.html, or {OUT}/README.md")


def read_results() -> dict[str, Any]:
    """What the other stages measured: metrics by stage, plots by file name."""
    names = ("data", "train_ann", "evaluate_converted", "finetune_stdb")
    metrics = {name: read_json(Path(f"metrics/{name}.json")) for name in names}
    return metrics | {"plots": {name: _rows(Path(f"plots/{name}.csv")) for name in PLOTS}}


def headline(found: dict[str, Any]) -> dict[str, float]:
    """The figures of the whole execution, grouped as MLflow groups them."""
    converted, tuned = found["evaluate_converted"], found["finetune_stdb"]
    long, reduced = converted["long"], converted["reduced"]
    return {
        "accuracy/ann": found["train_ann"]["accuracy"]["test"],
        "accuracy/converted_long": long["accuracy"],
        "accuracy/converted": reduced["accuracy"],
        "accuracy/stdb": tuned["accuracy"]["test"],
        "accuracy/stdb_validation": tuned["accuracy"]["validation"],
        "timesteps/long": long["timesteps"],
        "timesteps/reduced": tuned["timesteps"],
        "energy/ann_pj": converted["ann"]["energy_pj"],
        "energy/converted_long_pj": long["energy_pj"],
        "energy/converted_pj": reduced["energy_pj"],
        "energy/stdb_pj": tuned["energy_pj"],
        **{f"spikes/{name}": value for name, value in tuned["spikes_per_neuron"].items()},
    }


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """The few numbers that runs are compared by: test accuracy, nanojoules per image."""
    converted, tuned = found["evaluate_converted"], found["finetune_stdb"]
    return {
        "accuracy": {
            "ann": found["train_ann"]["accuracy"]["test"],
            "converted": converted["long"]["accuracy"],
            "scaled": converted["reduced"]["accuracy"],
            "stdb": tuned["accuracy"]["test"],
        },
        "energy_nj": {
            "ann": converted["ann"]["energy_pj"] / 1000,
            "stdb": tuned["energy_pj"] / 1000,
        },
    }


def gist(params: Params, found: dict[str, Any]) -> str:
    """The whole execution in two sentences."""
    converted, tuned = found["evaluate_converted"], found["finetune_stdb"]
    long, reduced, network = converted["long"], converted["reduced"], params.network
    return (
        f"**{network.architecture}** (width {network.width:g}) on {params.data.source}, "
        f"{found['data']['test']['images']:,} test images: ANN "
        f"{found['train_ann']['accuracy']['test']:.2%}, converted {long['accuracy']:.2%} at "
        f"T = {long['timesteps']} and {reduced['accuracy']:.2%} at T = {reduced['timesteps']}, "
        f"after STDB {tuned['accuracy']['test']:.2%} at T = {tuned['timesteps']}. An image takes "
        f"{tuned['energy_pj'] / 1000:,.1f} nJ, {converted['ann']['energy_pj'] / 1000:,.1f} nJ in "
        "the ANN."
    )


def draw(params: Params, found: dict[str, Any]) -> dict[str, Figure]:
    """The figures, by the name of their file."""
    converted, tuned, plots = found["evaluate_converted"], found["finetune_stdb"], found["plots"]
    reduced = converted["reduced"]
    marks = [
        (reduced["timesteps"], reduced["accuracy"]),
        (tuned["timesteps"], tuned["accuracy"]["test"]),
    ]
    snn, about = stdb.load(SNN)
    one = load_split(DATA / "test.safetensors").take(torch.zeros(1, dtype=torch.int64))
    return {
        "accuracy_by_timestep": figures.accuracy_by_timestep(
            found["train_ann"]["accuracy"]["test"], plots["converted_accuracy"],
            plots["finetuned_accuracy"], marks,
        ),
        "spikes_per_layer": figures.spikes_per_layer(
            reduced["spikes_per_neuron"], tuned["spikes_per_neuron"],
            snn.thresholds,
        ),
        "surrogate": figures.surrogate(params.stdb),
        "raster": figures.raster(snn, normalise(one.images), one.ids, about["timesteps"]),
        "diagnosis": figures.diagnosis(plots["converted_diagnosis"], plots["finetuned_diagnosis"]),
        "confusion": figures.confusion(plots["finetuned_confusion"], about["classes"]),
        "training": figures.training(plots["train_ann"], plots["finetune_stdb"]),
    }  # fmt: skip


# -- the page ------------------------------------------------------------------------------------


def page(stage: Stage, found: dict[str, Any]) -> str:
    """The report, in Markdown."""
    params, tuned = stage.params, found["finetune_stdb"]
    t, test = tuned["timesteps"], found["data"]["test"]["images"]
    return f"""# Report

{table(params, found)}

Top-1 accuracy on {test:,} test images, read once; scale and epoch are chosen on validation. In
brackets: 95 % confidence intervals (Wilson) for the test images drawn, seeds not included.
{gain(found)}

![Accuracy against T](accuracy_by_timestep.png)

One simulation gives the accuracy at every t: the output layer only accumulates.

## Spikes (Fig. 3)

Spikes of each layer summed over T = {t}, per neuron and image; V after scaling and fine-tuning on
the bars. {fewer_spikes(found)}

![Spikes per layer](spikes_per_layer.png)

## Energy

Per image, 45 nm CMOS: 0.9 pJ an accumulate, 4.6 pJ a multiply-accumulate; synaptic operations by
real fan-out.

{energy(found)}

## The surrogate gradient (Fig. 1)

![Surrogate gradient](surrogate.png)

## One image

![Spikes and membranes](raster.png)

## Leaving early

The output may be read as soon as the largest probability is large enough.

{exits(found)}

## Layer by layer: does it follow its ANN?

On a few validation images: correlation of spike counts with the activations of the ANN of the same
weights, neurons that never fired, neurons that fired in nine of ten steps or more, and the spikes'
worth of potential that was left.

![Diagnosis](diagnosis.png)

{diagnosis(found)}

## Decisions

![Confusion matrix](confusion.png)

## Training

![Training](training.png)

## How it came about

{origin(stage)}

{parameters(params)}

Reproduce with `dvc repro`.
"""


def table(params: Params, found: dict[str, Any]) -> str:
    """Table 1's row, ours above the paper's."""
    converted, tuned = found["evaluate_converted"], found["finetune_stdb"]
    long, reduced = converted["long"], converted["reduced"]
    test = found["data"]["test"]["images"]
    row, network = nearest(params.network, params.data), params.network
    accuracies = [
        with_interval(value, test)
        for value in (
            found["train_ann"]["accuracy"]["test"], long["accuracy"], reduced["accuracy"],
            tuned["accuracy"]["test"],
        )
    ]  # fmt: skip
    ours = [
        f"**{network.architecture}** (width {network.width:g})", params.data.source,
        accuracies[0], accuracies[1], long["timesteps"], *accuracies[2:], tuned["timesteps"],
    ]  # fmt: skip
    paper = [
        f"{row.architecture}, the paper's", row.source, f"{row.ann} %", f"{row.converted} %", 2500,
        f"{row.reduced} %", f"{row.hybrid} %", row.timesteps,
    ]  # fmt: skip
    head = ["", "data", "ANN", "converted", "T", "converted, scaled", "STDB", "T"]
    return markdown_table(head, [ours, paper], text=2)


def with_interval(accuracy: float, images: int) -> str:
    """An accuracy with its 95 % interval (Wilson), for so many independent images."""
    interval = binomtest(round(accuracy * images), images).proportion_ci(method="wilson")
    return f"{accuracy:.2%} ({100 * interval.low:.1f}–{100 * interval.high:.1f})"


def gain(found: dict[str, Any]) -> str:
    """What the conversion loses and STDB wins back, as a sentence."""
    reduced, tuned = found["evaluate_converted"]["reduced"], found["finetune_stdb"]
    lost = found["train_ann"]["accuracy"]["test"] - reduced["accuracy"]
    won = tuned["accuracy"]["test"] - reduced["accuracy"]
    if lost <= 0:
        return f"At T = {tuned['timesteps']} the converted network loses nothing against the ANN."
    back = f"wins back {100 * won:.1f} of them" if won >= 0 else f"loses {-100 * won:.1f} more"
    return (
        f"At T = {tuned['timesteps']} the converted network is {100 * lost:.1f} points below the "
        f"ANN, with the threshold scale ({reduced['threshold_scale']:g}) that is best on "
        f"validation; STDB {back}."
    )


def fewer_spikes(found: dict[str, Any]) -> str:
    """The two networks' spikes, as a sentence."""
    sums = [
        sum(found[stage]["spikes_per_neuron"].values())
        if stage == "finetune_stdb"
        else sum(found[stage]["reduced"]["spikes_per_neuron"].values())
        for stage in ("evaluate_converted", "finetune_stdb")
    ]
    return f"The layers' averages sum to {sums[0]:.2f} converted and {sums[1]:.2f} after STDB."


def energy(found: dict[str, Any]) -> str:
    """Energy and energy–delay product of the ANN and the spiking networks."""
    converted, tuned = found["evaluate_converted"], found["finetune_stdb"]
    rows: list[list] = [["ANN", "", f"{converted['ann']['energy_pj'] / 1000:,.1f}", ""]]
    for name, row in zip(ROWS, (converted["long"], converted["reduced"], tuned), strict=True):
        pj, delay = row["energy_pj"] / 1000, row["energy_delay"] / 1000
        rows.append([name, row["timesteps"], f"{pj:,.1f}", f"{delay:,.1f}"])
    return markdown_table(["", "T", "nJ", "nJ · steps"], rows)


def exits(found: dict[str, Any]) -> str:
    """Steps and accuracy when every image is left as soon as it is clear."""
    rows = [
        [
            f"{float(row['confidence']):g}",
            f"{float(row['timesteps']):.2f}",
            f"{1 - float(row['timesteps']) / found['finetune_stdb']['timesteps']:.0%}",
            f"{float(row['accuracy']):.2%}",
        ]
        for row in found["plots"]["finetuned_exits"]
    ]
    whole = found["finetune_stdb"]
    rows.append(["never", f"{whole['timesteps']}", "0%", f"{whole['accuracy']['test']:.2%}"])
    return markdown_table(["confidence", "steps on average", "saved", "accuracy"], rows)


def diagnosis(found: dict[str, Any]) -> str:
    """A table of the fine-tuned layers, and what helps where one is ill."""
    head = ["layer", "V", "spikes per step", "correlation", "silent", "saturated", "U/V left"]
    rows = [
        [
            row["layer"], f"{float(row['threshold']):.3g}", f"{float(row['rate']):.2%}",
            f"{float(row['correlation']):.2f}", f"{float(row['dead']):.0%}",
            f"{float(row['saturated']):.0%}", f"{float(row['residual']):.2f}",
        ]
        for row in found["plots"]["finetuned_diagnosis"]
    ]  # fmt: skip
    hints = [
        f"- {name}: {row['hint']}"
        for name, key in (("converted", "converted_diagnosis"), ("STDB", "finetuned_diagnosis"))
        for row in found["plots"][key]
        if row["hint"]
    ]
    return markdown_table(head, rows) + "\n\n" + "\n".join(hints or ["No layer is ill."])


def origin(stage: Stage) -> str:
    """Commit, machine, data and the durations of the stages, as far as they are known here."""
    tags, data = provenance(), read_json(Path("metrics/data.json"))
    changed = ", with changes" if tags["git.dirty"] == "true" else ""
    lines = [
        f"- commit: `{tags['git.commit']}`{changed}",
        f"- experiment: {tags['dvc.experiment']}",
        f"- machine: {machine()}",
    ]
    for name in ("train", "validation", "test"):
        split = data[name]
        lines.append(f"- {name}: {split['images']:,} images, sha256 `{split['sha256']}`")
    lines.append(f"- network: sha256 `{stage.inputs[str(SNN)]}`")
    done = json.loads(RUNS.read_text()) if RUNS.exists() else {}
    for name, run in done.items():
        lines.append(f"- {name}: {run['seconds']:.0f} s, ended {run['ended']}, on {run['machine']}")
    return "\n".join(lines)


def machine() -> str:
    """Processor, cores, memory, GPU, and the versions that matter."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (named := re.search(r"model name\s*: (.*)", cpuinfo.read_text())):
        model = named[1]
    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    memory = psutil.virtual_memory().total / 2**30
    parts = [model, f"{os.cpu_count()} cores", f"{memory:.0f} GiB", *gpus]
    return ", ".join([*parts, f"Python {platform.python_version()}", f"torch {torch.__version__}"])


def parameters(params: Params) -> str:
    """Every parameter."""
    rows = [
        [f"`{section}.{key}`", f"`{value}`"]
        for section, values in params.model_dump().items()
        for key, value in values.items()
    ]
    return markdown_table(["parameter", "value"], rows, text=2)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence], text: int = 1) -> str:
    """A table; the first ``text`` columns are words, the others numbers."""
    rule = ["---" if k < text else "---:" for k in range(len(head))]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, rule, *rows))


def as_html(text: str) -> str:
    """The page with its pictures inside, which a browser shows without any other file."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)

    def inside(found: re.Match) -> str:
        data = base64.b64encode((OUT / found[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'src="([\w.]+\.png)"', inside, body)
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Report</title>\n'
        f"<style>{STYLE}</style>\n{body}</html>\n"
    )


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    run_stage("report", main)
