"""Stage report: Table 1's row, Fig. 3, accuracy against T, how training went, energy.

    python -m pipeline.report

Reads what the other stages wrote; trains and evaluates nothing. Out: report/README.md with PNGs.
"""

import csv
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.stage import Stage, read_json, run_stage, writing

OUT = Path("report")
CONVERTED, FINETUNED, ANN = "#8a8f98", "#c8452d", "#2a5d8f"


def main(stage: Stage) -> None:
    """Draw the figures, write the page."""
    params = stage.params
    ann = read_json(Path("metrics/train_ann.json"))
    converted = read_json(Path("metrics/evaluate_converted.json"))
    tuned = read_json(Path("metrics/finetune_stdb.json"))
    figures = {
        "accuracy_by_timestep": accuracy_by_timestep(ann, converted, tuned),
        "spikes_per_layer": spikes_per_layer(converted, tuned),
        "training": training(ann),
    }
    for name, figure in figures.items():
        with writing(OUT / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})
        plt.close(figure)
        stage.tracker.figure(OUT / f"{name}.png")
    test = read_json(Path("metrics/data.json"))["test"]["images"]
    text = page(params, ann, converted, tuned, test)
    with writing(OUT / "README.md") as temporary:
        temporary.write_text(text)
    stage.tracker.figure(OUT / "README.md")
    stage.say(table(params, ann, converted, tuned))
    stage.say(f"see {OUT}/README.md")


def table(params, ann: dict, converted: dict, tuned: dict) -> str:
    """Table 1's row as Markdown."""
    long, reduced = converted["long"], converted["reduced"]
    rows = [
        "| | data | ANN | converted | T | converted, scaled | STDB | T |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| **{params.network.architecture}** (width {params.network.width:g}) "
        f"| {params.data.source} "
        f"| {ann['accuracy']['test']:.2%} | {long['accuracy']:.2%} | {long['timesteps']} "
        f"| {reduced['accuracy']:.2%} | **{tuned['accuracy']['test']:.2%}** "
        f"| {tuned['timesteps']} |",
    ]
    return "\n".join(rows)


def page(params, ann: dict, converted: dict, tuned: dict, test: int) -> str:
    """The report."""
    lost = ann["accuracy"]["test"] - converted["reduced"]["accuracy"]
    won = tuned["accuracy"]["test"] - converted["reduced"]["accuracy"]
    t = tuned["timesteps"]
    if lost > 0:
        sentence = (
            f"At T = {t} the converted network is {100 * lost:.1f} points below the ANN, with the "
            f"threshold scale ({converted['reduced']['threshold_scale']:g}) that is best on "
            f"validation; STDB wins back {100 * won:.1f} of them."
        )
    else:
        sentence = f"At T = {t} the converted network loses nothing against the ANN."
    energy = "\n".join(
        f"| {name} | {steps} | {row['energy_pj'] / 1000:,.1f} | "
        + (f"{row['energy_delay'] / 1000:,.1f} |" if "energy_delay" in row else "|")
        for name, steps, row in (
            ("ANN", "", converted["ann"]),
            ("converted", converted["long"]["timesteps"], converted["long"]),
            ("converted, scaled", t, converted["reduced"]),
            ("STDB", t, tuned),
        )
    )
    return f"""# Report

{table(params, ann, converted, tuned)}

Top-1 accuracy on {test:,} test images, read once; scale and epoch are chosen on validation.
{sentence}

![Accuracy against T](accuracy_by_timestep.png)

## Spikes (Fig. 3)

Spikes of each layer summed over T = {t}, per neuron and image.

![Spikes per layer](spikes_per_layer.png)

## Energy

Per image, 45 nm CMOS: 0.9 pJ an accumulate, 4.6 pJ a multiply-accumulate; synaptic operations by
real fan-out.

| | T | nJ | nJ · steps |
| --- | ---: | ---: | ---: |
{energy}

## Training

![Training](training.png)

Reproduce with `dvc repro`; every parameter is in `params.yaml` (seeds: data {params.data.seed},
ANN {params.train_ann.seed}, calibration {params.balance_thresholds.seed}, STDB {params.stdb.seed}).
"""


def accuracy_by_timestep(ann: dict, converted: dict, tuned: dict) -> Figure:
    """Accuracy on the test split after every step, converted and fine-tuned."""
    figure, axes = _axes("Accuracy against T", "time steps", "test accuracy (%)")
    rows = _rows("plots/converted_accuracy.csv")
    for scale in dict.fromkeys(row["threshold_scale"] for row in rows):
        curve = [row for row in rows if row["threshold_scale"] == scale]
        label = "balanced thresholds" if float(scale) == 1 else f"thresholds × {float(scale):g}"
        style = "-" if float(scale) != 1 else ":"
        _curve(axes, curve, f"converted, {label}", CONVERTED, style)
    _curve(axes, _rows("plots/finetuned_accuracy.csv"), "STDB", FINETUNED, "-")
    axes.axhline(100 * ann["accuracy"]["test"], color=ANN, lw=1.2, ls="--", label="ANN")
    axes.plot(tuned["timesteps"], 100 * tuned["accuracy"]["test"], "o", color=FINETUNED)
    axes.plot(
        converted["reduced"]["timesteps"], 100 * converted["reduced"]["accuracy"], "o",
        color=CONVERTED,
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_ylim(0, 102)
    axes.legend(frameon=False, loc="lower right")
    return figure


def spikes_per_layer(converted: dict, tuned: dict) -> Figure:
    """Fig. 3: average spikes per neuron of every layer, converted and fine-tuned side by side."""
    figure, axes = _axes("Spikes per neuron", "layer", "spikes per image")
    before, after = converted["reduced"]["spikes_per_neuron"], tuned["spikes_per_neuron"]
    x = range(len(before))
    axes.bar([i - 0.2 for i in x], list(before.values()), 0.4, color=CONVERTED, label="converted")
    axes.bar([i + 0.2 for i in x], list(after.values()), 0.4, color=FINETUNED, label="STDB")
    slanted: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(list(x), list(before), **(slanted if len(before) > 8 else {}))
    axes.legend(frameon=False)
    return figure


def training(ann: dict) -> Figure:
    """Accuracy by epoch of both trainings."""
    figure, both = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axes, name, title in (
        (both[0], "train_ann", "ANN"),
        (both[1], "finetune_stdb", "STDB"),
    ):
        rows = _rows(f"plots/{name}.csv")
        epochs = [int(row["epoch"]) for row in rows]
        for key, style in (("train", ":"), ("validation", "-")):
            if f"accuracy/{key}" in rows[0]:
                values = [100 * float(row[f"accuracy/{key}"]) for row in rows]
                color = ANN if name == "train_ann" else FINETUNED
                axes.plot(epochs, values, style, color=color, label=key)
        axes.set(title=title, xlabel="epoch")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right")
    both[0].set_ylabel("accuracy (%)")
    return figure


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _curve(axes: Axes, rows: list[dict[str, str]], label: str, color: str, style: str) -> None:
    steps = [int(row["timesteps"]) for row in rows]
    accuracy = [100 * float(row["accuracy"]) for row in rows]
    axes.plot(steps, accuracy, style, color=color, label=label)


def _rows(path: str) -> list[dict[str, str]]:
    with Path(path).open() as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    run_stage("report", main)
