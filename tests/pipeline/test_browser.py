"""MLflow's pages in a real browser: what somebody finds there after two executions.

No page asks for anything outside this machine.
"""

import os
import re

import mlflow
import pytest
from playwright.sync_api import expect

from pipeline.reporting.page import as_html
from pipeline.reporting.tables import markdown_table
from tests import browser
from tests.browser import card, row_of, section, select, show_charts, unfold
from tests.pipeline.support import STAGES, address_of, copy_of, ui

pytestmark = [pytest.mark.browser, pytest.mark.slow]
expect.set_options(timeout=browser.PATIENCE)
ACCURACIES = ["ann", "converted", "quantised", "scaled", "stdb", "stdb_validation"]
SPIKES = ["conv1", "conv2", "conv3", "fc1", "fc2", "mean"]


def chromium_or_skip() -> str:
    """Where it is; CI never goes on without it."""
    found = browser.find_chromium()
    if found is None:
        missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        missing(browser.MISSING)
    return found


@pytest.fixture(scope="session")  # as ``finished`` is, so that it is looked for before that runs
def path() -> str:
    """Of Chromium."""
    return chromium_or_skip()


@pytest.fixture(scope="module")
def chromium(path):
    """One browser for all tests."""
    with browser.started(path) as chromium:
        yield chromium


@pytest.fixture(scope="module")
def repository(path, finished, tmp_path_factory):
    """Where the pipeline ran a second time, with another α."""
    repository = copy_of(finished, tmp_path_factory.mktemp("second") / "repository")
    repository.set(stdb={"alpha": 0.4})
    repository.repro()
    return repository


@pytest.fixture(scope="module")
def runs(repository):
    """The first and the last execution's run, and (0 or 1, stage) → run below it."""
    client = mlflow.MlflowClient(f"sqlite:///{repository.root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("stdb")
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    executions = [run.info for run in found if run.data.tags.get("kind") == "execution"]
    ends = [executions[0], executions[-1]]  # tests may have run stages of ``finished`` in between
    numbers = {run.run_id: number for number, run in enumerate(ends)}
    below = {
        (numbers[parent], run.info.run_name): run.info
        for run in found
        if (parent := run.data.tags.get("mlflow.parentRunId")) in numbers
    }
    return ends, below


@pytest.fixture(scope="module")
def address(repository, tmp_path_factory):
    """What `make ui` prints, as long as it runs."""
    with ui(repository, tmp_path_factory.mktemp("ui") / "log") as started:
        yield address_of(started)


@pytest.fixture
def page(chromium, address):
    """The page that `make ui` shows, to a new visitor."""
    with browser.new_page(chromium, 1800, 1000) as (page, outside):
        page.goto(address)
        yield page
    assert not outside


@pytest.fixture
def run_page(page, runs, address):
    """Opens a tab of a run's page: of an execution, or of a stage of it."""

    def open(execution: int, stage: str | None = None, tab: str = ""):
        ends, below = runs
        run = below[execution, stage] if stage else ends[execution]
        page.goto(address.replace("/runs", f"/runs/{run.run_id}{tab}"))
        expect(page.get_by_role("heading", name=run.run_name, exact=True)).to_be_visible()
        return page

    return open


def test_a_missing_chromium_skips_tests_and_fails_ci(monkeypatch):
    """With how to install it."""
    monkeypatch.setattr(browser, "find_chromium", lambda: None)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"):
        chromium_or_skip()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        chromium_or_skip()


def test_the_runs_are_listed_with_their_stages_below(page, runs, repository):
    """Named after network, T and commit; the second ran only what α touches."""
    ends, below = runs
    commit = repository.run("git", "rev-parse", "HEAD").stdout[:7]
    names = [f"vgg5 T=3 {commit}", f"vgg5 T=3 {commit}-dirty"]
    for number, (run, name) in enumerate(zip(ends, names, strict=True)):
        expect(row_of(page, run.run_id).get_by_role("link", name=name, exact=True)).to_be_visible()
        stages = STAGES if number == 0 else ["finetune_stdb", "report"]
        assert sorted(stage for k, stage in below if k == number) == sorted(stages)
        rows = [row_of(page, below[number, stage].run_id) for stage in stages]
        for row in rows:
            expect(row).to_have_count(0)
        unfold(page, run.run_id)
        for row, stage in zip(rows, stages, strict=True):
            expect(row.get_by_role("link", name=stage)).to_be_visible()
        unfold(page, run.run_id)


def test_two_runs_are_compared(page, runs):
    """Parameters beside each other; only α differs. A chart, and the accuracies."""
    ends, _ = runs
    for run in ends:
        select(page, run.run_id)
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_text("Comparing 2 Runs from 1 Experiment")).to_be_visible()
    expect(page.locator(".js-plotly-plot .main-svg").first).to_be_visible()
    alpha, beta = (
        page.get_by_role("row").filter(has_text=re.compile(rf"^stdb\.{name}"))
        for name in ("alpha", "beta")
    )
    expect(beta).to_be_visible()
    expect(alpha.get_by_text("0.3", exact=True)).to_be_visible()
    expect(alpha.get_by_text("0.4", exact=True)).to_be_visible()
    page.get_by_text("Show diff only").first.click()
    expect(beta).to_have_count(0)
    expect(alpha).to_be_visible()
    expect(page.get_by_text("accuracy/stdb", exact=True).first).to_be_visible()


