"""Chromium, driven by Playwright: for the tests marked `browser`, and for the README's pictures."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Locator, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = "Chromium is missing: apt-get install chromium"
OPTIONS = (
    *("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
PATIENCE = 120_000  # milliseconds until something has to be on a page


def find_chromium() -> str | None:
    """The browser of the machine; Playwright's own is not downloaded."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def started(chromium: str) -> Iterator[Browser]:
    """A headless Chromium."""
    alone = ("--no-sandbox",) if os.geteuid() == 0 else ()  # it has no sandbox for root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[*OPTIONS, *alone])
        yield browser
        browser.close()


@contextmanager
def new_page(browser: Browser, width: int, height: int) -> Iterator[tuple[Page, list[str]]]:
    """A page of a new visitor, and the addresses it asked for outside this machine."""
    context = browser.new_context(viewport={"width": width, "height": height})
    context.set_default_timeout(PATIENCE)
    page, outside = context.new_page(), []

    def note(request) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            outside.append(request.url)

    page.on("request", note)
    yield page, outside
    context.close()


def row_of(page: Page, run_id: str) -> Locator:
    """A run's row in the table of runs, the part with its name."""
    return page.locator(f"[role=row][row-id='{run_id}']").first


def select(page: Page, run_id: str) -> None:
    """Tick a run."""
    row_of(page, run_id).get_by_role("checkbox", name="toggle row selection").check()


def unfold(page: Page, run_id: str) -> None:
    """Show the runs below one."""
    row_of(page, run_id).get_by_role("button").first.click()


def show_charts(page: Page) -> None:
    """From the table of runs to their charts."""
    page.locator("label:has(input[name=runs-view-mode][value=CHART])").click()


def section(page: Page, name: str) -> Locator:
    """The head of a section of charts."""
    heads = page.get_by_test_id("experiment-view-compare-runs-section-header")
    return heads.filter(has_text=re.compile(rf"^{name}\s*\("))


def card(page: Page, metric: str) -> Locator:
    """The chart of a metric."""
    cards = page.get_by_test_id("experiment-view-compare-runs-card")
    return cards.filter(has=page.get_by_text(metric, exact=True))
