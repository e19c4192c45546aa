"""Run all comparisons and write benchmarks/results.json and benchmarks/README.md.

    python -m benchmarks.run [--quick] [--rounds 3] [--only vgg5] [--phases train,infer]

Every measurement is a process of its own (:mod:`benchmarks.contenders`); contenders take turns, and
the median of the rounds counts. Figures are per image, since contenders that keep everything get a
smaller batch. Rows that are measured already are kept, so that a long run can be done in parts.
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

from benchmarks.contenders import CONTENDERS
from benchmarks.workloads import QUICK, WORKLOADS, Workload

FOLDER = Path(__file__).parent
TRAIN = ["stdb", "products", *(name for name in CONTENDERS if name != "stdb")]
OF_PHASE = {"train": TRAIN, "infer": TRAIN, "balance": ["stdb", "step-by-step"]}


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
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in OF_PHASE[phase]}
    for _ in range(rounds):
        for contender in list(found):
            if (one := measure(contender, workload, phase)) is None:
                del found[contender]
                continue
            found[contender].append(one)
            print(
                f"    {contender:14} {one['seconds'] / one['batch']:8.3f} s an image, "
                f"{one['peak_bytes'] / 2**20:8.0f} MiB over the base at batch {one['batch']}",
                flush=True,
            )
    rows = []
    for contender, ones in found.items():
        seconds = statistics.median(one["seconds"] / one["batch"] for one in ones)
        peak = statistics.median(one["peak_bytes"] for one in ones)
        rows.append(
            {
                "workload": workload.name,
                "phase": phase,
                "contender": contender,
                "batch": ones[0]["batch"],
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


def machine() -> dict[str, str]:
    """Hardware and versions."""
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
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
        "bytes a neuron-step |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r['workload']} | {r['phase']} | {r['contender']} | {1e3 * r['seconds']:,.1f} "
        f"| {r['ratio_to_stdb']:.2f} | {r['peak_bytes'] / 2**20:,.0f} | {r['batch']} "
        f"| {r['bytes_per_neuron_step']:.2f} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="tiny networks, no files: does it run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--phases", default="train,infer,balance")
    options = parser.parse_args()
    path = FOLDER / "results.json"
    rows = json.loads(path.read_text()) if path.exists() and not options.quick else []
    for workload in QUICK if options.quick else WORKLOADS:
        for phase in workload.phases:
            if options.only in workload.name and phase in options.phases.split(","):
                here = (workload.name, phase)
                rows = [r for r in rows if (r["workload"], r["phase"]) != here]
                rows += compare(workload, phase, options.rounds)
                if not options.quick:
                    path.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    if not options.quick:
        facts = ", ".join(f"{key} {value}" for key, value in machine().items())
        (FOLDER / "README.md").write_text(
            f"# Benchmarks\n\n`make bench` on {facts}; median of {options.rounds} rounds, each "
            "measurement in a process of its own, contenders taking turns.\n\n"
            f"{table(rows)}\n"
        )


if __name__ == "__main__":
    main()
