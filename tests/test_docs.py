"""What the documents point at is there."""

import re

import pytest

from tests.pipeline.support import ROOT

PAGES = sorted(
    path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Files, and headings in them."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", t).lower().replace(" ", "-") for t in titles]
            assert heading in anchors, target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_in_the_code_exist(page):
    """`file: name, …` and `file` in backquotes."""
    quoted = re.findall(
        r"`((?:stdb|pipeline|benchmarks|tests)/[\w/]+\.py)(?:: ([\w.]+))?`", page.read_text()
    )
    for file, name in quoted:
        source = (ROOT / file).read_text()
        last = name.rpartition(".")[2]
        assert re.search(rf"(def|class) {last}\b|^{last}\b", source, re.MULTILINE), (file, name)
    if page.name == "paper-to-code.md":
        assert len(quoted) > 30


def test_the_architecture_names_every_file():
    """A line per file of the engine and the pipeline."""
    text = (ROOT / "docs/architecture.md").read_text()
    for folder in ("stdb", "pipeline"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.name in text, path
