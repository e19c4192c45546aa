"""What it takes to read and decode an image, beside what it takes to learn from it.

    python -m benchmarks.inputs

Images of CIFAR's size and of ImageNet's, as JPEG files that one process reads ahead
(``data.stream``), and in memory; and a training step of a small network at few time steps, the
hardest case for an input. Prints a JSON line for each size: seconds per image.
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import stdb
from benchmarks.workloads import images, labels
from pipeline.data import Files, Samples, Split

COUNT, BATCH, TIMESTEPS = 512, 32, 10
SIZES = {  # what images are brought to, width and height of their files
    "vgg5 T=10 32×32": (32, 32, 32),
    "vgg5 T=10 224×224": (224, 500, 375),
}


def pictures(height: int, width: int) -> Tensor:
    """Some smooth pictures with noise, which compress as photographs do."""
    smooth = torch.nn.functional.interpolate(images(16), (height, width), mode="bilinear")
    noise = torch.randn(smooth.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    return ((smooth + noise).clamp(-1, 1) * 127.5 + 127.5).to(torch.uint8)


def seconds(split: Samples) -> float:
    """Of an image that is streamed, normalised."""
    batches = list(torch.arange(len(split)).split(BATCH))
    start = time.perf_counter()
    for batch in split.stream(batches, torch.device("cpu")):
        batch.pixels()
    return (time.perf_counter() - start) / len(split)


def training(size: int) -> float:
    """Seconds per image of a step of STDB, the smaller of two."""
    torch.manual_seed(0)
    snn = stdb.convert(
        stdb.build("vgg5", 3, size, 10, hidden=64), stdb.PoissonEncoder(0), stdb.STDB(0.3, 0.01)
    )
    count = BATCH * 32 // size
    x = torch.nn.functional.interpolate(images(count), size, mode="bilinear")
    stdb.balance_thresholds(snn, x[:2], TIMESTEPS, percentile=95)
    snn.train()
    took = []
    for _ in range(2):
        start = time.perf_counter()
        torch.nn.functional.cross_entropy(snn(x, TIMESTEPS), labels(count)).backward()
        took.append((time.perf_counter() - start) / count)
    return min(took)


def main() -> None:
    """Measure both sizes."""
    for name, (size, width, height) in SIZES.items():
        made = pictures(height, width)
        with tempfile.TemporaryDirectory() as folder:
            names = []
            for k in range(COUNT):
                names.append(str(Path(folder) / f"{k}.jpg"))
                pixels = made[k % len(made)].permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(names[-1], quality=90)
            own = torch.zeros(COUNT, dtype=torch.int64), torch.arange(COUNT), ["a"]
            files = Files(np.array(names), *own, (3, size, size), readers=1)
            memory = Split(files.take(torch.arange(COUNT)).images, *own)
            found = {"files": seconds(files), "memory": seconds(memory)}
        found["stdb"] = training(size)
        print(json.dumps({"workload": name, "batch": BATCH} | found), flush=True)


if __name__ == "__main__":
    main()
