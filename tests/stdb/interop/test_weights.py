"""Checkpoints of others: unwrapped where the names are the network's, else both sides' names."""

import pytest
import torch
from torch import nn

import stdb
from stdb import WeightsError, load_weights


class Pickled:
    """An object that no weights file may hold."""


def small():
    return stdb.build("vgg5", 1, 8, 10, width=0.1, hidden=16)


def normalised():
    return stdb.build("vgg5", 1, 8, 10, width=0.1, hidden=16, normalisation="batch")


def without_counts(state):
    """Batch norms of before PyTorch 0.4.1."""
    return {n: value for n, value in state.items() if not n.endswith("num_batches_tracked")}


def prefixed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


WRAPPED = {
    "DataParallel": lambda s: prefixed(s, "module."),
    "torch.compile": lambda s: prefixed(s, "_orig_mod."),
    "compiled in DataParallel": lambda s: prefixed(s, "module._orig_mod."),
    "Lightning": lambda s: {"state_dict": prefixed(s, "model."), "epoch": 3, "loops": {}},
    "net and accuracy": lambda s: {"net": s, "acc": 0.9, "epoch": 7},
    "model": lambda s: {"model": s},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}},
    "weights": lambda s: {"weights": s},
    "ema beside another": lambda s: {"model": {"other": torch.zeros(1)}, "ema": s},
    "two containers": lambda s: {"model": {"state_dict": prefixed(s, "net.")}},
    "an averaged model": lambda s: {"n_averaged": torch.tensor(3), **prefixed(s, "module.")},
    "half precision": lambda s: {n: v.half() if v.is_floating_point() else v for n, v in s.items()},
    "an old file": without_counts,
    "an old file of DataParallel": lambda s: {"state_dict": prefixed(without_counts(s), "module.")},
    "a parameter": lambda s: {n: nn.Parameter(v, requires_grad=False) for n, v in s.items()},
}


@pytest.mark.parametrize("make", [small, normalised])
@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_are_taken_off(tmp_path, name, make):
    """The values are those of the file."""
    good = {
        k: v.half().float() if v.is_floating_point() else v for k, v in make().state_dict().items()
    }
    torch.save(WRAPPED[name](good), tmp_path / "weights.pt")
    network = make()
    load_weights(network, tmp_path / "weights.pt")
    for key, value in network.state_dict().items():
        assert torch.equal(value, good[key])


def test_a_networks_own_prefix_is_kept(tmp_path):
    """A network may be called ``model`` itself."""
    network = nn.ModuleDict({"model": small()})
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    load_weights(network, tmp_path / "weights.pt")


def test_a_mismatch_shows_the_names_of_both_sides(tmp_path):
    """How many there are, and the first few."""
    path = tmp_path / "weights.pt"
    torch.save(prefixed(small().state_dict(), "backbone."), path)
    with pytest.raises(WeightsError) as caught:
        load_weights(small(), path)
    said = str(caught.value)
    assert "the file has 6 tensors (backbone.conv1.weight, backbone.conv2.weight, " in said
    assert "the network has 6 tensors (conv1.weight, conv2.weight, " in said


def test_pickled_objects_are_refused_with_our_words(tmp_path):
    """Torch's advice would be to trust the file."""
    path = tmp_path / "weights.pt"
    torch.save({"conv1.weight": Pickled()}, path)
    with pytest.raises(WeightsError) as caught:
        load_weights(small(), path)
    assert "holds Python objects, which are not loaded" in str(caught.value)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.full((6, 1, 3, 3), float("nan")), "conv1.weight has 54 values that are not finite"),
        (torch.zeros(6, 1, 3, 3, dtype=torch.complex64), "conv1.weight is torch.complex64"),
        (torch.zeros(6, 1, 3, 3, dtype=torch.int8), "conv1.weight is torch.int8"),
        (torch.zeros(6, 1, 3, 3).to_sparse(), "conv1.weight is torch.float32, torch.sparse_coo"),
    ],
)
def test_what_are_no_weights_is_refused_by_name(tmp_path, tensor, message):
    """And the network stays as it is."""
    network = small()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    torch.save({**before, "conv1.weight": tensor}, tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match=message):
        load_weights(network, tmp_path / "weights.pt")
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
