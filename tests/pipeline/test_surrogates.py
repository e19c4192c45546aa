"""The comparison of surrogates: what is compared, what it comes to, and that it goes on."""

import csv
import os
import shutil
import signal
import sys
import time

import pytest
import yaml

from pipeline import compare_surrogates
from pipeline.compare_surrogates import best_width, converted_loop, searched
from pipeline.errors import ParamsError, StageError
from pipeline.files import write_json
from pipeline.learning.networks import surrogate_of
from pipeline.sweeps.space import settings
from pipeline.sweeps.surrogates import (
    base_of,
    cell_search,
    cells,
    draw_gains,
    gains,
    load_comparison,
    sentence,
    width_search,
)
from tests.pipeline.support import (
    PARAMS,
    ROOT,
    STDB,
    Started,
    based,
    copy_of,
    make_files,
    worker,
)

FILE = ROOT / "sweep/surrogates/params.yaml"
DIRECT = based(encoder="direct")


def changed(tmp_path, before, after):
    text = FILE.read_text()
    assert before in text, before
    path = tmp_path / "params.yaml"
    path.write_text(text.replace(before, after, 1))
    return path


# -- what is compared ------------------------------------------------------------------------------


def test_each_kind_of_network_has_its_cells():
    """For few steps four surrogates at T = 1 … 32; of the paper's kind two at 8 … 128."""
    comparison, few = load_comparison(FILE, DIRECT)
    assert (comparison.images, comparison.seeds) == (2500, [0, 1, 2])
    assert few.timesteps == [1, 2, 4, 8, 16, 32]
    assert set(few.surrogates) == {"stdb", "rectangle", "linear", "exponential"}
    _, paper = load_comparison(FILE, PARAMS)
    assert paper.timesteps == [8, 32, 64, 128]
    assert set(paper.surrogates) == {"stdb", "rectangle"}
    assert cell_search(comparison, few, "rectangle", None).combinations == 18
    assert cell_search(comparison, paper, "stdb", 0.01).combinations == 12


def test_a_cell_learns_with_its_surrogate_over_the_threshold():
    """Its own α; β as it was found, of STDB by T; others have none to search."""
    comparison, few = load_comparison(FILE, DIRECT)
    sample = {"surrogate": "stdb", "beta_100": 0.02, "timesteps": 4, "seed": 1}
    found = settings(sample, base_of("stdb", few, DIRECT)).stdb
    assert (found.timesteps, found.seed) == (4, 1)
    surrogate = surrogate_of(found)
    assert (surrogate.name, surrogate.alpha, surrogate.beta) == ("stdb", 0.3, 0.5)
    assert surrogate.over_threshold
    assert width_search(comparison, few, "rectangle") is None
    searched = width_search(comparison, few, "exponential").space
    assert searched["beta"].values == [0.5, 1.0, 2.0, 4.0]
    assert (searched["timesteps"].values, searched["seed"].values) == ([8], [0])
    fixed = cell_search(comparison, few, "exponential", 2.0).space["beta"].values
    assert fixed == [2.0]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("timesteps: [8, 32", "timesteps: [0, 32", "networks.poisson.timesteps.0 is 0; allowed: "),
        ("      rectangle: null\n", "      gauss: null\n", "gauss"),
        ("  poisson: ", "  direkt: ", "direkt"),
        ("images: 2500 ", "images: 0 ", "images is 0; allowed: greater than or equal to 1"),
        ("seeds: [0, 1, 2]", "seeds: []", "seeds"),
        ("{beta_100: [0.0, 0.01", "{beta: [1.0], beta_100: [0.0, 0.01", "exactly one of beta, bet"),
        ("{beta_100: [0.0, 0.01", "{beta_100: [-1.0, 0.01", "beta_100.0 is -1.0; allowed: "),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, before, after, message):
    """Before anything is computed; names what is wrong."""
    with pytest.raises(ParamsError) as caught:
        load_comparison(changed(tmp_path, before, after), PARAMS)
    assert message in str(caught.value)


