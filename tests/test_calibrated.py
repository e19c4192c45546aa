"""A trained network, calibrated for several T: what is kept of it."""

import json

import pytest

import benchmarks.calibrated
import stdb
from benchmarks.calibrated import main
from pipeline.files import METRICS
from pipeline.learning.calibration import calibrate
from pipeline.learning.networks import build_ann, load_weights
from tests.pipeline.support import DIRECT, MSE, NETWORK, PARAMS, make_files, worker


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A trained network's files, and parameters that calibrate it for few steps."""
    _, parts = make_files(tmp_path)
    sections = {"network": NETWORK, "stdb": DIRECT, "balance_thresholds": MSE}
    monkeypatch.setattr(
        benchmarks.calibrated, "load_params", lambda: PARAMS.model_copy(update=sections)
    )
    monkeypatch.chdir(tmp_path)
    METRICS.mkdir()
    split = {"images": 10, "sha256": "0" * 64}
    data = {"classes": list("0123456789"), "shape": [1, 8, 8]}
    data |= dict.fromkeys(("train", "validation", "test"), split)
    (METRICS / "data.json").write_text(json.dumps(data))
    ann = {"accuracy": {"validation": 0.2, "test": 0.1}, "epoch": 0, "loss": {"train": 1.0}}
    (METRICS / "train_ann.json").write_text(json.dumps(ann))
    return tmp_path, parts


def test_a_network_is_measured_at_each_t(here, capsys):
    """Each calibrated for its own T, as the stage does; a curve that ends with its accuracy."""
    folder, parts = here
    assert main(["add", "own", "--timesteps", "3", "5"]) == 0
    assert "T = 5: test " in capsys.readouterr().out
    found = json.loads((folder / "results/own.json").read_text())
    assert found["ann"]["test"] == 0.1
    assert set(found["ann"]["levels"]) == {"3", "5"}
    assert [one["timesteps"] for one in found["networks"]] == [3, 5]
    for one in found["networks"]:
        params = DIRECT.model_copy(update={"timesteps": one["timesteps"]})
        alone = worker(folder, params, balance_thresholds=MSE)
        ann = build_ann(NETWORK, parts["train"])
        load_weights(ann, folder / "models/ann.safetensors")
        snn = calibrate(alone, ann, parts["train"]).snn.eval()
        test = parts["test"]
        shares = [
            (logits.argmax(1) == test.labels).double().mean().item()
            for logits in snn.logits_over_time(test.pixels(), one["timesteps"], sample_ids=test.ids)
        ]
        assert one["over_time"] == pytest.approx(shares, abs=1e-12)
        assert one["test"] == one["over_time"][-1]
        assert one["latency_ms"] > 0
        assert stdb.load(f"models/calibrated/t{one['timesteps']}.safetensors")[0].has_units
    capsys.readouterr()
    assert main(["add", "own", "--timesteps", "4", "3"]) == 0
    assert "T = 3" not in capsys.readouterr().out
    more = json.loads((folder / "results/own.json").read_text())
    assert [one["timesteps"] for one in more["networks"]] == [3, 4, 5]
    assert more["networks"][::2] == found["networks"]
    assert set(more["ann"]["levels"]) == {"3", "4", "5"}
    assert main(["plot", "curves.png", "own"]) == 0
    assert (folder / "curves.png").stat().st_size > 5000


def test_what_is_missing_is_said(here, capsys):
    """Images, before anything is computed; a name."""
    (METRICS / "data.json").unlink()
    assert main(["add", "own"]) == 1
    assert "python -m pipeline.prepare_data reads them" in capsys.readouterr().err
    assert main(["add", "Two words"]) == 1
    assert "NAME is 'Two words'; allowed: " in capsys.readouterr().err
