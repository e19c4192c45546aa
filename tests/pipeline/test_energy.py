"""`python -m pipeline.energy`: the networks that there are, beside their ANN."""

import math

import pytest

import pipeline.energy
import stdb
from pipeline.energy import MODELS, Spiking, main
from pipeline.files import SNN, SNNS
from pipeline.learning.networks import build_ann, recipe
from tests.pipeline.support import NETWORK, PARAMS, make_files, starting

MEMORY = MODELS["with memory, 32 bits"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Files of earlier stages, and networks for T = 3 and 2 that differ in their thresholds."""
    files = make_files(tmp_path)
    params = PARAMS.model_copy(update={"network": NETWORK})
    monkeypatch.setattr(pipeline.energy, "load_params", lambda: params)
    monkeypatch.chdir(tmp_path)
    SNNS.mkdir()
    for timesteps in (2, 3):
        snn = starting(files, params.stdb, scale=0.2 * timesteps)
        about = {
            "network": recipe(NETWORK, files[1]["train"]),
            "classes": [str(k) for k in range(10)],
        }
        stdb.save(snn, SNNS / f"t{timesteps}.safetensors", timesteps=timesteps, **about)
    return tmp_path


def numbers(line):
    """Of a row of a table; "402.8 (23%)" is 402.8."""
    cells = [cell.split()[0] for cell in line.strip("| ").split(" | ")[1:] if cell.strip()]
    return [float(cell.replace(",", "").rstrip("k")) for cell in cells]


def test_networks_are_compared_with_their_ann(here, capsys):
    """Tables of the networks, of spikes at which they are even, and of the layers of the last."""
    assert main(["--images", "10", "--plot", "energy.png"]) == 0
    out = capsys.readouterr().out
    assert "10 validation images" in out
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    ann = numbers(next(row for row in rows if row.startswith("| ANN")))
    of_three, of_two = (
        [numbers(row) for row in rows if row.startswith(f"| SNN, T = {t} ")] for t in (3, 2)
    )
    for energies, even in (of_three, of_two):
        assert energies[0] == even[0] > 0
        for spiking, dense, at in zip(energies[1:], ann, even[1:], strict=False):
            assert (spiking < dense) == (even[0] < at)
    layers = rows[rows.index(next(row for row in rows if row.startswith("| layer"))) + 2 :]
    assert sum(numbers(row)[4] for row in layers) <= of_two[0][1] + 0.1 * len(layers)
    assert sum(numbers(row)[5] for row in layers) == pytest.approx(
        of_two[0][2], abs=0.1 * len(layers)
    )
    assert (here / "energy.png").stat().st_size > 5000


def test_where_nothing_is_to_be_compared(here, capsys):
    """No networks; no images."""
    for path in SNNS.iterdir():
        path.unlink()
    assert main([]) == 1
    assert f"{SNN} is missing; make repro makes it" in capsys.readouterr().err
    assert main(["--images", "0"]) == 1
    assert "--images is 0; allowed: 1 or more" in capsys.readouterr().err


def test_energy_is_a_line_over_spikes():
    """Through what it is without spikes and what was measured; even where it meets the other."""
    costs = [
        stdb.LayerCost("a", multiplies=100, updates=40, leaves=8, weights=9, inputs=4, outputs=10),
        stdb.LayerCost("b", accumulates=24, arrives=8, weights=30, inputs=10, outputs=3),
    ]
    one = Spiking(4, costs, 0.8)
    silent, measured = one.pj(MEMORY, 0.0), one.pj(MEMORY)
    assert silent == pytest.approx(MEMORY(stdb.LayerCost(
        "a", multiplies=100, updates=40, weights=9, inputs=4, outputs=10
    )))  # fmt: skip
    assert one.pj(MEMORY, 0.8) == pytest.approx(measured)
    assert one.pj(MEMORY, 1.6) - measured == pytest.approx(measured - silent)
    even = one.even(MEMORY, 3 * measured)
    assert one.pj(MEMORY, even) == pytest.approx(3 * measured)
    assert one.even(MEMORY, silent / 2) == 0.0
    dead = Spiking(1, [stdb.LayerCost("a", updates=4, outputs=4)], 0.0)
    assert dead.even(MEMORY, 1e6) == math.inf
    assert dead.even(MEMORY, 0.0) == 0.0
    assert dead.pj(MEMORY, 2.0) == dead.pj(MEMORY)
    assert even > 0.8


def test_spikes_of_a_neuron_are_those_of_neurons(tmp_path):
    """The sums of a max-pooling are updated, too, and are none."""
    folder, parts = make_files(tmp_path)
    network = NETWORK.model_copy(update={"pooling": "max"})
    snn = stdb.convert(build_ann(network, parts["train"]).eval(), stdb.PoissonEncoder(0))
    images = parts["validation"]
    stdb.balance_thresholds(snn.eval(), images.pixels()[:8], 4, percentile=95)
    about = {"network": recipe(network, parts["train"]), "classes": images.classes}
    stdb.save(snn, folder / "max", timesteps=4, **about)
    with stdb.record_spikes(snn) as statistics:
        snn(images.pixels(), 4, sample_ids=images.ids)
    maps = [spikes for name, spikes in statistics.maps.items() if name != "input"]
    fired, neurons = sum(float(m.sum()) for m in maps), sum(m.numel() for m in maps)
    found = pipeline.energy.measured(folder / "max", images).spikes
    assert found == pytest.approx(fired / neurons / len(images))
