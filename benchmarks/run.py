"""Run all comparisons and write benchmarks/results.json and benchmarks/README.md.

    python -m benchmarks.run [--quick] [--rounds 3] [--only vgg5] [--phases train,infer]

Every measurement is a process of its own (:mod:`benchmarks.contenders`); contenders take turns, and
the median of the rounds counts. Figures are per image, since contenders that keep everything get a
smaller batch. Rows that are measured already are kept, so that a long run can be done in parts.
Beside the table, Appendix B's Fig. 5 is drawn.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.contenders import PEERS
from benchmarks.workloads import QUICK, WORKLOADS, Workload

FOLDER = Path(__file__).parent
EPOCHS = {"ANN": 250, "STDB": 20}  # the paper's recipe
IMAGES = 50_000  # of CIFAR-10
OTHERS = {"scale": "benchmarks.scaling", "input": "benchmarks.inputs"}


def contenders(workload: Workload, phase: str) -> list[str]:
    """Who takes part."""
    if phase == "record":
        return ["recorded"]
    if phase == "balance":
        return ["stdb", "step-by-step"]
    if workload.architecture.startswith("resnet"):  # the peers' networks are chains of layers here
        return ["stdb", "products"]
    peers = [p for p in PEERS if phase == "train" or p != "spikingjelly-memopt"]
    return ["stdb", "products", *peers, *(["ann"] if workload.ann else [])]


def measure(contender: str, workload: Workload, phase: str) -> dict[str, Any] | None:
    """One process; None where it fails, which is said."""
    command = [sys.executable, "-m", "benchmarks.contenders", contender, workload.name, phase]
    result = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["killed (out of memory?)"])[-1]
        print(f"    {contender}: failed: {reason}", flush=True)
        return None
    return json.loads(result.stdout.splitlines()[-1])


def compare(workload: Workload, phase: str, rounds: int) -> list[dict[str, Any]]:
    """The rows of one workload and phase."""
    print(f"{workload.name}, {phase}", flush=True)
    found: dict[str, list[dict[str, Any]]] = {n: [] for n in contenders(workload, phase)}
    for _ in range(rounds):
        for contender in list(found):
            if (one := measure(contender, workload, phase)) is None:
                del found[contender]
                continue
            found[contender].append(one)
            if phase == "record":
                print(f"    statistics take {one['seconds'] / one['plain'] - 1:+.1%}", flush=True)
                continue
            print(
                f"    {contender:14} {one['seconds'] / one['batch']:8.3f} s an image, "
                f"{one['peak_bytes'] / 2**20:8.0f} MiB over the base at batch {one['batch']}",
                flush=True,
            )
    if phase == "record":
        return recorded(workload, found["recorded"])
    rows = []
    for contender, ones in found.items():
        seconds = statistics.median(one["seconds"] / one["batch"] for one in ones)
        peak = statistics.median(one["peak_bytes"] for one in ones)
        rows.append(
            {
                "workload": workload.name,
                "phase": phase,
                "contender": contender,
                "precision": workload.precision,
                "density": workload.density,
                "timesteps": workload.timesteps,
                "batch": ones[0]["batch"],
                "rounds": len(ones),
                "seconds": seconds,
                "peak_bytes": int(peak),
                "bytes_per_neuron_step": peak / ones[0]["neuron_steps"],
                "machine": machine(),
            }
        )
    ours = next(row["seconds"] for row in rows if row["contender"] == "stdb")
    for row in rows:
        row["ratio_to_stdb"] = row["seconds"] / ours
    return rows


def others(phase: str) -> list[dict[str, Any]]:
    """The rows of a benchmark that measures all of its contenders itself."""
    print(phase, flush=True)
    command = [sys.executable, "-m", OTHERS[phase]]
    result = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    rows = []
    for line in result.stdout.splitlines():
        print(f"    {line}", flush=True)
        found = json.loads(line)
        common = {"workload": found.pop("workload"), "phase": phase, "batch": found.pop("batch")}
        for contender, seconds in found.items():
            ratio = seconds / found["stdb"]
            rows.append(
                common
                | {"contender": contender, "seconds": seconds, "ratio_to_stdb": ratio}
                | {"machine": machine()}
            )
    return rows


def recorded(workload: Workload, ones: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of an inference with spike statistics and of the same without."""
    common = {"workload": workload.name, "phase": "record", "batch": workload.batch}
    rows = []
    for contender, key in (("stdb", "plain"), ("recorded", "seconds")):
        rows.append(
            common
            | {
                "contender": contender,
                "seconds": statistics.median(one[key] / one["batch"] for one in ones),
                "ratio_to_stdb": statistics.median(one[key] / one["plain"] for one in ones),
                "machine": machine(),
            }
        )
    return rows


