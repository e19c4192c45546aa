"""The report's page: Markdown, and the same as one HTML file."""

import base64
import os
import platform
import re
from pathlib import Path

import psutil
import torch
from markdown_it import MarkdownIt

from pipeline.files import REPORT, SNN
from pipeline.handed_on import read_runs
from pipeline.params import Params
from pipeline.reporting.paper import nearest
from pipeline.reporting.results import Results
from pipeline.reporting.tables import (
    by_timestep,
    each_t,
    energy,
    markdown_table,
    sources,
    with_interval,
)
from pipeline.stage import Stage
from pipeline.tracking.origin import provenance

STYLE = """
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222;
       font: 16px/1.5 system-ui, sans-serif; }
img { max-width: 100%; } table { border-collapse: collapse; margin: 1rem 0; display: block;
overflow-x: auto; } th, td { padding: .25rem .75rem; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #888; } code { font-size: .9em; overflow-wrap: anywhere; }
th.sorts { cursor: pointer; } th.sorts:hover { text-decoration: underline; }
:root { color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #17191c; } th, td { border-color: #444; }
  img { border-radius: .25rem; } a { color: #8ab4f8; }
}
"""


# A click on a column's head sorts its table by it, up and then down; equal rows stay in order.
SORT = """
const value = cell => {
  const text = cell.textContent.trim().replaceAll(',', ''), number = parseFloat(text);
  return isNaN(number) ? text : number;
};
for (const table of document.querySelectorAll('table')) {
  if (!table.tBodies[0] || table.tBodies[0].rows.length < 3) continue;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.className = 'sorts';
    head.title = 'sort';
    head.onclick = () => {
      const down = head.ariaSort === 'ascending';
      for (const other of table.tHead.rows[0].cells) other.ariaSort = null;
      head.ariaSort = down ? 'descending' : 'ascending';
      const rows = [...table.tBodies[0].rows].sort((one, other) => {
        const [a, b] = [value(one.cells[column]), value(other.cells[column])];
        const order = typeof a === typeof b ? (a > b) - (a < b) : typeof a === 'number' ? -1 : 1;
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows);
    };
  });
}
"""


def gist(params: Params, results: Results) -> str:
    """The whole execution in two sentences."""
    converted, tuned = results.converted, results.finetuned
    long, reduced, network = converted.long, converted.reduced, params.network
    after = ", ".join(f"{one.accuracy.test:.2%} at T = {one.timesteps}" for one in tuned.at_each)
    return (
        f"**{network.architecture}** (width {network.width:g}) on {params.data.source}, "
        f"{results.data.test.images:,} test images: ANN "
        f"{results.ann.accuracy.test:.2%}, converted {long.accuracy:.2%} at "
        f"T = {long.timesteps} and {reduced.accuracy:.2%} at T = {reduced.timesteps}, "
        f"after STDB {after}. An image takes {tuned.energy_pj / 1000:,.1f} nJ at "
        f"T = {tuned.timesteps}, {converted.ann.energy_pj / 1000:,.1f} nJ in "
        "the ANN."
    )


def in_a_line(params: Params, results: Results) -> str:
    """The table's row in words, for a terminal."""
    long, reduced, test = results.converted.long, results.converted.reduced, results.data.test
    tuned = ", ".join(
        f"{one.accuracy.test:.2%} at T = {one.timesteps}" for one in results.finetuned.at_each
    )
    return (
        f"{params.network.architecture} on {params.data.source}, {test.images:,} test images: "
        f"ANN {results.ann.accuracy.test:.2%}; converted {long.accuracy:.2%} at T = "
        f"{long.timesteps}, {reduced.accuracy:.2%} at T = {reduced.timesteps}; STDB {tuned}"
    )


def page(stage: Stage, results: Results) -> str:
    """The report, in Markdown."""
    params, test = stage.params, results.data.test.images
    return f"""# Report

{table(params, results)}

Top-1 accuracy on {test:,} test images, which are used once. The threshold scale and the epoch are
chosen on validation images. In brackets: 95 % confidence intervals (Wilson) for the choice of test
images; the spread over seeds is not included.
{gain(results)}

![Accuracy against T](accuracy_by_timestep.png)

One simulation gives the accuracy after every step, since the output layer only accumulates. *ANN
with t levels* is the ANN with its activations rounded to t levels between 0 and A, the activation
that a spike in every step stands for: what t steps could represent if currents were constant in
time. A network that was fine-tuned for T steps may be better than that.

{by_timestep(results)}

## Each T

T counts steps of binary spikes. Spikes a neuron: for one image, the mean of all neurons.

{each_t(params, results)}

{sources(results)}

## Spikes (Fig. 3)

Spikes of each layer, per neuron and image, over all T steps. On the bars: the threshold V after
scaling and fine-tuning. {fewer_spikes(results)}

![Spikes per layer](spikes_per_layer.png)

## Energy

For one image, in 45 nm CMOS: 0.9 pJ for an accumulate and 4.6 pJ for a multiply-accumulate. Each
spike costs one accumulate for each synapse that it reaches (the real fan-out is counted). A layer
with an analogue input multiplies, only once if the input is the same at every step. A neuron with a
bias, or with such an input, needs one more accumulate in every step.

{energy(results)}

## The surrogate gradient (Fig. 1)

![Surrogate gradient](surrogate.png)

## One image

![Spikes and membranes](raster.png)

## Leaving early

The simulation of an image may end as soon as the largest probability reaches a confidence.

{exits(results)}

## Layer by layer: does it follow its ANN?

On a few validation images: the correlation of spike counts with the activations of an ANN with the
same weights; *silent* neurons, which never fired; *saturated* neurons, which fired in nine of ten
steps or more; and U/V at the end, the number of spikes that T steps had no time for.

![Diagnosis](diagnosis.png)

{diagnosis(results)}

## Decisions

![Confusion matrix](confusion.png)

## Training

![Training](training.png)

## Provenance

{origin(stage, results)}

{parameters(params)}

Reproduce with `dvc repro`.
"""


