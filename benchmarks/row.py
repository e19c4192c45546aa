"""A row of the paper's Table 1, from images to the table, with the engine alone.

    python -m benchmarks.row vgg16-cifar10 IMAGES [--minutes 8] [--seeds 3] [--set stdb.epochs=2 …]

For a machine with a GPU and little time: torch, torchvision and what the engine needs; no Ray, no
MLflow, no DVC. It stops after so many minutes with exit status 3; the same command goes on where it
was, within an epoch, too. IMAGES is a folder or archive of train/CLASS/… and test/CLASS/…, or the
folder with torchvision's cifar-10-batches-py. One ANN, ``--seeds`` fine-tunings of it.
Out, in OUT (row-PRESET): table.md, results.json with accuracies by T, spikes and seconds.
"""

import argparse
import json
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms.functional import pil_to_tensor

import stdb
from pipeline.data import Split, augment, normalise
from stdb import logit_scale, residual_layers, scaled_losses

ROOT = Path(__file__).parents[1]
SAVE_EVERY, SAY_EVERY = 60.0, 20.0  # seconds
BATCH = 256  # images presented at once where nothing is learned
UNFINISHED = 3  # exit status: the same command goes on


class OutOfTimeError(Exception):
    """The minutes are over; all is saved."""


class Row:
    """What is done of a row, on disk, and how much time is left."""

    def __init__(self, folder: Path, minutes: float, seeds: int, params: dict[str, Any]) -> None:
        self.folder, self.seeds, self.params = folder, seeds, params
        self.start = self.counted = self.saved = self.said = time.monotonic()
        self.began = False  # something new in this call: however short, it gets on
        self.end = self.start + 60 * minutes
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.state: dict[str, Any] = {"params": params, "seconds": {}}
        if (folder / "state.pt").exists():
            self.state = torch.load(
                folder / "state.pt", map_location=self.device, weights_only=True
            )
        if self.state["params"] != params:
            raise SystemExit(f"{folder} has other parameters; delete it, or give another --out")

    def save(self) -> None:
        """Write what is done, whole or not at all."""
        temporary = self.folder / "state.pt.new"
        torch.save(self.state, temporary)
        os.replace(temporary, self.folder / "state.pt")
        self.saved = time.monotonic()

    def count(self, phase: str) -> None:
        """Add the time since the last call to a phase's."""
        now = time.monotonic()
        seconds = self.state["seconds"]
        seconds[phase] = seconds.get(phase, 0.0) + now - self.counted
        self.counted = now

    def once(self, name: str, work: Callable[[], Any], phase: str = "") -> Any:
        """What ``work`` gives; done once, also over several calls of the program."""
        if name not in self.state:
            if self.began and time.monotonic() > self.end:
                raise OutOfTimeError
            self.began = True
            found = work()
            self.state[name] = found
            self.count(phase or name)
            self.save()
        return self.state[name]

    def say(self, text: str) -> None:
        """A line, with the time since the start."""
        self.said = time.monotonic()
        print(f"{self.said - self.start:5.0f} s  {text}", flush=True)

    # -- training ------------------------------------------------------------------------------

    def train(
        self,
        phase: str,
        model: nn.Module,
        present: Callable[[Tensor, Tensor, int], Tensor],
        optimizer: torch.optim.Optimizer,
        train: Split,
        validate: Callable[[], float],
        params: dict[str, Any],
        seed: int,
    ) -> dict[str, Tensor]:
        """The weights of the epoch that is best on validation; goes on within an epoch."""
        network = model.net if isinstance(model, stdb.SpikingNetwork) else model
        at = self.state.setdefault(f"{phase} so far", {"epoch": 1, "step": 0, "best": -1.0})
        if "network" in at:
            network.load_state_dict(at["network"])
            optimizer.load_state_dict(at["optimizer"])
        for epoch in range(at["epoch"], params["epochs"] + 1):
            passed = sum(epoch - 1 >= round(m * params["epochs"]) for m in params["milestones"])
            for group in optimizer.param_groups:
                group["lr"] = params["learning_rate"] / params["decay"] ** passed
            model.train()
            generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
            batches = torch.randperm(len(train), generator=generator).split(params["batch_size"])
            for step in range(at["step"], len(batches)):
                torch.manual_seed((seed * 1009 + epoch) * 1_000_003 + step)  # of an ANN's dropout
                batch = train.take(batches[step].to(self.device))
                images = batch.images
                if params["augment"]:
                    images = augment(images, batch.ids, seed, epoch)
                loss = F.cross_entropy(present(normalise(images), batch.ids, epoch), batch.labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                if isinstance(model, stdb.SpikingNetwork):
                    model.constrain()
                at |= {"epoch": epoch, "step": step + 1}
                self._keep(phase, at, network, optimizer, len(batches), float(loss.detach()))
            accuracy = validate()
            if accuracy > at["best"]:
                at["best"] = accuracy
                at["best_network"] = {k: v.clone() for k, v in network.state_dict().items()}
            at |= {"epoch": epoch + 1, "step": 0}
            self.say(f"{phase}: epoch {epoch}/{params['epochs']}, validation {accuracy:.2%}")
        del self.state[f"{phase} so far"]
        return at["best_network"]

    def _keep(
        self, phase: str, at: dict, network: nn.Module, optimizer: Any, steps: int, loss: float
    ) -> None:
        now = time.monotonic()
        if now - self.said > SAY_EVERY:
            self.say(f"{phase}: epoch {at['epoch']}, step {at['step']}/{steps}, loss {loss:.3f}")
        if now - self.saved > SAVE_EVERY or now > self.end:
            at |= {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
            self.count(phase)
            self.save()
        if now > self.end:
            raise OutOfTimeError


# -- data ------------------------------------------------------------------------------------------


def load(images: Path, cache: Path, fraction: float, device: torch.device) -> list[Split]:
    """Training, validation and test split; the same images whenever it is called."""
    if not cache.exists():
        with tempfile.TemporaryDirectory() as temporary:
            folder = images
            if images.is_file():
                folder = Path(temporary)
                with tarfile.open(images) as members:
                    members.extractall(folder, filter="data")
            found = [_read(folder, split) for split in ("train", "test")]
        torch.save(found, cache)
    (pixels, labels, classes), (test_pixels, test_labels, _) = torch.load(cache, weights_only=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out: list[Tensor] = []
    for label in range(len(classes)):  # equal by class
        of_class = order[labels[order] == label]
        held_out.append(of_class[: round(fraction * len(of_class))])
    validation = torch.cat(held_out).sort().values
    chosen = torch.ones(len(labels), dtype=torch.bool)
    chosen[validation] = False
    whole = Split(pixels, labels, torch.arange(len(labels)), classes)
    ids = torch.arange(len(labels), len(labels) + len(test_labels))
    test = Split(test_pixels, test_labels, ids, classes)
    return [
        s.to(device) for s in (whole.take(chosen.nonzero()[:, 0]), whole.take(validation), test)
    ]


def _read(folder: Path, split: str) -> tuple[Tensor, Tensor, list[str]]:
    if (folder / "cifar-10-batches-py").is_dir():
        data = CIFAR10(str(folder), train=split == "train")
        pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        return pixels, torch.tensor(data.targets), list(data.classes)
    files = ImageFolder(str(folder / split), pil_to_tensor)
    return torch.stack([image for image, _ in files]), torch.tensor(files.targets), files.classes


# -- the row ---------------------------------------------------------------------------------------


def parts(split: Split) -> Iterator[tuple[Tensor, Split]]:
    """A split in batches, normalised."""
    for index in torch.arange(len(split), device=split.labels.device).split(BATCH):
        batch = split.take(index)
        yield normalise(batch.images), batch


@torch.no_grad()
def accuracy_of(ann: nn.Module, split: Split) -> float:
    """Of an ANN."""
    ann.eval()
    right = sum(int((ann(x).argmax(1) == batch.labels).sum()) for x, batch in parts(split))
    return right / len(split)


@torch.no_grad()
def present(snn: stdb.SpikingNetwork, split: Split, timesteps: int) -> dict[str, Any]:
    """Accuracy after every step, spikes per neuron and energy by layer, losses by logit scale."""
    snn.eval()
    right = torch.zeros(timesteps, dtype=torch.int64, device=split.labels.device)
    losses = torch.zeros((), dtype=torch.float64, device=split.labels.device)
    with stdb.record_spikes(snn) as statistics:
        for x, batch in parts(split):
            logits = snn.logits_over_time(x, timesteps, sample_ids=batch.ids)
            right += (logits.argmax(2) == batch.labels).sum(1)
            losses = losses + scaled_losses(logits[-1], batch.labels)
    return {
        "accuracy": (right.double() / len(split)).tolist(),
        "spikes": statistics.spikes_per_neuron(),
        "energy_pj": statistics.energy(),
        "logit_scale": logit_scale(losses),
    }


def learn_ann(row: Row, ann: nn.Module, train: Split, validation: Split) -> dict[str, Tensor]:
    """SGD under the constraints of conversion (§2.3)."""
    params = row.params["train_ann"]
    ann.to(memory_format=torch.channels_last)

    def forward(images: Tensor, ids: Tensor, epoch: int) -> Tensor:
        bf16 = params.get("precision") == "bf16"
        with torch.autocast(row.device.type, torch.bfloat16, enabled=bf16):
            return ann(images.contiguous(memory_format=torch.channels_last)).float()

    optimizer = torch.optim.SGD(
        ann.parameters(),
        lr=params["learning_rate"],
        momentum=params["momentum"],
        weight_decay=params["weight_decay"],
    )
    check = partial(accuracy_of, ann, validation)
    return row.train("ann", ann, forward, optimizer, train, check, params, 0)


def convert(row: Row, ann: nn.Module, seed: int) -> stdb.SpikingNetwork:
    """The ANN as a spiking network, as the preset's section stdb says."""
    params = row.params["stdb"]
    if params["dropout"] is not None:
        for module in ann.modules():
            if isinstance(module, nn.Dropout):
                module.p = params["dropout"]
    encoder = stdb.PoissonEncoder(seed) if params["encoder"] == "poisson" else stdb.DirectEncoder()
    surrogate = stdb.SURROGATES[params["surrogate"]](
        params["alpha"], params["beta"], params["over_threshold"]
    )
    return stdb.convert(
        ann,
        encoder,
        surrogate,
        params["leak"],
        learn_thresholds=params["learn_thresholds"],
        learn_leaks=params["learn_leaks"],
        dropout_seed=seed,
    ).to(row.device)


def balance(row: Row, snn: stdb.SpikingNetwork, train: Split) -> dict[str, float]:
    """Algorithm 1 on calibration images."""
    params = row.params["balance_thresholds"]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    some = train.take(order[: params["images"]].to(row.device))
    return stdb.balance_thresholds(
        snn,
        normalise(some.images),
        params["timesteps"],
        batch_size=params["batch_size"],
        percentile=params["percentile"],
        residual_blocks=params["residual_blocks"],
        sample_ids=some.ids,
        progress=lambda layer, value: row.say(f"balance: {layer} V = {value:.4f}"),
    )


def fine_tune(
    row: Row, snn: stdb.SpikingNetwork, train: Split, validation: Split, seed: int
) -> dict[str, Tensor]:
    """STDB at the reduced T (Algorithms 2 and 3)."""
    params = row.params["stdb"]

    def forward(images: Tensor, ids: Tensor, epoch: int) -> Tensor:
        return snn(images, params["timesteps"], sample_ids=ids, epoch=epoch)

    def check() -> float:
        return present(snn, validation, params["timesteps"])["accuracy"][-1]

    optimizer = torch.optim.Adam(
        [p for p in snn.parameters() if p.requires_grad],
        lr=params["learning_rate"],
        weight_decay=params["weight_decay"],
        amsgrad=True,
        fused=True,
    )
    name = f"stdb seed {seed}"
    return row.train(name, snn, forward, optimizer, train, check, params, seed)


def run(row: Row, images: Path) -> None:
    """Everything, each step once."""
    p = row.params
    timesteps, long = p["stdb"]["timesteps"], p["evaluate_converted"]["timesteps"]
    train, validation, test = load(
        images, row.folder / "data.pt", p["data"]["validation_fraction"], row.device
    )
    if limit := p["data"].get("train_limit"):
        train = train.take(torch.arange(limit, device=row.device))
    row.say(f"{len(train)} training, {len(validation)} validation, {len(test)} test images")
    torch.manual_seed(0)
    network = p["network"] | {
        "in_channels": test.images.shape[1],
        "image_size": test.images.shape[2],
        "num_classes": len(test.classes),
    }
    ann = stdb.build_network(**network).to(row.device)
    ann.load_state_dict(row.once("ann", partial(learn_ann, row, ann, train, validation)))
    ann.to(memory_format=torch.contiguous_format)
    row.once("ann accuracy", partial(accuracy_of, ann, test), "evaluation")
    snn = convert(row, ann, 0)
    thresholds = row.once("thresholds", partial(balance, row, snn, train))
    kept = [] if p["balance_thresholds"]["residual_blocks"] else residual_layers(snn)
    balanced = [name for name in thresholds if name not in kept]
    snn.set_thresholds(thresholds, balanced=balanced)
    scales: dict[float, float] = {}
    for scale in p["evaluate_converted"]["scales"]:
        snn.scale_thresholds(scale)
        look = partial(present, snn, validation, timesteps)
        found = row.once(f"scale {scale}", look, "evaluation")
        scales[scale] = found["accuracy"][-1]
    best = max(scales, key=lambda scale: scales[scale])
    row.say(f"converted, T = {timesteps}: validation {scales[best]:.2%} at V × {best}")
    snn.scale_thresholds(1.0)
    row.once("converted", partial(present, snn, test, long), "evaluation")
    snn.scale_thresholds(best)
    row.once("reduced", partial(present, snn, test, timesteps), "evaluation")
    row.state["best scale"] = best
    for seed in range(row.seeds):
        tuned = convert(row, ann, seed)
        tuned.set_thresholds(thresholds, balanced=balanced)
        tuned.scale_thresholds(best)
        tuned.scale_output(row.state[f"scale {best}"]["logit_scale"])
        work = partial(fine_tune, row, tuned, train, validation, seed)
        tuned.net.load_state_dict(row.once(f"stdb seed {seed}", work))
        row.once(f"tuned {seed}", partial(present, tuned, test, timesteps), "evaluation")
    write(row, timesteps, long)


def write(row: Row, timesteps: int, long: int) -> None:
    """The table, and all figures behind it."""
    state = row.state
    tuned = [state[f"tuned {seed}"] for seed in range(row.seeds)]
    final = [100 * found["accuracy"][-1] for found in tuned]
    spread = f" ± {stdev(final):.2f}" if len(final) > 1 else ""
    cells = [
        f"{100 * state['ann accuracy']:.2f}",
        f"{100 * state['converted']['accuracy'][-1]:.2f}",
        f"{100 * state['reduced']['accuracy'][-1]:.2f}",
        f"{mean(final):.2f}{spread}",
    ]
    head = ["ANN, %", f"converted, T = {long}", f"T = {timesteps}", "STDB"]
    seconds = ", ".join(f"{phase} {value:.0f} s" for phase, value in state["seconds"].items())
    name = torch.cuda.get_device_name() if row.device.type == "cuda" else "CPU"
    text = "\n".join(
        [
            *(f"| {' | '.join(line)} |" for line in (head, ["---:"] * len(head), cells)),
            f"\n{name}, torch {torch.__version__}, {row.seeds} seeds; {seconds}",
        ]
    )
    (row.folder / "table.md").write_text(text + "\n")
    kept = ("ann accuracy", "thresholds", "best scale", "converted", "reduced", "seconds", "params")
    results = {name: state[name] for name in kept} | {"tuned": tuned, "device": name}
    (row.folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(text)


def override(params: dict[str, Any], assignments: list[str]) -> None:
    """``section.key=value`` into the parameters; values as YAML has them."""
    for assignment in assignments:
        path, _, value = assignment.partition("=")
        section, _, key = path.partition(".")
        if key not in params.get(section, {}):
            raise SystemExit(f"{path} is not in the preset; allowed: section.key of it")
        params[section][key] = yaml.safe_load(value)


def main() -> int:
    """Read the preset, run, or go on; the exit status."""
    presets = sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("preset", choices=presets, metavar="PRESET")
    parser.add_argument("images", type=Path)
    parser.add_argument("--minutes", type=float, default=8, help="then stop, to go on later (8)")
    parser.add_argument("--seeds", type=int, default=3, help="fine-tunings of the one ANN (3)")
    parser.add_argument("--out", type=Path, help="folder (row-PRESET)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    options = parser.parse_args()
    if not options.images.exists():
        parser.error(f"{options.images} does not exist")
    params = yaml.safe_load((ROOT / "presets" / f"{options.preset}.yaml").read_text())
    override(params, options.set)
    folder = options.out or Path(f"row-{options.preset}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        run(Row(folder, options.minutes, options.seeds, params), options.images)
    except OutOfTimeError:
        print("out of time; the same command goes on", flush=True)
        return UNFINISHED
    return 0


if __name__ == "__main__":
    sys.exit(main())
