"""Write a sweep's winner into params.yaml, comments kept, and show what changed.

    python -m pipeline.apply_best [sweep/best_params.yaml]     # make apply-best

Nothing is changed where the result would not be allowed.
"""

import sys
from pathlib import Path

from pipeline.overlays import apply, show

__all__ = ["apply", "main"]


def main(arguments: list[str]) -> int:
    """Apply, show; the exit status."""
    return show(Path(arguments[0] if arguments else "sweep/best_params.yaml"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
