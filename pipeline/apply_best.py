"""Write a sweep's winner into params.yaml, comments kept, and show what changed.

    python -m pipeline.apply_best [sweep/best_params.yaml]     # make apply-best

Nothing is changed where the result would not be allowed.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.command import command, parser
from pipeline.overlays import apply, show

__all__ = ["apply", "main"]


@command
def main(arguments: Sequence[str]) -> None:
    """Apply, show."""
    line = parser(__doc__, "apply_best")
    line.add_argument("overlay", nargs="?", default="sweep/best_params.yaml", type=Path)
    show(line.parse_args(arguments).overlay)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