def machine() -> dict[str, str]:
    """Hardware and versions."""
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    packages = ("torch", "numba", "snntorch", "spikingjelly")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| workload | phase | contender | ms an image | × stdb | MiB over base | at batch | "
        "bytes a neuron-step | processor |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for r in rows:
        memory = ("", "")
        if "peak_bytes" in r:
            memory = f"{r['peak_bytes'] / 2**20:,.0f}", f"{r['bytes_per_neuron_step']:.2f}"
        lines.append(
            f"| {r['workload']} | {r['phase']} | {r['contender']} | {1e3 * r['seconds']:,.1f} "
            f"| {r['ratio_to_stdb']:.2f} | {memory[0]} | {r['batch']} | {memory[1]} "
            f"| {r['machine']['processor']} |"
        )
    return "\n".join(lines)


def figure(rows: list[dict[str, Any]], path: Path) -> bool:
    """Appendix B's Fig. 5: time and memory of ANN, SNN from scratch and hybrid, of VGG16, T = 100.

    Times of training are seconds an image × images × the recipe's epochs; from scratch an SNN is
    given as many as the ANN. False where something is not measured yet.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {
        (r["phase"], r["contender"]): r
        for r in rows
        if r["workload"] == "vgg16 T=100" and r["contender"] in ("stdb", "ann")
    }
    if len(found) < 4:
        return False
    epoch = {c: found["train", c]["seconds"] * IMAGES / 3600 for c in ("ann", "stdb")}
    ann = EPOCHS["ANN"] * epoch["ann"]
    labels = ["ANN", "SNN from\nscratch", "hybrid"]
    both = ["ann", "stdb", "stdb"]
    batch = found["train", "stdb"]["batch"]
    panels = [
        (f"training, hours\n{IMAGES:,} images, {EPOCHS['ANN']} epochs; hybrid: and "
         f"{EPOCHS['STDB']} of STDB",
         [ann, EPOCHS["ANN"] * epoch["stdb"], ann + EPOCHS["STDB"] * epoch["stdb"]]),
        ("inference, ms an image", [1e3 * found["infer", c]["seconds"] for c in both]),
        (f"training, MiB over the base\nbatch {batch}",
         [found["train", c]["peak_bytes"] / 2**20 for c in both]),
        (f"inference, MiB over the base\nbatch {batch}",
         [found["infer", c]["peak_bytes"] / 2**20 for c in both]),
    ]  # fmt: skip
    drawn, axes = pyplot.subplots(1, 4, figsize=(13, 3.6), layout="constrained")
    for place, (title, values) in zip(axes, panels, strict=True):
        bars = place.bar(labels, values, color=["#8a8a8a", "#c44e52", "#4c72b0"])
        place.bar_label(bars, fmt=lambda v: f"{v:,.0f}")
        place.set_title(title, fontsize=9)
        place.margins(y=0.15)
    drawn.suptitle("VGG16, T = 100: time and memory (Appendix B, Fig. 5)")
    drawn.savefig(path, dpi=110)
    pyplot.close(drawn)
    return True


def write(rows: list[dict[str, Any]]) -> None:
    """results.json, and README.md with the table and the picture."""
    (FOLDER / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    facts = ", ".join(f"{k} {v}" for k, v in machine().items() if k != "processor")
    picture = ""
    if figure(rows, FOLDER / "appendix_b.png"):
        picture = "\n![Time and memory of ANN, SNN from scratch and hybrid](appendix_b.png)\n"
    (FOLDER / "README.md").write_text(
        f"# Benchmarks\n\n`make bench` on {facts}. Every measurement is a process of its own, "
        "contenders take turns; the median of the rounds (a row's `rounds` in `results.json`). "
        "Every layer spikes at 5 % of the neurons in a step, or as the workload says; *trained* is "
        "a network that learned (`python -m benchmarks.trained`). *Base* is the process with "
        "model, gradients and optimiser state. *scale*: two workers with a thread each beside two "
        "processes that know nothing of each other. *input*: reading an image from its JPEG file, "
        "by one process, or from memory, beside learning from it.\n\n"
        f"{table(rows)}\n{picture}"
    )


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="tiny networks, no files: does it run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--phases", default="train,infer,record,balance,scale,input")
    options = parser.parse_args()
    path = FOLDER / "results.json"
    kept = path.exists() and not options.quick
    rows = json.loads(path.read_text(encoding="utf-8")) if kept else []
    for workload in QUICK if options.quick else WORKLOADS:
        for phase in workload.phases:
            if options.only in workload.name and phase in options.phases.split(","):
                here = (workload.name, phase)
                rows = [r for r in rows if (r["workload"], r["phase"]) != here]
                rows += compare(workload, phase, options.rounds)
                if not options.quick:
                    write(rows)
    for phase in OTHERS:
        if phase in options.phases.split(",") and not options.only and not options.quick:
            rows = [r for r in rows if r["phase"] != phase] + others(phase)
            write(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