def test_accuracy_and_spikes_are_drawn_for_both_runs(page, runs):
    """In sections of their own, a bar for each run in each chart."""
    ends, _ = runs
    row_of(page, ends[0].run_id).wait_for()
    show_charts(page)
    for group, names in (("accuracy", ACCURACIES), ("spikes", SPIKES)):
        head = section(page, group)
        expect(head).to_contain_text(f"({len(names)})")
        head.evaluate("head => head.scrollIntoView()")  # charts out of sight are not drawn
        for name in names:
            chart = card(page, f"{group}/{name}")
            expect(chart.locator(".bars .point")).to_have_count(2)
            for run in ends:
                expect(chart.get_by_text(run.run_name, exact=True).first).to_be_visible()


def test_accuracy_by_timestep_is_a_line_for_each_run(page, runs, repository):
    """T is the step of one chart; a point for each T that was measured."""
    ends, _ = runs
    client = mlflow.MlflowClient(f"sqlite:///{repository.root / 'mlflow.db'}")
    metric = "by_timestep/stdb"
    steps = [[one.step for one in client.get_metric_history(run.run_id, metric)] for run in ends]
    assert steps[0][:3] == [1, 2, 3]
    row_of(page, ends[0].run_id).wait_for()
    show_charts(page)
    page.get_by_placeholder("Search metric charts").fill(metric)
    chart = card(page, metric)
    chart.evaluate("chart => chart.scrollIntoView()")
    expect(chart.locator(".scatterlayer .point")).to_have_count(sum(map(len, steps)))
    expect(chart.get_by_text("Step", exact=True)).to_be_visible()
    for run in ends:
        legend = chart.get_by_text(f"{run.run_name} ({metric})", exact=True)
        expect(legend.first).to_be_visible()


def test_a_run_says_what_was_made_from_what(run_page):
    """The figures in words and as metrics, the data sets, the commit, the registered network."""
    page = run_page(1)
    expect(page.get_by_text("on digits, 450 test images: ANN")).to_be_visible()
    for metric in ("accuracy/stdb", "energy/stdb_pj", "spikes/conv1"):
        expect(page.get_by_role("link", name=metric, exact=True)).to_be_visible()
    expect(page.get_by_text(re.compile(r"^digits train \(\w{12}\)"))).to_be_visible()
    expect(page.get_by_text("dvc repro").first).to_be_visible()
    expect(page.get_by_role("link", name="stdb-digits").first).to_be_visible()


def test_the_curves_of_a_training_are_drawn(run_page):
    """Accuracy by epoch, a line."""
    page = run_page(0, "train_ann", "/model-metrics")
    chart = card(page, "validation")
    expect(chart.locator(".scatterlayer .trace").first).to_be_visible()


def test_a_picture_and_the_report_are_shown(run_page):
    """Drawn in the page, not offered as files; the report with its pictures inside."""
    page = run_page(1, "report", "/artifacts")
    page.get_by_text("raster.png").click()
    picture = page.get_by_role("img", name="raster.png")
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 500
    page.get_by_text("index.html").click()
    report = page.frame_locator("iframe")
    expect(report.get_by_role("heading", name="Report")).to_be_visible()
    width = report.locator("img").first.evaluate("image => image.naturalWidth")
    assert width > 500


def test_the_registered_model_has_a_champion(page, runs, repository):
    """From a run's page to the registry: versions, alias, how to load it."""
    client = mlflow.MlflowClient(f"sqlite:///{repository.root / 'mlflow.db'}")
    champion = client.get_model_version_by_alias("stdb-digits", "champion").version
    page.get_by_role("link", name="Model registry").click()
    dialog = page.get_by_role("dialog")  # MLflow's own greeting
    dialog.get_by_role("button", name="Close").click()
    page.get_by_role("link", name="stdb-digits").click()
    expect(page.get_by_role("heading", name="stdb-digits")).to_be_visible()
    version = page.get_by_role("row").filter(has_text=f"Version {champion}")
    aliases = client.get_model_version("stdb-digits", champion).aliases
    assert re.fullmatch(r"champion-t\d+", max(aliases, key=len))
    for alias in aliases:
        expect(version.get_by_text(f"@ {alias}", exact=True)).to_be_visible()
    expect(
        page.get_by_text('mlflow.pyfunc.load_model("models:/stdb-digits@champion")')
    ).to_be_visible()
    text = client.get_model_version("stdb-digits", champion).description
    version.get_by_role("link", name=f"Version {champion}").click()
    expect(page.get_by_text(text.splitlines()[0])).to_be_visible()


def test_the_tables_of_the_report_sort(chromium):
    """By a click on a column's head, up and then down; numbers as numbers."""
    rows = [["b", "9.5%"], ["a", "10.25%"], ["c", ""], ["d", "1,000"]]
    with browser.new_page(chromium, 400, 800) as (page, outside):
        page.set_content(as_html(markdown_table(["name", "share"], rows)))
        names = page.locator("tbody tr td:first-child")
        head = page.get_by_role("columnheader", name="share")
        expect(names).to_have_text(["b", "a", "c", "d"])
        head.click()
        expect(names).to_have_text(["b", "a", "d", "c"])
        head.click()
        expect(names).to_have_text(["c", "d", "a", "b"])
        assert head.get_attribute("aria-sort") == "descending"
    assert not outside
