"""docs/api: every public name stands there, with an example that runs."""

import doctest
import re

import pytest

import stdb
from tests.pipeline.support import ROOT

PAGES = sorted((ROOT / "docs/api").glob("*.md"))
DIRECTIVE = re.compile(r"^\.\. (?:auto\w+|data):: stdb\.(\w+)$", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_examples_give_what_they_say(page, tmp_path, monkeypatch):
    """Each page is one session, from its first line on."""
    monkeypatch.chdir(tmp_path)
    found = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert found.attempted > 3
    assert found.failed == 0


def test_every_public_name_has_an_example():
    """Once, in a section whose example uses it."""
    documented = []
    for page in PAGES:
        for section in re.split(r"(?m)^## ", page.read_text())[1:]:
            names = DIRECTIVE.findall(section)
            example = "".join(re.findall(r"```pycon\n(.*?)```", section, re.DOTALL))
            for name in names:
                used = rf"stdb\.{name}\b|\b{name}\("
                assert re.search(used, example), (page.name, name)
            documented += names
    assert sorted(documented) == sorted(stdb.__all__)
