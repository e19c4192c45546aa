"""A row of the paper's Table 1, from images to the table, in one process that may be stopped.

    python -m benchmarks.row vgg16-cifar10 IMAGES [--minutes 8] [--seeds 3] [--set stdb.epochs=2 …]

For a machine with a GPU and little time: the pipeline's own loops, driven by a plain Worker; no
Ray, no MLflow, no DVC. It stops after so many minutes with exit status 3; the same command goes on
where it was, within an epoch, too. IMAGES is what ``data.path`` may be: a folder or archive of
train/CLASS/… and test/CLASS/…. One ANN, ``--seeds`` fine-tunings of it. Parameters are those of
params.yaml with the preset on it, checked as theirs; what a single process cannot do is refused.
Out, in OUT (row-PRESET): table.md, results.json with accuracies by T, spikes and seconds.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from pipeline import balance_thresholds, evaluate_converted, finetune_stdb, train_ann
from pipeline.data import Files, save_split
from pipeline.data.sources import read_source
from pipeline.errors import DataError, ParamsError, StageError
from pipeline.files import (
    ANN,
    BALANCED,
    CONVERSION,
    DATA,
    THRESHOLDS,
    write_json,
    write_text,
    writing,
)
from pipeline.jobs.checkpoints import Checkpoints
from pipeline.jobs.choices import with_choices
from pipeline.jobs.run import use_precision
from pipeline.jobs.worker import State, Worker
from pipeline.learning.balanced import save_balanced
from pipeline.learning.networks import save_weights
from pipeline.overlays import merge
from pipeline.params import Params
from pipeline.prepare_data import split
from pipeline.typed import read_yaml, validate

ROOT = Path(__file__).parents[1]
SAVE_EVERY = 60.0  # seconds
UNFINISHED = 3  # exit status: the same command goes on


class OutOfTimeError(Exception):
    """The minutes are over; all is saved."""


class StateFile(Checkpoints):
    """The newest state of a loop, in one file of the row's folder."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path.parent), path.stem, "row")
        self.path = path

    def save(self, state: State) -> None:
        """Write a state, whole or not at all."""
        with writing(self.path) as temporary:
            torch.save(state, temporary)

    def load(self, device: torch.device | str = "cpu") -> State | None:
        """The state that was written last."""
        if not self.path.exists():
            return None
        state: State = torch.load(self.path, weights_only=True, map_location=device)
        return state


class TimedWorker(Worker):
    """The only worker of a loop; stops it when the time is over, at a step whose state is kept."""

    end = saved = 0.0

    def checkpoint_due(self, step: int) -> bool:  # noqa: ARG002
        """Every minute, and when the time is over."""
        now = time.monotonic()
        return now > self.end or now - self.saved > SAVE_EVERY

    def checkpoint(self, state: State, rows: Any = ()) -> None:
        """Keep the state; stop where the loop has more to do."""
        super().checkpoint(state, rows)
        self.saved = time.monotonic()
        if "history" in state and "test" not in state and self.saved > self.end:
            raise OutOfTimeError


