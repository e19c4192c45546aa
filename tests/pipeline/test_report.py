"""The report of a pipeline that really ran: what a reader finds in it."""

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import yaml

from pipeline.params import load_params
from pipeline.reporting.figures import accuracy_by_timestep
from pipeline.reporting.literature import literature, rows_for
from pipeline.reporting.page import as_html
from pipeline.reporting.paper import TABLE_1, nearest
from pipeline.reporting.results import (
    AnnResults,
    ConversionResults,
    CurvePoint,
    DataSummary,
    FinetunedResults,
    headline,
    summary,
)
from pipeline.reporting.tables import by_timestep, each_t, markdown_table, sources, with_interval
from tests.pipeline.support import ROOT

CIFAR10, CIFAR100 = (one.classes for one in literature().data_sets)

FIGURES = [
    "accuracy_by_timestep",
    "confusion",
    "diagnosis",
    "raster",
    "spikes_per_layer",
    "surrogate",
    "training",
]


class Page(HTMLParser):
    """What an HTML page refers to and says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.references += [v for k, v in attributes if k in ("src", "href") and v]
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data


def measured(finished, name):
    return json.loads((finished.root / f"metrics/{name}.json").read_text())


def test_the_page_needs_no_other_file(finished):
    """Every picture is inside, none is missing, nothing comes from elsewhere."""
    page = Page((finished.root / "report/index.html").read_text())
    assert len(page.references) == len(FIGURES)
    assert all(source.startswith("data:image/png;base64,") for source in page.references)
    assert {p.stem for p in (finished.root / "report").glob("*.png")} == set(FIGURES)
    text = (finished.root / "report/README.md").read_text()
    assert sorted(re.findall(r"\]\((\w+)\.png\)", text)) == FIGURES


def test_the_row_of_table_1_is_what_was_measured_beside_the_papers(finished):
    """The four accuracies with their intervals; the paper's figures of the same network."""
    cells = Page((finished.root / "report/index.html").read_text()).cells
    images = measured(finished, "data")["test"]["images"]
    converted = measured(finished, "evaluate_converted")
    for accuracy in (
        measured(finished, "train_ann")["accuracy"]["test"],
        converted["long"]["accuracy"],
        converted["reduced"]["accuracy"],
        measured(finished, "finetune_stdb")["accuracy"]["test"],
    ):
        assert any(cell.strip() == with_interval(accuracy, images) for cell in cells)
    for number in ("87.88 %", "87.64 %", "84.56 %", "86.91 %"):
        assert any(cell.strip() == number for cell in cells)


def test_every_parameter_and_where_it_comes_from_is_there(finished):
    """All of params.yaml, the commit, digests, seeds, machine, durations."""
    text = (finished.root / "report/README.md").read_text()
    params = yaml.safe_load((finished.root / "params.yaml").read_text())
    for section, values in params.items():
        for key in values:
            assert f"| `{section}.{key}` | `" in text, (section, key)
    assert finished.run("git", "rev-parse", "HEAD").stdout.strip() in text
    for split in ("train", "validation", "test"):
        assert measured(finished, "data")[split]["sha256"] in text
    for stage in ("prepare_data", "train_ann", "balance_thresholds", "finetune_stdb"):
        assert re.search(rf"- {stage}: \d+ s, ended \d{{4}}-", text), stage
    assert re.search(r"machine: .*cores.*torch", text)


def curve(accuracies, scale=1.0):
    return [
        CurvePoint(timesteps=t, accuracy=a, threshold_scale=scale)
        for t, a in enumerate(accuracies, start=1)
    ]


@pytest.mark.parametrize(("steps", "shown"), [(3, [1, 2, 3]), (20, [1, 2, 4, 8, 16, 20])])
def test_the_accuracy_after_every_step_is_a_table(steps, shown):
    """Up to T, of the scale that was chosen; of a large T powers of two, and T itself."""
    tuned = SimpleNamespace(timesteps=steps, by_timesteps={})
    tuned.at_each = [tuned]
    found = SimpleNamespace(
        converted=SimpleNamespace(reduced=SimpleNamespace(threshold_scale=0.35, timesteps=steps)),
        finetuned=tuned,
        plots=SimpleNamespace(
            converted_accuracy=[
                *curve([0.3 + t / 100 for t in range(1, 31)], 0.35),
                *curve([0.1] * 30, 1.0),
            ],
            finetuned_accuracy=curve([0.6 + t / 100 for t in range(1, 31)]),
            converted_quantised=[*curve([0.5, 0.6], 0.35), *curve([0.1] * 30, 1.0)],
        ),
    )
    head, _, *rows = by_timestep(found).splitlines()
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in (head, *rows)]
    assert cells == [
        ["t", *map(str, shown)],
        ["converted, scaled", *(f"{30 + t}.00%" for t in shown)],
        ["STDB", *(f"{60 + t}.00%" for t in shown)],
        ["ANN with t levels", "50.00%", "60.00%", *[""] * (len(shown) - 2)],
    ]