def test_random_weights_are_not_compared():
    """What is gained is gained over the converted network."""
    with pytest.raises(ParamsError, match="from_scratch is true, and what is compared starts"):
        load_comparison(FILE, based(from_scratch=True))


def test_a_network_without_a_comparison_is_refused(tmp_path):
    """With the encoders that have one."""
    path = tmp_path / "params.yaml"
    path.write_text(FILE.read_text().partition("  poisson:")[0])
    with pytest.raises(ParamsError, match=r"nothing for stdb.encoder: poisson; allowed: direct"):
        load_comparison(path, PARAMS)


# -- what it comes to ------------------------------------------------------------------------------


def row(surrogate, timesteps, gain, seed=0):
    return {
        **{"surrogate": surrogate, "timesteps": timesteps, "seed": seed},
        **{"gain": gain, "ann": 0.9, "converted": 0.8},
    }


def test_a_gain_is_over_the_converted_network_at_the_same_t():
    """A trial that failed has none, and its reason."""
    one = {"surrogate": "stdb", "seed": 0, "alpha": 0.3, "beta": 0.01, "spikes": 1.0, "error": ""}
    trials = [
        one | {"timesteps": 4, "accuracy": 0.75},
        one | {"timesteps": 8, "accuracy": 0.75},
        one | {"timesteps": 8, "accuracy": None, "error": "the training diverged"},
    ]
    converted = {4: {"scale": 0.5, "accuracy": 0.5}, 8: {"scale": 1.0, "accuracy": 0.8}}
    found = cells(trials, converted, 0.9)
    assert [r["gain"] for r in found] == [pytest.approx(0.25), pytest.approx(-0.05), None]
    assert [r["threshold_scale"] for r in found] == [0.5, 1.0, 1.0]
    assert found[2]["error"] == "the training diverged"
    assert gains(found) == {"stdb": {4: (pytest.approx(25), 0.0), 8: (pytest.approx(-5), 0.0)}}


def test_seeds_are_a_mean_and_a_spread():
    """In points; also from a file, where all is text."""
    rows = [row("stdb", 4, g, s) for s, g in enumerate((0.01, 0.02, 0.03))]
    expected = {"stdb": {4: (pytest.approx(2), pytest.approx(1))}}
    assert gains(rows) == expected
    texts = [{k: str(v) for k, v in r.items()} for r in rows]
    assert gains([*texts, texts[0] | {"gain": ""}]) == expected


def test_the_sentence_says_where_stdb_is_behind_level_and_ahead():
    """Of the best of the others; level within both spreads."""
    others = {4: 0.05, 8: 0.03, 32: 0.01, 64: 0.01}
    own = {4: 0.01, 8: 0.025, 32: 0.01, 64: 0.03}
    rows = [
        row("rectangle", t, g + d, s) for t, g in others.items() for s, d in ((0, 0), (1, 4e-3))
    ]
    rows += [row("stdb", t, g + d, s) for t, g in own.items() for s, d in ((0, 0), (1, 4e-3))]
    rows += [row("linear", 4, 0.0)]
    assert sentence(rows) == (
        "STDB against the best of the others: behind at T = 4; level with at T = 8, 32; ahead of "
        "at T = 64"
    )
    assert sentence([row("linear", 4, 0.0)]) == "nothing to tell"