class Row:
    """What is done of a row, in ``steps.json`` of its folder, and how much time is left."""

    def __init__(self, folder: Path, minutes: float, seeds: int, params: Params) -> None:
        self.folder, self.seeds, self.params = folder, seeds, params
        self.end = time.monotonic() + 60 * minutes
        self.began = False  # something new in this call: however short, it gets on
        self.done: dict[str, Any] = {"params": params.model_dump(mode="json"), "seconds": {}}
        path = folder / "steps.json"
        if path.exists():
            done = json.loads(path.read_text(encoding="utf-8"))
            if done["params"] != self.done["params"]:
                raise StageError(f"{folder} has other parameters; delete it, or give another --out")
            self.done = done

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """What ``work`` gives; done once, also over several calls of the program."""
        if name not in self.done:
            if self.began and time.monotonic() > self.end:
                raise OutOfTimeError
            self.began, start = True, time.monotonic()
            try:
                self.done[name] = work()
            finally:
                seconds = self.done["seconds"]
                seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start
                write_json(self.folder / "steps.json", self.done)
        return self.done[name]

    def loop(self, name: str, loop: Callable[[Worker], None], **sections: Any) -> State:
        """Run a stage's loop as its only worker; the state that it ends with."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        state_file = StateFile(self.folder / f"{name}.pt")
        params = self.params.model_copy(update=sections)
        worker = TimedWorker(params, name, state_file, self.folder, device=device)
        worker = with_choices(worker)
        use_precision(worker)
        worker.end, worker.saved = self.end, time.monotonic()
        loop(worker)
        state = state_file.load()
        assert state is not None
        return state

    # -- the steps: what the stages do around their loops ------------------------------------------

    def prepare(self) -> dict[str, int]:
        """Splits, as prepare_data makes them."""
        parts = split(self.params.data, *read_source(self.params.data))
        if any(isinstance(part, Files) for part in parts.values()):
            raise StageError(
                "the images are too many for the memory: they stay in their files, "
                "which a row does not read; allowed: a smaller data.image_size"
            )
        (self.folder / DATA).mkdir(parents=True, exist_ok=True)
        for name, part in parts.items():
            save_split(part, self.folder / DATA / f"{name}.safetensors")
        return {name: len(part) for name, part in parts.items()}

    def train(self) -> float:
        """The ANN; its test accuracy."""
        state = self.loop("train_ann", train_ann.train_loop)
        save_weights(state["best_network"], self.folder / ANN)
        return float(state["test"])

    def balance(self) -> dict[str, float]:
        """V of every layer."""
        state = self.loop("balance_thresholds", balance_thresholds.balance_loop)
        thresholds: dict[str, float] = state["thresholds"]
        layers = [
            {"layer": name, "threshold": value, "balanced": name not in state["kept"]}
            for name, value in thresholds.items()
        ]
        write_json(self.folder / THRESHOLDS, {"layers": layers})
        save_balanced(state["balanced"], self.folder / BALANCED)
        return thresholds

    def convert(self) -> dict[str, Any]:
        """The converted network at the long and the reduced T."""
        state = self.loop("evaluate_converted", evaluate_converted.evaluate_loop)
        timesteps = self.params.stdb.first_timesteps
        write_json(self.folder / CONVERSION, {"timesteps": timesteps, "scale": state["scale"]})
        return {name: state[name] for name in ("scale", "long", "reduced")}

    def tune(self, seed: int) -> list[dict[str, Any]]:
        """The fine-tuned network of each T on the test split."""
        stdb_params = self.params.stdb.model_copy(update={"seed": seed})
        name = f"finetune_stdb-{seed}"
        tuned = self.loop(name, finetune_stdb.train_loop, stdb=stdb_params)["tuned"]
        return [{"timesteps": one["timesteps"], **one["test"]} for one in tuned]

    def run(self) -> str:
        """Everything, each step once; the table."""
        self.once("images", self.prepare)
        ann = self.once("train_ann", self.train)
        thresholds = self.once("balance_thresholds", self.balance)
        converted = self.once("evaluate_converted", self.convert)
        tuned = [self.once(f"stdb {seed}", partial(self.tune, seed)) for seed in range(self.seeds)]
        long, reduced = converted["long"]["accuracy"], converted["reduced"]["accuracy"]
        head = ["ANN, %", f"converted, T = {len(long)}", f"T = {len(reduced)}"]
        cells = [f"{100 * share:.2f}" for share in (ann, long[-1], reduced[-1])]
        for of in zip(*tuned, strict=True):  # one T, all seeds
            head.append(f"STDB, T = {of[0]['timesteps']}")
            final = [100 * one["accuracy"][-1] for one in of]
            spread = f" ± {stdev(final):.2f}" if len(final) > 1 else ""
            cells.append(f"{mean(final):.2f}{spread}")
        lines = [head, ["---:"] * len(head), cells]
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        seconds = ", ".join(f"{step} {value:.0f} s" for step, value in self.done["seconds"].items())
        about = f"{device}, torch {torch.__version__}, {self.seeds} seeds; {seconds}"
        text = "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", about])
        write_text(self.folder / "table.md", text + "\n")
        results = {"ann accuracy": ann, "thresholds": thresholds, **converted, "tuned": tuned}
        kept = {"seconds": self.done["seconds"], "params": self.done["params"], "device": device}
        write_json(self.folder / "results.json", results | kept)
        return text


def parameters(preset: Path, images: Path, assignments: list[str]) -> Params:
    """params.yaml with a preset and ``section.key=value`` on it, checked.

    Raises:
        ParamsError: a key or a value that is not allowed, or that one process cannot do.
    """
    values = read_yaml(ROOT / "params.yaml")
    merge(values, read_yaml(preset), str(preset))
    merge(values, {"data": {"source": "folder", "path": str(images.resolve())}}, "IMAGES")
    for assignment in assignments:
        path, _, value = assignment.partition("=")
        section, _, key = path.partition(".")
        merge(values, {section: {key: parse(value)}}, "--set")
    params = validate(values, Params, "the preset")
    if params.data.stream is True:
        raise ParamsError("data.stream is true; allowed here: auto, false")
    if params.cluster.workers not in ("auto", 1):
        raise ParamsError(f"cluster.workers is {params.cluster.workers}; allowed here: auto, 1")
    return params


def parse(text: str) -> Any:
    """A value as YAML has it."""
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).load(text)


def main(arguments: list[str]) -> int:
    """Read the preset, run, or go on; the exit status."""
    presets = sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("preset", choices=presets, metavar="PRESET")
    parser.add_argument("images", type=Path)
    parser.add_argument("--minutes", type=float, default=8, help="then stop, to go on later (8)")
    parser.add_argument("--seeds", type=int, default=3, help="fine-tunings of the one ANN (3)")
    parser.add_argument("--out", type=Path, help="folder (row-PRESET)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    options = parser.parse_args(arguments)
    if not options.images.exists():
        parser.error(f"{options.images} does not exist")
    if options.seeds < 1:
        parser.error(f"--seeds is {options.seeds}; allowed: 1 or more")
    os.environ.pop("DVC_ROOT", None)  # files are those of the row's folder
    folder = (options.out or Path(f"row-{options.preset}")).resolve()
    try:
        preset = ROOT / "presets" / f"{options.preset}.yaml"
        params = parameters(preset, options.images, options.set)
        folder.mkdir(parents=True, exist_ok=True)
        print(Row(folder, options.minutes, options.seeds, params).run())
    except OutOfTimeError:
        print("out of time; the same command goes on", flush=True)
        return UNFINISHED
    except (ParamsError, DataError, StageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