@pytest.fixture
def falling():
    """A run at T = 4 and 1 on CIFAR-10, made of the repository's own metrics."""

    def at(steps, accuracy):
        one = json.loads((ROOT / "metrics/finetune_stdb.json").read_text("utf-8"))
        one.pop("by_timesteps", None)
        return one | {
            "timesteps": steps,
            "accuracy": {"validation": accuracy, "test": accuracy},
            "mean_spikes": 0.25 * steps,
            "energy_pj": 1e6 * steps,
        }

    converted = json.loads((ROOT / "metrics/evaluate_converted.json").read_text("utf-8"))
    converted["reduced"] |= {"timesteps": 4, "threshold_scale": 1.0}
    each = {"4": at(4, 0.92), "1": at(1, 0.88)}
    data = json.loads((ROOT / "metrics/data.json").read_text("utf-8"))
    names = "Airplane automobile bird cat deer dog frog horse ship truck"
    return SimpleNamespace(
        data=DataSummary(**data | {"classes": names.split(), "shape": tuple(data["shape"])}),
        ann=AnnResults.model_validate(
            json.loads((ROOT / "metrics/train_ann.json").read_text("utf-8"))
        ),
        converted=ConversionResults.model_validate(converted),
        finetuned=FinetunedResults.model_validate(each["1"] | {"by_timesteps": each}),
        plots=SimpleNamespace(
            converted_accuracy=curve([0.7, 0.8, 0.85, 0.9]),
            converted_quantised=curve([0.75, 0.85, 0.9, 0.91]),
            finetuned_accuracy=curve([0.88, 0.87]),
        ),
    )


def test_each_t_has_a_row_beside_its_ann_and_what_others_published(falling):
    """Accuracy, levels, spikes and energy of each; of the literature T and accuracy."""
    table = each_t(load_params(ROOT / "params.yaml"), falling)
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    images = falling.data.test.images
    for steps, accuracy, levels in ((4, 0.92, "91.00%"), (1, 0.88, "75.00%")):
        name = f"**STDB for T = {steps}**"
        (row,) = [row for row in rows if row[0] == name]
        assert row[2:] == [
            str(steps), with_interval(accuracy, images), levels, f"{0.25 * steps:.2f}",
            f"{1000 * steps:,.1f}",
        ]  # fmt: skip
    assert ["QCFS, VGG16", "direct", "4", "93.96%", "", "", ""] in rows
    assert len(rows) == 3 + 7
    assert "DIET-SNN" in sources(falling)


def test_several_t_are_summarised_each(falling):
    """In DVC's summary and MLflow's figures; of one T nothing is said twice."""
    assert summary(falling)["accuracy"]["stdb_t4"] == headline(falling)["accuracy/stdb_t4"] == 0.92
    assert headline(falling)["energy/stdb_t1_pj"] == 1e6
    falling.finetuned = falling.finetuned.model_copy(update={"by_timesteps": {}})
    assert not any("stdb_t" in name for name in headline(falling))


def test_the_figure_over_t_has_whole_numbers_and_the_papers_points(falling):
    """Powers of two along x; each method once by name."""
    figure = accuracy_by_timestep(falling, rows_for(falling.data.classes))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert {"1", "2", "4", "64"} <= set(shown)
    assert all(text.isdigit() for text in shown if float(text) >= 1)
    names = [text.get_text() for text in axes.texts]
    assert sorted(names) == ["DIET-SNN", "IIR-SNN", "QCFS", "STDB"]


def test_the_literature_is_known_by_the_classes_and_agrees_with_table_1():
    """No row on other data; the paper's are those of its table; every row has a paper."""
    assert rows_for(map(str, range(10))) == []
    found = literature()
    assert [len(data.classes) for data in found.data_sets] == [10, 100]
    for data in found.data_sets:
        source = data.name.lower().replace("-", "")
        for row in data.rows:
            assert row.paper in found.papers
            if row.paper == "STDB":
                own = next(
                    r
                    for r in TABLE_1
                    if (r.architecture, r.source) == (row.network.lower(), source)
                )
                assert (row.accuracy, row.timesteps) == (own.hybrid, own.timesteps)


