"""Refuse files that git should not hold: `python -m tests.large_files FILE…`, a pre-commit hook."""

import sys
from pathlib import Path

LIMIT = 1 << 20  # bytes; larger ones are DVC's


def large(names: list[str]) -> list[str]:
    """Those above the limit, with their size."""
    sizes = {name: Path(name).stat().st_size for name in names if Path(name).is_file()}
    return [f"{name}: {size / LIMIT:.1f} MiB" for name, size in sizes.items() if size > LIMIT]


if __name__ == "__main__":
    found = large(sys.argv[1:])
    print("\n".join(found))
    sys.exit(bool(found))
