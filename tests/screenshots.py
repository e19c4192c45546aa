"""`make screenshots`: docs/compare.md's pictures of MLflow's pages, from the latest two runs here.

python -m tests.screenshots
"""

import re
import sys
from pathlib import Path

import mlflow
from PIL import Image
from playwright.sync_api import Page

from pipeline.tracking.address import EXPERIMENT, tracking_uri
from pipeline.ui import HOST, page_of, serving
from tests import browser
from tests.pipeline.support import free_port

FOLDER = Path("docs/screenshots")
COLUMNS = ("accuracy/scaled", "accuracy/stdb", "energy/stdb_pj")
CHARTS = r"accuracy/(ann|scaled|stdb)$|by_timestep/(levels|stdb)$|spikes/conv"


def main() -> int:
    """Serve the runs of this repository, open their pages, take pictures."""
    chromium = browser.find_chromium()
    if chromium is None:
        print(browser.MISSING, file=sys.stderr)
        return 1
    executions, report = latest()
    port = free_port()
    address = f"http://{HOST}:{port}"
    with (
        serving(tracking_uri(), port),
        browser.started(chromium) as started,
        browser.new_page(started, 1400, 850) as (page, _),
    ):
        start = address + page_of(address)
        page.goto(start)
        page.get_by_role("button", name="Close").click()  # the assistant, which takes a quarter
        browser.row_of(page, executions[0]).wait_for()
        show_columns(page)
        for run_id in executions:
            browser.unfold(page, run_id)
        take(page, "runs")

        for run_id in executions:
            browser.unfold(page, run_id)
        browser.show_charts(page)
        page.get_by_placeholder("Search metric charts").fill(CHARTS)
        browser.card(page, COLUMNS[0]).wait_for()
        page.set_viewport_size({"width": 1400, "height": 1150})
        take(page, "charts")
        page.set_viewport_size({"width": 1400, "height": 850})

        for run_id in executions:
            browser.select(page, run_id)
        page.get_by_role("button", name="Compare", exact=True).click()
        page.wait_for_url("**/compare-runs*")
        page.goto(page.url + "&workflowType=machine_learning")
        only = page.get_by_text("Show diff only")
        only.first.wait_for()
        for number in range(2):  # of parameters and of metrics
            only.nth(number).click()
        page.get_by_text("Run details").evaluate("head => head.scrollIntoView()")
        take(page, "compare")

        page.goto(start.replace("/runs", f"/runs/{executions[0]}"))
        page.get_by_role("link", name="stdb-digits").last.wait_for()
        take(page, "run")

        page.goto(start.replace("/runs", f"/runs/{report}/artifacts"))
        page.get_by_text("accuracy_by_timestep.png").click()
        page.get_by_role("img", name="accuracy_by_timestep.png").wait_for()
        take(page, "picture")

        page.goto(address + "/#/models/stdb-digits?workflowType=machine_learning")
        page.get_by_text("champion").last.wait_for()
        take(page, "model")
    return 0


def latest() -> tuple[list[str], str]:
    """The latest two executions that ended well, the newest first, and the newest's report."""
    client = mlflow.MlflowClient(tracking_uri())
    experiment = client.get_experiment_by_name(EXPERIMENT)
    where = [experiment.experiment_id] if experiment else []
    ended = "attributes.status = 'FINISHED' and tags.kind = 'execution'"
    found = client.search_runs(where, ended, max_results=2) if where else []
    if len(found) < 2:
        sys.exit("two runs are needed: make repro, with two settings")
    below = f"tags.mlflow.parentRunId = '{found[0].info.run_id}'"
    (report,) = client.search_runs(where, f"{below} and attributes.run_name = 'report'")
    return [run.info.run_id for run in found], report.info.run_id


def show_columns(page: Page) -> None:
    """Accuracies and energy instead of data set, source and models; as wide as they need."""
    page.get_by_role("button", name="Columns").click()
    for name in ("Dataset", "Source", "Models", *COLUMNS):
        page.get_by_title(name, exact=True).click()
    page.keyboard.press("Escape")
    for name in ("Run Name", *COLUMNS):
        page.locator(f"[role=columnheader]:has-text('{name}') .ag-header-cell-resize").dblclick()


def take(page: Page, name: str) -> None:
    """A picture of the window, with a palette: a third of the size."""
    page.mouse.click(700, 5)  # nothing is pointed at or has the focus
    page.wait_for_timeout(2000)  # animations
    path = FOLDER / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    here = page.get_by_text(re.compile(r"^Path: "))  # where this repository lies
    page.screenshot(path=path, mask=[here], mask_color="#ffffff")
    with Image.open(path) as picture:
        rare_too = Image.Quantize.MAXCOVERAGE
        small = picture.convert("RGB").quantize(256, rare_too, kmeans=2, dither=Image.Dither.NONE)
        small.save(path, optimize=True)
    print(f"{path}  {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    sys.exit(main())