def test_the_accuracy_at_t_is_the_last_of_the_table(finished):
    """As Table 1's row has it."""
    text = (finished.root / "report/README.md").read_text()
    table = text.partition("(accuracy_by_timestep.png)")[2].partition("##")[0]
    (before,) = re.findall(r"\| converted, scaled \|.* ([\d.]+%) \|\n", table)
    (after,) = re.findall(r"\| STDB \|.* ([\d.]+%) \|\n", table)
    assert before == f"{measured(finished, 'evaluate_converted')['reduced']['accuracy']:.2%}"
    assert after == f"{measured(finished, 'finetune_stdb')['accuracy']['test']:.2%}"


def test_leaving_early_is_reported(finished):
    """Steps on average fall with the confidence that is asked for, and never exceed T."""
    text = (finished.root / "report/README.md").read_text()
    table = text.partition("## Leaving early")[2].partition("##")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if re.match(r"\| 0\.", line)]
    steps = [float(row[1]) for row in rows]
    assert len(steps) == 7
    assert steps == sorted(steps)
    assert 1 <= steps[0] <= steps[-1] <= measured(finished, "finetune_stdb")["timesteps"]


def test_an_interval_is_wilsons():
    """Against the closed form, written out for 81 of 90."""
    n, p, z = 90, 0.9, 1.959964
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert (
        with_interval(p, n) == f"90.00% ({100 * (middle - half):.1f}–{100 * (middle + half):.1f})"
    )


@pytest.mark.parametrize(
    ("architecture", "classes", "expected"),
    [
        ("vgg16", CIFAR10, ("vgg16", "cifar10")),
        ("vgg16", ["hot", "cold"], ("vgg16", "cifar10")),
        ("vgg16", [f"n{k:08}" for k in range(1000)], ("vgg16", "imagenet")),
        ("vgg11", CIFAR10, ("vgg11", "cifar100")),
        ("vgg13", [name.title() for name in CIFAR100], ("vgg11", "cifar100")),
        ("resnet12", list("0123456789"), ("resnet8", "cifar10")),
        ("resnet34", ["hot", "cold"], ("resnet34", "imagenet")),
    ],
    ids=lambda value: str(value[:2]),
)
def test_the_papers_row_is_the_one_most_alike(architecture, classes, expected):
    """Same network first, then the same family and data, which are known by their classes."""
    network = load_params(ROOT / "params.yaml").network
    row = nearest(network.model_copy(update={"architecture": architecture}), classes)
    assert (row.architecture, row.source) == expected


def test_the_papers_table_loses_by_conversion_and_wins_back_by_training():
    """A typing error in a row would show: long ≥ hybrid ≥ reduced, as the paper finds."""
    for row in TABLE_1:
        assert row.ann >= row.converted > row.reduced
        assert row.ann >= row.hybrid > row.reduced


def test_text_of_a_user_cannot_become_markup():
    """A class or a path named like a tag stays text."""
    page = as_html(markdown_table(["a"], [["<script>alert(1)</script>"]]))
    assert "<script>alert" not in page
    assert page.count("<script>") == 1  # what sorts tables


def test_a_run_that_ended_can_be_kept(finished):
    """Its figures are those of its metrics; a table is made of them."""
    command = ("python", "-m", "benchmarks.kept")
    finished.run(*command, "add", "digits")
    kept = json.loads((finished.root / "results/digits.json").read_text())
    tuned = measured(finished, "finetune_stdb")
    assert [one["test"] for one in kept["networks"]] == [tuned["accuracy"]["test"]]
    assert kept["networks"][0]["latency_ms"] > 0
    energy, dense = kept["networks"][0]["energy"], kept["ann"]["energy"]
    assert dense["operations, float32"] == pytest.approx(
        measured(finished, "evaluate_converted")["ann"]["energy_pj"]
    )
    assert all(energy[model] > 0 for model in dense)
    finished.run(*command, "table")
    assert "| **digits** |" in (finished.root / "RESULTS.md").read_text()
    finished.run("git", "checkout", "RESULTS.md")
    (finished.root / "results/digits.json").unlink()