def table(params: Params, results: Results) -> str:
    """Table 1's row, ours above the paper's; of several T each below the first."""
    converted, tuned = results.converted, results.finetuned
    long, reduced = converted.long, converted.reduced
    test = results.data.test.images
    row, network = nearest(params.network, results.data.classes), params.network
    accuracies = [
        with_interval(value, test)
        for value in (results.ann.accuracy.test, long.accuracy, reduced.accuracy)
    ]
    first, *others = [[with_interval(o.accuracy.test, test), o.timesteps] for o in tuned.at_each]
    ours = [
        f"**{network.architecture}** (width {network.width:g})", params.data.source,
        accuracies[0], accuracies[1], long.timesteps, accuracies[2], *first,
    ]  # fmt: skip
    paper = [
        f"{row.architecture}, the paper's", row.source, f"{row.ann} %", f"{row.converted} %", 2500,
        f"{row.reduced} %", f"{row.hybrid} %", row.timesteps,
    ]  # fmt: skip
    head = ["", "data", "ANN", "converted", "T", "converted, scaled", "STDB", "T"]
    further = [["", "", "", "", "", "", *other] for other in others]
    return markdown_table(head, [ours, *further, paper], text=2)


def gain(results: Results) -> str:
    """What the conversion loses and STDB wins back, as a sentence."""
    reduced, tuned = results.converted.reduced, results.finetuned.at_each[0]
    lost = results.ann.accuracy.test - reduced.accuracy
    won = tuned.accuracy.test - reduced.accuracy
    if lost <= 0:
        return f"At T = {tuned.timesteps} the converted network loses nothing against the ANN."
    back = f"wins back {100 * won:.1f} of them" if won >= 0 else f"loses {-100 * won:.1f} more"
    return (
        f"At T = {tuned.timesteps} the converted network is {100 * lost:.1f} points below the "
        f"ANN, with the threshold scale ({reduced.threshold_scale:g}) that is best on "
        f"validation; STDB {back}."
    )


def fewer_spikes(results: Results) -> str:
    """The two networks' spikes, as a sentence."""
    before, after = results.converted.reduced, results.finetuned
    return (
        f"The sum of the layers' averages is {sum(before.spikes_per_neuron.values()):.2f} for the "
        f"converted network at T = {before.timesteps} and "
        f"{sum(after.spikes_per_neuron.values()):.2f} after STDB at T = {after.timesteps}."
    )


def exits(results: Results) -> str:
    """Steps and accuracy when every image is left as soon as it is clear."""
    whole = results.finetuned
    rows = [
        [
            f"{row.confidence:g}",
            f"{row.timesteps:.2f}",
            f"{1 - row.timesteps / whole.timesteps:.0%}",
            f"{row.accuracy:.2%}",
        ]
        for row in results.plots.finetuned_exits
    ]
    rows.append(["never", f"{whole.timesteps}", "0%", f"{whole.accuracy.test:.2%}"])
    return markdown_table(["confidence", "steps on average", "saved", "accuracy"], rows)


def diagnosis(results: Results) -> str:
    """A table of the fine-tuned layers, and what helps where one does not follow its ANN."""
    plots = results.plots
    head = ["layer", "V", "spikes per step", "correlation", "silent", "saturated", "U/V left"]
    rows = [
        [
            row.layer, f"{row.threshold:.3g}", f"{row.rate:.2%}", f"{row.correlation:.2f}",
            f"{row.dead:.0%}", f"{row.saturated:.0%}", f"{row.residual:.2f}",
        ]
        for row in plots.finetuned_diagnosis
    ]  # fmt: skip
    both = (("converted", plots.converted_diagnosis), ("STDB", plots.finetuned_diagnosis))
    hints = [f"- {name}: {row.hint}" for name, rows in both for row in rows if row.hint]
    return markdown_table(head, rows) + "\n\n" + "\n".join(hints or ["All layers follow the ANN."])


def origin(stage: Stage, results: Results) -> str:
    """Commit, machine, data and the durations of the stages, as far as they are known here."""
    tags, data = provenance(), results.data
    changed = ", with changes" if tags["git.dirty"] == "true" else ""
    lines = [
        f"- commit: `{tags['git.commit']}`{changed}",
        f"- experiment: {tags['dvc.experiment']}",
        f"- machine: {machine()}",
    ]
    for name, split in (
        ("train", data.train),
        ("validation", data.validation),
        ("test", data.test),
    ):
        lines.append(f"- {name}: {split.images:,} images, sha256 `{split.sha256}`")
    lines.append(f"- network: sha256 `{stage.inputs[str(SNN)]}`")
    for name, run in read_runs().items():
        lines.append(f"- {name}: {run.seconds:.0f} s, ended {run.ended}, on {run.machine}")
    return "\n".join(lines)


def machine() -> str:
    """Processor, cores, memory, GPU, and the versions that matter."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    if named := re.search(r"model name\s*: (.*)", text):
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


def as_html(text: str) -> str:
    """The page with its pictures inside, which a browser shows without any other file."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)

    def inside(picture: re.Match[str]) -> str:
        data = base64.b64encode((REPORT / picture[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'src="([\w.]+\.png)"', inside, body)
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Report</title>\n'
        f"<style>{STYLE}</style>\n{body}<script>{SORT}</script>\n</html>\n"
    )