def test_both_kinds_are_drawn(tmp_path, recwarn):
    """A panel each, from what files hold."""
    rows = [
        {k: str(v) for k, v in row(name, t, 0.01 * t, s).items()}
        for name in ("stdb", "linear") for t in (1, 2, 8) for s in (0, 1)
    ]  # fmt: skip
    draw_gains({"direct": rows, "poisson": rows[:6]}, tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 1000
    assert not [str(warning.message) for warning in recwarn]


def test_the_best_width_is_kept():
    """The most accurate; the only one; none where a surrogate has its own."""
    _, few = load_comparison(FILE, DIRECT)
    trials = [{"beta_100": b, "accuracy": a} for b, a in ((0.0, 0.5), (0.03, 0.7), (0.1, None))]
    assert best_width(few, "stdb", trials) == 0.03
    assert best_width(few, "rectangle", []) is None


# -- that it goes on -------------------------------------------------------------------------------


def test_the_converted_network_is_looked_at_once_for_each_t(tmp_path, monkeypatch):
    """At its best scale; what an interrupted job found is kept."""
    files = make_files(tmp_path)
    scaled = []

    def best_scale(worker, snn, validation, timesteps, params):
        scaled.append(timesteps)
        return 0.25

    monkeypatch.setattr(compare_surrogates, "best_scale", best_scale)
    one = worker(files[0], STDB.model_copy(update={"threshold_scale": None}))
    converted_loop(one, [1, 2])
    first = one.states[-1]["converted"]
    assert set(first) == {1, 2}
    assert all(0 <= found["accuracy"] <= 1 and found["scale"] == 0.25 for found in first.values())
    converted_loop(one, [1, 2, 3])
    assert scaled == [1, 2, 3]
    assert {t: one.states[-1]["converted"][t] for t in (1, 2)} == first


def test_a_search_that_is_done_is_not_done_again(tmp_path, monkeypatch):
    """And one without an accuracy is refused with the reasons."""
    stage = type("Stage", (), {"say": lambda self, text: None})()
    found = [{"accuracy": 0.5, "error": ""}]
    monkeypatch.setattr(compare_surrogates, "search", lambda *a: (found, []))
    common = {"room": None, "work": tmp_path, "scales": {}}
    assert searched(stage, None, None, "linear", **common) == found
    monkeypatch.setattr(compare_surrogates, "search", lambda *a: pytest.fail("again"))
    assert searched(stage, None, None, "linear", **common) == found
    failed = [{"accuracy": None, "error": "the training diverged"}]
    monkeypatch.setattr(compare_surrogates, "search", lambda *a: (failed, []))
    with pytest.raises(StageError, match=r"stdb: no trial .* accuracy: the training diverged"):
        searched(stage, None, None, "stdb", **common)
    write_json(tmp_path / "stdb" / "trials.json", found)
    assert searched(stage, None, None, "stdb", **common) == found


@pytest.mark.slow
def test_a_killed_comparison_goes_on_and_keeps_the_other_kind(finished, tmp_path):
    """On the digits; the table of a network of the other kind stays, and is drawn, too."""
    repository = copy_of(finished, tmp_path / "repository")
    folder = repository.root / "sweep/surrogates"
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params |= {"images": 40, "seeds": [0, 1], "epochs": 2}
    tiny = {"timesteps": [2, 3], "beta_at": 2, "over_threshold": None}
    tiny["surrogates"] = {"rectangle": None, "stdb": {"beta_100": [0.01, 0.1]}}
    params["networks"]["poisson"] = tiny
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    command = [sys.executable, "-m", "pipeline.compare_surrogates"]
    started = Started(repository, tmp_path / "log", command)
    deadline = time.monotonic() + 300
    while not list(repository.root.glob(".results/surrogates-*/rectangle/trials.json")):
        assert started.process.poll() is None, started.says()
        assert time.monotonic() < deadline, started.says()
        time.sleep(0.05)
    os.killpg(started.process.pid, signal.SIGKILL)
    started.wait_until_gone(60)
    (folder / "results").mkdir()
    shutil.copy(_other_kind(tmp_path), folder / "results/direct.csv")
    said = repository.run(*command).stdout
    assert "rectangle: was done before" in said
    assert "STDB against the best of the others: " in said
    with (folder / "results/poisson.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 8
    assert {(r["surrogate"], r["timesteps"], r["seed"]) for r in found} == {
        (name, t, s) for name in ("rectangle", "stdb") for t in "23" for s in "01"
    }
    assert len({r["beta"] for r in found if r["surrogate"] == "stdb"}) == 2  # by T
    assert (folder / "results/surrogates.png").stat().st_size > 1000
    assert (folder / "results/direct.csv").exists()
    assert not list((repository.root / ".results").glob("surrogates-*"))


def _other_kind(folder):
    path = folder / "direct.csv"
    rows = [row("stdb", 4, 0.01), row("linear", 4, 0.02)]
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path
