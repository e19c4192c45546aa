"""`make setup`: the page that DVC's plots are shown on, with Vega in it, so that it works offline.

    python -m pipeline.write_plots_page

DVC's own page loads Vega's scripts from the net. This one is written to `.dvc/plots/page.html`, and
DVC is told to take it, in `.dvc/config.local`: git tracks neither, and a clone without them has
DVC's own page.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import vl_convert

from pipeline.command import command, parser
from pipeline.errors import StageError

PAGE = Path(".dvc/plots/page.html")
VEGA_LITE = "5.21"  # DVC's templates are written for version 5

# The bundle's own names stay in a function: the page's scripts share one scope.
HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{refresh_tag}
<title>Plots</title>
<style>
body {{ font-family: sans-serif; }}
body > div {{ display: inline-block; margin: 1em; vertical-align: top; }}
</style>
<script>(() => {{ {bundle} }})();</script>
</head>
<body>
{plot_divs}
</body>
</html>
"""


@command
def main(arguments: Sequence[str]) -> None:
    """Write the page, then name it to DVC: the setting never points to nothing."""
    parser(__doc__, "write_plots_page").parse_args(arguments)
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE)
    html = HTML.format(bundle=bundle, refresh_tag="{refresh_tag}", plot_divs="{plot_divs}")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(html, encoding="utf8")
    name = str(PAGE.relative_to(".dvc"))
    setting = ["dvc", "config", "--local", "plots.html_template", name]
    if status := subprocess.run(setting).returncode:
        raise StageError(f"`{' '.join(setting)}` ended with status {status}; it says why above")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
