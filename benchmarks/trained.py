"""Inference of a trained VGG5: with events, and in the dense form, at its real spike density.

    python -m benchmarks.trained IMAGES.tar.gz [--images 10000] [--epochs 5] [--timesteps 75]

IMAGES is an archive of train/CLASS/… and test/CLASS/… images, 32×32, such as CIFAR-10. A VGG5
learns some of them for a few epochs and is converted; thresholds are balanced on training images at
T, and scaled by 1, 0.7 (the authors' for T ≈ 100) and 0.5. Says accuracies and what share of each
layer's neurons spikes in a step; times both forms, taking turns, and adds the medians to
results.json.
"""

import argparse
import json
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

import stdb
from benchmarks.run import FOLDER, machine, write

SCALES = [1.0, 0.7, 0.5]
TESTED, BATCH, ROUNDS = 500, 32, 5

Images = tuple[Tensor, Tensor]  # (N, 3, 32, 32) in [−1, 1], labels


def read(archive: Path, images: int) -> tuple[Images, Images]:
    """Some training and test images, drawn without looking at classes."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as members:
            members.extractall(folder, filter="data")
        splits = []
        for split, count in (("train", images), ("test", TESTED)):
            data = ImageFolder(f"{folder}/{split}", pil_to_tensor)
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
            pairs = [data[k] for k in order[:count].tolist()]
            pixels = torch.stack([image for image, _ in pairs]).float() / 127.5 - 1
            splits.append((pixels, torch.tensor([label for _, label in pairs])))
    return splits[0], splits[1]


def learn(train: Images, epochs: int) -> nn.Module:
    """A VGG5 after some epochs of SGD."""
    torch.manual_seed(0)
    ann = stdb.build("vgg5", 3, 32, int(train[1].max()) + 1)
    optimizer = torch.optim.SGD(ann.parameters(), 0.03, 0.9, weight_decay=5e-4, nesterov=True)
    steps = len(train[0]) // 64
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.03, total_steps=epochs * steps + 1)
    for epoch in range(1, epochs + 1):
        start = time.monotonic()
        for batch in torch.randperm(len(train[0]))[: steps * 64].split(64):
            x = train[0][batch]
            x = torch.where((torch.rand(64) < 0.5)[:, None, None, None], x.flip(3), x)
            loss = F.cross_entropy(ann(x), train[1][batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
        taken = time.monotonic() - start
        print(f"epoch {epoch}/{epochs}: loss {float(loss):.2f}, {taken:.0f} s", flush=True)
    return ann.eval()


@torch.no_grad()
def main() -> None:
    """Train, convert, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--images", type=int, default=10_000, help="of the training split")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--timesteps", type=int, default=75)
    options = parser.parse_args()
    train, (x, y) = read(options.archive, options.images)
    with torch.enable_grad():
        ann = learn(train, options.epochs)
    right = torch.cat([ann(part).argmax(1) for part in x.split(100)]) == y
    print(f"ANN: {right.float().mean():.1%} of {len(y)} test images")
    snn = stdb.convert(ann, stdb.PoissonEncoder(0)).eval()
    stdb.balance_thresholds(snn, train[0][:64], options.timesteps)
    path = FOLDER / "results.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    for scale in SCALES:
        snn.scale_thresholds(scale)
        with stdb.record_spikes(snn) as statistics:
            logits = torch.cat([snn(part, options.timesteps) for part in x.split(100)])
        accuracy = (logits.argmax(1) == y).float().mean().item()
        share = {n: s / options.timesteps for n, s in statistics.spikes_per_neuron().items()}
        seconds: dict[str, list[float]] = {"stdb": [], "dense": []}
        for _ in range(1 + ROUNDS):
            for form, found in seconds.items():
                snn.events = None if form == "stdb" else "never"
                start = time.perf_counter()
                snn(x[:BATCH], options.timesteps)
                found.append((time.perf_counter() - start) / BATCH)
        snn.events = None
        times = {form: median(found[1:]) for form, found in seconds.items()}
        ratio = times["dense"] / times["stdb"]
        print(
            f"V × {scale}: {accuracy:.1%}; spiking "
            + ", ".join(f"{name} {value:.1%}" for name, value in share.items())
            + f"; {1e3 * times['stdb']:.0f} ms an image, dense {1e3 * times['dense']:.0f}, "
            f"{ratio:.2f} times",
            flush=True,
        )
        name = f"trained vgg5 T={options.timesteps}, V × {scale}"
        rows = [row for row in rows if row["workload"] != name]
        rows += [
            {
                "workload": name,
                "phase": "infer",
                "contender": form,
                "batch": BATCH,
                "rounds": ROUNDS,
                "seconds": times[form],
                "ratio_to_stdb": times[form] / times["stdb"],
                "accuracy": accuracy,
                "spiking": share,
                "machine": machine(),
            }
            for form in seconds
        ]
    write(rows)


if __name__ == "__main__":
    main()
