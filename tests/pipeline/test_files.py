"""Files between stages: weights, thresholds, outs; wrong ones are refused, old ones are kept."""

import json
import os
import pickle
import stat
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import stdb
from pipeline.errors import StageError
from pipeline.files import check_outs, write_json, writing
from pipeline.learning.fit import learning_rate, order
from pipeline.learning.networks import load_thresholds, load_weights, save_weights

ROOT = Path(__file__).parents[2]


def small(width=0.1):
    return stdb.build("vgg5", 1, 8, 10, width=width, hidden=8)


def test_weights_survive_their_file(tmp_path):
    """What is saved is what is loaded, from safetensors and from torch.save."""
    one, two, three = small(), small(), small()
    save_weights(one.state_dict(), tmp_path / "a.safetensors", network={"x": 1})
    load_weights(two, tmp_path / "a.safetensors")
    torch.save(one.state_dict(), tmp_path / "a.pt")
    load_weights(three, tmp_path / "a.pt")
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])
        assert torch.equal(value, three.state_dict()[name])


def test_weights_of_another_network_are_refused(tmp_path):
    """The message names layer and shapes; the network is unchanged."""
    network = small()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    save_weights(small(0.2).state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(
        stdb.WeightsError, match=r"conv1\.weight is \(13, 1, 3, 3\), the network's is \(6"
    ):
        load_weights(network, tmp_path / "a.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(stdb.WeightsError, match=r"conv1\.weight is missing"):
        load_weights(network, tmp_path / "b.safetensors")
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


class Payload:
    """Pickles to a call."""

    def __reduce__(self):
        return (Path.touch, (Path("touched-by-pickle"),))


def test_a_pickled_or_broken_weights_file_is_refused(tmp_path, monkeypatch):
    """No code of a file runs."""
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Payload()}, "a.pt")
    Path("b.pt").write_bytes(pickle.dumps(Payload()))
    Path("c.safetensors").write_bytes(b"broken")
    for name in ("a.pt", "b.pt", "c.safetensors", "missing.pt"):
        with pytest.raises(stdb.WeightsError, match=name.replace(".", r"\.")):
            load_weights(small(), Path(name))
    assert not Path("touched-by-pickle").exists()


def test_thresholds_of_another_network_are_refused(tmp_path):
    """The message names the layers that do not fit; scaling refers to the balanced layers."""
    snn = stdb.convert(small(), stdb.PoissonEncoder())
    rows = [{"layer": n, "threshold": 2.0, "balanced": n != "fc2"} for n in snn.thresholds]
    path = tmp_path / "thresholds.json"
    path.write_text(json.dumps({"layers": rows}))
    load_thresholds(snn, path)
    snn.scale_thresholds(0.5)
    assert list(snn.thresholds.values()) == [1.0, 1.0, 1.0, 1.0, 2.0]
    for bad in ({"layers": rows[:-1]}, {"layers": [{"layer": "x"}]}, {}, []):
        path.write_text(json.dumps(bad))
        with pytest.raises(StageError, match=r"thresholds\.json"):
            load_thresholds(snn, path)
    path.write_text(json.dumps({"layers": rows[:-1]}))
    with pytest.raises(StageError, match=r"another network: missing \['fc2'\]"):
        load_thresholds(snn, path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """Nothing already made is lost, and nothing half-made is left."""
    path = tmp_path / "out.txt"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError), writing(path) as temporary:
        fail(temporary)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.txt"]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: save_file({"w": torch.zeros(100_000)}, path),
        lambda path: torch.save({"w": torch.zeros(100_000)}, path),
        lambda path: path.write_text("x" * 400_000),
    ],
    ids=["safetensors", "torch", "text"],
)
def test_a_full_disk_is_named(tmp_path, full_disk, write):
    """With the file, whoever writes; the old one stays, and nothing half-made."""
    path = tmp_path / "out"
    path.write_text("old")
    named = pytest.raises(StageError, match=r"out cannot be written: ")
    with full_disk(), named, writing(path) as temporary:
        write(temporary)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_new_file_has_the_mode_of_new_files(tmp_path):
    """By the umask; safetensors would let nobody else read it."""
    before = os.umask(0o027)
    try:
        save_weights(small().state_dict(), tmp_path / "a.safetensors")
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path


def test_outs_that_cannot_be_written_are_found_before_the_work(tmp_path):
    """A file where a folder has to be; no room."""
    (tmp_path / "models").write_text("in the way")
    with pytest.raises(StageError, match=r"models/ann\.safetensors cannot be written"):
        check_outs([tmp_path / "models" / "ann.safetensors"])


def test_no_room_is_found_before_the_work(tmp_path, monkeypatch):
    """The message says how much is free and needed."""
    monkeypatch.setattr("pipeline.files.ROOM", 2**80)
    with pytest.raises(StageError, match=r"no room for .*out: \d+ MiB free"):
        check_outs([tmp_path / "out"])


def test_an_epoch_sees_every_image_at_most_once_and_depends_on_seed_and_epoch():
    """Full global batches of a permutation."""
    batches = order(50, 16, seed=0, epoch=1)
    assert [len(batch) for batch in batches] == [16, 16, 16]
    assert len(set(torch.cat(batches).tolist())) == 48
    assert torch.equal(batches[0], order(50, 16, 0, 1)[0])
    assert not torch.equal(batches[0], order(50, 16, 0, 2)[0])
    assert not torch.equal(batches[0], order(50, 16, 1, 1)[0])
    assert len(order(5, 16, 0, 1)[0]) == 5


def test_the_learning_rate_falls_at_its_milestones():
    """÷10 at 60, 80 and 90 % of the epochs."""
    from pipeline.params import load_params

    params = load_params(ROOT / "params.yaml").train_ann.model_copy(update={"epochs": 10})
    rates = [learning_rate(params, epoch) / params.learning_rate for epoch in range(1, 11)]
    assert rates == pytest.approx([1] * 6 + [0.1] * 2 + [0.01, 0.001])


def test_every_stage_is_run_by_its_name():
    """dvc.yaml's commands are the verbs on top of pipeline/."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for name, stage in stages.items():
        assert stage["cmd"] == f"python -m pipeline.{name}"


def test_no_stage_tracks_where_it_runs():
    """The cluster section changes no result, so it must not invalidate the cache."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    tracked = {entry.split(".")[0] for stage in stages.values() for entry in stage["params"]}
    assert tracked == set(yaml.safe_load((ROOT / "params.yaml").read_text())) - {"cluster"}
