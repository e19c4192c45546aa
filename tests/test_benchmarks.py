"""The benchmarks run, with every contender; a row of Table 1 goes on where it was stopped."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import stdb
from benchmarks import at_scale, gpu, row

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.peer
def test_every_contender_runs():
    """A tiny network; times are not looked at."""
    pytest.importorskip("snntorch", reason="peers are missing: make setup-bench")
    pytest.importorskip("spikingjelly", reason="peers are missing: make setup-bench")
    before = (ROOT / "benchmarks/results.json").read_bytes()
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "--quick", "--rounds", "1"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "failed" not in result.stdout
    rows = [line for line in result.stdout.splitlines() if line.startswith("| vgg5")]
    assert len(rows) == 7 + 6 + 2 + 2 + 6 + 5  # train, infer, record, balance; few steps: two
    assert (ROOT / "benchmarks/results.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.peer
def test_what_is_run_on_a_gpu_runs_here_and_goes_on(tmp_path):
    """Out of minutes after every result; then the table. A result that is known stays."""
    pytest.importorskip("spikingjelly", reason="peers are missing: make setup-bench")
    out = tmp_path / "gpu.json"
    command = ["--device", "cpu", "--quick", "--out", str(out), "--minutes"]
    assert gpu.main([*command, "0"]) == gpu.UNFINISHED
    first = json.loads(out.read_text())
    assert list(first) == ["about", "kernels"]
    out.write_text(json.dumps(first | {"kernels": {"kept": True}}))
    assert gpu.main([*command, "60"]) == 0
    found = json.loads(out.read_text())
    assert found["kernels"] == {"kept": True}
    assert "passed" in found["golden vectors"]
    (workload,) = gpu.QUICK[:1]
    for phase in ("train", "infer"):
        for contender in gpu.CONTENDERS:
            assert found[f"{workload.name}, {phase}, {contender}"]["ms"] > 0
    assert 0 < found[f"{workload.name}, profile"]["outside products"] < 1
    assert f"| {workload.name} | train | stdb |" in gpu.table(found)


def test_a_gpu_that_is_not_there_is_said_at_once(capsys):
    """And an error of one result does not hide the others."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no GPU is there that torch sees" in capsys.readouterr().err


def test_an_error_does_not_hide_what_follows_and_is_tried_again(tmp_path):
    """It is in the file, until it is none any more."""
    results = gpu.Results(tmp_path / "gpu.json", 60, {})
    results.once("first", lambda: 1 / 0)
    results.once("next", lambda: 1)
    assert "ZeroDivisionError" in results.found["first"]["error"]
    results.once("first", lambda: 2)
    results.once("next", lambda: 3)
    assert json.loads((tmp_path / "gpu.json").read_text()) == {"about": {}, "first": 2, "next": 1}


SMALL = [
    "data.validation_fraction=0.25", "network.width=0.2", "network.hidden=32",
    "train_ann.epochs=2", "train_ann.batch_size=8", "balance_thresholds.timesteps=20",
    "balance_thresholds.images=8", "evaluate_converted.timesteps=6",
    "evaluate_converted.scales=[0.5, 1.0]", "stdb.timesteps=4", "stdb.batch_size=8",
]  # fmt: skip


@pytest.fixture
def images(tmp_path):
    """Class folders of small pictures."""
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for label, name in enumerate(("cat", "dog", "owl")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = random.integers(0, 100, (8, 8, 3)) + 70 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k}.png")
    return tmp_path / "images"


def small_row(images, folder: Path, minutes: float, *more: str) -> row.Row:
    folder.mkdir(exist_ok=True)
    preset = ROOT / "presets/cpu-vgg5-cifar10.yaml"
    return row.Row(folder, minutes, 2, row.parameters(preset, images, [*SMALL, *more]))


def test_a_row_goes_on_where_it_was_stopped(images, tmp_path):
    """A step at a time, as if every call ran out of minutes at once: the same figures."""
    small_row(images, tmp_path / "whole", 60).run()
    calls = 0
    while not (tmp_path / "parts/results.json").exists():
        calls += 1
        try:
            small_row(images, tmp_path / "parts", 0).run()
        except row.OutOfTimeError:
            continue
    whole, parts = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "parts")
    )
    assert calls > 20
    assert whole.pop("seconds").keys() == parts.pop("seconds").keys()
    assert whole == parts
    assert len(whole["tuned"]) == 2
    head = (tmp_path / "whole/table.md").read_text().splitlines()[0]
    assert head == "| ANN, % | converted, T = 6 | T = 4 | STDB, T = 4 |"


