"""Two workers with the GPU's code learn what one does: DDP over gloo, in Triton's interpreter.

With TRITON_INTERPRET=1: ``test_gpu.py`` runs this file so.
"""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import stdb
from stdb import kernels
from stdb.kernels import gpu

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="test_gpu.py runs it in the interpreter"
)
SURROGATES = [stdb.STDB(), stdb.Rectangle(0.3, 1.0, True)]


def network(surrogate):
    """With pooling, dropout and all that can learn."""
    torch.manual_seed(0)
    ann = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.ReLU(), nn.AvgPool2d(2), nn.Dropout(0.25),
        nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(192, 4, bias=False),
    )  # fmt: skip
    options = {"learn_thresholds": True, "learn_leaks": True}
    snn = stdb.convert(ann, stdb.PoissonEncoder(3), surrogate, **options)
    snn.set_thresholds({"0": 0.5, "4": 0.3})
    return snn


def work(rank: int, world: int, folder) -> None:
    """The gradients of this worker's share of the images, averaged over the workers."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    kernels.backend = lambda _: gpu
    kernels.works_on_bits = lambda _: False
    gpu.available = lambda _: True
    x = torch.rand(4, 2, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    labels = torch.arange(4)
    own = torch.arange(4).chunk(world)[rank]
    found = []
    for surrogate in SURROGATES:
        snn = network(surrogate)
        snn.chunk = 5
        model = DistributedDataParallel(snn)
        F.cross_entropy(model(x[own], 12, sample_ids=own), labels[own]).backward()
        found.append({name: p.grad for name, p in snn.named_parameters() if p.requires_grad})
    torch.save(found, folder / f"{world}-{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_learn_what_one_does(tmp_path):
    """Dropout, pooling, Poisson input, V and λ that learn, in chunks: the same to rounding."""
    for world in (1, 2):
        torch.multiprocessing.spawn(work, (world, tmp_path), world)
    one, *both = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    for ours in both:
        for of_two, of_one in zip(ours, one, strict=True):
            assert of_two.keys() == of_one.keys()
            assert any("threshold" in name for name in of_one)
            for name, grad in of_one.items():
                assert "leak" in name or grad.abs().max() > 0, name
                torch.testing.assert_close(of_two[name], grad, rtol=1e-4, atol=1e-6)
