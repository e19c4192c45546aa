"""Stage report: Table 1's row, Figs. 1 and 3, accuracy against T, and how the network came about.

    python -m pipeline.report

Reads what the other stages wrote, and presents one image. Out: report/index.html, which needs no
other file, report/README.md with PNGs, and metrics/summary.json, which `dvc metrics` and
`dvc exp show` show.
"""

import torch
from matplotlib.figure import Figure

import stdb
from pipeline.data import load_split
from pipeline.files import DATA, METRICS, REPORT, SNN, write_json, write_text, writing
from pipeline.params import Params
from pipeline.reporting import figures
from pipeline.reporting.literature import rows_for
from pipeline.reporting.page import as_html, gist, page, table
from pipeline.reporting.results import Results, by_timestep, headline, read_results, summary
from pipeline.stage import Stage, stage_command


def main(stage: Stage) -> None:
    """Draw the figures, write the pages."""
    results = read_results()
    for name, figure in draw(stage.params, results).items():
        with writing(REPORT / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})
        stage.tracker.figure(REPORT / f"{name}.png")
    text = page(stage, results)
    write_text(REPORT / "README.md", text)
    write_text(REPORT / "index.html", as_html(text))
    for name in ("README.md", "index.html"):
        stage.tracker.figure(REPORT / name)
    write_json(METRICS / "summary.json", summary(results))
    row = table(stage.params, results)
    about = f"{gist(stage.params, results)}\n\n{row}"
    stage.tracker.summary(headline(results), about, REPORT / "index.html", by_timestep(results))
    stage.say(row)
    stage.say(f"see {REPORT}/index.html, or {REPORT}/README.md")


def draw(params: Params, results: Results) -> dict[str, Figure]:
    """The figures, by the name of their file."""
    reduced, tuned, plots = results.converted.reduced, results.finetuned, results.plots
    snn, about = stdb.load(SNN)
    one = load_split(DATA / "test.safetensors").take(torch.zeros(1, dtype=torch.int64))
    return {
        "accuracy_by_timestep": figures.accuracy_by_timestep(
            results, rows_for(results.data.classes)
        ),
        "spikes_per_layer": figures.spikes_per_layer(
            reduced, tuned, {name: n.mean_threshold for name, n in snn.neurons.items()}
        ),
        "surrogate": figures.surrogate(params.stdb),
        "raster": figures.raster(snn, one.pixels(), one.ids, about["timesteps"]),
        "diagnosis": figures.diagnosis(plots.converted_diagnosis, plots.finetuned_diagnosis),
        "confusion": figures.confusion(plots.finetuned_confusion, about["classes"]),
        "training": figures.training(plots.train_ann, plots.finetune_stdb),
    }


if __name__ == "__main__":
    stage_command("report", main, __doc__)
