"""Is the engine right on this GPU, and how fast? Checks first, then measures; stops and goes on.

    python -m benchmarks.gpu [--minutes 6] [--out gpu.json] [--only vgg16]

*Checks*: the kernels against plain torch on random chunks; the golden vectors; a
row of Table 1 in small, by the pipeline's own loops without Ray. *Measures*: a training step and a
presentation of this engine, of the bare products and of SpikingJelly at the same batch, and of this
engine's training step the share of time outside products and the number of launches.
Every result is written to OUT when it is there. When the minutes are over it ends with exit status
3, and the same command goes on. ``--device cpu --quick`` tries the script where there is no GPU.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import stdb
from benchmarks.contenders import step
from benchmarks.workloads import QUICK, Workload
from pipeline.files import files_below

ROOT = Path(__file__).parents[1]
UNFINISHED = 3  # exit status: the same command goes on
WORKLOADS = [
    Workload("vgg16", 100, 128, 128, precision="bfloat16"),
    Workload("vgg16", 4, 256, 256, density=0.25, few=True, precision="bfloat16"),
    Workload("resnet18", 4, 256, 256, density=0.15, few=True, precision="bfloat16"),
    Workload("resnet9", 4, 256, 256, width=0.5, density=0.15, few=True, precision="bfloat16"),
]
CONTENDERS = ("products", "stdb", "spikingjelly")
IN_A_ROW = ("vgg", "resnet9")  # architectures that are a sequence of layers, as peers want them
PRODUCTS = ("gemm", "conv", "cutlass", "xmma", "wgrad", "dgrad", "fprop", "cudnn", "::mm", "addmm")

Found = dict[str, Any]


class OutOfTimeError(Exception):
    """The minutes are over; all is written."""


def failed(found: Any) -> bool:
    """Whether that is an error."""
    return isinstance(found, dict) and "error" in found


class Results:
    """What was found so far, in a file, and how much time is left."""

    def __init__(self, path: Path, minutes: float, about: Found) -> None:
        self.path, self.end, self.began = path, time.monotonic() + 60 * minutes, False
        self.found: Found = {"about": about}
        if path.exists():
            self.found = json.loads(path.read_text(encoding="utf-8"))
            if self.found["about"] != about:
                raise SystemExit(f"{path} is of {self.found['about']}; delete it, or give --out")

    def once(self, name: str, work: Callable[[], Any]) -> None:
        """Find it out unless it is known; an error is what was found, and is tried again."""
        if name in self.found and not failed(self.found[name]):
            return
        if self.began and time.monotonic() > self.end:
            raise OutOfTimeError
        self.began = True
        print(f"{name} …", flush=True)
        try:
            self.found[name] = work()
        except Exception as error:  # one that fails does not hide the others
            self.found[name] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        print(f"{name}: {json.dumps(self.found[name])[:300]}", flush=True)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")


# -- checks ----------------------------------------------------------------------------------------


def check_vectors(device: torch.device) -> str:
    """The golden vectors, by their own test, on the device."""
    if importlib.util.find_spec("pytest") is None:
        return "not checked: no pytest here"
    tests = "tests/stdb/test_golden_vectors.py"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests],
        env=os.environ | {"STDB_DEVICE": str(device)}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if result.returncode:
        raise AssertionError(result.stdout[-400:] + result.stderr[-400:])
    return result.stdout.strip().splitlines()[-1]


def check_loops() -> str:
    """ANN, balancing, conversion, fine-tuning on noise in class folders: that they run through."""
    import numpy as np
    from PIL import Image

    from benchmarks import row

    random, small = np.random.default_rng(0), [
        "data.validation_fraction=0.25", "network.width=0.2", "network.hidden=32",
        "train_ann.epochs=1", "train_ann.batch_size=16", "balance_thresholds.timesteps=20",
        "balance_thresholds.images=16", "evaluate_converted.timesteps=6",
        "evaluate_converted.scales=[0.5, 1.0]", "stdb.timesteps=4", "stdb.batch_size=8",
        "stdb.epochs=1",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        for split, name in ((s, n) for s in ("train", "test") for n in ("cat", "dog")):
            (images / split / name).mkdir(parents=True)
            for k in range(16):
                pixels = random.integers(0, 256, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(images / split / name / f"{k}.png")
        params = row.parameters(ROOT / "presets/cpu-vgg5-cifar10.yaml", images, small)
        out = Path(folder) / "row"
        out.mkdir()
        return row.Row(out, 60, 1, params).run().splitlines()[2]


# -- measures --------------------------------------------------------------------------------------


def measure(workload: Workload, contender: str, phase: str, device: torch.device) -> Found:
    """Milliseconds of a step, the median of several; images a second; peak over the base."""
    run, on_gpu = step(contender, workload, phase, workload.batch, device), device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else float
    run()
    wait()
    base = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < 2 and len(seconds) < 20):
        start = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - start)
    found = {"ms": 1e3 * median(seconds), "images/s": workload.batch / median(seconds)}
    if on_gpu:
        found["MiB"] = (torch.cuda.max_memory_allocated() - base) / 2**20
    return found


def profile(workload: Workload, device: torch.device) -> Found:
    """Of a training step: the share of time outside products, by kernel, and the launches."""
    on_gpu = device.type == "cuda"
    kinds = torch.profiler.ProfilerActivity
    run = step("stdb", workload, "train", workload.batch, device)
    run()
    with torch.profiler.profile(activities=[kinds.CUDA if on_gpu else kinds.CPU]) as found:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    rows = {
        event.key: (
            event.self_device_time_total if on_gpu else event.self_cpu_time_total,
            event.count,
        )
        for event in found.key_averages()
    }
    total = sum(time for time, _ in rows.values()) or 1.0
    of_products = sum(t for name, (t, _) in rows.items() if any(p in name for p in PRODUCTS))
    longest = sorted(rows.items(), key=lambda one: -one[1][0])[:10]
    return {
        "outside products": 1 - of_products / total,
        "launches": sum(count for _, count in rows.values()),
        "longest": {name[:80]: round(t / total, 3) for name, (t, _) in longest},
    }


def works(device: torch.device, workloads: list[Workload]) -> Iterator[tuple[str, Any]]:
    """All that is to be found out: its name, and how."""
    yield "kernels", partial(stdb.check_kernels, device)
    yield "golden vectors", partial(check_vectors, device)
    yield "loops", check_loops
    for workload in workloads:
        for phase in ("train", "infer"):
            for contender in CONTENDERS:
                if contender != "spikingjelly" or workload.architecture.startswith("vgg"):
                    name = f"{workload.name}, {phase}, {contender}"
                    yield name, partial(measure, workload, contender, phase, device)
        yield f"{workload.name}, profile", partial(profile, workload, device)


def table(found: Found) -> str:
    """Checks in lines, measures in a table: beside each its multiple of the bare products."""
    lines = [f"{name}: {found[name]}" for name in ("about", "kernels", "golden vectors", "loops")]
    lines += ["", "| workload | phase | contender | ms | × products | images/s | MiB |"]
    lines += ["| --- | --- | --- | ---: | ---: | ---: | ---: |"]
    for name, one in found.items():
        if name.count(", ") != 2:
            continue
        workload, phase, contender = name.split(", ")
        if "error" in one:
            lines.append(f"| {workload} | {phase} | {contender} | {one['error'][:80]} | | | |")
            continue
        floor = found.get(f"{workload}, {phase}, products", {}).get("ms")
        times = f"{one['ms'] / floor:.2f}" if floor else ""
        room = f"{one['MiB']:,.0f}" if "MiB" in one else ""
        cells = [workload, phase, contender, f"{one['ms']:.1f}", times, f"{one['images/s']:,.0f}"]
        lines.append(f"| {' | '.join([*cells, room])} |")
    for name, one in found.items():
        if name.endswith(", profile") and "error" not in one:
            share, launches = one["outside products"], one["launches"]
            lines.append(f"{name}: {share:.0%} outside products, {launches} launches")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Check, measure, print the table; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=6, help="then stop, to go on later (6)")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny network: does it run")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is there that torch sees; --device cpu --quick tries the script")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    code = hashlib.sha256(b"".join(p.read_bytes() for p in files_below(ROOT / "stdb")))
    about = {"device": name, "torch": torch.__version__, "quick": options.quick}
    about |= {"engine": code.hexdigest()[:12]}
    results = Results(options.out, options.minutes, about)
    chosen = [w for w in (QUICK[:1] if options.quick else WORKLOADS) if options.only in w.name]
    try:
        for key, work in works(device, chosen):
            results.once(key, work)
    except OutOfTimeError:
        print("out of time; the same command goes on", flush=True)
        return UNFINISHED
    print(table(results.found))
    return 1 if any(map(failed, results.found.values())) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
