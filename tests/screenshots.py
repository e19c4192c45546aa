"""`make screenshots`: the README's pictures of MLflow's pages, from the latest two runs here.

python -m tests.screenshots
"""

import sys
from pathlib import Path

import mlflow
from PIL import Image
from playwright.sync_api import Page

from pipeline.tracking import EXPERIMENT, tracking_uri
from pipeline.ui import HOST, page_of, serving
from tests import browser
from tests.pipeline.test_model import free_port

FOLDER = Path("docs/screenshots")
COLUMNS = ("accuracy/ann", "accuracy/converted", "accuracy/stdb", "energy/stdb_pj")
COLORS = 128  # of the palette; the pages have few


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
        choose_columns(page)
        browser.unfold(page, executions[0])
        take(page, "runs")
        browser.show_charts(page)
        browser.card(page, COLUMNS[0]).wait_for()
        take(page, "charts")
        page.goto(start.replace("/runs", f"/runs/{report}/artifacts"))
        page.get_by_text("accuracy_by_timestep.png").click()
        page.get_by_role("img", name="accuracy_by_timestep.png").wait_for()
        take(page, "picture")
        page.goto(start.replace("/runs", f"/runs/{executions[0]}"))
        page.get_by_role("link", name="stdb-digits").last.wait_for()
        take(page, "run")
        page.goto(address + "/#/models/stdb-digits?workflowType=machine_learning")
        page.get_by_text("champion", exact=False).first.wait_for()
        take(page, "model")
    return 0


def latest() -> tuple[list[str], str]:
    """The latest two executions that ended well, the newest first, and the newest's report."""
    client = mlflow.MlflowClient(tracking_uri())
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None, "no runs yet: make repro"
    where = [experiment.experiment_id]
    ended = "attributes.status = 'FINISHED' and "
    found = client.search_runs(where, ended + "tags.kind = 'execution'", max_results=2)
    assert len(found) == 2, "two runs are needed: make repro with two settings"
    below = f"tags.mlflow.parentRunId = '{found[0].info.run_id}'"
    (report,) = client.search_runs(where, f"{below} and attributes.run_name = 'report'")
    return [run.info.run_id for run in found], report.info.run_id


def choose_columns(page: Page) -> None:
    """Accuracies and energy instead of data set, source and models."""
    page.get_by_role("button", name="Columns").click()
    for name in ("Dataset", "Source", "Models", *COLUMNS):
        page.get_by_title(name, exact=True).click()
    page.keyboard.press("Escape")


def take(page: Page, name: str) -> None:
    """A picture of the window, with a palette, which takes a third of the room."""
    page.mouse.move(700, 5)
    page.wait_for_timeout(2000)  # animations
    path = FOLDER / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=path)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}  {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    sys.exit(main())
