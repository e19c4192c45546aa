"""The documentation as a site (make docs): the Markdown pages of this repository, and the API.

Nothing is fetched from other hosts when it is built or read: fonts are the reader's own, formulas
MathML.
"""

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

project = "Hybrid conversion + STDB"
author = "the authors of this repository"
copyright = "Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

# The source is the root, so that links mean here what they mean in a file browser.
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "docs/api/*.md", "*/README.md", "models/zoo/*.md"]
exclude_patterns = [".*", "mlartifacts", "data", "site"]
suppress_warnings = ["myst.header", "misc.highlighting_failure"]
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
add_module_names = False

html_theme = "furo"
html_title = project
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"


def visit(display: str) -> Any:
    """Writes a formula as MathML, which browsers show by themselves."""

    def write(self: Any, node: Any) -> None:
        self.body.append(convert(node.astext(), display=display))
        raise nodes.SkipNode

    return write


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (visit("inline"), None), (visit("block"), None))
