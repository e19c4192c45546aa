"""A trained network, calibrated for several T and trained no further: results/NAME.json, a picture.

    python -m benchmarks.calibrated add NAME --timesteps 4 8 16 32   # where train_ann has ended
    python -m benchmarks.calibrated plot FILE.png NAME...            # accuracy over the steps

Calibrates as ``balance_thresholds`` says, from training images alone; the test split is read once
for each T, and what is found is written before the next, beside the network,
models/calibrated/tT.safetensors; T that are there, of the same commit and machine, stay.
``python -m benchmarks.kept table`` puts it into the table of RESULTS.md.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.kept import IMAGES, RESULTS, Kept, cost_of, dense_energy, origin_of, place
from pipeline.command import command, parser
from pipeline.data import subset
from pipeline.errors import StageError
from pipeline.files import ANN, SNNS, read_json, write_json, writing
from pipeline.handed_on import read_ann_results, read_data_summary
from pipeline.jobs.checkpoints import Checkpoints
from pipeline.jobs.choices import with_choices
from pipeline.jobs.worker import Worker
from pipeline.learning.calibration import calibrate
from pipeline.learning.evaluation import evaluate_quantised, evaluate_snn
from pipeline.learning.network_file import write_network
from pipeline.learning.networks import build_ann, use_threads
from pipeline.learning.weights import load_weights
from pipeline.params import load_params

STEPS = [4, 8, 16, 32]
NETWORKS = SNNS.parent / "calibrated"


@command
def main(arguments: Sequence[str]) -> None:
    """Measure a network, or draw those that were."""
    line = parser(__doc__, "calibrated")
    line.prog = "python -m benchmarks.calibrated"
    parts = line.add_subparsers(dest="what", required=True)
    add = parts.add_parser("add", help="calibrate and evaluate the network that is here")
    add.add_argument("name", metavar="NAME")
    add.add_argument("--timesteps", type=int, nargs="+", default=STEPS, metavar="T")
    plot = parts.add_parser("plot", help="draw accuracy over the steps")
    plot.add_argument("file", type=Path, metavar="FILE.png")
    plot.add_argument("names", nargs="+", metavar="NAME")
    given = line.parse_args(arguments)
    if given.what == "add":
        measure(place(given.name), given.timesteps)
    else:
        runs = {name: read_json(RESULTS / f"{name}.json") for name in given.names}
        with writing(given.file) as temporary:
            draw(runs).savefig(temporary, format="png", dpi=130)


def measure(path: Path, timesteps: Sequence[int]) -> None:
    """Calibrate for each T, evaluate, write."""
    params, data = load_params(), read_data_summary()
    if data is None:
        raise StageError("there are no images; python -m pipeline.prepare_data reads them")
    checkpoints = Checkpoints(params.cluster.storage, "calibrated", path.stem)  # none are kept
    worker = with_choices(Worker(params, "calibrated", checkpoints))
    train, validation, test = map(worker.split, ("train", "validation", "test"))
    few, batch = subset(validation, IMAGES, params.data.seed), params.evaluate_converted.batch_size
    ann = build_ann(params.network, train)
    load_weights(ann, ANN)
    use_threads(worker, ann, test, batch)
    origin = origin_of(params, ann, data)
    kept: Kept = read_json(path) if path.exists() else {}
    if {name: kept.get(name) for name in origin} != origin:
        of_ann = {**read_ann_results().accuracy.model_dump(), "energy": dense_energy(ann, few)}
        kept = {**origin, "seconds": {}, "ann": of_ann | {"levels": {}}, "networks": []}
    for steps in sorted({*timesteps} - {one["timesteps"] for one in kept["networks"]}):
        began = time.perf_counter()
        of_steps = worker.params.stdb.model_copy(update={"timesteps": steps})
        one = replace(worker, params=worker.params.model_copy(update={"stdb": of_steps}))
        snn = calibrate(one, ann, train).snn.eval()
        file = NETWORKS / f"t{steps}.safetensors"
        with writing(file) as temporary:
            write_network(snn, one.params, train, temporary, steps)
        _, costs = cost_of(file, few)
        chosen = evaluate_snn(one, snn, validation, steps, batch)
        found = evaluate_snn(one, snn, test, steps, batch)
        levels = evaluate_quantised(one, snn, test, [steps], batch)[steps]
        kept["ann"]["levels"][str(steps)] = levels
        kept["seconds"][f"T = {steps}"] = round(time.perf_counter() - began)
        kept["networks"].append(
            {
                "timesteps": steps,
                "validation": chosen.accuracy[-1],
                "test": found.accuracy[-1],
                "over_time": found.accuracy,
                "spikes": found.mean_spikes,
                **costs,
            }
        )
        kept["networks"].sort(key=lambda one: one["timesteps"])
        write_json(path, kept)
        worker.say(
            f"T = {steps}: test {found.accuracy[-1]:.2%}, ANN {kept['ann']['test']:.2%}, with "
            f"{steps} levels {levels:.2%}; {path} is written"
        )


def draw(runs: dict[str, Kept]) -> Any:
    """Accuracy after each step of the networks of each T; a panel for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(runs), 4.6), layout="constrained")
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axes, (name, run) in zip(panels, runs.items(), strict=True):
        ann = 100 * run["ann"]["test"]
        axes.axhline(ann, color="0.4", ls="--", lw=1.2, label=f"its ANN, {ann:.1f} %")
        for k, one in enumerate(run["networks"]):
            shares = 100 * torch.tensor(one["over_time"], dtype=torch.float64)
            label = f"calibrated for T = {one['timesteps']}: {shares[-1]:.1f} %"
            axes.plot(range(1, len(shares) + 1), shares, color=f"C{k}", label=label)
            axes.plot(len(shares), shares[-1], "o", color=f"C{k}")
        steps = [one["timesteps"] for one in run["networks"]]
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 2, *steps], [str(t) for t in [1, 2, *steps]])
        axes.set(title=name, xlabel="time steps")
        axes.legend(
            frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=8
        )
    panels[0].set_ylabel("test accuracy (%)")
    return figure


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
