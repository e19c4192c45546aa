"""Run a command with one Ray instance that all its stages share, and stop it at the end.

    python -m pipeline.head dvc repro

Without it every stage starts Ray for itself, which costs a few seconds each. RAY_ADDRESS wins.
"""

import logging
import os
import subprocess
import sys
from typing import Any

from pipeline.distributed import set_environment


def main(command: list[str]) -> int:
    """Run ``command``; returns its exit code."""
    if os.environ.get("RAY_ADDRESS"):
        return subprocess.call(command)
    set_environment()
    import ray

    context: Any = ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR)
    try:
        return subprocess.call(
            command, env=os.environ | {"RAY_ADDRESS": context.address_info["address"]}
        )
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
