"""Send what waits on disk for MLflow, without a stage.

python -m pipeline.tracking.send_kept
"""

import argparse
import sys

from pipeline.environment import MLFLOW, set_default_environment
from pipeline.tracking.address import fault_of, tracking_uri
from pipeline.tracking.delivery import earlier_runs
from pipeline.tracking.outages import OutageError, report


def main(arguments: list[str]) -> int:
    """Send until nothing waits or MLflow does not answer; the exit status."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    if fault := fault_of(tracking_uri()):
        print(f"error: {fault}", file=sys.stderr)
        return 1
    set_default_environment(MLFLOW)
    whole = 0
    runs = earlier_runs()
    for run in runs:
        try:
            while run.waiting:
                run.send()
        except OutageError as outage:
            report(outage.error, "does not answer", "it waits on")
            if outage.dead:
                break
        whole += run.whole and not run.waiting
        run.close()
    print(f"MLflow: {whole} of {len(runs)} runs that waited are there")
    return int(whole < len(runs))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