def test_every_parameter_reaches_a_row(images, tmp_path):
    """Those that an earlier driver ignored without a word have an effect, each."""
    changes = (
        *("stdb.images=8", "stdb.temporal_gradient=false", "stdb.from_scratch=true"),
        *("stdb.threshold_scale=0.3", "data.grayscale=true"),
    )
    fast = "stdb.learning_rate=0.01"
    plain = small_row(images, tmp_path / "plain", 60, fast)
    plain.run()
    for change in changes:
        other = small_row(images, tmp_path / change.partition("=")[0], 60, fast, change)
        other.run()
        assert other.done["stdb 0"] != plain.done["stdb 0"], change


def test_a_row_with_other_parameters_is_refused(images, tmp_path, capsys):
    """Instead of going on in what was made with others; and what one process cannot do."""
    small_row(images, tmp_path / "row", 60).once("images", dict)
    command = ["cpu-vgg5-cifar10", str(images), "--out", str(tmp_path / "row")]
    for more, message in (
        ([], "has other parameters"),
        (["--set", "stdb.nothing=1"], "--set has nothing; allowed: timesteps"),
        (["--set", "stdb.alpha=-1"], "stdb.alpha is -1; allowed: greater than 0"),
        (["--set", "data.stream=true"], "data.stream is true; allowed here"),
        (["--set", "cluster.workers=2"], "cluster.workers is 2; allowed here: auto, 1"),
    ):
        assert row.main([*command, *more]) == 1
        assert message in capsys.readouterr().err


def test_a_step_is_computed_from_its_products_and_its_neurons(monkeypatch):
    """By hand: twice the products and three times the neurons of what was measured, at half T."""
    small, large = (at_scale.Work(1e6 * m, 1000 * n, 4000, snn=None) for m, n in ((1, 1), (2, 3)))
    monkeypatch.setattr(at_scale, "work", lambda *_: small)
    runs = [
        {"timesteps": 100, "batch": 10, "seconds": 5.0, "products": 1.0},
        {"timesteps": 4, "batch": 100, "seconds": 0.9, "products": 0.1},
    ]
    measured = {"network": "vgg5", "image_size": 32, "runs": runs}
    many, few = (at_scale.rates(measured, steps) for steps in (30, 8))
    assert many.product == pytest.approx(1.0 / (1000 * 1e6))
    assert many.neuron == pytest.approx(4.0 / (1000 * 1000))
    assert at_scale.seconds_per_image(large, many, 50) == pytest.approx(50 * (2e-3 + 12e-3))
    assert few.neuron == pytest.approx(0.8 / (400 * 1000))


def test_gradients_wait_for_the_slowest_link():
    """A ring sends 2(n − 1)/n of the bytes; within a node its own link counts."""
    assert at_scale.waiting(1000, 1, 1.0) == 0
    assert at_scale.waiting(1000, 8, 1.0) == pytest.approx(1750 / at_scale.WITHIN)
    assert at_scale.waiting(1000, 64, 500.0) == pytest.approx(2 * 63 / 64 * 2)


def test_a_network_is_counted():
    """VGG5's multiply-accumulates and neurons, by hand, at 8×8 pixels."""
    of = at_scale.work("vgg5", 8, 10)
    convolutions = 64 * 9 * (3 * 64 + 64 // 4 * 128 + 128 // 4 * 128)
    ann = stdb.build("vgg5", in_channels=3, image_size=8, num_classes=10)
    layers = [m for m in ann.modules() if hasattr(m, "in_features")]
    assert of.products == convolutions + sum(m.in_features * m.out_features for m in layers)
    assert of.neurons == 64 * 64 + 2 * 16 * 128 + sum(m.out_features for m in layers[:-1])
    assert of.gradients == 4 * sum(p.numel() for p in ann.parameters())


@pytest.mark.slow
def test_the_page_has_what_the_command_prints():
    """docs/cluster.md, from the file of what was measured."""
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.at_scale"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() in page
